"""The dtype of a result, where the input and what multiplies it differ in dtype."""

from typing import Literal, get_args

import torch

Cast = Literal["input", "promote", "autocast"]

# The devices on which autocast has PyTorch's own norms of rows computed in float32.
_WIDENED = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla", "maia")
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::layer_norm", f"Autocast{kind.upper()}")
)


def check_cast(cast: str) -> None:
    """ValueError unless `cast` is one of those that `result_dtype` knows."""
    if cast not in get_args(Cast):
        raise ValueError(f"cast must be one of {', '.join(get_args(Cast))}, not {cast!r}")


def result_dtype(cast: Cast, x: torch.Tensor, *factors: torch.Tensor | None) -> torch.dtype:
    """x's dtype for "input"; the dtype that x * factors has for "promote"; for "autocast" that of
    PyTorch's own norms: x's, but float32 where autocast is on and has them computed in it."""
    dtype = x.dtype
    if cast == "promote":
        for factor in factors:
            if factor is not None and factor.dtype is not dtype:
                dtype = torch.promote_types(dtype, factor.dtype)
    elif cast == "autocast" and dtype is not torch.float64:
        kind = x.device.type
        if kind in _WIDENED and torch.is_autocast_enabled(kind):
            return torch.float32
    return dtype
