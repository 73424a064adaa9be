"""LigerFusedLinearCrossEntropy: the loss of a language model's head, beside the head.

(model): LlamaModel(...)                   (model): LlamaModel(...)
(lm_head): Linear(...)             ->      (lm_head): Linear(...)
                                           (linear_cross_entropy): LigerFusedLinearCrossEntropy()
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from liger_fx.kernels.compiling import inductor_compiles
from liger_fx.kernels.library import at_once
from liger_fx.kernels.linear_cross_entropy import REDUCTIONS, Form, linear_cross_entropy
from liger_fx.modules.lazy_logits import lazy_logits
from liger_fx.modules.logits import logits_of
from liger_fx.modules.origin import NamedModule

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class LigerFusedLinearCrossEntropy(NamedModule):
    """cross_entropy(logits(h W^T + b), labels), which keeps no logits when it trains.

    logits: the linear layer's result times `scale`, divided by `divisor`, soft-capped to
    `softcap` (see liger_fx.kernels.linear_cross_entropy; 0.0 is none).
    smoothing, ignore_index, reduction: as torch.nn.functional.cross_entropy has them.
    upcast: whether the logits are cast to float32 for the loss, which is float32 then.
    biased: whether there is a bias; added: whether it is no part of the layer but added after it.
    gives_logits: whether a call gives (loss, logits), not the loss alone; float_logits: whether
    these are cast to float32.
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        divisor: float = 1.0,
        softcap: float = 0.0,
        smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        upcast: bool = True,
        biased: bool = False,
        added: bool = False,
        gives_logits: bool = False,
        float_logits: bool = False,
    ) -> None:
        super().__init__()
        self.scale, self.divisor, self.softcap = scale, divisor, softcap
        self.smoothing, self.ignore_index, self.reduction = smoothing, ignore_index, reduction
        self.upcast, self.biased, self.added = upcast, biased, added
        self.gives_logits, self.float_logits = gives_logits, float_logits
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
        self._form = Form(scale / divisor, softcap, smoothing, 0.0, ignore_index, reduction)

    def forward(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        *more: torch.Tensor,
    ) -> Result:
        """hidden_states: (..., width); labels: one for each row; weight: (vocab, width); more: the
        bias (vocab,) if it is `biased`, and the number that the loss is divided by if it is.
        Returns the loss, a scalar, and with `gives_logits` the logits (..., vocab): when it trains
        these are computed once they are read, else they are what the loss is computed from.
        """
        bias = more[0].reshape(-1) if self.biased else None
        items = next(iter(more[self.biased :]), None)
        given = (hidden_states, weight, bias)
        if self.gives_logits and not self._may_wait(given):
            logits = self.logits(*given)
            return self._plain_loss(logits, labels, items), logits
        h, w, b = self._as_autocast(given)
        upcast = self.upcast or torch.is_autocast_enabled(h.device.type)
        dtype = torch.promote_types(h.dtype, torch.float32) if upcast else h.dtype
        loss = linear_cross_entropy(h, w, labels, b, items, self._form, dtype)
        loss = loss.float() if upcast else loss
        return (loss, self._lazy_logits(h, w, b)) if self.gives_logits else loss

    def _lazy_logits(
        self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self.logits(h, weight, bias)
        dtype = torch.float32 if self.float_logits else h.dtype
        return lazy_logits(self.logits, dtype, h, weight, bias)

    def logits(
        self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The logits of every row, by PyTorch's own operations."""
        form = (self.scale, self.divisor, self.softcap, self.added, self.float_logits)
        return logits_of(h, weight, bias, *form)

    def _plain_loss(
        self, logits: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | None
    ) -> torch.Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(
            rows.float() if self.upcast else rows, labels.reshape(-1),
            ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.smoothing,
        )  # fmt: skip
        return loss if items is None else loss / items

    def _may_wait(self, given: tuple[torch.Tensor | None, ...]) -> bool:
        """Whether logits are to be lazy: in training, where nothing but autograd looks on, or
        Inductor, which is given none that nothing reads."""
        if not (self.training and torch.is_grad_enabled()):
            return False
        wait = inductor_compiles() if torch.compiler.is_compiling() else at_once(given)
        return wait and any(x is not None and x.requires_grad for x in given)

    @staticmethod
    def _as_autocast(given: tuple[Any, ...]) -> tuple[Any, ...]:
        """What autocast would have a linear layer compute with."""
        device = given[0].device.type
        if not torch.is_autocast_enabled(device):
            return given
        dtype = torch.get_autocast_dtype(device)
        return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in given)

    def options(self) -> dict[str, Any]:
        """The plain arguments that make such a module again."""
        names = ("scale", "divisor", "softcap", "smoothing", "ignore_index", "reduction", "upcast")
        more = ("biased", "added", "gives_logits", "float_logits")
        return {name: getattr(self, name) for name in (*names, *more)}

    def extra_repr(self) -> str:
        parts = []
        for name, usual in (("scale", 1.0), ("divisor", 1.0), ("softcap", 0.0), ("smoothing", 0.0)):
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name):g}")
        if self.ignore_index != -100:
            parts.append(f"ignore_index={self.ignore_index}")
        if not self.upcast:
            parts.append("upcast=False")
        return ", ".join([f"reduction={self.reduction}", *parts])
