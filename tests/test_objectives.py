"""Heads and losses against torch's own, and the decoder's two ways of reading against each other."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from speechkit.objectives import CTC, AttentionDecoder, Hybrid, sinusoids
from speechkit.types import Batch, EncoderOutput

DIM, VOCAB = 16, 7


def encode(*lengths: int) -> EncoderOutput:
    return EncoderOutput(torch.randn(len(lengths), max(lengths), DIM), torch.tensor(lengths))


def transcripts(*texts: list[int], padding: int = 0) -> Batch:
    lengths = torch.tensor([len(text) for text in texts])
    tokens = torch.full((len(texts), max(lengths)), padding)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
    nothing = torch.zeros(len(texts), 1)
    return Batch(nothing, torch.ones_like(lengths), tokens, lengths, ("",) * len(texts), ("",) * len(texts))


@pytest.fixture
def decoder() -> AttentionDecoder:
    return AttentionDecoder(dim=DIM, vocab=VOCAB, layers=2).eval()


@pytest.fixture(params=["ctc", "attention", "hybrid"])
def objective(request) -> nn.Module:
    ctc, attention = CTC, partial(AttentionDecoder, layers=1)
    if request.param == "hybrid":
        return Hybrid(dim=DIM, vocab=VOCAB, ctc=ctc, attention=attention).eval()
    return {"ctc": ctc, "attention": attention}[request.param](dim=DIM, vocab=VOCAB).eval()


def test_ctc_equals_torch_per_label_and_end() -> None:
    objective, encoded, batch = CTC(dim=DIM, vocab=VOCAB), encode(9, 6), transcripts([1, 1, 5], [2])
    log_probs = objective.head(encoded.frames).log_softmax(-1).transpose(0, 1)
    total = nn.CTCLoss(reduction="sum")(log_probs, batch.tokens, encoded.lengths, batch.token_lengths)
    torch.testing.assert_close(objective(encoded, batch)["loss"], total / (3 + 1 + 1 + 1))


def test_an_utterance_too_short_for_its_labels_is_counted_and_left_out() -> None:
    objective = CTC(dim=DIM, vocab=VOCAB)
    encoded, batch = encode(9, 2, 3, 0), transcripts([1, 2, 3], [1, 1], [1, 2, 3], [4])
    parts = objective(encoded, batch)
    assert parts["too_short"] == 2  # two equal labels need three frames; one label needs more than none
    fits = EncoderOutput(encoded.frames[[0, 2]], encoded.lengths[[0, 2]])
    torch.testing.assert_close(parts["loss"], objective(fits, transcripts([1, 2, 3], [1, 2, 3]))["loss"])


def test_a_batch_of_which_nothing_fits_has_no_loss_and_no_gradient() -> None:
    objective = CTC(dim=DIM, vocab=VOCAB)
    loss = objective(encode(1, 1), transcripts([1, 1], [1, 2]))["loss"]
    loss.backward()
    assert loss == 0
    assert objective.head.weight.grad.abs().max() == 0


def test_an_utterance_without_words_still_has_a_loss(objective: nn.Module) -> None:
    parts = objective(encode(5, 4), transcripts([], []))
    assert parts["loss"].isfinite() and parts["loss"] > 0


def test_padding_changes_neither_loss_nor_gradient(objective: nn.Module) -> None:
    encoded, batch = encode(9, 6), transcripts([1, 1, 5], [2])
    dirty = encoded.frames.clone()
    dirty[1, 6:] = torch.nan
    padded = EncoderOutput(torch.cat([dirty, torch.full((2, 3, DIM), torch.nan)], dim=1), encoded.lengths)
    dirty_batch = transcripts([1, 1, 5], [2], padding=-1)
    gradients = []
    for frames, texts in ((encoded, batch), (padded, dirty_batch)):
        objective.zero_grad()
        objective(frames, texts)["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in objective.parameters()])
    torch.testing.assert_close(objective(encoded, batch), objective(padded, dirty_batch))
    for clean, dirty in zip(*gradients, strict=True):
        torch.testing.assert_close(clean, dirty, atol=1e-6, rtol=1e-5)


def test_the_loss_of_a_batch_is_the_mean_over_its_tokens(objective: nn.Module) -> None:
    encoded, texts = encode(9, 6), ([1, 1, 5], [2])
    alone = [
        objective(EncoderOutput(encoded.frames[i : i + 1], encoded.lengths[i : i + 1]), transcripts(texts[i]))["loss"]
        for i in range(2)
    ]
    torch.testing.assert_close(objective(encoded, transcripts(*texts))["loss"], (4 * alone[0] + 2 * alone[1]) / 6)


def test_an_utterance_without_frames_breaks_no_gradient(objective: nn.Module) -> None:
    objective(encode(6, 0), transcripts([1, 2], [3]))["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())


def test_losses_are_float32_under_mixed_precision(objective: nn.Module) -> None:
    encoded, batch = encode(9, 6), transcripts([1, 1, 5], [2])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = objective(encoded, batch)["loss"]
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, objective(encoded, batch)["loss"], rtol=0.05, atol=0.05)


def test_the_hybrid_is_the_weighted_sum_of_its_parts() -> None:
    objective = Hybrid(dim=DIM, vocab=VOCAB, ctc=CTC, attention=AttentionDecoder, ctc_weight=0.2).eval()
    encoded, batch = encode(9, 2), transcripts([1, 2, 5], [2, 2])
    parts = objective(encoded, batch)
    ctc, attention = objective.ctc(encoded, batch), objective.attention(encoded, batch)
    assert set(parts) == {"loss", "ctc", "attention", "too_short", "accuracy"}
    torch.testing.assert_close(parts["loss"], 0.2 * ctc["loss"] + 0.8 * attention["loss"])
    assert parts["too_short"] == 1


def test_every_objective_says_which_heads_it_has() -> None:
    ctc, attention = CTC(dim=DIM, vocab=VOCAB), AttentionDecoder(dim=DIM, vocab=VOCAB)
    hybrid = Hybrid(dim=DIM, vocab=VOCAB, ctc=CTC, attention=AttentionDecoder)
    assert ctc.ctc is ctc and ctc.attention is None
    assert attention.attention is attention and attention.ctc is None
    assert isinstance(hybrid.ctc, CTC) and isinstance(hybrid.attention, AttentionDecoder)


def test_the_decoder_loss_is_smoothed_cross_entropy_of_tokens_and_end(decoder: AttentionDecoder) -> None:
    encoded, batch = encode(8, 5), transcripts([3, 1, 2], [4])
    log_probs = decoder.log_probs(encoded, batch.tokens, batch.token_lengths)
    expected = 0.0
    for row, text in enumerate(([3, 1, 2, 0], [4, 0])):
        for position, token in enumerate(text):
            target = torch.full((VOCAB,), 0.1 / VOCAB)
            target[token] += 0.9
            expected -= (target * log_probs[row, position]).sum() / 6
    parts = decoder(encoded, batch)
    torch.testing.assert_close(parts["loss"], expected)
    guesses = [log_probs[r, p].argmax() == t for r, x in enumerate(([3, 1, 2, 0], [4, 0])) for p, t in enumerate(x)]
    assert parts["accuracy"] == pytest.approx(sum(guesses).item() / 6)


def test_log_probs_are_normalised_and_no_token_sees_what_comes_after_it(decoder: AttentionDecoder) -> None:
    encoded, lengths = encode(8), torch.tensor([4])
    a = decoder.log_probs(encoded, torch.tensor([[3, 1, 2, 5]]), lengths)
    b = decoder.log_probs(encoded, torch.tensor([[3, 1, 6, 6]]), lengths)
    torch.testing.assert_close(a.exp().sum(-1), torch.ones(1, 5))
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3:] - b[:, 3:]).abs().min() > 1e-5


def test_stepping_equals_teacher_forcing(decoder: AttentionDecoder) -> None:
    encoded, tokens = encode(8, 5, 0), torch.randint(1, VOCAB, (3, 12))
    forced = decoder.log_probs(encoded, tokens, torch.full((3,), 12))
    state, stepped = decoder.init_state(encoded), []
    for column in nn.functional.pad(tokens, (1, 0)).T:
        log_probs, state = decoder.step(column, state)
        stepped.append(log_probs)
    torch.testing.assert_close(torch.stack(stepped, dim=1), forced, atol=1e-5, rtol=1e-5)


def test_hypotheses_of_an_utterance_share_its_frames(decoder: AttentionDecoder) -> None:
    encoded, tokens, lengths = encode(8, 5), torch.randint(1, VOCAB, (6, 4)), torch.tensor([4, 2, 3, 1, 4, 0])
    together = decoder.log_probs(encoded, tokens, lengths)
    for row in range(6):
        u = row // 3
        one = EncoderOutput(encoded.frames[u : u + 1], encoded.lengths[u : u + 1])
        alone = decoder.log_probs(one, tokens[row : row + 1], lengths[row : row + 1])
        torch.testing.assert_close(
            alone[0, : lengths[row] + 1], together[row, : lengths[row] + 1], atol=1e-5, rtol=1e-5
        )


def test_selected_hypotheses_go_on_as_if_they_had_been_alone(decoder: AttentionDecoder) -> None:
    encoded = encode(8, 5, 7)
    _, state = decoder.step(torch.zeros(3, dtype=torch.int64), decoder.init_state(encoded))
    state = decoder.select(state, torch.tensor([0, 2]), torch.tensor([0, 0, 2, 2]))
    log_probs, _ = decoder.step(torch.tensor([1, 2, 3, 4]), state)
    rest = EncoderOutput(encoded.frames[[0, 2]], encoded.lengths[[0, 2]])
    forced = decoder.log_probs(rest, torch.tensor([[1], [2], [3], [4]]), torch.ones(4, dtype=torch.int64))
    torch.testing.assert_close(log_probs, forced[:, 1], atol=1e-5, rtol=1e-5)


def test_positions_have_no_end_and_tell_all_places_apart() -> None:
    near, far = sinusoids(0, torch.zeros(1, 4, DIM)), sinusoids(20_000, torch.zeros(1, 4, DIM))
    position = torch.arange(4.0)
    torch.testing.assert_close(near[:, 0], position.sin())
    torch.testing.assert_close(near[:, 3], (position * 10000 ** (-2 / DIM)).cos())
    assert torch.cdist(torch.cat([near, far]), torch.cat([near, far])).add(torch.eye(8)).min() > 0.1


def test_dropout_of_ctc_is_off_in_evaluation() -> None:
    objective, encoded, batch = CTC(dim=DIM, vocab=VOCAB, dropout=0.5), encode(9), transcripts([1, 2])
    assert objective(encoded, batch)["loss"] != objective(encoded, batch)["loss"]
    objective.eval()
    assert objective(encoded, batch)["loss"] == objective(encoded, batch)["loss"]


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"AttentionDecoder.dim must be a multiple of its 3 heads, but is 16; change"):
        AttentionDecoder(dim=DIM, vocab=VOCAB, heads=3)


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=f"Hybrid.ctc_weight must be from 0 to 1, but is {weight}"):
        Hybrid(dim=DIM, vocab=VOCAB, ctc=CTC, attention=AttentionDecoder, ctc_weight=weight)
