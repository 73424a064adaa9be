"""What stands in for an opaque argument (a cache) while a trace runs.

    past_key_values.update(k, v, self.layer_idx)      ->  a node, whose sizes nothing foretells
    past_key_values.get_seq_length()                  ->  a node, a size; 0 if the graph made it
    past_key_values.is_compileable                    ->  answered from the example, and guarded
    past_key_values.something = x                     ->  refused

It is of the argument's class, so that ``isinstance`` says what it would, and answers no question
that the graph or a guard could not answer later.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from liger_fx.tracing import leaves
from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.call import PLAIN, UnsupportedCall
from liger_fx.tracing.fakes import set_node
from liger_fx.tracing.guards import Attribute, Read
from liger_fx.tracing.recorder import Recorder

_UPDATES = ("update",)
# Methods that hand out states of fixed sizes: what they give is inferred on a copy with fakes.
_STATES = (
    "update_conv_state", "update_recurrent_state", "get_conv_state", "get_recurrent_state",
    "update_indexer",
)  # fmt: skip
_MAKERS = (leaves.new_cache, leaves.encoder_decoder_cache)


class Host(Protocol):
    """What a stand-in asks of the tracer."""

    recorder: Recorder
    reads: list[Read]

    def attribute_of(self, size: torch.SymInt) -> str | None:
        """The path of the block's own int behind this symbolic size, if it is one."""

    def example_of_size(self, size: torch.SymInt) -> int:
        """What a symbolic size is in the example: the block's own int, or the size's hint."""

    def ask(self, number: torch.SymInt, read: Read) -> None:
        """Note how a number can be read before the graph runs, should the code compare it."""


