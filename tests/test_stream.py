"""Context, Span, carry, and a state that is handled by rows."""

from __future__ import annotations

import math

import pytest
import torch

from speechkit.stream import Context, ContextSampler, Span, carry, keep_valid, put, put_, stack, state_bytes, take


def by_hand(context: Context, query: int, key: int) -> bool:
    if key < 0:
        return False
    if context.chunk is None:
        return True
    first = (query // context.chunk) * context.chunk
    after = math.inf if context.right is None else context.right
    return key < first + context.chunk + after and (context.left is None or key >= first - context.left)


@pytest.mark.parametrize("left", [None, 0, 1, 4, 7])
@pytest.mark.parametrize("chunk", [None, 1, 3, 4])
@pytest.mark.parametrize("right", [None, 0, 2, 8])
def test_visible_is_the_rule_written_out(left: int | None, chunk: int | None, right: int | None) -> None:
    context = Context(left=left, chunk=chunk, right=right)
    query, key = torch.arange(13), torch.arange(-3, 13)
    seen = context.visible(query[None], key[None])[0]
    for i, q in enumerate(query.tolist()):
        for j, k in enumerate(key.tolist()):
            assert bool(seen[i, j]) == by_hand(context, q, k), (q, k)


def test_look_ahead_never_passes_the_end_of_the_chunk() -> None:
    seen = Context(left=None, chunk=4).visible(torch.tensor([[5]]), torch.arange(12)[None])
    assert seen.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_slower_keeps_the_seconds_and_names_what_cannot_be_kept() -> None:
    assert Context(left=64, chunk=16).slower(2) == Context(left=32, chunk=8)
    assert Context().slower(2) == Context()
    assert Context(left=8, chunk=2, right=None).slower(2) == Context(left=4, chunk=1, right=None)
    assert Context(left=8, chunk=2, right=4).slower(2) == Context(left=4, chunk=1, right=2)
    with pytest.raises(ValueError, match=r"Context.chunk must be a multiple of 2.*but is 5.*next one up is 6"):
        Context(left=64, chunk=5).slower(2)


def test_an_unbounded_context_says_why_it_cannot_stream() -> None:
    with pytest.raises(ValueError, match=r"Context.left must be finite to stream, but is None; pass for example"):
        Context(chunk=16).streamable()
    with pytest.raises(ValueError, match=r"Context.chunk must be finite"):
        Context().latency()
    assert Context(left=64, chunk=16).latency() == 16


@pytest.mark.parametrize(("field", "value"), [("chunk", 0), ("left", -1), ("right", -1)])
def test_impossible_contexts_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"Context.{field} must be at least"):
        Context(**{field: value})


def test_carry_remembers_what_came_before_the_next_frame() -> None:
    generator = torch.Generator().manual_seed(3)
    streams = [torch.randn(n, 2, generator=generator) for n in (17, 9, 4)]
    tail, position = torch.zeros(3, 5, 2), [0, 0, 0]
    for _ in range(20):
        lengths = torch.randint(0, 4, (3,), generator=generator)
        lengths = torch.minimum(lengths, torch.tensor([len(s) for s in streams]) - torch.tensor(position))
        new = torch.full((3, 4, 2), torch.nan)
        for b, n in enumerate(lengths.tolist()):
            new[b, :n] = streams[b][position[b] : position[b] + n]
        seen, tail = carry(tail, new, lengths)
        position = [p + n for p, n in zip(position, lengths.tolist(), strict=True)]
        assert seen.shape[1] == 9
        for b, p in enumerate(position):
            history = torch.cat([torch.zeros(5, 2), streams[b][:p]])[-5:]
            assert torch.equal(tail[b], history)


def test_without_a_tail_nothing_is_remembered() -> None:
    new = torch.randn(2, 3, 4)
    seen, tail = carry(None, new, torch.tensor([3, 1]))
    assert tail is None and seen is new


def test_keep_valid_removes_even_nan() -> None:
    x = torch.tensor([[[1.0], [torch.nan]], [[torch.nan], [torch.nan]]])
    assert keep_valid(x, torch.tensor([1, 0])).flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


def test_rows_of_a_state_move_together_through_tuples_dicts_and_lists() -> None:
    state = (torch.arange(3), {"tail": torch.arange(6.0).view(3, 2)}, ["a", "b", "c"])
    assert take(state, [2, 0])[2] == ["c", "a"]
    fresh = take(state, [0])
    after = put(state, [2], fresh)
    assert after[0].tolist() == [0, 1, 0] and after[2] == ["a", "b", "a"]
    assert after[1]["tail"][2].tolist() == [0.0, 1.0]
    assert state[0].tolist() == [0, 1, 2] and state[2] == ["a", "b", "c"], "the old state is left alone"
    assert state_bytes(state) == 3 * 8 + 6 * 4


def test_rows_written_in_place_are_those_that_put_gives() -> None:
    state = (torch.arange(3), {"tail": torch.arange(6.0).view(3, 2)}, ["a", "b", "c"], None)
    fresh = take(state, [2, 0])
    wanted, tail = put(state, [0, 1], fresh), state[1]["tail"]
    after = put_(state, [0, 1], fresh)
    assert after[0].tolist() == wanted[0].tolist() == [2, 0, 2]
    assert after[1]["tail"].tolist() == wanted[1]["tail"].tolist() and after[2:] == wanted[2:]
    assert after[1]["tail"] is tail, "no other memory is taken"


def test_span_counts_positions_on_each_streams_own_clock() -> None:
    span = Span(torch.tensor([0, 8]), torch.tensor([4, 3]), Context(left=4, chunk=4))
    assert span.positions(4).tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert span.positions(2, before=2).tolist() == [[-2, -1, 0, 1], [6, 7, 8, 9]]
    slow = span.slower(2)
    assert (slow.start.tolist(), slow.lengths.tolist(), slow.context) == ([0, 4], [2, 2], Context(left=2, chunk=2))


def test_sampled_contexts_depend_on_the_seed_alone_and_cover_the_choices() -> None:
    sampler = ContextSampler(chunks=(4, 8), lefts=(16, None), whole=0.5)
    drawn = [sampler.draw(seed) for seed in range(400)]
    assert drawn == [sampler.draw(seed) for seed in range(400)]
    assert 140 < sum(c == Context() for c in drawn) < 260
    assert {(c.chunk, c.left) for c in drawn if c.chunk} == {(4, 16), (4, None), (8, 16), (8, None)}
    assert {ContextSampler(whole=1.0).draw(s) for s in range(50)} == {Context()}


def test_states_stacked_are_those_of_a_batch_and_can_be_taken_apart() -> None:
    states = [({"a": torch.full((1, 2), float(i))}, [f"stream {i}"], None) for i in range(3)]
    batch = stack(states)
    assert batch[0]["a"].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]] and batch[1] == [
        "stream 0",
        "stream 1",
        "stream 2",
    ]
    for row, state in enumerate(states):
        again = take(batch, [row])
        assert torch.equal(again[0]["a"], state[0]["a"]) and again[1:] == state[1:]
