"""What Python itself can be asked of a trace's values is answered as the original answers it, or
refused."""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import functools
import operator
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import liger_fx
from liger_fx.errors import FallbackWarning, LigerFxError
from tests.support.original import RIGHT, TOLD, Small, beside

T = torch.Tensor


def rows(*sizes: int) -> tuple[T]:
    return (torch.randn(*sizes, 8),)


# -- the class of a value --------------------------------------------------------------------------


class Weight(nn.Parameter):
    """A parameter of another class."""


def matched(m: Any, x: T) -> T:
    size: Any = x.shape[0]
    match size:
        case int():
            return m.lin(x) * 2
        case _:
            return m.lin(x)


KINDS: dict[str, Any] = {
    "type of a tensor": lambda m, x: m.lin(x) * (2 if type(x) is torch.Tensor else 1),
    "type of a result": lambda m, x: m.lin(x) * (2 if type(x * 2) is torch.Tensor else 1),
    "an input is a parameter": lambda m, x: m.lin(x) * (2 if isinstance(x, nn.Parameter) else 1),
    "one of several": lambda m, x: m.lin(x) * (2 if isinstance(x, (str, nn.Parameter)) else 1),
    "type of a weight": lambda m, x: m.lin(x) * (2 if type(m.lin.weight) is nn.Parameter else 1),
    "a weight": lambda m, x: m.lin(x) * (2 if isinstance(m.lin.weight, Weight) else 1),
    "type of a size": lambda m, x: m.lin(x) * (2 if type(x.shape[0]) is int else 1),
    "a size": lambda m, x: m.lin(x) * (2 if isinstance(x.shape[0], int) else 1),
    "a part of a size": lambda m, x: m.lin(x) * (2 if isinstance(x.shape[0] / 2, float) else 1),
    "a comparison": lambda m, x: m.lin(x) * (2 if type(x.shape[0] > 2) is bool else 1),
    "__class__": lambda m, x: m.lin(x) * (2 if x.__class__ is torch.Tensor else 1),
    "a case": matched,
}


def other_weight(m: Any) -> None:
    m.lin.weight = Weight(m.lin.weight.detach())


@pytest.mark.parametrize("name", KINDS)
def test_the_class_of_a_value_is_that_of_a_real_one(name: str) -> None:
    parameter = nn.Parameter(torch.randn(4, 8))
    beside(Small(KINDS[name]), rows(4), [rows(4), (parameter,), rows(6)])
    beside(Small(KINDS[name]), (parameter,), [rows(4), (parameter,), rows(6)])
    beside(Small(KINDS[name]), rows(4), change=other_weight)


def test_what_holds_for_every_plain_tensor_is_no_reason_for_another_graph() -> None:
    for name in ("type of a tensor", "type of a size", "a part of a size"):
        assert beside(Small(KINDS[name]), rows(4), [rows(4), rows(6)]) == RIGHT


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, h: T) -> T:
        return self.lin(h)


def by_kind(m: Any, x: T) -> T:
    for layer in m.layers:
        x = layer(x) * (2 if type(layer) is Layer else 3)
    return x


def test_a_block_is_of_its_own_class() -> None:
    model = Small(by_kind, layers=nn.ModuleList([Layer(), Layer()]))
    assert beside(model, rows(4), [rows(4), rows(6)]) == RIGHT


def test_the_files_of_a_model_have_no_other_names_after_a_trace() -> None:
    liger_fx.optimize(Small(KINDS["type of a tensor"]), rows(4))
    with pytest.raises(LigerFxError):
        liger_fx.optimize(Small(lambda m, x: m.lin(x) * len({id(x)})), rows(4))
    assert globals().keys().isdisjoint({"type", "isinstance", "id"})


# -- who a value is --------------------------------------------------------------------------------


@functools.cache
def table(size: int) -> T:
    return torch.arange(float(size))


def dropped(m: Any, x: T, y: T) -> T:
    h = m.lin(x) + y
    return h * (2 if F.dropout(h, 0.5, False) is h else 1)


WHO: dict[str, Any] = {
    "id": lambda m, x, y: m.lin(x) * len({id(x), id(y)}),
    "a dictionary": lambda m, x, y: m.lin(x) * len({x: 1, y: 2}),
    "a set": lambda m, x, y: m.lin(x) * len({x, y}),
    "hash": lambda m, x, y: m.lin(x) * (2 if hash(x) == hash(y) else 1),
    "in a list": lambda m, x, y: m.lin(x) * (2 if y in [x, y] else 1),
    "index": lambda m, x, y: m.lin(x) * ([y, x].index(y) + 1),
    "equal lists": lambda m, x, y: m.lin(x) * (2 if [y] == [x] else 1),
    "operator.is_": lambda m, x, y: m.lin(x) * (2 if operator.is_(x, y) else 1),
    "of an attribute": lambda m, x, y: m.lin(x) * (2 if [x, y][1] is x else 1),
    "a cast": lambda m, x, y: m.lin(x) * (2 if x.to(torch.float32) is x else 1),
    "a layout": lambda m, x, y: m.lin(x) * (2 if x.contiguous() is x else 1),
    "idle dropout": dropped,
    "what a cache gives": lambda m, x, y: m.lin(x) * (2 if table(8) is table(8) else 1),
    "an idle module": lambda m, x, y: m.lin(x) * (2 if m.idle(x) is x else 1),
}


