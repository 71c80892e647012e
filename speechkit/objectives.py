"""Heads and their losses, which are never apart: CTC, an attention decoder, and the hybrid of both.

An objective is called with what the encoder gave and the batch it came from, and returns ``{"loss": ...}`` and the
named parts worth a line in a log. ``objective.ctc`` and ``objective.attention`` are the heads a search may ask for;
``None`` says the objective lacks one.

Both losses are divided by the same number, the tokens of the batch with one boundary an utterance. So a loss does not
depend on how utterances were bucketed, ``Hybrid.ctc_weight`` means the same for short and for long ones, and an
utterance without words is no division by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from speechkit.stream import keep_valid, valid
from speechkit.types import BLANK, Batch, EncoderOutput

Parts = dict[str, Float[Tensor, ""]]
Memory = tuple[Float[Tensor, "B H U K"], Float[Tensor, "B H U K"]]  # keys and values, here and below
Cache = tuple[Float[Tensor, "N H _ K"], Float[Tensor, "N H _ K"]]  # grows from call to call


class Objective(Protocol):
    """A head and its loss; in configs a factory called as ``objective(dim=encoder.dim, vocab=tokenizer.size)``."""

    @property
    def ctc(self) -> CTC | None: ...

    @property
    def attention(self) -> AttentionDecoder | None: ...

    def __call__(self, encoded: EncoderOutput, batch: Batch) -> Parts: ...


class CTC(nn.Module):
    """A linear head and connectionist temporal classification (Graves et al. 2006).

    The loss is the sum over the batch of -ln P(tokens | frames), divided by the tokens of those utterances plus one
    each. An utterance with fewer frames than its labels need (one each, and a blank between equal neighbours) has no
    alignment: it counts in neither sum, and ``too_short`` says how many there were.

    Args:
        dim: width of the encoder's frames.
        vocab: tokens, blank included.
        dropout: of the frames before the head, in training.
    """

    def __init__(self, *, dim: int, vocab: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, vocab)

    @property
    def ctc(self) -> CTC:
        return self

    @property
    def attention(self) -> None:
        return None

    def log_probs(self, frames: Float[Tensor, "B U D"]) -> Float[Tensor, "B U V"]:
        """ln P(token | frame) in float32, whatever the precision of the frames."""
        return self.head(frames).float().log_softmax(-1)

    def forward(self, encoded: EncoderOutput, batch: Batch) -> Parts:
        """``loss``, and ``too_short``: utterances left out because they have too few frames for their labels."""
        frames = self.dropout(keep_valid(encoded.frames, encoded.lengths))
        tokens = keep_valid(batch.tokens, batch.token_lengths)
        fits = encoded.lengths >= batch.token_lengths + _repeats(tokens)
        losses = F.ctc_loss(
            self.log_probs(frames).transpose(0, 1),
            tokens,
            encoded.lengths,
            batch.token_lengths,
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )
        counted = ((batch.token_lengths + 1) * fits).sum().clamp(min=1)
        return {"loss": losses.sum() / counted, "too_short": (~fits).sum().float()}


def _repeats(tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B"]:
    """Labels equal to their left neighbour; the zeros of the padding are none."""
    return ((tokens[:, 1:] == tokens[:, :-1]) & (tokens[:, 1:] != BLANK)).sum(1)


class DecoderState(NamedTuple):
    """What the decoder remembers between steps: ``N = B * hypotheses an utterance``, neighbours in that order."""

    memory: tuple[Memory, ...]  # one a layer, from the encoder's frames
    heard: Bool[Tensor, "B U"]
    cache: tuple[Cache, ...]  # one a layer, from the tokens so far


class AttentionDecoder(nn.Module):
    """A Transformer decoder over the encoder's frames (Vaswani et al. 2017), normalising before each part.

    Token 0 opens and closes a sentence. Positions are computed where they are needed, so no table limits the length.
    The loss is the cross entropy of every token and the closing boundary, with ``label_smoothing`` spread evenly over
    the vocabulary (Szegedy et al. 2016; its gradient is that of the Kullback-Leibler form), divided by their number.

    Args:
        dim: width of the encoder's frames and of the decoder.
        vocab: tokens, boundary included.
        layers: blocks of self-attention, attention to the frames, and feed-forward.
        heads: of each attention.
        expansion: width of the feed-forward part in multiples of ``dim``.
        dropout: of every part before it is added, and of the embedding.
        label_smoothing: probability taken from the right token.

    Raises:
        ValueError: where ``dim`` is not a multiple of ``heads``.
    """

    def __init__(
        self,
        *,
        dim: int,
        vocab: int,
        layers: int = 3,
        heads: int = 4,
        expansion: int = 4,
        dropout: float = 0.1,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"AttentionDecoder.dim must be a multiple of its {heads} heads, but is {dim}; change heads."
            )
        self.label_smoothing = label_smoothing
        self.embedding = nn.Embedding(vocab, dim)
        # Scaled back by sqrt(dim) in `run`, so that a token starts out as loud as its position.
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(dim, heads, expansion * dim, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab)

    @property
    def ctc(self) -> None:
        return None

    @property
    def attention(self) -> AttentionDecoder:
        return self

    def forward(self, encoded: EncoderOutput, batch: Batch) -> Parts:
        """``loss``, and ``accuracy``: the share of tokens guessed right when all before them are given."""
        log_probs = self.log_probs(encoded, batch.tokens, batch.token_lengths)
        tokens = keep_valid(batch.tokens, batch.token_lengths)
        targets = F.pad(tokens, (0, 1), value=BLANK)  # the boundary, where the padding began
        real = valid(batch.token_lengths + 1, targets.shape[1])
        loss = F.cross_entropy(log_probs[real], targets[real], label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (log_probs.argmax(-1) == targets)[real].float().mean()}

    def log_probs(
        self, encoded: EncoderOutput, tokens: Int[Tensor, "N L"], token_lengths: Int[Tensor, "N"]
    ) -> Float[Tensor, "N L+1 V"]:
        """ln P(token l | tokens before l, frames), where position ``token_lengths[n]`` is that of the boundary.

        N is a multiple of B: the hypotheses of one utterance stand next to each other and share its frames.
        """
        before = F.pad(keep_valid(tokens, token_lengths), (1, 0), value=BLANK)
        return self.run(before, self.init_state(encoded, len(tokens) // len(encoded.lengths)))[0]

    def init_state(self, encoded: EncoderOutput, hypotheses: int = 1) -> DecoderState:
        """A state that has heard the frames and read nothing, for so many hypotheses of each utterance."""
        frames = keep_valid(encoded.frames, encoded.lengths)
        memory = tuple(block.listen.keys_values(frames) for block in cast("Iterable[_Block]", self.blocks))
        nothing = memory[0][0][:, :, :0].repeat(hypotheses, 1, 1, 1)
        return DecoderState(memory, valid(encoded.lengths, frames.shape[1]), ((nothing, nothing),) * len(memory))

    def step(self, tokens: Int[Tensor, "N"], state: DecoderState) -> tuple[Float[Tensor, "N V"], DecoderState]:
        """Read one token of every hypothesis, the boundary first, and say ln P of what comes next."""
        log_probs, state = self.run(tokens[:, None], state)
        return log_probs[:, 0], state

    def run(self, tokens: Int[Tensor, "N L"], state: DecoderState) -> tuple[Float[Tensor, "N L V"], DecoderState]:
        """Read L tokens of every hypothesis: teacher forcing is one such call from a fresh state."""
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        x = self.dropout(x + sinusoids(state.cache[0][0].shape[2], x))
        caches = []
        for block, memory, cache in zip(self.blocks, state.memory, state.cache, strict=True):
            x, cache = block(x, memory, state.heard, cache)
            caches.append(cache)
        return self.head(self.norm(x)).float().log_softmax(-1), state._replace(cache=tuple(caches))

    @staticmethod
    def select(state: DecoderState, utterances: Int[Tensor, "R"], hypotheses: Int[Tensor, "N"]) -> DecoderState:
        """The state of some utterances, and of some of all the hypotheses, in that order; repeats are allowed."""
        cache = tuple((k[hypotheses], v[hypotheses]) for k, v in state.cache)
        if len(utterances) == len(state.heard):  # a beam that is sorted anew leaves the frames, the large part, alone
            return state._replace(cache=cache)
        memory = tuple((k[utterances], v[utterances]) for k, v in state.memory)
        return DecoderState(memory, state.heard[utterances], cache)


class _Block(nn.Module):
    """Read the tokens so far, listen to the frames, think."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.read_norm, self.listen_norm, self.think_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.read, self.listen = _Attention(dim, heads), _Attention(dim, heads)
        self.think = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "N L D"], memory: Memory, heard: Bool[Tensor, "B U"], cache: Cache
    ) -> tuple[Float[Tensor, "N L D"], Cache]:
        new = self.read.keys_values(self.read_norm(x))
        cache = torch.cat([cache[0], new[0]], dim=2), torch.cat([cache[1], new[1]], dim=2)
        x = x + self.dropout(self.read(self.read_norm(x), cache, _not_ahead(x.shape[1], cache[0].shape[2], x.device)))
        # Hypotheses of one utterance are queries over one memory: it is neither copied nor projected again for each.
        queries = self.listen_norm(x).reshape(len(heard), -1, x.shape[-1])  # [B, N/B*L, D]
        x = x + self.dropout(self.listen(queries, memory, heard[:, None, None]).reshape_as(x))
        return x + self.dropout(self.think(self.think_norm(x))), cache


