"""The rewrite as a whole: metadata of new nodes, what is erased, what stays, accounts, and work."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.engine.climb import Climb
from liger_fx.engine.edits import Rewrite
from liger_fx.engine.operators import mean, rsqrt, square
from liger_fx.engine.pattern import Op, Tensor, anything
from liger_fx.engine.rewriter import rewrite
from liger_fx.engine.rule import discover
from tests.engine.bend import Bend, BendModule, BendTogether
from tests.engine.graphs import BATCH, TOKENS, Around, Formula, Rewritten, rewritten, rows, trace
from tests.support.work import lines_run

T = torch.Tensor


def new_nodes(pair: Rewritten) -> list[Any]:
    return [node for node in pair.traced.graph.nodes if "rewrite" in node.meta]


def test_a_new_node_says_which_rule_made_it_from_what() -> None:
    pair = rewritten([Bend()], Around(BendModule()), rows())
    (node,) = new_nodes(pair)
    assert node.op == "call_module"
    assert node.meta["rewrite"] == Rewrite("bend", ("tanh", "mul"), 0)
    assert pair.sites[node.meta["rewrite"].site].path == "inner"


def test_a_new_node_has_the_place_and_the_spec_of_the_one_it_replaces() -> None:
    traced = trace(Around(BendModule()), rows())
    old = next(node for node in traced.graph.nodes if node.target == "mul")
    spec, source = old.meta["spec"], old.meta["source"]
    assert old.meta["module"] == "inner"
    rewrite(traced, [Bend()])
    new = next(node for node in traced.graph.nodes if node.op == "call_module")
    assert (new.meta["spec"], new.meta["source"]) == (spec, source)
    assert (new.meta["module"], new.meta["call"]) == ("", 0)  # its caller makes the node now


def test_beside_a_module_the_new_node_belongs_to_that_module() -> None:
    pair = rewritten([Bend()], Around(Formula(lambda m, x: (m.w * x.tanh()).exp())), rows())
    (node,) = new_nodes(pair)
    assert node.target == "inner.bent" and node.meta["module"] == "inner"


def test_dead_nodes_go_and_their_parameters_with_them() -> None:
    pair = rewritten([Bend()], Around(BendModule()), rows())
    assert [node.op for node in pair.traced.graph.nodes] == [
        "placeholder", "call_method", "call_module", "call_method", "output",
    ]  # fmt: skip


def test_module_calls_name_the_nodes_that_stand_there_now() -> None:
    traced = trace(Around(nn.Sequential(BendModule(), BendModule())), rows())
    rewrite(traced, [Bend()])
    alive = set(traced.graph.nodes)
    first, second = (call for call in traced.calls if call.cls is BendModule)
    assert first.output in alive and second.args == (first.output,)
    assert second.output.target == "inner.1"


def test_a_second_rule_sees_what_the_first_one_made() -> None:
    class Wrapped(BendModule):
        def forward(self, x: T) -> T:
            x = x.view(BATCH, TOKENS, 8) if x.dim() != 3 else x
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    pair = rewritten(
        [Bend(), *discover()], nn.Sequential(nn.Linear(8, 8), BendModule(), Wrapped()), rows()
    )
    assert pair.called() == ["Linear", "Bent", "LigerRMSNorm"]
    assert [site.path for site in pair.done] == ["1", "2"]


def test_the_graph_is_linted_after_each_rule_that_changed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linted = []
    monkeypatch.setattr(torch.fx.Graph, "lint", lambda graph: linted.append(len(graph.nodes)))
    traced = trace(Around(BendModule()), rows())
    rewrite(traced, discover())
    assert linted == []
    rewrite(traced, [Bend(), *discover()])
    assert linted == [5]


def test_garbage_collection_goes_on_afterwards_also_after_an_error() -> None:
    class Broken(Bend):
        def check(self, match: Any) -> Any:
            raise RuntimeError("broken")

    for rule in (Bend(), Broken()):
        try:
            rewrite(trace(Around(BendModule()), rows()), [rule])
        except RuntimeError as error:
            assert str(error) == "broken"
        assert gc.isenabled()


# -- accounts ------------------------------------------------------------------


class BendNothing(nn.Module):
    """Has the name of a candidate and computes nothing of the kind."""

    def forward(self, x: T) -> T:
        return x.exp()


class BendAround(Around):
    """Has the name, too, but what it stands around is a site."""


def test_a_module_with_a_candidates_name_is_never_passed_over_in_silence() -> None:
    pair = rewritten([Bend()], nn.Sequential(BendNothing(), BendAround(BendModule())), rows())
    assert [(site.path, site.reason) for site in pair.sites] == [
        ("1.inner", None),
        ("0", "no bend was found in it"),
    ]


def test_a_module_with_the_name_that_holds_another_is_told_of_once() -> None:
    pair = rewritten([Bend()], nn.Sequential(BendAround(BendNothing())), rows())
    assert [site.path for site in pair.sites] == ["0.inner"]


def test_an_opaque_leaf_with_a_candidates_name_is_told_of_with_its_reason() -> None:
    class BendOpaque(nn.Module):
        def forward(self, x: T) -> T:
            return x if x.sum() > 0 else -x

    pair = rewritten([Bend()], nn.Sequential(BendOpaque(), BendNothing()), rows())
    reasons = {site.path: site.reason for site in pair.sites}
    assert reasons["0"] and reasons["0"].startswith("opaque leaf, not traced through: ")
    assert reasons["1"] == "no bend was found in it"


def test_a_refused_site_lists_what_fitted_and_where_it_stopped() -> None:
    def function(m: Formula, x: T) -> T:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1)

    (site,) = rewritten(discover(), Formula(function), rows()).sites
    assert site.rule == "rms_norm" and site.before_class == "Formula" and site.after is None
    assert "rsqrt(add)" in site.before and "mul(x, rsqrt)" in site.before
    assert site.reason and site.reason.startswith(
        "wanted mean(square(x)), found sum(pow_1, -1, True) at test_rewriter.py:"
    )
    assert site.source and site.source[0].endswith("test_rewriter.py")


def test_a_candidate_is_one_site_however_many_nodes_look_like_it() -> None:
    def function(m: Formula, x: T) -> T:
        return x * (1 / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1))

    assert len(rewritten(discover(), Formula(function), rows()).sites) == 1


# -- the way up ------------------------------------------------------------------


def test_the_way_up_is_read_off_the_pattern() -> None:
    x, y = Tensor("x"), Tensor("y")
    norm = y * x * rsqrt(mean(square(x)))
    assert Climb.of(norm, rsqrt(anything)) == Climb(frozenset({"mul"}), 2)
    assert Climb.of(Op("linear", (norm,)), rsqrt(anything)) == Climb(
        frozenset({"mul", "linear"}), 3
    )
    twice = Op("linear", (Op("relu", (Op("linear", (x,)),)),))
    assert Climb.of(twice, Op("linear", (Op("relu", (anything,)),))) == Climb(frozenset(), 0)
    assert Climb.of(twice, Op("relu", (anything,))) == Climb(frozenset({"linear"}), 1)


# -- time ------------------------------------------------------------------


class Layer(nn.Module):
    """A norm, a gated MLP and a residual: enough to be told from a layer of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8))
        self.gate, self.up, self.down = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: T) -> T:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def work(layers: int) -> int:
    traced = trace(nn.Sequential(*(Layer() for _ in range(layers))), rows())
    sites: list[Any] = []
    count = lines_run(lambda: sites.extend(rewrite(traced, discover()).sites))
    assert sum(site.reason is None for site in sites) == 2 * layers
    return count


def test_the_work_grows_with_the_depth_and_not_with_its_square() -> None:
    work(2)  # fills caches
    # Sorting makes it a little more than 4 times, a scan of the graph for each site 16 times.
    assert work(96) <= 4.2 * work(24)


def test_two_matches_of_one_call_are_found_at_any_depth() -> None:
    def function(m: Formula, x: T) -> T:
        for _ in range(20):
            x = m.w * x.sin().tanh() + m.w * x.cos().tanh()
        return x

    assert rewritten([BendTogether()], Formula(function), rows()).called() == ["BentPair"] * 20
