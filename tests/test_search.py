"""Searches against sums over every alignment and every text, which small cases allow."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speechkit.objectives import CTC, AttentionDecoder, Hybrid
from speechkit.search import (
    AttentionBeam,
    Endpoint,
    Greedy,
    JointBeam,
    PrefixBeam,
    PrefixScores,
    Rescored,
    stable_prefix,
)
from speechkit.stream import clone_state, put, take
from speechkit.types import EncoderOutput, Hypothesis

DIM = 12
STREAMING = [Greedy, partial(PrefixBeam, beam=4)]
LATE = [partial(Rescored, beam=4), partial(JointBeam, beam=4), partial(AttentionBeam, beam=4)]
SEARCHES = STREAMING + LATE
Text = tuple[int, ...]


def objective(vocab: int = 6, sharpness: float = 2.0) -> Hybrid:
    """A model that has learnt nothing but is sure of it: posteriors as uneven as those of speech."""
    model = Hybrid(dim=DIM, vocab=vocab, ctc=CTC, attention=partial(AttentionDecoder, layers=2)).eval()
    with torch.no_grad():
        model.ctc.head.weight *= sharpness
        model.attention.head.weight *= sharpness
    return model


def encode(*lengths: int) -> EncoderOutput:
    return EncoderOutput(torch.randn(len(lengths), max(lengths), DIM), torch.tensor(lengths))


def only(encoded: EncoderOutput, row: int) -> EncoderOutput:
    length = encoded.lengths[row]
    return EncoderOutput(encoded.frames[row : row + 1, :length], length[None])


def assert_same(a: list[Hypothesis], b: list[Hypothesis]) -> None:
    assert [h.tokens for h in a] == [h.tokens for h in b]
    assert [h.spans for h in a] == [h.spans for h in b]
    assert [h.score for h in a] == pytest.approx([h.score for h in b], rel=1e-6, abs=1e-6)
    for one, other in zip(a, b, strict=True):
        assert one.confidences == pytest.approx(other.confidences, rel=1e-5)


# ---------------------------------------------------------------- the slow and obvious versions


def runs(path: Text) -> list[tuple[int, int, int]]:
    """The tokens of an alignment, each with its first frame and the one after its last."""
    found, frame = [], 0
    for symbol, group in itertools.groupby(path):
        count = len(list(group))
        if symbol:
            found.append((symbol, frame, frame + count))
        frame += count
    return found


def alignments(log_probs: Tensor) -> dict[Text, list[tuple[float, Text]]]:
    """Every path over the frames, under the text it reads as, with its log probability; best first."""
    texts: dict[Text, list[tuple[float, Text]]] = {}
    frames = log_probs.double().tolist()
    for path in itertools.product(range(log_probs.shape[-1]), repeat=len(frames)):
        score = sum(frame[symbol] for frame, symbol in zip(frames, path, strict=True))
        texts.setdefault(tuple(symbol for symbol, *_ in runs(path)), []).append((score, path))
    return {text: sorted(paths, reverse=True) for text, paths in texts.items()}


def log_sum(scores: list[float]) -> float:
    return torch.tensor(scores, dtype=torch.float64).logsumexp(0).item()


def prefix_beam(log_probs: list[list[float]], beam: int) -> list[tuple[Text, float]]:
    """Prefix beam search by the book: every token of every frame, texts as tuples, probabilities as they are."""
    alive = {(): (1.0, 0.0)}
    for frame in log_probs:
        new: dict[Text, list[float]] = {}
        for text, (blank, token) in alive.items():
            for symbol, p in enumerate(map(math.exp, frame)):
                stay = new.setdefault(text, [0.0, 0.0])
                if symbol == 0:
                    stay[0] += (blank + token) * p
                elif text and symbol == text[-1]:
                    stay[1] += token * p
                    new.setdefault((*text, symbol), [0.0, 0.0])[1] += blank * p
                else:
                    new.setdefault((*text, symbol), [0.0, 0.0])[1] += (blank + token) * p
        alive = dict(sorted(new.items(), key=lambda item: -sum(item[1]))[:beam])
    return [(text, math.log(sum(p))) for text, p in alive.items()]


def prefix_score(log_probs: list[list[float]], text: Text) -> float:
    """ln P(transcript begins with text), frame by frame as in Watanabe et al. 2017, algorithm 2, in float64."""
    blank, token = [math.prod(math.exp(f[0]) for f in log_probs[:t]) for t in range(len(log_probs) + 1)], None
    last, total = 0, 1.0
    for symbol in text:
        old_blank, old_token = blank, token or [0.0] * len(blank)
        blank, token, total = [0.0], [0.0], 0.0
        for t, frame in enumerate(log_probs):
            phi = old_blank[t] + (old_token[t] if symbol != last else 0.0)
            total += phi * math.exp(frame[symbol])
            token.append((token[t] + phi) * math.exp(frame[symbol]))
            blank.append((blank[t] + token[t]) * math.exp(frame[0]))
        last = symbol
    return math.log(total)


def all_texts(vocab: int, longest: int) -> list[Text]:
    return [text for n in range(longest + 1) for text in itertools.product(range(1, vocab), repeat=n)]


def attention_scores(model: Hybrid, encoded: EncoderOutput, text: Text) -> Tensor:
    """ln P of everything that could stand at each place of a text, ``[L+1, V]``."""
    tokens = torch.tensor([text], dtype=torch.int64).reshape(1, -1)
    return model.attention.log_probs(encoded, tokens, torch.tensor([len(text)]))[0].double()


# ---------------------------------------------------------------- CTC


def test_greedy_reads_the_best_symbol_of_every_frame() -> None:
    model, encoded = objective(), encode(40)
    log_probs, path = model.ctc.log_probs(encoded.frames)[0].max(-1)
    [[best]] = Greedy(model)(encoded)
    expected = runs(tuple(path.tolist()))
    assert best.tokens == tuple(symbol for symbol, *_ in expected)
    assert best.spans == tuple((start, end) for _, start, end in expected)
    assert best.score == pytest.approx(log_probs.sum().item(), rel=1e-6)
    peaks = [log_probs[start:end].max().exp().item() for _, start, end in expected]
    assert best.confidences == pytest.approx(peaks)


@pytest.mark.parametrize("vocab", [2, 4])
def test_a_wide_prefix_beam_gives_every_text_its_exact_probability(vocab: int) -> None:
    model, encoded = objective(vocab), encode(5)
    expected = alignments(model.ctc.log_probs(encoded.frames)[0])
    [found] = PrefixBeam(model, beam=1000)(encoded)
    assert {h.tokens for h in found} == set(expected)
    for h in found:
        assert h.score == pytest.approx(log_sum([score for score, _ in expected[h.tokens]]), abs=1e-6)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert sum(math.exp(h.score) for h in found) == pytest.approx(1.0)


def test_spans_and_confidences_of_the_prefix_beam_are_those_of_the_best_path() -> None:
    model, encoded = objective(4), encode(6)
    log_probs = model.ctc.log_probs(encoded.frames)[0]
    expected = alignments(log_probs)
    for h in PrefixBeam(model, beam=2000)(encoded)[0]:
        heard = runs(expected[h.tokens][0][1])
        assert h.spans == tuple((start, end) for _, start, end in heard)
        peaks = [log_probs[start:end, symbol].max().exp().item() for symbol, start, end in heard]
        assert h.confidences == pytest.approx(peaks)


@pytest.mark.parametrize("beam", [1, 2, 5, 12])
@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_pruning_changes_nothing(beam: int, sharpness: float) -> None:
    model, encoded = objective(9, sharpness), encode(60, 45, 30)
    found = PrefixBeam(model, beam=beam)(encoded)
    for row, hypotheses in enumerate(found):
        log_probs = model.ctc.log_probs(only(encoded, row).frames)[0].double().tolist()
        expected = prefix_beam(log_probs, beam)
        assert [h.tokens for h in hypotheses] == [text for text, _ in expected]
        assert [h.score for h in hypotheses] == pytest.approx([score for _, score in expected], rel=1e-5)


def test_the_beam_hears_where_the_best_path_alone_does_not() -> None:
    """Two frames, blank 0.4 and a token 0.35 each: blank blank is the best path (0.16), the token the best text."""
    model = objective(3)
    probabilities = torch.tensor([0.4, 0.35, 0.25])
    with torch.no_grad():
        model.ctc.head.weight.zero_()
        model.ctc.head.bias.copy_(probabilities.log())
    encoded = encode(2)
    assert Greedy(model)(encoded)[0][0].tokens == ()
    best = PrefixBeam(model)(encoded)[0][0]
    assert best.tokens == (1,)
    assert math.exp(best.score) == pytest.approx(0.35 * 0.35 + 2 * 0.4 * 0.35)


@pytest.mark.parametrize("frames", [3, 6])
def test_prefix_scores_equal_the_sum_over_all_alignments(frames: int) -> None:
    log_probs = torch.randn(2, frames + 2, 3).mul(2).log_softmax(-1)
    log_probs[:, frames:] = torch.nan
    log_probs[1, frames - 1] = torch.nan
    lengths = torch.tensor([frames, frames - 1])
    scores = PrefixScores.start(log_probs, lengths)
    for text in [(1,), (1, 1), (1, 1, 2), (1, 1, 2, 2)]:
        candidates = torch.tensor([[[1, 2]]] * 2)
        prefix = scores.prefix(candidates)
        scores = scores.grow(torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), text[-1]))
        for row in range(2):
            texts = alignments(log_probs[row, : lengths[row]])
            for place, token in enumerate((1, 2)):
                begin = (*text[:-1], token)
                paths = [s for t, found in texts.items() if t[: len(begin)] == begin for s, _ in found]
                assert prefix[row, 0, place].item() == pytest.approx(log_sum(paths), abs=1e-6)
            exact = log_sum([s for s, _ in texts.get(text, [])])
            assert scores.whole()[row, 0].item() == pytest.approx(exact, abs=1e-6)


def test_prefix_scores_of_long_texts_equal_the_recursion_in_float64() -> None:
    log_probs, text = torch.randn(1, 200, 8).mul(4).double().log_softmax(-1), (3, 3, 1, 5, 2, 2, 7, 1)
    scores, parent = PrefixScores.start(log_probs, torch.tensor([200])), torch.zeros(1, 1, dtype=torch.int64)
    for n, token in enumerate(text, 1):
        prefix = scores.prefix(torch.tensor([[[token]]])).item()
        assert prefix == pytest.approx(prefix_score(log_probs[0].tolist(), text[:n]), rel=1e-9, abs=1e-9)
        scores = scores.grow(parent, torch.tensor([[token]]))
    loss = nn.functional.ctc_loss(
        log_probs.transpose(0, 1), torch.tensor([text]), (200,), (len(text),), reduction="sum"
    )
    assert scores.whole().item() == pytest.approx(-loss.item(), rel=1e-9)


def test_prefix_scores_grow_from_chosen_parents_of_chosen_utterances() -> None:
    log_probs = torch.randn(3, 7, 4).log_softmax(-1)
    scores = PrefixScores.start(log_probs, torch.tensor([7, 5, 6]))
    scores = scores.grow(torch.tensor([[0, 0]] * 3), torch.tensor([[1, 2]] * 3)).select(torch.tensor([0, 2]))
    scores = scores.grow(torch.tensor([[1, 1, 0]] * 2), torch.tensor([[2, 3, 1]] * 2))
    for row, (utterance, length) in enumerate(((0, 7), (2, 6))):
        for place, text in enumerate(((2, 2), (2, 3), (1, 1))):
            texts = alignments(log_probs[utterance, :length])
            assert scores.whole()[row, place].item() == pytest.approx(log_sum([s for s, _ in texts[text]]), abs=1e-6)


# ---------------------------------------------------------------- streaming


def divided(search: Any, encoded: EncoderOutput, seed: int) -> tuple[list[list[Hypothesis]], list[list[Any]]]:
    """Search in steps of random lengths, each stream paused now and then, every padded frame NaN."""
    dice, lengths = random.Random(seed), encoded.lengths.tolist()
    state, done, partial_results = search.init_state(len(lengths)), [0] * len(lengths), []
    while done != lengths:
        sizes = [dice.choice((0, 1, 2, 5, 11)) for _ in lengths]
        sizes = [min(size, n - d) for size, n, d in zip(sizes, lengths, done, strict=True)]
        chunk = torch.full((len(lengths), max(sizes), DIM), torch.nan)
        for row, size in enumerate(sizes):
            chunk[row, :size] = encoded.frames[row, done[row] : done[row] + size]
        results, state = search.step(EncoderOutput(chunk, torch.tensor(sizes)), state)
        partial_results.append(results)
        done = [d + size for d, size in zip(done, sizes, strict=True)]
    return search.finish(state), partial_results


@pytest.mark.parametrize("build", SEARCHES)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_stream_equals_the_whole_in_any_division(build: Any, seed: int) -> None:
    search, encoded = build(objective()), encode(40, 23, 1, 0, 31)
    encoded.frames[1, 23:] = torch.nan
    whole = search(encoded)
    streamed, _ = divided(search, encoded, seed)
    for row in range(5):
        assert_same(streamed[row], whole[row])
        if encoded.lengths[row]:
            assert_same(search(only(encoded, row))[0], whole[row])


@pytest.mark.parametrize("build", STREAMING)
def test_what_a_streaming_search_says_is_what_it_would_say_at_the_end(build: Any) -> None:
    search, encoded = build(objective()), encode(12)
    state = search.init_state(1)
    for frame in range(12):
        chunk = EncoderOutput(encoded.frames[:, frame : frame + 1], torch.tensor([1]))
        results, state = search.step(chunk, state)
        assert_same(results[0], search(EncoderOutput(encoded.frames, torch.tensor([frame + 1])))[0])


@pytest.mark.parametrize("build", SEARCHES)
def test_streams_join_leave_and_branch_by_their_row(build: Any) -> None:
    search, encoded = build(objective()), encode(20, 20)
    first, second = (
        EncoderOutput(encoded.frames[:, part], torch.tensor([10, 10])) for part in (slice(10), slice(10, 20))
    )
    _, state = search.step(first, search.init_state(2))
    branch = clone_state(state)
    state = put(state, [0], search.init_state(1))
    _, state = search.step(second, state)
    halves = EncoderOutput(encoded.frames[:1, 10:], torch.tensor([10]))
    assert_same(search.finish(take(state, [0]))[0], search(halves)[0])
    assert_same(search.finish(take(state, [1]))[0], search(only(encoded, 1))[0])
    assert_same(search.finish(search.step(second, branch)[1])[0], search(only(encoded, 0))[0])


@pytest.mark.parametrize("build", SEARCHES)
def test_a_stream_that_heard_nothing_reads_as_nothing(build: Any) -> None:
    search = build(objective())
    assert search.finish(search.init_state(2)) == [[Hypothesis()]] * 2
    assert search(EncoderOutput(torch.zeros(1, 0, DIM), torch.tensor([0]))) == [[Hypothesis()]]


@pytest.mark.parametrize("build", SEARCHES)
def test_hypotheses_come_best_first_and_differ(build: Any) -> None:
    for beam in build(objective())(encode(30, 20)):
        assert [h.score for h in beam] == sorted((h.score for h in beam), reverse=True)
        assert len({h.tokens for h in beam}) == len(beam) >= 1


@pytest.mark.parametrize("build", SEARCHES)
@pytest.mark.parametrize("seed", range(3))
def test_stable_tokens_never_change(build: Any, seed: int) -> None:
    torch.manual_seed(seed)
    final, said = divided(build(objective(sharpness=3.0)), encode(60, 40), seed)
    for row in range(2):
        history = [results[row][0].tokens[: stable_prefix(results[row])] for results in said if results[row]]
        for stable in history:
            assert final[row][0].tokens[: len(stable)] == stable
        assert history == sorted(history, key=len)
    if build in (Greedy, SEARCHES[1], SEARCHES[2]):
        assert history[-1]


def test_stable_prefix_counts_what_all_hypotheses_share() -> None:
    def beam(*texts: Text) -> list[Hypothesis]:
        return [Hypothesis(text) for text in texts]

    assert stable_prefix([]) == 0
    assert stable_prefix(beam((1, 2, 3))) == 3
    assert stable_prefix(beam((1, 2, 3), (1, 2), (1, 2, 4))) == 2
    assert stable_prefix(beam((2, 1), (1, 1))) == 0
    assert stable_prefix(beam((2, 1), ())) == 0


def test_late_searches_say_what_their_first_pass_says() -> None:
    model, encoded = objective(), encode(30)
    for late, first in ((Rescored(model, beam=4), PrefixBeam(model, beam=4)), (JointBeam(model), Greedy(model))):
        said, _ = late.step(encoded, late.init_state(1))
        expected, _ = first.step(encoded, first.init_state(1))
        assert_same(said[0][: len(expected[0])], expected[0])
    silent = AttentionBeam(model)
    assert silent.step(encoded, silent.init_state(1))[0] == [[]]


def test_a_step_never_looks_back_beyond_its_frames() -> None:
    """What was heard before is a flat reading behind the last token, in texts much deeper than Python's recursion."""
    search = PrefixBeam(objective(sharpness=6.0), beam=8)
    state = search.init_state(1)
    for _ in range(30):
        results, state = search.step(encode(100), state)
    assert len(results[0][0].tokens) > 1500
    paths = [paths for prefix in state[0].prefixes for paths in (prefix.blank, prefix.token, prefix.both)]
    assert all(isinstance(path.heard.before, Hypothesis) for path in paths if path.best > -math.inf)
    assert "before" in repr(state)