def _not_ahead(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "L S"]:
    """Which keys the last ``queries`` of ``keys`` positions see: none that come after them."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


class _Attention(nn.Module):
    """Multi-head attention whose keys and values are made apart, to be remembered."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def keys_values(self, x: Float[Tensor, "B S D"]) -> tuple[Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]:
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(
        self, x: Float[Tensor, "B L D"], keys_values: Memory, mask: Bool[Tensor, "..."]
    ) -> Float[Tensor, "B L D"]:
        keys, values = keys_values
        attended = F.scaled_dot_product_attention(self._split(self.query(x)), keys, values, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))

    def _split(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B H S K"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sinusoids(start: int, like: Float[Tensor, "N L D"]) -> Float[Tensor, "L D"]:
    """Positions from ``start`` on, as sines and cosines (Vaswani et al. 2017, section 3.5)."""
    _, count, dim = like.shape
    rates = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-math.log(10000) / dim))
    angles = torch.arange(start, start + count, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim].to(like.dtype)


class Hybrid(nn.Module):
    """CTC and attention trained together (Kim et al. 2017): ``ctc_weight`` of the one and the rest of the other.

    Args:
        dim: width of the encoder's frames.
        vocab: tokens, the blank or boundary included.
        ctc: called as ``ctc(dim=dim, vocab=vocab)``, for example `CTC`.
        attention: called likewise, for example `AttentionDecoder`.
        ctc_weight: share of the CTC loss, 0 to 1.

    Raises:
        ValueError: where the weight is no share.
    """

    def __init__(
        self,
        *,
        dim: int,
        vocab: int,
        ctc: Callable[..., CTC],
        attention: Callable[..., AttentionDecoder],
        ctc_weight: float = 0.3,
    ) -> None:
        super().__init__()
        if not 0 <= ctc_weight <= 1:
            raise ValueError(
                f"Hybrid.ctc_weight must be from 0 to 1, but is {ctc_weight}; the paper's choices are 0.2 to 0.5."
            )
        self.ctc = ctc(dim=dim, vocab=vocab)
        self.attention = attention(dim=dim, vocab=vocab)
        self.ctc_weight = ctc_weight

    def forward(self, encoded: EncoderOutput, batch: Batch) -> Parts:
        """``loss``, its parts ``ctc`` and ``attention``, and what else those two tell."""
        ctc, attention = self.ctc(encoded, batch), self.attention(encoded, batch)
        loss = self.ctc_weight * ctc["loss"] + (1 - self.ctc_weight) * attention["loss"]
        return {**ctc, **attention, "ctc": ctc["loss"], "attention": attention["loss"], "loss": loss}
