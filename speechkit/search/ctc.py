"""Searches that read CTC alone, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from speechkit.search.base import Beam, Whole, check, head
from speechkit.types import BLANK, EncoderOutput, Hypothesis


class Followed(NamedTuple):
    """A path over the frames so far: what it reads as, and the symbol of its last frame."""

    frames: int = 0
    last: int = BLANK
    reading: Hypothesis = Hypothesis()


def follow(heard: Followed, path: Iterable[int], log_probs: Iterable[float]) -> Followed:
    """Walk on along a path of one symbol a frame, with the log probability of each.

    A token is a run of one symbol: its span is the frames of the run, its confidence the highest posterior in it.
    """
    frame, last, reading = heard
    score, tokens = reading.score, list(reading.tokens)
    spans, confidences = list(reading.spans), list(reading.confidences)
    for symbol, log_prob in zip(path, log_probs, strict=True):
        score += log_prob
        if symbol != BLANK:
            if symbol != last:
                tokens.append(symbol)
                spans.append((frame, frame))
                confidences.append(0.0)
            spans[-1] = (spans[-1][0], frame + 1)
            confidences[-1] = max(confidences[-1], math.exp(log_prob))
        frame, last = frame + 1, symbol
    return Followed(frame, last, Hypothesis(tuple(tokens), score, tuple(spans), tuple(confidences)))


class Greedy(Whole):
    """The most likely symbol of every frame, repeats and blanks taken out.

    The score is the log probability of that one path, not of the text. The work of a step follows its frames, beside
    copying the text so far: about 1 ms after an hour without an endpoint.

    Raises:
        ValueError: where the objective has no CTC head.
    """

    def __init__(self, objective: torch.nn.Module) -> None:
        self.ctc = head(objective, "ctc", self)

    def init_state(self, batch: int) -> list[Followed]:
        return [Followed()] * batch

    @torch.no_grad()
    def step(self, encoded: EncoderOutput, state: list[Followed]) -> tuple[list[Beam], list[Followed]]:
        log_probs, path = self.ctc.log_probs(encoded.frames).max(-1)
        streams = zip(state, path.tolist(), log_probs.tolist(), encoded.lengths.tolist(), strict=True)
        state = [follow(heard, p[:n], values[:n]) for heard, p, values, n in streams]
        return self.finish(state), state

    def finish(self, state: list[Followed]) -> list[Beam]:
        return [[heard.reading] for heard in state]


class _Heard(NamedTuple):
    """The last token of a path, linked to the one before it or, beyond the frames of this step, to all before it.

    So paths share what they have in common, and no step looks further back than its own frames.
    """

    token: int
    span: tuple[int, int]
    confidence: float
    before: _Heard | Hypothesis


class _Paths(NamedTuple):
    """All paths that read as one prefix and end in one way: their sum, the best of them, and what it heard when."""

    total: float = -math.inf
    best: float = -math.inf
    heard: _Heard | Hypothesis = Hypothesis()


class _Prefix(NamedTuple):
    """A text, by the paths that read as it.

    ``key`` is a hash of the whole text and ``parent`` that of the text without its last token: 61 bits, so that two
    of the few living texts share one by chance less than once in 10^15 frames.
    """

    key: int
    parent: int
    last: int
    blank: _Paths
    token: _Paths
    both: _Paths


class _Living(NamedTuple):
    """A stream: its clock, and the prefixes alive, best first."""

    frames: int
    prefixes: tuple[_Prefix, ...]


_EMPTY = _Prefix(0, -1, BLANK, _Paths(0.0, 0.0), _Paths(), _Paths(0.0, 0.0))


class PrefixBeam(Whole):
    """CTC prefix beam search (Hannun et al. 2014, arXiv 1408.2873), in the log domain.

    The score of a hypothesis is ln P(text | frames so far), summed over the paths the beam kept; spans and confidences
    are those of its single best path. Every hypothesis of a step is alive and none else is. A frame costs Python some
    6 us a living prefix, and more only where the frame is ambiguous: an extension is looked at only while it can
    still enter the beam. No frame and no token is skipped that could change a result.

    Within a step paths are linked nodes; at its end all before their last token is copied flat, once for those that
    share it, as handing out the hypotheses takes in any case. So a step never looks back, and what a stream remembers
    is its text, once for each way in which living prefixes still differ. Only the copying follows the length of the
    text: nothing to notice in the seconds between two endpoints, and some 20 ms a step after an hour without one.

    Args:
        beam: prefixes kept after every frame. With as many as there are texts the search is exact.

    Raises:
        ValueError: where the objective has no CTC head, or the beam is below 1.
    """

    def __init__(self, objective: torch.nn.Module, *, beam: int = 8) -> None:
        check(self, beam=beam)
        self.ctc = head(objective, "ctc", self)
        self.beam = beam

    def init_state(self, batch: int) -> list[_Living]:
        return [_Living(0, (_EMPTY,))] * batch

    @torch.no_grad()
    def step(self, encoded: EncoderOutput, state: list[_Living]) -> tuple[list[Beam], list[_Living]]:
        log_probs = self.ctc.log_probs(encoded.frames).cpu()
        # A token that is not among the beam + 1 best of its frame cannot enter: each that is better, all but perhaps
        # the last of the prefix, makes a better candidate of the same prefix, and those alone fill the beam.
        order = log_probs[..., BLANK + 1 :].topk(min(self.beam + 1, log_probs.shape[-1] - 1)).indices + BLANK + 1
        streams = zip(state, log_probs.numpy(), order.numpy(), encoded.lengths.tolist(), strict=True)
        state = [self._advance(living, values[:n], o[:n]) for living, values, o, n in streams]
        return self.finish(state), state

    def finish(self, state: list[_Living]) -> list[Beam]:
        return [[replace(_flat(p.both.heard), score=p.both.total) for p in living.prefixes] for living in state]

    def _advance(self, living: _Living, log_probs: Iterable, order: Iterable) -> _Living:
        frame, prefixes = living
        for values, tokens in zip(log_probs, order, strict=True):
            prefixes = self._frame(prefixes, values.tolist(), tokens.tolist(), frame)
            frame += 1
        return _Living(frame, _forget_links(prefixes))

    def _frame(
        self, prefixes: tuple[_Prefix, ...], log_probs: list[float], order: list[int], frame: int
    ) -> tuple[_Prefix, ...]:
        """The prefixes alive after one more frame; ``order`` holds its best tokens."""
        alive = {prefix.key: prefix for prefix in prefixes}
        stay = [_stay(prefix, alive.get(prefix.parent), log_probs, frame) for prefix in prefixes]
        candidates = [(prefix.both.total, prefix, BLANK) for prefix in stay]
        floor = min(total for total, *_ in candidates) if len(stay) == self.beam else -math.inf
        for prefix in prefixes:
            for token in order:
                if prefix.both.total + log_probs[token] <= floor:
                    break
                total = _before(prefix, token).total + log_probs[token]
                if total > floor and hash((prefix.key, token)) not in alive:
                    candidates.append((total, prefix, token))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)
        return tuple(
            _grow(prefix, token, log_probs[token], frame) if token else prefix
            for _, prefix, token in candidates[: self.beam]
        )


def _stay(prefix: _Prefix, parent: _Prefix | None, log_probs: list[float], frame: int) -> _Prefix:
    """A prefix after a frame that adds nothing to it: a blank, or its last token held, or heard where it lives too."""
    total, best, heard = prefix.both
    blank = _Paths(total + log_probs[BLANK], best + log_probs[BLANK], heard)
    log_prob, (total, best, heard) = log_probs[prefix.last], prefix.token
    if isinstance(heard, Hypothesis):  # the empty prefix, which has no last token
        return _Prefix(prefix.key, prefix.parent, BLANK, blank, prefix.token, blank)
    held = _Heard(heard.token, (heard.span[0], frame + 1), max(heard.confidence, math.exp(log_prob)), heard.before)
    token = _Paths(total + log_prob, best + log_prob, held)
    if parent is not None:
        token = _either(token, _hear(_before(parent, prefix.last), prefix.last, log_prob, frame))
    return _Prefix(prefix.key, prefix.parent, prefix.last, blank, token, _either(blank, token))


def _grow(prefix: _Prefix, token: int, log_prob: float, frame: int) -> _Prefix:
    """The prefix one token longer."""
    heard = _hear(_before(prefix, token), token, log_prob, frame)
    return _Prefix(hash((prefix.key, token)), prefix.key, token, _Paths(), heard, heard)


def _before(prefix: _Prefix, token: int) -> _Paths:
    """The paths after which ``token`` is a new one: a blank has to part it from an equal neighbour."""
    return prefix.blank if token == prefix.last else prefix.both


def _hear(paths: _Paths, token: int, log_prob: float, frame: int) -> _Paths:
    heard = _Heard(token, (frame, frame + 1), math.exp(log_prob), paths.heard)
    return _Paths(paths.total + log_prob, paths.best + log_prob, heard)


def _either(a: _Paths, b: _Paths) -> _Paths:
    """Both together: ln of the summed probabilities, and the better of the best paths."""
    high, low = (a.total, b.total) if a.total >= b.total else (b.total, a.total)
    total = high if low == -math.inf else high + math.log1p(math.exp(low - high))
    return _Paths(total, a.best, a.heard) if a.best >= b.best else _Paths(total, b.best, b.heard)


def _forget_links(prefixes: tuple[_Prefix, ...]) -> tuple[_Prefix, ...]:
    """The same prefixes, with all before the last token of a path copied flat: once for the paths that share it."""
    copies: dict[int, Hypothesis] = {}

    def forget(paths: _Paths) -> _Paths:
        if isinstance(paths.heard, Hypothesis):
            return paths
        before = paths.heard.before
        if id(before) not in copies:
            copies[id(before)] = _flat(before)
        return paths._replace(heard=paths.heard._replace(before=copies[id(before)]))

    return tuple(p._replace(blank=forget(p.blank), token=forget(p.token), both=forget(p.both)) for p in prefixes)


def _flat(heard: _Heard | Hypothesis) -> Hypothesis:
    """All that was heard on a path, without its score."""
    nodes = []
    while isinstance(heard, _Heard):
        nodes.append(heard)
        heard = heard.before
    if not nodes:
        return heard
    tokens, spans, confidences, _ = zip(*reversed(nodes), strict=True)
    return Hypothesis(heard.tokens + tokens, 0.0, heard.spans + spans, heard.confidences + confidences)
