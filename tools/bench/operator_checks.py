"""The kernels on a GPU against float64: every dtype, odd sizes, strided, empty, over 2^31 elements.

    python tools/bench/operators.py --only checks  ->  a table, one row per operator and dtype

A float32 result passes when its relative L2 error is at most 1.1 times that of the eager spelling,
a half one when it is at most 1.1 times that of rounding the float64 result once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F

from liger_fx.kernels.activation import activation
from liger_fx.kernels.gated_activation import gated_activation, packed_gated_activation
from liger_fx.kernels.layer_norm import layer_norm
from liger_fx.kernels.rms_norm import rms_norm
from liger_fx.kernels.rope import rope_pair
from tests.kernels.accuracy import error_over_limit, with_gradients
from tools.bench.operator_cases import eager_packed, eager_rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (0, 1, 3, 17)
WIDTHS = (1, 7, 33, 100, 4095, 4096, 65536)
EPS = 1.0  # with a small one, the gradient of a row of width 1 is what rounding leaves of zero
Function = Callable[..., Any]
Check = tuple[str, Function, Function, list[torch.Tensor]]


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def gated(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return getattr(F, name)(gate) * up


def _draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def _checks(dtype: torch.dtype) -> Iterator[Check]:
    """(name, ours, the eager spelling, inputs that get a gradient)"""

    norm, both = partial(rms_norm, eps=EPS), eager_packed
    gelu_tanh = partial(F.gelu, approximate="tanh")
    for rows, width in product(ROWS, WIDTHS):
        yield "rms_norm", norm, plain_rms_norm, [_draw(dtype, rows, width), _draw(dtype, width)]
        x, *factors = _draw(dtype, rows, width), _draw(dtype, width), _draw(dtype, width)
        yield "layer_norm", partial(layer_norm, eps=EPS), plain_layer_norm, [x + 3, *factors]
    for rows, width in product((0, 3), (7, 100, 4095, 65536)):
        x, packed = _draw(dtype, rows, width), _draw(dtype, rows, 2 * width)
        yield "activation gelu_tanh", partial(activation, name="gelu_tanh"), gelu_tanh, [x]
        yield "packed silu", partial(packed_gated_activation, activation="silu"), both, [packed]
        for name in ("silu", "gelu", "relu"):
            ours = partial(gated_activation, activation=name)
            yield f"gated {name}", ours, partial(gated, name), [x, _draw(dtype, rows, width)]
    heads = _draw(dtype, 3, 257, 6, 128)
    yield "rms_norm", norm, plain_rms_norm, [heads[:, :, 1:5].transpose(1, 2), _draw(dtype, 128)]
    yield "rms_norm", norm, plain_rms_norm, [_draw(dtype, 5000, 320), _draw(dtype, 320)]
    yield "rms_norm", norm, plain_rms_norm, [_draw(dtype, 64, 3000).t(), _draw(dtype, 64)]
    for tokens, dim in ((1, 64), (5, 96), (257, 128), (33, 6)):
        cos, sin = _draw(dtype, 2, tokens, dim), _draw(dtype, 2, tokens, dim)
        q, k = _draw(dtype, 2, tokens, 9, dim).transpose(1, 2), _draw(dtype, 2, 3, tokens, dim)
        turn: Function = partial(rope_pair, cos=cos, sin=sin)
        yield "rope", turn, partial(eager_rope, cos=cos, sin=sin), [q, k]


def _worst(ours: Function, eager: Function, inputs: Sequence[torch.Tensor]) -> float:
    """The largest error over its limit among the outputs and gradients; above 1 fails."""
    outputs = eager(*inputs)
    grads = [torch.randn_like(t) for t in (outputs if isinstance(outputs, tuple) else (outputs,))]
    values = with_gradients(ours, inputs, *grads)
    plain = with_gradients(eager, inputs, *grads)
    exact = with_gradients(eager, [x.double() for x in inputs], *[g.double() for g in grads])
    return max(map(error_over_limit, values, plain, exact))


def check_dtype(dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per operator: how many cases, and the worst error over its limit."""
    rows: dict[str, dict[str, Any]] = {}
    torch.manual_seed(0)
    for name, ours, eager, inputs in _checks(dtype):
        fresh = {"operator": name, "dtype": str(dtype)[6:], "cases": 0, "worst": 0.0, "where": ""}
        row = rows.setdefault(name, fresh)
        row["cases"] += 1
        worst = _worst(ours, eager, inputs)
        if worst > row["worst"]:
            row |= {"worst": worst, "where": str([tuple(x.shape) for x in inputs])}
    return list(rows.values())


def check_all() -> list[dict[str, Any]]:
    """The rows of every dtype, each in a process of its own: most of the time compiles."""
    with ProcessPoolExecutor(len(DTYPES), mp_context=get_context("spawn")) as pool:
        small = list(pool.map(check_dtype, DTYPES))
    return [*chain(*small), *check_large()]


def check_large() -> list[dict[str, Any]]:
    """Each operator on more than 2^31 bfloat16 elements; its last rows are looked at."""
    rows, width, last = 2**31 // 4096 + 24, 4096, 16
    bf16 = torch.bfloat16

    def row(name: str, inputs: list[torch.Tensor], ours: Function, eager: Function) -> dict:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = ours(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.zeros_like(t) for t in outputs]
        for grad in grads:
            _last(grad, last).normal_()
        found = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
        tails = [_last(x.detach(), last) for x in leaves]
        exact = with_gradients(
            eager, [x.double() for x in tails], *[_last(g, last).double() for g in grads]
        )
        ends = [_last(t, last) for t in found]
        worst = max(map(error_over_limit, ends, exact, exact))
        numbers = {"cases": 1, "worst": worst, "where": f"{leaves[0].numel()} elements"}
        return {"operator": f"{name}, large", "dtype": "bfloat16", **numbers}

    x, y = (torch.randn(rows, width, device="cuda", dtype=bf16) for _ in range(2))
    weight = torch.randn(width, device="cuda", dtype=bf16)
    q = x.view(1, rows, 32, 128).transpose(1, 2)
    k = y[:, :128].view(1, 1, rows, 128)
    cos, sin = torch.randn(2, 1, rows, 128, device="cuda", dtype=bf16)
    turned = partial(eager_rope, cos=cos[:, -last:], sin=sin[:, -last:])
    silu = "silu"
    return [
        row("rms_norm", [x, weight], partial(rms_norm, eps=EPS), plain_rms_norm),
        row("gated", [x, y], partial(gated_activation, activation=silu), partial(gated, silu)),
        row("packed", [x], partial(packed_gated_activation, activation=silu), eager_packed),
        row("rope", [q, k], partial(rope_pair, cos=cos, sin=sin), turned),
    ]


def _last(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """The last rows of (rows, width) or tokens of (batch, heads, tokens, dim); all of a vector."""
    if x.dim() == 4:
        return x[:, :, -tokens:]
    return x[-tokens:] if x.dim() == 2 else x
