"""Damages saved graphs in many ways and loads them: each must load, or be one LoadError.

    python -m tools.fuzz_load --runs 100000 --out tools/bench/results/fuzz_load.json

A mutant is a saved directory with one file changed: JSON by its structure (values replaced, fields
removed, copied, renamed, attacks from a list put in), any file by its bytes; hypothesis draws the
seed of each. What loads is built in full and, now and then, called. While a mutant is read,
Python's audit events are watched: a process started, a file written, a module imported or code
executed that was not meant to be is a failure, and so are every exception but LoadError, a weight
that a call has changed, and a class of transformers that is not what it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import typing
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import liger_fx
from liger_fx.errors import LoadError
from tools.fuzz_mutations import mutate

FILES = {
    "graph.json": 60, "config.json": 10, "report.json": 5, "model.safetensors": 10,
    "checksums.json": 2,
    "buffers.safetensors": 4, "model.safetensors.index.json": 5,
    "model-00001-of-00002.safetensors": 3, "generation_config.json": 3,
}  # fmt: skip
CALL_EVERY = 10

# -- the watch -------------------------------------------------------------------------------------

_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "os.rename", "os.remove",
    "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.putenv",
    "subprocess.", "socket.", "shutil.", "pickle.find_class", "ctypes.dlopen", "urllib.",
    "webbrowser.", "code.__new__", "tempfile.",
)  # fmt: skip
_watching: list[list[str]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event.startswith(_FORBIDDEN):
        _watching[-1].append(f"{event} {args!r:.200}")
    elif event == "open" and _writes(args):
        _watching[-1].append(f"open for writing {args[0]!r}")
    elif event == "import" and args[0] not in sys.modules and not _is_ours(args[0]):
        _watching[-1].append(f"import {args[0]}")
    elif event == "exec" and not _is_known_code(args[0].co_filename) and not _in_typing():
        _watching[-1].append(f"exec of code from {args[0].co_filename}, by {_callers()}")


def _callers() -> str:
    """Who asked for it, innermost first."""
    frames = traceback.extract_stack(sys._getframe(2))[-6:]
    return ", ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))


def _in_typing() -> bool:
    """Whether it is Python reading the annotations of a library's class."""
    return sys._getframe(2).f_code.co_filename == typing.__file__


def _writes(args: tuple[Any, ...]) -> bool:
    mode = args[1]
    return isinstance(mode, str) and any(letter in mode for letter in "wax+")


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "transformers", "liger_fx", "sympy")


def _is_known_code(file: str) -> bool:
    """A graph's generated forward, its guards, or a library's own file being imported."""
    return file.startswith(("<eval_with_key>", "<graph ", "<guards>", sys.prefix, sys.base_prefix))


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """What happens in the block that reading a saved graph must not do, as texts."""
    if not getattr(sys, "_liger_fx_watch", False):
        sys.addaudithook(_hook)
        sys._liger_fx_watch = True  # type: ignore[attr-defined]  # a hook stays for good
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


# -- the subjects ----------------------------------------------------------------------------------


def make_subjects(folder: Path) -> list[Path]:
    """Saved graphs to damage: one file of weights, shards with tied weights, experts."""
    import liger_fx.storage.weights as weights
    from tests.support.families import build, make_inputs

    subjects = []
    for name, shard in (("llama", 10**9), ("qwen2", 45_000), ("gemma", 10**9)):
        opt = liger_fx.optimize(build(name, num_hidden_layers=1))
        if name == "gemma":
            opt(**make_inputs(opt, labels=True))
        before, weights.SHARD_BYTES = weights.SHARD_BYTES, shard
        try:
            liger_fx.save(opt, folder / name)
        finally:
            weights.SHARD_BYTES = before
        liger_fx.load(folder / name)(**make_inputs(opt))  # imports what a load needs
        subjects.append(folder / name)
    return subjects


# -- the runs --------------------------------------------------------------------------------------


