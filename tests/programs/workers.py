"""What two processes do together, and the pair of processes that does it.

    pair = Pair(); pair.run("ddp", reentrant=False)

Both processes are started once and joined by gloo on the CPU anew for each program. A program
compares what it gets with one process's run of the original on the whole batch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

WORLD = 2
DEVICE = os.environ.get("PROGRAMS_DEVICE", "cpu")  # cuda: a GPU for each process, joined by NCCL
PATIENCE = 240  # seconds for one program, tracing included

Work = Callable[..., None]
PROGRAMS: dict[str, Work] = {}


def program(work: Work) -> Work:
    """Register what both processes run, by its name."""
    PROGRAMS[work.__name__] = work
    return work


class Pair:
    """Two processes that wait for the name of a program."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, what: str, /, **options: Any) -> None:
        """Raises what a process raised. After an error both are started anew."""
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self._pipes:
                pipe.send((what, options, f"{folder}/store"))
            answers = [self._answer(pipe) for pipe in self._pipes]
        failed = [answer for answer in answers if answer is not None]
        if not failed:
            return
        self.stop()
        # the other process's complaint that this one is gone says nothing
        failed.sort(key=lambda answer: "gloo" in answer[1] or "timed out" in answer[1].lower())
        error, told = failed[0]
        error.add_note(told)
        raise error

    @staticmethod
    def _answer(pipe: Any) -> Any:
        try:
            if pipe.poll(PATIENCE):
                return pipe.recv()
        except EOFError:
            return RuntimeError("a process is gone"), "gloo: the pipe is closed"
        return TimeoutError(f"no answer in {PATIENCE} seconds"), "timed out"

    def stop(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.terminate()
            process.join(10)
        self._processes, self._pipes = [], []


def serve(rank: int, pipe: Any) -> None:
    """A process's life: programs one by one, an answer for each."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            name, options, store = pipe.recv()
        except EOFError:
            return
        try:
            with joined(rank, store):
                PROGRAMS[name](rank, **options)
            pipe.send(None)
        except BaseException as error:  # whatever it is, the test tells it
            pipe.send(portable(error))


def portable(error: BaseException) -> tuple[BaseException, str]:
    """The error, or one of the same words where it cannot be sent, and where it came from."""
    told = "".join(traceback.format_exception(error))[-4000:]
    try:
        pickle.loads(pickle.dumps(error))
        return error, told
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"), told


@contextlib.contextmanager
def joined(rank: int, store: str) -> Iterator[None]:
    """The process group, for the length of the block."""
    import torch
    from torch import distributed

    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=90),
    )
    try:
        torch.manual_seed(0)
        yield
    finally:
        distributed.destroy_process_group()


def build(name: str, **options: Any) -> Any:
    """A tiny model on the device of this process."""
    from tests.programs import support

    return support.build(name, **options).to(DEVICE)


def batch(rank: int | None = None) -> dict[str, Any]:
    """Four rows; of a rank, its two."""
    from tests.programs.support import make_inputs

    inputs = make_inputs(build("llama"), 2 * WORLD, 9, labels=True)
    if rank is None:
        return inputs
    return {k: v[2 * rank : 2 * rank + 2] for k, v in inputs.items()}


def expected(name: str = "llama", checkpointing: bool = False, **options: Any) -> Any:
    """One process's loss and gradients of the whole batch."""
    from tests.programs.support import train_step

    model = build(name, **options).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    return train_step(model, batch())


def own_names(found: dict[str, Any]) -> dict[str, Any]:
    """Gradients by the parameters' own names, without what wrappers put before them."""
    return {k.removeprefix("module."): v for k, v in found.items()}


@program
def ddp(
    rank: int,
    name: str = "llama",
    checkpointing: bool = False,
    reentrant: bool = False,
    **options: Any,
) -> None:
    """DistributedDataParallel around the optimised model."""
    from torch.nn.parallel import DistributedDataParallel

    from tests.programs.support import graph_runs, optimize, same, train_step

    opt = optimize(build(name)).train()
    if checkpointing:
        opt.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    theirs = expected(name)
    wrapped = DistributedDataParallel(opt, **options)
    with graph_runs(opt, calls=2):
        for _ in range(2):
            found = train_step(wrapped, batch(rank))
    same(own_names(found["gradients"]), theirs["gradients"])


@program
def ddp_accumulated(rank: int) -> None:
    """no_sync: gradients of two micro batches, summed up in the second."""
    from torch.nn.parallel import DistributedDataParallel

    from tests.programs.support import gradients, graph_runs, optimize, same

    opt = optimize(build("llama")).train()
    theirs = expected()
    wrapped = DistributedDataParallel(opt)
    mine = batch(rank)
    with graph_runs(opt, calls=2):
        with wrapped.no_sync():
            (wrapped(**{k: v[:1] for k, v in mine.items()}).loss / 2).backward()
        (wrapped(**{k: v[1:] for k, v in mine.items()}).loss / 2).backward()
    same(own_names(gradients(wrapped)), theirs["gradients"])


def shard(model: Any, mixed: bool = False, reshard: bool = True) -> Any:
    """fully_shard of each layer and of the root, as PyTorch's tutorial does it."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": init_device_mesh(DEVICE, (WORLD,)),
        "reshard_after_forward": reshard,
    }
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    layers = getattr(model, "model", None) or model.transformer
    for layer in getattr(layers, "layers", None) or layers.h:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


@program
def fsdp(
    rank: int,
    name: str = "llama",
    mixed: bool = False,
    checkpointing: bool = False,
    reentrant: bool = False,
    reshard: bool = True,
) -> None:
    """FSDP2. With mixed precision the original, sharded likewise, is what to compare with."""
    from tests.programs.support import graph_runs, optimize, same, train_step

    def prepared(model: Any) -> Any:
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        return shard(model, mixed, reshard)

    theirs = train_step(prepared(build(name)), batch(rank))
    bound: dict[str, float] = {}
    if mixed:
        bound = {"rtol": 0.1, "atol": 0.01}
    else:
        same(theirs["gradients"], expected(name)["gradients"])
    opt = prepared(optimize(build(name)))
    with graph_runs(opt, calls=2):
        for _ in range(2):
            found = train_step(opt, batch(rank))
    same(found, theirs, **bound)


@program
def fsdp_steps(rank: int) -> None:
    """Three steps of an optimizer; the gathered state is the plain model's, trained."""
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    from tests.programs.support import graph_runs, optimize, same, train_step

    def trained(model: Any, inputs: dict[str, Any]) -> Any:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            train_step(model, inputs)
            optimizer.step()
        return model

    theirs = trained(build("llama"), batch())
    opt = shard(optimize(build("llama")))
    with graph_runs(opt, calls=3):
        trained(opt, batch(rank))
    state = get_model_state_dict(opt, options=StateDictOptions(full_state_dict=True))
    plain = dict(theirs.state_dict())
    if rank == 0:
        same(dict(state), plain)


@program
def fsdp_generate(rank: int) -> None:
    """generate() of a sharded model: the layers gather their weights at each step."""
    from tests.programs.support import graph_runs, make_inputs, optimize, same

    inputs = make_inputs(build("llama"), 2, 5)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    theirs = build("llama").generate(**inputs, **options)
    opt = shard(optimize(build("llama")))
    with graph_runs(opt, calls=5):
        same(opt.generate(**inputs, **options), theirs)


@program
def fsdp_accumulated(rank: int) -> None:
    """set_requires_gradient_sync(False) for the first of two micro batches."""
    from tests.programs.support import gradients, graph_runs, optimize, same

    theirs = expected()
    opt = shard(optimize(build("llama")).train())
    mine = batch(rank)
    with graph_runs(opt, calls=2):
        opt.set_requires_gradient_sync(False)
        (opt(**{k: v[:1] for k, v in mine.items()}).loss / 2).backward()
        opt.set_requires_gradient_sync(True)
        (opt(**{k: v[1:] for k, v in mine.items()}).loss / 2).backward()
    same(gradients(opt), theirs["gradients"])


@program
def fsdp_of_an_empty_model(rank: int) -> None:
    """Made on the meta device, optimised, sharded, and only then filled."""
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from transformers import AutoModelForCausalLM

    from tests.programs.support import graph_runs, optimize, same, train_step
    from tests.support.families import config

    original = build("llama").train()
    theirs = train_step(original, batch())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config("llama"))
    opt = shard(optimize(empty).train())
    opt.to_empty(device=DEVICE)
    for ours, value in zip(opt.buffers(), original.buffers(), strict=True):
        ours.copy_(value)
    set_model_state_dict(opt, original.state_dict(), options=StateDictOptions(full_state_dict=True))
    with graph_runs(opt):
        found = train_step(opt, batch(rank))
    same(found["gradients"], theirs["gradients"])


