"""Recognisers of the wav2vec family: held against transformers' models and processors, and what they refuse."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe
import torch
from ast_cases import close
from tiny import sound
from torch import Tensor, nn
from wav2vec2_cases import CONFIGS, KINDS, heard, padded, written

import speechkit
from speechkit import audio, pretrained, recogniser
from speechkit.app import cli
from speechkit.app.train import train
from speechkit.encoders import Wav2Vec2
from speechkit.recogniser import Recogniser
from speechkit.search import PrefixBeam
from speechkit.session import Session
from speechkit.stream import Context, Everything
from speechkit.text import Symbols, Words, load_tokenizer

transformers = pytest.importorskip("transformers")

LETTERS = dict.fromkeys(string.ascii_uppercase[:8] + "'")
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]  # the order of wav2vec2-base-960h
LATER = ["|", *LETTERS, "[UNK]", "[PAD]"]  # of most that were fine-tuned since; begin and end follow
NAMES = {"unk_token": "[UNK]", "pad_token": "[PAD]"}


def tokenizer(folder: Path, symbols: list[str], **settings: Any) -> Any:
    """Their tokenizer, saved to a folder."""
    (folder / "vocab.json").write_text(json.dumps({symbol: row for row, symbol in enumerate(symbols)}))
    theirs = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **settings)
    theirs.save_pretrained(folder)
    return theirs


def saved(folder: Path, kind: str = "Wav2Vec2", rows: int = len(VOCABULARY), **changes: Any) -> nn.Module:
    """Their recogniser, each symbol about as likely over time as any other."""
    model: Any = written(folder, kind, "ForCTC", vocab_size=rows, **changes)
    with torch.no_grad():
        frames = getattr(model, model.base_model_prefix)(sound(4.0)[None]).last_hidden_state[0]
        head = model.lm_head
        head.weight.mul_(3.0 / (frames @ head.weight.T).std(0)[:, None])
        head.bias.copy_(-(frames @ head.weight.T).mean(0))
    model.save_pretrained(folder)
    return model


def read(model: Any, theirs: Any, clip: np.ndarray, folder: Path, **options: Any) -> Any:
    """What transformers makes of a recording."""
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    inputs = extractor(clip, sampling_rate=16000, return_tensors="pt").input_values
    return theirs.batch_decode(model(inputs).logits.argmax(-1), **options)


def spelling(model: Any, theirs: Any, folder: Path) -> None:
    """As a trained one does it: blanks and spaces are likely, symbols that are never written are not."""
    with torch.no_grad():
        model.lm_head.bias[[theirs.pad_token_id, theirs.word_delimiter_token_id]] += 3.0
        for token in (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id):
            if token < len(model.lm_head.bias):
                model.lm_head.bias[token] = -1e4
    model.save_pretrained(folder)


def logits(model: Recogniser, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    encoded = model.encode(samples, lengths)
    return model.objective.ctc.head(encoded.frames), encoded.lengths


@pytest.fixture(scope="module")
def clips(recordings: Path) -> list[np.ndarray]:
    return heard(recordings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recogniser of theirs."""
    home = tmp_path_factory.mktemp("theirs")
    model = saved(home)
    spelling(model, tokenizer(home, VOCABULARY), home)
    return home


# Held against transformers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_of_a_batch_are_those_that_transformers_gives_of_each(
    kind: str, name: str, tmp_path: Path, clips: list[np.ndarray]
) -> None:
    model: Any = written(tmp_path, kind, "ForCTC", vocab_size=len(LATER) + 2, **CONFIGS[name])
    tokenizer(tmp_path, LATER, **NAMES)
    blank_first = [LATER.index("[PAD]"), *range(len(LATER) - 1), len(LATER), len(LATER) + 1]
    ours = speechkit.load(tmp_path)
    assert isinstance(ours, Recogniser) and isinstance(ours.encoder, Wav2Vec2) and not ours.training
    found, counts = logits(ours, *padded(clips))
    extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    for n, clip in enumerate(clips):
        expected = model(extractor(clip, sampling_rate=16000, return_tensors="pt").input_values).logits[0][
            :, blank_first
        ]
        close(found[n, : counts[n]], expected)
        close(logits(ours, torch.from_numpy(clip)[None], torch.tensor([len(clip)]))[0][0], expected)


