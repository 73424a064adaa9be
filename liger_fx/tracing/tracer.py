"""The Hugging Face fx tracer: one flat torch.fx graph of a whole model, of any batch size and
length.

    LlamaForCausalLM.forward(input_ids, attention_mask)
 ->
    embed = model.embed_tokens(input_ids);  to = embed.to(torch.float32);  pow_1 = to.pow(2); ...

No proxy runs through the model's code: fake tensors do (fakes.py), a torch-function mode writes
down what is done to them (recorder.py), and modules of torch.nn, linear layers of any make and
what cannot be followed become call_module nodes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from liger_fx.errors import TraceError
from liger_fx.tracing import leaves
from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.call import (
    CallSpec,
    Constant,
    InputSpec,
    Items,
    Number,
    Spec,
    UnsupportedCall,
    flat_inputs,
)
from liger_fx.tracing.cleanup import erase_unread_nodes
from liger_fx.tracing.containers import ContainerWriter, GivenContainers
from liger_fx.tracing.dispatched import moves_nothing
from liger_fx.tracing.fakes import FakeWorld, node_of, set_node
from liger_fx.tracing.guards import Guards, Read, autocast_state
from liger_fx.tracing.identity import compares_objects
from liger_fx.tracing.inner_blocks import (
    InnerNames,
    NeedsInside,
    NeedsPlan,
    NoPlan,
    ResultObject,
    Results,
    changed_by_call,
    collected,
    collects_inside,
    describe_result,
    examples_of,
    is_block,
    rebuilt,
)
from liger_fx.tracing.kinds import reads_class
from liger_fx.tracing.leaf_modules import (
    infer_leaf,
    is_experts,
    is_leaf,
    is_parametrized_code,
    offloaded,
    real_copy,
    tensors_replaced,
)
from liger_fx.tracing.members import Members
from liger_fx.tracing.module_writes import ModuleWrites
from liger_fx.tracing.numbers import traced_number
from liger_fx.tracing.outside import Key, Outside, caches_bypassed
from liger_fx.tracing.patches import patched, put_aside
from liger_fx.tracing.reach import Reach, reach_of
from liger_fx.tracing.reads import attribute, names_read
from liger_fx.tracing.recorder import Recorder, Recording
from liger_fx.tracing.root_state import Snapshot, attributes_kept, autocast_cache_off
from liger_fx.tracing.size_guards import check_known, size_guards
from liger_fx.tracing.stand_ins import Origin, origin_of, stand_in
from liger_fx.tracing.state import HiddenState, Place, written
from liger_fx.tracing.streams import Streams, streams_kept
from liger_fx.tracing.torch_calls import is_model_code, source_line
from liger_fx.tracing.touched import Touched
from liger_fx.tracing.trace import ModuleCall, OpaqueLeaf, Result, Source, Trace
from liger_fx.tracing.transformers_leaves import TransformersLeaves
from liger_fx.tracing.tree_state import asks_mode, hooks_of, is_capturing


class AsksAttributes(BaseException):
    """The code asks for the value of ints that alike blocks do not share, by path."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(", ".join(paths))
        self.paths = paths


class ChangesOutside(BaseException):
    """What is called changes these places outside the model: trace again and see who reads them."""

    def __init__(self, places: frozenset[Key]) -> None:
        super().__init__("what lies outside the model")
        self.places = places


class Watch(BaseException):
    """The trace changed what lies outside the model: trace again and look after each module."""


class Untraceable(Exception):
    """The trace stopped inside the innermost module of ``stack``; the cause is the text.

    ``writes`` are attributes that the model's code changed, where that is the cause; ``inner`` is
    why a block inside has no graph, if that is it; ``outside`` is what it changed outside the
    model.
    """

    def __init__(
        self,
        stack: list[tuple[str, nn.Module]],
        source: Source | None,
        cause: str,
        writes: tuple[Place, ...] = (),
        inner: Exception | None = None,
        outside: Key | None = None,
    ) -> None:
        super().__init__(cause)
        self.stack, self.source, self.writes, self.inner = stack, source, writes, inner
        self.outside = outside


# What says by itself where and why.
_WHOLE = Untraceable, TraceError, UnsupportedCall


