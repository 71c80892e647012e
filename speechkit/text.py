"""Text as tokens and back: characters, symbols, words, SentencePiece; and words with their times.

Token 0 is the blank everywhere and never part of a text. A tokenizer writes only what is in its vocabulary: anything
else is an error that names it, because a model would otherwise learn to leave it out.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from speechkit.types import BLANK, Hypothesis, Seconds, Word

AnyPath = str | os.PathLike[str]
WordRange = tuple[str, int, int]

FILE = "tokenizer.json"
MODEL = "tokenizer.model"
ENGLISH = " ABCDEFGHIJKLMNOPQRSTUVWXYZ'"
APOSTROPHES = "'\u2018\u2019\u02bc"  # typewriter, both single quotation marks, letter


class Tokenizer(Protocol):
    """What turns text into tokens and back."""

    @property
    def size(self) -> int:
        """V: the tokens, blank included."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, 1 to V - 1.

        Raises:
            ValueError: naming what of the text is outside the vocabulary.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, its words separated by single spaces; blanks are left out."""

    def word_ranges(self, tokens: Sequence[int]) -> list[WordRange]:
        """Each word of `decode` with the half-open range of tokens that spell it."""

    def save(self, folder: AnyPath) -> None:
        """Put into a model folder what `load_tokenizer` needs."""


class Symbols:
    """One token a symbol of one or more characters; some symbols of models of others are part of no text.

    Args:
        symbols: what token 1 and so on are written as, ``None`` for one that is never written. Spaces part words; a
            vocabulary without them writes one word.

    A text is encoded in the longest symbols that fit, from its beginning on, and in the first of those written alike.
    """

    def __init__(self, *, symbols: Sequence[str | None]) -> None:
        self.symbols = tuple(symbols)
        written = [symbol for symbol in self.symbols if symbol]
        if not written:
            raise ValueError("Symbols.symbols must hold at least one that is written, but there are none.")
        self._tokens = {symbol: len(self.symbols) - n for n, symbol in enumerate(reversed(self.symbols)) if symbol}
        self._pattern = re.compile("|".join(map(re.escape, sorted(written, key=len, reverse=True))))

    @property
    def size(self) -> int:
        return len(self.symbols) + 1

    def encode(self, text: str) -> list[int]:
        if unknown := dict.fromkeys(self._pattern.sub("", text)):
            raise _outside(unknown, text, "symbols")
        return [self._tokens[symbol] for symbol in self._pattern.findall(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(word for word, _, _ in self.word_ranges(tokens))

    def word_ranges(self, tokens: Sequence[int]) -> list[WordRange]:
        spelt = ((at, None if token == BLANK else self.symbols[token - 1]) for at, token in enumerate(tokens))
        written = [(at, symbol) for at, symbol in spelt if symbol]
        runs = itertools.groupby(written, key=lambda item: item[1].isspace())
        words = [list(run) for space, run in runs if not space]
        return [("".join(symbol for _, symbol in word), word[0][0], word[-1][0] + 1) for word in words]

    def save(self, folder: AnyPath) -> None:
        _save(folder, type(self).__name__, symbols=self.symbols)


class Characters(Symbols):
    """One token a character; the space is one of them.

    Args:
        symbols: the characters, as one string or as a list. The default writes English as `normalise` leaves it.
    """

    def __init__(self, *, symbols: str | Sequence[str] = ENGLISH) -> None:
        longer = [symbol for symbol in symbols if len(symbol) != 1]
        if longer:
            raise ValueError(
                f"Characters.symbols must be single characters, but {_quoted(longer)} are not; Symbols and Words take "
                f"longer ones."
            )
        _distinct("Characters.symbols", symbols)
        super().__init__(symbols=tuple(symbols))


class Words:
    """One token a word, for small vocabularies such as digits, commands or phonemes.

    Args:
        words: what token 1 and so on are written as, ``None`` for one that is never written.
    """

    def __init__(self, *, words: Sequence[str | None]) -> None:
        self.words = tuple(words)
        written = [word for word in self.words if word is not None]
        broken = [word for word in written if word.split() != [word]]
        if broken:
            raise ValueError(f"Words.words must be words without spaces, but {_quoted(broken)} are not; split them.")
        _distinct("Words.words", written)
        self._tokens = {word: token for token, word in enumerate(self.words, start=1) if word}

    @property
    def size(self) -> int:
        return len(self.words) + 1

    def encode(self, text: str) -> list[int]:
        unknown = dict.fromkeys(word for word in text.split() if word not in self._tokens)
        if unknown:
            raise _outside(unknown, text, "words")
        return [self._tokens[word] for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(word for word, _, _ in self.word_ranges(tokens))

    def word_ranges(self, tokens: Sequence[int]) -> list[WordRange]:
        spelt = ((at, None if token == BLANK else self.words[token - 1]) for at, token in enumerate(tokens))
        return [(word, at, at + 1) for at, word in spelt if word]

    def save(self, folder: AnyPath) -> None:
        _save(folder, type(self).__name__, words=self.words)


class SentencePiece:
    """Subwords of a SentencePiece model (arXiv 1808.06226), any model: piece i is token i + 1, below them the blank.

    Args:
        model: a ``.model`` file, for example by `train_sentencepiece`.

    A character that the model has no piece for is an error, not a token; a model with byte pieces knows them all.
    """

    def __init__(self, *, model: AnyPath) -> None:
        from sentencepiece import SentencePieceProcessor

        if not os.path.isfile(model):
            raise ValueError(
                f"SentencePiece.model must be a .model file, but {os.fspath(model)} is not there; "
                f"train one with speechkit.text.train_sentencepiece."
            )
        try:
            self._pieces = SentencePieceProcessor(model_file=os.fspath(model))
        except RuntimeError as error:
            raise ValueError(
                f"SentencePiece.model must be a SentencePiece model, but {os.fspath(model)} is another kind of file; "
                f"train one with speechkit.text.train_sentencepiece."
            ) from error

    @property
    def size(self) -> int:
        return self._pieces.get_piece_size() + 1

    def encode(self, text: str) -> list[int]:
        pieces, unknown = self._pieces.encode(text), self._pieces.unk_id()
        if unknown in pieces:
            surfaces = self._pieces.encode(text, out_type=str)
            named = [s.strip("▁") for s, piece in zip(surfaces, pieces, strict=True) if piece == unknown]
            raise _outside(dict.fromkeys("".join(named)), text, "training texts")
        return [piece + 1 for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(word for word, _, _ in self.word_ranges(tokens))

    def word_ranges(self, tokens: Sequence[int]) -> list[WordRange]:
        starts = [at for at, token in enumerate(tokens) if at == 0 or self._starts_word(token)]
        ranges = itertools.pairwise([*starts, len(tokens)])
        spelt = [(self._spell(tokens[first:past]), first, past) for first, past in ranges]
        return [(word, first, past) for word, first, past in spelt if word]

    def save(self, folder: AnyPath) -> None:
        _save(folder, type(self).__name__, model=MODEL)
        Path(folder, MODEL).write_bytes(self._pieces.serialized_model_proto())

    def _spell(self, tokens: Sequence[int]) -> str:
        return " ".join(self._pieces.decode([int(token) - 1 for token in tokens if token != BLANK]).split())

    def _starts_word(self, token: int) -> bool:
        return token != BLANK and self._pieces.id_to_piece(int(token) - 1).startswith("▁")


def train_sentencepiece(texts: Iterable[str], path: AnyPath, *, vocab: int) -> SentencePiece:
    """Train a unigram model (arXiv 1804.10959) that covers every character of ``texts``.

    Args:
        texts: as `normalise` leaves them, or in any other form that is kept everywhere.
        path: the ``.model`` file to write.
        vocab: tokens of the tokenizer, blank included.

    Raises:
        ValueError: if there is no text, or not enough of it for ``vocab`` pieces, or more characters than that.
    """
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=written,
            vocab_size=vocab - 1,
            model_type="unigram",
            character_coverage=1.0,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"train_sentencepiece must get texts and a vocab that fits them, but vocab is {vocab} and {_reason(error)}."
        ) from error
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(written.getvalue())
    return SentencePiece(model=path)


def _reason(error: RuntimeError) -> str:
    """What SentencePiece found wrong, counted with the blank."""
    if most := re.search(r"value <= (\d+)", str(error)):
        return f"the texts fill {int(most[1]) + 1} at most"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        return f"their characters alone need {int(least[1]) + 1}"
    return "there is no text" if "sentences_.empty()" in str(error) else f"SentencePiece says: {error}"


def load_tokenizer(folder: AnyPath) -> Tokenizer:
    """The tokenizer that was saved into a model folder.

    Raises:
        ValueError: if the folder holds none, or one of a kind that is not known.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        raise ValueError(f"{folder} must be a model folder with a {FILE}, but has none; save the model again.")
    saved = path.read_text(encoding="utf-8")
    with suppress(json.JSONDecodeError):
        match json.loads(saved):
            case {"kind": "Characters", "symbols": str(symbols) | list(symbols)}:
                return Characters(symbols=symbols)
            case {"kind": "Symbols", "symbols": list(symbols)}:
                return Symbols(symbols=symbols)
            case {"kind": "Words", "words": list(words)}:
                return Words(words=words)
            case {"kind": "SentencePiece", "model": str(model)}:
                return SentencePiece(model=Path(folder, model))
    raise ValueError(
        f"{path} must describe a tokenizer of kind Characters, Symbols, Words or SentencePiece, but holds "
        f"{saved[:80]!r}; save the model again."
    )


