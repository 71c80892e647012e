"""How good what was heard is: transcripts (`words`), labels of clips (`tags`), events in time (`events`); and how sure
one can be of it (`intervals`)."""

from speechkit.metrics.events import Found, event_hits, segment_hits
from speechkit.metrics.intervals import draws, inside
from speechkit.metrics.tags import Tagging, d_prime, tagging
from speechkit.metrics.words import Errors, Score, alignment, char_errors, word_errors

__all__ = [
    "Errors",
    "Found",
    "Score",
    "Tagging",
    "alignment",
    "char_errors",
    "d_prime",
    "draws",
    "event_hits",
    "inside",
    "segment_hits",
    "tagging",
    "word_errors",
]