@pytest.mark.parametrize(("symbols", "names", "rows"), [(VOCABULARY, {}, 0), (LATER, NAMES, 0), (LATER, NAMES, 2)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_and_times_are_those_of_transformers(
    kind: str, symbols: list[str], names: dict, rows: int, tmp_path: Path, clips: list[np.ndarray]
) -> None:
    model, theirs = saved(tmp_path, kind, len(symbols) + rows), tokenizer(tmp_path, symbols, **names)
    spelling(model, theirs, tmp_path)
    ours, said = speechkit.load(tmp_path), set()
    for clip, found in zip(clips, ours.transcribe(clips), strict=True):
        expected = read(model, theirs, clip, tmp_path, output_word_offsets=True)
        assert found.text == " ".join(expected.text[0].split())
        times = [(w["word"], 0.02 * w["start_offset"], 0.02 * w["end_offset"]) for w in expected.word_offsets[0]]
        assert [word.word for word in found.words] == [word for word, _, _ in times]
        for word, (_, start, end) in zip(found.words, times, strict=True):
            assert (word.start, word.end) == pytest.approx((start, end)) and 0 < word.confidence <= 1
        said |= {word.word for word in found.words}
    assert len(said) > 5 and ours.frame_seconds == 0.02


@torch.no_grad()
def test_symbols_that_mean_no_text_are_never_written(tmp_path: Path, clips: list[np.ndarray]) -> None:
    model, theirs = saved(tmp_path, rows=len(LATER) + 2), tokenizer(tmp_path, LATER, **NAMES)
    ours, left_out = speechkit.load(tmp_path), 0
    for clip in clips:
        text = read(model, theirs, clip, tmp_path)[0]
        left_out += len(re.findall(r"\[UNK\]|</?s>", text))
        assert ours.transcribe(clip).text == " ".join(re.sub(r"\[UNK\]|</?s>", "", text).split())
    assert left_out > 10


@pytest.mark.parametrize(
    ("symbols", "settings"),
    [
        (VOCABULARY, {"do_lower_case": True}),
        (["<pad>", *LETTERS], {}),
        (["<pad>", "<unk>", "/", "SCH", *LETTERS], {"word_delimiter_token": "/"}),
        (["<pad>", "<unk>", "|", "[noise]", "日", "本"], {"bos_token": None, "eos_token": None}),
        (["A", "B", "|"], {}),
        (["<pad>", "A", "a", " ", "|", "b"], {"do_lower_case": True}),
        (["<pad>", "<unk>", "|", "A"], {"word_delimiter_token": None}),
    ],
)
def test_other_vocabularies_are_read_as_transformers_reads_them(
    symbols: list[str], settings: dict, tmp_path: Path
) -> None:
    theirs = tokenizer(tmp_path, symbols, **settings)
    rows = len(theirs)
    saved(tmp_path, rows=rows)
    ours = speechkit.load(tmp_path)
    order = pretrained.vocabulary.read(tmp_path, rows).rows
    dice = np.random.default_rng(0)
    for _ in range(50):
        tokens = dice.integers(0, rows, 12).tolist()
        expected = theirs.decode([order[token] for token in tokens], group_tokens=False)
        for name in filter(None, (theirs.bos_token, theirs.eos_token, theirs.unk_token)):
            expected = expected.replace(name, "")
        assert ours.tokenizer.decode(tokens) == " ".join(expected.split())


def test_phonemes_are_words(tmp_path: Path) -> None:
    phonemes = ["<s>", "<pad>", "</s>", "<unk>", "n", "œ", "ɛ", "tʃ"]
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: row for row, symbol in enumerate(phonemes)}))
    theirs = transformers.Wav2Vec2PhonemeCTCTokenizer(str(tmp_path / "vocab.json"), do_phonemize=False)
    theirs.save_pretrained(tmp_path)
    saved(tmp_path, rows=len(phonemes))
    ours = speechkit.load(tmp_path).tokenizer
    assert isinstance(ours, Words) and ours.encode("œ n tʃ") == [5, 4, 7]
    order = pretrained.vocabulary.read(tmp_path, len(phonemes)).rows
    for tokens in np.random.default_rng(0).integers(0, len(phonemes), (50, 12)).tolist():
        expected = theirs.decode([order[token] for token in tokens], group_tokens=False)
        assert ours.decode(tokens) == " ".join(word for word in expected.split() if word not in phonemes[:4])
    ours.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").decode(range(8)) == ours.decode(range(8))