class Origin:
    """Where a stand-in comes from: the argument and the steps from it, or a node of the graph
    alone; and the real object that answers questions."""

    def __init__(
        self,
        host: Host,
        example: Any,
        node: fx.Node,
        argument: str | None,
        steps: tuple[tuple[Any, ...], ...] = (),
        outer: Origin | None = None,
    ) -> None:
        self.host, self.example, self.node = host, example, node
        self.argument, self.steps, self.outer = argument, steps, outer
        self._changes: list[tuple[tuple[tuple[Any, ...], ...], Any]] = []  # steps, example
        self._simulated: Any = None

    @property
    def _root(self) -> Origin:
        return self if self.outer is None else self.outer._root

    @property
    def changed(self) -> bool:
        """Whether something before may have changed the object that the example stands for.

        What changes one part of an object leaves another part as it is that cannot be reached from
        it: the self-attention cache and ``is_updated`` of a pair of caches.
        """
        return any(self._is_touched_by(steps, example) for steps, example in self._root._changes)

    def _is_touched_by(self, steps: tuple[tuple[Any, ...], ...], example: Any) -> bool:
        both = min(len(self.steps), len(steps))
        if self.steps[:both] == steps[:both]:
            return True
        return _reaches(example, self.example, set())

    def change(self) -> None:
        """Note that something may have changed it."""
        self._root._changes.append((self.steps, self.example))

    def inner(self, kind: str, key: Any, example: Any) -> Any:
        """The stand-in for an attribute or item."""
        recorder = self.host.recorder
        with recorder.paused():
            steps = (*self.steps, (kind, self.step_value(key)))
            target: Any = getattr if kind == "attr" else operator.getitem
            arguments = (self.node, recorder.argument(key))
            node = recorder.create_node("call_function", target, arguments)
        return stand_in(Origin(self.host, example, node, self.argument, steps, self))

    def concrete(self, value: Any) -> Any:
        """The number that a symbolic one is in the example; anything else as it is."""
        return self.host.example_of_size(value) if isinstance(value, torch.SymInt) else value

    def step_value(self, key: Any) -> Any:
        """A key or an argument as a guard writes it."""
        if isinstance(key, torch.SymInt):
            path = self.host.attribute_of(key)
            if path is not None:
                return Attribute(path)
            if not key.node.expr.is_number:
                raise CannotRecord(f"a {self._class_name} asked about a size of this call")
            return int(key)
        if isinstance(key, PLAIN):
            return key
        raise CannotRecord(f"a {self._class_name} asked with a {type(key).__name__}")

    def answer(self, kind: str, value: Any, *key: Any) -> Any:
        """A plain answer, which the call must confirm."""
        if self.changed:
            raise CannotRecord(f"{self._class_name} is asked for {key[0]} after it was changed")
        return self._confirmed(value, ((kind, *map(self.step_value, key)),))

    def _confirmed(self, value: Any, steps: tuple[tuple[Any, ...], ...]) -> Any:
        if self.argument is not None:
            read = Read(self.argument, (*self.steps, *steps), value)
            if read not in self.host.reads:
                self.host.reads.append(read)
        return value

    @property
    def _class_name(self) -> str:
        return type(self.example).__name__

    # -- attributes --------------------------------------------------------------------------------

    def attribute(self, name: str) -> Any:
        """What the model's code gets for ``object.name``."""
        recorder = self.host.recorder
        if not recorder.recording:
            raise CannotRecord(f"{name} of a {self._class_name} is asked where no trace looks")
        with recorder.paused():
            value = getattr(self.example, name)
        if isinstance(value, PLAIN):
            return self.answer("attr", value, name)
        if callable(value) and hasattr(value, "__self__"):
            return functools.partial(self.call, name)
        if isinstance(value, torch.Tensor):
            node = recorder.create_node("call_function", getattr, (self.node, name))
            return self._tensor(name, value, node)
        return self.inner("attr", name, value)

    def _tensor(self, name: str, example: torch.Tensor, node: fx.Node) -> torch.Tensor:
        """A tensor that it holds. Heads and their width are what they are, as the call must
        confirm; batch and length may be any."""
        recorder = self.host.recorder
        sizes: list[Any] = []
        for dim, size in enumerate(example.shape):
            if example.ndim == 4 and dim in (1, 3):
                steps = ("attr", name), ("attr", "shape"), ("item", dim)
                sizes.append(self._confirmed(int(size), steps))
            else:
                sizes.append(recorder.world.fresh_size(int(size)))
        for fact in ("dtype", "device"):
            self._confirmed(getattr(example, fact), (("attr", name), ("attr", fact)))
        with recorder.paused():
            fake = torch.empty(sizes, dtype=example.dtype, device=example.device)
            return recorder.bind(fake, node)

    # -- methods -----------------------------------------------------------------------------------

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What the model's code gets for ``object.name(...)``."""
        if name in _UPDATES and isinstance(self.example, Cache):
            return self._update(*args, **kwargs)
        if name in _STATES and isinstance(self.example, Cache):
            return self._state(name, args, kwargs)
        given = [*args, *kwargs.values()]
        if any(not isinstance(value, (*PLAIN, torch.SymInt)) for value in given):
            raise CannotRecord(f"{name} of a {self._class_name} with more than plain arguments")
        real_args, real_kwargs = (
            map(self.concrete, args),
            {k: self.concrete(v) for k, v in kwargs.items()},
        )
        with self.host.recorder.paused():
            value = getattr(self.example, name)(*real_args, **real_kwargs)
        if isinstance(value, bool) or value is None or isinstance(value, str):
            if kwargs:
                raise CannotRecord(f"{name} of a {self._class_name} with arguments by name")
            return self.answer("call", value, name, *args)
        if isinstance(value, int) or (
            isinstance(value, tuple) and all(isinstance(v, int) for v in value)
        ):
            return self._numbers(name, value, args, kwargs)
        if isinstance(value, torch.Tensor) and not value.ndim and not kwargs:
            return self._number_in_a_tensor(name, value, args)
        raise CannotRecord(f"{name} of a {self._class_name} that gives a {type(value).__name__}")

    def _number_in_a_tensor(self, name: str, example: torch.Tensor, args: Any) -> torch.Tensor:
        """A static cache counts on the device."""
        recorder = self.host.recorder
        with recorder.paused():
            if not self.changed:
                step = ("call", name, *map(self.step_value, args))
                for fact in ("dtype", "device"):
                    self._confirmed(getattr(example, fact), (step, ("attr", fact)))
            node = self._node_of_call(name, args, {})
            fake = torch.empty((), dtype=example.dtype, device=example.device)
            return recorder.bind(fake, node)

    def _node_of_call(self, name: str, args: Any, kwargs: Any) -> fx.Node:
        recorder = self.host.recorder
        arguments = (self.node, name, *map(recorder.argument, args))
        keywords = {key: recorder.argument(value) for key, value in kwargs.items()}
        return recorder.create_node("call_function", leaves.cache_call, arguments, keywords)

    @property
    def _is_new(self) -> bool:
        """Whether the graph itself makes the object, and it is as it was made."""
        return self._root.node.target in _MAKERS and not self.changed

    def _numbers(self, name: str, value: Any, args: Any, kwargs: Any) -> Any:
        asks_of_sizes = any(isinstance(v, torch.SymInt) for v in (*args, *kwargs.values()))
        if self._is_new and not asks_of_sizes:  # the same each time
            return value
        recorder = self.host.recorder
        with recorder.paused():
            node = self._node_of_call(name, args, kwargs)
            world = recorder.world
            if isinstance(value, int):
                number = world.fresh_number(value)
                if self.argument is not None and not self.changed and not kwargs:
                    step = ("call", name, *map(self.step_value, args))
                    self.host.ask(number, Read(self.argument, (*self.steps, step), value))
                return recorder.bind(number, node)
            return recorder.bind(tuple(map(world.fresh_number, value)), node)

    def _update(self, key: Any, value: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """All keys and values of the layer: of a length that nothing in the call tells."""
        recorder = self.host.recorder
        with recorder.paused():
            key, value = recorder.with_fakes(key), recorder.with_fakes(value)
            node = self._node_of_call("update", (key, value, layer, *args), kwargs)
            new = recorder.world.hint(key.shape[-2])
            length = recorder.world.fresh_size(self.length(new, self.concrete(layer)))
            shapes = ((*t.shape[:-2], length, t.shape[-1]) for t in (key, value))
            results = tuple(
                torch.empty(shape, dtype=t.dtype, device=t.device)
                for shape, t in zip(shapes, (key, value), strict=True)
            )
            self.change()
            return recorder.bind(results, node)

    def simulated(self) -> Any:
        """A copy of the example that holds fakes, to try things on."""
        if self._simulated is None:
            self._simulated = self.host.recorder.world.copied(self.example)
        return self._simulated

    def _state(self, name: str, args: Any, kwargs: Any) -> Any:
        recorder = self.host.recorder
        with recorder.paused():
            args, kwargs = recorder.with_fakes(args), recorder.with_fakes(kwargs)
            node = self._node_of_call(name, args, kwargs)
            concrete = [self.concrete(value) for value in args]
            keywords = {key: self.concrete(value) for key, value in kwargs.items()}
            result = getattr(self.simulated(), name)(*concrete, **keywords)
            self.change()
            return recorder.bind(pytree.tree_map(recorder.world.renewed, result), node)

    def length(self, new: int, layer: int) -> int:
        """How many keys attention sees when ``new`` ones are added to a layer of the example."""
        try:
            return int(self.example.get_mask_sizes(new, layer)[0])
        except (TypeError, AttributeError, IndexError, ValueError):
            return int(self.example.get_seq_length(layer)) + new


def _reaches(start: Any, wanted: Any, seen: set[int]) -> bool:
    """Whether the one object holds the other, at any depth."""
    if start is wanted:
        return True
    if id(start) in seen or isinstance(start, (*PLAIN, torch.Tensor, type)):
        return False
    seen.add(id(start))
    inside: list[Any] = [*vars(start).values()] if hasattr(start, "__dict__") else []
    if isinstance(start, dict):
        inside += start.values()
    elif isinstance(start, (list, tuple, set)):
        inside += start
    return any(_reaches(item, wanted, seen) for item in inside)


def origin_of(value: Any) -> Origin | None:
    """The origin of a stand-in; None for anything else."""
    if not hasattr(type(value), "_liger_fx_is_stand_in"):
        return None
    found: Origin = object.__getattribute__(value, "_liger_fx_origin")
    return found


def stand_in(origin: Origin) -> Any:
    """An object of the example's class that answers as ``origin`` does."""
    if isinstance(origin.example, (list, dict)):
        return _Container(origin)
    kind: Any = type(origin.example)
    try:
        made: Any = object.__new__(_class_for(kind))
        become(made, origin)
    except (TypeError, AttributeError):  # a number, an enum: made by a constructor of their own
        raise UnsupportedCall(f"{origin.argument}, a {kind.__name__}") from None
    return made


def become(value: Any, origin: Origin) -> None:
    """Make an object of the example's class its stand-in."""
    kind: Any = type(origin.example)
    object.__setattr__(value, "__class__", _class_for(kind))
    value.__dict__.clear()
    object.__setattr__(value, "_liger_fx_origin", origin)
    set_node(value, origin.node)


@functools.lru_cache(maxsize=64)
def _class_for(cls: type) -> type:
    try:
        return type(cls.__name__, (_StandIn, cls), {})
    except TypeError:  # a class that cannot be derived from
        return _StandIn


class _StandIn:
    _liger_fx_is_stand_in = True
    _liger_fx_origin: Origin

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("__", "_liger_fx")):
            return object.__getattribute__(self, name)
        origin: Origin = object.__getattribute__(self, "_liger_fx_origin")
        return origin.attribute(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_liger_fx"):
            object.__setattr__(self, name, value)
            return
        raise CannotRecord(f"{name} of an argument is set")

    def __repr__(self) -> str:
        return f"<stand-in for a {type(self).__name__}>"


class _Container:
    """A list or dict of an opaque argument."""

    _liger_fx_is_stand_in = True

    def __init__(self, origin: Origin) -> None:
        self._liger_fx_origin = origin
        set_node(self, origin.node)

    def __getitem__(self, key: Any) -> Any:
        origin = self._liger_fx_origin
        value = origin.example[origin.concrete(key)]
        if isinstance(value, PLAIN):
            return origin.answer("item", value, key)
        return origin.inner("item", key, value)

    def get(self, key: Any, default: Any = None) -> Any:
        """As a dict has it."""
        origin = self._liger_fx_origin
        value = origin.example.get(origin.concrete(key), default)
        if isinstance(value, PLAIN):
            return origin.answer("call", value, "get", key, default)
        raise CannotRecord(f"a {type(value).__name__} out of a mapping of an argument")

    def __setitem__(self, key: Any, value: Any) -> None:
        origin = self._liger_fx_origin
        recorder = origin.host.recorder
        with recorder.paused():
            arguments = (origin.node, recorder.argument(key), recorder.argument(value))
            recorder.create_node("call_function", operator.setitem, arguments)
        origin.change()

    def __len__(self) -> int:
        origin = self._liger_fx_origin
        return int(origin.answer("call", len(origin.example), "__len__"))

    def __bool__(self) -> bool:
        return len(self) > 0

    def __iter__(self) -> Any:
        raise CannotRecord("the items of an argument's list are gone through")

    def __contains__(self, key: Any) -> bool:
        origin = self._liger_fx_origin
        return bool(
            origin.answer("call", origin.concrete(key) in origin.example, "__contains__", key)
        )
