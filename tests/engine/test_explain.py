"""Explanations: each form of a pattern, step by step, down to where pattern and graph part."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_fx.engine.explain import Account, explain
from liger_fx.engine.rule import discover
from liger_fx.report.explanation import render
from tests.engine.graphs import Around, Formula, rows, trace

RULES = discover()


def explained(module: nn.Module, path: str, rule: str) -> tuple[list[Account], list[Any]]:
    """One rule's accounts of the module at a path, and its sites."""
    accounts, sites = explain(trace(module, rows()), RULES, path)
    return [a for a in accounts if a.rule == rule], [s for s in sites if s.rule == rule]


class RMSNorm(nn.Module):
    """A norm whose statistic and use of the weight can be bent out of shape."""

    def __init__(self, statistic: Any, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.statistic = statistic

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(self.statistic(x) + 1e-6))


def test_it_goes_down_to_the_node_where_pattern_and_graph_part() -> None:
    norm = RMSNorm(lambda x: x.abs().mean(-1, keepdim=True))
    ((account,), (site,)) = explained(Around(norm), "inner", "rms_norm")
    best = account.courses[0]
    assert account.start is not None and account.start.text == "rsqrt(add)"
    assert not best.fits and best.wanted == ("square(x)",)
    assert best.found is not None and best.found.text == "abs(sin)"
    assert [step.found.text.partition("(")[0] for step in best.steps] == [
        "mul", "mul", "rsqrt", "add", "mean",
    ]  # fmt: skip
    assert best.steps[-1].wanted == "mean(square(x))"
    lines = {step.found.source[1] for step in best.steps if step.found.source}
    assert RMSNorm.forward.__code__.co_firstlineno + 1 in lines
    assert "wanted square(x)" in (site.reason or "")  # as the report says it


def test_what_fits_is_told_to_the_end_before_it_is_rewritten() -> None:
    norm = RMSNorm(lambda x: x.pow(2).mean(-1, keepdim=True))
    ((account,), (site,)) = explained(Around(norm), "inner", "rms_norm")
    best = account.courses[0]
    assert best.fits and best.found is None and site.after_class == "LigerRMSNorm"
    fitted = {step.wanted: step.found.text for step in best.steps}
    assert fitted["weight"] == "weight" and fitted["x"] == "sin(x)"
    assert fitted["square(x)"] == "pow(sin, 2)"  # erased by now, and still told


def test_every_alternative_that_would_have_fitted_is_named() -> None:
    gated = Formula(lambda m, x: F.mish(x * m.w) * (x * m.b))
    (account, *_), _ = explained(Around(gated), "inner", "gated_mlp")
    assert account.start is None  # nothing is activated
    told = [wanted for course in account.courses for wanted in course.wanted]
    assert any(wanted.startswith("sigmoid(") for wanted in told)


def test_the_form_that_comes_furthest_is_told_first() -> None:
    norm = RMSNorm(lambda x: x.pow(3).mean(-1, keepdim=True))
    ((account,), _) = explained(Around(norm), "inner", "rms_norm")
    reached = [course.covered for course in account.courses]
    assert reached == sorted(reached, reverse=True) and reached[0] >= 5 > reached[-1]


def test_two_calls_of_one_module_are_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNorm(lambda x: x.abs().mean(-1, keepdim=True))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.norm(x))

    accounts, sites = explained(Twice(), "norm", "rms_norm")
    assert len(accounts) == 2 and len({a.start.text for a in accounts if a.start}) == 2
    text = render(accounts, sites, "norm")
    assert text.count("the pattern has") == 1 and "and just so" in text  # told once


def test_a_module_without_anything_alike() -> None:
    ((account,), sites) = explained(Around(nn.Tanh()), "inner", "rms_norm")
    assert account.start is None and sites == []
    text = render([account], [], "inner")
    assert text.splitlines() == [
        "Nothing in its own code looks like a site of", "  rms_norm: no rsqrt(anything)",
    ]  # fmt: skip


def test_the_text_has_the_steps_and_the_parting() -> None:
    norm = RMSNorm(lambda x: x.abs().mean(-1, keepdim=True))
    accounts, sites = explained(Around(norm), "inner", "rms_norm")
    text = render(accounts, sites, "inner")
    assert text.startswith("rms_norm: refused: wanted square(x), found abs(sin)")
    rows_ = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if " ok  " in line]
    assert [row[1] for row in rows_][-1] == "mean(square(x))"
    (parting,) = [line for line in text.splitlines() if line.strip().startswith("NO")]
    assert "square(x)" in parting and "abs(sin)" in parting and "test_explain.py:" in parting


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_watching_changes_nothing(rule: Any) -> None:
    norm = RMSNorm(lambda x: x.pow(2).mean(-1, keepdim=True))
    _, watched = explain(trace(Around(norm), rows()), [rule], "inner")
    from liger_fx.engine.rewriter import rewrite

    assert watched == rewrite(trace(Around(norm), rows()), [rule]).sites
