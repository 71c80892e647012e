"""The Lightning data module: sources in, the batches of any epoch out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from lightning.pytorch import LightningDataModule, Trainer

from speechkit.data.augment import Augment, chance
from speechkit.data.batching import Batches, Utterance, plan
from speechkit.data.corpora import Cut, Source, check_text
from speechkit.text import Tokenizer
from speechkit.types import Seconds


class SpeechData(LightningDataModule):
    """Sources of training, development and test utterances, each with a name of its choice.

    The batches of an epoch are a function of ``seed``, the epoch, the number of ranks and the rank, so a run continues
    exactly after a restart: see `resume`. With Lightning, set ``reload_dataloaders_every_n_epochs=1``.

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
        super().__init__()
        self.train, self.dev, self.test = dict(train), dict(dev), dict(test)
        self.tokenizer, self.augment, self.sample_rate = tokenizer, augment, sample_rate
        self.max_seconds, self.short_first, self.workers = max_seconds, short_first, workers
        self.seed, self.max_unread = seed, max_unread
        self._resume = (-1, 0)
        self._known: set[str] = set()

    def setup(self, stage: str) -> None:
        """Read the manifests that a stage (``fit``, ``validate``, ``test``) needs, and check them.

        Raises:
            ValueError: for a manifest, a transcript or an utterance longer than a batch, naming it.
        """
        trained = self.train_cuts.values() if stage == "fit" else ()
        heard = [self.dev_cuts] if stage in ("fit", "validate") else []
        for cuts in (*trained, *heard):
            check_text(cuts, self.tokenizer)
            self._check_lengths(cuts)

    @cached_property
    def train_cuts(self) -> dict[str, list[Cut]]:
        return {name: list(source.cuts()) for name, source in self.train.items()}

    @cached_property
    def dev_cuts(self) -> list[Cut]:
        return [cut for source in self.dev.values() for cut in source.cuts()]

    def resume(self, *, epoch: int, batch: int) -> None:
        """Have the dataloader of ``epoch`` begin after its first ``batch`` batches; those after it are whole."""
        self._resume = (epoch, batch)

    def train_batches(self, epoch: int, *, skip: int = 0, rank: int = 0, world_size: int = 1) -> Batches:
        """The batches of an epoch for one rank, without the first ``skip`` of them.

        Raises:
            ValueError: if there is nothing to train on.
        """
        utterances = list(self._draw(epoch))
        if not utterances:
            raise ValueError(
                f"An epoch must have at least one utterance, but data.train ({', '.join(self.train) or 'empty'}) gives "
                f"none; name a manifest to train on, or raise the repeat of a source."
            )
        seconds, dice = [u.seconds for u in utterances], chance(self.seed, epoch)
        short_first = epoch < self.short_first
        planned = plan(
            seconds, max_seconds=self.max_seconds, dice=dice, short_first=short_first, rank=rank, world_size=world_size
        )
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
        cuts = list(self.test[name].cuts())
        check_text(cuts, self.tokenizer)
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

    def _draw(self, epoch: int) -> Iterable[Utterance]:
        """What an epoch has: each cut as often as its source says, and the fraction by chance."""
        for name, cuts in self.train_cuts.items():
            whole, fraction = divmod(self.train[name].repeat, 1)
            for cut in cuts:
                more = fraction and chance(self.seed, epoch, name, cut.id).random() < fraction
                for copy in range(int(whole) + bool(more)):
                    yield self._utterance(cut, f"{self.seed}/{epoch}/{name}/{cut.id}/{copy}")

    def _utterance(self, cut: Cut, key: str) -> Utterance:
        return Utterance(cut, key, cut.duration / (self.augment.speed(key) if self.augment else 1.0))

    def _as_recorded(self, cuts: Iterable[Cut], rank: int, world_size: int) -> Batches:
        utterances = [Utterance(cut, cut.id, cut.duration) for cut in cuts]
        seconds = [utterance.seconds for utterance in utterances]
        planned = plan(seconds, max_seconds=self.max_seconds, rank=rank, world_size=world_size)
        return self._batches(utterances, planned)

    def _batches(
        self,
        utterances: Sequence[Utterance],
        planned: Sequence[Sequence[int]],
        augment: Augment | None = None,
        skip: int = 0,
    ) -> Batches:
        return Batches(
            batches=[[utterances[i] for i in batch] for batch in planned],
            tokenizer=self.tokenizer,
            augment=augment,
            sample_rate=self.sample_rate,
            skip=skip,
            workers=self.workers,
            max_unread=self.max_unread,
            known=self._known,
        )

    def _check_lengths(self, cuts: Iterable[Cut]) -> None:
        longest = max(cuts, key=lambda cut: cut.duration, default=None)
        if longest is not None and longest.duration > self.max_seconds:
            raise ValueError(
                f"Utterances must fit into a batch of max_seconds={self.max_seconds}, but {longest.id} lasts "
                f"{longest.duration:.1f} s; leave such out with a source's max_seconds, or raise data.max_seconds."
            )