@pytest.mark.parametrize("build", SEARCHES)
def test_a_search_leaves_no_gradient_behind(build: Any) -> None:
    encoded = encode(8)
    encoded.frames.requires_grad_()
    search = build(objective())
    _, state = search.step(encoded, search.init_state(1))
    assert search.finish(state)
    if build in LATE:
        assert not any(frames.requires_grad for kept in state for frames in kept.frames)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_a_wide_joint_beam_finds_the_best_of_all_texts(weight: float) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model, encoded = objective(4), encode(4)
        texts = alignments(model.ctc.log_probs(encoded.frames)[0])
        scores = {}
        for text, paths in texts.items():
            steps = attention_scores(model, encoded, text)
            attention = sum(steps[n, token].item() for n, token in enumerate((*text, 0)))
            scores[text] = weight * log_sum([s for s, _ in paths]) + (1 - weight) * attention
        found = JointBeam(model, beam=400, ctc_weight=weight)(encoded)[0]
        assert found[0].tokens == max(scores, key=scores.get)
        for h in found:
            assert h.score == pytest.approx(scores[h.tokens], abs=1e-5)


def test_a_wide_attention_beam_finds_the_best_of_all_texts_that_may_end() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model, encoded = objective(4), encode(4)
        scores = {}
        for text in all_texts(4, 4):
            steps = attention_scores(model, encoded, text)
            if len(text) == 4 or steps[-1, 0] > 1.5 * steps[-1, 1:].max():
                scores[text] = sum(steps[n, token].item() for n, token in enumerate((*text, 0)))
        found = AttentionBeam(model, beam=400)(encoded)[0]
        assert found[0].tokens == max(scores, key=scores.get)
        for h in found:
            assert h.score == pytest.approx(scores[h.tokens], abs=1e-5)


