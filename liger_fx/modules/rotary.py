"""LigerRotaryEmbedding: the module in place of every spelling of "apply the rotary embedding".

(self_attn): LlamaAttention(...)            the function apply_rotary_pos_emb showed nowhere
->  (self_attn): LlamaAttention(
      (rotary): LigerRotaryEmbedding(128 of 128, half-split)
    )
"""

from typing import Any

import torch

from liger_fx.kernels.rope import rope, rope_pair
from liger_fx.modules.casting import Cast, check_cast, result_dtype
from liger_fx.modules.origin import NamedModule


class Rotary(NamedModule):
    """interleaved_in, interleaved_out: whether pair j is elements (2j, 2j + 1), not (j, j + R / 2).
    half_tables: cos and sin hold one entry a pair (R / 2), not R laid out as the output is.
    cast: "input" where results have the dtype of q and k, "promote" that of q * cos and k * cos.
    heads_dim: where q and k have their heads: 1 for (batch, heads, tokens, D), 2 for (batch,
        tokens, heads, D). cos and sin are (1 or batch, tokens, ...) either way.
    rotary_dim, head_dim: R and D, for the repr alone.
    """

    def __init__(
        self,
        *,
        interleaved_in: bool = False,
        interleaved_out: bool = False,
        half_tables: bool = False,
        cast: Cast = "promote",
        heads_dim: int = 1,
        rotary_dim: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_cast(cast)
        if heads_dim not in (1, 2):
            raise ValueError(f"heads_dim must be 1 or 2, not {heads_dim}")
        self.interleaved_in = interleaved_in
        self.interleaved_out = interleaved_out
        self.half_tables = half_tables
        self.cast: Cast = cast
        self.heads_dim = heads_dim
        self.rotary_dim = rotary_dim
        self.head_dim = head_dim

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        out = rope(
            self._heads_first(x),
            cos,
            sin,
            interleaved_in=self.interleaved_in,
            interleaved_out=self.interleaved_out,
            half_tables=self.half_tables,
            out_dtype=result_dtype(self.cast, x, cos),
        )
        return self._heads_first(out)

    def _heads_first(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, D) of the model's layout, and back again."""
        return x.transpose(1, 2) if self.heads_dim == 2 else x

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again."""
        names = ("interleaved_in", "interleaved_out", "half_tables", "cast", "heads_dim")
        return {name: getattr(self, name) for name in (*names, "rotary_dim", "head_dim")}

    def extra_repr(self) -> str:
        ends = (self.interleaved_in, self.interleaved_out)
        names = ["interleaved" if interleaved else "half-split" for interleaved in ends]
        parts = [names[0] if names[0] == names[1] else " -> ".join(names)]
        if self.rotary_dim is not None:
            parts.insert(0, f"{self.rotary_dim} of {self.head_dim or self.rotary_dim}")
        if self.half_tables:
            parts.append("half_tables=True")
        if self.heads_dim == 2:
            parts.append("heads_dim=2")
        if self.cast == "input":
            parts.append("cast=input")
        return ", ".join(parts)


class LigerRotaryEmbedding(Rotary):
    """q and k turned in one launch: see `Rotary` for the arguments, `rope_pair` for the maths."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q: (batch, heads, tokens, D) or (batch, tokens, heads, D), as heads_dim says; k likewise,
        its number of heads its own; cos, sin: (1 or batch, tokens, R or R / 2). Returns q and k
        turned, of the same shapes.
        """
        if q.dtype != k.dtype:
            return self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        if self.heads_dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        new_q, new_k = rope_pair(
            q,
            k,
            cos,
            sin,
            interleaved_in=self.interleaved_in,
            interleaved_out=self.interleaved_out,
            half_tables=self.half_tables,
            out_dtype=result_dtype(self.cast, q, cos),
        )
        if self.heads_dim == 2:
            return new_q.transpose(1, 2), new_k.transpose(1, 2)
        return new_q, new_k


class LigerSingleRotaryEmbedding(Rotary):
    """One tensor turned, where q and k are not turned together: see `Rotary` for the arguments."""

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (batch, heads, tokens, D) or (batch, tokens, heads, D), as heads_dim says; cos, sin:
        (1 or batch, tokens, R or R / 2). Returns x turned, of the same shape.
        """
        return self._rotate(x, cos, sin)
