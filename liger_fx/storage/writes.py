"""A saved graph computes: it does not change the tensors of the model that it is bound to.

weight = get_attr lm_head.weight; data = weight.data; data.fill_(0.5)     ->  LoadError
scores = softmax(x); scores.div_(total)                                   ->  fine

Models write in place into what they have just computed. Whether a value may be (a view of) a tensor
of the model follows from the calls that made it: PyTorch's schema of an operator says whether its
result is memory of its own. What has no schema is taken to give back what it was given.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

import liger_fx.modules
from liger_fx.errors import LoadError
from liger_fx.storage.targets import OPERATORS, name_of
from liger_fx.tracing import leaves
from liger_fx.tracing.effects import is_in_place_name

# Modules whose result is new memory. Others may return what they were given, or what they hold.
_NEW_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d,
    nn.Conv3d, nn.SiLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.Softplus,
    *(getattr(liger_fx.modules, name) for name in liger_fx.modules.__all__),
)  # fmt: skip
# Made of other operators, so that the schema promises nothing, but always of their own memory.
_NEW_COMPOSITES = """
matmul linear softmax log_softmax layer_norm group_norm rms_norm conv1d conv2d conv3d where max min
square std var clip negative subtract multiply divide true_divide cross outer inner tile one_hot
repeat_interleave index_put scaled_dot_product_attention silu softplus tensor new_tensor
"""
# Operators that may give back what they were given. (Of two lists, + and * make lists of the same.)
_GIVING_BACK = (operator.getitem, operator.pos, operator.add, operator.mul, operator.or_)
# Options by which a function writes, and into which arguments; else into its first.
_OPTIONS = {
    "inplace": (),
    "max_norm": ("weight",),
    "training": ("running_mean", "running_var"),
    "use_input_stats": ("running_mean", "running_var"),
}


def check_writes(
    graph: fx.Graph, tensors: Collection[str], modules: Mapping[str, nn.Module]
) -> None:
    """LoadError for a node that writes into one of the model's ``tensors``, or may do so."""
    holding: dict[fx.Node, str] = {}
    for node in graph.nodes:
        for written in _written(node, modules):
            if written in holding:
                raise LoadError(f"writes into {holding[written]}, a tensor of the model", node.name)
        if node.op == "get_attr":
            if node.target in tensors:
                holding[node] = str(node.target)
        elif not _is_new(node, modules):
            held = [holding[read] for read in node.all_input_nodes if read in holding]
            if not held and node.op == "call_module" and _has_tensors(modules[str(node.target)]):
                held = [str(node.target)]
            if held:
                holding[node] = held[0]


def _is_new(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _NEW_MODULES)
    return makes_new(node.op, node.target) and "out" not in node.kwargs


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


@functools.cache
def makes_new(op: str, target: Any) -> bool:
    """Whether the result of a function or method is always memory of its own."""
    if op not in ("call_function", "call_method") or is_in_place(op, target):
        return False
    if target in OPERATORS:
        return target not in _GIVING_BACK
    name = _operator_name(target)
    if name in _NEW_COMPOSITES.split() or target is leaves.attention:
        return True
    found = list(_schemas(name))
    return bool(found) and all(map(_returns_new, found))


@functools.cache
def is_in_place(op: str, target: Any) -> bool:
    """Whether a function or method writes into its first argument."""
    if target in OPERATORS:
        name = str(target.__name__)
        plain = name.removeprefix("i")
        augmented = plain != name and any(hasattr(operator, n) for n in (plain, f"{plain}_"))
        return augmented or target is operator.setitem
    return op in ("call_function", "call_method") and is_in_place_name(_operator_name(target))


def _operator_name(target: Any) -> str:
    """The name of PyTorch's operator that a function or method of the table is, if it is one."""
    home, _, name = (target if isinstance(target, str) else name_of(target) or "").rpartition(".")
    prefix = {"torch.linalg": "linalg_", "torch.fft": "fft_"}
    return prefix.get(home, "") + name


def _schemas(name: str) -> Iterator[torch.FunctionSchema]:
    """Those of the operator's overloads that make their results themselves."""
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        kinds = {str(r.type) for r in schema.returns}
        if kinds & {"Tensor", "List[Tensor]"} and not any(a.is_out for a in schema.arguments):
            yield schema


def _returns_new(schema: torch.FunctionSchema) -> bool:
    if any(value.alias_info is not None for value in schema.returns):
        return False
    name = f"{schema.name}.{schema.overload_name}".rstrip(".")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return torch._C._dispatch_has_kernel(name) and not has_kernel(name, "CompositeImplicitAutograd")


def _written(node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterable[fx.Node]:
    """The nodes whose values a node may write into."""
    values: list[Any] = [node.kwargs.get("out")]
    if node.op == "call_module" and getattr(modules[str(node.target)], "inplace", False):
        values += [node.args, node.kwargs]
    elif is_in_place(node.op, node.target):
        values += [node.args[:1], node.kwargs]
    elif node.op == "call_function":
        values += _written_by_option(node)
    found: list[fx.Node] = []
    fx.map_arg(tuple(values), found.append)
    return found


def _written_by_option(node: fx.Node) -> Iterator[Any]:
    signature = _signature(node.target)
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:  # it will fail before it writes
        return
    bound.apply_defaults()
    given = bound.arguments
    for option, names in _OPTIONS.items():
        if given.get(option) not in (None, False):
            yield from (given.get(name) for name in names or list(given)[:1])


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    """Of a function that has one of the options; of others, one that takes no arguments.

    A builtin has no signature for Python, its operator has.
    """
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        schemas = list(_schemas(_operator_name(function)))
        found = _signature_of(schemas[0]) if schemas else inspect.Signature()
    return found if _OPTIONS.keys() & found.parameters.keys() else inspect.Signature()


def _signature_of(schema: torch.FunctionSchema) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(a.name, kind) for a in schema.arguments])
