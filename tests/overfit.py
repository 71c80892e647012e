"""A small recogniser that has learnt four real recordings by heart: real sound in, known words out.

It is trained when it is first asked for, in about ten seconds of one core, whole and in its own chunks by turns, at
random loudness and with random silence around the words, so that a microphone does not throw it off.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechkit import pretrained
from speechkit.app.train import measure
from speechkit.config import build_model
from speechkit.features import read
from speechkit.recogniser import Recogniser
from speechkit.stream import Context
from speechkit.types import Batch

RATE, STEPS, SEED = 16000, 220, 4
SENTENCES = {
    "arctic_a0112": "HE WAS WOUNDED IN THE ARM",
    "arctic_a0498": "THE LINES WERE NOW VERY TAUT",
    "arctic_b0261": "AND HE DID HURT MY ARM",
    "arctic_b0388": "I MADE NO MORE OVERTURES",
}
WORDS = sorted({word for text in SENTENCES.values() for word in text.split()})
LIVE = Context(left=32, chunk=8)  # 320 ms


@dataclass(frozen=True)
class Overfit:
    """A model folder, the model in it, and what it knows.

    Attributes:
        texts: what is said in each recording; the model says exactly this, whole and streamed in chunks of 320 ms.
    """

    folder: Path
    recogniser: Recogniser
    texts: dict[Path, str]

    def clip(self, number: int, sample_rate: int = RATE) -> np.ndarray:
        """The samples ``[N]`` of a recording."""
        return read(list(self.texts)[number], sample_rate)

    def text(self, number: int) -> str:
        return list(self.texts.values())[number]


def node() -> dict[str, Any]:
    """The ``model`` node of the config."""
    attention = {
        "_target_": "speechkit.attention.Softmax",
        "_partial_": True,
        "position": {"_target_": "speechkit.attention.RelativePosition", "_partial_": True},
    }
    return {
        "features": {
            "_target_": "speechkit.features.FrontEnd",
            "mel": {"_target_": "speechkit.features.LogMel", "bands": 40},
            "norm": {"_target_": "speechkit.features.GlobalNorm", "dim": 40},
        },
        "text": {"_target_": "speechkit.text.Words", "words": WORDS},
        "encoder": {
            "_target_": "speechkit.encoders.Conformer",
            "features": 40,
            "dim": 96,
            "heads": 4,
            "layers": 2,
            "attention": attention,
            "subsampling": {
                "_target_": "speechkit.layers.Subsampling",
                "_partial_": True,
                "stages": 2,
                "channels": 16,
            },
            "convolution": {
                "_target_": "speechkit.layers.Convolution",
                "_partial_": True,
                "kernel": 15,
                "causal": True,
                "norm": {"_target_": "speechkit.layers.BatchNorm", "_partial_": True},
            },
            "context": {"_target_": "speechkit.stream.Context", "left": LIVE.left, "chunk": LIVE.chunk},
        },
        "objective": {
            "_target_": "speechkit.objectives.Hybrid",
            "_partial_": True,
            "ctc": {"_target_": "speechkit.objectives.CTC", "_partial_": True},
            "attention": {
                "_target_": "speechkit.objectives.AttentionDecoder",
                "_partial_": True,
                "layers": 1,
                "heads": 2,
            },
            "ctc_weight": 0.9,
        },
        "search": {"_target_": "speechkit.search.Greedy", "_partial_": True},
    }


def overfit(recordings: Path, folder: Path) -> Overfit:
    """Train the model and save it into ``folder``.

    Args:
        recordings: the folder of real recordings that holds ``cathy_arctic``.
    """
    texts = {recordings / "cathy_arctic" / "audio" / f"{name}.flac": text for name, text in SENTENCES.items()}
    torch.manual_seed(SEED)
    recogniser = build_model(node())
    dice, clips = random.Random(SEED), [torch.from_numpy(read(path, RATE)) for path in texts]
    measure(recogniser.features, [_batch(recogniser, clips, list(texts.values()), dice)[:2] for _ in range(4)])
    optimizer = torch.optim.AdamW(recogniser.parameters(), lr=4e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS, pct_start=0.15)
    recogniser.train()
    for step in range(STEPS):
        batch = _batch(recogniser, clips, list(texts.values()), dice)
        encoded = recogniser.encode(*batch[:2], context=LIVE if step % 2 else Context())
        optimizer.zero_grad()
        recogniser.objective(encoded, batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(recogniser.parameters(), 5.0)
        optimizer.step()
        rate.step()
    pretrained.save(recogniser.eval(), node(), folder)
    return Overfit(folder, recogniser, texts)


def _batch(recogniser: Recogniser, clips: list[torch.Tensor], texts: list[str], dice: random.Random) -> Batch:
    """Each recording once, some with another one after it, as loud and with as much silence around as the dice say."""
    heard, said = [], []
    for row in range(len(clips)):
        rows = [row, *dice.sample(range(len(clips)), dice.random() < 0.3)]
        gaps = [torch.zeros(dice.choice([0, dice.randrange(RATE // 2)])) for _ in range(len(rows) + 1)]
        sound = torch.cat(
            [gaps[0], *(part for row, gap in zip(rows, gaps[1:], strict=True) for part in (clips[row], gap))]
        )
        noise = dice.choice([0.0, 10 ** dice.uniform(-4.0, -2.7)]) * torch.randn(len(sound))  # digital silence too
        heard.append(10 ** dice.uniform(-0.4, 0.3) * (sound + noise))
        said.append(torch.tensor(recogniser.tokenizer.encode(" ".join(texts[row] for row in rows))))
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(
        pad(heard, batch_first=True),
        torch.tensor([len(sound) for sound in heard]),
        pad(said, batch_first=True),
        torch.tensor([len(tokens) for tokens in said]),
        tuple(map(str, range(len(clips)))),
        tuple(texts),
    )
