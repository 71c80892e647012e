"""speechkit: audio and speech models in which the model you train is the model you stream.

::

    model = speechkit.load("runs/demo")
    model.transcribe("a.wav").text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechkit.pretrained import load as load
    from speechkit.recogniser import Recogniser as Recogniser
    from speechkit.session import Session as Session

_HOMES = {"load": "speechkit.pretrained", "Recogniser": "speechkit.recogniser", "Session": "speechkit.session"}
__all__ = ["Recogniser", "Session", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Everything is imported when it is first used, so that ``import speechkit`` costs nothing."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("speechkit")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'speechkit' has no attribute '{name}'")
