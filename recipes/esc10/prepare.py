"""ESC-10: environmental sounds of 10 classes, from recordings that lie beside the project.

Sound: clips of Freesound that Karol J. Piczak chose and cut to 5 s (karolpiczak/ESC-10; ACM Multimedia 2015), here 18
of each class at 16 kHz. Licence: CC BY 3.0 for the set, CC0 or CC BY 3.0 for each clip. Hours: 0.25. All clips of one
recording are in one fold; 1 and 2 have six clips of a class, 3 and 4 have three.

    speechkit prepare esc10 [--corpus FOLDER]         # data/esc10

FOLDER holds ``esc10`` with its manifest.jsonl. Written are clips.jsonl, with ``label``, ``fold``, ``split`` (train:
folds 1 and 2, dev: 3, test: 4) and ``recording``, and labels.txt. The whole ESC-10, of five folds of 80 clips, is a
part of the esc50 recipe.
"""

from __future__ import annotations

from pathlib import Path

from speechkit.data import tagged

KEPT = ("id", "audio", "label", "fold", "split", "title")


def prepare(corpus: Path | None, out: Path) -> None:
    """Write clips.jsonl and labels.txt into ``out``.

    Raises:
        ValueError: if the recordings are not there; naming a file that cannot be read.
    """
    lines = tagged.sample(corpus, "esc10")
    clips = [{**{key: line[key] for key in KEPT}, "recording": line["source_id"]} for line in lines]
    names = {line["class_id"]: line["label"] for line in lines}
    tagged.write(out, {"clips": tagged.measured(clips)}, [names[number] for number in sorted(names)])
