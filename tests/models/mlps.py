"""MLPs as people write them: gated, packed, plain, in a module of their own or inside another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

INNER = 40


class Separate(nn.Module):
    """w2(silu(w1(x)) * w3(x)), with the activation as a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, INNER, bias=False)
        self.w2 = nn.Linear(INNER, width, bias=False)
        self.w3 = nn.Linear(width, INNER, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class UpFirst(Separate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(torch.mul(self.w3(x), F.relu(self.w1(x))))


class SigmoidByHand(Separate):
    """silu spelled out as x * sigmoid(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.w1(x)
        return self.w2(gate * torch.sigmoid(gate) * self.w3(x))


class Gelu(nn.Module):
    def __init__(self, width: int, approximate: str = "none") -> None:
        super().__init__()
        self.gate = nn.Linear(width, INNER)
        self.up = nn.Linear(width, INNER)
        self.down = nn.Linear(INNER, width)
        self.act = nn.GELU(approximate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class GeluTanh(Gelu):
    def __init__(self, width: int) -> None:
        super().__init__(width, "tanh")


class Packed(nn.Module):
    """Gate and up in one projection, taken apart by chunk."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PackedUpFirst(Packed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = torch.chunk(self.gate_up(x), 2, -1)
        return self.down(up * F.gelu(gate))


class PackedSplit(Packed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).split(INNER, dim=-1)
        return self.down(F.silu(gate) * up)


class Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, INNER)
        self.fc2 = nn.Linear(INNER, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PlainTanh(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PlainRelu(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class PlainModule(Plain):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class InTheMiddle(nn.Module):
    """The projections belong to a layer that does more: only the product of the two is a site."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.gate = nn.Linear(width, INNER)
        self.up = nn.Linear(width, INNER)
        self.down = nn.Linear(INNER, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.mix(x).tanh()
        return h + self.down(F.silu(self.gate(h)) * self.up(h))


class SiluInPlace(Separate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x), inplace=True) * self.w3(x))


class ModuleInPlace(Separate):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class ProductInPlace(Separate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.w1(x), inplace=True)
        gate *= self.w3(x)
        return self.w2(gate)


class PlainReluInPlace(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu_())


class PlainSequential(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, INNER), nn.ReLU(inplace=True), nn.Linear(INNER, width))


class InTheMiddleInPlace(InTheMiddle):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.mix(x).tanh()
        return h + self.down(F.silu(self.gate(h), inplace=True).mul_(self.up(h)))


# class -> the rule that takes it, and the module that stands there afterwards
SPELLINGS: dict[type[nn.Module], tuple[str, str]] = {
    Separate: ("gated_mlp", "LigerSwiGLUMLP"),
    SigmoidByHand: ("gated_mlp", "LigerSwiGLUMLP"),
    UpFirst: ("gated_mlp", "LigerReGLUMLP"),
    Gelu: ("gated_mlp", "LigerGEGLUMLP"),
    GeluTanh: ("gated_mlp", "LigerGEGLUMLP"),
    Packed: ("gated_mlp", "LigerSwiGLUMLP"),
    PackedUpFirst: ("gated_mlp", "LigerGEGLUMLP"),
    PackedSplit: ("gated_mlp", "LigerSwiGLUMLP"),
    Plain: ("plain_mlp", "LigerMLP"),
    PlainTanh: ("plain_mlp", "LigerMLP"),
    PlainRelu: ("plain_mlp", "LigerMLP"),
    PlainModule: ("plain_mlp", "LigerMLP"),
    InTheMiddle: ("gated_mlp", "LigerSwiGLU"),
    SiluInPlace: ("gated_mlp", "LigerSwiGLUMLP"),
    ModuleInPlace: ("gated_mlp", "LigerSwiGLUMLP"),
    ProductInPlace: ("gated_mlp", "LigerSwiGLUMLP"),
    PlainReluInPlace: ("plain_mlp", "LigerMLP"),
    PlainSequential: ("plain_mlp", "LigerMLP"),
    InTheMiddleInPlace: ("gated_mlp", "LigerSwiGLU"),
}


class GateIsReadToo(Separate):
    """The activated gate leaves the product as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.w1(x))
        return self.w2(gate * self.w3(x)) + gate.sum(-1, keepdim=True)


class SoftmaxGate(Separate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w1(x).softmax(-1) * self.w3(x))


class Clamped(Separate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)).clamp(max=1.0) * self.w3(x))


class ReadBeforeInPlace(Separate):
    """What the activation writes into is also seen through a view made before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.w1(x)
        first = gate[..., :1]
        return self.w2(F.relu(gate, inplace=True) * self.w3(x)) + first


NEAR_MISSES = (GateIsReadToo, SoftmaxGate, Clamped, ReadBeforeInPlace)
