"""Where the named module goes: in a module's place if it is all that computes, else beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import liger_fx
from liger_fx.engine.rewriter import rewrite
from liger_fx.tiny import tiny_model
from tests.engine.bend import Bend, BendModule, BendOwnOnly
from tests.engine.graphs import Around, Formula, Rewritten, differences, rewritten, rows, trace

T = torch.Tensor


def bend(module: nn.Module, *inputs: T) -> Rewritten:
    return rewritten([Bend()], module, *(inputs or (rows(),)))


def test_it_takes_the_place_of_the_module_that_computes_it_and_nothing_else() -> None:
    pair = bend(Around(BendModule()))
    assert pair.code == "sin = x.sin()\ninner = self.inner(sin)\ncos = inner.cos()"
    inner = pair.after.inner
    assert type(inner).__name__ == "Bent"
    assert list(pair.after.state_dict()) == ["inner.scale"]
    assert max(differences(pair, rows())) < 1e-6
    (site,) = pair.sites
    assert (site.path, site.before_class, site.after_class) == ("inner", "BendModule", "Bent")
    assert site.after == "call_module inner"


def test_the_parameter_is_the_original_object() -> None:
    module = Around(BendModule())
    traced = trace(module, rows())
    scale = module.inner.scale
    rewrite(traced, [Bend()])
    assert module.inner.scale is scale and type(module.inner).__name__ == "Bent"


def test_beside_the_code_of_a_larger_module_it_is_a_new_child_and_the_weight_an_argument() -> None:
    pair = bend(Formula(lambda m, x: m.w * x.sin().tanh() + m.b))
    assert "bent = self.bent(sin, w)\nadd = bent.add(b)" in pair.code.replace("b = self.b\n", "")
    assert dict(pair.after.bent.named_parameters()) == {}
    assert max(differences(pair, rows())) < 1e-6
    assert pair.sites[0].path == "" and pair.sites[0].before_class == "Formula"


def test_new_children_of_one_kind_are_one_module_others_are_numbered() -> None:
    def function(m: Any, x: T) -> T:
        a, b = m.w * x.tanh(), m.b * x.sin().tanh()
        return torch.cat([a, b], -1) + m.wide * torch.cat([x, x], -1).tanh()

    module = Formula(function)
    module.wide = nn.Parameter(torch.randn(16))
    pair = bend(module)
    targets = [n.target for n in pair.traced.graph.nodes if n.op == "call_module"]
    assert targets == ["bent", "bent", "bent_2"]
    assert max(differences(pair, rows())) < 1e-6


def test_an_attribute_is_never_shadowed() -> None:
    module = Formula(lambda m, x: m.w * x.tanh() + 1)
    module.bent = "something of the model's"
    pair = bend(module)
    assert [n.target for n in pair.traced.graph.nodes if n.op == "call_module"] == ["bent_2"]
    assert pair.traced.root.bent == "something of the model's"


def test_the_same_model_traced_again_uses_the_child_that_is_there() -> None:
    module = Formula(lambda m, x: m.w * x.tanh() + 1)
    for _ in range(2):
        rewrite(trace(module, rows()), [Bend()])
    assert [name for name, _ in module.named_children()] == ["bent"]


def test_modules_in_place_stay_when_the_model_is_traced_again() -> None:
    module = Around(nn.Sequential(BendModule(), BendModule()))
    rewrite(trace(module, rows()), [Bend()])
    first = [type(m).__name__ for m in module.modules()]
    rewrite(trace(module, rows()), [Bend()])
    assert [type(m).__name__ for m in module.modules()] == first


class Twice(nn.Module):
    """One module called twice, on inputs of two kinds."""

    def __init__(self, inner: nn.Module, alike: bool) -> None:
        super().__init__()
        self.inner, self.alike = inner, alike

    def forward(self, x: T) -> T:
        y = self.inner(x.sin())
        return y + (self.inner(y.cos()) if self.alike else self.inner(y.cos().double()).float())


def test_a_module_called_twice_is_replaced_once() -> None:
    pair = bend(Twice(BendModule(), alike=True))
    assert pair.called() == ["Bent", "Bent"] and len(pair.done) == 2
    assert pair.traced.root.inner is pair.after.get_submodule("inner")
    assert max(differences(pair, rows())) < 1e-6


class OneWay(BendModule):
    """Computes a bend only for a tensor of float32."""

    def forward(self, x: T) -> T:
        return x.tanh() * self.scale if x.dtype is torch.float32 else x.relu()


class BothWays(Around):
    def forward(self, x: T) -> T:
        return self.inner(x.sin()) + self.inner(x.sin().double()).float()


def test_a_module_whose_other_call_does_something_else_stays() -> None:
    pair = bend(BothWays(OneWay()))
    assert type(pair.traced.root.inner) is OneWay
    assert [n.target for n in pair.traced.graph.nodes if n.op == "call_module"] == ["inner.bent"]
    assert max(differences(pair, rows())) < 1e-6
    reasons = rewritten([BendOwnOnly()], BothWays(OneWay()), rows()).reasons
    (reason,) = reasons
    assert reason.startswith("other calls of inner do something else (mul(tanh, scale) at test_")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = BendModule()
        self.second = nn.ModuleList([self.first])

    def forward(self, x: T) -> T:
        return self.first(x.sin()) + self.second[0](x.cos())


def test_a_module_that_hangs_in_two_places_is_replaced_in_both() -> None:
    pair = bend(Tied())
    assert pair.traced.root.first is pair.traced.root.second[0]
    assert type(pair.traced.root.first).__name__ == "Bent"


class Inner(BendModule):
    """Variations of a module that computes more, or something else than its call says."""


class GoesOn(Inner):
    def forward(self, x: T) -> T:
        return (x.tanh() * self.scale).cos()


class ComputesMore(Inner):
    def forward(self, x: T) -> T:
        x = x.cos()
        return x.tanh() * self.scale


class TwoResults(Inner):
    def forward(self, x: T) -> Any:
        return x.tanh() * self.scale, x.cos()


class OtherParameters(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))


class AsksForTheMode(Inner):
    def forward(self, x: T) -> T:
        y = x.tanh() * self.scale
        return y.cos() if self.training and x.dim() > 9 else y


class AsksForTheRank(Inner):
    def forward(self, x: T) -> T:
        return x.tanh() * self.scale if x.ndim == 3 else x.relu()


class CountsTheSizes(Inner):
    def forward(self, x: T) -> T:
        return x.tanh() * self.scale if len(x.shape) == 3 else x.relu()


class AsksForASize(Inner):
    def forward(self, x: T) -> T:
        return x.tanh() * self.scale if x.shape[0] > 2 else x.relu()


class AsksForGradients(Inner):
    def forward(self, x: T) -> T:
        return x.tanh() * self.scale if torch.is_grad_enabled() else x.relu()


class Nested(nn.Module):
    """The weight belongs to a module further in."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = BendModule()

    def forward(self, x: T) -> T:
        return x.tanh() * self.deep.scale


