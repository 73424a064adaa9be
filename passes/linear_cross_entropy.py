"""The cross-entropy of a linear layer's result: a language model's head and its loss.

    lm_head = self.lm_head(h); view = lm_head.float().view(-1, 256)
    loss = F.cross_entropy(view, labels, reduction="sum") / items
 ->
    loss, logits = LigerFusedLinearCrossEntropy(reduction=sum)(h, labels, lm_head.weight, items)

The labels stay as the model shifts and pads them. Between the layer and the loss the logits may be
multiplied, divided (Cohere, Granite) and soft-capped (Gemma 2: cap * tanh(x / cap)). The model's
output may hold them: see liger_fx/modules/lazy_logits.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from liger_fx.engine.layers import parameters_of, plain_linear
from liger_fx.engine.match import Match
from liger_fx.engine.operators import div, linear, rows, tanh
from liger_fx.engine.pattern import Constant, Inner, Op, Tensor, anything, either
from liger_fx.engine.rule import Owner, Reject, Replacement, Rule
from liger_fx.engine.term import Term, is_transparent
from liger_fx.modules import LigerFusedLinearCrossEntropy

x, cap = Tensor("x"), Constant("softcap")
labels, items = (Tensor(name, integers=True) for name in ("labels", "items"))
plain = linear(x, Constant("head"))
layer = either(plain + Tensor("bias"), plain)
scaled = either(layer * Constant("scale"), div(layer, Constant("divisor")), layer)
logits = Inner("logits", either(cap * tanh(div(scaled, cap)), scaled))
loss = Op(
    "cross_entropy",
    (rows(logits), labels),
    {"weighted": False, **{n: Constant(n) for n in ("reduction", "ignore_index", "smoothing")}},
)


class Found(NamedTuple):
    """The path of the head, and what the module is made with."""

    path: str
    options: dict[str, Any]


class LinearCrossEntropy(Rule):
    """Mounted beside: the head stays where it is, and its weight is passed on."""

    name = "linear_cross_entropy"
    pattern = either(div(loss, items), loss)
    looks_like = Op("cross_entropy", (anything, anything))
    takes_linear = True

    def check(self, match: Match) -> Found:
        """The head is a plain linear layer with more classes than inputs; labels are indices."""
        path = match["head"]
        if path is None:
            raise Reject("the linear layer is a call of F.linear, not a module", match.root)
        head = plain_linear(match, path)
        if head.out_features <= head.in_features:
            raise Reject(
                f"{head.out_features} logits take no more memory than the {head.in_features} "
                "numbers they come from",
                match.root,
            )
        if match["reduction"] not in ("mean", "sum"):
            raise Reject(f"its reduction is {match['reduction']}", match.root)
        target = match.spec("labels")
        if target.dtype != torch.int64 or len(target.shape) != 1:
            raise Reject(f"the labels are {target}, not one index for each row", match.root)
        if "items" in match:
            divisor = match.spec("items")
            if divisor.dtype.is_floating_point or divisor.shape:
                raise Reject(f"it is divided by {divisor}, not by a count", match.root)
        if "bias" in match:
            _check_added(match, head)
        _check_readers(match)
        options = {name: match[name] for name in ("reduction", "ignore_index", "smoothing")}
        for name in ("scale", "divisor", "softcap", "smoothing"):
            if name in match:
                options[name] = float(match[name])
        options["upcast"] = any(match.view(node).op == "cast" for node in match.covered)
        options["added"] = "bias" in match
        options["biased"] = options["added"] or head.bias is not None
        logits = match.handed_out("logits")
        options["gives_logits"] = logits is not None
        if logits is not None:
            options["float_logits"] = _is_cast(match, path, logits)
        return Found(path, options)

    def build(self, match: Match, owner: Owner | None) -> Replacement | None:
        if owner is not None:
            return None
        path, options = match.found
        inputs = [match["x"], match["labels"], *parameters_of(match, path)]
        if options["added"]:
            inputs.append(match["bias"])
        if "items" in match:
            inputs.append(match["items"])
        logits = match.handed_out("logits")
        results = () if logits is None else (logits,)
        module = LigerFusedLinearCrossEntropy(**options)
        return Replacement(module, tuple(inputs), self.name, results)


def _check_added(match: Match, head: nn.Linear) -> None:
    """What is added (BART's final_logits_bias) is one number for each class."""
    spec = match.spec("bias")
    shape = (head.out_features,)
    fits = spec.shape in (shape, (1, *shape)) and spec.dtype == head.weight.dtype
    if "bias" in dict(head.named_parameters()) or not fits:
        raise Reject(f"{spec} is added to the logits, no bias of theirs", match["bias"].node)


def _check_readers(match: Match) -> None:
    """No view of the logits, and no cast but one, is read elsewhere."""
    inside = {*match.covered, match.root}
    handed_out = match.handed_out("logits")
    width = match.inner["logits"].width
    for node in match.covered:
        spec = node.meta.get("spec")
        is_logits = spec is not None and spec.shape[-1:] == (width,)
        is_result = handed_out is not None and node is handed_out.node
        if is_logits and not is_result and not inside.issuperset(node.users):
            raise Reject("something else reads its logits on the way to the loss", node)


def _is_cast(match: Match, path: str, logits: Term) -> bool:
    """Whether the logits that are handed out are cast to float32; Reject a cast further inside."""
    outer, inner = any(term.op == "cast" for term in _through(logits)), _through(logits)[-1]
    given = next(node.meta["spec"].dtype for node in match.covered if node.target == path)
    assert inner.spec is not None and logits.spec is not None
    if inner.spec.dtype != given:
        raise Reject("the dtype changes between the layer and the logits", inner.node)
    if outer and logits.spec.dtype != torch.float32:
        raise Reject(f"the logits are cast to {logits.spec.dtype}", logits.node)
    return outer


def _through(term: Term) -> list[Term]:
    """The term, and what it is an alias or a cast of."""
    found = [term]
    while is_transparent(found[-1]):
        found.append(found[-1].operands[0])
    return found
