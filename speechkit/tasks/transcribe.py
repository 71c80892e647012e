"""Speech to text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speechkit import metrics
from speechkit.recogniser import Recogniser
from speechkit.stream import Context, ContextSampler
from speechkit.tasks.base import Optim, Parts, Task
from speechkit.types import Batch, EncoderOutput, FeatureOutput


class Transcribe(Task):
    """Speech to text: a `Recogniser` learns from utterances and their transcripts.

    On dev it hears whole utterances (``wer``) and, if its encoder streams, what a stream would hear (``wer_stream``).

    Args:
        model: what learns.
        context: draws what the encoder may see in each batch.
        tempo: of the features, in training, for example `speechkit.features.Tempo`.
        spec_augment: of the features, in training; called as ``spec_augment(frames, lengths)``.
    """

    def __init__(
        self,
        *,
        model: Recogniser,
        optim: Optim,
        context: ContextSampler = ContextSampler(whole=1.0),  # noqa: B008 - a frozen value
        tempo: Callable[[Tensor, Tensor], FeatureOutput] | None = None,
        spec_augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model=model, optim=optim, seed=seed)
        self.context = context
        self.tempo, self.spec_augment = tempo, spec_augment
        self.contexts = {"wer": Context()} | ({"wer_stream": model.context} if model.context.streams else {})

    def losses(self, batch: Batch, dice: int) -> Parts:
        frames, lengths = self.features(batch)
        if self.tempo is not None:
            frames, lengths = self.tempo(frames, lengths)
        if self.spec_augment is not None:
            frames = self.spec_augment(frames, lengths)
        self._meter.frames += lengths.sum()
        encoded = self.model.encoder(frames, lengths, context=self.context.draw(dice))
        return self.model.objective(encoded, batch)

    def features(self, batch: Batch) -> FeatureOutput:
        """Nothing in a front end is trained."""
        with torch.no_grad():
            return self.model.features(batch.samples, batch.sample_lengths)

    def error_rate(self) -> float | None:
        """The word error rate, the mean of all contexts that dev was heard in."""
        rates = [value for name, value in self.latest.items() if name.startswith("dev/wer")]
        return sum(rates) / len(rates) if rates else None

    def on_validation_epoch_start(self) -> None:
        self._readings: dict[str, list[str]] = {name: [] for name in self.contexts}
        self._references: list[str] = []
        self._losses: list[tuple[float, int]] = []

    def validation_step(self, batch: Batch, index: int) -> Any:
        """The texts heard in whole utterances."""
        frames, lengths = self.features(batch)
        self._references.extend(batch.texts)
        for name, context in self.contexts.items():
            encoded = self.model.encoder(frames, lengths, context=context)
            self._readings[name].extend(self.read(encoded))
            if name == "wer":
                self._losses.append((float(self.model.objective(encoded, batch)["loss"]), len(batch.ids)))
        return self._readings["wer"][-len(batch.ids) :]

    def read(self, encoded: EncoderOutput) -> list[str]:
        """The best text of each utterance."""
        return [self.model.tokenizer.decode(best.tokens) for best, *_ in self.model.search(encoded)]

    def on_validation_epoch_end(self) -> None:
        said, losses = self.from_all(self._references), self.from_all(self._losses)
        values = {"loss": sum(loss * size for loss, size in losses) / max(1, sum(size for _, size in losses))}
        for name, texts in self._readings.items():
            values[name] = metrics.word_errors(said, self.from_all(texts)).rate
        self.log_dict({f"dev/{name}": value for name, value in values.items()}, logger=False)  # for early stopping
        self.report("dev", values)
