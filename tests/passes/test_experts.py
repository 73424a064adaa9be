"""The experts of a mixture become LigerExperts where transformers' grouped_mm computes them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import liger_fx
from liger_fx.modules import LigerExperts
from liger_fx.tiny import tiny_model
from tests.support.accuracy import Run, furthest, measure, relative

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
# model type -> how many of two layers have experts
REWRITTEN = {
    "mixtral": 2, "qwen2_moe": 2, "qwen3_moe": 2, "olmoe": 2, "granitemoe": 2, "aria_text": 2,
    "deepseek_v3": 1, "glm4_moe": 1, "ernie4_5_moe": 1,
}  # fmt: skip
# model type -> why its experts stay
REFUSED = {
    "gpt_oss": "GptOssExperts has an _apply_gate of its own",
    "nemotron_h": "its experts have no gate",
}


def build(name: str = "mixtral") -> Any:
    torch.manual_seed(0)
    return tiny_model(name, 2)


def named(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, LigerExperts)]


def sites(opt: Any) -> list[Any]:
    return [site for site in opt.report.sites if site.rule == "experts"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def experts_of(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


@pytest.fixture
def registered() -> Iterator[Callable[[str], list[int]]]:
    """Registers an implementation under a name, that notes its calls and computes as batched_mm."""
    names = []

    def register(name: str) -> list[int]:
        calls: list[int] = []

        def forward(self: Any, *args: Any) -> Any:
            calls.append(len(args))
            return moe.batched_mm_experts_forward(self, *args)

        moe.ALL_EXPERTS_FUNCTIONS[name] = forward
        names.append(name)
        return calls

    yield register
    for name in names:
        del moe.ALL_EXPERTS_FUNCTIONS[name]


@pytest.mark.parametrize("name", REWRITTEN)
def test_every_mixture_computes_what_it_did(name: str) -> None:
    model = build(name)
    opt = liger_fx.optimize(model)
    assert len(named(opt)) == len([s for s in sites(opt) if s.reason is None]) == REWRITTEN[name]
    assert not [s for s in sites(opt) if s.reason] and not opt.report.opaque
    assert opt.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in opt.named_parameters()] == [n for n, _ in model.named_parameters()]
    for train in (False, True):
        theirs, ours = (measure(m.train(train), BATCH) for m in (model, opt))
        assert furthest(ours, theirs) <= 2e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_computes_something_else_stays(name: str) -> None:
    model = build(name)
    opt = liger_fx.optimize(model)
    assert not named(opt) and sites(opt)
    assert any((site.reason or "").startswith(REFUSED[name]) for site in sites(opt))
    torch.testing.assert_close(logits(opt), logits(model))


def test_what_is_printed() -> None:
    opt = liger_fx.optimize(build())
    assert "(experts): LigerExperts(4 x (64 -> 96), activation=silu)" in str(opt)
    transposed = liger_fx.optimize(build("aria_text"))
    assert "activation=silu, transposed)" in str(transposed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_are_as_accurate(dtype: torch.dtype) -> None:
    """Promise 6 for the layer alone: routing does not depend on what it gives."""
    model = build()
    ours, theirs = experts_of(liger_fx.optimize(model).to(dtype)), experts_of(model.to(dtype))
    exact = copy.deepcopy(theirs).double()
    exact.config = copy.deepcopy(exact.config)
    exact.config._experts_implementation = "eager"
    errors = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, dy = torch.randn(2, 31, 64, generator=generator).to(dtype)
        weights, index = torch.rand(31, 4, generator=generator).topk(2)
        runs = [layer_run(m, x, weights.to(dtype), index, dy) for m in (exact, theirs, ours)]
        names = runs[0].gradients
        for i, run in enumerate(runs[1:]):
            of_outputs = relative(run.outputs["y"], runs[0].outputs["y"])
            of_all = relative(*(torch.cat([r.gradients[n].flatten() for n in names])
                                for r in (run, runs[0])))  # fmt: skip
            single = [relative(run.gradients[n], runs[0].gradients[n]) for n in names]
            errors.append((i, of_outputs, of_all, *single))
    theirs_sum, ours_sum = (
        torch.tensor([e[1:] for e in errors if e[0] == i]).square().sum(0).sqrt() for i in (0, 1)
    )
    assert (ours_sum <= 1.1 * theirs_sum).all(), ours_sum / theirs_sum


def layer_run(layer: Any, x: Any, weights: Any, index: Any, dy: Any) -> Run:
    """The layer's output and all gradients, its inputs in its own dtype."""
    dtype = layer.gate_up_proj.dtype
    x, weights = (t.to(dtype).requires_grad_() for t in (x, weights))
    y = layer(x, index, weights)
    inputs = {"x": x, "weights": weights, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(y, list(inputs.values()), dy.to(dtype))
    found = {n: g.double() for n, g in zip(inputs, grads, strict=True)}
    return Run({"y": y.detach().double()}, found)


def test_verify_and_the_layers_by_themselves() -> None:
    model = build("qwen3_moe")
    opt = liger_fx.optimize(model)
    verified = liger_fx.verify(model, opt)
    assert verified.ok, str(verified)
    assert any("LigerExperts" in line and "ok" in line for line in str(verified).splitlines())


def test_autocast_computes_in_the_dtype_of_the_weights() -> None:
    model = build()
    opt = liger_fx.optimize(model)
    theirs, ours = (measure(m.train(), BATCH, autocast=torch.bfloat16) for m in (model, opt))
    assert furthest(ours, theirs) < 0.05
    layer, twin = experts_of(opt.bfloat16()), copy.deepcopy(experts_of(model))
    x, weights, index = torch.randn(5, 64), torch.rand(5, 2), torch.tensor([[0, 1]] * 5)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (m(x, index, weights) for m in (layer, twin))
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("chosen", ["eager", "batched_mm"])
def test_the_users_choice_is_kept(chosen: str) -> None:
    model = build()
    model.set_experts_implementation(chosen)
    opt = liger_fx.optimize(model)
    reason = f"its experts_implementation is {chosen}, not transformers' grouped_mm"
    assert not named(opt)
    assert [(s.reason or "")[: len(reason)] for s in sites(opt)] == [reason] * 2
    torch.testing.assert_close(logits(opt), logits(model))


def test_an_implementation_of_the_users_under_the_same_name(
    registered: Callable[[str], list[int]],
) -> None:
    calls = registered("grouped_mm")
    opt = liger_fx.optimize(build())
    assert not named(opt) and len(sites(opt)) == 2
    calls.clear()
    logits(opt)
    assert len(calls) == 2


def test_a_choice_that_is_made_later(registered: Callable[[str], list[int]]) -> None:
    calls = registered("mine")
    model = build()
    opt = liger_fx.optimize(model)
    expected = logits(opt)
    for chosen, count in (("mine", 2), ("grouped_mm", 0), ("mine", 2)):
        opt.set_experts_implementation(chosen)
        torch.testing.assert_close(logits(opt), expected)
        calls.clear()  # one to find out what comes back, for a new graph
        torch.testing.assert_close(logits(opt), expected)
        assert len(calls) == count
        assert furthest(measure(opt, BATCH), measure(model, BATCH)) <= 2e-5
    assert model.config._experts_implementation == "grouped_mm"


def _no_plain_weights(experts: Any) -> None:
    class Kept(nn.Parameter):
        pass

    experts.down_proj = Kept(experts.down_proj.data)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "activation": (lambda m: setattr(m, "act_fn", nn.Tanh()), "its activation is Tanh"),
    "function": (lambda m: m.__dict__.update(act_fn=m._modules.pop("act_fn").forward),
                 "its activation is method"),
    "hooked activation": (
        lambda m: m.act_fn.register_forward_hook(lambda *_: None), "its activation is SiLU"
    ),
    "gate": (
        lambda m: setattr(m, "_apply_gate", lambda x: moe._default_apply_gate(m, x)),
        "MixtralExperts has an _apply_gate of its own",
    ),
    "hook": (lambda m: m.register_forward_hook(lambda *_: None), "a hook"),
    "forward": (
        lambda m: setattr(m, "forward", lambda *args: MixtralExperts.forward(m, *args)),
        "MixtralExperts has a forward of its own",
    ),
    "parallel": (
        lambda m: setattr(m, "_is_expert_parallel", True), "its experts are spread over processes"
    ),
    "weights": (_no_plain_weights, "its weights are no plain tensors"),
    "shapes": (
        lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj.data[:, :, :40])),
        "experts: gate_up_proj",
    ),
    "dtypes": (lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj.data.bfloat16())),
               "experts: gate_up_proj is torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_refused(change: str) -> None:
    model = build()
    alter, reason = CHANGES[change]
    alter(experts_of(model))
    try:
        expected = logits(model)
    except RuntimeError:  # nobody could run it
        expected = None
    opt = liger_fx.optimize(model)
    assert named(opt) == ["model.layers.1.mlp.experts"]
    told = [s.reason or "" for s in sites(opt) if s.path == "model.layers.0.mlp.experts"]
    assert len(told) == 1 and told[0].startswith(reason), told
    if expected is not None:
        torch.testing.assert_close(logits(opt), expected)


