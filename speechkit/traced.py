"""A step of a stream as one callable: its operators in a row, and no Python between them.

A step consists of hundreds of small operators, and Python needs longer to arrive at them, through modules and their
attributes, than most of them run. `Traced` lets it walk that way once for each shape of call, writes down which
operators came, and from then on calls those. On its way it joins what fits into one `linear_step`: the norm before a
linear map, the SiLU or the residual sum behind it; and packs its weight as that is read fastest.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from speechkit.replay import arguments, replay
from speechkit.stream import Context, State, clone_state, leaves, with_leaves

Stream = Callable[..., tuple[Any, State]]
aten = torch.ops.aten
LINEAR = "speechkit.linear_step.default"
PANEL, LEAST = 16, 64  # rows of a weight: of a panel when packed; with fewer than these, few frames leave a tile empty

Packed = dict[tuple, tuple[Tensor, Tensor]]  # by where a weight lies: itself, which keeps that place taken, and packed


class Traced:
    """``stream`` of an encoder or a `Recogniser`, called as that is, with the same results up to rounding.

    ::

        step = Traced(recogniser.stream)
        encoded, state = step(samples, lengths, state, context=context)

    The first call with a shape takes a second or so and keeps what it found; `know` does that before a stream begins.
    Lengths, pauses, joins and leaves are values, not shapes. Only for inference, and with the weights as they were:
    what was combined with others, as in a folded batch norm, is not read again, nor are the weights of linear maps.
    Those are packed, once for all shapes, so their memory is taken a second time.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._known: dict[tuple, Callable] = {}
        self._packed: Packed = {}

    @torch.inference_mode()
    def __call__(self, x: Tensor, lengths: Tensor, state: State, *, context: Context) -> tuple[Any, State]:
        return self.know(x, lengths, state, context=context)(x, lengths, state)

    @torch.inference_mode()
    def know(self, x: Tensor, lengths: Tensor, state: State, *, context: Context) -> Callable:
        """The step for calls of this shape, traced now if it was not yet; nothing given is changed."""
        key = (context, x.shape, x.dtype, x.device)
        if key not in self._known:
            self._known[key] = self._trace(x, lengths, clone_state(state), context)
        return self._known[key]

    def _trace(self, x: Tensor, lengths: Tensor, state: State, context: Context) -> Callable:
        made: list[Any] = []

        def flat(x: Tensor, lengths: Tensor, *given: Tensor | None) -> tuple[Tensor | None, ...]:
            encoded, after = self.stream(x, lengths, with_leaves(state, given), context=context)
            made.append(type(encoded))
            return (*encoded, *leaves(after))

        run = trace(flat, x, lengths, *leaves(state), packed=self._packed)
        output = made[0]

        def step(x: Tensor, lengths: Tensor, state: State) -> tuple[Any, State]:
            out = run(x, lengths, *leaves(state))
            count = len(output._fields)
            return output(*out[:count]), with_leaves(state, out[count:])

        return step


def trace(
    function: Callable[..., tuple], *example: Tensor | None, packed: Packed | None = None
) -> Callable[..., tuple]:
    """The operators that ``function`` calls on tensors like these, as one function of such tensors.

    Args:
        example: is used up: what the function changes in place is changed in it.
        packed: weights of linear maps that other traces packed; what this one packs is added.

    Raises:
        RuntimeError: where what the function does depends on a value inside a tensor.
    """
    module = make_fx(function, decomposition_table={aten.dropout.default: lambda x, p, train: x})(*example)
    graph = module.graph
    changed = _changed(graph)
    constants = _fold(module, changed)
    _share(graph, changed)
    _fuse(graph, changed)
    _pack(module, constants, {} if packed is None else packed)
    graph.eliminate_dead_code()
    return replay(graph, constants, example)


def _schema(node: fx.Node) -> torch._C.FunctionSchema | None:
    return getattr(node.target, "_schema", None)


def _changed(graph: fx.Graph) -> set[fx.Node]:
    """Tensors that some operator writes into, and all that may share memory with one."""
    changed = {
        given
        for node in graph.nodes
        for argument, given in arguments(node)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, fx.Node)
    }
    pairs = [
        (node, given)
        for node in graph.nodes
        for argument, given in arguments(node)
        if argument.alias_info is not None and isinstance(given, fx.Node) and _returns_alias(node)
    ]
    while True:
        more = {n for pair in pairs if changed & set(pair) for n in pair} - changed
        if not more:
            return changed
        changed |= more


