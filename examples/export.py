"""The optimised model as a torch.export program: one file, any batch and length, no transformers.

    python examples/export.py [FILE.pt2]

A second process loads the program with torch alone; liger_fx.modules registers its operators.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_fx

RUN = """
import sys, torch
import liger_fx.modules  # registers torch.ops.liger_fx
program = torch.export.load(sys.argv[1])
run = program.module()
for batch, length in ((1, 1), (2, 9), (3, 200)):
    ids = torch.randint(0, 4096, (batch, length))
    logits = run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    print(f"{batch} x {length}: logits {tuple(logits.shape)}")
print("transformers was imported:", "transformers" in sys.modules)
"""

torch.manual_seed(0)
file = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp() + "/llama.pt2")
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
).eval()
opt = liger_fx.optimize(model)
program = liger_fx.export(opt, file)
print(f"wrote {file}, {file.stat().st_size:,} bytes\n")

operators = [str(node.target) for node in program.graph.nodes if "liger_fx" in str(node.target)]
for name in sorted(set(operators)):
    print(f"{operators.count(name):>3} x torch.ops.{name}")

print("\nin another process:", flush=True)
root = Path(__file__).resolve().parents[1]
raise SystemExit(subprocess.run([sys.executable, "-c", RUN, str(file)], cwd=root).returncode)
