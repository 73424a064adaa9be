"""A file in a folder of rules is a rule; names and paths choose among rules and sites."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import liger_fx.passes
from liger_fx.engine.rule import Selection, discover
from tests.engine.bend import Bend, BendModule
from tests.engine.graphs import rewritten, rows

RULE = '''
from torch import nn
from liger_fx.engine.pattern import Op, Tensor, anything
from liger_fx.engine.rule import Replacement, Rule

x = Tensor("x")

class Sine(nn.Module):
    def forward(self, x):
        return x.tanh()

class NewRule(Rule):
    """Names every tanh."""
    name = "new_rule"
    pattern = Op("tanh", (x,))
    looks_like = Op("tanh", (anything,))

    def check(self, match):
        return None

    def build(self, match, owner):
        return Replacement(Sine(), (match["x"],), "sine")
'''


def test_every_file_of_the_passes_holds_one_rule_with_a_name_and_a_docstring() -> None:
    files = {path.stem for path in Path(liger_fx.passes.__path__[0]).glob("*.py")}
    rules = discover()
    assert {type(rule).__module__.rpartition(".")[2] for rule in rules} == files
    assert len({rule.name for rule in rules}) == len(rules) == len(files)
    for rule in rules:
        text = sys.modules[type(rule).__module__].__doc__ or ""
        assert "->" in text and len(text.splitlines()) > 3


def test_rules_keep_no_state() -> None:
    for rule in discover():
        assert vars(rule) == {}


def test_adding_a_file_adds_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = [*liger_fx.passes.__path__, str(tmp_path)]
    monkeypatch.setattr(liger_fx.passes, "__path__", path)
    before = [rule.name for rule in discover()]
    (tmp_path / "new_rule.py").write_text(RULE)
    after = discover()
    assert sorted({rule.name for rule in after} - set(before)) == ["new_rule"]

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.tanh() + 1

    pair = rewritten(after, Model(), rows())
    assert pair.called() == ["Sine"] and pair.done[0].rule == "new_rule"
    sys.modules.pop("liger_fx.passes.new_rule")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BendModule(), BendModule()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.sin()).cos()).exp()


@pytest.mark.parametrize(
    ("selection", "left"),
    [
        (Selection(), []),
        (Selection(excluded=("first",)), ["first"]),
        (Selection(excluded=("bend",)), ["first", "second"]),
        (Selection(excluded=("*st",)), ["first"]),
        (Selection(chosen=("second",)), ["first"]),
        (Selection(chosen=("bend",)), []),
        (Selection(chosen=("other",)), ["first", "second"]),
        (Selection(chosen=("bend",), excluded=("second",)), ["second"]),
    ],
)
def test_what_is_left_out_is_listed_with_the_reason(selection: Selection, left: list[str]) -> None:
    pair = rewritten([Bend()], Two(), rows(), selection=selection)
    refused = [site for site in pair.sites if site.reason is not None]
    assert [site.path for site in refused] == left
    assert len(pair.done) == 2 - len(left) == pair.called().count("Bent")
    for site in refused:
        assert site.reason and ("excluded by" in site.reason or "not among" in site.reason)


def test_a_path_selects_what_is_below_it_and_nothing_that_only_begins_like_it() -> None:
    selection = Selection(excluded=("model.layers.1",))
    assert selection.refusal("bend", "model.layers.1") == "excluded by 'model.layers.1'"
    assert selection.refusal("bend", "model.layers.1.mlp") is not None
    assert selection.refusal("bend", "model.layers.10") is None
    assert Selection(excluded=("*.mlp",)).refusal("bend", "model.layers.7.mlp") is not None


def test_names_that_mean_nothing_are_told() -> None:
    selection = Selection(("bend", "first", "frist"), ("*ond", "nothing.*"))
    assert selection.unknown([Bend()], Two()) == ["frist", "nothing.*"]
