"""What every match must obey, whatever the rule: nothing else may notice that its nodes go."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from liger_fx.engine.facts import Facts, computes
from liger_fx.engine.match import Match
from liger_fx.engine.rule import Reject, Replacement
from liger_fx.engine.term import Term, describe
from liger_fx.engine.writes import Writes, written
from liger_fx.tracing import leaves
from liger_fx.tracing.effects import is_region_boundary
from liger_fx.tracing.leaf_modules import is_linear
from liger_fx.tracing.tree_state import hooks_of, is_capturing

# Canonical operators whose results are tensors of their own.
_FRESH = {
    "linear", "silu", "gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "erf", "add", "sub", "mul",
    "div", "neg", "square", "sqrt", "rsqrt", "reciprocal", "pow", "mean", "sum", "var", "rms_norm",
    "layer_norm",
}  # fmt: skip


def check_readers(match: Match, facts: Facts) -> None:
    """Inner results that cost something are read by nothing outside the match.

    Views, casts and parameters may be: they stay for their other reader. So may what the pattern
    names `Inner`, by the model's output, and by anything behind the match where it says so.
    """
    inside = {*match.covered, match.root}
    inner = {term.node for term in map(match.handed_out, match.inner) if term is not None}
    for node in match.covered:
        if node in match.outside:
            _check_readers_behind(node, match, inside, facts)
            continue
        if node is match.root or not (computes(node) or node in inner):
            continue
        for user in node.users:
            if user not in inside and not (node in inner and _is_output(user)):
                raise Reject(f"an inner result is also read by {describe(user)}", node)


def _check_readers_behind(node: fx.Node, match: Match, inside: set[fx.Node], facts: Facts) -> None:
    """Whether what reads the value, and is no part of the match or stays, stands behind it: there
    the named module is called."""
    for user in node.users:
        stays = user not in inside or (not computes(user) and not inside.issuperset(user.users))
        if stays and facts.position[user] < facts.position[match.root]:
            raise Reject(f"an inner result is read before by {describe(user)}", node)


def _is_output(node: fx.Node) -> bool:
    return node.op == "output" or node.target in (leaves.model_output, leaves.container)


def check_hooks(match: Match, facts: Facts) -> None:
    """No hook of the user's, and no forward, stands on a module that would not be called any more.

    (Linear layers are called by the named module.)
    """
    for node in dict.fromkeys((*match.covered, match.root)):
        if node.op != "call_module":
            continue
        module = facts.module(str(node.target))
        if is_linear(module):
            continue
        if not all(is_capturing(hook) for kind in hooks_of(module) for hook in kind.values()):
            raise Reject(f"a hook stands on {node.target}, which would not run", node)
        if "forward" in vars(module):
            raise Reject(f"{node.target} has a forward of its own, which would not run", node)


def check_effects(match: Match, facts: Facts) -> None:
    """No in-place operation and no change of grad or autocast mode lies between its nodes.

    It may work in place itself, on what only it can see.
    """
    inside = dict.fromkeys((*match.covered, match.root))
    for node in inside:
        _check_writes_its_own(node, match, facts)
    nodes = (*match.covered, *match.passed)
    first = min(nodes, key=facts.position.__getitem__, default=match.root)
    between = facts.effects_between(first, match.root)
    effect = next((node for node in between if node not in inside), None)
    if effect is None:
        return
    if is_region_boundary(effect):
        raise Reject("the grad or autocast mode changes in the middle of it", effect)
    raise Reject(f"{describe(effect)} works in place in the middle of it", effect)


def _check_writes_its_own(node: fx.Node, match: Match, facts: Facts) -> None:
    """What a node works on in place was made by the operation before, and nothing else reads it."""
    if node not in facts.effects:
        return
    (source,) = written(node, facts)
    for user in source.users:
        if user is not node:
            raise Reject(f"it works in place on what {describe(user)} reads as well", node)
    if not (computes(source) and match.view(source).op in _FRESH):
        raise Reject("it works in place on what may be a part of something else", node)
    _check_writes_its_own(source, match, facts)


def check_later_writes(match: Match, replacement: Replacement, writes: Writes) -> None:
    """What the named module keeps for its backward stays as it is.

    The model's own operations may keep something else, a float32 copy of ``x`` say, so that the
    model can write into ``x`` and still train.
    """
    if not writes.records_gradients(match.root):
        return
    values = (*replacement.inputs, *replacement.results)
    for value in {node: None for term in values for node in _nodes(term)}:
        write = writes.after(value, match.root)
        if write is not None:
            raise Reject(
                f"the backward of {type(replacement.module).__name__} needs "
                f"{match.names.get(value, describe(value))}, which is written into later",
                write,
            )


def _nodes(term: Term) -> Iterator[fx.Node]:
    """The node of a value, or those of which it is a part."""
    if term.node is not None:
        yield term.node
    else:
        for operand in term.operands:
            yield from _nodes(operand)