class Halved(MixtralExperts):
    """A user's class of experts, with another gate."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return moe._default_apply_gate(self, gate_up) / 2


def test_a_class_of_the_users_stays() -> None:
    model = build()
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Halved
    opt = liger_fx.optimize(model)
    assert not named(opt)
    torch.testing.assert_close(logits(opt), logits(model))


class LaidOut(nn.Module):
    """Calls experts with more dimensions than a router has, which transformers allows."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor) -> Any:
        index = torch.zeros(2, 3, 2, dtype=torch.long)
        return self.experts(x, index, torch.ones(2, 3, 2))


def test_other_shapes_stay() -> None:
    model, x = LaidOut(experts_of(build())), torch.randn(6, 64)
    with pytest.warns(liger_fx.NothingRewrittenWarning):
        opt = liger_fx.optimize(model, inputs=(x,))
    (site,) = opt.report.refused
    assert site.reason and "it is called with float32" in site.reason
    torch.testing.assert_close(opt(x), model(x))


def test_an_attribute_that_is_set_later() -> None:
    """What the named module has not, turns it back."""
    model = build()
    opt = liger_fx.optimize(model)
    for m in (model, opt):
        experts_of(m).act_fn = nn.Tanh()
    assert named(opt) == ["model.layers.1.mlp.experts"]
    torch.testing.assert_close(logits(opt), logits(model))


