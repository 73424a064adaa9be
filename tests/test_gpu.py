"""What only a GPU can show: the kernels run there, and graphs travel there from the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import liger_fx

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def llama(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


def ids(rows: int = 2, length: int = 33, device: str = "cuda") -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    return torch.randint(0, 512, (rows, length), generator=generator).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_verify_holds(dtype: torch.dtype) -> None:
    model = llama(dtype)
    found = liger_fx.verify(model, liger_fx.optimize(model))
    assert found.ok, str(found)
    assert len(found.sites) == 13


def test_the_kernels_are_what_runs() -> None:
    model = llama()
    opt = liger_fx.optimize(model)
    opt(input_ids=ids(), labels=ids()).loss.backward()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        opt(input_ids=ids(), labels=ids()).loss.backward()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert names.count("_forward_kernel") >= 7 + 3  # norms, and activations times up
    assert names.count("_backward_kernel") >= 7 + 3
    assert names.count("_kernel") >= 2 * 3  # rotary, forward and backward
    assert not any("rsqrt" in name for name in names)


def test_a_model_moved_to_the_gpu_is_traced_anew() -> None:
    model = llama(torch.float32, "cpu")
    opt = liger_fx.optimize(model)
    expected = opt(ids(device="cpu")).logits
    opt.cuda()
    found = opt(ids()).logits
    assert found.is_cuda and len(opt.plans) >= 2
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-3)


def test_a_graph_saved_on_the_cpu_runs_on_the_gpu(tmp_path: Path) -> None:
    model = llama(torch.float32, "cpu")
    liger_fx.save(liger_fx.optimize(model), tmp_path / "saved")
    loaded = liger_fx.load(tmp_path / "saved", device="cuda")
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}
    mask = torch.ones_like(ids())
    found = loaded(input_ids=ids(), attention_mask=mask).logits
    assert len(loaded.plans) == 1
    expected = model(input_ids=ids(device="cpu"), attention_mask=mask.cpu()).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-3, atol=2e-3)
    loaded.train()
    loaded(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_an_exported_program_runs_in_a_fresh_process(tmp_path: Path) -> None:
    model = llama()
    liger_fx.export(liger_fx.optimize(model), tmp_path / "model.pt2")
    for rows, length in ((1, 5), (3, 64)):
        given = ids(rows, length)
        mask = torch.ones_like(given)
        torch.save({"input_ids": given, "attention_mask": mask}, tmp_path / "inputs.pt")
        script = (
            "import torch, liger_fx.modules\n"
            "program = torch.export.load('model.pt2').module()\n"
            "inputs = torch.load('inputs.pt')\n"
            "torch.save(program(**inputs)['logits'], 'logits.pt')\n"
        )
        root = str(Path(__file__).resolve().parents[1])
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{script}"],
            cwd=tmp_path,
            check=True,
        )
        found = torch.load(tmp_path / "logits.pt")
        with torch.no_grad():
            expected = model(input_ids=given, attention_mask=mask).logits
        assert found.is_cuda
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < 2e-2  # two roundings to bfloat16 apart
