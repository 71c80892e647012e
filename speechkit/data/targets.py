"""What a model is to say of a cut, its transcript or its labels: checked before an epoch begins, put into batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from lhotse.cut import Cut

from speechkit.audio import Samples
from speechkit.data.corpora import events_of, labels_of, text_of
from speechkit.schema import meant
from speechkit.text import Tokenizer
from speechkit.types import Batch, Event, Seconds, TagBatch, Timing


@dataclass(frozen=True)
class Utterance:
    """A cut, or a piece of it, on its way into an epoch. All chance in its augmentation comes from ``key``."""

    cut: Cut
    key: str
    seconds: Seconds  # after the change of speed
    start: Seconds = 0.0  # of the piece
    duration: Seconds | None = None  # of the piece, before the change of speed; ``None`` is all from the start on

    def events(self) -> tuple[Event, ...] | None:
        """What is heard and when, in seconds after the change of speed; ``None`` where that is not known."""
        if (events := events_of(self.cut)) is None:
            return None
        length = self.cut.duration - self.start if self.duration is None else self.duration
        speed = length / self.seconds
        inside = (
            event._replace(
                start=max(0.0, event.start - self.start) / speed, end=min(length, event.end - self.start) / speed
            )
            for event in events
        )
        return tuple(event for event in inside if event.start < event.end)

    def labels(self) -> tuple[str, ...]:
        """What is heard: of a piece, where that is known, in this piece."""
        events = self.events()
        return labels_of(self.cut) if events is None else tuple(dict.fromkeys(event.label for event in events))


class Targets(Protocol):
    """What is read from a cut beside its sound."""

    transcribed: bool  # whether each line of a manifest must have a text

    def check(self, cuts: Iterable[Cut]) -> None:
        """Raise a ValueError that names what a model with these targets could not say."""
        ...

    def batch(self, samples: Sequence[Samples], utterances: Sequence[Utterance]) -> Any:
        """Sounds padded with zeros, and what is to be said of them."""
        ...


@dataclass(frozen=True)
class Transcripts:
    """The text of a cut in the tokens of a tokenizer."""

    tokenizer: Tokenizer
    transcribed = True

    def check(self, cuts: Iterable[Cut]) -> None:
        check_text(cuts, self.tokenizer)

    def batch(self, samples: Sequence[Samples], utterances: Sequence[Utterance]) -> Batch:
        texts = tuple(text_of(utterance.cut) for utterance in utterances)
        tokens = [np.asarray(self.tokenizer.encode(text), dtype=np.int64) for text in texts]
        rows, sample_lengths = _pad(samples, np.float32)
        labels, token_lengths = _pad(tokens, np.int64)
        return Batch(rows, sample_lengths, labels, token_lengths, tuple(u.cut.id for u in utterances), texts)


@dataclass(frozen=True)
class Labels:
    """The classes heard in a cut, by their names.

    Args:
        names: of all classes; without any, labels are not looked at, as for a training that needs none.
        exclusive: whether each cut must have just one.
        timed: whether batches have events.
    """

    names: tuple[str, ...] = ()
    exclusive: bool = False
    timed: bool = False
    transcribed = False

    def __post_init__(self) -> None:
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"model.labels must name each class once, but names {', '.join(twice)} again; delete it.")

    def check(self, cuts: Iterable[Cut]) -> None:
        """See that every label is a class, and that there are as many in a cut as there may be.

        Raises:
            ValueError: naming the labels that are no class, or a cut with too many or none.
        """
        if not self.names:
            return
        unknown: Counter[str] = Counter()
        for cut in cuts:
            labels = labels_of(cut)
            unknown.update(set(labels) - set(self.names))
            if self.exclusive and len(labels) != 1:
                raise ValueError(
                    f"Every cut must have one label where classes exclude each other, but {cut.id} has "
                    f"{', '.join(labels) or 'none'}; correct its line, or set model.exclusive=false."
                )
        if unknown:
            shown = ", ".join(f"{label} ({count})" for label, count in unknown.most_common(8))
            near = meant(unknown.most_common(1)[0][0], self.names)
            raise ValueError(
                f"Every label must be one of the {len(self.names)} classes of model.labels, but {len(unknown)} are "
                f"not: {shown}{near} Correct them, or add them to the classes."
            )

    def batch(self, samples: Sequence[Samples], utterances: Sequence[Utterance]) -> TagBatch:
        rows, lengths = _pad(samples, np.float32)
        heard = [utterance.labels() for utterance in utterances]
        return TagBatch(
            samples=rows,
            sample_lengths=lengths,
            targets=torch.tensor([[float(name in labels) for name in self.names] for labels in heard]),
            ids=tuple(utterance.cut.id for utterance in utterances),
            texts=tuple(", ".join(labels) for labels in heard),
            events=self._timing([utterance.events() for utterance in utterances]) if self.timed else None,
        )

    def _timing(self, heard: Sequence[tuple[Event, ...] | None]) -> Timing:
        rows = [(row, event) for row, events in enumerate(heard) for event in events or ()]
        return Timing(
            known=torch.tensor([events is not None for events in heard]),
            clips=torch.tensor([row for row, _ in rows], dtype=torch.int64),
            classes=torch.tensor([self.names.index(event.label) for _, event in rows], dtype=torch.int64),
            times=torch.tensor([(event.start, event.end) for _, event in rows]).reshape(-1, 2),
        )


def check_text(cuts: Iterable[Cut], tokenizer: Tokenizer) -> None:
    """See that a tokenizer can write every transcript, before an epoch is half way.

    Raises:
        ValueError: naming the characters (or words) outside its vocabulary, with an utterance for each of a few.
    """
    where: dict[str, list[str]] = {}
    for cut in cuts:
        for item in _unwritable(text_of(cut), tokenizer):
            where.setdefault(item, []).append(cut.id)
    if where:
        shown = "; ".join(f"{item!r} in {len(ids)}, for example {ids[0]}" for item, ids in sorted(where.items())[:8])
        raise ValueError(
            f"Every transcript must be written in the vocabulary, but {len(where)} characters or words are outside it "
            f"({shown}); normalise those texts, leave the utterances out, or add what is missing to the vocabulary."
        )


def _unwritable(text: str, tokenizer: Tokenizer) -> set[str]:
    """The characters of a text that a tokenizer cannot write, or whole words where it knows no characters."""
    if _writes(text, tokenizer):
        return set()
    found = {character for character in text if character.isspace() and not _writes(character, tokenizer)}
    for word in text.split():
        if not _writes(word, tokenizer):
            bad = {character for character in word if not _writes(character, tokenizer)}
            found |= bad if bad < set(word) else {word}
    return found


def _writes(text: str, tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.encode(text)
    except ValueError:
        return False
    return True


def _pad(rows: Sequence[np.ndarray], kind: type) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = [len(row) for row in rows]
    padded: np.ndarray = np.zeros((len(rows), max(lengths)), dtype=kind)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return torch.from_numpy(padded), torch.tensor(lengths)
