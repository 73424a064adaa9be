"""Symbolic sizes as graph nodes.

   x.view(batch, seq, 8, 64)   with   batch = input_ids.shape[0]
->
   size = input_ids.size(0);  size_1 = input_ids.size(1);  view = x.view(size, size_1, 8, 64)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis


class SizeArithmetic(PythonReferenceAnalysis):
    """How sizes are computed: with numbers, PyTorch's symbolic ones, or nodes in a graph."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    @staticmethod
    def trunc_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _call(math.trunc, x)

    @staticmethod
    def floor_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _call(math.floor, x)

    @staticmethod
    def ceil_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _call(math.ceil, x)

    @staticmethod
    def round_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _call(round, x)

    @staticmethod
    def round_decimal(x: Any, digits: int) -> Any:
        return _call(round, x, digits)


def _call(function: Any, x: Any, *more: Any) -> Any:
    """What Python's own rounding gives; it takes no proxies."""
    if isinstance(x, fx.Proxy):
        return x.tracer.create_proxy("call_function", function, (x, *more), {})
    return function(x, *more)


class SizeNodes:
    """Makes, once each, the nodes that compute the sizes a graph needs."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._nodes: dict[sympy.Expr, Any] = {}
        self._later: dict[sympy.Expr, Callable[[], fx.Node]] = {}

    def is_new(self, size: torch.SymInt) -> bool:
        """Whether the size is a symbol that no node of the graph computes yet."""
        return size.node.expr.is_symbol and size.node.expr not in self._nodes

    def define(self, size: Any, node: fx.Node) -> None:
        """Say that ``node`` computes this size, unless another node is known to."""
        expr = size.node.expr
        if expr.is_symbol:
            self._nodes.setdefault(expr, node)

    def define_later(self, size: Any, make: Callable[[], fx.Node]) -> None:
        """Let ``make`` give the node that computes this size, when one is needed."""
        self._later[size.node.expr] = make

    def define_by_shape(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Let sizes that appear here first (rows found by nonzero, say) be read off ``node``'s
        result."""
        sizes: Any = tensor.shape  # ints and SymInts, which mypy takes for ints all
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and self.is_new(size):
                self._nodes[size.node.expr] = self.graph.call_method("size", (node, dim))

    def lower(self, size: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
        """The node that computes ``size``, or its value where it is a number."""
        expr = size.node.expr
        if expr in (sympy.true, sympy.false):
            return bool(expr)
        if expr.is_number:
            return int(expr) if isinstance(size, torch.SymInt) else float(expr)
        if expr not in self._nodes:
            self._nodes[expr] = self._compute(expr)
        return self._nodes[expr]

    def _compute(self, expr: sympy.Expr) -> Any:
        for symbol in expr.free_symbols & self._later.keys() - self._nodes.keys():
            self._nodes[symbol] = self._later[symbol]()
        if expr in self._nodes:
            return self._nodes[expr]
        unbound = [s for s in expr.free_symbols if s not in self._nodes]
        if unbound:
            raise NotImplementedError(f"no node of the graph has the size {unbound[0]}")
        tracer = GraphAppendingTracer(self.graph)
        known = {
            s: fx.Proxy(n, tracer) if isinstance(n, fx.Node) else n
            for s in expr.free_symbols
            if (n := self._nodes[s]) is not None
        }
        result = sympy_interp(SizeArithmetic, known, expr)
        return result.node if isinstance(result, fx.Proxy) else result
