"""Your own recordings: checked, described, split and ready to train on.

Sound: yours, with your licence and as many hours as you have. Nothing is copied: what is written points at the files
where they lie.

    speechkit prepare manifest --corpus my/manifest.jsonl            # data/manifest
    speechkit prepare manifest --corpus my/manifest.jsonl --subwords 500

The corpus is a JSONL manifest, one utterance a line (``{"audio": "a.flac", "text": "what is said"}``; speechkit/data/
corpora.py lists the keys), a lhotse CutSet, or a folder with a manifest.jsonl. Written are

================================== ====================================================================================
train.jsonl, dev.jsonl, test.jsonl lhotse CutSets, with texts as speechkit.text.normalise leaves them
characters.txt                     the characters of the texts, in one line
subwords.model                     a SentencePiece model, with --subwords
================================== ====================================================================================
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from lhotse.cut import Cut
from rich.console import Console
from rich.table import Table

from speechkit.data.augment import chance
from speechkit.data.corpora import read_corpus, speaker_of, split_of, text_of, write_manifest
from speechkit.text import normalise, train_sentencepiece

SPLITS = ("train", "dev", "test")


def prepare(
    corpus: Path | None,
    out: Path,
    *,
    dev: float = 0.1,
    test: float = 0.1,
    subwords: int = 0,
    verbatim: bool = False,
    seed: int = 0,
) -> None:
    """Check a corpus, say what is in it, and write the files named above.

    Utterances whose ``split`` is dev or test are in that one. If there are none, a share of the others is taken by
    whole speakers, or utterance by utterance where fewer than three are named.

    Args:
        corpus: the manifest, CutSet or folder.
        out: the folder, for example ``data/manifest``.
        dev, test: shares of the hours to take where the corpus has no such split.
        subwords: tokens of a SentencePiece model to train on the training texts; 0 is none.
        verbatim: keep the texts as they are.
        seed: of the choice of speakers.

    Raises:
        ValueError: naming the line of the manifest that is wrong, or what would be left empty.
    """
    if corpus is None:
        raise ValueError("The manifest recipe needs a corpus, but none is given; add --corpus path/to/manifest.jsonl.")
    corpus = corpus.resolve()
    cuts = list(read_corpus(corpus / "manifest.jsonl" if corpus.is_dir() else corpus))
    if not verbatim:
        cuts = [cut.map_supervisions(lambda said: said.transform_text(normalise)) for cut in cuts]
    splits = split(cuts, shares={"dev": dev, "test": test}, seed=seed)
    for name, chosen in splits.items():
        write_manifest(out / f"{name}.jsonl", (cut.to_dict() for cut in chosen))
    characters = sorted({character for cut in cuts for character in text_of(cut)} | {" "})
    (out / "characters.txt").write_text("".join(characters) + "\n", encoding="utf-8")
    if subwords:
        train_sentencepiece(map(text_of, splits["train"]), out / "subwords.model", vocab=subwords)
    _report(splits, characters, out)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``speechkit prepare manifest``."""
    parser.add_argument("--dev", type=float, default=0.1, help="share of the hours, where the corpus has no dev")
    parser.add_argument("--test", type=float, default=0.1, help="share of the hours, where the corpus has no test")
    parser.add_argument("--subwords", type=int, default=0, help="tokens of a SentencePiece model to train")
    parser.add_argument("--verbatim", action="store_true", help="keep case and punctuation of the texts")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of speakers for dev and test")


def split(cuts: Sequence[Cut], *, shares: dict[str, float], seed: int) -> dict[str, list[Cut]]:
    """Cuts by split: as they say themselves, and where none is of a split, its share of the rest by whole speakers.

    Raises:
        ValueError: if a split would be empty.
    """
    order = {cut.id: number for number, cut in enumerate(cuts)}
    splits = {name: [cut for cut in cuts if split_of(cut) == name] for name in shares}
    rest = [cut for cut in cuts if split_of(cut) not in shares]
    wanted = {name: share * sum(cut.duration for cut in rest) for name, share in shares.items() if not splits[name]}
    for group in _by_speaker(rest, seed):
        name = next((name for name, left in wanted.items() if left > 0), None)
        if name is None:
            splits.setdefault("train", []).extend(group)
        else:
            splits[name].extend(group)
            wanted[name] -= sum(cut.duration for cut in group)
    for name in SPLITS:
        if not splits.get(name):
            raise ValueError(
                f"Every split must have an utterance, but {name} has none of the {len(cuts)}; give more of them, "
                f"another --dev and --test, or a 'split' key in the manifest."
            )
    return {name: sorted(splits[name], key=lambda cut: order[cut.id]) for name in SPLITS}


def _by_speaker(cuts: Sequence[Cut], seed: int) -> list[list[Cut]]:
    """Cuts in groups that stay together, in an order that only the seed and the names decide."""
    enough = len({speaker_of(cut) for cut in cuts} - {None}) >= len(SPLITS)
    groups = defaultdict(list)
    for cut in cuts:
        groups[(enough and speaker_of(cut)) or f"utterance {cut.id}"].append(cut)
    return [groups[name] for name in sorted(groups, key=lambda name: chance(seed, name).random())]


def _report(splits: dict[str, list[Cut]], characters: Sequence[str], out: Path) -> None:
    table = Table("", "utterances", "hours", "speakers", "words", "seconds", title=str(out))
    for name, cuts in splits.items():
        seconds = [cut.duration for cut in cuts]
        table.add_row(
            name,
            f"{len(cuts):,}",
            f"{sum(seconds) / 3600:.2f}",
            str(len({speaker_of(cut) for cut in cuts} - {None}) or "not named"),
            f"{sum(len(text_of(cut).split()) for cut in cuts):,}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
        )
    console = Console(highlight=False)
    console.print(table)
    for line in _remarks(splits, characters):
        console.print(line, markup=False, soft_wrap=True)  # so that it can be copied


def _remarks(splits: dict[str, list[Cut]], characters: Sequence[str]) -> Iterable[str]:
    every = [cut for cuts in splits.values() for cut in cuts]
    counts = Counter(character for cut in every for character in text_of(cut))
    shortest, longest = (choose(every, key=lambda cut: cut.duration) for choose in (min, max))
    yield f"Shortest: {shortest.id}, {shortest.duration:.2f} s. Longest: {longest.id}, {longest.duration:.2f} s."
    symbols = "".join(characters).replace("\\", "\\\\").replace("'", "\\'")
    yield f"{len(characters)} characters; to train with them add: \"model.text.symbols='{symbols}'\""
    rare = [f"{character!r} ({counts[character]})" for character in characters if 0 < counts[character] < 5]
    if rare:
        yield f"Rarely seen, so hardly learnt: {', '.join(rare)}"
    speakers = {name: {speaker_of(cut) for cut in cuts} - {None} for name, cuts in splits.items()}
    for name in ("dev", "test"):
        if shared := speakers["train"] & speakers[name]:
            yield f"In {name} are {len(shared)} speakers of train, such as {min(shared)}: its results will flatter."
    # Nobody says more than about 25 characters a second, and CTC needs a frame for each.
    fastest = max(every, key=lambda cut: len(text_of(cut)) / cut.duration)
    if (rate := len(text_of(fastest)) / fastest.duration) > 25:
        yield f"{fastest.id} has {rate:.0f} characters a second: is its text that of another recording?"
