"""Masked autoencoders: what the encoder sees, what the decoder's windows are, and what the loss counts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from ast_cases import close, randomised, spectrogram, tiny
from torch import Tensor, nn

from speechkit.autoencoder import MaskedAutoencoder
from speechkit.config import build, build_model, catalogue
from speechkit.decoders import Decoder, Matcher, PerHead, Shifted, contrast, squared_error
from speechkit.encoders.ast import Positions, Sinusoidal, VisionBlock, sinusoids
from speechkit.masking import Anywhere, visible
from speechkit.stream import Context, Everything, fresh_span

DECODERS = {
    "whole": partial(Decoder, dim=24, heads=4, layers=2),
    "local": partial(Decoder, dim=24, heads=4, layers=3, windows=Shifted(columns=2, rows=2)),
    "multiwindow": partial(Decoder, dim=24, heads=4, layers=2, windows=PerHead(patches=[1, 3, 7, None])),
    "ssast": Matcher,
}
decoders = pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())


def autoencoder(decoder: Any = DECODERS["whole"], **changes: Any) -> MaskedAutoencoder:
    """Of 4 rows of patches, usually 7 columns."""
    encoder = tiny(features=64, frames=112, stride=16, band_stride=16)
    parts = {"features": None, "encoder": encoder, "decoder": decoder, "mask": Anywhere(share=0.6)} | changes
    model = MaskedAutoencoder(**parts)
    randomised(model.decoder)
    return model


def each_third(columns: Tensor, rows: int) -> Tensor:
    """A mask without chance: every third patch is seen, whatever is beside the clip."""
    patches = torch.arange(int(columns.max()) * rows)
    return (patches % 3 == 0) & (patches < columns[:, None] * rows)


# What the encoder sees


@decoders
@torch.no_grad()
def test_what_is_in_hidden_patches_never_enters_the_encoder(decoder: Any) -> None:
    model, x = autoencoder(decoder), spectrogram(2, 112, 64)
    patches = model.patches(x)
    other = torch.where(model._laid(patches.hidden[..., None].expand(-1, -1, 256)), torch.nan, x)
    lengths = torch.full((2,), 112)
    guess = model.decoder(model.encoder, patches)
    assert torch.isfinite(guess).all()
    assert torch.equal(
        guess, model.decoder(model.encoder, patches._replace(embedded=model.encoder.embed(other, lengths)))
    )


@torch.no_grad()
def test_an_encoder_that_sees_all_patches_is_the_encoder_itself() -> None:
    encoder = tiny(features=64, frames=112, stride=16, band_stride=16)
    x, lengths = spectrogram(3, 112, 64), torch.tensor([112, 60, 20])
    for given, context in ((None, Everything()), (lengths, Context())):
        columns = encoder.columns(torch.full_like(lengths, 112) if given is None else given)
        embedded = encoder.embed(x, torch.full_like(lengths, 112) if given is None else given)
        placed = (embedded + encoder.positions(columns, 7)).flatten(1, 2)
        tokens, related = encoder.relate(placed, columns * 4, context)
        whole = encoder(x, given)
        assert torch.equal(tokens.mean(1), whole.summary)
        close(related.unflatten(1, (7, 4)).mean(2), whole.frames)


@decoders
def test_a_clip_is_guessed_the_same_alone_and_beside_longer_ones_whatever_is_in_the_padding(decoder: Any) -> None:
    model = autoencoder(decoder, mask=each_third)
    x, lengths = spectrogram(4, 112, 64), torch.tensor([112, 70, 20, 9])
    for row, length in enumerate(lengths.tolist()):
        x[row, length:] = torch.nan
    together = model.decoder(model.encoder, model.patches(x, lengths))
    for row, length in enumerate(lengths.tolist()):
        alone = model.decoder(model.encoder, model.patches(x[row : row + 1, :length], lengths[row : row + 1]))
        close(together[row, : alone.shape[1]], alone[0])
    assert torch.isfinite(model.losses(x, lengths)["loss"])
    model.losses(x, lengths)["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


@decoders
def test_clips_without_lengths_are_all_real(decoder: Any) -> None:
    model, x = autoencoder(decoder, mask=each_third), spectrogram(2, 112, 64)
    close(model.losses(x)["loss"], model.losses(x, torch.tensor([112, 112]))["loss"])


def each_nth(columns: Tensor, rows: int) -> Tensor:
    """A mask that shows every clip of a batch less than the one before it."""
    patches = torch.arange(int(columns.max()) * rows)
    return patches % torch.arange(2, 2 + len(columns))[:, None] == 0


@torch.no_grad()
def test_clips_of_which_less_is_seen_are_not_shown_more_because_of_the_others() -> None:
    model, x = autoencoder(mask=each_nth), spectrogram(3, 112, 64)
    guess = model.decoder(model.encoder, model.patches(x))
    for row in range(3):
        alone = autoencoder(mask=lambda columns, rows, row=row: each_nth(columns.expand(3), rows)[row : row + 1])
        close(guess[row], alone.decoder(alone.encoder, alone.patches(x[row : row + 1]))[0])


# Windows


def swin(columns: int, rows: int, window: tuple[int, int], shift: int) -> Tensor:
    """Which patches see each other in shifted windows, as Swin (2103.14030, figure 4) makes them: the grid is rolled,
    cut into windows, and of a window that the roll put together from both ends each side sees itself alone."""
    place = torch.arange(columns * rows).reshape(columns, rows).roll(-shift, 0)
    from_the_other_end = (torch.arange(columns) >= columns - shift)[:, None].expand(columns, rows)
    sees = torch.zeros(columns * rows, columns * rows, dtype=torch.bool)
    for c in range(0, columns, window[0]):
        for r in range(0, rows, window[1]):
            here = (slice(c, c + window[0]), slice(r, r + window[1]))
            for side in (False, True):
                members = place[here][from_the_other_end[here] == side]
                sees[members[:, None], members] = True
    return sees


def runs(patches: int, sizes: list[int | None]) -> Tensor:
    sees = torch.zeros(len(sizes), patches, patches, dtype=torch.bool)
    for head, size in enumerate(sizes):
        for first in range(0, patches, size or patches):
            run = slice(first, first + (size or patches))
            sees[head, run, run] = True
    return sees


@torch.no_grad()
def attended(block: VisionBlock, x: Tensor, sees: Tensor) -> Tensor:
    """The attention of a block over the pairs of ``sees [H, N, N]``, in float64 and head by head."""
    part, x = block.attention, block.norm_attention(x).double()
    q, k, v = (nn.functional.linear(x, m.weight.double(), m.bias.double()) for m in (part.query, part.key, part.value))
    heads, out = part.heads, []
    for head, (one, other, value) in enumerate(zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True)):
        scores = one @ other.mT / math.sqrt(one.shape[-1])
        out.append(scores.masked_fill(~sees[head % len(sees)], -torch.inf).softmax(-1) @ value)
    return nn.functional.linear(torch.cat(out, -1), part.out.weight.double(), part.out.bias.double())


@pytest.mark.parametrize(("columns", "window"), [(8, (4, 4)), (12, (4, 2)), (6, (2, 3))])
@torch.no_grad()
def test_shifted_windows_are_those_of_swin(columns: int, window: tuple[int, int]) -> None:
    rows = 8 if window[1] == 4 else 6
    windows = Shifted(columns=window[0], rows=window[1])
    decoder = randomised(Decoder(inputs=8, rows=rows, outputs=4, dim=16, heads=2, layers=3, windows=windows))
    x = spectrogram(2, columns * rows, 16)
    span = fresh_span(torch.full((2,), columns * rows), Everything())
    for layer, block in enumerate(decoder.blocks):
        sees = swin(columns, rows, window, layer % 2 * (window[0] // 2))
        found = block.attention(block.norm_attention(x), span)[0]
        close(found.double(), attended(block, x, sees[None]))


@torch.no_grad()
def test_each_head_has_a_window_of_its_own() -> None:
    sizes = [2, 5, 10, None]
    windows = PerHead(patches=sizes)
    decoder = randomised(Decoder(inputs=8, rows=5, outputs=4, dim=16, heads=4, layers=1, windows=windows))
    x, block = spectrogram(2, 35, 16), decoder.blocks[0]
    found = block.attention(block.norm_attention(x), fresh_span(torch.tensor([35, 35]), Context()))[0]
    close(found.double(), attended(block, x, runs(35, sizes)))


# The loss


def by_hand(model: MaskedAutoencoder, x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Guesses, targets and what is hidden, patch by patch in float64."""
    patches = model.patches(x)
    guess = model.decoder(model.encoder, patches).detach().double().numpy()
    targets = np.zeros_like(guess)
    for clip, sound in enumerate(x.double().numpy()):
        for column in range(sound.shape[0] // 16):
            for row in range(4):
                patch = sound[16 * column : 16 * column + 16, 16 * row : 16 * row + 16].flatten()
                if model.normalised:
                    patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
                targets[clip, column * 4 + row] = patch
    return guess, targets, ~patches.seen.numpy()


@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_is_the_squared_error_of_hidden_patches_alone(normalised: bool) -> None:
    model, x = autoencoder(mask=each_third, normalised=normalised), spectrogram(3, 112, 64)
    guess, targets, hidden = by_hand(model, x)
    expected = np.mean([((guess[i] - targets[i]) ** 2).mean() for i in zip(*np.nonzero(hidden), strict=True)])
    close(model.losses(x)["loss"].double(), torch.tensor(expected))


def test_ssast_finds_each_guess_among_the_hidden_patches_of_its_clip() -> None:
    model = autoencoder(Matcher, mask=each_third, normalised=False)
    x, lengths = 0.1 * spectrogram(3, 112, 64), torch.tensor([112, 112, 50])
    patches = model.patches(x, lengths)
    guess = model.decoder.match(model.decoder._encoded(model.encoder, patches)).detach().double()
    losses = []
    for clip in range(3):
        places = [n for n in range(int(patches.columns[clip]) * 4) if n % 3]
        for n in places:
            scores = torch.stack([guess[clip, n] @ patches.target[clip, m].double() for m in places])
            losses.append(float(scores.logsumexp(0) - scores[places.index(n)]))
    found = model.losses(x, lengths)
    close(found["matched"].double(), torch.tensor(np.mean(losses)))
    close(found["rebuilt"], squared_error(model.decoder(model.encoder, patches), patches))
    close(found["loss"], found["matched"] + 10 * found["rebuilt"])
    nothing = patches._replace(seen=torch.ones_like(patches.seen))
    assert contrast(guess.float(), nothing) == 0 == squared_error(guess.float(), nothing)


def test_guesses_are_laid_where_their_patches_were() -> None:
    model, x = autoencoder(DECODERS["local"]), spectrogram(2, 120, 64)
    assert torch.equal(model._laid(model.pixels(x)), x[:, :112])
    rebuilt, hidden = model.rebuilt(x, torch.tensor([120, 120]))
    assert rebuilt.shape == hidden.shape == (2, 112, 64)
    assert torch.equal(rebuilt[~hidden], x[:, :112][~hidden])
    assert not torch.equal(rebuilt[hidden], x[:, :112][hidden])
    squares = hidden.unflatten(1, (7, 16)).unflatten(3, (4, 16)).float().mean((2, 4))
    assert set(squares.flatten().tolist()) == {0.0, 1.0} and int(squares[0].sum()) == 28 - 11


# Against a plain implementation of the paper


class Plain(nn.Module):
    """Audio-MAE by the letter, in float64: shuffled patches, the first of them kept, and unshuffled for the decoder.

    Transformers are torch's own.
    """

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.ours = model
        self.encoder = nn.ModuleList(layer(block, 4, 128) for block in model.encoder.blocks)
        self.decoder = nn.ModuleList(layer(block, 4, 96) for block in model.decoder.blocks)
        self.double()

    def forward(self, x: Tensor, shuffled: Tensor, keep: int) -> Tensor:
        encoder, decoder = self.ours.encoder, self.ours.decoder
        x = x.double().unflatten(1, (7, 16)).unflatten(3, (4, 16)).transpose(2, 3).flatten(3).flatten(1, 2)
        target = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        x = x @ encoder.patches.weight.double().flatten(1).T + encoder.patches.bias.double()
        x = x + encoder.positions.table.double().flatten(0, 1)
        x = torch.stack([clip[order[:keep]] for clip, order in zip(x, shuffled, strict=True)])
        first = torch.stack([encoder.class_token, encoder.distillation_token]) + encoder.positions.tokens
        x = torch.cat([first.double().expand(len(x), -1, -1), x], 1)
        for part in self.encoder:
            x = part(x)
        x = nn.functional.layer_norm(x, (32,), encoder.norm.weight.double(), encoder.norm.bias.double(), 1e-6)[:, 2:]
        x = x @ decoder.embed.weight.double().T + decoder.embed.bias.double()
        x = torch.cat([x, decoder.mask_token.double().expand(len(x), 28 - keep, -1)], 1)
        restore = shuffled.argsort(1)
        x = torch.stack([clip[order] for clip, order in zip(x, restore, strict=True)])
        x = x + sinusoids(7, 4, 24).double().flatten(0, 1)
        for part in self.decoder:
            x = part(x)
        x = nn.functional.layer_norm(x, (24,), decoder.norm.weight.double(), decoder.norm.bias.double(), 1e-6)
        guess = x @ decoder.predict.weight.double().T + decoder.predict.bias.double()
        errors = (guess - target).square().mean(-1)
        hidden = torch.stack([order >= keep for order in restore])
        return errors[hidden].mean()


def layer(block: VisionBlock, heads: int, hidden: int) -> nn.TransformerEncoderLayer:
    """Torch's own, with the weights of a block."""
    dim, part = block.norm_feed.weight.shape[0], block.attention
    other = nn.TransformerEncoderLayer(dim, heads, hidden, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    maps = (part.query, part.key, part.value)
    other.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([m.weight for m in maps]),
            "self_attn.in_proj_bias": torch.cat([m.bias for m in maps]),
        }
        | {f"self_attn.out_proj.{k}": v for k, v in part.out.state_dict().items()}
        | {f"linear1.{k}": v for k, v in block.feed[0].state_dict().items()}
        | {f"linear2.{k}": v for k, v in block.feed[3].state_dict().items()}
        | {f"norm1.{k}": v for k, v in block.norm_attention.state_dict().items()}
        | {f"norm2.{k}": v for k, v in block.norm_feed.state_dict().items()}
    )
    return other.eval()


