"""An optimised model inside torch.compile: its graph runs as it is, next to what is compiled.

torch.compile(opt)(input_ids)  ->  opt(input_ids), and one FallbackWarning
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from liger_fx.graph_model import GraphModel


@torch.compiler.disable
def call_uncompiled(model: GraphModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``model(*args, **kwargs)`` out of the compiler's sight: checking a graph's guards, and
    tracing where none holds, is nothing it can compile."""
    model.warn_once("torch.compile compiles nothing of an optimised model yet; it runs as it is.")
    return model.call_graph(args, kwargs)
