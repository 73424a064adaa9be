"""What runs the rewritten graph in everyday programs of other libraries: docs/ecosystem.md.

    python tools/ecosystem.py                      all of tests/programs
    python tools/ecosystem.py -n 8                 whatever follows is handed to pytest

One row a program: "graph" where the results are equal and graphs computed them, "fallback" where
they are equal and the original forward did, "failed" where they differ or something was raised.
Whatever was tried is counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROGRAMS = ROOT / "tests" / "programs"
RESULTS = ("graph", "fallback", "failed", "not run")
LONGEST = 160

# The library that a file's programs are written with; by a word in the test's name where a file
# holds programs of several.
LIBRARIES = {
    "test_calls": "transformers",
    "test_generate": "transformers",
    "test_recorded_decoding": "transformers",
    "test_checkpointing": "transformers",
    "test_trainer": "transformers",
    "test_multimodal": "transformers",
    "test_copies": "transformers",
    "test_hooks": "torch",
    "test_threads": "torch",
    "test_compile": "torch",
    "test_distributed": "torch",
    "test_trl": "trl",
    "test_peft": "peft",
    "test_diffusers": "diffusers",
    "test_offload": "accelerate",
}
WORDS = {
    "bitsandbytes": "bitsandbytes",
    "qlora": "bitsandbytes",
    "torchao": "torchao",
    "accelerate": "accelerate",
    "trainer": "transformers",
    "lora": "peft",
}
# Files in which a test's name may say that it is of another library.
MIXED = ("test_offload", "test_distributed", "test_trainer")


@dataclass
class Program:
    """One test: what came of it and why."""

    file: str
    name: str
    result: str
    why: str = ""

    @property
    def library(self) -> str:
        if self.file in MIXED:
            for word, library in WORDS.items():
                if word in self.name:
                    return library
        return LIBRARIES[self.file]


@dataclass(eq=False)  # pytest keeps plugins in sets
class Collector:
    """A plugin of pytest: notes what came of each test."""

    programs: dict[str, Program] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called after a test's setup, call and teardown, wherever it ran; the worst of the three
        counts."""
        before = self.programs.get(report.nodeid)
        if report.passed and (report.when != "call" or before is not None):
            return
        if before is not None and before.result == "failed":
            return
        result, why = "graph", ""
        if report.skipped:
            result, why = "not run", skipped(report)
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            error = crash.message if crash is not None else str(report.longrepr)
            kind, _, text = " ".join(error.split()).partition(": ")
            result = "fallback" if kind.endswith("NoGraph") else "failed"
            why = text if result == "fallback" else f"{kind.rpartition('.')[2]}: {text}"
        file, _, name = report.nodeid.rpartition("::")
        self.programs[report.nodeid] = Program(Path(file).stem, name, result, why)

    def pytest_collectreport(self, report: Any) -> None:
        """A whole file that was not run: a library that is not there, or an error."""
        if report.passed:
            return
        file = Path(report.nodeid).stem
        result = "not run" if report.skipped else "failed"
        why = skipped(report) if report.skipped else str(report.longrepr).splitlines()[-1]
        self.programs[report.nodeid] = Program(file, "(all)", result, why)


def skipped(report: Any) -> str:
    """The reason that a test gave for skipping."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def version(library: str) -> str:
    """The installed version, as its package says it."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def in_words(name: str) -> str:
    """test_loss_curve[llama-accumulation] -> loss curve: llama, accumulation"""
    test, _, case = name.removesuffix("]").partition("[")
    words = test.removeprefix("test_").replace("_", " ")
    return f"{words}: {', '.join(case.split('-'))}" if case else words


def cell(text: str) -> str:
    """Text that a cell of a Markdown table can hold."""
    # addresses and paths differ from run to run and from place to place
    text = re.sub(r"0x[0-9a-f]+", "0x...", text)
    text = re.sub(r"(/[\w.+-]+){2,}/(?=[\w.+-]+)", "", text)
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."


def page(programs: list[Program], chosen: list[str]) -> str:
    """The Markdown page."""
    counts = Counter(program.result for program in programs)
    libraries = sorted({program.library for program in programs})
    by_library = [
        (
            library,
            version(library),
            *(
                sum(p.library == library and p.result == result for p in programs)
                for result in RESULTS
            ),
        )
        for library in libraries
    ]
    rows = [
        (p.library, version(p.library), in_words(p.name), p.result, cell(p.why))
        for p in sorted(programs, key=lambda p: (p.library, p.file))
    ]
    summary = tabulate(by_library, ("library", "version", *RESULTS), tablefmt="github")
    table = tabulate(
        rows,
        ("library", "version", "program", "result", "why"),
        tablefmt="github",
        disable_numparse=True,
    )
    told = "; ".join(f"{counts[result]} {result}" for result in RESULTS)
    part = f" (`{' '.join(chosen)}`)" if chosen else ""
    return f"""# Other libraries

Everyday programs of other libraries, each run on a tiny random model and on what
`liger_fx.optimize` made of it. The outputs, losses, gradients or tokens of both are compared.
`python tools/ecosystem.py` makes this page; the programs are the tests in `tests/programs`{part}.

- **graph**: the results are equal, and the rewritten graphs computed them.
- **fallback**: the results are equal, but the original forward computed them, or a part of them.
- **failed**: the results differ, or something was raised.
- **not run**: a library or a device is missing, or the program is none for this model.

{len(programs)} programs: {told}.

{summary}

## Programs

{table}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "ecosystem.md")
    arguments, chosen = parser.parse_known_args()
    unknown = {file.stem for file in PROGRAMS.glob("test_*.py")} - LIBRARIES.keys()
    if unknown:
        parser.error(f"of which library is {', '.join(sorted(unknown))}? Add it to LIBRARIES")
    collector = Collector()
    paths = [Path(a.partition("::")[0]).resolve() for a in chosen if a]
    named = [path for path in paths if path.exists()]
    for path in named:
        if not path.is_relative_to(PROGRAMS):
            parser.error(f"{path} holds no programs: they are in {PROGRAMS}")
    where = [] if named else [str(PROGRAMS)]
    warnings.simplefilter("ignore")
    options = [
        "-q",
        "--tb=short",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        f"--rootdir={ROOT}",
    ]
    code = pytest.main([*options, *where, *chosen], plugins=[collector])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(f"pytest ended with {code!r}: nothing was written", file=sys.stderr)
        return 2
    side_by_side = [
        a for pair in zip(chosen, chosen[1:], strict=False) if pair[0] == "-n" for a in pair
    ]
    told = [a for a in chosen if a not in side_by_side]
    arguments.out.write_text(page(list(collector.programs.values()), told))
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
