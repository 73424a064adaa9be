"""What the rules saw in one module, as text: the pattern step by step, and where it parts.

[Account("gated_mlp", ...), ...], [Site(...), ...]   ->

gated_mlp: refused: wanted silu(gate) or gelu(gate) or ..., found mish(gate_proj)
  it looks like one at mul(mish, up_proj)  modeling_x.py:182
  linear(any activation * linear(x))
        the rule wants                     the graph has         model code
    ok  linear(any activation * linear(x))  down_proj(mul)        modeling_x.py:182
    NO  silu(linear(x)) or ...             mish(gate_proj)       modeling_x.py:182
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from tabulate import tabulate

from liger_fx.engine.explain import Account
from liger_fx.engine.site import Site
from liger_fx.engine.steps import Course, Value
from liger_fx.report.kinds import line_text

_WIDTH, _OTHERS = 100, 3


def render(
    accounts: Sequence[Account], sites: Iterable[Site], path: str, kin: Iterable[str] = ()
) -> str:
    """The rules' accounts of the module at ``path``, and the sites at it.

    kin: the names of rules that are told in full even if nothing in the module looks like theirs.
    """
    here = [site for site in sites if site.path == path]
    kin = {*kin, *(site.rule for site in here)}
    parts, aside = [], dict[str, str]()
    for rule in dict.fromkeys(account.rule for account in accounts):
        told = [account for account in accounts if account.rule == rule]
        if any(account.start for account in told) or (rule in kin and told[0].courses):
            own = [site for site in here if site.rule == rule]
            parts.append("\n".join(_rule(rule, told, own)))
        else:
            aside[rule] = told[0].looks_like
    if aside:
        lines = [f"  {rule}: no {looks_like}" for rule, looks_like in aside.items()]
        parts.append("\n".join(["Nothing in its own code looks like a site of", *lines]))
    return "\n\n".join(parts)


def _rule(rule: str, accounts: list[Account], sites: list[Site]) -> Iterator[str]:
    for outcome in dict.fromkeys(map(_outcome, sites)) or ["not found here"]:
        yield from _filled(f"{rule}: {outcome}", "")
    told: dict[object, list[Account]] = {}
    for account in accounts:
        told.setdefault(_shape(account), []).append(account)
    for alike in told.values():
        yield ""
        yield from _filled(_where(alike), "  ")
        yield from _course(alike[0].courses[0])
        if not alike[0].courses[0].fits:
            yield from _others(alike[0].courses[1:])


def _outcome(site: Site) -> str:
    if site.reason is not None:
        return f"refused: {site.reason}"
    return f"rewritten, {(site.after or '').removeprefix('call_module ')} is a {site.after_class}"


def _shape(account: Account) -> object:
    """Equal for accounts that say the same of other nodes."""
    best = account.courses[0]
    return best.form, tuple(step.wanted for step in best.steps), best.wanted, best.why


def _where(alike: list[Account]) -> str:
    starts = [_at(account.start) for account in alike if account.start]
    if not starts:
        return f"no {alike[0].looks_like} is in it; the nearest that its nodes come to the pattern:"
    return f"looks like one: {', and just so '.join(starts)}"


def _at(value: Value) -> str:
    return f"{value.text} at {line_text(value.source)}" if value.source else value.text


def _course(course: Course) -> Iterator[str]:
    rows = [("ok", s.wanted, s.found.text, line_text(s.found.source)) for s in course.steps]
    if course.found is not None:
        last = course.steps[-1].found.source if course.steps else None
        source = line_text(course.found.source or last)
        rows.append(("NO", " or ".join(course.wanted), course.found.text, source))
    headers = ("", "the pattern has", "the graph has", "model code")
    cells = [tuple(_wrapped(cell) for cell in row) for row in rows]
    yield textwrap.indent(tabulate(cells, headers, disable_numparse=True), "    ")
    if course.why:
        yield from _filled(course.why, "    ")
    if course.fits:
        yield "    all of the pattern fits"


def _others(courses: Sequence[Course]) -> Iterator[str]:
    """The forms that came less far, in a line each."""
    reached = [course for course in courses if course.covered][:_OTHERS]
    if reached:
        yield "  other forms of the pattern part earlier:"
    for course in reached:
        assert course.found is not None
        said = course.why or f"wanted {' or '.join(course.wanted)}, found {_at(course.found)}"
        yield from _filled(f"{course.form}: {said}", "    ")


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 44, break_long_words=False, break_on_hyphens=False))


def _filled(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