class Fuzzer:
    """Runs mutants of the subjects and counts what became of them."""

    def __init__(self, subjects: list[Path]) -> None:
        self.subjects = [(path, self._weights(path)) for path in subjects]
        self.outcomes: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failures: list[str] = []

    @staticmethod
    def _weights(folder: Path) -> dict[str, int]:
        return {name: weight for name, weight in FILES.items() if (folder / name).exists()}

    def fuzz(self, runs: int, seed: int) -> None:
        """So many mutants, each from a seed that hypothesis draws."""

        @hypothesis.seed(seed)
        @settings(
            max_examples=runs,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.randoms(use_true_random=True))
        def one(rng: random.Random) -> None:
            self.run(rng)

        one()

    def run(self, rng: random.Random) -> None:
        """One mutant; what is damaged is whole again afterwards."""
        number = self.outcomes.total()
        folder, files = rng.choice(self.subjects)
        (name,) = rng.choices(list(files), list(files.values()))
        whole = (folder / name).read_bytes()
        mutant = mutate(name, whole, rng)
        (folder / name).write_bytes(mutant)
        classes = _classes()
        try:
            outcome, events = self._load(folder, name, number % CALL_EVERY == 0)
        finally:
            (folder / name).write_bytes(whole)
        events += [
            f"{name} changed" for name, v in _classes().items() if classes.get(name) is not v
        ]
        if mutant == whole:
            outcome = f"{outcome}, unchanged"
        self.outcomes[outcome] += 1
        if events or outcome.startswith("crash"):
            self.failures.append(f"run {number}, {folder.name}/{name}: {outcome} {events}")

    def _load(self, folder: Path, name: str, call: bool) -> tuple[str, list[str]]:
        """Checksums are made to fit by whoever changes a file on purpose."""
        with watched() as events, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                opt = liger_fx.load(folder, verify_checksums=name == "checksums.json")
            except LoadError as error:
                self.refused[_kind(error)] += 1
                return "refused", list(events)
            except BaseException as error:  # MemoryError, SystemExit, ...: none is allowed
                return f"crash: {type(error).__name__}: {error!s:.200}", list(events)
            if call:
                return self._call(opt), list(events)
        return "loaded", list(events)

    def _call(self, opt: Any) -> str:
        ids = torch.ones(2, 7, dtype=torch.long)
        before = {name: tensor.clone() for name, tensor in opt.state_dict().items()}
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints the failing line
                opt(input_ids=ids, attention_mask=ids)
            outcome = "loaded and called"
        except Exception as error:  # a graph with other arguments may fail as any program may
            outcome = f"loaded and called: {type(error).__name__}"
        now = opt.state_dict()
        # as bytes: a damaged file may hold NaN
        same = (_bytes(now[name]) == _bytes(tensor) for name, tensor in before.items())
        return outcome if all(same) else "crash: a call changed the weights"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _classes() -> dict[str, Any]:
    """What the classes hold that a loaded file has to do with."""
    kinds = (transformers.PreTrainedConfig, transformers.GenerationConfig, transformers.LlamaConfig)
    return {f"{cls.__name__}.{name}": v for cls in kinds for name, v in vars(cls).items()}


def _kind(error: LoadError) -> str:
    """The file that an error is about; of a graph, the field too."""
    file = next((name for name in FILES if error.place.startswith(name)), "another file, or none")
    field = re.match(
        r"graph\.json\.([a-z_]+)(?:\[\d+\]\.([a-z_]+))?(?:\[\d+\]\.([a-z_]+))?", error.place
    )
    return ".".join([file, *filter(None, field.groups())]) if field else file


def main() -> int:
    """Fuzz, print a summary, write the result; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    folder = Path(tempfile.mkdtemp())
    try:
        fuzzer = Fuzzer(make_subjects(folder))
        start = time.perf_counter()
        fuzzer.fuzz(arguments.runs, arguments.seed)
        seconds = time.perf_counter() - start
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "runs": fuzzer.outcomes.total(),
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        "failures": fuzzer.failures,
        "outcomes": dict(fuzzer.outcomes.most_common()),
        "refused_at": dict(sorted(fuzzer.refused.items())),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        from tools.bench.common import write

        write(arguments.out, result)
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