@program
def optimised_after_sharding(rank: int) -> None:
    """optimize() of a sharded model: it works, or one sentence says why not."""
    import liger_fx
    from tests.programs.support import CHECK, graph_runs, optimize, same, train_step

    theirs = expected()
    sharded = shard(build("llama").train())
    if CHECK == "originals":
        same(train_step(sharded, batch(rank))["gradients"], theirs["gradients"])
        return
    try:
        opt = optimize(sharded)
    except liger_fx.LigerFxError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        same(train_step(sharded, batch(rank))["gradients"], theirs["gradients"])
        return
    with graph_runs(opt):
        found = train_step(opt, batch(rank))
    same(found["gradients"], theirs["gradients"])


@program
def tensor_parallel(rank: int) -> None:
    """Linear layers sharded over both processes by PyTorch's own plan."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from tests.programs.support import graph_runs, make_inputs, optimize, same

    inputs = make_inputs(build("llama"), 2, 9)
    plan: dict[str, Any] = {}
    for part, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        for letter in names:
            plan[f"{part}.{letter}_proj"] = ColwiseParallel()
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}

    def parallel(model: Any) -> Any:
        mesh = init_device_mesh(DEVICE, (WORLD,))
        for layer in model.model.layers:
            parallelize_module(layer, mesh, dict(plan))
        return model

    theirs = build("llama")(**inputs).logits
    same(parallel(build("llama"))(**inputs).logits, theirs)
    opt = parallel(optimize(build("llama")))
    with graph_runs(opt):
        same(opt(**inputs).logits, theirs)


@program
def fsdp_with_lora(rank: int) -> None:
    """LoRA on the optimised model, then sharded: frozen and trained weights in one layer."""
    import peft
    import torch

    from tests.programs.support import graph_runs, optimize, same, train_step

    def adapted(model: Any) -> Any:
        torch.manual_seed(5)
        adapter = peft.LoraConfig(
            target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False
        )
        return peft.get_peft_model(model, adapter).train()

    theirs = train_step(adapted(build("llama")), batch())
    wrapped = adapted(optimize(build("llama")))
    shard(wrapped.base_model.model)
    with graph_runs(wrapped):
        found = train_step(wrapped, batch(rank))
    same(found["gradients"], theirs["gradients"])
