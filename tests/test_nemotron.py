"""Our Conformer with the weights of transformers' NemotronAsrStreamingEncoder gives its frames, whole and streamed."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import speechkit
from speechkit.config import build
from speechkit.encoders import Conformer, StreamingEncoder
from speechkit.pretrained import describe, load_recogniser
from speechkit.pretrained.nemotron import context
from speechkit.stream import Context
from speechkit.testing import verify_stream

theirs = pytest.importorskip("transformers.models.nemotron_asr_streaming")

LOOKAHEADS = [0, 1, 6, 13]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_mel_bins": 16,
    "subsampling_conv_channels": 8,
}
CONFIGS = {
    "default": {},
    "no biases": {"attention_bias": False, "convolution_bias": False, "scale_input": False, "num_mel_bins": 128},
    "odd": {
        "conv_kernel_size": 4,
        "num_mel_bins": 21,
        "hidden_size": 36,
        "num_attention_heads": 6,
        "intermediate_size": 72,
    },
    "four": {"subsampling_factor": 4, "attention_bias": False, "num_hidden_layers": 3, "sliding_window": 31},
    "two": {"subsampling_factor": 2, "convolution_bias": False, "conv_kernel_size": 31, "sliding_window": 18},
}


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter and buffer away from its neutral start, and the look-ahead large in what comes out."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 10
            is_norm = "norm" in name and name.endswith("weight")
            tensor.copy_(1 + 0.3 * noise if is_norm else 1.5 * noise * fan_in**-0.5)
    return module.eval()


def written(folder: Path, **changes) -> nn.Module:
    """Their encoder, saved to a folder."""
    model = randomised(theirs.NemotronAsrStreamingEncoder(theirs.NemotronAsrStreamingEncoderConfig(**TINY | changes)))
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Conformer]:
    torch.manual_seed(0)
    model = written(tmp_path, **CONFIGS[request.param])
    return model, speechkit.load(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    written(tmp_path)
    return tmp_path


def asked(model: nn.Module, lookahead: int) -> Context:
    return context(left=model.config.sliding_window - 1, lookahead=lookahead)


def features(model: nn.Module, *shape: int) -> Tensor:
    return torch.randn(*shape, model.config.num_mel_bins, generator=torch.Generator().manual_seed(1))


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape and torch.isfinite(ours).all() and torch.isfinite(theirs).all()
    worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    assert worst <= 1e-4, f"{name}: differ by {worst:.3g}"


def streamed(model: nn.Module, x: Tensor, lookahead: int) -> Iterator[Tensor]:
    """Their streaming path: a first chunk of 1 + 8 L features, later ones of 8 (L + 1), and two caches.

    What is left over for no frame at the end, fewer than 8 features, is not given to it, because it would fail.
    """
    stride, past, padding, start = model.config.subsampling_factor, None, None, 0
    size = 1 + stride * lookahead
    while x.shape[1] - start >= min(size, stride):
        out = model(
            x[:, start : start + size],
            num_lookahead_tokens=lookahead,
            use_cache=True,
            past_key_values=past,
            padding_cache=padding,
        )
        past, padding, start, size = out.past_key_values, out.padding_cache, start + size, stride * (lookahead + 1)
        yield out.last_hidden_state


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@torch.no_grad()
def test_whole_utterances_of_ragged_lengths_are_theirs(pair: tuple[nn.Module, Conformer], lookahead: int) -> None:
    model, encoder = pair
    lengths = encoder.stride * torch.tensor([101, 40, 0, 77, 15]) + 1
    x = features(model, 5, int(lengths.max()))
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    expected = model(x, attention_mask=mask, num_lookahead_tokens=lookahead)
    x = torch.where(mask[..., None], x, torch.nan)
    frames, counts, _ = encoder(x, lengths, context=asked(model, lookahead))
    assert counts.tolist() == expected.attention_mask.sum(1).tolist()
    for b, n in enumerate(counts.tolist()):
        close(f"whole, {b}", frames[b, :n], expected.last_hidden_state[b, :n])


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@torch.no_grad()
def test_every_chunk_of_a_stream_is_theirs(pair: tuple[nn.Module, Conformer], lookahead: int) -> None:
    model, encoder = pair
    step = encoder.stride * (lookahead + 1)
    T = encoder.stride * 120 + 1
    x, now = features(model, 2, T), asked(model, lookahead)
    state = encoder.init_state(2, context=now)
    for start, expected in zip(range(0, T, step), streamed(model, x, lookahead), strict=True):
        chunk = x[:, start : start + step]
        out, state = encoder.stream(chunk, torch.tensor([chunk.shape[1]] * 2), state, context=now)
        close(f"streamed, from feature {start}", out.frames, expected)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("rest", range(8))
@torch.no_grad()
def test_any_length_is_their_stream_and_their_whole_utterance_up_to_its_last_chunk(
    folder: Path, rest: int, lookahead: int
) -> None:
    model, encoder = theirs.NemotronAsrStreamingEncoder.from_pretrained(folder).eval(), speechkit.load(folder)
    chunk = lookahead + 1
    T = 1 + 8 * lookahead + 8 * chunk + 8 * (chunk // 2 + 1) + rest
    x = features(model, 1, T)
    frames = encoder(x, torch.tensor([T]), context=asked(model, lookahead)).frames
    close("their stream", frames, torch.cat(list(streamed(model, x, lookahead)), dim=1))
    whole = model(x, num_lookahead_tokens=lookahead).last_hidden_state
    n = frames.shape[1]
    assert n == -(-T // 8) and whole.shape[1] == n + (rest != 0)
    sure = n - n % chunk  # their additional frame is seen by those of its chunk
    close("their whole utterance", frames[:, :sure], whole[:, :sure])


@torch.no_grad()
def test_each_lookahead_sounds_different(folder: Path) -> None:
    encoder = speechkit.load(folder)
    x, lengths = torch.randn(1, 801, 16), torch.tensor([801])
    found = [encoder(x, lengths, context=context(lookahead=n)).frames for n in LOOKAHEADS]
    assert all(float((a - b).abs().max()) > 0.1 for a in found for b in found if a is not b)


@pytest.mark.parametrize("lookahead", [0, 6])
def test_what_was_loaded_streams_as_it_encodes(pair: tuple[nn.Module, Conformer], lookahead: int) -> None:
    model, encoder = pair
    verify_stream(encoder, features=model.config.num_mel_bins, context=asked(model, lookahead), long=False)


def test_the_left_context_is_whole_chunks_and_the_default_that_of_the_config(tmp_path: Path) -> None:
    assert context(lookahead=3) == Context(left=68, chunk=4)
    assert [context(lookahead=n) for n in LOOKAHEADS] == [Context(left=70, chunk=n + 1) for n in LOOKAHEADS]
    written(tmp_path, sliding_window=31, default_num_lookahead_tokens=6)
    encoder = speechkit.load(tmp_path)
    assert encoder.context == Context(left=28, chunk=7) and not encoder.training
    assert isinstance(encoder, StreamingEncoder) and (encoder.dim, encoder.stride) == (32, 8)


@torch.no_grad()
def test_the_encoder_of_a_whole_recogniser_is_loaded_from_one_file_or_many(tmp_path: Path) -> None:
    config = theirs.NemotronAsrStreamingConfig(
        encoder_config=theirs.NemotronAsrStreamingEncoderConfig(**TINY), vocab_size=9, blank_token_id=8
    )
    model = randomised(theirs.NemotronAsrStreamingForRNNT(config))
    x, lengths = torch.randn(1, 201, 16), torch.tensor([201])
    expected = model.encoder(x, num_lookahead_tokens=1).last_hidden_state
    for name, size in (("one", "1GB"), ("many", "50KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        encoder = speechkit.load(tmp_path / name)
        close(name, encoder(x, lengths, context=context(lookahead=1)).frames, expected)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3


def test_an_encoder_without_a_search_writes_no_text(folder: Path) -> None:
    with pytest.raises(ValueError, match="must hold a recogniser, but holds an encoder, which writes no text; use it"):
        load_recogniser(folder)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "ValueError: hidden_act must be silu, but is gelu"),
        ({"subsampling_conv_kernel_size": 5}, "ValueError: subsampling_conv_kernel_size must be 3, but is 5"),
        ({"intermediate_size": 100}, "ValueError: intermediate_size must be a multiple of hidden_size, 32, but is 100"),
        ({"hidden_size": None}, "TypeError: "),
        ({"num_attention_heads": 5}, "ValueError: Softmax.dim must be a multiple of heads, 5, but is 32"),
        ({"default_num_lookahead_tokens": -3}, "ValueError: Context.chunk must be at least 1"),
        ({"model_type": "nemotron_asr_streaming"}, "KeyError: 'encoder_config'"),
    ],
)
def test_a_config_that_no_conformer_can_be_is_named(folder: Path, change: dict, said: str) -> None:
    edit(lambda config: config.update(change))(folder / "config.json")
    with pytest.raises(ValueError, match=r"must describe a NemotronAsrStreamingEncoder .*; copy it again, or") as error:
        speechkit.load(folder)
    assert f"no model can be built from it ({said}" in str(error.value)


def test_weights_that_do_not_fit_are_named_as_their_file_calls_them(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["layers.0.conv.rogue"] = weights.pop("layers.1.self_attn.bias_u")
    weights["layers.0.conv.pointwise_conv1.weight"] = torch.zeros(3, 32, 1)
    save_file(weights, path)
    sentence = (
        "lacks layers.1.self_attn.bias_u, and has the unknown layers.0.conv.rogue, and has the wrong sizes "
        "layers.0.conv.pointwise_conv1.weight [3, 32] instead of [64, 32]; it is of another model"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        speechkit.load(folder)


def test_its_nodes_build_an_encoder_for_its_weights(folder: Path) -> None:
    encoder, built = speechkit.load(folder), build(describe(folder)["encoder"])
    built.load_state_dict(encoder.state_dict())
    x = torch.randn(1, 64, 16)
    with torch.no_grad():
        close("the copy", built.eval()(x, torch.tensor([64])).frames, encoder(x, torch.tensor([64])).frames)
    assert built.context == encoder.context


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_a_pickle_is_refused_unopened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="must be a safetensors file, but is a Python pickle"):
        speechkit.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must be a model folder or a run, but holds no model\.safetensors"):
        speechkit.load(folder)
    assert not Path("exploded").exists()


def test_an_index_that_lists_what_is_not_there_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors", "b": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"must hold every file that .* lists, but lacks other.safetensors; copy"):
        speechkit.load(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match="must name the file of every tensor in its weight_map, but does not"):
        speechkit.load(folder)


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    edit(lambda config: config.update(model_type="wav2vec2"))(folder / "config.json")
    with pytest.raises(
        ValueError, match=r"config.json must describe a wav2vec 2.0, HuBERT or WavLM model as transform"
    ):
        speechkit.load(folder)
