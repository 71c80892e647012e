"""Vocabularies of CTC recognisers as transformers saves them, for `speechkit.text.Symbols` and `speechkit.text.Words`.

``vocab.json`` numbers the rows of the output layer by symbol; other files of its tokenizer name the special ones. What
corresponds:

* **Blank** is their pad token, in whatever row; ours is token 0. Its row is moved to the front, all others keep order.
* **Words** are parted by their word delimiter. A vocabulary without it writes one word. Phonemes, of
  ``Wav2Vec2PhonemeCTCTokenizer``, are words each.
* **Never written** are the tokens they call unknown, begin and end of a sentence. What no file numbers of these, and of
  the pad token, follows the vocabulary in this order: begin, end, unknown, pad.
* **Lower case** is written where ``do_lower_case`` says so.
* ``clean_up_tokenization_spaces``, which draws English contractions together, is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from speechkit.pretrained.foreign import Node, node
from speechkit.pretrained.weights import some
from speechkit.text import Symbols, Words

VOCABULARY, SETTINGS = "vocab.json", "tokenizer_config.json"
OLDER = "special_tokens_map.json", "added_tokens.json"  # what transformers 5 writes into SETTINGS as well
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
LETTERS, PHONEMES = "Wav2Vec2CTCTokenizer", "Wav2Vec2PhonemeCTCTokenizer"
DELIMITERS = {LETTERS: "|", PHONEMES: None}


class Vocabulary(NamedTuple):
    """What an output layer says: its rows in the order of our tokens, the blank's first, and the tokenizer's node."""

    rows: list[int]
    text: Node


def read(folder: Path, rows: int) -> Vocabulary:
    """The vocabulary of an output layer of so many rows.

    Raises:
        ValueError: where a row has no symbol, a symbol has no row, there is no blank, or the files are of another kind
            of tokenizer.
    """
    settings = _json(folder / OLDER[0]) | _json(folder / SETTINGS)
    special = {key: _content(settings.get(key, name)) for key, name in SPECIAL.items()}
    names = _names(folder, settings, special.values())
    _check(names, rows, special)
    blank = next(row for row in range(rows) if names[row] == special["pad_token"])
    order = [blank, *(row for row in range(rows) if row != blank)]
    silent = [special[key] for key in ("bos_token", "eos_token", "unk_token")]
    return Vocabulary(order, _tokenizer([names[row] for row in order[1:]], silent, settings))


def _check(names: Mapping[int, str], rows: int, special: Mapping[str, str | None]) -> None:
    unnamed = [str(row) for row in range(rows) if row not in names]
    surplus = [name for row, name in names.items() if row >= rows and name not in special.values()]
    if unnamed or surplus:
        problem = f"has no symbol for {some(unnamed)}" if unnamed else f"has {some(surplus)} beyond them"
        raise ValueError(f"{VOCABULARY} must name the rows 0 to {rows - 1} of lm_head, but {problem}")
    if special["pad_token"] not in [names[row] for row in range(rows)]:
        raise ValueError(f"{VOCABULARY} must have a row for the pad token, {special['pad_token']!r}, but has none")


def _tokenizer(names: list[str], silent: Iterable[str | None], settings: Mapping[str, Any]) -> Node:
    kind, space = settings.get("tokenizer_class", LETTERS), settings.get("replace_word_delimiter_char", " ")
    if kind not in DELIMITERS:
        raise ValueError(f"tokenizer_class must be {LETTERS} or {PHONEMES}, but is {kind}")
    if space != " ":
        raise ValueError(f"replace_word_delimiter_char must be a space, but is {space!r}")
    delimiter = settings.get("word_delimiter_token", DELIMITERS[kind])
    other = dict.fromkeys(silent) | {delimiter: None if kind == PHONEMES else " "}
    written = [other.get(name, name) for name in names]
    if settings.get("do_lower_case"):
        written = [symbol and symbol.lower() for symbol in written]
    return node(Words, words=written) if kind == PHONEMES else node(Symbols, symbols=written)


def _names(folder: Path, settings: Mapping[str, Any], special: Iterable[str | None]) -> dict[int, str]:
    """The name of each row, of those behind the output layer too; of several symbols of one row the last listed."""
    listed = _json(folder / VOCABULARY)
    if wrong := [symbol for symbol, row in listed.items() if type(row) is not int]:
        raise ValueError(f"{VOCABULARY} must give the row of each symbol, but does not for {some(wrong)}")
    added = settings.get("added_tokens_decoder", {})
    rows = _json(folder / OLDER[1]) | {_content(token): int(row) for row, token in added.items()} | listed
    for name in special:
        if name is not None:
            rows.setdefault(name, len(rows))
    return {row: name for name, row in (rows | listed).items()}


def _content(token: Any) -> Any:
    """The text of a special token, which some versions write with how it is to be found."""
    return token["content"] if isinstance(token, Mapping) else token


def _json(path: Path) -> dict[str, Any]:
    """What is in a file, nothing if it is not there.

    Raises:
        ValueError: where it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} must be JSON, but is not ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} must hold names and values, but holds a {type(found).__name__}")
    return found
