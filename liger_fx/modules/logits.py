"""The logits of a language model's head, by PyTorch's own operations.

    logits_of(h, W, None, 2.0, 1.0, 30.0, False, False)  =  30 tanh(2 h W^T / 30)

torch.compile records a call of it as one node, which may be left out where nothing reads them.
"""

import torch
import torch.nn.functional as F


@torch.compiler.allow_in_graph
def logits_of(
    h: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    divisor: float,
    softcap: float,
    added: bool,
    as_float32: bool,
) -> torch.Tensor:
    """h (..., width), weight (vocab, width) and, or None, bias (vocab,) give (..., vocab): the
    linear layer's result, to which the bias is added by itself where it is `added`, times scale,
    divided by divisor, soft-capped to softcap (0.0 is none)."""
    logits = F.linear(h, weight, None if added else bias)
    logits = logits + bias if added and bias is not None else logits
    logits = logits * scale if scale != 1 else logits
    logits = logits / divisor if divisor != 1 else logits
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return logits.float() if as_float32 else logits
