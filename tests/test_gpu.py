"""What only a GPU can show: the kernels run there, and graphs travel there from the CPU."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import liger_fx
from liger_fx.kernels import linear_cross_entropy as loss_kernel
from liger_fx.kernels.linear_cross_entropy import Form, linear_cross_entropy
from liger_fx.modules import LigerLayerNorm
from liger_fx.tracing import leaves
from tests.kernels.accuracy import FLOAT32_SLACK, drawing
from tests.kernels.test_qk_norm_rope import assert_near
from tests.kernels.test_rope import tables
from tests.support.families import build

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
    assert len(found.sites) == 14


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim, width", [(64, 64), (80, 40), (128, 128), (256, 256)])
def test_norm_and_turn_of_heads_against_float64(dim: int, width: int, dtype: torch.dtype) -> None:
    """Both from the layout of a projection; gradients as attention gives them, heads first."""
    torch.manual_seed(0)
    draw, tokens = drawing(dtype), 515
    q, k = (draw(2, tokens, heads, dim).transpose(1, 2) for heads in (16, 8))
    grads = draw(2, 16, tokens, dim), draw(2, 8, tokens, dim)
    assert_near((q, k, draw(dim), draw(dim)), grads, *tables(2, tokens, width, "cuda", dtype))


def loss_inputs(
    rows: int, vocab: int, width: int, dtype: torch.dtype, frozen: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """h, weight and bias, and labels of which some are ignored and some stand often."""
    torch.manual_seed(0)
    h, weight = torch.randn(rows, width, device="cuda"), torch.randn(vocab, width, device="cuda")
    tensors = [h, weight / width**0.5, torch.randn(vocab, device="cuda")]
    chances = 1 / torch.arange(1, vocab + 1, device="cuda")  # as words of a text are
    labels = torch.multinomial(chances, rows, replacement=True)
    labels[::5], labels[1::4] = -100, 3
    leaves = [t.to(dtype).requires_grad_(not (frozen and i)) for i, t in enumerate(tensors)]
    return leaves, labels


def loss_of(leaves: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(leaves[0], leaves[1], labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [Form(), Form(0.5, 20.0, 0.1, 1e-3, -100, "sum")], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 8), (33, 50257, 64), (5000, 9999, 512)], ids=str)
def test_the_loss_against_float64(
    shape: tuple[int, int, int], form: Form, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients at most 1.1 times as far off as eager's; in several chunks too."""
    leaves, labels = loss_inputs(*shape, dtype)
    if shape[0] == 1:
        labels.fill_(2)
    torch.backends.cuda.matmul.allow_tf32 = False

    def textbook(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.linear(h, w, b) * form.scale
        if form.softcap:
            logits = torch.tanh(logits / form.softcap) * form.softcap
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = nn.functional.cross_entropy(
            logits, labels, reduction=form.reduction, label_smoothing=form.smoothing
        )
        return loss + form.z_loss * logits.logsumexp(-1).square()[labels >= 0].sum()

    def run(function: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        loss = function(*tensors)
        return [loss, *torch.autograd.grad(loss, tensors)]

    exact = run(textbook, [t.detach().double().requires_grad_() for t in leaves])
    eager = run(textbook, leaves)
    for rows in (shape[0], 640):
        monkeypatch.setattr(loss_kernel, "chunk_rows", lambda *args, rows=rows: rows)
        ours = run(lambda h, w, b: linear_cross_entropy(h, w, labels, b, form=form), leaves)
        for mine, plain, true in zip(ours, eager, exact, strict=True):
            mine, plain = (((t - true).norm() / true.norm()).item() for t in (mine, plain))
            assert mine <= 1.1 * plain + max(FLOAT32_SLACK, 0.1 * torch.finfo(dtype).eps)


COMPILED = """
import sys, threading, torch, triton, liger_fx
from liger_fx.tiny import tiny_model
by = []
def listen(*, src, **_):
    by.append((threading.current_thread().name, src.name))
triton.knobs.compilation.listener = listen
model = tiny_model(sys.argv[1]).to("cuda", torch.bfloat16).train()
ids = torch.randint(3, 256, (16, 128), device="cuda")
inputs = {"input_ids": ids, "labels": ids}
if "checkpointed" in sys.argv:
    model.gradient_checkpointing_enable({"use_reentrant": False})
opt = liger_fx.optimize(model, inputs)
opt(**inputs).loss.backward()
late = [kernel for thread, kernel in by if not thread.startswith("compiles ")]
print(len(by), late)
sys.exit(bool(late) or not by)
"""


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "qwen3_moe", "llama checkpointed"])
def test_a_step_compiles_nothing_by_itself(name: str, tmp_path: Path) -> None:
    """All of it is compiled ahead, in threads of their own."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILED, *name.split()]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_plan_made_in_the_midst_of_a_backward() -> None:
    """A reentrant checkpoint computes a layer with gradients once the backward runs, in a thread
    that autograd has for the GPU; what is compiled ahead of it must not wait for that thread."""
    model, twin_of = llama().train(), llama().train()
    opt = liger_fx.optimize(model.eval()).train()
    found: list[dict[str, torch.Tensor | None]] = []

    def step(m: Any) -> None:
        m.gradient_checkpointing_enable({"use_reentrant": True})
        m(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in m.named_parameters()})

    for m in (twin_of, opt):
        thread = threading.Thread(target=step, args=(m,), daemon=True)
        thread.start()
        thread.join(120)
        assert not thread.is_alive(), "the backward waits for itself"
    theirs, ours = found
    for name, grad in theirs.items():
        assert grad is not None and ours[name] is not None, name
        error = (ours[name].float() - grad.float()).norm() / grad.float().norm()
        assert error < 0.02, f"{name}: {error:.3g}"


def test_a_gated_mlp_keeps_no_product() -> None:
    config = LlamaConfig(hidden_size=512, intermediate_size=8192, num_hidden_layers=1, vocab_size=8)
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    mlp = liger_fx.optimize(model).model.layers[0].mlp
    x = torch.randn(1, 4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mlp(x).sum().backward()  # what a first call allocates for good
    before = torch.cuda.memory_allocated()
    y = mlp(x)
    kept = torch.cuda.memory_allocated() - before
    assert kept <= (2 * 8192 + 512) * 4096 * 2 + 2**20
    y.sum().backward()


def test_the_loss_keeps_no_logits() -> None:
    leaves, labels = loss_inputs(4096, 65536, 1024, torch.bfloat16)
    loss_of(leaves, labels).backward()
    leaves[0].grad = leaves[1].grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = loss_of(leaves, labels)
    gradients = leaves[0].nbytes + leaves[1].nbytes
    assert torch.cuda.memory_allocated() - before <= gradients + 2**20
    (loss * 3).backward()  # in place
    assert torch.cuda.max_memory_allocated() - before <= 1.3 * 2**30


def test_the_loss_of_a_frozen_head() -> None:
    leaves, labels = loss_inputs(512, 65536, 1024, torch.bfloat16, frozen=True)
    before = torch.cuda.memory_allocated()
    loss_of(leaves, labels).backward()
    assert torch.cuda.memory_allocated() - before <= leaves[0].nbytes + 2**20
    assert leaves[1].grad is None


def test_a_factor_of_the_loss_reaches_the_gradients() -> None:
    leaves, labels = loss_inputs(300, 777, 64, torch.float32)
    found = [torch.autograd.grad(loss_of(leaves, labels) * k, leaves[:2]) for k in (1.0, 3.0)]
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(3 * one, three)


def test_a_label_out_of_range_ends_the_process() -> None:
    script = (
        "import torch\n"
        "from liger_fx.kernels.linear_cross_entropy import linear_cross_entropy\n"
        "h, w = torch.randn(4, 8, device='cuda'), torch.randn(9, 8, device='cuda')\n"
        "linear_cross_entropy(h, w, torch.full((4,), 9, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    script = f"import sys; sys.path.insert(0, {root!r})\n{script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode and "assert" in done.stderr


def test_logits_are_there_when_they_are_read() -> None:
    model = llama().train()
    opt = liger_fx.optimize(model)
    out, plain = opt(input_ids=ids(), labels=ids()), model(input_ids=ids(), labels=ids())
    assert type(out.logits).__name__ == "LazyLogits" and out.logits.is_cuda
    error = (out.logits.float() - plain.logits.float()).norm() / plain.logits.float().norm()
    assert error < 2e-2
    (out.loss + out.logits.float().square().mean()).backward()


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


# -- decoding by a CUDA graph ----------------------------------------------------------------------


def decoded(model: Any, rows: int = 2, new: int = 24, **options: Any) -> torch.Tensor:
    prompt = 3 + ids(rows, 20) % 120
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new} | options
    found: torch.Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return found


def launches(work: Any) -> list[str]:
    """The names of what the CPU asked of the GPU."""
    with torch.profiler.profile() as profile:
        work()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.name.startswith("cudaGraphLaunch")]


def of_family(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = build(name).to("cuda", dtype)
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral", "mixtral"])
def test_decoding_is_replayed(name: str) -> None:
    """In float32: the uncaptured step computes the very same."""
    model = of_family(name, torch.float32)
    opt = liger_fx.optimize(model)
    options: dict[str, Any] = {"cache_implementation": "static"}
    expected = decoded(opt, disable_compile=True, **options)
    for _ in range(2):
        assert torch.equal(decoded(opt, **options), expected)
    assert len(launches(lambda: decoded(opt, **options))) >= 22
    sampled: dict[str, Any] = {"do_sample": True, "top_k": 20, **options}
    torch.manual_seed(7)
    expected = decoded(opt, disable_compile=True, **sampled)
    torch.manual_seed(7)
    assert torch.equal(decoded(opt, **sampled), expected)
    assert torch.equal(decoded(opt, 3, **options), decoded(opt, 3, disable_compile=True, **options))


@pytest.mark.parametrize("rows", [2, 64], ids=["few groups", "many groups"])
def test_grouped_heads_are_not_repeated(rows: int) -> None:
    """What attention reads are the cache's own keys and values; its results are as accurate."""
    torch.manual_seed(0)
    given_as: Any = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(rows, 8, 1, 64, **given_as)
    key, value = (torch.randn(rows, 2, 40, 64, **given_as) for _ in range(2))
    mask = (torch.arange(40, device="cuda") < 33).expand(rows, 1, 1, 40)
    module = nn.Module()
    module.config, module.num_key_value_groups = LlamaConfig(attn_implementation="sdpa"), 4
    given = (module, query, key, value, mask)
    theirs, _ = sdpa_attention_forward(*given, scaling=0.125)
    ours, _ = leaves.attention(*given, scaling=0.125)
    exact, _ = sdpa_attention_forward(
        module, *(t.double() for t in given[1:4]), mask, scaling=0.125
    )
    error = [((found - exact).norm() / exact.norm()).item() for found in (ours, theirs)]
    assert ours.shape == theirs.shape and error[0] <= 1.1 * error[1]


