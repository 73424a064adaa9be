"""See what was changed: the report in a file, two reports compared, and why a site did not match.

    python examples/reports.py [DIRECTORY]

Without a directory everything goes to a temporary one. The same from the command line:

    liger-fx optimize llama --report report.html
    liger-fx diff old.json new.json --fail-on-lost
    liger-fx explain gpt2 --site transformer.h.0.mlp
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_fx
from liger_fx.cli import main


def step(title: str) -> None:
    print(f"\n{'=' * 8} {title}\n", flush=True)


torch.manual_seed(0)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
)

step("1. The report in a file: to read, to keep, to click through")
opt = liger_fx.optimize(model)
report = opt.report.with_verified(liger_fx.verify(model, opt).summary())
for name in ("report.txt", "report.md", "report.json", "report.html"):
    report.save(folder / name)
    print(f"{(folder / name).stat().st_size:>9,} bytes  {folder / name}")

step("2. The report as a Python object")
for site in report.rewritten[:4]:
    print(f"{site.path}: {site.before_class} -> {site.after_class}")
print(f"and {len(report.rewritten) - 4} more; verified: {report.verified.ok}")

step("3. Another version rewrites less: liger-fx diff --fail-on-lost")
liger_fx.optimize(model, exclude=["model.layers.2.mlp"]).report.save(folder / "new.json")
code = main(["diff", str(folder / "report.json"), str(folder / "new.json"), "--fail-on-lost"])
print(f"exit code {code}")

step("4. Why a site did not match: liger-fx explain")
main(["explain", "gpt2", "--site", "transformer.h.0.mlp", "--layers", "1"])
raise SystemExit(0 if code == 1 and report.verified.ok else 1)
