"""What the torch-level calls are that a recorder sees: questions, operators, in-place writes."""

from __future__ import annotations

import builtins
import functools
import operator
import os
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from liger_fx.tracing.effects import is_in_place_name
from liger_fx.tracing.trace import Source

# Questions about a tensor's metadata: answered, never recorded.
_METADATA_GETTERS = {
    "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_sparse",
    "grad_fn", "grad", "is_leaf", "is_quantized", "is_nested", "names", "is_mps", "is_xpu",
    "is_meta", "_version", "is_cpu", "itemsize", "nbytes", "is_mkldnn",
}  # fmt: skip
_METADATA_FUNCTIONS = {
    "size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "stride",
    "is_contiguous", "__len__", "ndimension", "get_device", "element_size", "__hash__",
    "__format__", "__repr__", "is_tensor", "is_autocast_enabled", "get_default_dtype",
    "is_signed", "storage_offset", "is_inference", "is_same_size", "_is_zerotensor", "is_conj",
    "is_neg", "result_type", "has_names",
}  # fmt: skip
_REFLECTED = {
    "__radd__": operator.add, "__rsub__": operator.sub, "__rmul__": operator.mul,
    "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv,
    "__rfloordiv__": operator.floordiv, "__rpow__": operator.pow, "__rmod__": operator.mod,
    "__rmatmul__": operator.matmul, "__rand__": operator.and_, "__ror__": operator.or_,
    "__rxor__": operator.xor,
}  # fmt: skip
# What may come out of a call without its being recorded.
PLAIN_ANSWERS = (
    type(None), bool, int, float, complex, str, bytes, type, type(NotImplemented), torch.Size,
    torch.dtype, torch.device,
    torch.layout, torch.memory_format, torch.finfo, torch.iinfo,
)  # fmt: skip
_NO_OPERATOR = {"__get__", "__set__", "__contains__", "__len__", "__iter__"}


def asks_about_metadata(func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether the call only asks for sizes, dtypes and the like, which a trace answers itself."""
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _METADATA_GETTERS
    return name in _METADATA_FUNCTIONS or (name == "type" and len(args) < 2 and not kwargs)


_GRADIENTS = {"requires_grad", "grad_fn", "is_leaf", "grad", "is_inference"}
_FACTS = {
    **dict.fromkeys(
        ("stride", "is_contiguous", "storage_offset", "layout", "is_sparse", "is_mkldnn"), "layout"
    ),
    **dict.fromkeys(("dim", "ndimension", "ndim"), "rank"),
    **dict.fromkeys(_GRADIENTS, "gradients"),
    **dict.fromkeys(("shape", "size", "numel", "nelement", "__len__", "nbytes"), "shape"),
    **dict.fromkeys(("dtype", "is_floating_point", "is_complex", "itemsize"), "dtype"),
    "_version": "version",
}


def question_of(func: Any, name: str) -> tuple[str, str | None]:
    """The name of what is asked of a tensor, and the kind of fact that the answer depends on:
    "layout", "rank", "gradients", "shape", "dtype", "version" or none of these."""
    asked = func.__self__.__name__ if name == "__get__" else name
    return asked, _FACTS.get(asked)


def is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether the call writes into one of its arguments."""
    return (
        is_in_place_name(name)
        or name in ("__setitem__", "__set__")
        or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
        or kwargs.get("out") is not None
        or kwargs.get("inplace") is True
    )


def as_node_target(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """How a graph spells the call: (op, target, args, kwargs); ``args`` hold nodes for tensors.

    Dunder methods become functions of ``operator`` (reflected ones with their arguments turned
    round), property reads getattr and writes setattr, methods of a tensor call_method.
    """
    if name == "__get__":
        return "call_function", builtins.getattr, (args[0], func.__self__.__name__), {}
    if name == "__set__":
        return "call_function", builtins.setattr, (args[0], func.__self__.__name__, args[1]), {}
    if name in _REFLECTED and len(args) == 2:
        return "call_function", _REFLECTED[name], args[::-1], {}
    if name.startswith("__") and name not in _NO_OPERATOR and hasattr(operator, name):
        return "call_function", getattr(operator, name), args, {}
    if args and isinstance(args[0], fx.Node) and _is_tensor_method(func, name):
        return "call_method", name, args, kwargs
    return "call_function", func, args, kwargs


@functools.lru_cache(maxsize=4096)
def _is_tensor_method(func: Any, name: str) -> bool:
    own = getattr(torch.Tensor, name, None)
    if own is None:
        return False
    qualified = getattr(func, "__qualname__", "")
    return own is func or qualified.startswith(("Tensor.", "TensorBase.", "_TensorBase."))


def modes() -> tuple[Any, ...]:
    """The thread's modes that change what an operation returns."""
    return (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
    )


def holds_values(result: Any) -> bool:
    """Whether there is a tensor or a symbolic number in it: something later calls can depend on."""
    kinds = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return any(isinstance(leaf, kinds) for leaf in pytree.tree_leaves(result))


def tensor_ids(tree: Any) -> set[int]:
    """Identities of all tensors in a tree of arguments."""
    return {id(leaf) for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def source_line(frame: FrameType | None) -> Source | None:
    """File and line of the innermost frame that is neither PyTorch's nor the tracer's."""
    while frame is not None:
        if is_model_code(frame.f_code):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def asker(frame: FrameType) -> CodeType:
    """The code that asked a tensor something, before methods of torch.Tensor that pass it on."""
    while frame.f_code.co_filename.endswith(_TENSORS_OWN) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code


@functools.lru_cache(maxsize=16384)
def is_model_code(code: CodeType) -> bool:
    """Whether a frame of this code stands for a line of the model, not of what carries it out."""
    path = code.co_filename
    return not (path.startswith(_MACHINERY) or path.endswith(_PLUMBING))


# Of what has no file, a model may be typed in; graphs and their guards are not.
_MACHINERY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep,
              "<eval_with_key>", "<graph ", "<guards>", "<frozen ")  # fmt: skip
_PLUMBING = ("contextlib.py", "functools.py")
_TENSORS_OWN = (os.path.join("torch", "_tensor.py"), os.path.join("torch", "overrides.py"))