def test_what_was_recorded_goes_with_its_cache() -> None:
    opt = liger_fx.optimize(of_family("llama"))
    for _ in range(3):
        decoded(opt, cache_implementation="static")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    for rows in (1, 2, 3, 4):
        decoded(opt, rows, cache_implementation="static")
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before[0] + 2**21
    assert torch.cuda.memory_allocated() <= before[1] + 2**16


def test_a_step_that_reads_numbers_runs_as_before() -> None:
    """And leaves random numbers and later recordings as they are."""

    class Asking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if bool(x.isfinite().all()) else x.nan_to_num()

    model = of_family("llama")
    model.model.norm = nn.Sequential(model.model.norm, Asking())
    opt = liger_fx.optimize(model)
    with pytest.warns(liger_fx.FallbackWarning, match="not replayed as a CUDA graph"):
        found = decoded(opt, cache_implementation="static")
    assert torch.equal(found, decoded(opt, cache_implementation="static", disable_compile=True))
    torch.randn(4, device="cuda")
    other = liger_fx.optimize(of_family("llama"))
    assert launches(lambda: decoded(other, cache_implementation="static"))


def test_weights_that_moved_are_recorded_anew() -> None:
    opt = liger_fx.optimize(of_family("llama"))
    cache = StaticCache(config=opt.config, max_cache_len=64)
    first = decoded(opt, past_key_values=cache)
    opt.cpu()
    opt.cuda()
    cache.reset()
    assert torch.equal(decoded(opt, past_key_values=cache), first)
    with torch.no_grad():
        opt.lm_head.weight.mul_(-1)  # in place: the recording reads it
    cache.reset()
    other = decoded(opt, past_key_values=cache)
    assert not torch.equal(other, first)
    assert torch.equal(decoded(opt, cache_implementation="static", disable_compile=True), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_a_layer_norm_under_autocast_has_the_dtype_of_pytorchs_own(
    dtype: torch.dtype, affine: bool
) -> None:
    x = torch.randn(3, 16, dtype=dtype, device="cuda")
    own = nn.LayerNorm(16, elementwise_affine=affine, dtype=dtype, device="cuda")
    named = LigerLayerNorm(16, 1e-5, weight=own.weight, bias=own.bias, cast="autocast")
    assert named(x).dtype == own(x).dtype
    with torch.autocast("cuda", torch.bfloat16):
        assert named(x).dtype == own(x).dtype