def normalise(text: str) -> str:
    """Text as it is scored and, in most recipes, learnt: upper case, no punctuation, single spaces.

    Unicode is brought to NFKC, letters to upper case, and every apostrophe to ``'``. Letters with their marks, numbers
    and apostrophes stay; invisible signs (soft hyphen, byte order mark) vanish; everything else separates words. An
    apostrophe that stands alone is a quotation mark and goes as well. Nothing is spelt out: "3" stays "3".
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).upper())
    kept = "".join(map(_kept, text))
    return " ".join(word for word in kept.split() if word.strip("'"))


def words(hypothesis: Hypothesis, tokenizer: Tokenizer, frame_seconds: Seconds) -> tuple[Word, ...]:
    """The words of a hypothesis with their times: from the first frame of the first token to the last of the last.

    A word is as certain as its least certain token. A search that knows no times (``spans`` is empty) gives no words.
    """
    if not hypothesis.spans:
        return ()
    return tuple(
        Word(
            word,
            start=hypothesis.spans[first][0] * frame_seconds,
            end=hypothesis.spans[past - 1][1] * frame_seconds,
            confidence=min(hypothesis.confidences[first:past]),
        )
        for word, first, past in tokenizer.word_ranges(hypothesis.tokens)
    )


def _kept(character: str) -> str:
    if character in APOSTROPHES:
        return "'"
    kind = unicodedata.category(character)
    return character if kind[0] in "LMN" else "" if kind == "Cf" else " "


def _distinct(what: str, symbols: Sequence[str]) -> None:
    twice = [symbol for symbol, times in Counter(symbols).items() if times > 1]
    if twice or not symbols:
        problem = f"{_quoted(twice)} occur twice" if twice else "there are none"
        raise ValueError(f"{what} must be different from each other and at least one, but {problem}.")


def _outside(unknown: Iterable[str], text: str, where: str) -> ValueError:
    return ValueError(
        f"Text must be written in the vocabulary of its tokenizer, but {text!r} holds {_quoted(unknown)}, which are "
        f"not in it; pass the text through speechkit.text.normalise, or add them to the tokenizer's {where}."
    )


def _quoted(items: Iterable[str]) -> str:
    return ", ".join(map(repr, items))


def _save(folder: AnyPath, kind: str, **arguments: object) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    saved = json.dumps({"kind": kind, **arguments}, ensure_ascii=False, indent=2)
    Path(folder, FILE).write_text(saved + "\n", encoding="utf-8")