@torch.no_grad()
def test_it_is_the_masked_autoencoder_of_the_paper() -> None:
    shuffled = torch.stack([torch.randperm(28) for _ in range(3)])

    def mask(columns: Tensor, rows: int) -> Tensor:
        return torch.zeros(3, 28, dtype=torch.bool).scatter(1, shuffled[:, :6], True)

    model, x = autoencoder(mask=mask), spectrogram(3, 112, 64)
    close(model.losses(x)["loss"].double(), Plain(model)(x, shuffled, 6))


# Learning


@decoders
def test_it_learns_what_one_clip_has_in_hidden_places(decoder: Any) -> None:
    """Far better than by the mean of what is hidden, which is what an encoder that sees nothing can give."""
    torch.manual_seed(1)
    seconds = torch.arange(112)[:, None] / 10
    x = (seconds + torch.arange(64) / 7).sin()[None] + (torch.arange(64) / 20).cos()
    model = autoencoder(decoder, mask=each_third, normalised=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model.losses(x)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        patches = model.patches(x)
        error = squared_error(model.decoder(model.encoder, patches), patches)
        assert error < 0.2 * patches.target[patches.hidden].var()


@decoders
def test_training_reaches_every_parameter(decoder: Any) -> None:
    model = autoencoder(decoder).train()
    model.losses(spectrogram(2, 112, 64), torch.tensor([112, 80]))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sinusoidal_positions_begin_as_sines_and_cosines_and_learn() -> None:
    positions = Sinusoidal(columns=9, rows=4, dim=32)
    positions.reset()
    for column in range(9):
        for row in range(4):
            halves = [
                f(place / 10000 ** (2 * k / 16))
                for place in (row, column)
                for k in range(8)
                for f in (math.sin, math.cos)
            ]
            close(positions.table[column, row], torch.tensor(halves))
    assert positions.table.requires_grad and positions.tokens.std() > 0
    plain = Positions(columns=9, rows=4, dim=32)
    plain.load_state_dict(positions.state_dict())
    assert torch.equal(plain.grid(), positions.grid())


# Bad input and the catalogue


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"patches that do not overlap, but one of 16 x 16 begins every 10 frames and 16"
    ):
        autoencoder(encoder=tiny(features=64, frames=112, stride=10, band_stride=16))
    with pytest.raises(ValueError, match=r"one window for each of the 4 heads of the decoder, but names 3; set heads"):
        autoencoder(partial(Decoder, dim=24, heads=4, layers=1, windows=PerHead(patches=[1, 2, None])))
    with pytest.raises(ValueError, match=r"Shifted.columns must be at least 1 patch, but is 0"):
        Shifted(columns=0)
    with pytest.raises(ValueError, match=r"PerHead.patches must be at least 1, or null for all, but are \[0, 4\]"):
        PerHead(patches=[0, 4])


CHOICES = [(group, file.stem) for group in ("decoder", "mask") for file in sorted((catalogue() / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=str)
def test_every_decoder_and_mask_of_the_catalogue_can_be_trained(group: str, choice: str) -> None:
    with hydra.initialize_config_dir(str(catalogue()), version_base="1.3"):
        node = hydra.compose("pretrain", overrides=["name=x", f"{group}={choice}", "model.encoder.layers=1"]).model
    model = build_model(node)
    losses = model.losses(spectrogram(2, 300, 128), torch.tensor([300, 200]))
    assert all(torch.isfinite(value) for value in losses.values()) and "loss" in losses


def test_the_small_encoder_of_the_catalogue_sees_a_fifth_of_five_seconds() -> None:
    with hydra.initialize_config_dir(str(catalogue()), version_base="1.3"):
        encoder = build(
            hydra.compose(overrides=["+encoder=ast_mini", "+features=ast128"]).model.encoder, "model.encoder"
        )
    columns = encoder.columns(torch.tensor([498]))
    assert visible(Anywhere()(columns, encoder.rows))[0].shape == (1, 49) and encoder.rows * int(columns) == 248
