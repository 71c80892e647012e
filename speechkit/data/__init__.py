"""Corpora, augmentation and batches: everything between files on a disk and a `speechkit.types.Batch`."""

from speechkit.data.augment import (
    Augment,
    Gain,
    Hiss,
    Microphone,
    Noise,
    Recorded,
    RecordedRoom,
    Room,
    Shift,
    Telephone,
)
from speechkit.data.batching import Batches, plan
from speechkit.data.corpora import Source, read_corpus
from speechkit.data.targets import Labels, Targets, Transcripts, Utterance, check_text

__all__ = [
    "Augment",
    "Batches",
    "Gain",
    "Hiss",
    "Labels",
    "Microphone",
    "Noise",
    "Recorded",
    "RecordedRoom",
    "Room",
    "Shift",
    "Source",
    "Targets",
    "Telephone",
    "Transcripts",
    "Utterance",
    "check_text",
    "plan",
    "read_corpus",
]
