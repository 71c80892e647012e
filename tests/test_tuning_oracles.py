"""Fine-tuning methods against what others compute: peft, transformers, and sums written out in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tuning_cases import BANDS, Model, encoder, node, randomised, sounds, train, tuned

from speechkit.attention import Softmax
from speechkit.config import build
from speechkit.explain import explain
from speechkit.layers import Linear, shrink
from speechkit.stream import Context, fresh_span
from speechkit.tagger import Piece, Tagger
from speechkit.traced import Traced
from speechkit.tuning import (
    Adapters,
    Bottleneck,
    Convpass,
    DenseMixture,
    GatedPrefix,
    LayerSum,
    Peft,
    Prefix,
    Prompts,
    SoftMixture,
    TimeConvolution,
    blocks,
)
from speechkit.tuning.prompts import Gated, Prefixed
from speechkit.types import EncoderOutput

MERGED = ["lora", "dora", "scale_shift", "full", "linear_probe", "bitfit", "gradual"]
RELATIVES: list[tuple[str, dict[str, Any]]] = [
    ("loha", {"r": 2}),
    ("lokr", {"r": 2}),
    ("hira", {"r": 2}),
    ("oft", {"oft_block_size": 4}),
    ("boft", {"boft_block_size": 4}),
    ("miss", {"r": 4}),
    ("ia3", {"feedforward_modules": []}),
]


def moved(model: nn.Module) -> Any:
    """The same model with everything that is trained somewhere else."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def attention(**changes: Any) -> Softmax:
    return randomised(Softmax(dim=16, heads=4, **changes)).double()


# peft


@pytest.mark.parametrize("arguments", [{"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8, "use_dora": True}])
def test_lora_and_dora_give_what_peft_gives_on_a_model_of_plain_linear_maps(arguments: dict[str, Any]) -> None:
    class Plain(nn.Module):
        """The feed-forward of a block, of torch's own classes."""

        def __init__(self, source: nn.Module) -> None:
            super().__init__()
            self.feed = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Identity(), nn.Linear(96, 24))
            self.feed.load_state_dict(source.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.feed(x)

    model = Model(encoder("ast_tiny"))
    theirs = Plain(blocks(model.encoder)[0].feed)
    Peft(arguments=arguments, where=["feed_forward"]).apply(model)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["0", "3"], **arguments))
    moved(model)
    ours = blocks(model.encoder)[0].feed
    theirs.base_model.model.feed.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 24)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("arguments", [{}, {"use_dora": True}])
def test_lora_reaches_every_map_that_peft_reaches_in_transformers_own_ast(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import ASTConfig, ASTModel

    import speechkit

    config = ASTConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, max_length=64)
    theirs = ASTModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours: Any = Model(speechkit.load(tmp_path))
    Peft(arguments={"r": 4, **arguments}).apply(ours)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=targets, **arguments)).eval()
    layers = theirs.base_model.model.layers
    names = {"feed.0": "mlp.fc1", "feed.3": "mlp.fc2"} | {
        f"attention.{ours}": f"attention.{theirs}"
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj"))
    }
    moved(ours)
    for block, layer in zip(blocks(ours.encoder), layers, strict=True):
        for mine, other in names.items():
            layer.get_submodule(other).load_state_dict(block.get_submodule(mine).state_dict())
    x = torch.randn(2, 64, 128)
    with torch.no_grad():
        torch.testing.assert_close(ours.encoder(x).summary, theirs(x).pooler_output, atol=2e-5, rtol=1e-5)


def test_lora_is_in_our_linear_maps_and_in_torchs_alike() -> None:
    from peft.tuners.lora import Linear as Changed

    model = tuned("conformer_xs", "lora")
    changed = {n: p for n, p in model.encoder.named_modules() if isinstance(p, Changed)}
    assert {type(part.get_base_layer()) for part in changed.values()} == {Linear}
    assert len(changed) == 2 * (4 + 2 * 2), "query, key, value, out, and two maps of each of two feed-forwards"
    model = Model(encoder("ast_tiny"))
    block = blocks(model.encoder)[0]
    block.attention.query = nn.Linear(24, 24)
    Peft().apply(model)
    assert isinstance(block.attention.query, Changed)


