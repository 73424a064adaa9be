"""Trains a small Llama on real text, with and without liger_fx, and plots the losses.

    python tools/bench/train_on_text.py  ->  results/train_on_text.json, docs/train_on_text.png

The text is Python's own language reference as `pydoc` ships it, read as bytes. Three runs: the
original with two seeds (weights and order of the data), and liger_fx with the first of them. The
verdict: over the whole smoothed curve, liger_fx is no further from the original of its seed than
the other seed is. The loss on text held back from training is shown beside it.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.common import RESULTS, ROOT, show, write

HELD_BACK = 0.05  # of the text, its end
SMOOTHING = 20  # steps in the mean that the curves show


@dataclass(frozen=True)
class Recipe:
    """Model and training sizes; `bf16` is an autocast region around the forward."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    batch: int
    length: int
    steps: int
    learning_rate: float
    bf16: bool


RECIPES = {
    "small": Recipe(128, 344, 4, 4, 2, 8, 128, 600, 2e-3, bf16=False),
    "large": Recipe(768, 2048, 12, 12, 4, 16, 512, 300, 4e-4, bf16=True),
}


def text() -> torch.Tensor:
    """Python's language reference as bytes, int64."""
    topics = pydoc_data.topics.topics
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(joined.encode()), dtype=torch.long)


def build(recipe: Recipe, seed: int, device: str) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.length,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device).train()


def batches(data: torch.Tensor, recipe: Recipe, seed: int) -> list[torch.Tensor]:
    """Windows (batch, length) from random places in the text, the same for the same seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    last = len(data) - recipe.length
    starts = torch.randint(0, last, (recipe.steps, recipe.batch), generator=generator)
    offsets = torch.arange(recipe.length)
    return [data[row[:, None] + offsets] for row in starts]


def loss_of(model: Any, ids: torch.Tensor, bf16: bool) -> torch.Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
        return model(input_ids=ids, labels=ids).loss


def train(recipe: Recipe, seed: int, with_liger_fx: bool, device: str) -> dict[str, Any]:
    """One run: the loss of each step, the loss on the held-back text, and the seconds it took."""
    data = text()
    cut = int(len(data) * (1 - HELD_BACK))
    model: torch.nn.Module = build(recipe, seed, device)
    if with_liger_fx:
        import liger_fx

        model = liger_fx.optimize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    losses, begin = [], time.perf_counter()
    for ids in batches(data[:cut], recipe, seed):
        loss = loss_of(model, ids.to(device), recipe.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    seconds = time.perf_counter() - begin
    held_back = evaluate(model.eval(), data[cut:], recipe, device)
    return {
        "liger_fx": with_liger_fx,
        "seed": seed,
        "seconds": seconds,
        "losses": [round(loss.item(), 5) for loss in losses],
        "held_back_loss": held_back,
    }


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: torch.Tensor, recipe: Recipe, device: str) -> float:
    """Mean loss over the held-back text, cut into whole windows."""
    windows = data[: len(data) // recipe.length * recipe.length].view(-1, recipe.length)
    groups = [group for group in windows.split(recipe.batch) if len(group) == recipe.batch]
    losses = [loss_of(model, ids.to(device), recipe.bf16).item() for ids in groups]
    return statistics.fmean(losses)


def smooth(losses: list[float]) -> list[float]:
    """Means over the last SMOOTHING steps."""
    return [statistics.fmean(losses[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(losses))]


def judge(original: dict[str, Any], other: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Whether ours is nearer to the original of its seed than another seed of the original is."""
    first, second, mine = (smooth(run["losses"]) for run in (original, other, ours))
    gap = statistics.fmean(abs(a - b) for a, b in zip(mine, first, strict=True))
    noise = statistics.fmean(abs(a - b) for a, b in zip(second, first, strict=True))
    held_gap = abs(ours["held_back_loss"] - original["held_back_loss"])
    held_noise = abs(other["held_back_loss"] - original["held_back_loss"])
    return {
        "curve_gap": gap,
        "curve_noise": noise,
        "held_back_gap": held_gap,
        "held_back_noise": held_noise,
        "within_noise": gap <= noise,
    }


def plot(path: Path, runs: list[dict[str, Any]], noise: float, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    steps = range(1, len(runs[0]["losses"]) + 1)
    first = smooth(runs[0]["losses"])
    low, high = [y - noise for y in first], [y + noise for y in first]
    axes.fill_between(steps, low, high, color="0.88", label="mean gap between the seeds")
    styles = (("C0", "-", 2.5), ("C0", ":", 1.2), ("C1", "--", 1.4))
    for run, (colour, dashes, width) in zip(runs, styles, strict=True):
        name = "liger_fx" if run["liger_fx"] else "original"
        label = f"{name}, seed {run['seed']} (held back: {run['held_back_loss']:.4f})"
        axes.plot(steps, smooth(run["losses"]), dashes, color=colour, lw=width, label=label)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHING} steps", title=title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipe", choices=RECIPES, default=None, help="small, or large on a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_on_text.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "train_on_text.png")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = arguments.recipe or ("large" if device == "cuda" else "small")
    recipe = RECIPES[name]
    torch.set_num_threads(1)  # the small model gains nothing from more
    plan = [(0, False), (1, False), (0, True)]
    runs = []
    for seed, with_liger_fx in plan:
        runs.append(train(recipe, seed, with_liger_fx, device))
        done = runs[-1]
        print(
            f"seed {seed}, liger_fx {with_liger_fx}: {done['seconds']:.0f} s, last loss "
            f"{done['losses'][-1]:.4f}, held back {done['held_back_loss']:.4f}",
            flush=True,
        )
    verdict = judge(*runs)
    setting = {"recipe": vars(recipe), "device": device}
    write(arguments.out, {**setting, "verdict": verdict, "runs": runs})
    plot(arguments.plot, runs, verdict["curve_noise"], f"A {name} Llama on Python's documentation")
    show("Training on text", ("", "liger_fx - original", "seed 1 - seed 0"), table(verdict))
    print("within the noise of two seeds:", "yes" if verdict["within_noise"] else "NO")
    return 0 if verdict["within_noise"] else 1


def table(verdict: dict[str, Any]) -> list[list[str]]:
    return [
        [what, f"{verdict[f'{key}_gap']:.5f}", f"{verdict[f'{key}_noise']:.5f}"]
        for what, key in (("loss curve, mean |gap|", "curve"), ("held-back loss", "held_back"))
    ]


if __name__ == "__main__":
    raise SystemExit(main())
