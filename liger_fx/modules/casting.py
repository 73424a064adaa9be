"""The dtype of a result, where the input and what multiplies it differ in dtype."""

from typing import Literal, get_args

import torch

Cast = Literal["input", "promote"]


def check_cast(cast: str) -> None:
    """ValueError unless `cast` is "input" or "promote"."""
    if cast not in get_args(Cast):
        raise ValueError(f"cast must be one of {', '.join(get_args(Cast))}, not {cast!r}")


def result_dtype(cast: Cast, x: torch.Tensor, factor: torch.Tensor | None) -> torch.dtype:
    """x's dtype for "input"; the dtype that x * factor has for "promote"."""
    if cast == "input" or factor is None:
        return x.dtype
    return torch.promote_types(x.dtype, factor.dtype)
