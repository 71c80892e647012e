"""Tokenizers there and back, what they refuse, and words with their times."""

from __future__ import annotations

import json
import pickle
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechkit.text import (
    Characters,
    SentencePiece,
    Symbols,
    Tokenizer,
    Words,
    load_tokenizer,
    normalise,
    train_sentencepiece,
    words,
)
from speechkit.types import Hypothesis

DIGITS = ["ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"]
SENTENCES = [
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG",
    "DON'T PACK MY BOX WITH FIVE DOZEN LIQUOR JUGS",
    *DIGITS,
] * 3


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> SentencePiece:
    return train_sentencepiece(SENTENCES, tmp_path_factory.mktemp("pieces") / "new" / "s.model", vocab=40)


@pytest.fixture(params=["Characters", "SentencePiece", "Symbols", "Words"])
def tokenizer(request, pieces: SentencePiece) -> Tokenizer:
    return {
        "Characters": Characters(),
        "SentencePiece": pieces,
        "Symbols": Symbols(symbols=[None, "NE", *"ONEIZRTW", " "]),
        "Words": Words(words=[*DIGITS, None]),
    }[request.param]


def _says(call, *parts: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@settings(max_examples=60, deadline=None)
@given(said=st.lists(st.sampled_from(DIGITS), max_size=8))
def test_a_text_comes_back_from_its_tokens(pieces: SentencePiece, said: list[str]) -> None:
    text = " ".join(said)
    for tokenizer in (Characters(), pieces, Words(words=DIGITS)):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(0 < token < tokenizer.size for token in tokens)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=string.ascii_uppercase + "' ", max_size=40))
def test_a_text_comes_back_from_characters_and_pieces(pieces: SentencePiece, text: str) -> None:
    for tokenizer in (Characters(), pieces):
        assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 10), max_size=30))
def test_word_ranges_cover_what_is_decoded_whatever_a_model_says(pieces: SentencePiece, tokens: list[int]) -> None:
    symbols = Symbols(symbols=["A", None, " ", "ABC", None, "D", "E", "F", " G", "H"])
    for tokenizer in (Characters(symbols=" ABCDEFGHI"), symbols, pieces, Words(words=[*DIGITS[:8], None, "NINE"])):
        ranges = tokenizer.word_ranges(tokens)
        assert " ".join(word for word, _, _ in ranges) == tokenizer.decode(tokens)
        borders = [border for _, first, past in ranges for border in (first, past)]
        assert borders == sorted(borders) and all(first < past for _, first, past in ranges)
        assert all(tokenizer.decode(tokens[first:past]) == word for word, first, past in ranges)


def test_the_space_is_a_token_and_the_blank_is_none() -> None:
    tokenizer = Characters(symbols="AB ")
    assert tokenizer.size == 4
    assert tokenizer.encode("A B") == [1, 3, 2]
    assert tokenizer.decode([0, 1, 0, 3, 3, 0, 2]) == "A B"
    assert tokenizer.word_ranges([3, 1, 2, 3, 2]) == [("AB", 1, 3), ("B", 4, 5)]


def test_symbols_are_found_longest_first_and_some_are_never_written() -> None:
    tokenizer = Symbols(symbols=["A", None, "B", "ABC", " ", "$"])
    assert tokenizer.encode("AABC B$") == [1, 4, 5, 3, 6]
    assert tokenizer.decode([1, 2, 4, 0, 2, 5, 5, 3]) == "AABC B"
    assert tokenizer.word_ranges([2, 1, 2, 4, 2, 5, 3]) == [("AABC", 1, 4), ("B", 6, 7)]
    _says(lambda: tokenizer.encode("CAB D"), "'C', 'D'", "symbols")
    assert Symbols(symbols=["A", None, "A", " "]).encode("A A") == [1, 4, 1]
    _says(lambda: Symbols(symbols=[None]), "Symbols.symbols", "there are none")


def test_any_script_can_be_written_with_characters() -> None:
    tokenizer = Characters(symbols=sorted(set("你好世界 дом")))
    assert tokenizer.decode(tokenizer.encode("你好 дом")) == "你好 дом"


def test_a_tokenizer_comes_back_from_its_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    text = "ONE NINE ZERO"
    assert type(again) is type(tokenizer) and again.size == tokenizer.size
    assert again.encode(text) == tokenizer.encode(text)
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["kind"] == type(tokenizer).__name__


def test_a_tokenizer_travels_to_another_process(tokenizer: Tokenizer) -> None:
    assert pickle.loads(pickle.dumps(tokenizer)).encode("ONE TWO") == tokenizer.encode("ONE TWO")


def test_text_outside_the_vocabulary_is_named(pieces: SentencePiece) -> None:
    remedy = "speechkit.text.normalise"
    _says(lambda: Characters().encode("Naïve ONE"), "'a', 'ï', 'v', 'e'", "'Naïve ONE'", remedy, "symbols")
    _says(lambda: pieces.encode("CAFÉ ÜBER ONE"), "'É', 'Ü'", "'CAFÉ ÜBER ONE'", remedy, "training texts")
    _says(lambda: Words(words=DIGITS).encode("ONE TEN two"), "'TEN', 'two'", "'ONE TEN two'", remedy, "words")


