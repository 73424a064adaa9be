"""The graph's function as calls run it: modules found and called in fewer steps of Python.

    q = self.self_attn.q_proj(x)
 ->
    q = call(self._modules['self_attn']._modules['q_proj'], x)
    index = self._modules['self_attn'].layer_idx

``self.mlp`` asks a Python function of PyTorch for each step of a path, and a call of a module goes
through two more; a layer of twelve modules spends a tenth of a small step there.
"""

from __future__ import annotations

import itertools
import linecache
import weakref
from collections.abc import Callable
from typing import Any

from torch import fx

from liger_fx.modules.calling import call, call_with


def compile_direct(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a Python function of the block and the inputs in order; KeyError where a module
    is gone. Not under a profiler. Tracebacks show its lines as long as it is there."""
    code = graph.python_code(root_module="self")
    instead: dict[str, tuple[str, str]] = {}
    for node in graph.find_nodes(op="call_module"):
        path = str(node.target)
        shown = fx.graph._format_target("self", path)
        steps = "".join(f"._modules[{step!r}]" for step in path.split("."))
        # A block is a module for hooks, checkpointing, FSDP2: it is called as such.
        way = "call" if len(node.args) == 1 and not node.kwargs else "call_with"
        comma = ", " if node.args or node.kwargs else ""
        new = f"self{steps}(" if "plan" in node.meta else f"{way}(self{steps}{comma}"
        instead[node.name] = f" = {shown}(", f" = {new}"
    for node in graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        steps = "".join(f"._modules[{step!r}]" for step in path.split(".") if step)
        shown = fx.graph._format_target("self", str(node.target))
        instead[node.name] = f" = {shown}", " = " + fx.graph._format_target(f"self{steps}", name)
    lines = code.src.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if found := instead.get(line.partition(" = ")[0].strip()):
            lines[i] = line.replace(*found, 1)
    source = "".join(lines)
    name = f"<graph {next(_numbers)} of liger_fx>"
    scope = {**code.globals, "call": call, "call_with": call_with}
    exec(compile(source, name, "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    linecache.cache[name] = len(source), None, lines, name
    weakref.finalize(function, linecache.cache.pop, name, None)
    return function


_numbers = itertools.count()
