"""What PyTorch sees: one operator each, with fakes that tell the truth, whatever looks at it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from liger_fx.kernels.activation import activation
from liger_fx.kernels.add_layer_norm import add_layer_norm
from liger_fx.kernels.add_rms_norm import add_rms_norm
from liger_fx.kernels.experts import experts
from liger_fx.kernels.gated_activation import gated_activation, packed_gated_activation
from liger_fx.kernels.launch import INTERPRETED
from liger_fx.kernels.layer_norm import layer_norm
from liger_fx.kernels.linear_cross_entropy import Form
from liger_fx.kernels.qk_norm_rope import qk_norm_rope
from liger_fx.kernels.rms_norm import rms_norm
from liger_fx.kernels.rope import rope, rope_pair

OPS = torch.ops.liger_fx
BF16 = torch.bfloat16


def heads(tokens: int, number: int, dim: int, **kwargs: Any) -> torch.Tensor:
    return torch.randn(2, tokens, number, dim, **kwargs).transpose(1, 2)


def table(tokens: int, width: int) -> torch.Tensor:
    return torch.randn(1, tokens, width)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()


def expert_inputs(
    made: Callable[[torch.Tensor], torch.Tensor], transposed: bool
) -> tuple[torch.Tensor, ...]:
    """Three tokens with two experts each, of four: x, weights, the matrices, and their order."""
    into, out_of = torch.randn(4, 10, 8), torch.randn(4, 8, 5)
    if transposed:
        into, out_of = torch.randn(4, 8, 10), torch.randn(4, 5, 8)
    place = torch.tensor([[3, 0], [1, 4], [5, 2]])
    offsets = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    given = (torch.randn(3, 8), torch.randn(3, 2), into, out_of)
    return *map(made, given), place, offsets


DIRECT: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "rms_norm": lambda: (
        OPS.rms_norm, (leaf(torch.randn(3, 5, 8)), leaf(torch.randn(8)), 1e-5, 1.0, None)
    ),
    "rms_norm of heads": lambda: (OPS.rms_norm, (leaf(heads(5, 3, 8)), None, 1e-5, 0.0, BF16)),
    "rms_norm strided": lambda: (
        OPS.rms_norm, (torch.randn(4, 6, 8, 12)[::2, ::2, ::2, :7], None, 1e-5, 0.0, None)
    ),
    "rms_norm last dimension first": lambda: (
        OPS.rms_norm, (torch.randn(8, 6).t(), leaf(torch.randn(8)[:8]), 1e-5, 0.0, None)
    ),
    "rms_norm backward": lambda: (
        OPS.rms_norm_backward,
        (torch.randn(2, 3, 5, 8), heads(5, 3, 8), torch.randn(8), 1e-5, 1.0, True),
    ),
    "rms_norm backward, frozen": lambda: (
        OPS.rms_norm_backward, (torch.randn(4, 8), torch.randn(4, 8), None, 1e-5, 1.0, False)
    ),
    "add_rms_norm": lambda: (
        OPS.add_rms_norm,
        (leaf(torch.randn(3, 5, 8)), leaf(torch.randn(3, 5, 8)), leaf(torch.randn(8)), 1e-5, 1.0,
         None),
    ),
    "add_rms_norm, other strides": lambda: (
        OPS.add_rms_norm, (heads(5, 3, 8), leaf(torch.randn(2, 3, 5, 8)), None, 1e-5, 0.0, BF16)
    ),
    "add_rms_norm of heads": lambda: (
        OPS.add_rms_norm, (heads(5, 3, 8), leaf(heads(5, 3, 8)), torch.randn(8), 1e-5, 0.0, None)
    ),
    "add_rms_norm backward": lambda: (
        OPS.add_rms_norm_backward,
        (heads(5, 3, 8), torch.randn(2, 3, 5, 8), heads(5, 3, 8), torch.randn(8), 1e-5, 1.0, True),
    ),
    "layer_norm": lambda: (
        OPS.layer_norm,
        (leaf(torch.randn(3, 5, 8)), leaf(torch.randn(8)), leaf(torch.randn(8)), 1e-5, 1.0, None),
    ),
    "layer_norm of heads": lambda: (
        OPS.layer_norm, (leaf(heads(5, 3, 8)), None, None, 1e-5, 0.0, BF16)
    ),
    "layer_norm strided": lambda: (
        OPS.layer_norm,
        (torch.randn(4, 6, 8, 12)[::2, ::2, ::2, :7], torch.randn(7), None, 1e-5, 0.0, None),
    ),
    "layer_norm backward": lambda: (
        OPS.layer_norm_backward,
        (torch.randn(2, 3, 5, 8), heads(5, 3, 8), torch.randn(8), torch.randn(8), 1e-5, 1.0, True,
         True),
    ),
    "layer_norm backward, the weight frozen": lambda: (
        OPS.layer_norm_backward,
        (torch.randn(4, 8), torch.randn(4, 8), torch.randn(8), torch.randn(8), 1e-5, 1.0, False,
         True),
    ),
    "add_layer_norm": lambda: (
        OPS.add_layer_norm,
        (leaf(torch.randn(3, 5, 8)), leaf(torch.randn(3, 5, 8)), leaf(torch.randn(8)),
         leaf(torch.randn(8)), 1e-5, 1.0, None),
    ),
    "add_layer_norm, other strides": lambda: (
        OPS.add_layer_norm,
        (heads(5, 3, 8), leaf(torch.randn(2, 3, 5, 8)), None, None, 1e-5, 0.0, BF16),
    ),
    "add_layer_norm backward": lambda: (
        OPS.add_layer_norm_backward,
        (heads(5, 3, 8), torch.randn(2, 3, 5, 8), heads(5, 3, 8), torch.randn(8), torch.randn(8),
         1e-5, 1.0, True, True),
    ),
    "qk_norm_rope": lambda: (
        OPS.qk_norm_rope,
        (leaf(heads(5, 3, 8)), leaf(torch.randn(2, 1, 5, 8)), leaf(torch.randn(8)),
         leaf(torch.randn(8)), table(5, 6), table(5, 6), 1e-5, 1.0, True, False, False,
         torch.float32, BF16),
    ),
    "qk_norm_rope of one": lambda: (
        OPS.qk_norm_rope,
        (leaf(torch.randn(2, 5, 9, 16)[:, :, 1:4].transpose(1, 2)), None, leaf(torch.randn(16)),
         None, table(5, 4), table(5, 4), 1e-5, 0.0, False, False, True, BF16, torch.float32),
    ),
    "qk_norm_rope backward": lambda: (
        OPS.qk_norm_rope_backward,
        (torch.randn(2, 3, 5, 8), heads(5, 1, 8), heads(5, 3, 8), torch.randn(2, 1, 5, 8),
         torch.randn(8), torch.randn(8), table(5, 8), table(5, 8), 1e-5, 0.0, False, False, False,
         torch.float32, torch.float32, True),
    ),
    "qk_norm_rope backward, frozen": lambda: (
        OPS.qk_norm_rope_backward,
        (torch.randn(2, 3, 5, 8), None, heads(5, 3, 8), None, torch.randn(8), None, table(5, 8),
         table(5, 8), 1e-5, 0.0, False, True, False, torch.float32, torch.float32, False),
    ),
    "rope": lambda: (
        OPS.rope, (leaf(heads(5, 3, 8)), table(5, 6), table(5, 6), True, False, False, False, BF16)
    ),
    "rope_pair": lambda: (
        OPS.rope_pair,
        (leaf(heads(5, 3, 8)), leaf(torch.randn(2, 1, 5, 8, dtype=BF16)), table(5, 4), table(5, 4),
         False, False, True, False, None, None),
    ),
    "activation": lambda: (OPS.activation, (leaf(heads(5, 3, 8)), "gelu")),
    "activation backward": lambda: (
        OPS.activation_backward, (torch.randn(2, 3, 5, 8), heads(5, 3, 8), "silu")
    ),
    "gated": lambda: (
        OPS.gated_activation, (leaf(heads(5, 3, 8)), leaf(torch.randn(2, 3, 5, 8)), "silu")
    ),
    "gated backward": lambda: (
        OPS.gated_activation_backward,
        (heads(5, 3, 8), heads(5, 3, 8), torch.randn(2, 3, 5, 8, dtype=BF16), "relu"),
    ),
    "packed": lambda: (
        OPS.packed_gated_activation, (leaf(torch.randn(3, 5, 8)), "gelu_tanh", False)
    ),
    "packed, strided": lambda: (
        OPS.packed_gated_activation, (torch.randn(4, 6, 12)[:, ::2, 2:10], "silu", True)
    ),
    "packed backward": lambda: (
        OPS.packed_gated_activation_backward,
        (torch.randn(3, 5, 4), torch.randn(3, 5, 8), "gelu", True),
    ),
    "experts": lambda: (OPS.experts, (*expert_inputs(leaf, False), "silu", False)),
    "experts of short dtypes, transposed": lambda: (
        OPS.experts, (*expert_inputs(lambda x: leaf(x.to(BF16)), True), "gelu", True)
    ),
    "experts backward": lambda: (
        OPS.experts_backward,
        (torch.randn(3, 8), *expert_inputs(torch.clone, False), torch.randn(6, 10), "silu", False,
         True, True, True),
    ),
    "experts backward, frozen": lambda: (
        OPS.experts_backward,
        (torch.randn(8, 3).t(), *expert_inputs(torch.clone, True), torch.randn(6, 10), "relu", True,
         False, False, True),
    ),
    "linear_cross_entropy": lambda: (
        OPS.linear_cross_entropy,
        (leaf(torch.randn(6, 8)), leaf(torch.randn(11, 8)), leaf(torch.randn(11)),
         torch.arange(6), torch.tensor(5), *Form(1.5, 5.0, 0.1, 0.01), torch.float32),
    ),
    "linear_cross_entropy and gradients": lambda: (
        OPS.linear_cross_entropy_and_gradients,
        (torch.randn(8, 6).t(), torch.randn(8, 11).t(), None, torch.arange(6), None, *Form(),
         BF16, True, True, False),
    ),
    "linear_cross_entropy, frozen": lambda: (
        OPS.linear_cross_entropy_and_gradients,
        (torch.randn(6, 8), torch.randn(11, 8), torch.randn(11), torch.arange(6), None, *Form(),
         torch.float32, True, False, True),
    ),
}  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="opcheck compiles; the PyTorch path says the same")
@pytest.mark.parametrize("case", DIRECT)
def test_opcheck(case: str) -> None:
    op, arguments = DIRECT[case]()
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("case", DIRECT)
def test_fake_tensors_have_the_real_layout(case: str) -> None:
    op, arguments = DIRECT[case]()
    real = op(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (real, fake)), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def every_op(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    """x: (batch, heads, tokens, 8). Each operator once."""
    x, s = add_rms_norm(rms_norm(x, weight, 1e-5, 1.0), x, weight, 1e-5)
    x = x + s
    x, s = add_layer_norm(layer_norm(x, weight, weight, 1e-5), s, weight, None, 1e-5)
    x = x + s
    q, k = rope_pair(x, x, cos, cos, interleaved_in=True)
    q, k = qk_norm_rope(q, k, weight, weight, cos, cos, 1e-5)
    q = gated_activation(q, rope(k, cos, cos), "silu") + activation(k, "relu")
    x = packed_gated_activation(torch.cat((q, k), dim=-1), "gelu")
    index = torch.arange(x.numel() // 8, device=x.device).view(-1, 1) % 3
    into, out_of = (torch.stack([w, w, w]) for w in (weight.expand(4, 8), weight[:2].expand(8, 2)))
    rows = experts(x.reshape(-1, 8), index, x.reshape(-1, 8)[:, :1], into, out_of, "silu")
    return rows.view(x.shape)


NAMES = [
    "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rope_pair", "qk_norm_rope", "rope",
    "gated_activation", "activation", "packed_gated_activation", "experts",
]  # fmt: skip


def ours(graph: torch.fx.Graph) -> list[str]:
    """The names of this package's operators in a graph, in order."""
    targets = [n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return [t._opname for t in targets if t.namespace == "liger_fx"]


@pytest.mark.skipif(INTERPRETED, reason="compiles; the PyTorch path says the same")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_sees_one_operator_each(dynamic: bool) -> None:
    graphs: list[torch.fx.Graph] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm.graph)
        return gm.forward

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(every_op, backend=backend, fullgraph=True, dynamic=dynamic)
    for tokens in (5, 6):
        x, weight, cos = leaf(heads(tokens, 3, 8)), leaf(torch.randn(8)), table(tokens, 6)
        inputs = (x, weight)
        expected = torch.autograd.grad(every_op(x, weight, cos).sum(), inputs)
        found = torch.autograd.grad(compiled(x, weight, cos).sum(), inputs)
        torch.testing.assert_close(found, expected)
    forward, backward = graphs[:2]
    assert ours(forward) == NAMES
    assert sorted(ours(backward)) == sorted(
        name if name.startswith("rope") else f"{name}_backward" for name in NAMES
    )
    assert len(graphs) == (2 if dynamic else 4)
    torch._dynamo.reset()


@pytest.mark.skipif(INTERPRETED, reason="traces; the PyTorch path says the same")
@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_one_operator_each(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
            return every_op(x, weight, cos)

    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(
        Model(),
        (heads(5, 3, 8), torch.randn(8), table(5, 6)),
        dynamic_shapes=({2: tokens}, None, {1: tokens}),
        strict=strict,
    )
    assert ours(exported.graph) == NAMES
    assert ours(exported.run_decompositions().graph) == NAMES
    other = heads(9, 3, 8), torch.randn(8), table(9, 6)
    torch.testing.assert_close(exported.module()(*other), every_op(*other))


def test_autocast_and_inference_mode_change_nothing(device: str) -> None:
    x, weight, cos = heads(5, 3, 8).to(device), torch.randn(8).to(device), table(5, 6).to(device)
    expected = every_op(x, weight, cos)
    with torch.autocast(device, BF16):
        assert torch.equal(every_op(x, weight, cos), expected)
    with torch.inference_mode():
        assert torch.equal(every_op(x, weight, cos), expected)
