"""A graph as Python statements for people to read.

size = input_ids.size(0)
# model.layers.0.self_attn
with torch.set_grad_enabled(False):
    cos = rotary.cos()
view = self.model.layers[0].self_attn.q_proj(hidden).view(size, -1, 4, 16)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from liger_fx.errors import SaveError, printable
from liger_fx.source.values import (
    comment,
    index_text,
    name_text,
    operand_text,
    path_text,
    value_text,
)
from liger_fx.storage.targets import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    SET_GRAD_ENABLED,
    name_of,
)
from liger_fx.tracing import leaves

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@", "and_": "&", "or_": "|", "xor": "^", "lshift": "<<", "rshift": ">>",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}  # fmt: skip
_INDENT = "    "
_WIDTH = 90


class Statements:
    """The lines of one graph's function body, and the names that they use of this package."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.imports: dict[str, set[str]] = {}
        self._regions: list[tuple[Any, Any]] = []
        self._module: str | None = None
        self._last_use = _last_uses(graph)
        self._dead: list[str] = []
        self._is_empty = False

    def lines(self) -> Iterator[str]:
        """One line or more for each node, indented by the regions around it.

        What a module's part of the graph was the last to read is let go when that part ends.
        """
        for node in self.graph.nodes:
            if node.op == "get_attr":
                continue
            if node.op == "placeholder":
                if node.name != node.target:  # an argument that has the name of a builtin
                    yield f"{name_text(node.name)} = {name_text(str(node.target))}"
                continue
            for part in (self._headline(node), self._lines_of(node)):
                for line in part:  # a region opens after its line was taken
                    yield line and _INDENT * len(self._regions) + line
            self._dead += self._last_use.get(node, ())

    def _headline(self, node: fx.Node) -> Iterator[str]:
        module = node.meta.get("module", "")
        if _is_boundary(node) or module == self._module:
            return
        self._module = module
        for i in range(0, len(self._dead), 4):
            yield f"del {', '.join(self._dead[i : i + 4])}"
        self._dead = []
        yield ""
        yield comment(module or "the model")

    def _lines_of(self, node: fx.Node) -> Iterator[str]:
        if _is_boundary(node):
            yield from self._boundary(node)
            return
        self._is_empty = False
        if node.op == "output":
            yield f"return {value_text(node.args[0])}"
        elif node.op == "call_module":
            yield from call_lines(node.name, path_text(str(node.target)), node.args, node.kwargs)
        elif node.op == "call_method":
            method = f"{value_text(node.args[0])}.{name_text(str(node.target))}"
            yield from call_lines(node.name, method, node.args[1:], node.kwargs)
        else:
            yield from self._call(node)

    def _call(self, node: fx.Node) -> Iterator[str]:
        name = name_of(node.target)
        if name is None:
            raise SaveError(f"{node.name} calls {node.target}, which has no name to import.")
        package, _, function = name.rpartition(".")
        args = node.args
        if package == "operator":
            yield self._operator(node.name, function, args)
        elif name == "getattr":
            yield f"{name_text(node.name)} = {value_text(args[0])}.{name_text(str(args[1]))}"
        elif node.target is leaves.model_output:
            output_class = self._output_class(str(args[0]))
            yield from call_lines(node.name, output_class, (), node.kwargs)
        elif package == "liger_fx":
            self._import("liger_fx.tracing", "leaves")
            yield from call_lines(node.name, f"leaves.{function}", args, node.kwargs)
        else:
            yield from call_lines(node.name, name, args, node.kwargs)

    def _operator(self, name: str, function: str, args: tuple[Any, ...]) -> str:
        name = name_text(name)
        if function in _INFIX and len(args) == 2:
            return f"{name} = {operand_text(args[0])} {_INFIX[function]} {operand_text(args[1])}"
        if function == "getitem":
            return f"{name} = {value_text(args[0])}[{index_text(args[1])}]"
        if function == "setitem":
            return f"{value_text(args[0])}[{index_text(args[1])}] = {value_text(args[2])}"
        self.imports.setdefault("operator", set())
        return f"{name} = operator.{function}({', '.join(map(value_text, args))})"

    def _output_class(self, reference: str) -> str:
        module, _, name = reference.partition(":")
        if not module.startswith("transformers."):
            raise SaveError(f"{printable(ascii(reference), 80)} is no class of transformers.")
        return self._import(".".join(map(name_text, module.split("."))), name_text(name))

    def _import(self, module: str, name: str) -> str:
        self.imports.setdefault(module, set()).add(name)
        return name

    def _boundary(self, node: fx.Node) -> Iterator[str]:
        """A ``with`` line where a region opens, nothing where it closes."""
        regions = self._regions
        closes: tuple[Any, Any] = (node.target, node.args[0])
        if node.target is EXIT_AUTOCAST:
            closes = (node.args[0], None)
        if regions and regions[-1] == closes:
            if self._is_empty:
                yield "pass"
            self._is_empty = False
            regions.pop()
            return
        if node.target is EXIT_AUTOCAST:
            raise SaveError(f"{node.name} closes a region that another one overlaps.")
        self._is_empty = True
        if node.target is ENTER_AUTOCAST:
            device, dtype, enabled, cache = map(value_text, node.args)
            yield f"with torch.autocast({device}, {dtype}, {enabled}, {cache}):"
            regions.append((node, None))
        else:
            yield f"with torch.set_grad_enabled({value_text(node.args[0])}):"
            regions.append((SET_GRAD_ENABLED, not node.args[0]))


def _is_boundary(node: fx.Node) -> bool:
    return node.target in (SET_GRAD_ENABLED, ENTER_AUTOCAST, EXIT_AUTOCAST)


def call_lines(name: str, function: str, args: Any, kwargs: Any) -> Iterator[str]:
    """``name = function(args)``, an argument a line where it is long."""
    named = [f"{name_text(key)}={value_text(value)}" for key, value in kwargs.items()]
    given = [*map(value_text, args), *named]
    yield from folded(f"{name_text(name)} = {function}(", given, ")")


def folded(head: str, given: list[str], tail: str) -> Iterator[str]:
    """``head``, the arguments and ``tail`` on one line, or on a line each where that is long."""
    line = f"{head}{', '.join(given)}{tail}"
    if len(line) <= _WIDTH:
        yield line
        return
    yield head
    yield from (f"{_INDENT}{text}," for text in given)
    yield tail


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[str]]:
    """Which values each node is the last to read: they are let go after it, as PyTorch would."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[str]] = {}
    for node in reversed(graph.nodes):
        for read in [*node.all_input_nodes, node]:
            if read in seen or read.op == "get_attr" or _is_boundary(read):
                continue
            seen.add(read)
            if read is not node:
                found.setdefault(node, []).append(read.name)
    return found