def test_lora_on_the_maps_of_a_convolution_module_streams() -> None:
    from speechkit.testing import verify_stream

    model = Model(encoder("conformer_xs"))
    Peft(where=["convolution"]).apply(model)
    moved(model).requires_grad_(True)
    verify_stream(model.encoder, features=BANDS, context=Context(left=8, chunk=4), long=False)


@pytest.mark.parametrize("method", ["lora", "scale_shift", "conformer_adapter", "gated_prefix"])
def test_a_traced_step_goes_through_what_was_added(method: str) -> None:
    body = moved(tuned("conformer_xs", method, layers=1)).encoder
    context, x, lengths = Context(left=8, chunk=4), sounds(frames=16), torch.full((3,), 16)
    plain, traced = (body.init_state(3, context=context) for _ in range(2))
    step, untouched = Traced(body.stream), encoder("conformer_xs", layers=1).eval()
    with torch.inference_mode():
        for _ in range(3):
            ours, traced = step(x, lengths, traced, context=context)
            other, plain = body.stream(x, lengths, plain, context=context)
            torch.testing.assert_close(ours.frames, other.frames, atol=1e-5, rtol=1e-5)
        fresh, _ = untouched.stream(x, lengths, untouched.init_state(3, context=context), context=context)
        assert not torch.allclose(ours.frames, fresh.frames, atol=1e-2)


@pytest.mark.parametrize(("method", "arguments"), RELATIVES)
def test_relatives_of_lora_learn_and_merge(method: str, arguments: dict[str, Any]) -> None:
    model = Model(encoder("ast_tiny"))
    Peft(method=method, arguments=arguments).apply(model)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, steps=4)
    still = [n for n, p in model.named_parameters() if n in trained and torch.equal(p, trained[n])]
    assert not [n for n in still if ".key." not in n], f"must learn: {still}"
    with torch.no_grad():
        expected = model(sounds())
        model.tuning.merge(model)
        torch.testing.assert_close(model(sounds()), expected, atol=2e-5, rtol=1e-4)
    assert model.state_dict().keys() == Model(encoder("ast_tiny")).state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"method": "lorra"},
            "change linear maps, in small letters, but is lorra; did you mean lora",
        ),
        ({"arguments": {"rank": 4}}, "tuning.arguments.rank is not an argument of peft's lora"),
        ({"arguments": {"target_modules": ["x"]}}, "tuning.arguments.target_modules is not an argument"),
    ],
)
def test_what_peft_does_not_have_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Peft(**arguments)


def test_methods_of_peft_that_change_no_single_map_are_refused() -> None:
    with pytest.raises(ValueError, match=r"learns by gradients alone, but adalora also .*; take method=lora"):
        Peft(method="adalora", arguments={"total_step": 100})
    with pytest.raises(ValueError, match="change linear maps, in small letters, but is prefix_tuning"):
        Peft(method="prefix_tuning")
    with pytest.raises(ValueError, match=r"tuning\.method must be one that peft can put .* but vera cannot"):
        Peft(method="vera").apply(Model(encoder("ast_tiny")))


def test_a_missing_peft_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft.mapping", None)
    with pytest.raises(ValueError, match=r"pip install 'speechkit\[peft\]'"):
        Peft()


# Encoders of others


