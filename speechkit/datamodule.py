"""The Lightning data modules: sources in, the batches of any epoch out."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from lightning.pytorch import LightningDataModule, Trainer

from speechkit.data import Labels, Targets, Transcripts, Utterance
from speechkit.data.augment import Augment, Shift, chance
from speechkit.data.batching import Batches, plan
from speechkit.data.corpora import Cut, Source, events_of, labels_of
from speechkit.text import Tokenizer
from speechkit.types import Seconds


class Data(LightningDataModule):
    """Sources of training, development and test utterances, each with a name of its choice.

    The batches of an epoch are a function of ``seed``, the epoch, the number of ranks and the rank, so a run continues
    exactly after a restart: see `resume`. With Lightning, set ``reload_dataloaders_every_n_epochs=1``.

    A subclass says what is read beside the sound, how an epoch is drawn, and what is heard in one batch.
    """

    def __init__(
        self,
        *,
        train: Mapping[str, Source],
        dev: Mapping[str, Source],
        test: Mapping[str, Source],
        targets: Targets,
        augment: Augment | None,
        sample_rate: int,
        workers: int,
        seed: int,
        max_unread: float,
    ) -> None:
        super().__init__()
        self.train, self.dev, self.test = dict(train), dict(dev), dict(test)
        self.targets, self.augment, self.sample_rate = targets, augment, sample_rate
        self.workers, self.seed, self.max_unread = workers, seed, max_unread
        self._resume = (-1, 0)
        self._known: set[str] = set()

    @abstractmethod
    def planned(self, epoch: int, utterances: Sequence[Utterance], rank: int, world_size: int) -> list[list[int]]:
        """The training batches of an epoch for one rank, as positions in ``utterances``."""

    @abstractmethod
    def in_order(self, utterances: Sequence[Utterance], rank: int, world_size: int) -> list[list[int]]:
        """All of ``utterances``, without chance."""

    @abstractmethod
    def piece(self, cut: Cut, key: str) -> Utterance:
        """What training hears of a cut."""

    def check(self, cuts: Sequence[Cut]) -> None:
        """Raise a ValueError that names what cannot be learnt from."""
        self.targets.check(cuts)

    def setup(self, stage: str) -> None:
        """Read the manifests that a stage (``fit``, ``validate``, ``test``) needs, and check them.

        Raises:
            ValueError: for a manifest, or what is wrong with an utterance, naming it.
        """
        trained = self.train_cuts.values() if stage == "fit" else ()
        heard = [self.dev_cuts] if stage in ("fit", "validate") else []
        for cuts in (*trained, *heard):
            self.check(cuts)

    @cached_property
    def train_cuts(self) -> dict[str, list[Cut]]:
        return {name: self._cuts(source) for name, source in self.train.items()}

    @cached_property
    def dev_cuts(self) -> list[Cut]:
        return [cut for source in self.dev.values() for cut in self._cuts(source)]

    def _cuts(self, source: Source) -> list[Cut]:
        return list(source.cuts(transcribed=self.targets.transcribed))

    def resume(self, *, epoch: int, batch: int) -> None:
        """Have the dataloader of ``epoch`` begin after its first ``batch`` batches; those after it are whole."""
        self._resume = (epoch, batch)

    def train_batches(self, epoch: int, *, skip: int = 0, rank: int = 0, world_size: int = 1) -> Batches:
        """The batches of an epoch for one rank, without the first ``skip`` of them.

        Raises:
            ValueError: if there is nothing to train on.
        """
        utterances = list(self.draw(epoch))
        if not utterances:
            raise ValueError(
                f"An epoch must have at least one utterance, but data.train ({', '.join(self.train) or 'empty'}) gives "
                f"none; name a manifest to train on, or raise the repeat of a source."
            )
        planned = self.planned(epoch, utterances, rank, world_size)
        return self._batches(utterances, planned, augment=self.augment, skip=skip)

    def dev_batches(self, *, rank: int = 0, world_size: int = 1) -> Batches:
        """All of dev, never augmented, the longest first; ranks share it."""
        return self._as_recorded(self.dev_cuts, rank, world_size)

    def test_batches(self, name: str) -> Batches:
        """The test set of that name, never augmented, the longest first.

        Raises:
            ValueError: naming the test sets there are.
        """
        if name not in self.test:
            raise ValueError(
                f"A test set must be one of {', '.join(self.test) or 'none'}, but is {name}; add it to data.test."
            )
        cuts = self._cuts(self.test[name])
        self.targets.check(cuts)
        return self._as_recorded(cuts, 0, 1)

    def train_dataloader(self) -> Batches:
        epoch, (resumed, done) = self._attached.current_epoch, self._resume
        return self.train_batches(epoch, skip=done if epoch == resumed else 0, **self._ranks())

    def val_dataloader(self) -> Batches | list:
        return self.dev_batches(**self._ranks()) if self.dev else []

    def test_dataloader(self) -> list[Batches]:
        return [self.test_batches(name) for name in self.test]

    def _ranks(self) -> dict[str, int]:
        return {"rank": self._attached.global_rank, "world_size": self._attached.world_size}

    @property
    def _attached(self) -> Trainer:
        assert self.trainer is not None, "Lightning attaches a trainer before it asks for a loader"
        return self.trainer

    def draw(self, epoch: int) -> Iterable[Utterance]:
        """What an epoch has: each cut as often as its source says, and the fraction by chance."""
        for name, cuts in self.train_cuts.items():
            whole, fraction = divmod(self.train[name].repeat, 1)
            for cut in cuts:
                more = fraction and chance(self.seed, epoch, name, cut.id).random() < fraction
                for copy in range(int(whole) + bool(more)):
                    yield self.piece(cut, f"{self.seed}/{epoch}/{name}/{cut.id}/{copy}")

    def speed(self, key: str) -> float:
        return self.augment.speed(key) if self.augment else 1.0

    def _as_recorded(self, cuts: Iterable[Cut], rank: int, world_size: int) -> Batches:
        longest_first = sorted(cuts, key=lambda cut: -cut.duration)
        utterances = [Utterance(cut, cut.id, cut.duration) for cut in longest_first]
        return self._batches(utterances, self.in_order(utterances, rank, world_size))

    def _batches(
        self,
        utterances: Sequence[Utterance],
        planned: Sequence[Sequence[int]],
        augment: Augment | None = None,
        skip: int = 0,
    ) -> Batches:
        return Batches(
            batches=[[utterances[i] for i in batch] for batch in planned],
            targets=self.targets,
            augment=augment,
            sample_rate=self.sample_rate,
            skip=skip,
            workers=self.workers,
            max_unread=self.max_unread,
            known=self._known,
        )


class SpeechData(Data):
    """Utterances and their transcripts, those of like length together.

    Args:
        train: sources of an epoch; each says how often it is in one.
        dev: sources to choose a model by; may be empty.
        test: sources to report on; may be empty.
        tokenizer: turns transcripts into tokens.
        augment: for training only; ``None`` is as recorded.
        sample_rate: of the samples in a batch; files of other rates are resampled.
        max_seconds: of a batch, padding included.
        short_first: epochs at the beginning that go from short utterances to long ones (1512.02595, section 3.2): CTC
            finds its first alignments where few are possible.
        workers: processes that read and augment ahead; 0 does it in the training process.
        seed: of the order and of all augmentation.
        max_unread: the share of an epoch's utterances that may turn out unreadable before training stops.
    """

    def __init__(
        self,
        *,
        train: Mapping[str, Source],
        dev: Mapping[str, Source],
        test: Mapping[str, Source],
        tokenizer: Tokenizer,
        augment: Augment | None = None,
        sample_rate: int = 16000,
        max_seconds: Seconds = 120.0,
        short_first: int = 0,
        workers: int = 1,
        seed: int = 0,
        max_unread: float = 0.05,
    ) -> None:
        super().__init__(
            train=train,
            dev=dev,
            test=test,
            targets=Transcripts(tokenizer),
            augment=augment,
            sample_rate=sample_rate,
            workers=workers,
            seed=seed,
            max_unread=max_unread,
        )
        self.max_seconds, self.short_first = max_seconds, short_first

    def planned(self, epoch: int, utterances: Sequence[Utterance], rank: int, world_size: int) -> list[list[int]]:
        return plan(
            [utterance.seconds for utterance in utterances],
            max_seconds=self.max_seconds,
            dice=chance(self.seed, epoch),
            short_first=epoch < self.short_first,
            rank=rank,
            world_size=world_size,
        )

    def in_order(self, utterances: Sequence[Utterance], rank: int, world_size: int) -> list[list[int]]:
        seconds = [utterance.seconds for utterance in utterances]
        return plan(seconds, max_seconds=self.max_seconds, rank=rank, world_size=world_size)

    def piece(self, cut: Cut, key: str) -> Utterance:
        return Utterance(cut, key, cut.duration / self.speed(key))

    def check(self, cuts: Sequence[Cut]) -> None:
        super().check(cuts)
        longest = max(cuts, key=lambda cut: cut.duration, default=None)
        if longest is not None and longest.duration > self.max_seconds:
            raise ValueError(
                f"Utterances must fit into a batch of max_seconds={self.max_seconds}, but {longest.id} lasts "
                f"{longest.duration:.1f} s; leave such out with a source's max_seconds, or raise data.max_seconds."
            )


class TagData(Data):
    """Clips and their labels, a number of them in a batch.

    Args:
        train: sources of an epoch; each says how often it is in one.
        dev: sources to choose a model by; may be empty.
        test: sources to report on; may be empty.
        labels: the names of the classes; without any, labels are not looked at.
        exclusive: whether each clip must have just one label.
        augment: for training only; ``None`` is as recorded.
        sample_rate: of the samples in a batch; files of other rates are resampled.
        seconds: heard of a clip in training; of a longer one another piece each time. What is heard in a piece of a
            clip with events is what these say of it.
        batch: clips in a batch.
        balanced: draw each epoch's clips by chance, rare classes as likely as frequent ones: a clip weighs the sum of
            ``1000 / (clips with that label + 0.01)`` over its labels (PSLA, 2102.01243, section III-B). An epoch then
            has as many clips as without, some of them more than once.
        workers: processes that read and augment ahead; 0 does it in the training process.
        seed: of the order and of all augmentation.
        max_unread: the share of an epoch's clips that may turn out unreadable before training stops.
    """

    def __init__(
        self,
        *,
        train: Mapping[str, Source],
        dev: Mapping[str, Source],
        test: Mapping[str, Source],
        labels: Sequence[str] = (),
        exclusive: bool = False,
        augment: Augment | None = None,
        sample_rate: int = 16000,
        seconds: Seconds = 10.0,
        batch: int = 16,
        balanced: bool = False,
        workers: int = 1,
        seed: int = 0,
        max_unread: float = 0.05,
    ) -> None:
        named = Labels(tuple(labels), exclusive)
        super().__init__(
            train=train,
            dev=dev,
            test=test,
            targets=named,
            augment=augment,
            sample_rate=sample_rate,
            workers=workers,
            seed=seed,
            max_unread=max_unread,
        )
        if batch < 1 or not seconds > 0:
            raise ValueError(
                f"data.batch and data.seconds must be more than 0, but are {batch} and {seconds}; raise them."
            )
        self.labels, self.seconds, self.batch, self.balanced = named, seconds, batch, balanced

    def setup(self, stage: str) -> None:
        """As always; for ``fit``, batches have events where any clip of training has.

        Raises:
            ValueError: also as `refuse_shifts`.
        """
        super().setup(stage)
        if stage == "fit" and self.labels.names:
            cuts = (cut for cuts in self.train_cuts.values() for cut in cuts)
            self.targets = replace(self.labels, timed=any(events_of(cut) is not None for cut in cuts))
            if self.targets.timed and self.augment:
                refuse_shifts(self.augment)

    def planned(self, epoch: int, utterances: Sequence[Utterance], rank: int, world_size: int) -> list[list[int]]:
        clips = [1.0] * len(utterances)
        return plan(clips, max_seconds=self.batch, dice=chance(self.seed, epoch), rank=rank, world_size=world_size)

    def in_order(self, utterances: Sequence[Utterance], rank: int, world_size: int) -> list[list[int]]:
        return plan([1.0] * len(utterances), max_seconds=self.batch, rank=rank, world_size=world_size)

    def piece(self, cut: Cut, key: str) -> Utterance:
        speed = self.speed(key)
        wanted = min(cut.duration, self.seconds * speed)
        start = chance("piece", key).uniform(0.0, cut.duration - wanted)
        return Utterance(cut, key, wanted / speed, start, wanted)

    def draw(self, epoch: int) -> Iterator[Utterance]:
        """As always, or by chance where rare classes are to be as likely as others."""
        if not self.balanced:
            yield from super().draw(epoch)
            return
        there = [(name, cut) for name, cuts in self.train_cuts.items() for cut in cuts]
        dice = chance(self.seed, epoch, "balanced")
        for copy, (name, cut) in enumerate(dice.choices(there, self._weights, k=len(there)) if there else ()):
            yield self.piece(cut, f"{self.seed}/{epoch}/{name}/{cut.id}/{copy}")

    @cached_property
    def _weights(self) -> list[float]:
        clips = [(self.train[name].repeat, labels_of(cut)) for name, cuts in self.train_cuts.items() for cut in cuts]
        counts = Counter(label for _, labels in clips for label in labels)
        return [repeat * sum(1000 / (counts[label] + 0.01) for label in labels) for repeat, labels in clips]


def refuse_shifts(augment: Augment) -> None:
    """See that an augmentation leaves sounds where the events of a clip say they are; speed takes events along.

    Raises:
        ValueError: naming the effect that does not.
    """
    if moves := [name for name, effect in augment.effects.items() if isinstance(effect, Shift)]:
        raise ValueError(
            f"Augmentation must leave sounds where the events of a clip say they are, but {moves[0]} shifts them in "
            f"time; leave it out with '~augment.effects.{moves[0]}'."
        )
