"""Training wired up: what a step is, how its chance is drawn, and how a run continues exactly where it was.

`Task` is what every training has in common; a subclass says what the loss of a batch is and how dev is judged.
"""

from speechkit.tasks.base import Constant, Noam, Optim, Parts, Position, Stairs, Task, WarmupCosine, chance
from speechkit.tasks.pretrain import Pretrain
from speechkit.tasks.tag import Mixup, Tag
from speechkit.tasks.transcribe import Transcribe

__all__ = [
    "Constant",
    "Mixup",
    "Noam",
    "Optim",
    "Parts",
    "Position",
    "Pretrain",
    "Stairs",
    "Tag",
    "Task",
    "Transcribe",
    "WarmupCosine",
    "chance",
]
