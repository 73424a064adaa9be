"""What Dynamo knows, while it compiles a function, of the values in it.

    def f(ids):
        cache = DynamicCache(); model(ids, past_key_values=cache)
        here: ids is a fake tensor, cache a DynamicCache whose layers hold fake tensors

``torch._dynamo.comptime`` is the public way in; of an object, and of a container that holds one, it
shows no more than Dynamo's own record.
"""

from __future__ import annotations

from typing import Any

from liger_fx.model.apart import of_plain_sizes


def value_of(context: Any, name: str) -> Any:
    """What a local variable stands for: tensors as fake ones of plain sizes, objects as they are
    at this point of what is compiled, or copies of them. UnsupportedCall for a size that nobody
    knows yet."""
    record = context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
    return _value(record, output_of(context).side_effects.store_attr_mutations)


def output_of(context: Any) -> Any:
    """Dynamo's record of the graph that it is making."""
    return context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output


def _value(record: Any, changed: Any) -> Any:
    record = record.realize()
    if record.is_python_constant():
        return record.as_python_constant()
    if hasattr(record, "proxy"):  # a tensor, a symbolic number
        return of_plain_sizes(record.as_proxy().node.meta["example_value"])
    items = getattr(record, "items", None)
    if isinstance(items, (list, tuple)):
        return record.python_type()(_value(item, changed) for item in items)
    if isinstance(items, dict):
        return {k.vt.as_python_constant(): _value(v, changed) for k, v in items.items()}
    return _object(record, changed)


def _object(record: Any, changed: Any) -> Any:
    """The object itself, unless the compiled code made or changed it."""
    if record not in changed:
        return record.value
    made = object.__new__(type(record.value))
    made.__dict__.update(vars(record.value))
    made.__dict__.update((name, _value(value, changed)) for name, value in changed[record].items())
    return made
