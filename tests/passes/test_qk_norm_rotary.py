"""The rule for norms of q's and k's heads that are turned: what it finds, and why it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import liger_fx
from liger_fx.engine.rule import Selection
from liger_fx.errors import LoadError
from liger_fx.passes.qk_norm_rotary import QKNormRotary
from liger_fx.passes.rms_norm import RMSNorm
from liger_fx.passes.rotary_embedding import RotaryEmbedding
from tests.engine.graphs import Rewritten, differences, rewritten
from tests.passes import test_rms_norm as norms
from tests.passes import test_rotary_embedding as turns
from tests.passes.test_rotary_embedding import HEAD, Turn
from tests.support.families import build, make_inputs
from tests.support.pairs import fresh
from tests.support.pairs import pair as family

T = torch.Tensor
RULES = [QKNormRotary(), RMSNorm(), RotaryEmbedding()]
APART = ["LigerRMSNorm", "LigerRMSNorm", "LigerRotaryEmbedding"]


class Attention(nn.Module):
    """q and k normalised by two norms and turned; the layouts say where the heads are."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = norms.Llama,
        turn: Turn | None = None,
        exchanges: bool = False,
        before: Callable[[T], T] = lambda x: x,
    ) -> None:
        super().__init__()
        self.q_norm, self.k_norm = norm(HEAD), norm(HEAD)
        self.turn, self.exchanges, self.before = turn or turns.Llama(), exchanges, before

    def forward(self, q: T, k: T, cos: T, sin: T) -> Any:
        q, k = self.before(self.q_norm(q)), self.before(self.k_norm(k))
        if self.exchanges:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return self.turn(q, k, cos, sin)