def test_a_beam_of_one_follows_the_decoder() -> None:
    model, encoded = objective(sharpness=4.0), encode(20)
    text: Text = ()
    while len(text) < 20:
        best = attention_scores(model, encoded, text)[-1].argmax().item()
        if best == 0:
            break
        text = (*text, best)
    assert AttentionBeam(model, beam=1)(encoded)[0][0].tokens == text


class Script(nn.Module):
    """A decoder that says at each place what it always says there, and counts its steps."""

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.log_probs, self.steps = probabilities.double().log(), 0

    def init_state(self, encoded: EncoderOutput) -> Tensor:
        return torch.zeros_like(encoded.lengths)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        return self.log_probs[state.clamp(max=len(self.log_probs) - 1)], state + 1

    def select(self, state: Tensor, utterances: Tensor, hypotheses: Tensor) -> Tensor:
        return state[hypotheses]


def smoothed(text: Text, vocab: int) -> Tensor:
    """What label smoothing teaches of one sentence: 0.9 on the right token, the rest on all alike."""
    probabilities = torch.full((len(text) + 1, vocab), 0.1 / (vocab - 1))
    return probabilities.scatter(1, torch.tensor([*text, 0])[:, None], 0.9)


class AttentionOnly(nn.Module):
    ctc = None

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention


