"""LigerQKNormRotaryEmbedding: in place of the norms of q's and k's heads, and of their turning.

(self_attn): Qwen3Attention((q_norm): Qwen3RMSNorm, (k_norm): Qwen3RMSNorm)
->  (self_attn): Qwen3Attention(
      (q_norm): Qwen3RMSNorm, (k_norm): Qwen3RMSNorm
      (qk_norm_rotary): LigerQKNormRotaryEmbedding(eps=1e-06, 128 of 128, half-split)
    )

The norms' modules keep their place and their weights, which are passed to it: the model's own code
calls them, where a call is run by it and by no graph.
"""

from __future__ import annotations

from typing import Any

import torch

from liger_fx.kernels.launch import compute_dtype
from liger_fx.kernels.qk_norm_rope import qk_norm_rope
from liger_fx.modules.casting import Cast, check_cast, result_dtype
from liger_fx.modules.constant import constant
from liger_fx.modules.rotary import Rotary


class _NormRotary(Rotary):
    """eps: None for the machine epsilon of the dtype that the norm is computed in.
    offset: 1.0 where the model multiplies by 1 + weight.
    norm_cast: "input" where the norm is rounded to the input's dtype; "promote" where to that of
        input times weight. `cast` says the same of the turned norm.
    exchanged: whether what comes in has heads and tokens exchanged in its shape, against what goes
        out, for which `heads_dim` says where the heads are.
    The rest is as `Rotary` has it.
    """

    eps = constant("_eps")
    offset = constant("_offset")

    def __init__(
        self,
        *,
        eps: float | None,
        offset: float = 0.0,
        norm_cast: Cast = "input",
        exchanged: bool = False,
        interleaved_in: bool = False,
        interleaved_out: bool = False,
        half_tables: bool = False,
        cast: Cast = "promote",
        heads_dim: int = 1,
        rotary_dim: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__(
            interleaved_in=interleaved_in,
            interleaved_out=interleaved_out,
            half_tables=half_tables,
            cast=cast,
            heads_dim=heads_dim,
            rotary_dim=rotary_dim,
            head_dim=head_dim,
        )
        check_cast(norm_cast)
        self.eps = eps
        self.offset = offset
        self.norm_cast: Cast = norm_cast
        self.exchanged = exchanged

    def _run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        norm_dtype = result_dtype(self.norm_cast, q, q_weight)
        found = qk_norm_rope(
            self._given(q),
            None if k is None else self._given(k),
            q_weight,
            k_weight,
            cos,
            sin,
            torch.finfo(compute_dtype(q)).eps if self.eps is None else self.eps,
            self.offset,
            interleaved_in=self.interleaved_in,
            interleaved_out=self.interleaved_out,
            half_tables=self.half_tables,
            norm_dtype=norm_dtype,
            out_dtype=norm_dtype if self.cast == "input" else None,
        )
        return tuple(map(self._heads_first, found))

    def _given(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, D) of what the module is called with."""
        return x.transpose(1, 2) if self.exchanged != (self.heads_dim == 2) else x

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again."""
        names = ("eps", "offset", "norm_cast", "exchanged")
        return {name: getattr(self, name) for name in names} | super().options()

    def extra_repr(self) -> str:
        parts = [f"eps={self.eps}"]
        if self.offset:
            parts.append(f"scale={self.offset:g} + weight")
        if self.norm_cast == "promote":
            parts.append("norm_cast=promote")
        if self.exchanged:
            parts.append("exchanged=True")
        return ", ".join((*parts, super().extra_repr()))


class LigerQKNormRotaryEmbedding(_NormRotary):
    """q and k normalised and turned in one launch: see `_NormRotary` for the arguments,
    `qk_norm_rope` for the maths."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q: (batch, heads, tokens, D) or (batch, tokens, heads, D), as heads_dim and exchanged
        say; k likewise, of its dtype, its number of heads its own; q_weight, k_weight: (D,), of one
        dtype; cos, sin: (1 or batch, tokens, R or R / 2). Returns both normalised and turned, in
        the shape that heads_dim says, in their order in memory.
        """
        new_q, new_k = self._run(q, k, q_weight, k_weight, cos, sin)
        return new_q, new_k


class LigerNormRotaryEmbedding(_NormRotary):
    """One tensor, where q and k are not turned together: see `_NormRotary` for the arguments."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """x: (batch, heads, tokens, D) or (batch, tokens, heads, D), as heads_dim and exchanged
        say; weight: (D,); cos, sin: (1 or batch, tokens, R or R / 2). Returns x normalised and
        turned, in the shape that heads_dim says, in its order in memory.
        """
        (new_x,) = self._run(x, None, weight, None, cos, sin)
        return new_x
