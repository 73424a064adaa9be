"""RMSNorm as people write it: x * w / sqrt(mean(x^2) + eps), in other spellings than llama's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-4


class Weighted(nn.Module):
    """A weight that is no constant, and the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 0.3 * torch.randn(width))


class SquareRsqrt(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.scale


class ProductOverSqrt(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + EPS)
        return self.scale * (x / root)


class PowMinusHalf(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x * (EPS + x.pow(2).mean(dim=-1, keepdim=True)).pow(-0.5))


class FunctionsOnly(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.mean(torch.pow(x, 2), -1, keepdim=True)
        return torch.mul(torch.mul(torch.rsqrt(torch.add(mean, EPS)), x), self.scale)


class WithOperators(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale / ((x**2).mean(-1, True) + EPS) ** 0.5


class Upcast(Weighted):
    """Float32 inside, the weight too, and back once at the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * self.scale.float()).to(x.dtype)


class UpcastWeightAfter(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        root = wide.square().mean(-1, keepdim=True).add(EPS).rsqrt()
        return self.scale * (wide * root).type_as(x)


class OnePlusWeight(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        return (normed * (1.0 + self.scale.float())).type(x.dtype)


class NoWeight(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


class Functional(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.scale, EPS)


class FunctionalNoEps(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.scale)


class Builtin(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class BuiltinNoWeight(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class PerHead(nn.Module):
    """A norm over each head's width, on a view of the projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_norm = SquareRsqrt(width // 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        return self.q_norm(x.view(batch, length, 4, width // 4)).transpose(1, 2)


class Inline(nn.Module):
    """No norm module at all: the weights stand on the layer that uses them, twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Parameter(1 + 0.3 * torch.randn(width))
        self.after = nn.Parameter(1 + 0.3 * torch.randn(width))
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * self.before
        h = self.proj(h) + x
        return h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 2 * EPS) * self.after


# class -> sites it has
SPELLINGS: dict[type[nn.Module], int] = {
    SquareRsqrt: 1,
    ProductOverSqrt: 1,
    PowMinusHalf: 1,
    FunctionsOnly: 1,
    WithOperators: 1,
    Upcast: 1,
    UpcastWeightAfter: 1,
    OnePlusWeight: 1,
    NoWeight: 1,
    Functional: 1,
    FunctionalNoEps: 1,
    Builtin: 1,
    BuiltinNoWeight: 1,
    PerHead: 1,
    Inline: 2,
}


class OtherTensor(Weighted):
    """Scales one tensor by the root of another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.tanh()
        return x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * self.scale


class OtherDimension(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * self.scale


class EpsOutside(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS) * self.scale


class EpsFromData(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.amax().abs()) * self.scale


class RootIsReadToo(Weighted):
    """The root leaves the norm as well: a fused norm does not give it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x * root * self.scale + root


class Cubed(Weighted):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS) * self.scale


NEAR_MISSES = (OtherTensor, OtherDimension, EpsOutside, EpsFromData, RootIsReadToo, Cubed)
