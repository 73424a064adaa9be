"""Where the values of nodes lie in memory: what is a view, of which tensor, and how large it is.

cos.unsqueeze(1)              ->  a view of cos
float32[batch, sequence, 64]  ->  256 bytes a token
"""

from __future__ import annotations

import math

import sympy
from torch import fx, nn

from liger_fx.engine.drawing import Bytes
from liger_fx.tracing.trace import TensorSpec

CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_BROADCASTS = {"expand", "expand_as", "broadcast_to"}
_VIEWS = {
    "adjoint", "alias", "apply_function", "as_strided", "chunk", "contiguous", "detach", "diagonal",
    "flatten", "getattr", "getitem", "hsplit", "identity", "imag", "moveaxis", "movedim", "narrow",
    "permute",
    "ravel", "real", "reshape", "select", "size", "split", "squeeze", "swapaxes", "swapdims", "t",
    "tensor_split", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
    "view_as_complex", "view_as_real", "vsplit", *_BROADCASTS,
}  # fmt: skip


class Memory:
    """Answers for the nodes of one graph whose call_module targets are paths below ``root``."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._sizes: dict[TensorSpec, Bytes] = {}
        self._modules: dict[fx.Node, nn.Module] = {}

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a call_module node calls, also when another has taken its place."""
        if node not in self._modules:
            self._modules[node] = self.root.get_submodule(str(node.target))
        return self._modules[node]

    def operator(self, node: fx.Node) -> str:
        """What a node does: mul, to, linear; a module's type in small letters for a call of one."""
        if node.op == "call_module":
            return type(self.module(node)).__name__.lower()
        if isinstance(node.target, str):
            return node.target
        return str(getattr(node.target, "__name__", node.target)).removesuffix(".default")

    def is_view(self, node: fx.Node) -> bool:
        """Whether the node moves no data: a view, a cast to the same type, an idle dropout."""
        if node.op in ("placeholder", "get_attr"):
            return False
        name = self.operator(node)
        if name == "getitem" and self._is_result(node):
            return False
        if node.op == "call_module" and "dropout" in name:
            return not self.module(node).training
        if name in CASTS and node.all_input_nodes:
            source, target = (n.meta.get("spec") for n in (node.all_input_nodes[0], node))
            return source is not None and target is not None and source.dtype == target.dtype
        return name in _VIEWS

    @staticmethod
    def _is_result(item: fx.Node) -> bool:
        """Whether it is one of the tensors that a module returns, and no part of a tensor."""
        source = item.all_input_nodes[0]
        return source.op == "call_module" and "spec" not in source.meta

    def storage(self, node: fx.Node) -> fx.Node:
        """The node whose memory this one's value lies in."""
        while self.is_view(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def size(self, node: fx.Node) -> Bytes:
        """The bytes of a node's tensor; none for what is no tensor. What is broadcast lies there
        once."""
        while node.op == "call_method" and node.target in _BROADCASTS:
            node = node.all_input_nodes[0]
        spec = node.meta.get("spec")
        if spec is None:
            return Bytes(0, 0)
        if spec not in self._sizes:
            self._sizes[spec] = size_of(spec)
        return self._sizes[spec]

    def parameters(self, node: fx.Node) -> Bytes:
        """The bytes of the parameters of the module that a node calls."""
        return Bytes(0, sum(p.numel() * p.element_size() for p in self.module(node).parameters()))


def size_of(spec: TensorSpec) -> Bytes:
    """The bytes of a tensor; each size that varies from call to call counts as one."""
    fixed = math.prod(size for size in spec.shape if isinstance(size, int)) * spec.dtype.itemsize
    varying = [_at_one(size) for size in spec.shape if not isinstance(size, int)]
    return Bytes(fixed * math.prod(varying), 0) if varying else Bytes(0, fixed)


def _at_one(size: sympy.Expr) -> int:
    value = size.xreplace({symbol: sympy.Integer(1) for symbol in size.free_symbols})
    return max(int(value), 1) if value.is_number else 1
