"""The tensors that stand in for real ones during a trace: metadata and symbolic sizes, no data.

    input_ids of any (batch, seq)  ->  FakeTensor int64[batch, seq]
    self.weight                    ->  FakeTensor float32[64]

PyTorch's FakeTensor is a real Tensor subclass, so ``isinstance``, shape unpacking, factory
functions and in-place operations in a model's code work as they are. Making one through PyTorch's
dispatcher takes hundreds of microseconds; here a new one of known metadata is made from a template
in a few.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
)

from liger_fx.tracing.trace import TensorSpec

# Sizes of one value may come out tied by an operation's fake kernel: examples are all different.
_SIZE_HINTS = (3, 11, 13, 17, 19, 23, 29, 31, 37, 41)
_MORE_HINTS = 1009


def as_expr(size: int | torch.SymInt) -> int | sympy.Expr:
    """A size as an int, or as the expression of input sizes behind a SymInt."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    return int(expr) if expr.is_number else expr


@contextmanager
def sizes_forgotten() -> Iterator[None]:
    """Empties PyTorch's caches of what was asked of sizes after a trace: they keep those of the
    last traces, and all that they lead to, a third of a megabyte each."""
    try:
        yield
    finally:
        for method in vars(ShapeEnv).values():
            if (clear := getattr(method, "cache_clear", None)) is not None:
                clear()


class Question(NamedTuple):
    """What was asked of sizes, a comparison or a number, and the answer for the examples."""

    expr: Any
    answer: Any

    @property
    def fact(self) -> Any:
        """The answer as a comparison that holds."""
        if self.answer == sympy.true:
            return self.expr
        if self.answer == sympy.false:
            return sympy.Not(self.expr)
        return sympy.Eq(self.expr, self.answer)


class Metadata:
    """Everything about a tensor but its data; fakes of equal metadata share one of these."""

    __slots__ = ("template", "spec", "device")

    def __init__(self, template: torch.Tensor, spec: TensorSpec) -> None:
        self.template, self.spec, self.device = template, spec, spec.device


