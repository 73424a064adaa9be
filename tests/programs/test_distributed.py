"""DDP, FSDP2 and tensor parallelism, two processes: one process's gradients.

On the CPU, joined by gloo; with PROGRAMS_DEVICE=cuda on two GPUs, joined by NCCL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.programs.support import CHECK, NoGraph, build, optimize
from tests.programs.workers import Pair

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,  # two processes have to import everything, and trace
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="this PyTorch has no gloo",
    ),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.stop()


DDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "buckets as gradients": {"gradient_as_bucket_view": True},
    "checkpointing": {"checkpointing": True},
    "reentrant checkpointing": {
        "checkpointing": True,
        "reentrant": True,
        "static_graph": True,
    },
    "gemma2": {"name": "gemma2"},
}


@pytest.mark.parametrize("kind", DDP)
def test_ddp(kind: str, pair: Pair) -> None:
    pair.run("ddp", **DDP[kind])


def test_ddp_with_accumulation(pair: Pair) -> None:
    pair.run("ddp_accumulated")


FSDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"mixed": True},
    "checkpointing": {"checkpointing": True},
    "bf16 and checkpointing": {"mixed": True, "checkpointing": True},
    "reentrant checkpointing": {"checkpointing": True, "reentrant": True},
    "kept after the forward": {"reshard": False},
    "gemma2": {"name": "gemma2"},
    "mixtral": {"name": "mixtral"},
}


@pytest.mark.parametrize("kind", FSDP)
def test_fsdp(kind: str, pair: Pair) -> None:
    pair.run("fsdp", **FSDP[kind])


@pytest.mark.parametrize(
    "what",
    [
        "fsdp_steps",
        "fsdp_accumulated",
        "fsdp_generate",
        "fsdp_of_an_empty_model",
        "fsdp_with_lora",
        "optimised_after_sharding",
        "tensor_parallel",
    ],
)
def test_sharded(what: str, pair: Pair) -> None:
    pair.run(what)


def test_layers_are_of_the_class_found_by_name() -> None:
    """accelerate looks a layer's class up by name, and shards what is an instance of it."""
    from accelerate.utils.dataclasses import get_module_class_from_name

    opt = optimize(build("llama"))
    (name,) = opt._no_split_modules
    found = get_module_class_from_name(opt, name)
    assert found is not None
    assert all(isinstance(layer, found) for layer in opt.model.layers)


SCRIPT = """
    import json, sys
    import torch
    from pathlib import Path
    from transformers import Trainer
    from tests.programs.support import build, graph_runs, optimize
    from tests.programs.training import Rows, arguments, curve

    torch.set_num_threads(1)
    kind, which, out = sys.argv[1:]
    options = {
        "ddp": {},
        "ddp and checkpointing": {"gradient_checkpointing": True},
        "fsdp": {"fsdp": True, "fsdp_config": {"version": 2}},
        "fsdp and checkpointing": {
            "fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": True}
        },
    }[kind] if which != "alone" else {}
    size = 4 if which == "alone" else 2
    made = arguments(Path(out).parent / which, per_device_train_batch_size=size, **options)
    model = build("llama")
    opt = model if which != "ours" else optimize(model)
    trainer = Trainer(model=opt, args=made, train_dataset=Rows())
    if which == "ours":
        with graph_runs(trainer.model, calls=3):
            found = curve(trainer)
    else:
        found = curve(trainer)
    if trainer.is_world_process_zero():
        Path(out).write_text(json.dumps(found))
    if torch.distributed.is_initialized():  # its threads may outlive what they work on
        torch.distributed.destroy_process_group()
"""


def losses(kind: str, which: str, folder: Path) -> list[float]:
    """The curve of the loss: of one process, or of two with the original or its twin."""
    script, out = folder / "script.py", folder / f"{which}.json"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable]
    if which != "alone":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*command, str(script), kind, which, str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    if ended.returncode:
        told = ended.stderr[-6000:]
        line = next((x for x in ended.stderr.splitlines() if "NoGraph:" in x), None)
        raise NoGraph(line) if line else AssertionError(told)
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["ddp", "ddp and checkpointing", "fsdp", "fsdp and checkpointing"])
def test_trainer_by_torchrun(kind: str, tmp_path: Path) -> None:
    theirs = losses(kind, "alone", tmp_path)
    if CHECK == "originals":
        assert losses(kind, "theirs", tmp_path) == pytest.approx(theirs, rel=1e-3)
    assert losses(kind, "ours", tmp_path) == pytest.approx(theirs, rel=1e-3)