def test_copies_and_restore(tmp_path: Path) -> None:
    model = build()
    opt = liger_fx.optimize(model)
    expected = logits(opt)
    liger_fx.save(opt, tmp_path / "saved")
    copies = [
        copy.deepcopy(opt),
        pickle.loads(pickle.dumps(opt)),
        liger_fx.load(tmp_path / "saved"),
        liger_fx.load(tmp_path / "saved", model=model),
    ]
    for made in copies:
        assert len(named(made)) == 2
        assert torch.equal(logits(made), expected)
    restored = liger_fx.restore(opt)
    assert isinstance(experts_of(restored), MixtralExperts)
    assert experts_of(restored).gate_up_proj is experts_of(opt).gate_up_proj
    assert torch.equal(logits(restored), logits(model))


def test_a_copy_has_a_choice_of_its_own(registered: Callable[[str], list[int]]) -> None:
    calls = registered("mine")
    opt = liger_fx.optimize(build())
    twin = copy.deepcopy(opt)
    twin.set_experts_implementation("mine")
    logits(opt)
    assert not calls
    logits(twin)
    assert calls


def test_flatten_and_source(tmp_path: Path) -> None:
    opt = liger_fx.optimize(build())
    graph = liger_fx.flatten(opt).graph
    called = [str(n.target) for n in graph.nodes if n.op == "call_module"]
    assert [path for path in called if path.endswith("experts")] == named(opt)
    liger_fx.to_folder(opt, tmp_path / "source")
    text = "".join(f.read_text() for f in (tmp_path / "source").glob("*.py"))
    assert "LigerExperts(" in text and "gate_up_proj=" in text


def test_checkpointing_and_generate() -> None:
    model = build("qwen3_moe")
    opt = liger_fx.optimize(model)
    theirs = measure(model.train(), BATCH)
    opt.gradient_checkpointing_enable({"use_reentrant": False})
    assert furthest(measure(opt.train(), BATCH), theirs) <= 2e-5
    opt.gradient_checkpointing_disable()
    options: Any = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    ours, wanted = (m.eval().generate(IDS, **options) for m in (opt, model))
    assert torch.equal(ours, wanted)


def test_compiled_as_a_whole() -> None:
    model = build()
    opt = liger_fx.optimize(model)
    compiled: Any = torch.compile(opt.train(), fullgraph=True, backend="aot_eager")
    theirs = measure(model.train(), BATCH)
    result = compiled(**BATCH)
    result.loss.backward()
    grads = {n: p.grad.double() for n, p in opt.named_parameters()}
    outputs = {name: result[name].detach().double() for name in ("logits", "loss")}
    assert furthest(Run(outputs, grads), theirs) <= 2e-5
    torch._dynamo.reset()


def test_adapters_on_the_weights() -> None:
    """Experts whose weights PEFT adapts stay PEFT's; on those of a named module it puts its own."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip

    def adapted(model: Any) -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)

    theirs = adapted(build("qwen3_moe"))
    expected = measure(theirs.train(), BATCH)
    before = adapted(build("qwen3_moe"))
    before.base_model.model = liger_fx.optimize(before.base_model.model)
    assert not named(before)
    told = [site.reason or "" for site in sites(before.base_model.model)]
    assert len(told) == 2 and all(t.startswith("ParamWrapper has a forward") for t in told), told
    assert furthest(measure(before.train(), BATCH), expected) <= 2e-5
    after = adapted(liger_fx.optimize(build("qwen3_moe")))
    assert furthest(measure(after.train(), BATCH), expected) <= 2e-5


def test_sites_can_be_left_out() -> None:
    opt = liger_fx.optimize(build(), exclude=["experts"])
    assert not named(opt)
    assert {site.reason for site in sites(opt)} == {"excluded by 'experts'"}