class Sizes(ShapeEnv):
    """The symbolic sizes of one trace, with a list of all that is asked of them.

    (PyTorch's own list of guards lacks what follows from an earlier one, which a trace may have
    dropped.)
    unanswered: told of each question that only the data could answer, before the error is raised.
    """

    unanswered: Callable[[Exception], None] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[Question] = []

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        answer = super().evaluate_expr(orig_expr, *args, **kwargs)
        if orig_expr.free_symbols and not ShapeEnv._suppress_guards_tls():
            self.asked.append(Question(orig_expr, answer))
        return answer

    def evaluate_sym_node(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluate_sym_node(*args, **kwargs)
        except GuardOnDataDependentSymNode as error:
            if self.unanswered is not None:
                self.unanswered(error)
            raise


class FakeWorld:
    """The fakes and symbolic sizes of one trace.

    exact: take every size that is told as it is, also where another example would do.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        # Without duck shaping two inputs that happen to be of one size stay apart, and without the
        # specialisation of 0 and 1 the graph holds for a batch of one too.
        self.shape_env = Sizes(
            duck_shape=False,
            specialize_zero_one=False,
            allow_scalar_outputs=True,
            allow_dynamic_output_shape_ops=True,
        )
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        # PyTorch's cache of what fake kernels answered is the process's, and would keep the sizes
        # of every trace for good; what recurs in one, ``Memo`` knows.
        self.mode.cache_enabled = False
        self.symbols: dict[str, torch.SymInt] = {}
        self._fresh: list[Any] = []
        self._of_results: list[Any] = []
        self._hints: set[int] = set()
        self._metadata: dict[Hashable, Metadata] = {}
        self._of_real: dict[int, tuple[torch.Tensor, FakeTensor]] = {}

    def size(self, name: str, hint: int | None = None) -> torch.SymInt:
        """The symbolic size of that name, made on first use."""
        if name not in self.symbols:
            value = hint if hint is not None else self._another_hint(_SIZE_HINTS)
            self._hints.add(value)
            source = ConstantSource(name)
            symbol = self.shape_env.create_symbol(
                value, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            made = self.shape_env.create_symintnode(symbol, hint=value, source=source)
            assert isinstance(made, torch.SymInt)
            self.symbols[name] = made
        return self.symbols[name]

    def fresh_size(self, hint: int, *, exact: bool = False) -> Any:
        """A symbolic size without a name: a node of the graph gives it when it runs. ``exact``: no
        other example will do, as for the result of a module that was run."""
        hint = hint if exact or self.exact else self._another_hint()
        self._hints.add(hint)
        source = ConstantSource(f"fresh_{len(self._fresh)}")
        symbol = self.shape_env.create_symbol(
            hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        made = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        self._fresh.append(made)
        if exact:
            self._of_results.append(made)
        return made

    @property
    def told(self) -> set[Any]:
        """The sizes that a call has, and those that results of modules have."""
        return {node._expr for node in self._told}

    @property
    def _told(self) -> list[Any]:
        return [size.node for size in (*self.symbols.values(), *self._of_results)]

    @property
    def results_are_free(self) -> bool:
        """Whether no size of a module's result was taken for the number that its example is. (What
        asked was an operator, whose own questions are forgotten.)"""
        return not any(size.node.expr.is_number for size in self._of_results)

    def ties_hold(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Whether these sizes are one where the trace came to take them for one."""
        tied = [node for node in self._told if node.expr != node._expr]
        return all(node.expr.xreplace(sizes) == sizes[node._expr] for node in tied)

    def fresh_number(self, hint: int) -> Any:
        """The same for a number of which nothing is known, not that it is positive either."""
        hint = hint if self.exact else self._another_hint()
        self._hints.add(hint)
        source = ConstantSource(f"fresh_{len(self._fresh)}")
        symbol = self.shape_env.create_unspecified_symbol(
            hint, source=source, dynamic_dim=DimDynamic.DYNAMIC
        )
        made = self.shape_env.create_symintnode(symbol, hint=hint, source=source)
        self._fresh.append(made)
        return made

    def _another_hint(self, hints: tuple[int, ...] = ()) -> int:
        numbers = itertools.chain(hints, itertools.count(_MORE_HINTS, 4))
        return next(number for number in numbers if number not in self._hints)

    def renewed(self, value: Any) -> Any:
        """A tensor's twin with an identity of its own; anything else as it is."""
        return self.new(self.metadata(value)) if isinstance(value, torch.Tensor) else value

    def copied(self, example: Any) -> Any:
        """A copy of an object with fakes for its tensors; their first sizes are the batch's where
        they are as large."""
        batch = self.symbols.get("batch")

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            sizes: list[Any] = list(tensor.shape)
            if batch is not None and sizes and sizes[0] == self.hint(batch):
                sizes[0] = batch
            return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)

        with unset_fake_temporarily():
            tensors = list(tensors_in(example))
        memo: dict[int, Any] = {id(tensor): fake(tensor) for tensor in tensors}
        return copy.deepcopy(example, memo)

    def metadata(self, tensor: torch.Tensor) -> Metadata:
        """The interned metadata of a fake or real tensor."""
        if isinstance(tensor, FakeTensor):
            known = tensor.__dict__.get("_liger_fx_metadata")
            if known is not None:
                return known
        sizes = tuple(map(as_expr, tensor.shape))
        strides = tuple(map(as_expr, tensor.stride())) if tensor.layout is torch.strided else ()
        key = (sizes, strides, tensor.dtype, tensor.device)
        if key not in self._metadata:
            # Neither the fake mode nor the recorder may see this call.
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                template = torch.empty_strided(
                    tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta"
                )
            self._metadata[key] = Metadata(template, TensorSpec(sizes, tensor.dtype, tensor.device))
        return self._metadata[key]

    def empty(
        self, sizes: tuple[Any, ...], strides: tuple[Any, ...], dtype: torch.dtype, device: Any
    ) -> torch.Tensor:
        """A new fake of these sizes and strides."""
        key = (tuple(map(as_expr, sizes)), tuple(map(as_expr, strides)), dtype, device)
        known = self._metadata.get(key)
        if known is not None:
            return self.new(known)
        return self.adopt(torch.empty_strided(sizes, strides, dtype=dtype, device=device))

    def new(self, metadata: Metadata) -> FakeTensor:
        """A new fake of this metadata, with an identity of its own."""
        fake = FakeTensor(self.mode, metadata.template, metadata.device)
        fake.__dict__["_liger_fx_metadata"] = metadata
        return fake

    def of_real(self, tensor: torch.Tensor) -> FakeTensor:
        """The one fake that stands for a real tensor (a parameter, a buffer, a constant)."""
        found = self._of_real.get(id(tensor))
        if found is None:
            # The real tensor is kept as well: its id must not be reused while the trace lasts.
            found = self._of_real[id(tensor)] = (tensor, self.new(self.metadata(tensor)))
        return found[1]

    def place(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Let a tensor on the meta device be one on the device that it is moved to for its use."""
        elsewhere = torch.empty_strided(
            tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device
        )
        self._of_real[id(tensor)] = (tensor, self.new(self.metadata(elsewhere)))

    def adopt(self, tensor: torch.Tensor) -> FakeTensor:
        """A fake for any tensor that an operation gave back."""
        if isinstance(tensor, FakeTensor):
            tensor.__dict__.setdefault("_liger_fx_metadata", self.metadata(tensor))
            return tensor
        return self.of_real(tensor)

    def settle(self, graph: fx.Graph) -> None:
        """Write sizes that the code fixed or tied late into the nodes made before that, too."""
        sizes = [size.node for size in self.symbols.values()]
        known = {size._expr: size.expr for size in sizes if size.expr != size._expr}
        if not known:
            return
        for node in graph.nodes:
            spec = node.meta.get("spec")
            if spec is not None:
                shape = tuple(settled(size, known) for size in spec.shape)
                node.meta["spec"] = spec._replace(shape=shape)

    @property
    def examples(self) -> dict[sympy.Symbol, int]:
        """The trace's example of each size."""
        sizes = [*self.symbols.values(), *self._fresh]
        return {size.node._expr: self.hint(size) for size in sizes}

    def hint(self, size: int | torch.SymInt) -> int:
        """A concrete number for a size: the trace's example of it."""
        return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def settled(size: int | sympy.Expr, known: Mapping[Any, Any]) -> int | sympy.Expr:
    """A size as ``as_expr`` has it, with what is known put in."""
    expr = sympy.sympify(sympy.sympify(size).xreplace(known))  # a symbol alone became any number
    return int(expr) if expr.is_number else expr


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that an object holds, in its attributes and containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(vars(value))


def set_node(value: Any, node: Any) -> None:
    """Remember the graph node whose result ``value`` (a fake tensor or a cache) is."""
    value.__dict__["_liger_fx_node"] = node


def node_of(value: Any) -> Any:
    """The graph node whose result ``value`` is, or None."""
    return value.__dict__.get("_liger_fx_node") if hasattr(value, "__dict__") else None
