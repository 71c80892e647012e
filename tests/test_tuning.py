"""Fine-tuning methods: what is trained learns, what is frozen stays, and a tuned model is still a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuning_cases import (
    BANDS,
    METHODS,
    Model,
    described,
    distinct,
    encoder,
    names,
    node,
    randomised,
    refused,
    sounds,
    train,
    tuned,
)

from speechkit.config import build
from speechkit.stream import Context
from speechkit.testing import verify_stream
from speechkit.tuning import Full, Gradual, LinearProbe, Tuning, blocks, depths, sites, targets

CHANGES_AT_ONCE = {"layer_sum", "prefix", "prompt_deep", "prompt_shallow"}  # all others begin as the model they tune
STREAMED = {  # one method of each way to change what a stream goes through, and the encoders with a way of their own
    "bottleneck": ["conformer_xs"],
    "conformer_adapter": ["conformer_xs", "squeezeformer_tiny"],
    "dense_moa": ["conformer_xs"],
    "dora": ["conformer_xs"],
    "gated_prefix": ["conformer_xs"],
    "layer_sum": ["squeezeformer_tiny"],
    "lora": ["conformer_xs", "squeezeformer_tiny"],
    "parallel": ["squeezeformer_tiny"],
    "scale_shift": ["conformer_xs"],
}
CONTEXT = Context(left=8, chunk=4)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", distinct())
def test_all_that_is_trained_moves_and_nothing_else_does(name: str, method: str) -> None:
    if refused(name, method):
        with pytest.raises(ValueError, match="must"):
            tuned(name, method)
        return
    model = tuned(name, method)
    model.tuning.every = 1  # for those that unfreeze a block every so many steps
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = state(model)
    train(model, steps=5 if method == "gradual" else 3)
    after = state(model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    statistics = {n for n in moved if "running_" in n or "num_batches" in n}
    silent = {n for n in trained if n.endswith("key.bias")}  # a softmax does not notice what all keys have in common
    assert trained - moved <= silent, f"must learn: {sorted(trained - moved)}"
    assert not moved - trained - statistics, f"must not move: {sorted(moved - trained)}"
    assert not statistics or method in ("full", "gradual"), "statistics of a frozen norm moved"
    assert {"head.weight", "head.bias"} <= moved


def served(names: list[str], methods: list[str]) -> list[tuple[str, str]]:
    return [(name, method) for name in names for method in methods if not refused(name, method)]


@pytest.mark.parametrize(
    ("name", "method"),
    served(["ast_tiny", "conformer_s_whole", "squeezeformer_tiny"], [m for m in METHODS if m not in CHANGES_AT_ONCE]),
)
def test_a_tuned_model_begins_as_the_model_it_tunes(name: str, method: str) -> None:
    model = tuned(name, method).eval()
    torch.manual_seed(0)
    original = Model(encoder(name)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(sounds()), original(sounds()), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_with_a_method_lowers_the_loss(method: str) -> None:
    model = tuned("ast_tiny", method)
    labels = torch.arange(3)

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(sounds()), labels))

    before = loss()
    train(model, steps=20)
    assert loss() < before


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_state_gives_the_same_in_a_model_tuned_anew(method: str) -> None:
    model = tuned("ast_tiny", method)
    train(model)
    other = Model(encoder("ast_tiny"))
    build(node(method), "model.tuning").apply(other)
    other.load_state_dict(state(model))
    with torch.no_grad():
        assert torch.equal(other.eval()(sounds()), model(sounds()))


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_a_tuned_model_is_its_own(method: str) -> None:
    model = tuned("ast_tiny", method)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model.eval()(sounds())
        for parameter in model.parameters():
            parameter.add_(1.0)
        assert torch.equal(other.eval()(sounds()), expected)


@pytest.mark.parametrize(("name", "method"), served(["ast_tiny", "conformer_s_whole"], METHODS))
def test_a_clip_gives_the_same_alone_and_beside_longer_ones(name: str, method: str) -> None:
    model = tuned(name, method)
    train(model)
    x, lengths = sounds(frames=90), torch.tensor([90, 41, 66])
    for row, length in enumerate(lengths):
        x[row, length:] = torch.nan
    with torch.no_grad():
        together = model(x, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = model(x[row : row + 1, :length], lengths[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in STREAMED for name in STREAMED[method]])
def test_a_tuned_encoder_streams_what_it_encodes(method: str, name: str) -> None:
    model = tuned(name, method)
    train(model)
    randomised(model)
    model.requires_grad_(True)  # the contract holds the gradients of all weights against each other
    verify_stream(model.encoder, features=BANDS, context=CONTEXT, long=False)


@pytest.mark.parametrize("patchout", [{"columns": 2, "rows": 1}, {"patches": 7}, {"columns": 1, "patches": 5}])
@pytest.mark.parametrize("method", ["convpass", "conformer_adapter"])
def test_neighbours_are_those_in_the_spectrogram_whatever_patchout_leaves(method: str, patchout: dict) -> None:
    """What is left out counts as what is beyond the edge."""
    patchout = {"_target_": "speechkit.encoders.ast.Patchout"} | patchout
    model = tuned("ast_tiny", method, patchout=patchout, band_stride=4)
    body, columns, rows = model.encoder, 5, model.encoder.rows
    kept = body.train().patchout.draw(columns, rows, torch.device("cpu"))
    grid, x = body.blocks[0].attention.adapter.grid, torch.randn(2, 2 + columns * rows, 3)
    part = torch.cat([x[:, :2], x[:, 2:][:, kept]], 1)
    tokens, holes = grid.open(part, torch.full((2,), part.shape[1]))
    assert torch.equal(grid.close(tokens, holes), part)
    there = torch.zeros(columns * rows, 1).index_fill(0, kept, 1.0)
    assert torch.equal(holes.flatten(1, 2), x[:, 2:] * there)
    body.eval()
    tokens, whole = grid.open(x, torch.full((2,), x.shape[1]))
    assert torch.equal(whole.flatten(1, 2), x[:, 2:]) and torch.equal(grid.close(tokens, whole), x)
    train(model)


@pytest.mark.parametrize("name", names("encoder"))
def test_the_places_of_every_encoder_are_found(name: str) -> None:
    body = encoder(name)
    assert len(blocks(body)) == 2
    assert len(sites(body, ["attention"])) == 2
    assert len(sites(body, ["feed_forward"])) == (4 if "subsampling" in described(name) else 2)
    found = targets(body, ["attention", "feed_forward"])
    assert all(isinstance(body.get_submodule(target), nn.Linear) for target in found)
    assert not any("position" in target for target in found)


def test_rates_fall_from_the_head_to_the_front_by_the_decay() -> None:
    model = tuned("ast_tiny", "full")
    rates = model.tuning.rates(model)
    assert set(rates) == {name for name, _ in model.named_parameters() if name.startswith("encoder.")}
    assert rates["encoder.norm.weight"] == 1.0
    assert rates["encoder.blocks.1.feed.0.weight"] == pytest.approx(0.75)
    assert rates["encoder.blocks.0.attention.query.bias"] == pytest.approx(0.75**2)
    assert rates["encoder.class_token"] == rates["encoder.patches.weight"] == pytest.approx(0.75**3)


def test_depth_counts_what_is_before_the_blocks_as_the_front() -> None:
    found, top = depths(encoder("squeezeformer_tiny"))
    assert top == 3
    assert found["norm.weight"] == found["subsampling.linear.weight"] == 0
    assert found["grow.weight"] == top


def test_blocks_join_one_by_one_from_the_last_to_the_first() -> None:
    model = Model(encoder("ast_tiny"))
    tuning = Gradual(every=10)
    tuning.apply(model)

    def trained(step: int) -> set[str]:
        tuning.at(model, step)
        return {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and "blocks" in n}

    assert [len(trained(step)) for step in (0, 9, 10, 19, 20, 30)] == [0, 0, 0, 0, 1, 2]
    assert trained(20) == {"1"} and trained(30) == {"0", "1"}
    assert not model.encoder.class_token.requires_grad
    tuning.at(model, 40)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_unfrozen_depends_on_the_step_alone() -> None:
    """So a run that is continued trains what it would have trained."""

    def trained(*steps: int) -> dict[str, bool]:
        model = tuned("conformer_xs", "gradual")
        for step in steps:
            model.tuning.at(model, step)
        return {name: p.requires_grad for name, p in model.named_parameters()}

    assert trained(*range(0, 170, 10)) == trained(160)


def test_a_frozen_encoder_hears_without_dropout_and_patchout() -> None:
    for method in ("linear_probe", "layer_sum"):
        model = tuned("conformer_s_whole", method, dropout=0.5).train()
        model.tuning.at(model, 0)
        assert torch.equal(model(sounds()), model(sounds()))


def test_the_front_end_is_never_trained() -> None:
    class Front(nn.Linear):
        """Weights that a front end could have."""

    for method in METHODS:
        model = Model(encoder("ast_tiny"))
        model.features = Front(2, 2)
        build(node(method), "model.tuning").apply(model)
        assert not any(p.requires_grad for p in model.features.parameters())


def test_a_model_is_not_tuned_twice() -> None:
    model = tuned("ast_tiny", "bottleneck")
    with pytest.raises(ValueError, match="must be plain to be tuned by LinearProbe, but this one is tuned by Adapters"):
        LinearProbe().apply(model)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("conformer_xs", "convpass", "Convpass must see the patches of an AST, but the encoder is a Conformer"),
        ("conformer_xs", "soft_moa", "SoftMixture must hear whole utterances, .* Conformer streams; take tuning=dense"),
        ("squeezeformer_s", "prefix", "Prefix must be in an encoder of whole utterances"),
        ("conformer_xs", "prompt_deep", "Prompts must be given to blocks that hear a whole utterance"),
    ],
)
def test_a_method_says_in_which_encoder_it_cannot_work(name: str, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(name, method)


def test_an_encoder_without_blocks_is_refused() -> None:
    class Ears(nn.Module):
        """One map, no attention."""

        def __init__(self) -> None:
            super().__init__()
            self.dim, self.map = 4, nn.Linear(4, 4)

    for method in ("full", "bottleneck", "lora"):
        with pytest.raises(ValueError, match="must find blocks with attention in an encoder, but Ears has no list"):
            model = Model(Ears())
            tuning: Tuning = build(node(method), "model.tuning")
            tuning.apply(model)
            tuning.rates(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"where": ["attention"], "parallel": False}, "SoftMixture must be beside the attention .* to be behind"),
        ({"where": ["feed_forward"], "parallel": True}, "SoftMixture must be beside the attention .* beside Feed"),
        ({"where": ["convolution"], "parallel": True}, "but these have no convolution; leave it out of tuning.where"),
        ({"where": ["convolutions"]}, "model.tuning.where must be a list"),
    ],
)
def test_an_adapter_in_a_place_where_it_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(node("soft_moa") | change, "model.tuning").apply(Model(encoder("ast_tiny")))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tuning.decay must be above 0 and at most 1, .* but is 1.5"):
        Full(decay=1.5)
    with pytest.raises(ValueError, match=r"tuning\.every must be at least 1 optimizer step, but is 0"):
        Gradual(every=0)