def test_of_two_symbols_in_one_row_the_last_is_written(tmp_path: Path) -> None:
    """Texts' spaces are often left in a vocabulary beside the delimiter that stands for them."""
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "A": 2, "B": 2, " ": 1, "|": 1, "<unk>": 3}))
    theirs = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    theirs.save_pretrained(tmp_path)
    saved(tmp_path, rows=4)
    assert speechkit.load(tmp_path).tokenizer.decode([2, 1, 2]) == "B B"
    assert theirs.decode([2, 1, 2], group_tokens=False) == "B B"


@pytest.mark.parametrize("old", ["special_tokens_map.json", "added_tokens.json", "neither"])
def test_files_of_earlier_versions_say_the_same(old: str, tmp_path: Path) -> None:
    tokenizer(tmp_path, LATER, **NAMES)
    expected = pretrained.vocabulary.read(tmp_path, len(LATER) + 2)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key != "added_tokens_decoder"}
    if old != "added_tokens.json":
        (tmp_path / "added_tokens.json").unlink()
    if old == "special_tokens_map.json":
        special = {name: {"content": settings.pop(name), "lstrip": False} for name in pretrained.vocabulary.SPECIAL}
        (tmp_path / old).write_text(json.dumps(special))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert pretrained.vocabulary.read(tmp_path, len(LATER) + 2) == expected


@torch.no_grad()
def test_a_processor_says_how_to_hear_where_its_extractor_has_no_file(folder: Path, tmp_path: Path) -> None:
    theirs = transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, sampling_rate=8000)
    transformers.Wav2Vec2Processor(extractor, theirs).save_pretrained(tmp_path)
    saved(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    ours = speechkit.load(tmp_path)
    assert ours.sample_rate == 8000 and ours.features.norm is None
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"preprocessor_config.json must say what it hears, but is not there"):
        speechkit.load(tmp_path)


# As any recogniser