def test_a_long_text_does_not_lose_against_ending_early() -> None:
    """150 tokens at 0.9 are less likely than the end at once, with which smoothing tempts at every place."""
    text = tuple(1 + n % 9 for n in range(150))
    assert len(text) * math.log(0.9) < math.log(0.1 / 9)
    for beam in (1, 4, 16):
        decoder = Script(smoothed(text, 10))
        [found] = AttentionBeam(AttentionOnly(decoder), beam=beam)(encode(200))
        assert found[0].tokens == text
        assert found[0].spans == ()
        assert decoder.steps == 151  # and stops at once when it has ended


def test_the_search_goes_on_while_a_text_can_still_win() -> None:
    """Ending at once has 0.45; going on has 0.55 and is then sure of the end."""
    decoder = Script(torch.tensor([[0.45, 0.55, 0.0], [1.0, 0.0, 0.0]]).clamp(min=1e-9))
    [found] = AttentionBeam(AttentionOnly(decoder), beam=3)(encode(9))
    assert [h.tokens for h in found[:2]] == [(1,), ()]
    assert decoder.steps == 2


def test_no_text_is_longer_than_the_limit() -> None:
    model = objective()
    with torch.no_grad():
        model.attention.head.bias[0] = -50.0
    encoded = encode(8, 1, 5)
    for ratio in (1.0, 0.5, 2.0):
        beams = AttentionBeam(model, beam=3, tokens_per_frame=ratio)(encoded)
        for beam, frames in zip(beams, (8, 1, 5), strict=True):
            assert {len(h.tokens) for h in beam} == {max(1, int(frames * ratio))}


