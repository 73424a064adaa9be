"""What liger_fx does to every language model type of transformers: docs/coverage.md.

    python tools/coverage.py  ->  one row a type: sites rewritten, sites refused, outputs equal?

Each type is a tiny random model (liger_fx/tiny.py) on the CPU in float32. "Equal" is a relative L2
difference of the logits of at most 1e-5.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from tabulate import tabulate  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

import liger_fx  # noqa: E402
from liger_fx.errors import FallbackWarning, LigerFxError, TraceError, UsageError, one_line  # noqa: E402
from liger_fx.inputs import example_inputs  # noqa: E402
from liger_fx.tiny import tiny_model  # noqa: E402

RULES = (
    "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rotary_embedding",
    "qk_norm_rotary", "gated_mlp", "plain_mlp", "sigmoid_gate", "experts",
)  # fmt: skip
CLOSE = 1e-5


def row(model_type: str) -> tuple[str, ...] | None:
    """The table's row for a type; None when no tiny model of it can be made or run."""
    try:
        model = tiny_model(model_type)
        inputs = example_inputs(model, 2, 9)
        inputs.pop("labels", None)
        with torch.no_grad():
            expected = model(**inputs).logits
    except UsageError:
        return None
    except Exception:  # the tiny config does not suit this architecture
        return None
    try:
        opt = liger_fx.optimize(model)
        with torch.no_grad():
            logits = opt(**inputs).logits
    except LigerFxError as error:
        cause = one_line(error if not isinstance(error, TraceError) else Exception(error.cause))
        return (model_type, *[""] * len(RULES), "", f"not traced: {cause[:60]}")
    except FallbackWarning:
        return (model_type, *[""] * len(RULES), "", "no graph serves the call")
    report = opt.report
    done = [sum(site.rule == rule for site in report.rewritten) for rule in RULES]
    left = [sum(site.rule == rule for site in report.refused) for rule in RULES]
    counts = [f"{a}" + (f" ({b} refused)" if b else "") for a, b in zip(done, left, strict=True)]
    off = ((logits - expected).norm() / expected.norm()).item()
    opaque = len(report.opaque)
    return (
        model_type,
        *("" if count == "0" else count for count in counts),
        str(opaque or ""),
        "equal" if off <= CLOSE else f"off by {off:.0e}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; by default all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", FallbackWarning)  # the original's logits would prove nothing
    rows, unmade = [], []
    for name in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        start = time.perf_counter()
        found = row(name)
        rows += [found] if found else []
        unmade += [] if found else [name]
        took = time.perf_counter() - start
        print(f"{name}: {found or 'no tiny model'} ({took:.1f} s)", flush=True)
    headers = ("model type", *RULES, "opaque modules", "logits")
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    arguments.out.write_text(page(table, rows, unmade))
    print(f"wrote {arguments.out}")
    return 0


def page(table: str, rows: list[tuple[str, ...]], unmade: list[str]) -> str:
    """The Markdown page."""
    cells = [[cell.partition(" ")[0] for cell in row[1 : 1 + len(RULES)]] for row in rows]
    touched = sum(any(cell not in ("", "0") for cell in row) for row in cells)
    equal = sum(row[-1] == "equal" for row in rows)
    return f"""# Coverage

What `liger_fx.optimize` does to each causal language model type of transformers
{transformers.__version__}: sites rewritten by each rule in a tiny random model, and in brackets
those that looked like one and were refused (`liger-fx optimize TYPE` gives the reasons). Modules
that the trace cannot enter are called as they are. `python tools/coverage.py` makes this page.

{len(rows)} types: in {touched} of them sites are rewritten; in {equal} the logits are equal to the
original's (relative L2 difference of at most {CLOSE:.0e} in float32).

{table}

No tiny model could be made or run, for want of a config that suits the architecture:
{", ".join(unmade)}.
"""


if __name__ == "__main__":
    raise SystemExit(main())
