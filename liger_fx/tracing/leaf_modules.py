"""Which modules a trace calls instead of following, and what their results look like.

self.q_proj(x)        nn.Linear, a quantised or LoRA linear   ->  call_module q_proj
self.experts(x, ...)  a loop over the experts that were hit   ->  call_module experts, listed as
opaque
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.containers import containers_kept
from liger_fx.tracing.fakes import tensors_in
from liger_fx.tracing.memo import Unknowable, run_without_grad
from liger_fx.tracing.recorder import Recorder
from liger_fx.tracing.stand_ins import origin_of
from liger_fx.tracing.structure import number_at, other_sizes
from liger_fx.tracing.tree_state import class_of

T = torch.Tensor
_MODULE_INTERNALS = frozenset(nn.Module().__dict__)


def is_leaf(module: nn.Module) -> bool:
    """Whether the module becomes one call_module node as it stands."""
    kind = type(module)
    if kind.__module__.startswith(("torch.nn", "torch.ao.nn", "liger_fx.modules")):
        return not isinstance(module, nn.Sequential)
    return is_linear(module) or is_experts(module) or is_switched(module)


def is_switched(module: nn.Module) -> bool:
    """A wrapper that adapters can be switched off in (PEFT's modules_to_save): it looks at its
    switch at each call, and no guard does."""
    return hasattr(module, "_disable_adapters")


def is_parametrized_code(module: nn.Module) -> bool:
    """A module of other code than PyTorch's, whose class torch.nn.utils.parametrize derived."""
    kind = type(module)
    return kind.__module__ == parametrize.__name__ and not (
        kind.__mro__[1].__module__.startswith("torch.") or is_linear(module)
    )


def is_linear(module: nn.Module) -> bool:
    """A linear layer of any make: nn.Linear's subclasses, quantised ones, LoRA around one
    (base_layer)."""
    if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
        return True
    return (
        "Linear" in type(module).__name__
        and hasattr(module, "in_features")
        and hasattr(module, "out_features")
    )


def _features(module: Any) -> int | None:
    """How wide the result of a linear layer is whose code cannot run on fakes: a quantised one,
    adapters around it or not, whose code looks at the data; a tensor-parallel one, whose hooks talk
    to other processes. None for any other module."""
    if not is_linear(module) or not hasattr(module, "out_features"):
        return None
    if not all(p.is_floating_point() or p.is_complex() for p in module.parameters()):
        return int(module.out_features)
    weight: Any = getattr(module, "weight", None)
    if hasattr(weight, "to_local") and module._forward_hooks:
        with unset_fake_temporarily(), torch.no_grad():
            return int(weight.to_local().shape[0])
    return None


def is_experts(module: nn.Module) -> bool:
    """transformers' expert layers, whose implementation is chosen by the config and may loop over
    the data."""
    return hasattr(type(module), "_apply_gate") and type(module).__module__.startswith(
        "transformers"
    )


def infer_leaf(recorder: Recorder, module: Any, args: Any, kwargs: Any, *, concrete: bool) -> Any:
    """Fakes for what the leaf returns; ``concrete`` runs it on random data because its code cannot
    run on fakes."""
    if is_experts(module):
        hidden = args[0] if args else next(iter(kwargs.values()))
        return torch.empty_like(hidden)
    if _features(module) is not None:
        return run_on_fakes(module, args, kwargs)
    if concrete:
        return _infer_by_running(recorder, module, args, kwargs)

    # They are put back with the module's other attributes.
    for group, name, tensor, _ in offloaded(module.modules()):
        group[name] = recorder.world.of_real(tensor)
    for group, name, tensor in _sharded(module.modules()):
        group[name] = recorder.world.of_real(tensor)
    args, kwargs = pytree.tree_map(_simulated, (args, kwargs))

    def run() -> Any:
        with containers_kept(args, kwargs):
            return run_on_fakes(module, args, kwargs)

    try:
        key = _module_key(module)
    except Unknowable:
        return run_without_grad(run)
    return recorder.memo.infer(key, run, args, kwargs)


def run_on_fakes(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What the module's own code makes of fakes, no hook on it run."""
    features = _features(module)
    if features is None:
        return _forward_of(module)(*args, **kwargs)
    hidden = args[0] if args else next(iter(kwargs.values()))
    return hidden.new_empty((*hidden.shape[:-1], features))


def _forward_of(module: Any) -> Any:
    """What the module does when it is called: not what runs its graph if it is a block, nor what
    moves its weights."""
    own = module.__dict__.get("forward")
    if own is not None and not hasattr(module, "_hf_hook"):
        return own
    return MethodType(class_of(module).forward, module)


def offloaded(
    modules: Iterable[nn.Module],
) -> Iterator[tuple[dict[str, Any], str, torch.Tensor, torch.device]]:
    """The tensors on the meta device that hooks of accelerate put elsewhere when they are used:
    each with the group and the name that hold it, and where it goes."""
    for module in modules:
        hook = module.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is None:
                continue
            for group in (module._parameters, module._buffers):
                for name, tensor in list(group.items()):
                    if tensor is not None and tensor.is_meta:
                        yield group, name, tensor, torch.device(device)


def _sharded(
    modules: Iterable[nn.Module],
) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """The tensors of which each process has a part, with the group and the name that hold them.
    FSDP2 puts the whole in their place before the block around them runs."""
    for module in modules:
        for group in (module._parameters, module._buffers):
            for name, tensor in list(group.items()):
                if tensor is not None and hasattr(tensor, "to_local"):
                    yield group, name, tensor


def _simulated(value: Any) -> Any:
    """What a leaf's code may work with in place of a cache."""
    origin = origin_of(value)
    if origin is None:
        return value
    origin.change()
    return origin.simulated()


def _module_key(module: nn.Module) -> Hashable:
    """What a module's result can depend on besides its inputs: class, plain attributes,
    parameters, children."""
    plain = []
    for name, value in module.__dict__.items():
        if (name in _MODULE_INTERNALS and name != "training") or name == "_origins":
            continue
        if isinstance(value, torch.Tensor) or callable(value) or not isinstance(value, Hashable):
            raise Unknowable
        plain.append((name, type(value), value))
    tensors = [
        (name, None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.device))
        for group in (module._parameters, module._buffers)
        for name, t in group.items()
    ]
    children = [(name, child and _module_key(child)) for name, child in module._modules.items()]
    return type(module), tuple(plain), tuple(tensors), tuple(children)


def _infer_by_running(recorder: Recorder, module: Any, args: Any, kwargs: Any) -> Any:
    """Run the module on random data. Of how many tensors its result is, of which ranks and dtypes,
    must be the same for other data and at other sizes. A size that is so too is a number, one that
    always is that of an argument is this, and all others are read from the result when the graph
    runs. One that is an argument's size which could not be tried otherwise (its code takes but
    multiples of a window, say) is taken for that: it is checked when the graph runs.

    CannotRecord for results that a graph cannot take.
    """
    world = recorder.world
    ran_at: list[Mapping[sympy.Symbol, int]] = [world.examples] * len(_DRAWS)
    results = [_run_at(world.examples, draw, module, args, kwargs) for draw in _DRAWS]
    others = list(other_sizes(world, world.examples))
    for sizes in others:
        with contextlib.suppress(Exception):  # whatever its code says of such a call
            results.append(_run_at(sizes, torch.randn, module, args, kwargs))
            ran_at.append(sizes)
    if any(_without_sizes(other) != _without_sizes(results[0]) for other in results):
        raise CannotRecord("what it returns has other parts where its inputs are others")
    given: list[Any] = [
        t.shape for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)
    ]
    known = {
        size.node._expr: size
        for shape in given
        for size in shape
        if isinstance(size, torch.SymInt) and size.node._expr.free_symbols
    }

    tried = {s for at in ran_at for s, number in at.items() if number != world.examples[s]}
    # Of 0 and 1 operators ask, and what they are told would stay. So of the draws that one is the
    # example which gave the fewest of these.
    example = min(range(len(_DRAWS)), key=lambda i: _zeros_and_ones(results[i]))

    def size_of(found: tuple[int, ...]) -> Any:
        ran_elsewhere = len(found) > len(_DRAWS) or not others
        if not ran_elsewhere:
            return world.fresh_size(found[example], exact=True)
        runs = list(zip(ran_at, found, strict=True))
        same = [size for size in known.values() if all(number_at(size, at) == n for at, n in runs)]
        same.sort(key=lambda size: not tried.isdisjoint(size.node._expr.free_symbols))
        if same and tried.isdisjoint(same[0].node._expr.free_symbols):
            return same[0]
        if len({*found}) == 1:
            return found[0]
        return same[0] if same else world.fresh_size(found[example], exact=True)

    def as_fake(value: Any, *elsewhere: Any) -> Any:
        if isinstance(value, torch.Tensor):
            found = zip(value.shape, *(other.shape for other in elsewhere), strict=True)
            return torch.empty(
                [size_of(sizes) for sizes in found], dtype=value.dtype, device=value.device
            )
        if type(value) is int:
            return world.fresh_number(value)
        if isinstance(value, (bool, float, str)):
            raise CannotRecord(f"it returns {value!r}, which may be otherwise in another call")
        return None if value is None else Unseen()

    return pytree.tree_map(as_fake, *results)