def test_texts_that_cannot_be_aligned_have_no_times() -> None:
    model = objective()
    with torch.no_grad():
        model.attention.head.bias[0] = -50.0
    for h in AttentionBeam(model, beam=3, tokens_per_frame=2.0)(encode(4))[0]:
        assert len(h.tokens) == 8 and h.spans == () and h.confidences == ()


@pytest.mark.parametrize("build", LATE[1:])
def test_times_of_attention_come_from_the_best_ctc_path(build: Any) -> None:
    model, encoded = objective(4), encode(6)
    log_probs = model.ctc.log_probs(encoded.frames)[0]
    expected = alignments(log_probs)
    for h in build(model)(encoded)[0]:
        if h.tokens not in expected:
            continue
        heard = runs(expected[h.tokens][0][1])
        assert h.spans == tuple((start, end) for _, start, end in heard)
        peaks = [log_probs[start:end, symbol].max().exp().item() for symbol, start, end in heard]
        assert h.confidences == pytest.approx(peaks, rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_rescoring_orders_the_texts_of_the_prefix_beam_by_both_scores(weight: float) -> None:
    model, encoded = objective(), encode(20, 3)
    first = PrefixBeam(model, beam=5)(encoded)
    for row, beam in enumerate(Rescored(model, beam=5, ctc_weight=weight)(encoded)):
        expected = []
        for h in first[row]:
            steps = attention_scores(model, only(encoded, row), h.tokens)
            attention = sum(steps[n, token].item() for n, token in enumerate((*h.tokens, 0)))
            expected.append((weight * h.score + (1 - weight) * attention, h.tokens, h.spans))
        expected.sort(reverse=True)
        assert [(h.tokens, h.spans) for h in beam] == [(tokens, spans) for _, tokens, spans in expected]
        assert [h.score for h in beam] == pytest.approx([score for score, *_ in expected], rel=1e-5)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("build", "lacking", "said"),
    [
        (Greedy, "attention", r"Greedy needs an objective with a head 'ctc', .*AttentionBeam"),
        (PrefixBeam, "attention", r"PrefixBeam needs an objective with a head 'ctc', but AttentionDecoder has none"),
        (Rescored, "attention", r"'ctc'"),
        (JointBeam, "attention", r"'ctc'"),
        (AttentionBeam, "ctc", r"AttentionBeam needs an objective with a head 'attention', but CTC has none; .*Greedy"),
        (Rescored, "ctc", r"'attention', but CTC has none; .*objective=hybrid"),
        (JointBeam, "ctc", r"'attention'"),
    ],
)
def test_a_search_says_which_head_it_lacks(build: Any, lacking: str, said: str) -> None:
    heads = {"ctc": CTC(dim=DIM, vocab=4), "attention": AttentionDecoder(dim=DIM, vocab=4)}
    with pytest.raises(ValueError, match=said):
        build(heads[lacking])


