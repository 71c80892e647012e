"""Corpora, augmentation and batches: everything between files on a disk and a `speechkit.types.Batch`."""

from speechkit.data.augment import Augment, Gain, Hiss, Microphone, Noise, Recorded, RecordedRoom, Room, Telephone
from speechkit.data.batching import Batches, Utterance, plan
from speechkit.data.corpora import Source, check_text, read_corpus

__all__ = [
    "Augment",
    "Batches",
    "Gain",
    "Hiss",
    "Microphone",
    "Noise",
    "Recorded",
    "RecordedRoom",
    "Room",
    "Source",
    "Telephone",
    "Utterance",
    "check_text",
    "plan",
    "read_corpus",
]