# Much code of the kind asks whether something is positive.
_DRAWS: tuple[Callable[..., T], ...] = (
    torch.randn,
    lambda *args, **kwargs: torch.randn(*args, **kwargs).abs(),
    lambda *args, **kwargs: -torch.randn(*args, **kwargs).abs(),
)


class Unseen:
    """An object that a module returned which a trace does not follow: whatever is asked of it, or
    done with it, is refused."""

    def __getattribute__(self, name: str) -> Any:
        raise CannotRecord(f"{name} of what a module returns that is called")

    def __bool__(self) -> bool:
        raise CannotRecord("whether what a module returns that is called is empty")


def _zeros_and_ones(result: Any) -> int:
    tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    return sum(size in (0, 1) for tensor in tensors for size in tensor.shape)


def _without_sizes(result: Any) -> Any:
    """What is in a result: ranks and dtypes of its tensors, other values but ints."""

    def kind(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.ndim, value.dtype
        return value if isinstance(value, (bool, float, str)) else type(value)

    parts, structure = pytree.tree_flatten(result)
    return list(map(kind, parts)), structure


def _run_at(
    sizes: Mapping[sympy.Symbol, int], draw: Callable[..., T], module: Any, args: Any, kwargs: Any
) -> Any:
    """What the module makes of random data of these sizes."""

    def example(value: Any) -> Any:
        origin = origin_of(value)
        if origin is not None:  # a cache, which it may change
            origin.change()
            # No copy of a fake: it would copy the fake mode, and free the mode's memory twice.
            memo = {
                id(t): example(t) if isinstance(t, FakeTensor) else t.detach().clone()
                for t in tensors_in(origin.example)
            }
            return copy.deepcopy(origin.example, memo)
        if isinstance(value, FakeTensor):
            shape = [number_at(size, sizes) for size in value.shape]
            if value.dtype.is_floating_point:
                return draw(shape, device=value.device).to(value.dtype)
            return torch.ones(shape, dtype=value.dtype, device=value.device)
        return number_at(value, sizes)

    with unset_fake_temporarily(), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        arguments, keywords = pytree.tree_map(example, (args, kwargs))
        with containers_kept(arguments, keywords):
            return _forward_of(module)(*arguments, **keywords)


def real_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's data, also while a trace runs."""
    with unset_fake_temporarily():
        return tensor.detach().clone()


@contextmanager
def tensors_replaced(module: nn.Module, by: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Other tensors in the place of buffers and plain tensors of the module and those below, so
    that what is written in place does not reach the model; what the module's code puts there itself
    stays."""
    replaced = []
    for group in [g for m in module.modules() for g in (m._buffers, m.__dict__)]:
        for name, value in group.items():
            if isinstance(value, torch.Tensor):
                group[name] = twin = by(value)
                replaced.append((group, name, value, twin))
    try:
        yield
    finally:
        for group, name, value, twin in replaced:
            if group.get(name) is twin:
                group[name] = value
