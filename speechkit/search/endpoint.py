"""When a segment of a stream is over."""

from __future__ import annotations

from dataclasses import dataclass

from speechkit.types import Hypothesis, Seconds


@dataclass(frozen=True)
class Endpoint:
    """The three rules of Kaldi's online decoder and WeNet's ``ctc_endpoint.h``, with the latter's defaults.

    A pure function of what was decoded: silence is what the best hypothesis heard no token in. ``math.inf`` switches
    a rule off.

    Args:
        silence: seconds in which nothing at all was said.
        pause: seconds since the last token, once something was said.
        longest: seconds after which a segment need not wait for a whole ``pause``: the longer it lasts, the shorter
            one is enough, and at twice as long none is needed. So a cut falls between words where it can, and the
            memory of a stream and the delay of final results are bounded.

    Raises:
        ValueError: where a rule would end segments of no length.
    """

    silence: Seconds = 5.0
    pause: Seconds = 1.0
    longest: Seconds = 20.0

    def __post_init__(self) -> None:
        for name in ("silence", "pause", "longest"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"Endpoint.{name} must be above 0 seconds, but is {getattr(self, name)}; "
                    f"for a rule that never applies pass math.inf (.inf in YAML)."
                )

    def __call__(self, best: Hypothesis | None, frames: int, frame_seconds: Seconds) -> bool:
        """Whether a segment is over that has lasted ``frames`` encoder frames of ``frame_seconds`` each.

        Args:
            best: what it reads as; ``None`` where the search says nothing before the end. Then, and where a text comes
                without times, a segment is over at ``longest``.
        """
        heard = frames * frame_seconds
        if best is None or len(best.spans) != len(best.tokens):
            return heard >= self.longest
        if heard >= 2 * self.longest:
            return True
        if not best.tokens:
            return heard >= self.silence
        silent = (frames - best.spans[-1][1]) * frame_seconds
        return silent >= self.pause * min(1.0, 2 - heard / self.longest)
