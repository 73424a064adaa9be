"""What operators.py times: the operators at the shapes of real models, in every variant.

A case holds how to draw its inputs, one function per variant, and what must move through memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

EPS = 1e-5
VARIANTS = ("ours", "liger-kernel", "torch.compile", "eager", "F.rms_norm", "F.layer_norm")
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """width: the size of the last dimension of what a kernel reads at once.
    inputs: draws those that get a gradient, then those that do not.
    kept: how many of the first the backward must read again.
    """

    operator: str
    shape: str
    width: int
    inputs: Callable[[], tuple[Tensors, Tensors]]
    functions: dict[str, Callable[..., Any]]
    kept: int

    @property
    def name(self) -> str:
        return f"{self.operator} {self.shape}"

    def minimal_bytes(self, leaves: Tensors, constants: Tensors, outputs: Tensors) -> list[int]:
        """Of the forward alone, and of forward and backward: every input read once, every output
        written once, in each of the two.
        """
        inputs, results = _bytes(leaves + constants), _bytes(outputs)
        backward = _bytes(leaves[: self.kept] + constants) + results + _bytes(leaves)
        return [inputs + results, inputs + results + backward]


def _bytes(tensors: Tensors) -> int:
    return sum(t.nbytes for t in tensors)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def eager_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def eager_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * wide + bias).to(x.dtype)


def eager_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    return turn(q), turn(k)


def eager_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return eager_rope(eager_rms_norm(q, q_weight), eager_rms_norm(k, k_weight), cos, sin)


def eager_packed(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def eager_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """The rows of each expert gathered, weighted, brought back and summed, by indexing."""
    k = index.shape[1]
    chosen, order = torch.sort(index.reshape(-1))
    counts = torch.histc(chosen.int(), bins=len(down_proj), min=0, max=len(down_proj) - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    gate_up = F.grouped_mm(x[order // k], gate_up_proj.transpose(1, 2), offs=ends)
    y = F.grouped_mm(eager_packed(gate_up), down_proj.transpose(1, 2), offs=ends)
    weighted = y * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return weighted[back].view(*index.shape, -1).sum(1)


def _rms_norm_case(rows: int, width: int) -> Case:
    from liger_fx.kernels.rms_norm import rms_norm

    functions: dict[str, Callable[..., Any]] = {
        "ours": lambda x, w: rms_norm(x, w, EPS),
        "eager": eager_rms_norm,
        "F.rms_norm": lambda x, w: F.rms_norm(x, (width,), w, EPS),
        "liger-kernel": lambda x, w: _liger("liger_rms_norm")(x, w, EPS),
    }
    # Weights of one: liger-kernel's backward writes dx over dy, which must stay finite.
    ones = partial(torch.ones, width, device="cuda", dtype=torch.bfloat16)
    return Case(
        "RMSNorm",
        f"{rows}x{width}",
        width,
        lambda: ((_random(rows, width), ones()), ()),
        functions,
        kept=2,
    )


def _layer_norm_case(rows: int, width: int) -> Case:
    from liger_fx.kernels.layer_norm import layer_norm

    functions: dict[str, Callable[..., Any]] = {
        "ours": lambda x, w, b: layer_norm(x, w, b, EPS),
        "eager": eager_layer_norm,
        "F.layer_norm": lambda x, w, b: F.layer_norm(x, (width,), w, b, EPS),
        "liger-kernel": lambda x, w, b: _liger("liger_layer_norm")(x, w, b, EPS),
    }
    return Case(
        "LayerNorm",
        f"{rows}x{width}",
        width,
        lambda: ((_random(rows, width), _random(width), _random(width)), ()),
        functions,
        kept=2,
    )


def _add_layer_norm_case(rows: int, width: int) -> Case:
    """The bytes are those of a, b, the norm and the sum forward; of the sum and its gradients
    backward."""
    from liger_fx.kernels.add_layer_norm import add_layer_norm

    def both(norm: Callable[..., Any]) -> Callable[..., Any]:
        def call(a: torch.Tensor, b: torch.Tensor, *factors: torch.Tensor) -> Tensors:
            total = a + b
            return norm(total, *factors), total

        return call

    functions: dict[str, Callable[..., Any]] = {
        "ours": lambda a, b, w, c: add_layer_norm(a, b, w, c, EPS),
        "eager": both(eager_layer_norm),
        "F.layer_norm": both(lambda x, w, c: F.layer_norm(x, (width,), w, c, EPS)),
    }
    return Case(
        "residual add + LayerNorm",
        f"{rows}x{width}",
        width,
        lambda: (
            (_random(rows, width), _random(rows, width), _random(width), _random(width)),
            (),
        ),
        functions,
        kept=1,
    )


def _gated_case(operator: str, activation: str, rows: int, width: int) -> Case:
    from liger_fx.kernels.gated_activation import gated_activation

    plain = F.silu if activation == "silu" else partial(F.gelu, approximate="tanh")
    functions: dict[str, Callable[..., Any]] = {
        "ours": lambda gate, up: gated_activation(gate, up, activation),
        "eager": lambda gate, up: plain(gate) * up,
        "liger-kernel": lambda gate, up: _liger(f"liger_{operator.lower()}")(gate, up),
    }
    return Case(
        operator,
        f"{rows}x{width}",
        width,
        lambda: ((_random(rows, width), _random(rows, width)), ()),
        functions,
        kept=2,
    )


def _packed_case(rows: int, width: int) -> Case:
    from liger_fx.kernels.gated_activation import packed_gated_activation

    functions: dict[str, Callable[..., Any]] = {
        "ours": lambda gate_up: packed_gated_activation(gate_up, "silu"),
        "eager": eager_packed,
        "liger-kernel": lambda gate_up: _liger("liger_swiglu")(*gate_up.chunk(2, dim=-1)),
    }
    return Case(
        "packed SwiGLU",
        f"{rows}x{width}",
        width,
        lambda: ((_random(rows, 2 * width),), ()),
        functions,
        kept=1,
    )


def _tables(tokens: int, dim: int) -> Tensors:
    """cos and sin as models have them, the same for both halves of a head."""
    places = torch.arange(tokens, device="cuda")[:, None]
    angles = places / 10000 ** (torch.arange(0, dim, 2, device="cuda") / dim)
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _rope_case(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    from liger_fx.kernels.rope import rope_pair

    def inputs() -> tuple[Tensors, Tensors]:
        q, k = (_random(batch, tokens, h, dim).transpose(1, 2) for h in (heads, kv_heads))
        return (q, k), _tables(tokens, dim)

    functions: dict[str, Callable[..., Any]] = {
        "ours": rope_pair,
        "eager": eager_rope,
        "liger-kernel": lambda q, k, cos, sin: _liger("liger_rope")(q, k, cos, sin),
    }
    shape = f"{batch}x{tokens}, {heads}/{kv_heads} of {dim}"
    return Case("RoPE", shape, dim, inputs, functions, kept=0)


def _qk_norm_rope_case(batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    from liger_fx.kernels.qk_norm_rope import qk_norm_rope

    def inputs() -> tuple[Tensors, Tensors]:
        q, k = (_random(batch, tokens, h, dim).transpose(1, 2) for h in (heads, kv_heads))
        return (q, k, _random(dim), _random(dim)), _tables(tokens, dim)

    functions: dict[str, Callable[..., Any]] = {
        "ours": partial(qk_norm_rope, eps=EPS),
        "eager": eager_qk_norm_rope,
    }
    shape = f"{batch}x{tokens}, {heads}/{kv_heads} of {dim}"
    return Case("QK norm and RoPE", shape, dim, inputs, functions, kept=4)


def _experts_case(tokens: int, k: int, number: int, hidden: int, width: int) -> Case:
    """Mostly products of matrices: what the bytes say is no bound of it."""
    from liger_fx.kernels.experts import experts

    def inputs() -> tuple[Tensors, Tensors]:
        x, matrices = _random(tokens, hidden), _random(number, 3 * width, hidden) / hidden**0.5
        down = matrices[:, 2 * width :].transpose(1, 2).contiguous()
        weights, index = torch.rand(tokens, number, device="cuda").topk(k)
        return (x, weights.bfloat16(), matrices[:, : 2 * width].contiguous(), down), (index,)

    functions: dict[str, Callable[..., Any]] = {
        "ours": lambda x, w, into, out_of, index: experts(x, index, w, into, out_of, "silu"),
        "eager": eager_experts,
    }
    shape = f"{tokens}x{hidden}, {k} of {number} x {width}"
    return Case("experts", shape, hidden, inputs, functions, kept=4)


def _liger(name: str) -> Callable[..., Any]:
    return getattr(import_module("liger_kernel.transformers.functional"), name)


def cases() -> list[Case]:
    """The shapes of the issue's targets first."""
    return [
        _rms_norm_case(8192, 4096),
        _rms_norm_case(16384, 2048),
        _rms_norm_case(4096, 8192),
        _rms_norm_case(8192 * 16, 128),
        _layer_norm_case(8192, 4096),
        _layer_norm_case(16384, 1024),
        _layer_norm_case(16384, 768),
        _layer_norm_case(8192 * 32, 64),
        _add_layer_norm_case(8192, 4096),
        _add_layer_norm_case(16384, 768),
        _gated_case("SwiGLU", "silu", 8192, 14336),
        _gated_case("GEGLU", "gelu_tanh", 8192, 14336),
        _packed_case(8192, 14336),
        _rope_case(4, 2048, 32, 8, 128),
        _rope_case(1, 8192, 32, 8, 128),
        _qk_norm_rope_case(4, 2048, 16, 8, 128),
        _experts_case(8192, 8, 128, 2048, 768),
        _experts_case(8192, 2, 8, 4096, 14336),
    ]


def function_of(case: Case, variant: str) -> Callable[..., Any] | None:
    """The case's function in a variant, None where there is none."""
    if variant == "torch.compile":
        return torch.compile(case.functions["eager"], dynamic=False)
    return case.functions.get(variant)
