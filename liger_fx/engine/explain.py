"""Why each rule did or did not find its site in one module, told as it happens.

model.layers.0.mlp   ->   [Account("gated_mlp", start="mul(silu, up_proj)", courses=...), ...]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from liger_fx.engine.climb import Climb
from liger_fx.engine.facts import Facts
from liger_fx.engine.match import Match
from liger_fx.engine.matcher import find
from liger_fx.engine.rewriter import rewrite
from liger_fx.engine.rule import Rule
from liger_fx.engine.site import Site
from liger_fx.engine.steps import Course, Value, courses
from liger_fx.engine.terms import Terms
from liger_fx.tracing.trace import Trace


@dataclass(frozen=True)
class Account:
    """What one rule saw in a module.

    looks_like: what makes a place a candidate. start: a node that looked like it; None where none
    did, and the pattern was tried at every node of the module. courses: how each form of the
    pattern fared, the furthest first; empty for a module of which the graph holds no node.
    """

    rule: str
    looks_like: str
    start: Value | None
    courses: tuple[Course, ...]


def explain(trace: Trace, rules: Iterable[Rule], path: str) -> tuple[list[Account], list[Site]]:
    """The rules' accounts of the module at ``path``, and all sites; rewrites ``trace`` meanwhile.

    Each rule is heard on the graph as the rules before it leave it.
    """
    accounts: list[Account] = []

    def watch(rule: Rule, facts: Facts, view: Terms) -> None:
        accounts.extend(_accounts(rule, facts, view, path))

    sites = rewrite(trace, rules, watch=watch).sites
    return accounts, sites


def _accounts(rule: Rule, facts: Facts, view: Terms, path: str) -> list[Account]:
    climb, looks_like = Climb.of(rule.pattern, rule.looks_like), str(rule.looks_like)
    found = []
    for start in _starts(rule, facts, view, path):
        told = courses(rule.pattern, climb.roots(start, facts, view), view)
        found.append(Account(rule.name, looks_like, Value.of(view(start)), tuple(told)))
    if found:
        return found
    nodes = _nodes(facts, path)
    told = courses(rule.pattern, nodes, view) if nodes else []
    return [Account(rule.name, looks_like, None, tuple(told))]


def _starts(rule: Rule, facts: Facts, view: Terms, path: str) -> list[fx.Node]:
    """The nodes of the module's own code, or calls of it as a leaf, that look like the site."""
    heads = rule.looks_like.heads
    assert heads is not None, "what a site looks like begins with an operator"
    return [
        node
        for node in view.named(list(facts.position), heads)
        if path in (facts.call(node).path, str(node.target) if node.op == "call_module" else None)
        and isinstance(next(find(rule.looks_like, node, view), None), Match)
    ]


def _nodes(facts: Facts, path: str) -> list[fx.Node]:
    """The nodes made by the first call of a module, the last first, or that call as a leaf."""
    leaves = [node for node in facts.leaf_calls.get(path, ()) if node in facts.position]
    calls = facts.calls_of.get(path, [])
    nodes = leaves[:1] or [node for call in calls[:1] for node in facts.nodes_below(call)]
    return sorted(nodes, key=facts.position.__getitem__, reverse=True)