class NamedArgument(Around):
    def forward(self, x: T) -> T:
        return self.inner(x=x.sin()).cos()


class TwoArguments(Inner):
    def forward(self, x: T, y: T) -> T:
        return x.tanh() * self.scale


class CallsWithTwo(Around):
    def forward(self, x: T) -> T:
        return self.inner(x.sin(), x).cos()


REASONS = {
    "GoesOn goes on after it (cos(mul) at": Around(GoesOn()),
    "ComputesMore computes more than that: cos(sin) (cos(sin) at": Around(ComputesMore()),
    "OtherParameters holds other parameters: bias (mul(tanh, scale) at": Around(OtherParameters()),
    "AsksForTheMode asks whether it is training (mul(": Around(AsksForTheMode()),
    "AsksForTheRank asks how many dimensions there are (mul(": Around(AsksForTheRank()),
    "CountsTheSizes asks how many dimensions there are (mul(": Around(CountsTheSizes()),
    "AsksForASize asks how large something is (mul(": Around(AsksForASize()),
    "AsksForGradients asks whether gradients are recorded (mul(": Around(AsksForGradients()),
    "inner.deep.scale is not the module's own": Around(Nested()),
    "it is called with arguments by name": NamedArgument(BendModule()),
    "TwoArguments is called with something else (mul(": CallsWithTwo(TwoArguments()),
    "it is the whole model (mul(": BendModule(),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_module_that_computes_more_keeps_its_place(reason: str) -> None:
    module = REASONS[reason]
    (refused,) = rewritten([BendOwnOnly()], module, rows()).reasons
    assert refused.startswith(reason)
    pair = bend(module)
    assert pair.called() == ["Bent"] and "bent" in str(pair.done[0].after)
    assert max(differences(pair, rows())) < 1e-6


def test_one_of_two_results_is_no_place_to_take() -> None:
    class Both(Around):
        def forward(self, x: T) -> T:
            y, z = self.inner(x.sin())
            return y + z

    (reason,) = rewritten([BendOwnOnly()], Both(TwoResults()), rows()).reasons
    assert reason.startswith("TwoResults goes on after it")


class Split(nn.Module):
    """The tanh in one child, the product in another."""

    class First(nn.Module):
        def forward(self, x: T) -> T:
            return x.tanh()

    class Second(BendModule):
        def forward(self, x: T) -> T:
            return x * self.scale

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.First(), self.Second())

    def forward(self, x: T) -> T:
        return self.layers(x.sin())


def test_parts_in_two_modules_are_mounted_on_the_one_around_them_that_is_no_container() -> None:
    pair = bend(Split())
    assert [n.target for n in pair.traced.graph.nodes if n.op == "call_module"] == ["bent"]
    assert len(pair.traced.root.layers) == 2  # type: ignore[arg-type]
    assert max(differences(pair, rows())) < 1e-6
    (reason,) = rewritten([BendOwnOnly()], Split(), rows()).reasons
    assert reason.startswith("its parts sit in different modules, layers.0 and layers.1 (tanh(sin)")


def test_eval_and_train_mode_are_handed_on() -> None:
    module = Around(BendModule()).eval()
    assert bend(module).traced.root.inner.training is False
    assert bend(module.train()).traced.root.inner.training is True


def test_no_hook_on_a_state_dict_runs_when_a_layer_is_rewritten() -> None:
    """FSDP2 has one that shards the weights again, of a layer that is being run, too."""
    opt = liger_fx.optimize(tiny_model("llama", layers=2))
    ran: list[str] = []
    for path, module in opt.named_modules():
        module.register_state_dict_pre_hook(lambda *_, path=path: ran.append(path))
    opt.train()
    ids = torch.randint(3, 90, (2, 7))
    opt(input_ids=ids, labels=ids).loss.backward()
    assert len(opt.plans) == 2 and ran == []
    opt.state_dict()
    assert ran