@pytest.mark.parametrize("build", [PrefixBeam, Rescored, JointBeam, AttentionBeam])
def test_a_beam_of_nothing_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=rf"{build.__name__}.beam must be at least 1 hypothesis, but is 0; 8 is"):
        build(objective(), beam=0)


@pytest.mark.parametrize("build", [Rescored, JointBeam])
def test_a_weight_that_is_no_share_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=rf"{build.__name__}.ctc_weight must be from 0 to 1, but is 1.5"):
        build(objective(), ctc_weight=1.5)


def test_a_joint_search_without_ctc_is_refused() -> None:
    with pytest.raises(ValueError, match=r"JointBeam.ctc_weight must be above 0 .*use AttentionBeam"):
        JointBeam(objective(), ctc_weight=0.0)


def test_a_limit_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AttentionBeam.tokens_per_frame must be above 0, but is 0; 1.0 allows"):
        AttentionBeam(objective(), tokens_per_frame=0)


# ---------------------------------------------------------------- endpoints


@pytest.mark.parametrize(
    ("best", "frames", "over"),
    [
        (Hypothesis(), 124, False),
        (Hypothesis(), 125, True),
        (Hypothesis((3,), spans=((10, 12),)), 36, False),
        (Hypothesis((3,), spans=((10, 12),)), 37, True),
        (Hypothesis((3, 4), spans=((10, 12), (480, 490))), 499, False),
        (Hypothesis((3, 4), spans=((10, 12), (480, 500))), 500, False),  # at `longest` in the middle of a word
        (Hypothesis((3, 4), spans=((10, 12), (730, 738))), 750, False),  # half as long again: half a pause, 0.5 s
        (Hypothesis((3, 4), spans=((10, 12), (730, 737))), 750, True),
        (Hypothesis((3, 4), spans=((10, 12), (990, 999))), 999, False),
        (Hypothesis((3, 4), spans=((10, 12), (990, 1000))), 1000, True),
        (Hypothesis((3, 4)), 499, False),
        (Hypothesis((3, 4)), 500, True),
        (None, 499, False),
        (None, 500, True),
    ],
)
def test_a_segment_ends_after_a_pause_a_silence_or_at_the_longest(best: Any, frames: int, over: bool) -> None:
    assert Endpoint(silence=5.0, pause=1.0, longest=20.0)(best, frames, 0.04) is over


def test_a_rule_of_infinity_never_applies() -> None:
    never = Endpoint(silence=math.inf, pause=math.inf, longest=math.inf)
    assert not never(Hypothesis((1,), spans=((0, 1),)), 10**9, 0.04)


def test_a_rule_without_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Endpoint.pause must be above 0 seconds, but is 0; .*math.inf"):
        Endpoint(pause=0)
