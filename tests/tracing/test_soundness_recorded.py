"""What a trace must record, guard or refuse of what a model's code does besides computing: the
optimised model gives what the original gives, or says that it cannot.

Each example stands in a module inside a model, where a refusal leaves that module alone, and as the
model itself, where it is an error.
"""

from __future__ import annotations

import collections
import contextvars
import copy
import functools
import itertools
import os
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import liger_fx
from liger_fx.errors import SaveError, TraceError
from liger_fx.modules import LigerRMSNorm

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -grad


class Scaled(torch.autograd.Function):
    """With arguments that are no tensors, in the newer style."""

    @staticmethod
    def forward(x: torch.Tensor, factor: float, name: str = "plain") -> torch.Tensor:
        return x * (2 if name == "plain" else 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad * ctx.factor, None, None


class Split(torch.autograd.Function):
    """Several results, one of them no tensor, and a Function inside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: list[int]) -> Any:
        first, second = Reverse.apply(x).split(sizes, -1)
        return first.clone(), second.clone(), "two"

    @staticmethod
    def backward(ctx: Any, first: torch.Tensor, second: torch.Tensor, _: Any) -> Any:
        return torch.cat([first * 5, second * 7], -1), None


class Straight(torch.autograd.Function):
    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.mark_non_differentiable()
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 3


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 11


class Collecting(torch.autograd.Function):
    """Fills a list that it is given."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: list[Any]) -> torch.Tensor:
        kept.append(1)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * 13, None


reverse = Reverse.apply


def local_function(s: Any, x: torch.Tensor) -> torch.Tensor:
    class Local(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 17

    return Local.apply(s.lin(x))


def split_function(s: Any, x: torch.Tensor) -> torch.Tensor:
    first, second, name = Split.apply(s.lin(x), [3, 5])
    return torch.cat([second, first], -1) * len(name)


def collecting_function(s: Any, x: torch.Tensor) -> torch.Tensor:
    kept: list[int] = []
    return Collecting.apply(s.lin(x), kept) * len(kept)


def checkpointed(reentrant: bool) -> Callable[..., torch.Tensor]:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda y: Reverse.apply(s.lin(y)).sin(), x * 2, use_reentrant=reentrant)

    return forward


FUNCTIONS = {
    "plain": lambda s, x: Reverse.apply(s.lin(x)),
    "kept under a name": lambda s, x: reverse(s.lin(x)),
    "of the input alone": lambda s, x: s.lin(reverse(x).cos()),
    "arguments that are no tensors": lambda s, x: Scaled.apply(s.lin(x), 0.25, "other"),
    "arguments by name": lambda s, x: Scaled.apply(s.lin(x), factor=0.25),
    "a size as argument": lambda s, x: Scaled.apply(s.lin(x), x.shape[0]),
    "several results": split_function,
    "of a class in a class": lambda s, x: Straight.Inner.apply(Straight.apply(s.lin(x) * 4)),
    "in place": lambda s, x: InPlace.apply(s.lin(x) + 0) * 2,
    "fills a list": collecting_function,
    "of a function": local_function,
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
}


def swallowed_branch(s: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        return s.lin(x) * 2 if x.abs().max() > 0 else x
    except RuntimeError:
        return s.lin(x)


def swallowed_everything(s: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        scale = x.abs().max().item()
        scale = 2.0 if scale > 0 else 1.0
    except BaseException:
        scale = 4.0
    return s.lin(x) * scale


def swallowed_length(s: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        return s.lin(x) * len([v for v in x[0].tolist() if v * v >= 0])
    except Exception:
        return s.lin(x)


def swallowed_numpy(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.lin(x)
    try:
        return y + float(x.detach().numpy().size)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return y


def swallowed_view(s: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        return s.lin(x).view(4, 8) * 3
    except RuntimeError:
        return s.lin(x)


def swallowed_with_another(s: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        number = int((x * x).sum() >= 0)
    except Exception as error:
        raise ValueError("not here") from error
    return s.lin(x) * (number + 1)


SWALLOWED = {
    f.__name__: f
    for f in (
        swallowed_branch, swallowed_everything, swallowed_length, swallowed_numpy, swallowed_view,
        swallowed_with_another,
    )
}  # fmt: skip


def data_assigned(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.lin(x)
    y.data = y.data * 3
    return y * 1.0


def data_of_a_view(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.lin(x)
    y.data[:, :2] = 5.0
    return y.square()


def foreach(s: Any, x: torch.Tensor) -> torch.Tensor:
    y, z = s.lin(x), x * 2
    torch._foreach_add_([y, z], 1.0)
    torch._foreach_mul_([y, z], [2.0, 3.0])
    return y + z


def requires_grad_written(s: Any, x: torch.Tensor) -> torch.Tensor:
    leaf = x.detach().clone()
    leaf.requires_grad = True
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(leaf.square().sum(), leaf)
    return s.lin(x) + grad


def retained(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.lin(x)
    if torch.is_grad_enabled():
        y.retain_grad()
    return y * 2


def inference(s: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        t = s.lin(x) * 2
    return s.lin(x) + t.clone()


@torch.inference_mode()
def _features(s: Any, x: torch.Tensor) -> torch.Tensor:
    return s.lin(x).tanh()


def saved_by_hooks(s: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2):
        y = s.lin(x).sin()
    return y


def hooked(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.lin(x)
    if torch.is_grad_enabled():
        y.register_hook(lambda grad: grad * 0.5)
    return y


EFFECTS = {
    "data assigned": data_assigned,
    "data of a view": data_of_a_view,
    "foreach": foreach,
    "requires_grad written": requires_grad_written,
    "retain_grad": retained,
    "inference mode": inference,
    "inference mode as a decorator": lambda s, x: s.lin(x) + _features(s, x).clone(),
    "hooks on what is saved": saved_by_hooks,
    "hook on a tensor": hooked,
}


def forked(s: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        noise = torch.randn_like(x)
    return s.lin(x) + noise + torch.randn_like(x)


def seeded(s: Any, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(7)
    return s.lin(x) + torch.randn_like(x)


def set_back(s: Any, x: torch.Tensor) -> torch.Tensor:
    state = torch.get_rng_state()
    first = torch.rand_like(x)
    torch.set_rng_state(state)
    return s.lin(x) + first - torch.rand_like(x)


_uniform = random.uniform


def seeded_the_same(s: Any, x: torch.Tensor) -> torch.Tensor:
    random.seed(1)
    return s.lin(x) * random.random()


RANDOM = {
    "layer drop": lambda s, x: s.lin(x) if random.random() < 0.5 else x * 1.0,
    "a method kept under a name": lambda s, x: s.lin(x) * _uniform(0, 1),
    "choice": lambda s, x: s.lin(x) * random.choice([1.0, 2.0, 3.0]),
    "seeded": seeded_the_same,
    "numpy": lambda s, x: s.lin(x) * float(np.random.rand()),
    "numpy, permutation": lambda s, x: s.lin(x)[:, torch.from_numpy(np.random.permutation(8))],
    "torch seeded": seeded,
    "torch forked": forked,
    "torch set back": set_back,
    "of a generator of its own": lambda s, x: s.lin(x) * s.rng.random(),
    "of a generator of numpy's": lambda s, x: s.lin(x) * float(s.np_rng.random()),
}


class Slots:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Holder:
    def __init__(self) -> None:
        self.inner = types.SimpleNamespace(n=0)


COUNTER = {"n": 0}
CALLS = 0
IDS = itertools.count()
SEEN: collections.deque[int] = collections.deque(maxlen=3)
LEVEL = contextvars.ContextVar("LEVEL", default=0)
HISTORY = np.zeros(3)


def _increase() -> int:
    COUNTER["n"] += 1
    return COUNTER["n"]


def global_number(s: Any, x: torch.Tensor) -> torch.Tensor:
    global CALLS
    CALLS += 1
    return s.lin(x) * CALLS


def global_deque(s: Any, x: torch.Tensor) -> torch.Tensor:
    SEEN.append(len(SEEN))
    return s.lin(x) * len(SEEN)


def global_array(s: Any, x: torch.Tensor) -> torch.Tensor:
    HISTORY[1] += 1
    return s.lin(x) * float(HISTORY.sum())


def context(s: Any, x: torch.Tensor) -> torch.Tensor:
    LEVEL.set(LEVEL.get() + 1)
    return s.lin(x) * LEVEL.get()


def environment(s: Any, x: torch.Tensor) -> torch.Tensor:
    return s.lin(x) * float(os.environ.get("LIGER_FX_TEST_FACTOR", "1"))


def closure() -> Callable[..., torch.Tensor]:
    n, log = 0, []  # type: ignore[var-annotated]

    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal n
        n += 1
        log.append(n)
        return s.lin(x) * (n + len(log))

    return forward


def namespace(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.space.n += 1
    return s.lin(x) * s.space.n


def deeper(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.holder.inner.n += 1
    return s.lin(x) * s.holder.inner.n


def slots(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.slots.n += 1
    return s.lin(x) * s.slots.n


def own_deque(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.deque.rotate(1)
    return s.lin(x) * s.deque[0]


def own_array(s: Any, x: torch.Tensor) -> torch.Tensor:
    s.array += 1
    return s.lin(x) * float(s.array[0])


def of_the_class(s: Any, x: torch.Tensor) -> torch.Tensor:
    type(s).count += 1
    return s.lin(x) * type(s).count


def default_argument(s: Any, x: torch.Tensor, log: list[int] = []) -> torch.Tensor:  # noqa: B006
    log.append(1)
    return s.lin(x) * len(log)


def on_a_function(s: Any, x: torch.Tensor) -> torch.Tensor:
    _increase.calls = getattr(_increase, "calls", 0) + 1  # type: ignore[attr-defined]
    return s.lin(x) * _increase.calls  # type: ignore[attr-defined]


STATE: dict[str, Callable[[], Callable[..., torch.Tensor]]] = {
    "a dictionary of the file": lambda: lambda s, x: s.lin(x) * _increase(),
    "a number of the file": lambda: global_number,
    "a deque of the file": lambda: global_deque,
    "an array of the file": lambda: global_array,
    "an iterator of the file": lambda: lambda s, x: s.lin(x) * next(IDS),
    "a context variable": lambda: context,
    "a closure": closure,
    "a namespace": lambda: namespace,
    "an object in an object": lambda: deeper,
    "slots": lambda: slots,
    "a deque": lambda: own_deque,
    "an array": lambda: own_array,
    "an iterator": lambda: lambda s, x: s.lin(x) * next(s.ids),
    "a class": lambda: of_the_class,
    "a default argument": lambda: default_argument,
    "a function's attribute": lambda: on_a_function,
}


class Example(nn.Module):
    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.space, self.holder, self.slots = types.SimpleNamespace(n=0), Holder(), Slots()
        self.deque, self.array, self.ids = (
            collections.deque([2, 3, 5]),
            np.zeros(2),
            iter([7, 8, 9, 4]),
        )
        self.rng, self.np_rng = random.Random(3), np.random.default_rng(3)


def example(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return type("Example", (Example,), {"forward": forward, "count": 0})()


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.norm, self.inner = nn.Linear(8, 8), nn.RMSNorm(8), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.norm(self.before(x)))


def fresh_world(model: nn.Module) -> Any:
    """Where everything outside the modules stands at the beginning."""
    global CALLS, IDS
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        if "count" in vars(cls):
            cls.count = 0  # type: ignore[attr-defined]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    COUNTER["n"], CALLS, IDS = 0, 0, itertools.count(2)
    SEEN.clear(), HISTORY.fill(0), LEVEL.set(0)
    _increase.__dict__.pop("calls", None)
    default_argument.__defaults__[0].clear()  # type: ignore[index]


def world() -> Any:
    """What of that a forward may have changed."""
    return (COUNTER["n"], CALLS, repr(IDS), list(SEEN), HISTORY.tolist(), LEVEL.get(),
            random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2],
            torch.get_rng_state().tolist(), len(default_argument.__defaults__[0]),
            getattr(_increase, "calls", 0))  # fmt: skip


def steps(model: nn.Module, calls: list[torch.Tensor]) -> Iterator[Any]:
    """Each call's result, gradients and what it leaves behind."""
    fresh_world(model)
    for x in calls:
        model.zero_grad()
        x = x.clone().requires_grad_()
        result = model(x)
        result.float().square().sum().backward()
        yield [result.detach(), x.grad, *(p.grad for p in model.parameters())], world()


def assert_alike(original: nn.Module, opt: nn.Module) -> None:
    calls = [X, X * 0.5, X[:2].repeat(2, 1)]
    for (wanted, state), (found, own) in zip(
        list(steps(original, calls)), list(steps(opt, calls)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert own == state


def assert_told_or_alike(
    make: Callable[[], Callable[..., Any]], *, inside: bool
) -> nn.Module | None:
    """Alike, with the norm around it rewritten; of the whole model an error may say why not."""
    # Two of everything: what is kept in the code itself must not be shared.
    model = Around(example(make())) if inside else example(make())
    original = copy.deepcopy(model)
    if closed_over(make()):
        original = Around(example(make())) if inside else example(make())
        original.load_state_dict(model.state_dict())
    fresh_world(model)
    before = world()
    try:
        opt = liger_fx.optimize(model, (X,))
    except TraceError:
        assert not inside
        assert world() == before
        return None
    assert world() == before, "a trace leaves things behind"
    if inside:
        assert isinstance(opt.norm, LigerRMSNorm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_alike(original, opt)
    return opt


def closed_over(forward: Any) -> bool:
    return getattr(forward, "__closure__", None) is not None


PLACES = pytest.mark.parametrize("inside", [True, False])


@PLACES
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_keeps_its_backward(name: str, inside: bool) -> None:
    assert_told_or_alike(lambda: FUNCTIONS[name], inside=inside)


def test_a_function_is_a_node() -> None:
    model = example(FUNCTIONS["several results"])
    opt: Any = liger_fx.optimize(model, (X,))
    assert "apply_function" in str(opt.graph) and not opt.report.opaque
    again = copy.deepcopy(opt)
    assert_alike(model, again)


def test_a_function_is_not_saved(tmp_path: Any) -> None:
    class Reversing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Reverse.apply(x) * 2

    opt = liger_fx.optimize(Around(Reversing()), (X,))
    with pytest.raises(SaveError, match="apply_function"):
        liger_fx.save(opt, tmp_path / "saved", weights=False)


def test_other_threads_call_functions_as_ever() -> None:
    method = torch.autograd.Function.apply
    code = method.__func__.__code__  # type: ignore[attr-defined]
    liger_fx.optimize(example(FUNCTIONS["plain"]), (X,))
    with pytest.raises(TraceError):
        liger_fx.optimize(example(FUNCTIONS["of a function"]), (X,))
    assert torch.autograd.Function.apply.__func__.__code__ is code  # type: ignore[attr-defined]


@PLACES
@pytest.mark.parametrize("name", SWALLOWED)
def test_what_a_model_catches_is_not_lost(name: str, inside: bool) -> None:
    assert_told_or_alike(lambda: SWALLOWED[name], inside=inside)


@PLACES
@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect_is_not_lost(name: str, inside: bool) -> None:
    assert_told_or_alike(lambda: EFFECTS[name], inside=inside)


def check_of_all(s: Any, x: torch.Tensor) -> torch.Tensor:
    torch._check_tensor_all(x > -100)
    return s.lin(x)


def check_of_a_number(s: Any, x: torch.Tensor) -> torch.Tensor:
    torch._check((x > -100).sum().item() == x.shape[0] * 8, lambda: "below")
    return s.lin(x)


def check_of_another_kind(s: Any, x: torch.Tensor) -> torch.Tensor:
    torch._check_value((x < -100).sum().item() <= 0, lambda: "below")
    return s.lin(x)


def check_of_transformers(s: Any, x: torch.Tensor) -> torch.Tensor:
    from transformers.utils import torch_compilable_check

    torch_compilable_check((x > -100).all(), "below")
    torch_compilable_check(x[x > -100].numel() == x.numel(), "below")
    return s.lin(x)


def check_at_once(s: Any, x: torch.Tensor) -> torch.Tensor:
    torch._assert_async((x > -100).all())
    return s.lin(x)


CHECKS = (
    check_of_all,
    check_of_a_number,
    check_of_another_kind,
    check_of_transformers,
    check_at_once,
)


@PLACES
@pytest.mark.parametrize("forward", CHECKS, ids=lambda f: f.__name__)
def test_a_check_stays(forward: Any, inside: bool) -> None:
    model = example(forward)
    opt: Any = liger_fx.optimize(model, (X,))
    assert_alike(model, opt)
    low = torch.full((4, 8), -1000.0)
    with pytest.raises(Exception) as wanted:
        model(low)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(wanted.value)) as found:
            opt(low)
    assert type(found.value) is type(wanted.value)


@PLACES
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_drawn_at_each_call(name: str, inside: bool) -> None:
    assert_told_or_alike(lambda: RANDOM[name], inside=inside)


@PLACES
@pytest.mark.parametrize("name", STATE)
def test_state_is_changed_at_each_call(name: str, inside: bool) -> None:
    assert_told_or_alike(STATE[name], inside=inside)


def test_the_environment_is_read_at_each_call(monkeypatch: Any) -> None:
    monkeypatch.setenv("LIGER_FX_TEST_FACTOR", "2")
    model = Around(example(environment))
    opt = liger_fx.optimize(model, (X,))
    monkeypatch.setenv("LIGER_FX_TEST_FACTOR", "3")
    assert_alike(model, opt)


def test_what_another_module_counts_is_read_at_each_call() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.writer, self.reader = example(lambda s, x: s.lin(x) * _increase()), Reader()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.reader(self.writer(x))

    class Reader(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * COUNTER["n"]

    model = Around(Both())
    fresh_world(model)
    opt = liger_fx.optimize(model, (X,))
    assert_alike(model, opt)


@functools.lru_cache
def triangle(n: Any) -> torch.Tensor:
    return torch.ones(n, n).tril()


@functools.cache
def _frequencies(n: int, base: float) -> torch.Tensor:
    return base ** -torch.linspace(0, 1, n)


def through_a_function(n: int) -> torch.Tensor:
    return _frequencies(n, base=10.0)


TABLES: dict[int, torch.Tensor] = {}


def table(n: int) -> torch.Tensor:
    if n not in TABLES:
        TABLES[n] = torch.linspace(0, 1, n)
    return TABLES[n]


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    @functools.lru_cache  # noqa: B019
    def scale(self, n: int) -> torch.Tensor:
        return torch.full((n,), 2.0)

    @staticmethod
    @functools.lru_cache
    def shift(n: int) -> torch.Tensor:
        return torch.arange(n).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.scale(8) + self.shift(8)


CACHES: dict[str, Callable[[], nn.Module]] = {
    "lru_cache": lambda: example(lambda s, x: s.lin(x) @ triangle(8)),
    "of a size": lambda: example(lambda s, x: triangle(x.shape[0]) @ s.lin(x)),
    "through a function": lambda: example(lambda s, x: s.lin(x) * through_a_function(8)),
    "a dictionary": lambda: example(lambda s, x: s.lin(x) * table(8)),
    "methods": Cached,
}


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_holds_nothing_of_a_trace(name: str, filled: bool) -> None:
    caches = triangle, _frequencies, Cached.scale, Cached.shift
    for cached in caches:
        cached.cache_clear()
    TABLES.clear()
    model = Around(CACHES[name]())
    if filled:
        model(X)
    sizes = [cached.cache_info().currsize for cached in caches], dict(TABLES)
    opt = liger_fx.optimize(model, (X,))
    assert sizes == ([cached.cache_info().currsize for cached in caches], TABLES)
    assert (triangle, _frequencies, Cached.scale, Cached.shift) == caches
    assert type(model(X)) is torch.Tensor
    assert_alike(model, opt)


def test_the_file_is_put_back() -> None:
    own = sys.modules[__name__]
    before = {name: id(value) for name, value in vars(own).items() if name != "CALLS"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("a number of the file", "an iterator of the file"):
            liger_fx.optimize(Around(example(STATE[name]())), (X,))
    assert {k: id(v) for k, v in vars(own).items() if k != "CALLS"} == before
