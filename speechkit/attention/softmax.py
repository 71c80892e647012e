"""Multi-head softmax attention with remembered keys."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from speechkit.attention.attend import Kernel, Pattern, attend
from speechkit.attention.positions import ScoreTerm
from speechkit.stream import Context, Span, carry

KeysValues = tuple[Float[Tensor, "B S G K"], Float[Tensor, "B S G K"]]


class Softmax(nn.Module):
    """Multi-head attention (1706.03762) over the keys a `Context` shows; a stream remembers ``context.left`` of them.

    Args:
        dim: width of a frame.
        heads: heads of the queries.
        kv_heads: heads of keys and values, a divisor of ``heads`` (grouped, 2305.13245); 1 is multi-query.
        position: how positions score, called as ``position(dim=, heads=)``; none unless given.
        pattern: which of the visible keys to look at.
        bias: whether the four linear maps add one.
        dropout: share of the attention weights dropped in training.
        kernel: see `attend`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        position: Callable[..., ScoreTerm] = ScoreTerm,
        pattern: Pattern | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % heads:
            raise ValueError(f"Softmax.dim must be a multiple of heads, {heads}, but is {dim}.")
        if heads % kv_heads:
            raise ValueError(f"Softmax.kv_heads must divide heads, {heads}, but is {kv_heads}.")
        self.heads, self.kv_heads, self.width = heads, kv_heads, dim // heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, kv_heads * self.width, bias=bias)
        self.value = nn.Linear(dim, kv_heads * self.width, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.position = position(dim=dim, heads=heads)
        self.pattern, self.dropout, self.kernel = pattern, dropout, kernel

    def init_state(self, batch: int, context: Context) -> KeysValues:
        """No keys yet: the slots stand before position 0, where nothing looks."""
        shape = (batch, context.memory(), self.kv_heads, self.width)
        return self.out.weight.new_zeros(shape), self.out.weight.new_zeros(shape)

    def forward(
        self, x: Float[Tensor, "B U D"], span: Span, state: KeysValues | None = None
    ) -> tuple[Float[Tensor, "B U D"], KeysValues | None]:
        q, k, v = self._project(x)
        q, k = self.position.place(q, k, span.positions(x.shape[1]))
        keys, values = (None, None) if state is None else state
        k, keys = carry(keys, k, span.lengths)
        v, values = carry(values, v, span.lengths)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, span, term=self.position, pattern=self.pattern, dropout=dropout, kernel=self.kernel)
        return self.out(y.flatten(2)), None if keys is None or values is None else (keys, values)

    def _project(self, x: Float[Tensor, "B U D"]) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.query(x).unflatten(-1, (self.heads, self.width)),  # [B, U, H, K]
            self.key(x).unflatten(-1, (self.kv_heads, self.width)),
            self.value(x).unflatten(-1, (self.kv_heads, self.width)),
        )
