"""Models of diffusers, optimised with example inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.programs.support import CHECK, NoGraph, compare, gradients, optimize, perturb, run, same

diffusers = pytest.importorskip("diffusers")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet() -> Any:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return perturb(model)


def unet_inputs(batch: int = 2, size: int = 8) -> dict[str, Any]:
    return {
        "sample": noise(batch, 4, size, size),
        "timestep": torch.full((batch,), 7),
        "encoder_hidden_states": noise(batch, 5, 16),
    }


def flux() -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return perturb(model)


def flux_inputs(batch: int = 2, size: int = 4) -> dict[str, Any]:
    places = torch.zeros(size * size, 3)
    places[:, 1] = torch.arange(size * size) // size
    places[:, 2] = torch.arange(size * size) % size
    return {
        "hidden_states": noise(batch, size * size, 4),
        "encoder_hidden_states": noise(batch, 5, 16),
        "pooled_projections": noise(batch, 16),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }


MODELS = {"unet": (unet, unet_inputs), "flux": (flux, flux_inputs)}


def check(name: str, program: Any, calls: int = 1) -> None:
    build, inputs = MODELS[name]
    model = build()
    if name == "flux":
        # one rotary table turns q and k apart: LigerSingleRotaryEmbedding, or none; no fallback
        original = copy.deepcopy(model)
        theirs = run(program, original)
        opt = optimize(model, inputs())
        from tests.programs.support import graph_runs

        with graph_runs(opt, rotary=0):
            same(run(program, opt), theirs)
        if CHECK == "graphs" and not any("Liger" in type(m).__name__ for m in opt.modules()):
            raise NoGraph("nothing was rewritten")
    else:
        compare(model, program, inputs=inputs(), calls=calls)


@pytest.mark.parametrize("name", MODELS)
def test_forward(name: str) -> None:
    inputs = MODELS[name][1]

    def program(m: Any) -> Any:
        with torch.no_grad():
            return [
                m(**inputs()).sample,
                m(**inputs(), return_dict=False)[0],
                m(**inputs(3, 8)).sample,
            ]

    check(name, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str) -> None:
    inputs = MODELS[name][1]

    def program(m: Any) -> Any:
        m.train()
        m(**inputs()).sample.square().mean().backward()
        return gradients(m)

    check(name, program)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing(name: str) -> None:
    inputs = MODELS[name][1]

    def program(m: Any) -> Any:
        m.enable_gradient_checkpointing()
        m.train()
        m(**inputs()).sample.square().mean().backward()
        return gradients(m)

    check(name, program)


@pytest.mark.slow
def test_a_denoising_loop() -> None:
    """The scheduler's loop, a step at a time, the timestep a number."""

    def program(m: Any) -> Any:
        scheduler = diffusers.DDIMScheduler(num_train_timesteps=20)
        scheduler.set_timesteps(4)
        image = noise(1, 4, 8, 8)
        context = noise(1, 5, 16)
        with torch.no_grad():
            for step in scheduler.timesteps:
                predicted = m(image, step, encoder_hidden_states=context).sample
                image = scheduler.step(predicted, step, image).prev_sample
        return image

    compare(unet(), program, inputs=unet_inputs(), calls=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name: str, tmp_path: Any) -> None:
    """save_pretrained writes what the plain class reads."""
    build, inputs = MODELS[name]
    model = build()
    opt = optimize(model, inputs())
    opt.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert type(back) is type(model)
    with torch.no_grad():
        same(back(**inputs()).sample, model(**inputs()).sample)
