"""From encoder frames to hypotheses. Every search streams, and offline is one step from a fresh state.

======================= ================================= ============================ ==========================
search                  reads                             while streaming it says      at the end
======================= ================================= ============================ ==========================
`Greedy`                CTC                               the text so far              the same
`PrefixBeam`            CTC                               every text still alive       the same
`Rescored`              CTC, then attention (U2)          what its prefix beam says    n-best weighed by both
`JointBeam`             CTC and attention in one pass     what greedy says             its own
`AttentionBeam`         attention                         nothing                      its own
======================= ================================= ============================ ==========================

The first two remember nothing but the text; the others keep the encoder's frames of the utterance until `finish`.
"""

from speechkit.search.attention import AttentionBeam, JointBeam, align
from speechkit.search.base import Search, stable_prefix
from speechkit.search.ctc import Greedy, PrefixBeam
from speechkit.search.endpoint import Endpoint
from speechkit.search.late import Rescored
from speechkit.search.prefix_scores import PrefixScores

__all__ = [
    "AttentionBeam",
    "Endpoint",
    "Greedy",
    "JointBeam",
    "PrefixBeam",
    "PrefixScores",
    "Rescored",
    "Search",
    "align",
    "stable_prefix",
]