@dataclass(frozen=True)
class Plans:
    """What a trace asks about the blocks inside the one that it traces.

    of: the plan that serves such a call of a block with such opaque arguments, as (its number, its
    result); None if there is none yet. attributes: the ints of the traced block's modules that
    alike blocks do not share, by path, which stay symbolic; fixed_attributes: those whose value the
    code asks. inside: trace through the blocks instead of calling them. exact: at the very sizes of
    the call.
    """

    of: Callable[[nn.Module, CallSpec, dict[str, Any]], tuple[int, Result] | None] = (
        lambda block, call, examples: None
    )
    attributes: Mapping[str, int] = field(default_factory=dict)
    fixed_attributes: Mapping[str, int] = field(default_factory=dict)
    inside: bool = False
    exact: bool = False


class HFTracer(fx.Tracer, Recording):
    """Traces one block for one kind of call.

    ``opaque`` maps module classes that are called instead of followed to the reason why;
    ``fixed_sizes`` names the sizes of transformers inputs that the model's code may fix to a
    number; ``writes`` are attributes that modules of these classes are known to change, ``outside``
    places outside the model that some do. ``watching``: look after each module whether it changed
    what lies outside the model, to find which one did.
    """

    def __init__(
        self,
        opaque: dict[type, tuple[str, Source | None]] | None = None,
        fixed_sizes: frozenset[str] = frozenset(),
        writes: frozenset[Place] = frozenset(),
        plans: Plans | None = None,
        watching: bool = False,
        outside: frozenset[Key] = frozenset(),
    ) -> None:
        super().__init__()
        self.watching, self._written_outside = watching, outside
        self.writes = writes
        self.opaque_classes = opaque or {}
        self.fixed_sizes = fixed_sizes
        self.plans = plans or Plans()

    def trace(  # type: ignore[override]
        self,
        root: nn.Module,
        call: CallSpec,
        forward: Any = None,
        examples: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Trace ``forward(root, **arguments)`` (the class's own forward by default); ``examples``
        are the opaque arguments by name.

        Raises Untraceable, and NeedsPlan where a block inside has no plan for its call. Nothing of
        ``root``, PyTorch or transformers stays changed, whatever happens.
        """
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.world = FakeWorld(self.plans.exact)
        self.recorder = Recorder(self.graph, self.world, self)
        self.calls = [ModuleCall(0, "", type(root), None)]
        self.stack: list[tuple[ModuleCall, nn.Module]] = [(self.calls[0], root)]
        self.members = Members(root, inside=self.plans.inside)
        self.leaves = TransformersLeaves(self.recorder, self.members, self)
        self.reads: list[Read] = []
        self.numbers: dict[str, Read] = {}
        self._read: dict[str, set[str]] = {}
        self._touched = Touched()
        self._collects_weights = False
        self.module_writes = ModuleWrites()
        self._made: dict[int, nn.Module] = {}
        self._constants: dict[str, torch.Tensor] = {}
        self._get_attr_nodes: dict[str, fx.Node] = {}
        self._autocast_nodes: dict[int, fx.Node] = {}
        self._autocast_cache_enabled = torch.is_autocast_cache_enabled()
        self._attribute_names: dict[str, str] = {}
        self.opaque_leaves: dict[str, OpaqueLeaf] = {}
        self._given_objects: set[str] = set()  # leaves that may change a cache
        self._failure: BaseException | None = None
        self._comparing: list[tuple[str, nn.Module]] | None = None
        forward = forward or type(root).forward
        # No size is tied to another because a contiguous tensor of these sizes was asked for.
        with self.world.mode, self.world.shape_env.suppress_guards():
            for _, _, tensor, device in offloaded(self.members.entered.values()):
                self.world.place(tensor, device)
            arguments = self._placeholders(call, examples or {})
        entered = self.members.entered
        with attributes_kept(root, entered.values()) as before, patched(self):
            self.hidden = HiddenState(before, entered, self.writes)
            reaches = [reach for module in entered.values() for reach in reach_of(module)]
            self.recorder.facts.compares = compares_objects(reaches)
            try:
                with self._symbolic_attributes(), self._outside_kept(reaches):
                    self._look_at(root)
                    result, output = self._run(forward, arguments)
                    self._refuse_outside_changes()
                self.hidden.show(root)
                self._refuse_writes(before)
                if stack := self.module_writes.who_left_hooks(root.modules()):
                    raise Untraceable(stack, None, "it puts a hook on a module, which stays there")
            finally:
                self.module_writes.undo()
        # Kept until now: what the tree looked like is back in place.
        for path, tensor in self._constants.items():
            root.register_buffer(path, tensor, persistent=False)
        self._finish(output)
        opaque = list(self.opaque_leaves.values())
        read = {path: tuple(sorted(names)) for path, names in sorted(self._read.items())}
        return Trace(self.graph, root, self.calls, self._guards(call), opaque, result, read)

    def let_go(self) -> None:
        """Hold nothing more after the trace: the tracer's parts hold each other, and the caller's
        cache. (The collector alone would not do: it cannot see that a tensor holds its sizes.)"""
        if "world" in vars(self):
            vars(self.world.shape_env).clear()
        vars(self).clear()

    def _guards(self, call: CallSpec) -> Guards:
        """The assumptions of the trace that just finished in this thread's modes."""
        self.recorder.facts.note_used(self._used_tensors())
        asked = self.recorder.facts.grad_mode_asked or not torch.is_grad_enabled()
        sizes = self.size_guards
        if values := self._asked_attributes(sizes):
            raise AsksAttributes(values)
        fixed = self.plans.fixed_attributes
        sizes += [f"{_symbol(path)} == {value}" for path, value in fixed.items()]
        return Guards(
            call=call,
            sizes=tuple(sizes),
            training=self.root.training,
            grad_enabled=torch.is_grad_enabled() if asked else None,
            autocast=autocast_state(self._device_types(call)),
            attention_fixed=self.leaves.masks_are_read or self._asks_weights(call),
            attributes={_symbol(path): path for path in fixed},
            reads=tuple(self.reads),
            numbers={n: r for n, r in self.numbers.items() if any(n in guard for guard in sizes)},
            other_mode=tuple(sorted(self._in_other_mode())),
            contiguous=self.recorder.facts.layout_asked,
            plain=self.recorder.facts.class_asked,
            order=self._gathered(call),
            distinct=self._comparing is not None,
            modes=self.recorder.facts.modes,
            tensors=self.recorder.facts.tensors,
        )

    def _asks_weights(self, call: CallSpec) -> bool:
        """Whether the call asks for attention weights, which some implementations do not give: that
        is in the result as None, or not at all."""
        asked = call.arguments.get("output_attentions")
        config = getattr(self.root, "config", None)
        return (
            self._collects_weights
            or (isinstance(asked, Constant) and asked.value is True)
            or getattr(config, "output_attentions", False) is True
        )

    def _gathered(self, call: CallSpec) -> tuple[str, ...]:
        """The arguments that forward's ``**kwargs`` gathers, where they have an order."""
        named = inspect.signature(_forward_of(self.root)).parameters
        gathered = tuple(name for name in call.arguments if name not in named)
        return gathered if len(gathered) > 1 else ()

    def _used_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the model that the graph reads by itself, by path."""
        found = {p: operator.attrgetter(p)(self.root) for p in self._get_attr_nodes}
        return {
            path: value
            for path, value in found.items()
            if isinstance(value, torch.Tensor) and path not in self._constants
        }

    def _device_types(self, call: CallSpec) -> tuple[str, ...]:
        """The devices of the inputs and parameters. (Blocks inside look at theirs themselves.)"""
        types = {spec.device.type for spec in call.tensors.values()}
        for module in self.members.entered.values():
            types |= {p.device.type for p in module._parameters.values() if p is not None}
            if is_block(module):
                types |= {p.device.type for p in itertools.islice(module.parameters(), 1)}
        return tuple(sorted(types - {"meta"})) or ("cpu",)

    def _in_other_mode(self) -> set[str]:
        """The modules that ask for their mode and are in another than the root, by path."""
        followed = {call.path: self.root.get_submodule(call.path) for call in self.calls}
        mode = self.root.training
        return {p for p, m in followed.items() if m.training is not mode and asks_mode(m)}

    def _placeholders(self, call: CallSpec, examples: Mapping[str, Any]) -> dict[str, Any]:
        inputs, made = call.leaves(), list[tuple[Any, fx.Node]]()

        def make(spec: Spec) -> Any:
            name, _ = next(inputs)
            node = self.graph.placeholder(name)
            node.meta.update(call=0, module="", source=None)
            value = self._input(spec, name, node, call, examples)
            made.append((value, node))
            return value

        arguments = {name: _made_of(spec, make) for name, spec in call.arguments.items()}
        for value, node in made:
            if isinstance(value, torch.Tensor):
                self.recorder.sizes.define_by_shape(value, node)
            elif isinstance(value, torch.SymInt):
                self.recorder.sizes.define(value, node)
        return arguments

    def _input(
        self, spec: Spec, name: str, node: fx.Node, call: CallSpec, examples: Mapping[str, Any]
    ) -> Any:
        if isinstance(spec, InputSpec):
            fake = self._fake_input(spec, call)
            node.meta["spec"] = self.world.metadata(fake).spec
            set_node(fake, node)
            return fake
        if isinstance(spec, Number) and spec.size is None:
            number = traced_number(examples[name])
            set_node(number, node)
            return number
        if isinstance(spec, Number):
            assert spec.size is not None
            return self.world.size(spec.size, call.hints.get(spec.size))
        if name not in examples:
            raise UnsupportedCall(f"{name}, {spec}, of which there is no example")
        return stand_in(Origin(self, examples[name], node, name))

    def _fake_input(self, spec: InputSpec, call: CallSpec) -> torch.Tensor:
        def size(named: str) -> Any:
            is_free = named in call.loose and not self.plans.exact
            return self.world.size(named, None if is_free else call.hints.get(named))

        sizes = [size(s) if isinstance(s, str) else s for s in spec.sizes]
        return torch.empty(sizes, dtype=spec.dtype, device=spec.device)

    @contextlib.contextmanager
    def _symbolic_attributes(self) -> Iterator[None]:
        """The ints that alike blocks do not share are sizes, as long as the trace lasts."""
        stack = contextlib.ExitStack()
        for path, value in self.plans.attributes.items():
            owner, _, name = path.rpartition(".")
            module = self.root.get_submodule(owner)
            symbol = _symbol(path)
            size = self.world.fresh_number(value)
            self.world.symbols[symbol] = size
            self._attribute_names[symbol] = path
            self.recorder.sizes.define_later(size, functools.partial(self.get_attr, path))
            stack.enter_context(put_aside(module, name, size))
        with stack:
            yield

    def ask(self, number: torch.SymInt, read: Read) -> None:
        """Note how a number can be read before the graph runs, should the code compare it."""
        name = f"asked_{len(self.numbers)}"
        self.numbers[name] = read
        self.world.symbols[name] = number

    def _asked_attributes(self, guards: list[str]) -> list[str]:
        """The symbolic attributes whose value the code asked for: there the example was a wrong
        one."""
        asked = [name for name in self._attribute_names if any(name in guard for guard in guards)]
        return [self._attribute_names[name] for name in asked]

    def attribute_of(self, size: torch.SymInt) -> str | None:
        """The path of the block's own int behind this symbolic size, if it is one."""
        for symbol, path in self._attribute_names.items():
            if self.world.symbols[symbol].node.expr == size.node.expr:
                return path
        return None

    def example_of_size(self, size: torch.SymInt) -> int:
        """What a symbolic size is in the example: the block's own int, or the size's hint."""
        path = self.attribute_of(size)
        return self.world.hint(size) if path is None else self.plans.attributes[path]

    def _run(self, forward: Any, arguments: dict[str, Any]) -> tuple[Result, Any]:
        recorder = self.recorder
        with autocast_cache_off(), enable_python_dispatcher(), self.world.mode, recorder:
            recorder.recording = True
            given = GivenContainers(arguments.items())
            try:
                result = forward(self.root, **arguments)
                recorder.settle_texts()
                self._refuse_failure()
                self._refuse_comparison()
                given.refuse_changes()
                recorder.recording = False
                self.size_guards = size_guards(self.world, recorder.questions)
                described = describe_result(result, self.world, recorder.decisive)
                described = replace(described, changes=self._written_outside)
                return described, ContainerWriter(recorder, given.ids).write(result)
            except _WHOLE:
                raise
            except Exception as error:
                raise self._untraceable(error) from error
            finally:
                recorder.recording = False

    def _finish(self, output: Any) -> None:
        self.calls[0].output = output
        node = self.graph.output(output)
        node.meta.update(call=0, module="", source=None)
        # What the code of a module that was not followed changes is not known.
        needed = self._given_objects | self.opaque_leaves.keys()
        erase_unread_nodes(self.graph, self.root, needed)
        try:
            self.leaves.materialise_masks()
        except CannotRecord as error:
            raise self._untraceable(error) from error
        self.world.settle(self.graph)

    # -- module calls
    # ------------------------------------------------------------------------------------

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module becomes a call_module node."""
        return type(m) in self.opaque_classes or is_leaf(m)

    def trace_module_call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What ``module(*args, **kwargs)`` does during the trace."""
        path = self.members.path_of(module)
        if path is not None and self.module_writes.is_swapped(self.root, path):
            if id(module) not in self._made:
                line = source_line(sys._getframe(2))
                raise Untraceable(self._stack(), line, f"{path} is another module for the call")
            path = None
        # One made on the fly by the model's code: its parameters are constants to the graph.
        if path is None:
            return _forward_of(module)(module, *args, **kwargs)
        is_called = self.is_leaf_module(module, path) or _around(module, self.root)
        is_inner = is_block(module) and not self.plans.inside
        if (is_called or is_inner) and (found := self.module_writes.found_in(module)):
            line = source_line(sys._getframe(2))
            raise Untraceable(self._stack(), line, f"{path} is called, and {found}")
        if is_inner and not self.is_leaf_module(module, path):
            return self._call_block(module, path, args, kwargs)
        if is_called:
            return self._call_leaf(module, path, args, kwargs)
        call = ModuleCall(len(self.calls), path, type(module), self.stack[-1][0].index)
        self.calls.append(call)
        call.args, call.kwargs = self._noted(args), self._noted(kwargs)
        self.stack.append((call, module))
        recorder, asked_before = self.recorder, len(self.recorder.questions)
        try:
            self._look_at(module)
            result = _forward_of(module)(module, *args, **kwargs)
            recorder.settle_texts()
            if asked := recorder.questions[asked_before:]:
                check_known(self.world, asked)
                self.note_question("how large something is")
            self._refuse_fixed_sizes()
            if self.watching:
                self._refuse_outside_changes()
        except _WHOLE:
            raise
        except Exception as error:
            raise self._untraceable(error) from error
        finally:
            self.stack.pop()
        call.output = self._noted(result)
        _let_collect(module, args, result)
        return result

    def _call_block(self, block: Any, path: str, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        keys = collected()
        if keys and collects_inside(block, keys):
            raise NeedsInside
        self._collects_weights |= any("attentions" in key for key in keys)
        # Nothing here is the model's code: its questions need not go through the recorder.
        with recorder.paused() as kept, torch._C.DisableTorchFunction():
            args, kwargs = recorder.with_fakes(args), recorder.with_fakes(kwargs)
            arguments = block.signature.named(args, kwargs)
            names = InnerNames(self.world)
            call = names.describe(arguments)
            values = flat_inputs(call.arguments, arguments)
            examples = examples_of(call, values)
            try:
                known = self.plans.of(block, call, examples)
            except NoPlan as reason:
                stack = [*self._stack(), (path, block)]
                raise Untraceable(stack, None, str(reason), inner=reason.cause) from None
            if known is None:
                raise NeedsPlan(block, call, examples)
            number, result = known
            self._note_changes_outside(result.changes)
            node = recorder.create_node(
                "call_module", path, *ContainerWriter(recorder).write((tuple(args), kwargs))
            )
            node.meta["plan"] = number
            inputs = dict(zip((name for name, _ in call.leaves()), values, strict=True))
            before = len(recorder.questions)
            made = Results(self.world, result, names.symbols, inputs).make()
            recorder.facts.note_twins(f"{path} may give its argument back")
            if result.assumes:
                kept += recorder.questions[before:]
                recorder.decisive += kept
            changed_by_call(values)
            self._touched.add(block, like=result)
            made = self._with_objects(recorder.bind(made, node), node)
        _let_collect(block, args, made)
        return made

    def _with_objects(self, value: Any, node: fx.Node) -> Any:
        """A block's result with stand-ins for the objects that its graph makes."""
        if isinstance(value, ResultObject):
            return stand_in(Origin(self, value.example, node, None))
        if isinstance(value, dict):
            keys: Any = value.keys()
        elif isinstance(value, (tuple, list)):
            keys = range(len(value))
        else:
            return value
        items = [value[key] for key in keys]
        for i, (key, item) in enumerate(zip(keys, items, strict=True)):
            if any(isinstance(leaf, ResultObject) for leaf in pytree.tree_leaves(item)):
                got = self.recorder.create_node("call_function", operator.getitem, (node, key))
                items[i] = self._with_objects(item, got)
        return rebuilt(type(value), tuple(keys) if isinstance(value, dict) else None, items)

    def _call_leaf(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        recorder, keys = self.recorder, collected()
        self._collects_weights |= any("attentions" in key for key in keys)
        self._touched.add(module)
        if keys and collects_inside(module, keys):
            text = f"{', '.join(keys)} of modules inside it are collected"
            raise Untraceable([*self._stack(), (path, module)], None, text)
        with recorder.paused():
            args, kwargs = recorder.with_fakes(args), recorder.with_fakes(kwargs)
            known = self.world.examples.keys()
            reason = self._opaque_reason(module)
            concrete = type(module) in self.opaque_classes
            if reason is None and not is_leaf(module):
                reason = _around(module, self.root), None
            try:
                # What it writes to itself it writes again when the graph calls it.
                with contextlib.ExitStack() as kept:
                    kept.enter_context(self.hidden.shown(module))
                    before = kept.enter_context(attributes_kept(module))
                    if reason is not None:
                        kept.enter_context(streams_kept())
                        kept.enter_context(self.outside.kept(module))
                    before_it = self.outside.changed(self.world)
                    with tensors_replaced(module, real_copy if concrete else self._own_copy):
                        result = infer_leaf(recorder, module, args, kwargs, concrete=concrete)
                    below = {m: f"{path}.{p}".rstrip(".") for p, m in module.named_modules()}
                    wrote = written(before, below, self.world) if reason is not None else []
                    changed = self.outside.changed(self.world) if before_it is None else None
                if changed is not None:
                    self._note_changes_outside(frozenset((changed.key,)))
                self.hidden.add(self.root, wrote)
            except Exception as error:
                self.stack.append((ModuleCall(-1, path, type(module), None), module))
                try:
                    raise self._untraceable(error) from error
                finally:
                    self.stack.pop()
            node = recorder.create_node(
                "call_module", path, tuple(map(recorder.argument, args)),
                {key: recorder.argument(value) for key, value in kwargs.items()},
            )  # fmt: skip
            if any(origin_of(value) is not None for value in pytree.tree_leaves((args, kwargs))):
                self._given_objects.add(path)
            if reason is not None or not any(True for _ in module.parameters()):
                recorder.facts.note_twins(f"{path} may give its argument back")
            if reason is not None:
                self.opaque_leaves[path] = OpaqueLeaf(path, type(module).__name__, *reason)
            in_place = getattr(module, "inplace", False) is True
            ids = (
                ()
                if in_place
                else {
                    id(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)
                }
            )
            made = recorder.bind(result, node, ids)
            if concrete:
                self._check_results(made, path, known)
        _let_collect(module, args, made)
        return made

    def _check_results(self, made: Any, path: str, known: Set[sympy.Symbol]) -> None:
        """The code around a module that was run on random data may ask for the dtypes, ranks and
        sizes of what it gave: they are checked where it gives it. ``known``: the sizes before."""

        def checked(size: Any) -> Any:
            is_known = isinstance(size, int) or size.node._expr.free_symbols <= known
            return self.recorder.argument(size) if is_known else None

        for value in pytree.tree_leaves(made):
            if isinstance(value, FakeTensor):
                arguments = node_of(value), path, value.dtype, list(map(checked, value.shape))
                self.recorder.create_node("call_function", leaves.check_result, arguments)

    def _own_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a leaf may write into. A count (of a batch norm's batches) is data that its code
        reads, and that meets no fake."""
        is_count = tensor.ndim == 0 and not tensor.is_floating_point()
        return real_copy(tensor) if is_count else self.world.renewed(tensor)

    def _opaque_reason(self, module: nn.Module) -> tuple[str, Source | None] | None:
        if is_experts(module):
            return "its loop over experts depends on the data", None
        if is_parametrized_code(module):
            return "torch.nn.utils.parametrize computes its parameters at each call", None
        return self.opaque_classes.get(type(module))

    def _refuse_writes(self, before: Snapshot) -> None:
        """What the code writes to the model a flat graph would not: find the module that does."""
        places = written(before, self.members.paths, self.world)
        if not places:
            return
        path, name = places[0]
        stack = [("", self.root)]
        stack += [(p, m) for m, p in self.members.paths.items() if p and _holds_one_of({path}, p)]
        cut = next((i for i, (p, m) in enumerate(stack) if p and self.is_leaf_module(m, p)), None)
        if cut is None:
            cause = f"its forward changes its own attribute {name}"
        else:  # put back after its own call: it was the code around that changed it
            stack = stack[:cut]
            cause = f"its forward changes {name} of {path}"
        raise Untraceable(stack, None, cause, tuple(places))

    @contextlib.contextmanager
    def _outside_kept(self, found: Iterable[Reach]) -> Iterator[None]:
        """What code that reaches this does outside the model has not happened after it."""
        reaches = dict.fromkeys(found)
        with caches_bypassed(reaches):
            self.streams, self.outside = Streams(), Outside(reaches, self._written_outside)
            try:
                yield
            finally:
                self.streams.restore()
                self.outside.restore()

    def _refuse_outside_changes(self) -> None:
        """A graph would not do again what the code did outside the model: find the module."""
        drawn, changed = self.streams.drawn(), self.outside.changed(self.world)
        if not drawn and changed is None:
            return
        if not self.watching:
            raise Watch
        if changed is None:
            raise Untraceable(self._stack(), None, f"its code draws or seeds {drawn}")
        cause = f"its code changes {changed.name}, which is outside the model"
        raise Untraceable(self._stack(), None, cause, outside=changed.key)

    def _note_changes_outside(self, places: frozenset[Key]) -> None:
        """What is called changes these places at each call: who reads them is called as well."""
        if not places <= self._written_outside:
            raise ChangesOutside(places)

    def _look_at(self, module: nn.Module) -> None:
        """Before the code of a module runs: a graph would hold what it reads outside that day."""
        if reason := self.outside.reason_to_call(module):
            raise Untraceable(self._stack(), None, reason)
        if reads_class(reach_of(module)):
            raise Untraceable(self._stack(), None, "its code reads __class__ of its values")
        if self._comparing is None and compares_objects(reach_of(module)):
            self._comparing = self._stack()

    def _refuse_comparison(self) -> None:
        """What gave its argument back gave one object, and the trace has two."""
        twins = self.recorder.facts.twins
        if self._comparing is not None and twins is not None:
            cause = f"its code compares objects, and {twins}: no trace can tell which are one"
            raise Untraceable(self._comparing, None, cause)

    def is_hidden(self, module: nn.Module, name: str) -> bool:
        """Whether the code that reads this attribute must not see it."""
        return (module, name) in self.hidden.places

    def note_made(self, module: nn.Module) -> None:
        """The model's code makes a module, whose attributes are its own business."""
        self._made[id(module)] = module

    def note_hook(self, handle: RemovableHandle) -> None:
        """The model's code puts a hook on a module, or on a tensor."""
        self.module_writes.note_hook(handle, self._stack())

    def note_write(self, module: nn.Module, name: str) -> None:
        """The model's code writes this attribute, a child's or a tensor's name."""
        if id(module) not in self._made:
            self.module_writes.note(module, name)

    def note_read(self, module: nn.Module, name: str) -> None:
        """The model's code reads this attribute."""
        for one in names_read(module, name):
            if self._touched.may_have_changed(module, one, attribute(module, one)):
                owner = type(module).__name__
                raise CannotRecord(f"{one} of a {owner}, which what was called may change, is read")
        path = self.members.path_of(module)
        if path is None and id(module) not in self._made and [*names_read(module, name)]:
            owner = type(module).__name__
            raise CannotRecord(f"{name} of a {owner}, which is none of its own modules, is read")
        if path is not None:
            own = {*self.plans.attributes, *self.plans.fixed_attributes}
            names = (n for n in names_read(module, name) if f"{path}.{n}".lstrip(".") not in own)
            self._read.setdefault(path, set()).update(names)

    def _refuse_fixed_sizes(self) -> None:
        """A batch size or length that a module forces to one number makes the graph useless: find
        the module."""
        for name in ("batch", "sequence"):
            size = self.world.symbols.get(name)
            if size is not None and size.node.expr.is_number and name not in self.fixed_sizes:
                raise Untraceable(
                    self._stack(), None, f"its code fixes the {name} size to {size.node.expr}"
                )

    def _noted(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            fake = tree if isinstance(tree, FakeTensor) else self.world.of_real(tree)
            return node_of(fake)
        if isinstance(tree, (tuple, list)):
            return tuple(map(self._noted, tree))
        if isinstance(tree, dict):
            return {key: self._noted(value) for key, value in tree.items()}
        return tree if tree is None or isinstance(tree, (bool, int, float, str)) else node_of(tree)

    def failed(self, error: BaseException) -> None:
        if self._failure is not None:
            return
        if isinstance(error, Exception) and not isinstance(error, _WHOLE):
            cause = f"{type(error).__name__}: {_told(error)}, which its code catches"
            error = Untraceable(self._stack(), source_line(sys._getframe(1)), cause)
        self._failure = error

    def _refuse_failure(self) -> None:
        """A call that failed in the trace may do well in the graph, and the model's code went on as
        if it had failed: that is another program."""
        if self._failure is not None:
            raise self._failure

    def _stack(self) -> list[tuple[str, nn.Module]]:
        return [(call.path, module) for call, module in self.stack]

    def _untraceable(self, error: Exception) -> Untraceable:
        frame, source = error.__traceback__, None
        while (
            frame is not None
        ):  # the innermost line of the model, on the way to where it went wrong
            if is_model_code(frame.tb_frame.f_code):
                source = (frame.tb_frame.f_code.co_filename, frame.tb_lineno)
            frame = frame.tb_next
        text = _told(error)
        cause = text if type(error) is RuntimeError else f"{type(error).__name__}: {text}"
        return Untraceable(self._stack(), source, cause)

    # -- what the recorder asks
    # --------------------------------------------------------------------------

    def current_call(self) -> tuple[int, str]:
        call = self.stack[-1][0]
        return call.index, call.path

    def note_question(self, what: str) -> None:
        self.stack[-1][0].asks.add(what)

    def path_of_real(self, tensor: torch.Tensor) -> str | None:
        path = self.members.path_of_tensor(tensor)
        return None if path in self._constants else path

    def node_of_real(self, tensor: torch.Tensor) -> fx.Node:
        path = self.members.path_of_tensor(tensor)
        if path is None:
            path = next(
                p
                for i in itertools.count()
                if (p := f"_tensor_constant{i}") not in self._constants
                and not hasattr(self.root, p)
            )
            self._constants[path] = tensor
            self.members.name_tensor(tensor, path)
        return self.get_attr(path)

    def node_of_module(self, module: nn.Module) -> fx.Node:
        path = None if module is self.root else self.members.path_of(module)
        if path is None:
            raise TypeError(
                f"a {type(module).__name__} that is no submodule of the model is handed to a leaf"
            )
        return self.get_attr(path)

    def get_attr(self, path: str) -> fx.Node:
        # The first use dominates the later ones: the graph is a straight line.
        if path not in self._get_attr_nodes:
            self._get_attr_nodes[path] = self.recorder.create_node("get_attr", path)
        return self._get_attr_nodes[path]

    # -- autocast regions
    # --------------------------------------------------------------------------------

    def enter_autocast(self, region: torch.autocast) -> None:
        """Record the start of a ``with torch.autocast(...)`` region of the model's code."""
        cache_enabled = region._cache_enabled or self._autocast_cache_enabled
        arguments = (region.device, region.fast_dtype, region._enabled, cache_enabled)
        self._autocast_nodes[id(region)] = self.recorder.create_node(
            "call_function", torch.amp.autocast_mode._enter_autocast, arguments
        )

    def leave_autocast(self, region: torch.autocast) -> None:
        """Record the end of a region that ``enter_autocast`` recorded."""
        entered = self._autocast_nodes.pop(id(region), None)
        if entered is not None:
            self.recorder.create_node(
                "call_function", torch.amp.autocast_mode._exit_autocast, (entered,)
            )


def _told(error: Exception) -> str:
    """What an error says: its first line as a whole, and of the rest whole words, if it is long.

    PyTorch appends a stack of places in itself, which tells the user nothing.
    """
    said = str(error).strip().partition("\nCaused by: (")[0]
    first, *_ = lines = said.splitlines() or [type(error).__name__]
    text = " ".join(" ".join(lines).split())
    most = max(300, len(" ".join(first.split())))
    return text if len(text) <= most else text[: most + 1].rpartition(" ")[0] + " ..."


def _around(module: nn.Module, root: nn.Module) -> str:
    """What happens around a module's call and would be lost if the graph went through it: such a
    module is called. "" if there is nothing."""
    if "forward" in module.__dict__ and not moves_nothing(module, root):
        hooked = ", set by a hook of accelerate" if hasattr(module, "_hf_hook") else ""
        return f"it has a forward of its own in place of its class's{hooked}"
    if not all(is_capturing(hook) for hooks in hooks_of(module) for hook in hooks.values()):
        return "a hook stands on it"
    checkpointed = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    return "it is checkpointed" if checkpointed and module.training else ""


def _let_collect(module: nn.Module, args: Any, result: Any) -> None:
    """Let transformers' own hooks on a module take what they collect, as after any call."""
    for hook in module._forward_hooks.values():
        if is_capturing(hook):
            hook(module, args, result)


def _symbol(path: str) -> str:
    return f"own_{path.replace('.', '_')}"


def _forward_of(module: Any) -> Any:
    """The forward of the module's class; of a block's own class, not the one that runs a graph."""
    return module.block_class.forward if is_block(module) else type(module).forward


def _holds_one_of(paths: set[str], ancestor: str) -> bool:
    return any(path == ancestor or path.startswith(f"{ancestor}.") for path in paths)


def _made_of(spec: Spec, make: Callable[[Spec], Any]) -> Any:
    """The argument that a spec describes, its leaves made by ``make``."""
    if isinstance(spec, Constant):
        return spec.value
    if isinstance(spec, Items):
        return rebuilt(spec.kind, spec.keys, [_made_of(item, make) for item in spec.items])
    return make(spec)
