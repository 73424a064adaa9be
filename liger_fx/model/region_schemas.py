"""What a region does to its arguments is found once, not at each of its calls.

Before PyTorch 2.13 it is traced again for each call, five times in training: for sixteen layers
eighty times, a fourth of what compiling takes. Newer versions keep what was found, as this does: by
the region, its name, and what kinds of arguments it is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch._guards import InvokeSubgraphCache, TracingContext
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

# True from 2.13 on.
_PYTORCH_KEEPS_THEM = hasattr(InvokeSubgraphCache, "get_functionalize_schema_entry")


@contextmanager
def region_schemas_kept() -> Iterator[None]:
    """For what is compiled inside; in other threads too, each compile by itself."""
    if _PYTORCH_KEEPS_THEM or "gen_schema" in vars(invoke_subgraph):  # one compile in another
        yield
        return
    kept: WeakKeyDictionary[TracingContext, dict[Any, Any]] = WeakKeyDictionary()
    operator: Any = invoke_subgraph
    find = operator.gen_schema

    def gen_schema(subgraph: Any, identifier: Any, *operands: Any) -> Any:
        context = TracingContext.try_get()
        if context is None:
            return find(subgraph, identifier, *operands)
        known = kept.setdefault(context, {})
        key = (id(subgraph), identifier, *map(type, operands))
        if key not in known:
            known[key] = subgraph, find(subgraph, identifier, *operands)  # whose id stays its own
        return known[key][1]

    operator.gen_schema = gen_schema
    try:
        yield
    finally:
        del operator.gen_schema