def test_the_commands_write_what_transformers_reads(
    folder: Path, recordings: Path, clips: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = transformers.Wav2Vec2ForCTC.from_pretrained(folder).eval()
    theirs = transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder)
    files = [str(tmp_path / f"{n}.wav") for n in range(len(clips))]
    for file, clip in zip(files, clips, strict=True):
        audio.write(file, clip, 16000)
    with torch.no_grad():
        expected = [" ".join(read(model, theirs, clip, folder)[0].split()) for clip in clips]
    assert cli.main(["transcribe", str(folder), *files, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == expected
    assert [" ".join(word["word"] for word in line["words"]) for line in lines] == expected
    assert cli.main(["transcribe", str(folder), files[0], "--timestamps", "--search", "prefix_beam"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 1

    manifest = tmp_path / "set.jsonl"
    cuts = [{"audio": f, "text": t, "duration": len(c) / 16000} for f, t, c in zip(files, expected, clips, strict=True)]
    manifest.write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    assert cli.main(["evaluate", str(folder), str(manifest), "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["wer"] == 0.0 and row["heard"] == "whole" and row["utterances"] == len(clips)


def test_its_words_are_aligned_and_a_beam_finds_no_worse_text(folder: Path, clips: list[np.ndarray]) -> None:
    ours = speechkit.load(folder)
    heard = ours.transcribe(clips[-1])
    aligned = ours.align(clips[-1], heard.text)
    assert aligned.text == heard.text
    assert [word.word for word in aligned.words] == [word.word for word in heard.words]
    encoded = ours.encode(torch.from_numpy(clips[-1])[None], torch.tensor([len(clips[-1])]))
    narrow, wide = (PrefixBeam(ours.objective, beam=beam)(encoded)[0][0].score for beam in (1, 16))
    assert wide >= narrow and ours.transcribe(clips[-1], search=PrefixBeam(ours.objective)).text


def test_a_long_recording_is_heard_in_clips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recogniser, "BATCH_SECONDS", 25.0)
    ours, x = speechkit.load(folder), sound(31.0)
    heard: list[int] = []
    ours.encoder.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].shape[1]))
    found = ours.transcribe(x)
    assert found.seconds == 31.0 and 30 < found.words[-1].end <= 31 and max(heard) <= 20 * 16000


def test_no_sound_and_hardly_any_are_heard(folder: Path) -> None:
    ours = speechkit.load(folder)
    nothing, hardly, clip = ours.transcribe([torch.zeros(0), sound(0.01), sound(1.0)])
    assert nothing.text == "" and hardly.seconds == 0.01 and clip.text == ours.transcribe(sound(1.0)).text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", ["Wav2Vec2", "WavLM"])
@torch.no_grad()
def test_rounded_weights_change_little(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    tokenizer(tmp_path, VOCABULARY)
    x, lengths = sound(1.0)[None], torch.tensor([16000])
    exact, rounded = (
        logits(speechkit.load(tmp_path, weights=weights), x, lengths)[0] for weights in (torch.float32, dtype)
    )
    assert 0 < float((exact - rounded).std()) < 0.1 * float(exact.std())


@torch.no_grad()
def test_a_copy_is_saved_and_loaded_without_the_original(folder: Path, tmp_path: Path) -> None:
    ours, x = speechkit.load(folder), sound(1.0)
    node = pretrained.model_node(folder)
    pretrained.save(ours, node, tmp_path / "copy")
    assert sorted(f.name for f in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    copy = pretrained.load_recogniser(tmp_path / "copy")
    assert copy.transcribe(x) == ours.transcribe(x)
    assert isinstance(copy.tokenizer, Symbols) and copy.tokenizer.symbols == ours.tokenizer.symbols
    assert pretrained.model_node(tmp_path / "copy") == node
    assert pretrained.describe(folder) == {key: node[key] for key in ("features", "encoder")}


def test_the_example_of_the_documentation_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "pretrained.md").read_text(encoding="utf-8")
    example = re.search(r"## Recognisers.*?```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    monkeypatch.setattr(pretrained.hub, "fetch", lambda name, local: folder)
    monkeypatch.chdir(tmp_path)
    audio.write("a.wav", sound(2.0).numpy(), 16000)
    exec(example[1], {})
    lines, heard = capsys.readouterr().out.splitlines(), speechkit.load(folder).transcribe(sound(2.0))
    assert len(lines) == 2 + len(heard.words) and lines[1].endswith(heard.words[0].word)


@torch.no_grad()
def test_without_a_vocabulary_it_is_the_encoder_alone(folder: Path, tmp_path: Path) -> None:
    model = saved(tmp_path)
    encoder, x = speechkit.load(tmp_path), sound(0.5)[None]
    assert isinstance(encoder, Wav2Vec2) and pretrained.model_node(tmp_path) == pretrained.describe(tmp_path)
    close(encoder(x[..., None]).frames, model.wav2vec2(x).last_hidden_state)
    with pytest.raises(
        ValueError, match=r"must hold a recogniser, but holds an encoder, .*ForCTC.* and its vocab.json"
    ):
        pretrained.load_recogniser(tmp_path)


@pytest.mark.parametrize("kept", [True, False])
def test_it_is_fine_tuned_with_its_own_vocabulary_or_another(kept: bool, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    saved(theirs)
    tokenizer(theirs, ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghi"])
    symbols = json.dumps(pretrained.model_node(theirs)["text"]["symbols"])
    file = recipe.write(tmp_path, train=8, dev=2)
    taken = [f"init={theirs}", "model.features=null", "model.encoder=null", "context=whole", "task.spec_augment=null"]
    own = f"model.text={{_target_: speechkit.text.Symbols, symbols: {symbols}}}" if kept else "fresh=[objective]"
    train(str(file), ["name=tuned", *taken, own, "tuning=lora", "trainer.max_steps=6"])
    model, given = speechkit.load(tmp_path / "runs" / "tuned"), speechkit.load(theirs)
    assert isinstance(model, Recogniser) and isinstance(model.encoder, Wav2Vec2) and model.tuning is not None
    close(model.encoder.widen.weight, given.encoder.widen.weight, 0.0)
    moved = model.objective.head.weight.shape == given.objective.head.weight.shape
    assert moved is kept and (model.tokenizer.symbols == given.tokenizer.symbols) is kept
    assert set(model.transcribe(tmp_path / "dev0.wav").text) <= set("abcdefghi ")


# What it refuses


def test_whatever_streams_is_refused_in_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ours, sentence = speechkit.load(folder), r"Wav2Vec2 must hear whole utterances, .* or stream a Conformer\.$"
    for stream in (
        lambda: Session(ours),
        lambda: Session(ours, context=Context(left=16, chunk=8)),
        lambda: ours.init_state(1),
    ):
        with pytest.raises(ValueError, match=sentence):
            stream()
    assert ours.context == Context() and not ours.context.streams
    name, file, manifest = str(folder), str(tmp_path / "a.wav"), tmp_path / "set.jsonl"
    audio.write(file, sound(0.1).numpy(), 16000)
    manifest.write_text(json.dumps({"audio": "a.wav", "text": "A", "duration": 0.1}) + "\n")
    for command in (
        ["transcribe", name, file, "--stream"],
        ["transcribe", name, file, "--chunk-ms", "320"],
        ["evaluate", name, str(manifest), "--stream"],
        ["stream", name, file],
        ["serve", name, "--port", "0"],
    ):
        assert cli.main(command) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and re.search(sentence, said.strip()), said


def test_a_context_that_shows_less_than_all_is_refused(folder: Path) -> None:
    ours, x = speechkit.load(folder), sound(0.5)
    with pytest.raises(ValueError, match=r"was to see Context\(left=16, chunk=8, right=0\); leave the context out"):
        ours.transcribe(x, context=Context(left=16, chunk=8))
    assert ours.transcribe(x, context=Everything()) == ours.transcribe(x)


@pytest.mark.parametrize(
    ("change", "rows", "said"),
    [
        ({}, 12, "vocab.json must name the rows 0 to 11 of lm_head, but has H, ' beyond them"),
        ({}, 17, "vocab.json must name the rows 0 to 16 of lm_head, but has no symbol for 14, 15, 16"),
        ({"A": 99}, 14, "vocab.json must name the rows 0 to 13 of lm_head, but has no symbol for 5"),
        ({"A": 6}, 14, "vocab.json must name the rows 0 to 13 of lm_head, but has no symbol for 5"),
        ({"A": "5"}, 14, "vocab.json must give the row of each symbol, but does not for A"),
        ({"eng": {"A": 0}}, 14, "vocab.json must give the row of each symbol, but does not for eng"),
        ({"<pad>": 14}, 14, "vocab.json must name the rows 0 to 13 of lm_head, but has no symbol for 0"),
        ([], 14, "vocab.json must hold names and values, but holds a list"),
    ],
)  # fmt: skip
def test_a_vocabulary_of_another_model_is_refused_in_one_sentence(
    change: Any, rows: int, said: str, tmp_path: Path
) -> None:
    saved(tmp_path, rows=rows)
    listed = {symbol: row for row, symbol in enumerate(VOCABULARY)}
    (tmp_path / "vocab.json").write_text(json.dumps(listed | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError) as error:
        speechkit.load(tmp_path)
    assert f"(ValueError: {said}" in str(error.value) and str(error.value).endswith(".")


def test_settings_of_another_tokenizer_are_refused_in_one_sentence(tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer(tmp_path, VOCABULARY)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for change, said in (
        (
            {"word_delimiter_token": None, "pad_token": None},
            "vocab.json must have a row for the pad token, None, but has none",
        ),
        ({"replace_word_delimiter_char": "_"}, "replace_word_delimiter_char must be a space, but is '_'"),
        (
            {"tokenizer_class": "Other"},
            "tokenizer_class must be Wav2Vec2CTCTokenizer or Wav2Vec2PhonemeCTCTokenizer, but is Other",
        ),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=re.escape(said)):
            speechkit.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must be JSON, but is not"):
        speechkit.load(tmp_path)
