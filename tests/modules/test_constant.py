"""Numbers of named modules under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from liger_fx.modules.layer_norm import LigerLayerNorm
from liger_fx.modules.rms_norm import LigerRMSNorm


@pytest.mark.parametrize("kind", [LigerRMSNorm, LigerLayerNorm])
def test_numbers_are_constants_of_what_is_compiled(kind: Any) -> None:
    """Of whatever size the rest is; and a number that is changed is noticed."""
    module = kind(8, 1e-6, weight=nn.Parameter(torch.ones(8)))
    seen: list[float] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if "liger_fx" in str(node.target):
                seen.extend(arg for arg in node.args if isinstance(arg, float))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, dynamic=True, backend=backend, fullgraph=True)
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), module(x))
    assert seen == [1e-6, 0.0]
    module.eps = 0.5
    torch.testing.assert_close(compiled(x), module(x))
    assert seen == [1e-6, 0.0, 0.5, 0.0]
    torch._dynamo.reset()