@pytest.mark.parametrize("name", WHO)
@pytest.mark.parametrize("first", [0, 1])
def test_which_values_are_one_object(name: str, first: int) -> None:
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    calls = [(x, y), (x, x), (torch.randn(8, 4).t(), y)]
    model = Small(WHO[name], idle=nn.Dropout()).eval()
    try:
        beside(model, calls[first], calls)
    except RuntimeError as error:  # the original's own: a comparison of tensors is no bool
        assert "Boolean value" in str(error)


def test_how_often_a_tensor_was_written_to_is_refused() -> None:
    assert beside(Small(lambda m, x: m.lin(x) * (x._version + 1)), rows(4)) == TOLD


@pytest.mark.parametrize(
    "asks",
    [lambda w: w.stride(0), lambda w: 2 if w.is_contiguous() else 1, lambda w: 1 + w.stride()[1]],
)
def test_how_a_parameter_lies_in_memory(asks: Any) -> None:
    def change(m: Any) -> None:
        m.lin.weight = nn.Parameter(m.lin.weight.detach().t().contiguous().t())

    model = Small(lambda m, x: m.lin(x) * asks(m.lin.weight))
    assert beside(model, rows(4), change=change) == RIGHT


def test_a_parameter_that_is_sparse_later() -> None:
    def change(m: Any) -> None:
        m.table = nn.Parameter(torch.eye(8).to_sparse(), requires_grad=False)

    def forward(m: Any, x: T) -> T:
        return m.lin(x) * (2 if m.table.layout is torch.strided else 1)

    model = Small(forward)
    model.table = nn.Parameter(torch.eye(8), requires_grad=False)
    assert beside(model, rows(4), change=change) == RIGHT


# -- sizes as Python's numbers ---------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "f-string": lambda m, x: m.lin(x) * len(f"{x.shape[0]}"),
    "with a format": lambda m, x: m.lin(x) * int(f"{x.shape[0]:03d}"),
    "str": lambda m, x: m.lin(x) * len(str(x.shape[0])),
    "repr": lambda m, x: m.lin(x) * len(repr(x.shape[0])),
    "percent": lambda m, x: m.lin(x) * int("%d" % x.shape[0]),  # noqa: UP031
    "text of a shape": lambda m, x: m.lin(x) * len(str(x.shape)),
    "text of a fraction": lambda m, x: m.lin(x) * float(str(x.shape[0] / 4)),
    "text of a comparison": lambda m, x: m.lin(x) * len(str(x.shape[0] > 5)),
    "key": lambda m, x: m.lin(x) * {4: 2, 12: 3}.get(x.shape[0], 5),
    "set": lambda m, x: m.lin(x) * (2 if x.shape[0] in {4, 5} else 1),
    "key of a shape": lambda m, x: m.lin(x) * {(4, 8): 2}.get(tuple(x.shape), 5),
    "hash": lambda m, x: m.lin(x) * (hash(x.shape[0]) % 5),
    "bits": lambda m, x: m.lin(x) * x.shape[0].bit_length(),
    "a method of floats": lambda m, x: m.lin(x) * (2 if (x.shape[0] / 8).is_integer() else 1),
    "index": lambda m, x: m.lin(x) * operator.index(x.shape[0]),
    "range": lambda m, x: m.lin(x) * sum(range(x.shape[0])),
    "a list of so many": lambda m, x: m.lin(x) * len([0] * x.shape[0]),
    "bytes": lambda m, x: m.lin(x) * len(bytes(x.shape[0])),
    "chr": lambda m, x: m.lin(x) * ord(chr(x.shape[0])),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_size_says_what_its_number_says(name: str) -> None:
    beside(Small(SIZES[name]), rows(4), [rows(n) for n in (4, 12, 1, 5)])
    assert beside(Small(SIZES[name]), rows(4), [rows(4)]) == RIGHT


def test_the_text_of_a_size_in_the_message_of_a_check_asks_nothing() -> None:
    def forward(m: Any, x: T) -> T:
        torch._check(
            x.shape[0] > 2,
            lambda: f"{x.shape[0]} rows",
        )
        torch._check_tensor_all(x < 1e6, lambda: f"of {x.shape[0]} rows, 8 wide")
        return m.lin(x)

    opt = liger_fx.optimize(Small(forward), rows(4))
    assert opt.plans[0].guards.sizes == ("x_0 > 2", "x_1 == 8")
    assert "of ? rows, 8 wide" in opt.code
    assert beside(Small(forward), rows(4), [rows(4), rows(6)]) == RIGHT


