"""The one place where the sound of a cut is read."""

from __future__ import annotations

import numpy as np
from lhotse.cut import Cut, MixedCut, PaddingCut

from speechkit import features
from speechkit.audio import Samples
from speechkit.types import Seconds


def load(cut: Cut, sample_rate: int, *, start: Seconds = 0.0, duration: Seconds | None = None) -> Samples:
    """Mono samples ``[N]`` of a cut, or of a section of it, at ``sample_rate``.

    A cut that is a piece of a file is read as `speechkit.features.read` reads for a model in use; lhotse renders
    those that are more: mixed, transformed, one channel of several, in memory.

    Raises:
        ValueError: naming the file or the cut, and what is wrong with it.
    """
    duration = cut.duration - start if duration is None else duration
    if _is_file(cut):
        file = cut.recording.sources[0].source
        return features.read(file, sample_rate, start=cut.start + start, duration=duration)
    try:
        rendered = cut.truncate(offset=start, duration=duration).resample(sample_rate).load_audio().mean(axis=0)
    except Exception as error:  # lhotse raises whatever Python and its audio libraries do
        raise ValueError(
            f"The cut {cut.id} must be one lhotse can load, but lhotse says {_first_line(error)}."
        ) from error
    if not np.isfinite(rendered).all():
        raise ValueError(
            f"The cut {cut.id} must hold finite samples, but some are not; leave it out or export it again."
        )
    return rendered


def _is_file(cut: Cut) -> bool:
    if isinstance(cut, MixedCut | PaddingCut) or cut.recording.transforms:
        return False
    channels = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
    return [(s.type, list(s.channels)) for s in cut.recording.sources] == [("file", channels)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(".: ")