class Foreign(nn.Module):
    """An encoder of transformers on features, as small as its parts allow."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import transformers

        sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
        if kind == "whisper":
            sizes = {"d_model": 24, "encoder_attention_heads": 4, "encoder_layers": 2, "encoder_ffn_dim": 32}
            config = transformers.WhisperConfig(**sizes, num_mel_bins=BANDS, max_source_positions=32)
            self.body: Any = transformers.models.whisper.modeling_whisper.WhisperEncoder(config)
        else:
            config = transformers.Wav2Vec2Config(**sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
            self.body = transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2Encoder(config)
        self.whisper, self.dim, self.stride = kind == "whisper", 24, 1

    def forward(self, x: Tensor, lengths: Tensor) -> EncoderOutput:
        frames = self.body(x.transpose(1, 2) if self.whisper else x).last_hidden_state
        return EncoderOutput(frames, torch.full((len(x),), frames.shape[1]))


@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
@pytest.mark.parametrize(
    "method", ["full", "gradual", "bitfit", "layer_sum", "scale_shift", "lora", "dora", "bottleneck"]
)
def test_encoders_of_transformers_are_tuned_by_the_same_methods(kind: str, method: str) -> None:
    model = Model(Foreign(kind))
    described = node(method)
    if kind == "whisper" and method == "bottleneck":
        with pytest.raises(ValueError, match="but these have no feed_forward; leave it out of"):
            build(described, "model.tuning").apply(model)
        described["where"] = ["attention"]
    build(described, "model.tuning").apply(model)
    model.tuning.every = 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.tuning.at(model, 10)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    train(model, steps=5)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    spared = {name for name in trained if "masked_spec" in name or "k_proj" in name}
    assert moved <= trained and trained - moved <= spared


@pytest.mark.parametrize(
    "method", ["prefix", "gated_prefix", "prompt_deep", "soft_moa", "convpass", "conformer_adapter"]
)
def test_what_needs_our_own_attention_says_so_in_encoders_of_transformers(method: str) -> None:
    with pytest.raises(ValueError, match=r"must .* but .*; "):
        build(node(method), "model.tuning").apply(Model(Foreign("wav2vec2")))


# Merging


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("name", ["ast_tiny", "conformer_s_whole"])
def test_a_merged_model_has_the_plain_structure_and_gives_the_same(name: str, method: str) -> None:
    model = moved(tuned(name, method)).double()
    x = sounds().double()
    with torch.no_grad():
        expected = model(x)
        model.tuning.merge(model)
        torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=1e-10)
    assert model.tuning is None
    assert model.state_dict().keys() == Model(encoder(name)).state_dict().keys()
    assert {type(part) for part in model.modules()} <= {type(part) for part in Model(encoder(name)).modules()}


def test_a_merged_model_can_be_tuned_again() -> None:
    model = moved(tuned("ast_tiny", "dora"))
    model.tuning.merge(model)
    build(node("lora"), "model.tuning").apply(model)
    train(model)


@pytest.mark.parametrize("method", ["bottleneck", "soft_moa", "prompt_deep", "layer_sum", "gated_prefix"])
def test_what_cannot_be_merged_says_so(method: str) -> None:
    model = tuned("ast_tiny", method)
    assert not model.tuning.merges
    with pytest.raises(ValueError, match="must stay beside the weights it was trained with"):
        model.tuning.merge(model)


def test_lora_that_was_merged_can_be_rounded() -> None:
    model = moved(tuned("conformer_xs", "dora"))
    with torch.no_grad():
        expected = model(sounds())
        model.tuning.merge(model)
        shrink(model, torch.bfloat16)
        torch.testing.assert_close(model(sounds()), expected, atol=0.1, rtol=0.1)


# Adapters


def test_soft_mixture_is_its_definition_slot_by_slot() -> None:
    """2308.00951, equations 1 to 3, written as loops over clips, slots and frames."""
    torch.manual_seed(0)
    adapter = moved(SoftMixture(dim=16, experts=3, slots=2, reduction=4)).double()
    x, lengths = torch.randn(2, 6, 16, dtype=torch.float64), torch.tensor([6, 4])
    said, _ = adapter(x, lengths)
    assert torch.isfinite(said).all()
    for clip, length in enumerate(lengths.tolist()):
        frames, slots = x[clip, :length], adapter.slots.flatten(0, 1)
        logits = [[float((frame @ slot).detach()) for slot in slots] for frame in frames]
        answers = []
        for number in range(len(slots)):
            weights = torch.tensor([row[number] for row in logits], dtype=torch.float64).softmax(0)
            heard = sum(weight * frame for weight, frame in zip(weights, frames, strict=True))
            expert = adapter.experts[number // 2]
            answers.append(expert.up(F.gelu(expert.down(heard))))
        for frame in range(length):
            weights = torch.tensor(logits[frame], dtype=torch.float64).softmax(0)
            expected = sum(weight * answer for weight, answer in zip(weights, answers, strict=True))
            torch.testing.assert_close(said[clip, frame], expected, atol=1e-12, rtol=1e-9)


def test_dense_mixture_is_the_routers_mean_of_all_experts() -> None:
    adapter = moved(DenseMixture(dim=16, experts=3, reduction=4)).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    shares = (x @ adapter.router.weight.T + adapter.router.bias).softmax(-1)
    expected = sum(shares[..., i, None] * adapter.experts[i](x) for i in range(3))
    torch.testing.assert_close(adapter(x), expected)


@pytest.mark.parametrize("parallel", [False, True])
def test_an_adapter_is_added_behind_or_beside_the_module(parallel: bool) -> None:
    model = Model(encoder("ast_tiny"))
    part = blocks(model.encoder)[1].feed
    Adapters(adapter=Bottleneck, where=["feed_forward"], parallel=parallel).apply(model)
    changed, x = moved(model).encoder.blocks[1].feed, torch.randn(2, 5, 24)
    y = part(x)
    torch.testing.assert_close(changed(x), y + changed.adapter(x if parallel else y))


def test_convpass_convolves_the_grid_of_patches_and_leaves_tokens_alone() -> None:
    """Each patch by its neighbours in time and frequency, summed one by one."""
    body = encoder("ast_tiny", band_stride=4, stride=4)
    adapter = Convpass(dim=24, reduction=6)
    adapter.fit(body)
    adapter = moved(adapter).double()
    rows, columns = body.rows, 5
    x = torch.randn(1, 2 + rows * columns, 24, dtype=torch.float64)
    said, _ = adapter(x, torch.tensor([x.shape[1]]))
    middle = F.gelu(adapter.down(x))[0]
    weight, bias = adapter.conv.weight, adapter.conv.bias
    for column in range(columns):
        for row in range(rows):
            total = bias.clone()
            for dt in (-1, 0, 1):
                for df in (-1, 0, 1):
                    if 0 <= column + dt < columns and 0 <= row + df < rows:
                        total = total + weight[:, :, dt + 1, df + 1] @ middle[2 + (column + dt) * rows + row + df]
            torch.testing.assert_close(said[0, 2 + column * rows + row], adapter.up(F.gelu(total)))
    for token in range(2):
        alone = adapter.up(F.gelu(weight[:, :, 1, 1] @ middle[token] + bias))
        torch.testing.assert_close(said[0, token], alone)


def test_the_conformer_adapter_runs_along_each_row_of_patches() -> None:
    body = encoder("ast_tiny", band_stride=4, stride=4)
    adapter = TimeConvolution(dim=24, reduction=6, kernel=3)
    adapter.fit(body)
    adapter = moved(adapter).double()
    rows, columns = body.rows, 5
    x = torch.randn(1, 2 + rows * columns, 24, dtype=torch.float64)
    said, _ = adapter(x, torch.tensor([x.shape[1]]))
    middle = F.glu(adapter.down(adapter.norm_in(x)), dim=-1)[0, 2:].view(columns, rows, -1)
    for row in range(rows):
        along = F.conv1d(middle[:, row].T[None], adapter.depthwise.conv.weight, adapter.depthwise.conv.bias,
                         padding=1, groups=middle.shape[2])[0].T  # fmt: skip
        expected = adapter.up(F.silu(adapter.norm(along)))
        torch.testing.assert_close(said[0, 2:].view(columns, rows, -1)[:, row], expected)


# Prompts, prefixes, mixtures of layers


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_prefix_is_keys_and_values_put_before_the_others(kv_heads: int) -> None:
    part = attention(kv_heads=kv_heads)
    changed = Prefixed(part, 3).double()
    x, lengths = torch.randn(2, 5, 16, dtype=torch.float64), torch.tensor([5, 3])
    said, _ = changed(x, fresh_span(lengths, Context()))
    for clip, length in enumerate(lengths.tolist()):
        real = x[clip, :length]
        q = part.query(real).view(length, 4, 4)
        k, v = (
            torch.cat([own, said_by(real).view(length, kv_heads, 4)]).repeat_interleave(4 // kv_heads, 1)
            for own, said_by in ((changed.keys, part.key), (changed.values, part.value))
        )
        heads = [(q[:, h] @ k[:, h].T / 2).softmax(-1) @ v[:, h] for h in range(4)]
        torch.testing.assert_close(said[clip, :length], part.out(torch.cat(heads, -1)))


def test_a_gated_prefix_adds_what_queries_find_in_it() -> None:
    part = attention(kv_heads=2)
    changed = Gated(part, 3, 16).double()
    with torch.no_grad():
        changed.gate.copy_(torch.tensor([[0.3], [-1.0], [2.0], [0.0]]))
    x, span = torch.randn(2, 5, 16, dtype=torch.float64), fresh_span(torch.tensor([5, 5]), Context())
    heads = []
    for head in range(4):
        q = part.query(x)[..., 4 * head : 4 * head + 4]
        k, v = (said(changed.prompts)[0, :, 4 * (head // 2) :][:, :4] for said in (part.key, part.value))
        heads.append(changed.gate[head].tanh() * (q @ k.T / 2).softmax(-1) @ v)
    expected = part(x, span)[0] + torch.cat(heads, -1) @ part.out.weight.T
    torch.testing.assert_close(changed(x, span)[0], expected)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_frames_beside_those_that_are_heard(deep: bool) -> None:
    model = Model(encoder("ast_tiny"))
    parts = list(blocks(model.encoder))
    Prompts(count=3, deep=deep).apply(model)
    model.eval()
    x = torch.randn(2, 7, 24)
    expected, heard = x, x
    for number, block in enumerate(model.encoder.blocks):
        if deep or number == 0:
            expected = torch.cat([block.prompts.expand(2, -1, -1), expected[:, -7:]], 1)
        expected = parts[number](expected, fresh_span(torch.tensor([10, 10]), Context()))
        heard = block(heard, fresh_span(torch.tensor([7, 7]), Context()))
    torch.testing.assert_close(heard, expected[:, -7:])


def test_a_sum_of_layers_is_the_softmax_of_its_weights() -> None:
    model = Model(encoder("conformer_s_whole")).eval()
    plain = encoder("conformer_s_whole").eval()
    plain.load_state_dict(model.encoder.state_dict())
    LayerSum().apply(model)
    with torch.no_grad():
        model.encoder.mixture.weights.copy_(torch.tensor([0.1, -0.5, 1.0]))
    heard: list[Tensor] = []
    plain.blocks[0].register_forward_pre_hook(lambda block, args: heard.append(args[0]))
    for block in plain.blocks:
        block.register_forward_hook(lambda block, args, output: heard.append(output[0]))
    x, lengths = sounds(), torch.tensor([64, 64, 64])
    with torch.no_grad():
        plain(x, lengths)
        shares = torch.tensor([0.1, -0.5, 1.0]).softmax(0)
        expected = sum(share * layer for share, layer in zip(shares, heard, strict=True))
        torch.testing.assert_close(model.encoder(x, lengths).frames, expected)


def test_a_sum_of_layers_can_be_all_of_one_layer() -> None:
    """The last: then it is the encoder as it was."""
    model = tuned("ast_tiny", "layer_sum").eval()
    torch.manual_seed(0)
    plain = Model(encoder("ast_tiny")).eval()
    with torch.no_grad():
        model.encoder.mixture.weights[-1] = 100.0
        torch.testing.assert_close(model(sounds()), plain(sounds()))


def test_a_prefix_refuses_an_attention_that_does_more_than_it_knows() -> None:
    class Louder(Softmax):
        """Twice as much."""

        def forward(self, *args: Any) -> Any:
            y, state = super().forward(*args)
            return 2 * y, state

    model = Model(encoder("ast_tiny"))
    blocks(model.encoder)[1].attention.__class__ = Louder
    with pytest.raises(ValueError, match="Prefix must know all that an attention does, but AST has Louder"):
        Prefix().apply(model)


@pytest.mark.parametrize("method", [Prefix(), GatedPrefix()])
def test_prefixes_need_our_own_attention(method: Any) -> None:
    model = Model(encoder("ast_tiny"))
    for block in blocks(model.encoder):
        block.attention = nn.Sequential(nn.Linear(24, 24))
    with pytest.raises(ValueError, match=r"must find speechkit.attention.Softmax .* but AST has Sequential"):
        method.apply(model)


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("prompt_deep", "gradient times input"),
        ("prefix", "gradient times input"),
        ("lora", "attention rollout"),
        ("soft_moa", "attention rollout"),
    ],
)
def test_attention_is_rolled_out_where_it_is_to_patches_alone(method: str, way: str) -> None:
    tagger = Tagger(features=None, encoder=encoder("ast_tiny"), labels=["a", "b"], frames=96)
    build(node(method), "model.tuning").apply(tagger)
    features = sounds(1, 96)
    found, heat = explain(tagger, Piece(0, 90, features, tagger.encoder(features)))
    assert found == way and heat.shape == (90, BANDS) and torch.isfinite(heat).all()
