"""A traced graph as one call of torch's interpreter: Python is entered and left once, and free for others meanwhile.

Python needs about 6 microseconds to call an operator, more than many small ones run; the interpreter of TorchScript
needs 1 or 2. It gets a graph that consists of operators alone, so no model has to be TorchScript, and none is compiled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

LIST, TUPLE, ITEM = "prim::ListConstruct", "prim::TupleConstruct", "aten::__getitem__"
FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2}  # as the interpreter counts


def replay(graph: fx.Graph, constants: dict[str, Tensor], example: tuple[Tensor | None, ...]) -> Callable[..., tuple]:
    """The operators of ``graph`` as a function of tensors like ``example``.

    Args:
        constants: tensors by the name that the graph has for them; not copied.

    Raises:
        ValueError: when called, where one of our operators refuses a value.
    """
    call = torch._C._create_function_from_graph("step", Script(graph, constants, example).script)

    def run(*given: Tensor | None) -> tuple:
        try:
            # Optimising means that the second call is watched, and takes as long as a hundred.
            with torch.jit.optimized_execution(False):
                return call(*given)
        except RuntimeError as error:  # whatever it was, the interpreter makes this of it, and puts lines before it
            sentence = str(error).rpartition("RuntimeError: ")[2].strip()
            ours = hasattr(torch.ops.speechkit, sentence.partition(":")[0])
            raise (ValueError if ours else RuntimeError)(sentence) from None

    return run


def arguments(node: fx.Node) -> Iterable[tuple[torch._C.Argument, Any]]:
    """What an operator takes, each with what it is given here."""
    schema = getattr(node.target, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema else ()):
        default = argument.default_value
        yield argument, node.args[place] if place < len(node.args) else node.kwargs.get(argument.name, default)


class Script:
    """``graph`` as the interpreter reads it, in ``script``."""

    def __init__(self, graph: fx.Graph, constants: dict[str, Tensor], example: tuple[Tensor | None, ...]) -> None:
        self.script: Any = torch._C.Graph()
        self.constants, self.given = constants, iter(example)
        self.values: dict[fx.Node, Any] = {}  # of operators with several results a list of them
        for node in graph.nodes:
            self.values[node] = getattr(self, f"_{node.op}")(node)

    def _placeholder(self, node: fx.Node) -> Any:
        value = self.script.addInput()
        value.setType((torch._C.NoneType if next(self.given) is None else torch._C.TensorType).get())
        return value

    def _get_attr(self, node: fx.Node) -> Any:
        return self.script.insertConstant(self.constants[str(node.target)].detach())

    def _call_function(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            whole, place = self._value(node.args[0]), operator.index(node.args[1])  # type: ignore[arg-type]
            if isinstance(whole, list):
                return whole[place]
            return self._append(ITEM, [whole, self._value(place)], whole.type().getElementType())
        schema = node.target._schema  # type: ignore[union-attr]
        inputs = [self._value(given, argument.type) for argument, given in arguments(node)]
        return self._append(schema.name, inputs, *[result.type for result in schema.returns])

    def _output(self, node: fx.Node) -> None:
        results = [self._value(result) for result in node.args[0]]  # type: ignore[union-attr]
        whole = self._append(TUPLE, results, torch._C.TupleType([result.type() for result in results]))
        self.script.registerOutput(whole)

    def _value(self, given: Any, type: Any = None) -> Any:
        """What an operator is given where it takes this type."""
        if isinstance(given, fx.Node):
            return self.values[given]
        if given is not None and isinstance(type, torch._C.OptionalType):
            return self._value(given, type.getElementType())
        if isinstance(given, list | tuple):
            return self._append(LIST, [self._value(each, type.getElementType()) for each in given], type)
        if isinstance(type, torch._C.FloatType) and given is not None:
            given = float(given)
        return self.script.insertConstant(FORMATS.get(given, given))

    def _append(self, name: str, inputs: list[Any], *types: Any) -> Any:
        node = self.script.create(name, inputs, len(types))
        self.script.appendNode(node)
        outputs = list(node.outputs())
        for output, type in zip(outputs, types, strict=True):
            output.setType(type)
        return outputs[0] if len(outputs) == 1 else outputs
