"""Where the GPU's time goes: milliseconds by group of kernels, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Kernel names hold these words; the first group that fits takes the kernel.
GROUPS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
    "attention": ("flash", "fmha", "sdpa", "attention", "cudnn"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "optimizer": ("multi_tensor",),
    "fused kernels": ("_forward_kernel", "_backward_kernel", "_sum_kernel", "rope", "triton"),
}


def try_gpu_time(step: Callable[[], Any], steps: int = 3) -> dict[str, Any] | None:
    """gpu_time where there is a GPU; a profiler that fails must not cost the measured times."""
    if not torch.cuda.is_available():
        return None
    try:
        return gpu_time(step, steps)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def gpu_time(step: Callable[[], Any], steps: int = 3) -> dict[str, Any]:
    """Milliseconds of GPU time a step by group of kernels, and the ten longest kernels."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels: dict[str, float] = {}
    for event in profiler.events():
        # Spans that the optimizer marks stand among the kernels, and would count them twice
        marked = getattr(event, "is_user_annotation", False)
        if event.device_type == torch.autograd.DeviceType.CUDA and not marked:
            spent = event.self_device_time_total / 1000 / steps
            kernels[event.name] = kernels.get(event.name, 0.0) + spent
    groups = dict.fromkeys([*GROUPS, "everything else"], 0.0)
    for kernel, spent in kernels.items():
        groups[group_of(kernel)] += spent
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:10]
    return {**groups, "total": sum(kernels.values()), "longest": dict(longest)}


def group_of(kernel: str) -> str:
    name = kernel.lower()
    if name == "_kernel":  # liger_fx's rotary embedding
        return "fused kernels"
    found = (group for group, words in GROUPS.items() if any(word in name for word in words))
    return next(found, "everything else")
