"""What every test shares: one thread, a fixed seed, checked shapes, and the way to the recordings."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(int(os.environ.get("SPEECHKIT_TEST_THREADS", "1")))
install_import_hook(
    ["speechkit.types", "speechkit.stream", "speechkit.attention", "speechkit.encoders", "speechkit.layers",
     "speechkit.features", "speechkit.objectives", "speechkit.masking", "speechkit.decoders", "speechkit.autoencoder"],
    "beartype.beartype",
)  # fmt: skip

# A shell that starts something in the background lets it ignore Ctrl-C, and its children with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from overfit import Overfit

RECORDINGS = Path(os.environ.get("SPEECHKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The folder of real recordings; a test that needs it skips, and says so, where it is absent."""
    if not RECORDINGS.is_dir():
        pytest.skip(f"real recordings are absent: {RECORDINGS} is not a folder; set SPEECHKIT_DATA to where they are")
    return RECORDINGS


@pytest.fixture(scope="session")
def overfit(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Overfit:
    """A model that knows four real recordings by heart, trained once a run."""
    from overfit import overfit as train  # after the hook above

    return train(recordings, tmp_path_factory.mktemp("overfit") / "model")
