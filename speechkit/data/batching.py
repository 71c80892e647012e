"""Batches: utterances of like length together, the same ones in the same order for the same seed and epoch.

lhotse's samplers form batches while they iterate: how many there are is known at the end of an epoch, and to resume
they form all earlier ones again. Here an epoch is planned before it begins, from durations alone, as a pure function of
the seed, the epoch and the number of ranks. So it has a length, its k-th batch can be asked for at once, and a restart
continues exactly, whatever the workers were doing.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from speechkit.audio import Samples
from speechkit.data.augment import Augment
from speechkit.data.loading import load
from speechkit.data.targets import Targets, Utterance
from speechkit.types import Seconds

log = logging.getLogger("speechkit")


def plan(
    seconds: Sequence[Seconds],
    *,
    max_seconds: Seconds,
    dice: random.Random | None = None,
    short_first: bool = False,
    spread: float = 0.05,
    world_size: int = 1,
    rank: int = 0,
) -> list[list[int]]:
    """The batches of one epoch for one rank, as positions in ``seconds``; together the ranks have each exactly once.

    Utterances are sorted by length times a random factor near 1, so that neighbours are of like length and differ from
    epoch to epoch, and filled into batches from the longest down. These are buckets whose borders move: none is left
    half empty, and ten utterances are planned as well as a million.

    Args:
        seconds: how long each utterance is.
        max_seconds: of a batch, padding included; a longer utterance is a batch of its own.
        dice: ``None`` is no chance: the longest batch first, and only equals together.
        short_first: batches of short utterances before those of long ones, instead of in an order of chance.
        spread: the factor is within ``1 - spread`` and ``1 + spread``; more mixes better and pads more.
        world_size, rank: every rank has the same number of batches, and all are at ones of like length together.

    Raises:
        ValueError: if there are fewer utterances than ranks.
    """
    if len(seconds) < world_size:
        raise ValueError(
            f"An epoch must have an utterance for each rank, but has {len(seconds)} for {world_size} ranks; use fewer."
        )
    factors = [1.0 if dice is None else dice.uniform(1 - spread, 1 + spread) for _ in seconds]
    order = sorted(range(len(seconds)), key=lambda i: -seconds[i] * factors[i])
    batches = _divisible(_fill(order, seconds, max_seconds), world_size)
    steps = [batches[first : first + world_size] for first in range(0, len(batches), world_size)]
    if short_first:
        steps.reverse()
    elif dice is not None:
        dice.shuffle(steps)
    return [step[rank] for step in steps]


def _fill(order: Sequence[int], seconds: Sequence[Seconds], max_seconds: Seconds) -> list[list[int]]:
    batches: list[list[int]] = []
    longest = 0.0
    for position in order:
        longest = max(longest, seconds[position])
        if not batches or (len(batches[-1]) + 1) * longest > max_seconds:
            batches.append([])
            longest = seconds[position]
        batches[-1].append(position)
    return batches


def _divisible(batches: list[list[int]], count: int) -> list[list[int]]:
    """Halve the fullest batches until there is a multiple of ``count`` of them: nothing is dropped or had twice."""
    while len(batches) % count:
        fullest = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches[fullest]
        batches[fullest : fullest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


def padding(seconds: Sequence[Seconds], batches: Sequence[Sequence[int]]) -> float:
    """The share of all batches that is padding, 0 to 1."""
    held = sum(len(batch) * max(seconds[i] for i in batch) for batch in batches)
    return 1 - sum(seconds[i] for batch in batches for i in batch) / held


class _Rendering(Dataset):
    """The k-th batch of a plan, and a sentence for each utterance of it that could not be read. Runs in the workers."""

    def __init__(self, batches: list[list[Utterance]], targets: Targets, augment: Augment | None, sample_rate: int):
        self.batches, self.targets, self.augment, self.sample_rate = batches, targets, augment, sample_rate

    def __getitem__(self, index: int) -> tuple[Any, dict[str, str]]:
        faults: dict[str, str] = {}
        # A batch nothing is left of is replaced by the one after it: the other ranks of the step wait for this one.
        for shift in range(len(self.batches)):
            ready = self._read(self.batches[(index + shift) % len(self.batches)], faults)
            if ready:
                utterances, samples = zip(*ready, strict=True)
                return self.targets.batch(samples, utterances), faults
        return None, faults

    def _read(self, batch: Sequence[Utterance], faults: dict[str, str]) -> list[tuple[Utterance, Samples]]:
        ready = []
        for utterance in batch:
            try:
                samples = load(utterance.cut, self.sample_rate, start=utterance.start, duration=utterance.duration)
            except (ValueError, OSError) as fault:
                faults[utterance.cut.id] = str(fault)
            else:
                ready.append((utterance, self._augmented(samples, utterance)))
        return ready

    def _augmented(self, samples: Samples, utterance: Utterance) -> Samples:
        return samples if self.augment is None else self.augment(samples, self.sample_rate, utterance.key)


class Batches:
    """The batches of one epoch, read and padded by worker processes; to be iterated once or again.

    An utterance that cannot be read is left out with one warning, and ``unread`` has it.

    Args:
        batches: the plan.
        targets: what is read beside the sound.
        skip: batches at the beginning that were had before a restart; nothing of them is read.
        workers: processes that read ahead; 0 reads in this one.
        max_unread: the share of utterances that may be left out (one may in any case).
        known: ids that were warned of before, in earlier epochs.
    """

    def __init__(
        self,
        *,
        batches: list[list[Utterance]],
        targets: Targets,
        augment: Augment | None = None,
        sample_rate: int = 16000,
        skip: int = 0,
        workers: int = 0,
        max_unread: float = 0.05,
        known: set[str] | None = None,
    ) -> None:
        if not 0 <= skip <= len(batches):
            raise ValueError(
                f"skip must be at most the {len(batches)} batches of this epoch, but is {skip}; "
                f"the corpus, max_seconds or the number of ranks is not that of the run to be continued."
            )
        self.batches, self.skip, self.workers, self.max_unread = batches, skip, workers, max_unread
        self.rendering = _Rendering(batches, targets, augment, sample_rate)
        self.known = set() if known is None else known
        self.unread: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches that are left after ``skip``."""
        return len(self.batches) - self.skip

    def __iter__(self) -> Iterator[Any]:
        self.unread.clear()
        loader = DataLoader(
            self.rendering,
            sampler=range(self.skip, len(self.batches)),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            generator=torch.Generator(),  # or reading would advance the one that dropout draws from
            pin_memory=torch.cuda.is_available(),
        )
        # One batch behind the loader, whose workers so end before the last is given away: a caller who counts batches
        # never asks for one more, and each epoch would leave its workers behind, and their memory.
        last = None
        for batch, faults in loader:
            self._count(faults)
            if batch is not None:
                if last is not None:
                    yield last
                last = batch
        if last is not None:
            yield last

    def _count(self, faults: dict[str, str]) -> None:
        """Warn of what is new.

        Raises:
            ValueError: if more than the allowed share was left out.
        """
        self.unread.update(faults)
        for name, fault in faults.items():
            if name not in self.known:
                self.known.add(name)
                log.warning("Utterance %s is left out: %s", name, fault)
        total = sum(map(len, self.batches))
        if len(self.unread) > max(1, self.max_unread * total) or len(self.unread) == total:
            raise ValueError(
                f"At most {self.max_unread:.0%} of the {total} utterances of an epoch may be unreadable, but "
                f"{len(self.unread)} are already, the last one {[*self.unread][-1]}; "
                f"the warnings say why; bring the files back, or prepare the corpus again."
            )


def _as_it_is(item: Any) -> Any:
    return item
