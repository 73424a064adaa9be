"""One place in the graph that a rule looked at: what stood there, what stands there, or why not."""

from dataclasses import dataclass

from liger_fx.engine.drawing import Drawing


@dataclass(frozen=True)
class Site:
    """A rewritten or refused candidate of one rule.

    rule: the rule's name, e.g. "rms_norm".
    path: the module path the site is reported under, e.g. "model.layers.0.input_layernorm".
    source: file and line of the model's code that the site was traced from.
    before_class: class name of the module that held the site (LlamaRMSNorm, LlamaAttention, ...).
    before: one short text for each replaced node, e.g. "mul(weight, to)".
    after: "call_module model.layers.0.input_layernorm"; None when refused.
    after_class: type name of the module that stands there now; None when refused.
    reason: why the site was refused; None when rewritten.
    drawing: its nodes before and after, None for a module that holds no candidate.
    """

    rule: str
    path: str
    source: tuple[str, int] | None
    before_class: str
    before: tuple[str, ...]
    after: str | None
    after_class: str | None
    reason: str | None
    drawing: Drawing | None = None