# -- containers that are returned ------------------------------------------------------------------


class Kind(enum.Enum):
    SUM = 1
    MEAN = 2


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    """A tuple with a method."""

    x: T
    label: Any = None

    def doubled(self) -> T:
        return self.x * 2


@dataclass
class Facts:
    """An object with fields."""

    h: T
    rows: int = 0
    inner: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    """One that cannot be written to, and has no dictionary."""

    h: T


class Rows(list[Any]):
    """A list of a class of its own."""


class Noted(dict[str, Any]):
    """A mapping with an attribute."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.note = len(items)


class Pair(tuple[Any, ...]):
    """A tuple that is made in another way."""

    def __new__(cls, a: Any, b: Any) -> Pair:
        return super().__new__(cls, (a, b))


class Name(str):
    """A text of another class."""


RETURNED: dict[str, Any] = {
    "named tuple": lambda m, x: Point(m.lin(x), [Point(x * 2)]),
    "dataclass": lambda m, x: Facts(m.lin(x), x.shape[0], {"in": [Frozen(x * 2)]}),
    "ordered": lambda m, x: collections.OrderedDict(b=m.lin(x), a=x * 2),
    "a list's class": lambda m, x: Rows([m.lin(x)]),
    "a shape": lambda m, x: (m.lin(x), x.shape),
    "a result of an operator": lambda m, x: m.lin(x).max(-1),
    "keys": lambda m, x: {Kind.SUM: m.lin(x), ("a", Level.LOW): x * 2, 1.5: x * 3, None: x, 2: x},
    "members": lambda m, x: [m.lin(x), Kind.MEAN, Level.LOW, True, None, ..., float("inf"), 1j],
    "attributes": lambda m, x: Noted(a=m.lin(x)),
    "another constructor": lambda m, x: Pair(m.lin(x), 1),
    "with a default": lambda m, x: collections.defaultdict(list, a=m.lin(x)),
    "a text's class": lambda m, x: (m.lin(x), Name("a")),
    "bytes": lambda m, x: (m.lin(x), b"ab"),
    "a deque": lambda m, x: collections.deque([m.lin(x)]),
}
REFUSED = {"attributes", "another constructor", "with a default", "a text's class", "bytes",
           "a deque"}  # fmt: skip


def assert_alike(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, T):
        torch.testing.assert_close(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert list(map(type, found)) == list(map(type, expected))
        assert_alike(list(found.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_alike(ours, theirs)
    elif isinstance(expected, (Facts, Frozen)):
        for name in type(expected).__dataclass_fields__:
            assert_alike(getattr(found, name), getattr(expected, name))
    else:
        assert found == expected


@pytest.mark.parametrize("name", RETURNED)
def test_results_are_of_their_class(name: str) -> None:
    model = Small(RETURNED[name])
    original = copy.deepcopy(model)
    if name in REFUSED:
        with pytest.raises(LigerFxError, match="more than its|Python object"):
            liger_fx.optimize(model, rows(4))
        return
    opt = liger_fx.optimize(model, rows(4))
    for call in (rows(4), rows(6)):
        assert_alike(opt(*call), original(*call))
    assert not opt.report.fallbacks


def test_methods_of_a_result_work() -> None:
    opt = liger_fx.optimize(Small(RETURNED["named tuple"]), rows(4))
    found = opt(*rows(4))
    torch.testing.assert_close(found.doubled(), found.x * 2)


def test_what_stands_in_two_places_is_one_object() -> None:
    def forward(m: Any, x: T) -> Any:
        held = [m.lin(x)]
        facts = Facts(x * 2, inner=held)
        return held, {"held": held, "facts": facts}, facts

    held, inside, facts = liger_fx.optimize(Small(forward), rows(4))(*rows(4))
    assert inside["held"] is held and inside["facts"] is facts and facts.inner is held


class Returns(nn.Module):
    def __init__(self, makes: Any) -> None:
        super().__init__()
        self.lin, self.makes = nn.Linear(8, 8), makes

    def forward(self, h: T) -> Any:
        return self.makes(self.lin(h))


INSIDE: dict[str, tuple[Any, Any]] = {
    "named tuple": (lambda h: Point(h), lambda r: r.x),
    "dataclass": (lambda h: Facts(h), lambda r: r.h),
    "keys": (lambda h: {Kind.SUM: h, ("a", 1): h * 2}, lambda r: r[Kind.SUM] + r["a", 1]),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_block_inside_returns_a_container(name: str) -> None:
    makes, reads = INSIDE[name]

    def forward(m: Any, x: T) -> T:
        for layer in m.layers:
            x = reads(layer(x))
        return x

    model = Small(forward, layers=nn.ModuleList([Returns(makes), Returns(makes)]))
    beside(model, rows(4), [rows(4), rows(6)])


# -- containers that are given ---------------------------------------------------------------------


def appended(m: Any, x: T, held: Any) -> T:
    held.append(m.lin(x))
    return x * 2


def set_in(m: Any, x: T, held: Any) -> T:
    held["h"] = m.lin(x)
    return x * 2


def sorted_away(m: Any, x: T, held: Any) -> T:
    held.reverse()
    return m.lin(x)


class Appends(nn.Module):
    def forward(self, h: T, held: list[T]) -> T:
        held.append(h * 3)
        return h * 2


@pytest.mark.parametrize(
    ("forward", "held"), [(appended, [1, 2]), (set_in, {"a": 1}), (sorted_away, [1, 2])]
)
def test_a_container_that_is_changed_is_changed_at_each_call(forward: Any, held: Any) -> None:
    with pytest.raises(LigerFxError, match="that is given, is changed"):
        liger_fx.optimize(Small(forward), (*rows(4), held))


@pytest.mark.parametrize("in_list", [True, False])
def test_what_a_module_appends_is_there_after_it(in_list: bool) -> None:
    def forward(m: Any, x: T) -> T:
        held: list[T] = []
        for layer in m.layers:
            x = layer(m.lin(x), held)
        return x + sum(held) * len(held)

    layers = [Appends(), Appends()]
    model = Small(forward, layers=nn.ModuleList(layers) if in_list else nn.Sequential(*layers))
    beside(model, rows(4), [rows(4), rows(6)])


def test_a_list_that_is_given_comes_back_as_itself() -> None:
    with pytest.raises(LigerFxError, match="a list that is given comes back"):
        liger_fx.optimize(Small(lambda m, x, held: (m.lin(x), held)), (*rows(4), [1]))


# -- errors that are caught, arguments in another order --------------------------------------------


def cross_rows(m: Any, x: T) -> T:
    h = m.lin(x)
    try:
        return h + x[5]
    except IndexError:
        return h


def narrowed(m: Any, x: T) -> T:
    h = m.lin(x)
    try:
        h = h.narrow(0, 2, 4)
    except Exception:
        h = h * 2
    finally:
        h = h + 1
    return h


def suppressed(m: Any, x: T) -> T:
    h = m.lin(x)
    with contextlib.suppress(IndexError):
        h = h + x[5]
    return h


def so_many(m: Any, x: T) -> T:
    h: Any = 0
    each = iter(m.lin(x))
    try:
        for _ in range(5):
            h = h + next(each)
    except StopIteration:
        return h * 2
    return h


def by_key(m: Any, x: T) -> T:
    try:
        factor = {4: 2}[x.shape[0]]
    except KeyError:
        factor = 3
    return m.lin(x) * factor


def inside_another(m: Any, x: T) -> T:
    def rows_of(h: T) -> T:
        return h + x[5]

    try:
        return rows_of(m.lin(x))
    except IndexError:
        return m.lin(x)


CATCHING = [cross_rows, narrowed, suppressed, so_many, by_key, inside_another]


@pytest.mark.parametrize("forward", CATCHING)
@pytest.mark.parametrize("first", [6, 4])
def test_what_fails_at_another_size_is_caught_there(forward: Any, first: int) -> None:
    beside(Small(forward), rows(first), [rows(n) for n in (first, 6, 4, 3)])


def renamed(m: Any, x: T) -> T:
    try:
        h = m.lin(x)
    except RuntimeError as error:
        raise ValueError("of another width") from error
    finally:
        x = x * 2
    return h + x


def test_a_handler_that_raises_and_one_that_only_tidies_up_catch_nothing() -> None:
    assert beside(Small(renamed), rows(4), [rows(4), rows(6)]) == RIGHT


def test_the_order_of_keywords() -> None:
    def forward(m: Any, x: T, **options: Any) -> T:
        return m.lin(x) * next(iter(options.values()))

    x = rows(4)[0]
    calls = [{"x": x, "a": 2, "b": 3}, {"x": x, "b": 3, "a": 2}, {"a": 2, "x": x, "b": 3}]
    for first in calls:
        beside(Small(forward), first, calls)
    opt = liger_fx.optimize(Small(forward), calls[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        opt(**calls[2])


def test_code_that_was_typed_in_is_a_model_s_code() -> None:
    scope: dict[str, Any] = {}
    exec("def forward(m, x): return m.lin(x) * len(f'{x.shape[0]:03d}') * x.shape[0]", scope)
    assert beside(Small(scope["forward"]), rows(4), [rows(4)]) == RIGHT
