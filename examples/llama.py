"""The main job on one page: a Llama before and after, what was rewritten, and the proof.

    python examples/llama.py        (or: make demo)

The model is transformers' own LlamaForCausalLM, eight layers with random weights: no download, no
GPU needed. On the CPU the named modules compute with PyTorch, on a GPU the same modules run Triton.
"""

import time
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger_fx


def step(title: str) -> None:
    print(f"\n{'=' * 8} {title}\n", flush=True)


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)
model = LlamaForCausalLM(config)

step("1. The model as transformers builds it")
print(model)

step("2. liger_fx.optimize(model)")
start = time.perf_counter()
opt = liger_fx.optimize(model)
print(f"took {time.perf_counter() - start:.1f} s\n")
print(opt)

step("3. opt.report: what was rewritten, and what was not")
print(opt.report)

step("4. liger_fx.verify(model, opt): outputs and gradients against float64")
found = liger_fx.verify(model, opt)
print(found)

step("5. It is still the same model")
same = all(a is b for a, b in zip(model.parameters(), opt.parameters(), strict=True))
print(f"a {type(opt).__name__}, by isinstance: {isinstance(opt, LlamaForCausalLM)}")
print(f"parameters shared, not copied: {same}")
prompt = torch.randint(0, 4096, (1, 8))
with warnings.catch_warnings(record=True) as said:
    tokens = [m.eval().generate(prompt, max_new_tokens=16, do_sample=False) for m in (model, opt)]
print(f"generates the same tokens: {torch.equal(*tokens)}")
for warning in said:
    print(f"and says once: {warning.message}")
raise SystemExit(0 if found.ok else 1)