def _returns_alias(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _pure(node: fx.Node, changed: set[fx.Node]) -> bool:
    """Whether it matters to nobody when, and how often, this is computed."""
    if node.op != "call_function" or node in changed or changed & set(node.all_input_nodes):
        return False
    schema = _schema(node)
    return node.target is operator.getitem or (schema is not None and not schema.is_mutable)


def _fold(module: fx.GraphModule, changed: set[fx.Node]) -> dict[str, Tensor]:
    """What depends on no argument is computed now; all such values by the name that the graph has for them."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(module, node.target)
        elif _pure(node, changed) and all(source in values for source in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    constants = {}
    for number, (node, value) in enumerate(values.items()):
        if isinstance(value, Tensor):
            name = f"constant_{number}"
            constants[name] = value
            module.register_buffer(name, value.data)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    return constants


def _share(graph: fx.Graph, changed: set[fx.Node]) -> None:
    """What is computed twice is computed once, and what is only another name is left out."""
    known: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.target is aten.alias.default and _pure(node, changed):
            node.replace_all_uses_with(node.args[0])
        if node.op == "get_attr" or _pure(node, changed):
            key = str((node.op, node.target, node.args, node.kwargs))
            if known.setdefault(key, node) is not node:
                node.replace_all_uses_with(known[key])
    graph.eliminate_dead_code()


def _fuse(graph: fx.Graph, changed: set[fx.Node]) -> None:
    """Linear maps take what stands around them into their own operator."""
    for node in [node for node in graph.nodes if str(node.target) == LINEAR and _pure(node, changed)]:
        _take_norm(node)
        while (after := _sole(node)) is not None and _pure(after, changed) and (taken := _taken(node, after)):
            with graph.inserting_before(after):
                node_after = graph.call_function(node.target, node.args, {**node.kwargs, **taken})
            node_after.meta = after.meta
            after.replace_all_uses_with(node_after)
            graph.erase_node(after)
            graph.erase_node(node)
            node = node_after


def _pack(module: fx.GraphModule, constants: dict[str, Tensor], packed: Packed) -> None:
    """Linear maps read a packed weight where theirs is a constant that fills panels or whose bias tells how far."""
    maps = {}
    for node in module.graph.nodes:
        if str(node.target) == LINEAR:
            _, source, bias = node.args[:3]
            assert isinstance(source, fx.Node)
            weight = constants.get(str(source.target))
            if weight is not None and weight.dim() == 2 and len(weight) >= LEAST and (bias or len(weight) % PANEL == 0):
                maps[node] = weight
    _pack_all(list(maps.values()), packed)
    for node, weight in maps.items():
        name = f"packed_{node.args[1]}"
        constants[name] = packed[_place(weight)][1]
        module.register_buffer(name, constants[name])
        with module.graph.inserting_before(node):
            node.args = (node.args[0], module.graph.get_attr(name), *node.args[2:])


def _pack_all(weights: list[Tensor], packed: Packed) -> None:
    """One behind the other, as they are read: at the end of one its kernel fetches the beginning of the next."""
    new = {_place(weight): weight for weight in weights if _place(weight) not in packed}
    packs = [torch.ops.speechkit.linear_pack(weight) for weight in new.values()]
    if packs:
        pieces = torch.cat([pack.flatten().view(torch.uint8) for pack in packs]).split([pack.nbytes for pack in packs])
        for (place, weight), pack, piece in zip(new.items(), packs, pieces, strict=True):
            packed[place] = weight, piece.view(pack.dtype).view(pack.shape)


def _place(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype


def _sole(node: fx.Node) -> fx.Node | None:
    """What alone uses it."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _take_norm(node: fx.Node) -> None:
    """The layer norm whose only purpose is to come before linear maps."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    norm = first.args[0] if first.target is operator.getitem and first.args[1] == 0 else None
    if not isinstance(norm, fx.Node) or norm.target is not aten.native_layer_norm.default:
        return
    x, shape, weight, bias, eps = norm.args
    linear = all(user.target is node.target and user.args[0] is first for user in first.users)
    if linear and len(shape) == 1 and weight is not None and bias is not None:  # type: ignore[arg-type]
        node.args = (x, *node.args[1:])
        node.kwargs = {**node.kwargs, "norm_weight": weight, "norm_bias": bias, "eps": eps}


def _taken(node: fx.Node, after: fx.Node) -> dict[str, Any]:
    """The options by which a linear map does what ``after`` does with its result; none where it cannot."""
    done = node.kwargs
    if after.target is aten.silu.default and not {"silu", "factor", "add"} & set(done):
        return {"silu": True}
    if after.target is aten.mul.Tensor and isinstance(after.args[1], float) and not {"factor", "add"} & set(done):
        return {"factor": after.args[1]}
    if after.target is aten.add.Tensor and not after.kwargs and "add" not in done:
        other = after.args[0] if after.args[1] is node else after.args[1]
        if isinstance(other, fx.Node) and other is not node and _like(other) == _like(node):
            return {"add": other}
    return {}


def _like(node: fx.Node) -> tuple | None:
    tensor = node.meta.get("val", node.meta.get("tensor_meta"))
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)