def test_a_vocabulary_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    _says(lambda: Characters(symbols="ABCA"), "Characters.symbols", "'A' occur twice")
    _says(lambda: Characters(symbols=""), "Characters.symbols", "there are none")
    _says(lambda: Characters(symbols=["A", "NG"]), "Characters.symbols", "'NG'", "Words")
    _says(lambda: Words(words=["ONE", "TWENTY ONE"]), "Words.words", "'TWENTY ONE'", "split")
    _says(lambda: SentencePiece(model=tmp_path / "no.model"), "no.model", "not there", "train_sentencepiece")
    (tmp_path / "bad.model").write_bytes(b"this is no model")
    _says(lambda: SentencePiece(model=tmp_path / "bad.model"), "bad.model", "another kind of file")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    _says(lambda: load_tokenizer(tmp_path), str(tmp_path), "tokenizer.json", "save the model again")
    for content in ("{", '{"kind": "Letters"}', '{"kind": "Characters"}'):
        (tmp_path / "tokenizer.json").write_text(content)
        _says(
            lambda: load_tokenizer(tmp_path),
            "tokenizer.json",
            "Characters, Symbols, Words or SentencePiece",
            content[:8],
        )


def test_sentencepiece_training_says_what_vocab_would_do(tmp_path: Path) -> None:
    path = tmp_path / "s.model"
    _says(lambda: train_sentencepiece(["AB AB", "BA"], path, vocab=500), "vocab is 500", "fill", "at most")
    _says(lambda: train_sentencepiece(SENTENCES, path, vocab=5), "vocab is 5", "characters alone need")
    _says(lambda: train_sentencepiece([], path, vocab=5), "there is no text")
    assert not path.exists()
    assert train_sentencepiece(SENTENCES, path, vocab=40).size == 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "HELLO WORLD"),
        ("  two\tspaces\n", "TWO SPACES"),
        ("well-known\u2011thing", "WELL KNOWN THING"),
        ("don\u2019t \u02bctis o'clock' '", "DON'T 'TIS O'CLOCK'"),
        ("\u201cQuoted\u201d \u2018 \u2019 \u2014 ...", "QUOTED"),
        ("na\u00efve nai\u0308ve \ufb01sh \uff21\uff22", "NA\u00cfVE NA\u00cfVE FISH AB"),
        ("stra\u00dfe", "STRASSE"),
        ("soft\u00adhyphen \ufeffmark", "SOFTHYPHEN MARK"),
        ("3 apples, 4.5%", "3 APPLES 4 5"),
        ("你好\uff0c世界\u3002", "你好 世界"),
        ("", ""),
    ],
)
def test_normalised_text_is_upper_case_without_punctuation(text: str, expected: str) -> None:
    assert normalise(text) == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(text=st.text(alphabet=string.ascii_letters + string.punctuation + " \t", max_size=60))
def test_normalised_english_is_in_the_default_characters(text: str) -> None:
    Characters().encode(normalise(text))


def test_words_have_the_times_of_their_tokens_and_the_doubt_of_the_worst() -> None:
    tokenizer = Characters()
    hypothesis = Hypothesis(
        tokens=tuple(tokenizer.encode("GO ON")),
        spans=((2, 4), (5, 6), (6, 7), (10, 12), (13, 15)),
        confidences=(0.9, 0.8, 0.1, 0.7, 0.95),
    )
    go, on = words(hypothesis, tokenizer, 0.04)
    assert (go.word, on.word) == ("GO", "ON")
    assert (go.start, go.end, on.start, on.end) == pytest.approx((0.08, 0.24, 0.40, 0.60))
    assert (go.confidence, on.confidence) == (0.8, 0.7)


def test_words_of_pieces_begin_at_their_first_piece(pieces: SentencePiece) -> None:
    tokens = pieces.encode("THE DOG DON'T")
    hypothesis = Hypothesis(tuple(tokens), 0.0, tuple((t, t + 1) for t in range(len(tokens))), (0.5,) * len(tokens))
    found = words(hypothesis, pieces, 1.0)
    assert [word.word for word in found] == ["THE", "DOG", "DON'T"]
    assert [word.start for word in found[1:]] == [word.end for word in found[:-1]]


def test_a_hypothesis_without_times_has_no_words() -> None:
    assert words(Hypothesis(tokens=(1, 2)), Characters(), 0.04) == ()
    assert words(Hypothesis(), Characters(), 0.04) == ()


def test_real_transcripts_can_be_written_once_normalised(recordings: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("librispeech_sample", "vctk_mini", "cathy_arctic", "speechocean762_more"):
        lines = (recordings / name / "manifest.jsonl").read_text().splitlines()
        texts += [normalise(json.loads(line)["text"]) for line in lines if "text" in json.loads(line)]
    pieces = train_sentencepiece(texts, tmp_path / "s.model", vocab=500)
    for text in texts:
        assert pieces.decode(pieces.encode(text)) == text == Characters().decode(Characters().encode(text))
    lengths = [len(pieces.encode(text)) / len(text) for text in texts]
    assert sum(lengths) / len(lengths) < 0.6, "pieces are longer than characters"
