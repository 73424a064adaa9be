"""Writes a graph node for every torch-level call that the model's code makes.

    hidden.pow(2).mean(-1, keepdim=True)
 ->
    pow_1 = hidden.pow(2);  mean = pow_1.mean(-1, keepdim=True)

A TorchFunctionMode sees the calls as the model wrote them, above autograd and autocast, so that
the graph replays under whichever of these the caller uses.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from liger_fx.tracing.asked import AskedFacts, CannotRecord, of_thread
from liger_fx.tracing.catching import catches_errors
from liger_fx.tracing.effects import is_effectful
from liger_fx.tracing.fakes import FakeWorld, Question, node_of, set_node
from liger_fx.tracing.memo import Memo, run_without_grad
from liger_fx.tracing.numbers import TracedNumber
from liger_fx.tracing.sizes import SizeNodes
from liger_fx.tracing.structure import follows_sizes, gives_argument_back
from liger_fx.tracing.torch_calls import (
    PLAIN_ANSWERS,
    as_node_target,
    asker,
    asks_about_metadata,
    holds_values,
    is_in_place,
    is_model_code,
    modes,
    question_of,
    source_line,
    tensor_ids,
)

DATA_DEPENDENT = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
)


def recorder_of_thread() -> Recorder | None:
    """What records the calls of this thread at the moment, if anything does."""
    recorder: Recorder | None = getattr(of_thread, "recorder", None)
    return recorder if recorder is not None and recorder.recording else None


class Recorder(TorchFunctionMode):
    """The mode that records; ``recording`` is off while a leaf's insides run."""

    def __init__(self, graph: fx.Graph, world: FakeWorld, owner: Recording) -> None:
        super().__init__()
        self.graph, self.world, self.owner = graph, world, owner
        self.sizes = SizeNodes(graph)
        self.memo = Memo(world)
        self.recording = False
        self.facts = AskedFacts(owner)
        # What was asked of sizes that decides what results are made of.
        self.decisive: list[Question] = []
        # What the code made texts of (size_methods.py).
        self.texts: list[Any] = []
        self._outer: Recorder | None = None
        self._outermost: FrameType | None = None
        world.shape_env.unanswered = self._unanswered

    def __enter__(self) -> Recorder:
        self._outer, of_thread.recorder = getattr(of_thread, "recorder", None), self
        self._outermost = sys._getframe(1)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        of_thread.recorder, self._outermost = self._outer, None
        super().__exit__(*exception)

    def _unanswered(self, error: Exception) -> None:
        if self.recording:
            self.owner.failed(error)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self.recording:
            with self.questions_dropped():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if asks_about_metadata(func, name, args, kwargs):
            answer = func(*args, **kwargs)
            # PyTorch's own code asks as well: to print a tensor, say.
            is_own = is_model_code(asker(sys._getframe(1)))
            if is_own and args and isinstance(args[0], torch.Tensor):
                self.facts.note(args[0], *question_of(func, name), answer)
            return answer
        if func is torch._C._set_grad_enabled:
            return self._set_grad_enabled(func, *args)
        if func is torch.Tensor.__iter__:
            return iter(self.__torch_function__(torch.Tensor.unbind, types, (args[0], 0)))
        try:
            with self.paused() as kept:
                return self._record(func, name, args, kwargs, kept)
        except BaseException as error:
            self.owner.failed(error)
            raise

    @contextmanager
    def paused(self) -> Iterator[list[Question]]:
        """What runs inside is not recorded; what it asks of sizes is no question of the model's,
        but for what is put into the list that is given."""
        with self.unrecorded(), self.questions_dropped() as kept:
            yield kept

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """What runs inside is not recorded; what it asks of sizes is guarded as ever."""
        was, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = was

    def settle_texts(self) -> None:
        """The texts of sizes that are no messages: what becomes of them holds for these sizes."""
        texts, self.texts = self.texts, []
        for text in texts:
            text.settle()

    @property
    def questions(self) -> list[Question]:
        """What the model's own code asked of sizes so far."""
        return self.world.shape_env.asked

    @contextmanager
    def questions_dropped(self) -> Iterator[list[Question]]:
        """Forget what is asked of sizes inside, in an operation's fake kernel, but for what is put
        into the list that is given.

        It asks which of several equal ways to take (is a dimension broadcast?), and would turn
        away calls that the graph serves correctly.
        """
        before, kept = len(self.questions), list[Question]()
        try:
            yield kept
        finally:
            self.questions[before:] = kept

    def _set_grad_enabled(self, func: Any, enabled: bool) -> None:
        self.facts.grad_mode_asked = True
        if enabled != torch.is_grad_enabled():
            self.create_node("call_function", func, (enabled,))
        func(enabled)

    def _record(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kept: list[Question],
    ) -> Any:
        """A node for the call; what was asked of sizes that decides what the result is made of is
        ``kept``."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise CannotRecord(f"{name} inside a transform of torch.func")
        args, kwargs = self.with_fakes(args), self.with_fakes(kwargs)
        in_place = is_in_place(name, kwargs)
        run, before = functools.partial(func, *args, **kwargs), len(self.questions)
        if in_place:
            given, named = pytree.tree_map(self.world.renewed, (args, kwargs))
            result = self._run_in_place(run, args)
        else:
            given, named = args, kwargs
            result = self.memo.infer((func, *modes()), run, args, kwargs)
        if not kwargs.get("dtype") and not tensor_ids((args, kwargs)):
            self.facts.ask_mode("get_default_dtype")
        asked = self.questions[before:]
        if asked and follows_sizes(self.world, asked, func, given, named, result):
            kept += asked
            self.decisive += asked
        if result is not None and not holds_values(result):
            return _answer(name, result)
        if self.facts.compares and gives_argument_back(self.world, func, args, kwargs):
            self.facts.note_twins(f"{name} gives its argument back")
        node = self._emit(func, name, args, kwargs)
        if result is None:
            if not is_effectful(node):
                raise CannotRecord(f"{name}, which returns nothing and changes what is not known")
            return None
        return self.bind(result, node, () if in_place else tensor_ids((args, kwargs)))

    def _run_in_place(self, run: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        result = run_without_grad(run)
        for leaf in pytree.tree_leaves((args, result)):  # x.t_() changes what is known of x
            if isinstance(leaf, FakeTensor):
                leaf.__dict__.pop("_liger_fx_metadata", None)
        return result

    def _emit(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        arguments: tuple[Any, ...] = tuple(map(self.argument, args))
        keywords = {key: self.argument(value) for key, value in kwargs.items()}
        return self.create_node(*as_node_target(func, name, arguments, keywords))

    def create_node(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """A node that knows the module call and the line of the model that made it. CannotRecord
        where the model's code would go on after an error of what the node does."""
        if op.startswith("call_") and catches_errors(sys._getframe(1), self._outermost):
            name = getattr(target, "__name__", target)
            raise CannotRecord(f"{name} may fail at another call, and its code catches errors")
        node = self.graph.create_node(op, target, args, kwargs or {})
        meta = node.meta
        meta["call"], meta["module"] = self.owner.current_call()
        meta["source"] = source_line(sys._getframe(1))
        return node

    def bind(self, result: Any, node: fx.Node, argument_ids: Any = ()) -> Any:
        """Make ``node`` (or getitem nodes of it) the origin of every value in ``result``."""
        if isinstance(result, torch.Tensor):
            fake = self.world.adopt(result)
            if (
                id(fake) in argument_ids
            ):  # a no-op .to() gives its input back: two nodes, so two values
                fake = self.world.new(self.world.metadata(fake))
                self.facts.note_twins(f"{node.target} gives its argument back")
            set_node(fake, node)
            node.meta["spec"] = self.world.metadata(fake).spec
            self.sizes.define_by_shape(fake, node)
            return fake
        if isinstance(result, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.sizes.define(result, node)
            return result
        if isinstance(result, dict):
            bound = {k: self.bind_item(v, node, k, argument_ids) for k, v in result.items()}
            if type(result) is dict:
                return bound
            for key, value in bound.items():
                result[key] = value
            return result
        if isinstance(result, (tuple, list)):
            items = [self.bind_item(v, node, i, argument_ids) for i, v in enumerate(result)]
            make: Any = getattr(type(result), "_make", type(result))
            return make(items)
        return result

    def bind_item(self, value: Any, node: fx.Node, key: Any, argument_ids: Any) -> Any:
        if not holds_values(value):
            return value
        return self.bind(
            value, self.create_node("call_function", operator.getitem, (node, key)), argument_ids
        )

    def with_fakes(self, tree: Any) -> Any:
        """``tree`` with real tensors (parameters, buffers, constants) replaced by their fakes."""
        kind = type(tree)
        if kind is FakeTensor:
            return tree
        if isinstance(tree, torch.Tensor):
            fake = self.world.of_real(tree)
            if node_of(fake) is None:
                node = self.owner.node_of_real(tree)
                node.meta["spec"] = self.world.metadata(fake).spec
                set_node(fake, node)
            return fake
        if kind in (tuple, list):
            return kind([self.with_fakes(item) for item in tree])
        if isinstance(tree, tuple) and hasattr(kind, "_make"):
            return kind._make([self.with_fakes(item) for item in tree])
        if kind is dict:
            return {key: self.with_fakes(value) for key, value in tree.items()}
        return tree

    def argument(self, value: Any) -> Any:
        """``value`` as a graph argument: nodes for tensors, sizes, modules and caches, constants
        as they are."""
        if isinstance(value, torch.Tensor):
            fake = self.with_fakes(value)
            node = node_of(fake)
            if node is None:
                raise CannotRecord(
                    f"a tensor of {self.world.metadata(fake).spec} that no recorded operation made"
                )
            return node
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.sizes.lower(value)
        if isinstance(value, TracedNumber):
            return node_of(value)
        if isinstance(value, (tuple, list)):
            items = [self.argument(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if type(value).__module__ == "numpy" and hasattr(value, "item"):
            return value.item()
        if value is None or value is ... or isinstance(value, fx.node.base_types):
            return value
        if isinstance(value, torch.nn.Module):
            return self.owner.node_of_module(value)
        node = node_of(value)
        if node is None:
            raise CannotRecord(f"a Python object of type {type(value).__name__}")
        return node


def _answer(name: str, result: Any) -> Any:
    """What a call gives that has no tensor in it: a fact, which stays true. An object that is
    more (the handle of a hook, a generator of random numbers) tells of something that no node
    does."""
    if all(isinstance(leaf, PLAIN_ANSWERS) for leaf in pytree.tree_leaves(result)):
        return result
    raise CannotRecord(f"{name}, which gives a {type(result).__name__}")


class Recording:
    """What a recorder asks of the tracer it records for."""

    def failed(self, error: BaseException) -> None:
        """Take note of what went wrong in a call that the model's code made."""
        raise NotImplementedError

    def current_call(self) -> tuple[int, str]:
        """The index and path of the innermost module call that is being traced through."""
        raise NotImplementedError

    def note_question(self, what: str) -> None:
        """The code of the innermost module call asked about this, which may be otherwise in
        another call."""
        raise NotImplementedError

    def path_of_real(self, tensor: torch.Tensor) -> str | None:
        """Where the model holds a parameter, buffer or plain tensor."""
        raise NotImplementedError

    def node_of_real(self, tensor: torch.Tensor) -> fx.Node:
        """The get_attr node of a parameter, buffer or constant."""
        raise NotImplementedError

    def node_of_module(self, module: torch.nn.Module) -> fx.Node:
        """The get_attr node of a module of the traced tree."""
        raise NotImplementedError

    def get_attr(self, path: str) -> fx.Node:
        """The get_attr node of what is found at this path from the root."""
        raise NotImplementedError
