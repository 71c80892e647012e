"""The model that other tests take as their oracle's subject says what it must."""

from __future__ import annotations

from overfit import LIVE, Overfit

from speechkit.pretrained import load_recogniser
from speechkit.session import Session, live_context, transcribe


def test_the_model_knows_its_recordings_whole_and_streamed(overfit: Overfit) -> None:
    model = load_recogniser(overfit.folder)
    assert live_context(model) == LIVE
    assert [heard.text for heard in model.transcribe(list(overfit.texts))] == list(overfit.texts.values())
    clips = [overfit.clip(number) for number in range(len(overfit.texts))]
    assert [heard.text for heard in transcribe(Session(model, slots=4), clips)] == list(overfit.texts.values())
