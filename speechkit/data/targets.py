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
from speechkit.data.corpora import labels_of, text_of
from speechkit.schema import meant
from speechkit.text import Tokenizer
from speechkit.types import Batch, TagBatch


class Targets(Protocol):
    """What is read from a cut beside its sound."""

    transcribed: bool  # whether each line of a manifest must have a text

    def check(self, cuts: Iterable[Cut]) -> None:
        """Raise a ValueError that names what a model with these targets could not say."""
        ...

    def batch(self, samples: Sequence[Samples], cuts: Sequence[Cut]) -> Any:
        """Sounds padded with zeros, and what is to be said of them."""
        ...


@dataclass(frozen=True)
class Transcripts:
    """The text of a cut in the tokens of a tokenizer."""

    tokenizer: Tokenizer
    transcribed = True

    def check(self, cuts: Iterable[Cut]) -> None:
        check_text(cuts, self.tokenizer)

    def batch(self, samples: Sequence[Samples], cuts: Sequence[Cut]) -> Batch:
        texts = tuple(text_of(cut) for cut in cuts)
        tokens = [np.asarray(self.tokenizer.encode(text), dtype=np.int64) for text in texts]
        rows, sample_lengths = _pad(samples, np.float32)
        labels, token_lengths = _pad(tokens, np.int64)
        return Batch(rows, sample_lengths, labels, token_lengths, tuple(cut.id for cut in cuts), texts)


@dataclass(frozen=True)
class Labels:
    """The classes heard in a cut, by their names.

    Args:
        names: of all classes; without any, labels are not looked at, as for a training that needs none.
        exclusive: whether each cut must have just one.
    """

    names: tuple[str, ...] = ()
    exclusive: bool = False
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

    def batch(self, samples: Sequence[Samples], cuts: Sequence[Cut]) -> TagBatch:
        rows, lengths = _pad(samples, np.float32)
        heard = [labels_of(cut) for cut in cuts]
        return TagBatch(
            samples=rows,
            sample_lengths=lengths,
            targets=torch.tensor([[float(name in labels) for name in self.names] for labels in heard]),
            ids=tuple(cut.id for cut in cuts),
            texts=tuple(", ".join(labels) for labels in heard),
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
