"""Which kernels are compiled before they are launched. (test_gpu.py compiles them.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

import liger_fx
from liger_fx.kernels import launch, linear_cross_entropy
from liger_fx.kernels.add_rms_norm import _add_rms_norm
from liger_fx.kernels.gated_activation import _gated
from liger_fx.kernels.replay import Replayed
from liger_fx.kernels.rms_norm import _rms_norm, rms_norm_backward
from liger_fx.kernels.rope import _rope_pair
from liger_fx.tiny import tiny_model

TRAINED = {
    "norm._forward_kernel", "norm._backward_kernel", "norm._sum_kernel", "rope._kernel",
    "gated_activation._forward_kernel", "gated_activation._backward_kernel",
    "linear_cross_entropy._rows_kernel", "linear_cross_entropy._scale_kernel",
}  # fmt: skip
CALLED = {"norm._forward_kernel", "rope._kernel", "gated_activation._forward_kernel"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The kernels that are compiled ahead, where tensors on the CPU are taken for a GPU's."""
    found = set[str]()

    def start(key: Any, kernel: Any, index: Any, args: Any, constants: Any) -> None:
        found.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}")

    monkeypatch.setattr(launch, "start_compiling", start)
    monkeypatch.setattr("liger_fx.modules.compile_ahead.INTERPRETED", False)
    monkeypatch.setattr("liger_fx.modules.compile_ahead.start_triton", lambda index: None)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(Replayed, "__call__", lambda self, *args: self.run(*args))
    for op in (_rms_norm, rms_norm_backward, _add_rms_norm, _rope_pair, _gated):
        monkeypatch.setattr(op, "plain", None)
    monkeypatch.setattr(linear_cross_entropy, "_check_labels", lambda *args: None)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    return found


@pytest.mark.parametrize("train", [True, False])
def test_what_a_step_launches(train: bool, started: set[str]) -> None:
    model = tiny_model("llama").train(train)
    ids = torch.randint(3, 256, (16, 128))
    labels = {"labels": ids} if train else {}
    before = {name: p.clone() for name, p in model.named_parameters()}
    opt = liger_fx.optimize(model, {"input_ids": ids, **labels})
    assert started == (TRAINED if train else CALLED)
    assert all(torch.equal(p, before[name]) for name, p in opt.named_parameters())
    assert all(p.grad is None for p in opt.parameters())


def test_hooks_see_no_fakes(started: set[str]) -> None:
    model = tiny_model("llama").train()
    seen: list[Any] = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: seen.append(args))
    liger_fx.optimize(model)
    assert started and not seen


class Counting(TorchFunctionMode):
    """Sees what is asked of PyTorch in its thread."""

    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += any(isinstance(arg, FakeTensor) for arg in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(
    reentrant: bool, started: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would compute a layer again for what is saved in it."""
    monkeypatch.setattr(launch, "_start", lambda *args: None)
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    opt = liger_fx.optimize(model)
    started.clear()
    ids = torch.randint(3, 256, (16, 128))
    with Counting() as mode:
        opt(input_ids=ids, labels=ids).loss.backward()
    assert started >= TRAINED - {"norm._sum_kernel"} and not mode.seen


def test_what_cannot_be_walked_through_is_left_out(
    started: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("only the numbers tell")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    liger_fx.optimize(tiny_model("llama").train())
    assert started == CALLED