def inputs(module: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[T, ...]:
    q, k, cos, sin = turns.inputs(module.turn, dtype, **options)
    if module.exchanges:
        q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    return q, k, cos, sin


def rewrite(module: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Rewritten:
    return rewritten(RULES, module, *inputs(module, dtype), **options)


class HeadsFunctional(norms.Norm):
    def forward(self, x: T) -> T:
        return nn.functional.rms_norm(x, (HEAD,), self.scale, norms.EPS)


def torchs_own(width: int) -> nn.Module:
    norm = nn.RMSNorm(width, eps=norms.EPS)
    nn.init.normal_(norm.weight)
    return norm


NORMS: dict[Any, str] = {
    norms.Llama: "eps=0.0003, norm_cast=promote, ",
    norms.Gemma: "eps=0.0003, scale=1 + weight, ",
    norms.Gemma4: "eps=0.0003, ",
    norms.Afmoe: "eps=0.0003, ",
    HeadsFunctional: "eps=0.0003, norm_cast=promote, ",
    torchs_own: "eps=0.0003, norm_cast=promote, ",
}
TURNS = {kind: text for kind, text in turns.MODULES.items() if kind is not turns.DeepseekV3Before}


@pytest.mark.parametrize("exchanges", [False, True])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("norm", NORMS)
def test_norms_and_turns_are_one_module(norm: Any, turn: type[Turn], exchanges: bool) -> None:
    attention = Attention(norm, turn(), exchanges)
    pair = rewrite(attention)
    assert [(s.rule, s.after_class, s.reason) for s in pair.sites] == [
        ("qk_norm_rotary", "LigerQKNormRotaryEmbedding", None)
    ]
    assert pair.called() == ["LigerQKNormRotaryEmbedding"]
    assert max(differences(pair, *inputs(attention))) < 2e-6
    (found,) = (m for m in pair.traced.root.modules() if type(m).__name__ == pair.called()[0])
    between = "exchanged=True, " if exchanges else ""
    assert found.extra_repr() == NORMS[norm] + between + TURNS[turn]


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turn", [turns.Llama, turns.Olmo2, turns.Cohere2, turns.Phi3])
@pytest.mark.parametrize("norm", [norms.Llama, norms.Gemma, torchs_own])
def test_in_mixed_dtypes_the_result_has_the_dtype_the_model_gives_it(
    norm: Any, turn: type[Turn], weight: torch.dtype, tables: torch.dtype
) -> None:
    attention = Attention(norm, turn()).to(weight)
    given = inputs(attention, torch.bfloat16, tables=tables)
    pair = rewritten(RULES, attention, *given)
    assert pair.called() == ["LigerQKNormRotaryEmbedding"], pair.reasons
    assert max(differences(pair, *given)) < 0.02


def test_the_graph_after_it() -> None:
    pair = rewrite(Attention(exchanges=True))
    assert pair.code == (
        "q_norm_scale = self.q_norm.scale\n"
        "k_norm_scale = self.k_norm.scale\n"
        "qk_norm_rotary = self.qk_norm_rotary(q, k, q_norm_scale, k_norm_scale, cos, sin)\n"
        "getitem_4 = qk_norm_rotary[0]\n"
        "getitem_5 = qk_norm_rotary[1]"
    )


class Alone(Attention):
    """Where k is not turned, or otherwise."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: T, k: T, cos: T, sin: T) -> Any:
        return self.function(self, q, k, cos.unsqueeze(1), sin.unsqueeze(1))


def two_tables(m: Any, q: T, k: T, cos: T, sin: T) -> Any:
    return m.turn.turn(m.q_norm(q), cos, sin), m.turn.turn(m.k_norm(k), sin, cos)


ALONE: dict[str, tuple[Callable[..., Any], int]] = {
    "q alone": (lambda m, q, k, cos, sin: (m.turn.turn(m.q_norm(q), cos, sin), k), 1),
    "two tables": (two_tables, 2),
    "one norm for both": (
        lambda m, q, k, cos, sin: m.turn.turn(m.q_norm(m.q_norm(q)), cos, sin), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_one_tensor_alone(name: str) -> None:
    function, number = ALONE[name]
    module = Alone(function)
    pair = rewrite(module)
    found = [called for called in pair.called() if "Rotary" in called]
    assert found == ["LigerNormRotaryEmbedding"] * number
    assert max(differences(pair, *inputs(module))) < 2e-6


def without_weight(width: int) -> nn.Module:
    return norms.DeepseekV4()


class SubtractsMean(norms.Norm):
    def forward(self, x: T) -> T:
        x = x - x.mean(-1, keepdim=True)
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norms.EPS))


def also_read(m: Any, q: T, k: T, cos: T, sin: T) -> Any:
    q, k = m.q_norm(q), m.k_norm(k)
    return m.turn.turn(q, cos, sin), m.turn.turn(k, cos, sin), q.transpose(1, 2).sum(), k.cos()


def handed_out(m: Any, q: T, k: T, cos: T, sin: T) -> Any:
    q, k = m.q_norm(q), m.k_norm(k)
    return m.turn.turn(q, cos, sin), m.turn.turn(k, cos, sin), q, k


def written_later(m: Any, q: T, k: T, cos: T, sin: T) -> Any:
    q, k = q.cos(), k.cos()
    turned = m.turn.turn(m.q_norm(q), cos, sin), m.turn.turn(m.k_norm(k), cos, sin)
    return *turned, q.mul_(2), k.mul_(2)


def written_between(m: Any, q: T, k: T, cos: T, sin: T) -> Any:
    q, k = m.q_norm(q), m.k_norm(k)
    q.mul_(2), k.mul_(2)
    return m.turn.turn(q, cos, sin), m.turn.turn(k, cos, sin)


def not_the_rest(m: Any, q: T, k: T, cos: T, sin: T) -> Any:
    def part(x: T) -> T:
        turned = x[..., : HEAD // 2] * cos[..., : HEAD // 2]
        turned = turned + turns.half_split(x[..., : HEAD // 2]) * sin[..., : HEAD // 2]
        return torch.cat((turned, x[..., HEAD // 2 : -1]), -1)

    return part(m.q_norm(q)), part(m.k_norm(k))


class OneToken(Attention):
    def forward(self, q: T, k: T, cos: T, sin: T) -> Any:
        return super().forward(q, k, cos[:, :1], sin[:, :1])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no weight": (lambda: Attention(without_weight), "the norm has no weight"),
    "a LayerNorm": (lambda: Attention(SubtractsMean), "subtracts the mean first"),
    "the norm is read again": (lambda: Alone(also_read), "the norm is also read by"),
    "the norm is handed out": (lambda: Alone(handed_out), "the norm is also read by output"),
    "written later": (lambda: Alone(written_later), "which is written into later"),
    "written in between": (lambda: Alone(written_between), ""),
    "a part is left out": (lambda: Alone(not_the_rest), "is not the rest of it"),
    "broadcast tables": (OneToken, "is broadcast over x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """The norms and the turn are left to their own rules, with a reason."""
    make, why = REFUSED[name]
    dtype = torch.bfloat16 if name == "written later" else torch.float32
    module = make().to(dtype)
    pair = rewrite(module, dtype)
    assert not any("NormRotary" in called for called in pair.called())
    told = [s.reason or "" for s in pair.sites if s.rule == "qk_norm_rotary"]
    assert [why in reason for reason in told] == [True] * (2 if why else 0), told
    assert max(differences(pair, *inputs(module, dtype))) < (2e-6 if dtype.itemsize == 4 else 0.02)


def test_norms_of_the_whole_width_are_not_spoken_of() -> None:
    _, opt = family("olmo2")
    assert "qk_norm_rotary" not in {site.rule for site in opt.report.sites}


def test_left_out_it_is_two_norms_and_a_turn() -> None:
    pair = rewrite(Attention(), selection=Selection(excluded=("qk_norm_rotary",)))
    assert pair.called() == APART
    assert [s.rule for s in pair.done] == ["rms_norm", "rms_norm", "rotary_embedding"]


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_families_compute_the_same(name: str) -> None:
    """Loss, logits and every gradient in float32, in two kinds of calls."""
    model, opt = family(name)
    assert sum(site.rule == "qk_norm_rotary" for site in opt.report.rewritten) == 2
    for pad in (True, False):
        inputs = make_inputs(model, pad=pad, labels=True)
        found = []
        for one in (model, opt):
            one.zero_grad()
            out = one(**inputs)
            out.loss.backward()
            grads = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
            found.append({"loss": out.loss, "logits": out.logits + 0, **grads})
        assert found[0].keys() == found[1].keys()
        for key, theirs in found[0].items():
            ours = found[1][key]
            assert (ours - theirs).norm() <= 4e-6 * theirs.norm() + 1e-8, key


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_families_generate_the_same(name: str) -> None:
    """With a cache, so that a layer turns one token at a place behind others."""
    model, opt = family(name)
    given = make_inputs(model, pad=True)
    wanted, found = (
        one.generate(**given, max_new_tokens=12, do_sample=False) for one in (model, opt)
    )
    assert torch.equal(wanted, found)
    for layer in opt.model.layers:
        turned = [plan for plan in layer.plans if "qk_norm_rotary" in str(plan.graph)]
        assert turned and len(turned) == len(layer.plans)


def test_saved_and_bound_again_only_to_the_same_norm(tmp_path: Path) -> None:
    model, opt = fresh("qwen3")
    inputs = make_inputs(model, pad=True)
    liger_fx.save(opt, tmp_path / "saved")
    loaded = liger_fx.load(tmp_path / "saved")
    torch.testing.assert_close(loaded(**inputs).logits, opt(**inputs).logits)
    kinds = [type(m).__name__ for m in loaded.modules()]
    assert kinds.count("LigerQKNormRotaryEmbedding") == 2
    other = build("qwen3")
    other.model.layers[1].self_attn.k_norm.variance_epsilon = 1e-3
    with pytest.raises(LoadError, match="variance_epsilon"):
        liger_fx.load(tmp_path / "saved", model=other)


def test_flat_exported_and_compiled(tmp_path: Path) -> None:
    model, opt = fresh("qwen3")
    inputs = make_inputs(model, pad=True)
    wanted = model(**inputs).logits
    flat = liger_fx.flatten(opt)
    assert isinstance(flat, fx.GraphModule)
    torch.testing.assert_close(flat(**inputs).logits, wanted)
    program = liger_fx.export(opt, tmp_path / "model.pt2")
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("liger_fx.qk_norm_rope.default") == 2
    torch.testing.assert_close(program.module()(**inputs)["logits"], wanted)
    compiled = torch.compile(opt, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, wanted)


def test_a_hook_on_a_norm_keeps_it_a_call() -> None:
    model, _ = fresh("qwen3")
    seen: list[int] = []
    model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda *args: seen.append(1))
    opt = liger_fx.optimize(model)
    seen.clear()
    opt(**make_inputs(model, pad=True))
    assert seen
    assert [s.path for s in opt.report.rewritten if s.after_class == "LigerQKNormRotaryEmbedding"]
