"""The rule for a sum and its RMSNorm: what it finds, what it computes, and why it refuses."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import liger_fx
from liger_fx.engine.rewriter import rewrite as rewrite_trace
from liger_fx.engine.rule import Selection
from liger_fx.modules import LigerAddRMSNorm
from liger_fx.passes.add_rms_norm import AddRMSNorm
from liger_fx.passes.rms_norm import RMSNorm
from tests.engine.graphs import BATCH, TOKENS, Rewritten, differences, rewritten, rows, trace
from tests.passes.test_rms_norm import EPS, MODULES, WIDTH, Gemma, Llama
from tests.support.families import make_inputs
from tests.support.pairs import pair as family

T = torch.Tensor


class Layer(nn.Module):
    """A layer whose result is a function of itself and of its input."""

    def __init__(self, function: Callable[[Any, T], Any], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.norm = norm or Llama()
        self.attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: T) -> Any:
        return self.function(self, x)


def residual(m: Any, x: T) -> T:
    s = x + m.attn(x)
    return s + m.mlp(m.norm(s))


def rewrite(
    function: Callable[[Any, T], Any] = residual,
    norm: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Rewritten:
    torch.manual_seed(0)
    layer = Layer(function, norm).to(dtype)
    return rewritten([AddRMSNorm(), RMSNorm()], layer, rows(WIDTH, dtype), **options)


@pytest.mark.parametrize("kind", MODULES)
def test_the_norm_of_a_sum_takes_its_parts(kind: type[nn.Module]) -> None:
    pair = rewrite(norm=kind())
    assert [(s.rule, s.path, s.after_class) for s in pair.sites] == [
        ("add_rms_norm", "norm", "LigerAddRMSNorm")
    ]
    start, _, end = pair.code.rpartition("\n")
    assert start == (
        "attn = self.attn(x)\nnorm = self.norm(x, attn)\ngetitem = norm[0]\n"
        "getitem_1 = norm[1]\nmlp = self.mlp(getitem)"
    )
    assert end.partition(" = ")[2] == "getitem_1.add(mlp)"
    module = pair.traced.root.norm
    assert isinstance(module, LigerAddRMSNorm) and module.extra_repr() == MODULES[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", MODULES)
def test_it_computes_the_same(kind: type[nn.Module], dtype: torch.dtype) -> None:
    if dtype is torch.float64 and kind.__name__ != "Functional":
        pytest.skip("the model's own code goes down to float32")
    pair = rewrite(norm=kind(), dtype=dtype)
    bound = {torch.float32: 1e-6, torch.float64: 1e-13}.get(dtype, 0.02)
    assert pair.done and max(differences(pair, rows(WIDTH, dtype))) < bound


def in_place(m: Any, x: T) -> T:
    s = m.attn(x)
    s += x
    return s + m.mlp(m.norm(s))


def inline(m: Any, x: T) -> T:
    s = x + m.attn(x)
    return s + s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + EPS) * m.scale


def inline_root(m: Any, x: T) -> T:
    s = x + m.attn(x)
    return s + s / torch.sqrt(s.pow(2).mean(-1, keepdim=True) + EPS) * m.scale


FOUND: dict[str, tuple[Callable[[Any, T], Any], nn.Module | None, str]] = {
    "read by nothing else": (lambda m, x: m.mlp(m.norm(x + m.attn(x))), None, "norm"),
    "handed out": (lambda m, x: (m.norm(s := x + m.attn(x)), s), None, "norm"),
    "a sum of three": (
        lambda m, x: (s := x + m.attn(x) + m.mlp(x)) * m.norm(s), None, "norm"
    ),
    "a norm of torch.nn": (residual, nn.RMSNorm(WIDTH, EPS), "norm"),
    "one without a weight": (residual, nn.RMSNorm(WIDTH, elementwise_affine=False), "norm"),
    "made in place": (in_place, None, "norm"),
    "spelled out": (inline, None, "add_rms_norm"),
    "spelled out with a square root": (inline_root, None, "add_rms_norm"),
    "one tensor twice": (lambda m, x: (s := x.sin() + x.sin()) * m.norm(s), None, "norm"),
    "two in a row": (
        lambda m, x: (t := (s := x + m.attn(x)) + m.mlp(m.norm(s))) * m.norm(t), None, "norm"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    function, norm, path = FOUND[name]
    pair = rewrite(function, norm)
    number = 2 if name == "two in a row" else 1
    assert [(s.rule, s.after) for s in pair.sites] == [
        ("add_rms_norm", f"call_module {path}")
    ] * number
    assert max(differences(pair, rows(WIDTH))) < 1e-6
    pair.traced.graph.lint()
    for node in pair.traced.graph.nodes:
        assert node.op in ("output", "placeholder") or node.users, f"nothing reads {node}"


def view_of(m: Any, x: T) -> T:
    s = x + m.attn(x)
    return m.mlp(m.norm(s)) + s.view(-1, WIDTH).sum()


def test_views_and_sizes_behind_it_read_the_sum() -> None:
    pair = rewrite(view_of)
    assert [s.rule for s in pair.sites] == ["add_rms_norm"]
    assert max(differences(pair, rows(WIDTH))) < 1e-6


def written_later(m: Any, x: T) -> T:
    s = x + m.attn(x)
    y = m.mlp(m.norm(s))
    s.add_(1)
    return s * y


def written_between(m: Any, x: T) -> T:
    s = x + m.attn(x)
    s.mul_(2)
    return s + m.mlp(m.norm(s))


def part_written_between(m: Any, x: T) -> T:
    part = x + 1
    s = part + m.attn(x)
    part.mul_(2)
    return s + m.norm(s)


def in_another_mode(m: Any, x: T) -> T:
    with torch.no_grad():
        s = x + m.attn(x)
    return s + m.norm(s)


def half_and_half(m: Any, x: T) -> T:
    s = x.half() + x
    return s + m.norm(s)


def rounded_between(m: Any, x: T) -> T:
    s = x + m.attn(x)
    return s + m.norm(s.half()).float()


# name -> the layer, why the sum is left alone, and what stands in the norm's place
REFUSED: dict[str, tuple[Callable[[Any, T], Any], str, list[str]]] = {
    "read before": (
        lambda m, x: (s := x + m.attn(x)).sin() + m.norm(s), "is read before by sin(add)",
        ["LigerRMSNorm"],
    ),
    "broadcast": (
        lambda m, x: (s := x + m.attn(x[:1])) + m.norm(s), "is added, and the sum is",
        ["LigerRMSNorm"],
    ),
    "a vector added": (
        lambda m, x: (s := x + m.scale) + m.norm(s), "is added, and the sum is", ["LigerRMSNorm"]
    ),
    "two dtypes": (half_and_half, "is added, and the sum is", ["LigerRMSNorm"]),
    "rounded in between": (rounded_between, "is rounded before the norm", ["LigerRMSNorm"]),
    "written in between": (written_between, "", ["LigerRMSNorm"]),
    "a part written in between": (part_written_between, "works in place", ["LigerRMSNorm"]),
    "in another mode": (in_another_mode, "the grad or autocast mode changes", ["LigerRMSNorm"]),
    "written later": (written_later, "which is written into later", ["LigerRMSNorm"]),
    "called otherwise elsewhere": (
        lambda m, x: (s := x + m.attn(x)) + m.norm(s) + m.norm(x.sin()), "other calls of norm do",
        ["LigerRMSNorm", "LigerRMSNorm"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, why, stands = REFUSED[name]
    dtype = torch.bfloat16 if name == "written later" else torch.float32
    pair = rewrite(function, dtype=dtype)
    assert [c for c in pair.called() if c.startswith("Liger")] == stands
    told = [s.reason or "" for s in pair.sites if s.rule == "add_rms_norm"]
    assert [why in reason for reason in told] == ([True] if why else []), told
    assert [s.rule for s in pair.done] == ["rms_norm"] * len(stands)
    if name not in ("two dtypes", "rounded in between"):
        assert max(differences(pair, rows(WIDTH, dtype))) < (1e-6 if dtype.itemsize == 4 else 0.02)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(x),
        lambda m, x: m.norm(m.attn(x)) + x,
        lambda m, x: m.norm(x + 1),
        lambda m, x: m.norm(x - m.attn(x)),
    ],
)
def test_what_is_no_sum_is_not_spoken_of(function: Callable[[Any, T], Any]) -> None:
    pair = rewrite(function)
    assert [site.rule for site in pair.sites] == ["rms_norm"]


def test_left_out_it_is_a_plain_norm() -> None:
    pair = rewrite(selection=Selection(excluded=("add_rms_norm",)))
    assert [(s.rule, s.reason is None) for s in pair.sites] == [
        ("add_rms_norm", False), ("rms_norm", True)
    ]  # fmt: skip
    assert pair.called() == ["Linear", "LigerRMSNorm", "Linear"]


def test_traced_again_the_sum_is_taken_again() -> None:
    """A second kind of call meets the named module where the norm was."""
    first = rewrite(norm=Gemma())
    module = first.traced.root.norm
    second = rewritten([AddRMSNorm(), RMSNorm()], first.traced.root, rows(WIDTH))
    assert second.called() == ["Linear", "LigerAddRMSNorm", "Linear"]
    assert max(differences(second, rows(WIDTH))) == 0
    assert [s.rule for s in second.sites] == ["add_rms_norm"]
    assert repr(second.traced.root.norm) == repr(module)
    second.traced.root.function = lambda m, x: m.norm(x)
    third = trace(second.traced.root, rows(WIDTH))
    assert [str(n) for n in third.graph.nodes] == ["x", "norm", "output"]
    after = fx.GraphModule(third.root, third.graph)
    torch.testing.assert_close(after(rows(WIDTH)), first.before.norm(rows(WIDTH)))


def test_a_hook_on_the_named_module_keeps_it_a_plain_call() -> None:
    first = rewrite().traced.root
    first.norm.register_forward_hook(lambda *args: None)
    second = trace(first, rows(WIDTH))
    sites = rewrite_trace(second, [AddRMSNorm(), RMSNorm()]).sites
    assert [s.reason for s in sites if "a hook stands on norm" in (s.reason or "")]


FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "olmo2", "phi3", "cohere2")


@pytest.mark.parametrize("name", FAMILIES)
def test_families_compute_the_same(name: str) -> None:
    """Loss, logits and every gradient in float32, in two kinds of calls."""
    model, opt = family(name)
    number = sum(site.rule == "add_rms_norm" for site in opt.report.rewritten)
    assert number == (0 if name in ("olmo2", "cohere2") else 2)
    for pad in (True, False):
        inputs = make_inputs(model, pad=pad, labels=True)
        found = []
        for one in (model, opt):
            one.zero_grad()
            out = one(**inputs)
            out.loss.backward()
            grads = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
            found.append({"loss": out.loss, "logits": out.logits + 0, **grads})
        for key, theirs in found[0].items():
            ours = found[1][key]
            assert (ours - theirs).norm() <= 4e-6 * theirs.norm() + 1e-8, key
    for block in [m for m in opt.modules() if isinstance(m, fx.GraphModule)]:
        assert list(block.state_dict()) == list(model.state_dict()) or block is not opt


def test_layers_share_one_graph_and_say_so_when_the_class_runs() -> None:
    model, opt = family("llama")
    inputs = make_inputs(model)
    layers = opt.model.layers
    assert layers[0].plans and all(map(operator.is_, layers[0].plans, layers[1].plans))
    norm = layers[1].post_attention_layernorm
    assert (
        type(norm) is LigerAddRMSNorm
        and norm.weight is model.model.layers[1].post_attention_layernorm.weight
    )
    x = torch.randn(BATCH, TOKENS, norm.width)
    torch.testing.assert_close(norm(x), model.model.layers[1].post_attention_layernorm(x))
    flat = liger_fx.flatten(opt)
    torch.testing.assert_close(flat(**inputs).logits, model(**inputs).logits)
