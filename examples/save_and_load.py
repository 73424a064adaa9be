"""Optimise once, keep the result: save, load, bind to other weights, read the graph as source.

    python examples/save_and_load.py [DIRECTORY]

Without a directory everything goes to a temporary one. The model is a Llama with random weights.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_fx


def step(title: str) -> None:
    print(f"\n{'=' * 8} {title}\n", flush=True)


torch.manual_seed(0)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
config = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)
model = LlamaForCausalLM(config).eval()
call = {"input_ids": torch.randint(0, 4096, (2, 16)), "attention_mask": torch.ones(2, 16).long()}

step("1. liger_fx.save(opt, path)")
start = time.perf_counter()
opt = liger_fx.optimize(model)
print(f"optimize took {time.perf_counter() - start:.2f} s")
liger_fx.save(opt, folder / "graph")
for file in sorted((folder / "graph").iterdir()):
    print(f"{file.stat().st_size:>12,} bytes  {file.name}")

step("2. liger_fx.load(path): no trace, no matching, no code from the file")
start = time.perf_counter()
loaded = liger_fx.load(folder / "graph")
print(f"load took {time.perf_counter() - start:.2f} s")
same = torch.equal(loaded(**call).logits, opt(**call).logits)
print(f"the same bits: {same}; the report came along: {len(loaded.report.rewritten)} sites")

step("3. The graph alone, bound to a checkpoint or a model later")
liger_fx.save(opt, folder / "graph-alone", weights=False)
LlamaForCausalLM(config).save_pretrained(folder / "finetuned")
finetuned = liger_fx.load(folder / "graph-alone", checkpoint=folder / "finetuned")
shared = liger_fx.load(folder / "graph-alone", model=model)
print(f"from a checkpoint: {type(finetuned).__name__}, {finetuned.num_parameters():,} parameters")
print(f"with the model's own weights: {shared.lm_head.weight is model.lm_head.weight}")

step("4. liger_fx.to_folder(opt, path): the graph as Python source")
liger_fx.to_folder(opt, folder / "llama_graph")
source = (folder / "llama_graph" / "module.py").read_text().splitlines()
first = next(i for i, line in enumerate(source) if "# model.layers.0.self_attn" in line)
print("\n".join(source[first : first + 12]))
sys.path.insert(0, str(folder))
import llama_graph  # noqa: E402  it was written a moment ago

with warnings.catch_warnings():
    warnings.simplefilter("error")
    same_source = torch.equal(llama_graph.load()(**call).logits, opt(**call).logits)
print(f"\nit computes the same bits: {same_source}")

step("5. What was changed is noticed")
graph = folder / "graph" / "graph.json"
graph.write_text(graph.read_text().replace('"operator.getitem"', '"os.system"', 1))
for verify in (True, False):
    try:
        liger_fx.load(folder / "graph", verify_checksums=verify)
    except liger_fx.LoadError as error:
        print(f"LoadError: {error}")
raise SystemExit(0 if same and same_source else 1)
