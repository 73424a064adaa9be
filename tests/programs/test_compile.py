"""torch.compile, torch.export and torch.func: one graph, our operators single nodes in it."""

from __future__ import annotations

import copy
import functools
import random
import re
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends import registry
from torch._dynamo.comptime import comptime
from torch._dynamo.testing import CompileCounter
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import liger_fx
from liger_fx.errors import FallbackWarning
from liger_fx.model.constant_floats import take_floats_for_constants
from liger_fx.model.region_schemas import region_schemas_kept
from liger_fx.model.regions import can_be_region
from liger_fx.modules.lazy_logits import LazyLogits
from tests.programs.models import tiny, tiny_inputs
from tests.programs.support import (
    CHECK,
    NoGraph,
    build,
    compare,
    gradients,
    graph_runs,
    make_inputs,
    optimize,
    rotary_sites,
    run,
    same,
)

OPERATORS = ("rms_norm", "rope", "gated")


class Operators:
    """A backend for torch.compile that runs what it is given and counts liger_fx's operators.

    name: of the backend to stand in for, where nothing but a name can be given.
    """

    def __init__(self, aot: bool = False, name: str = "") -> None:
        self.graphs: list[Counter[str]] = []
        self.backward: list[Counter[str]] = []
        self.aot = aot
        self.name = name

    def __enter__(self) -> Operators:
        torch._dynamo.reset()
        if self.name:
            self.replaced = registry.lookup_backend(self.name)
            registry._COMPILER_FNS[self.name] = self
        return self

    def __exit__(self, *_: Any) -> None:
        if self.name:
            # this name alone: the registry is filled as it is asked
            registry._COMPILER_FNS[self.name] = self.replaced
        torch._dynamo.reset()

    def __call__(self, module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        if not self.aot:
            self.graphs.append(self._count(module))
            return module.forward
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def forward(graph: fx.GraphModule, _: Any) -> Any:
            self.graphs.append(self._count(graph))
            return make_boxed_func(graph.forward)

        def backward(graph: fx.GraphModule, _: Any) -> Any:
            self.backward.append(self._count(graph))
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=forward, bw_compiler=backward)(module, example)

    @staticmethod
    def _count(module: fx.GraphModule) -> Counter[str]:
        return Counter(n for node in module.graph.nodes if (n := operator_name(node)))

    def judge(self, opt: Any, *, breaks: int | None = 0, rotary: int | None = None) -> None:
        """NoGraph unless the operators of every site are in what was compiled, in one piece."""
        if CHECK != "graphs":
            return
        wanted = rotary_sites(opt) if rotary is None else rotary
        most = max((sum(v for k, v in g.items() if "rope" in k) for g in self.graphs), default=0)
        if breaks is None:
            most = sum(v for g in self.graphs for k, v in g.items() if "rope" in k)
        if wanted == 0 or most < wanted:
            raise NoGraph(f"{most} rotary operators of {wanted} were compiled: {self.graphs}")
        if breaks is not None and len(self.graphs) > breaks + 1:
            raise NoGraph(f"compiled in {len(self.graphs)} pieces, not {breaks + 1}")


def operator_name(node: fx.Node) -> str | None:
    """The name of the liger_fx operator that a node calls, if it calls one."""
    text = str(node.target)
    if node.op == "call_function" and text.startswith("liger_fx."):
        return text.removeprefix("liger_fx.").removesuffix(".default")
    return None


def forward(m: Any, model: Any, lengths: tuple[int, ...] = (9,)) -> list[torch.Tensor]:
    results = []
    for length in lengths:
        inputs = make_inputs(model, 2, length)
        with torch.no_grad():
            results.append(m(**inputs, use_cache=False).logits)
    return results


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_forward_in_one_piece(name: str) -> None:
    model, twin_of = build(name), build(name)
    theirs = forward(twin_of, twin_of)
    opt = optimize(model)
    with Operators() as seen:
        compiled = torch.compile(opt, backend=seen, fullgraph=True)
        same(forward(compiled, opt), theirs)
    seen.judge(opt)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_any_length_without_compiling_again(name: str) -> None:
    model, twin_of = build(name), build(name)
    lengths = (9, 17, 23, 12)
    theirs = forward(twin_of, twin_of, lengths)
    opt = optimize(model)
    with Operators() as seen:
        compiled = torch.compile(opt, backend=seen, fullgraph=True, dynamic=True)
        same(forward(compiled, opt, lengths), theirs)
    seen.judge(opt)


@pytest.mark.slow
def test_lengths_made_dynamic_by_themselves() -> None:
    """Without dynamic=True the second length makes it dynamic: twice compiled, no more."""
    model, twin_of = build("llama"), build("llama")
    lengths = (9, 17, 23, 12, 31)
    theirs = forward(twin_of, twin_of, lengths)
    opt = optimize(model)
    with Operators() as seen:
        compiled = torch.compile(opt, backend=seen)
        same(forward(compiled, opt, lengths), theirs)
    seen.judge(opt, breaks=1)


def step(m: Any, model: Any) -> Any:
    model.zero_grad(set_to_none=True)
    loss = m(**make_inputs(model, 2, 9, labels=True), use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_forward_and_backward(train: bool) -> None:
    """In AOTAutograd's graphs too our operators are single nodes, backward ones as well."""
    model, twin_of = build("llama").train(train), build("llama").train(train)
    theirs = step(twin_of, twin_of)
    opt = optimize(model)
    with Operators(aot=True) as seen:
        compiled = torch.compile(opt, backend=seen, fullgraph=True)
        same(step(compiled, opt), theirs)
    seen.judge(opt)
    if CHECK == "graphs":
        assert any("rms_norm" in name for graph in seen.backward for name in graph), seen.backward


@pytest.mark.slow
def test_compiled_in_place() -> None:
    """opt.compile() compiles the call itself."""
    model, twin_of = build("llama"), build("llama")
    theirs = step(twin_of, twin_of)
    opt = optimize(model)
    with Operators() as seen:
        opt.compile(backend=seen, fullgraph=True)
        same(step(opt, opt), theirs)
    seen.judge(opt)


@pytest.mark.slow
def test_a_layer_compiled() -> None:
    """Regional compilation: each layer by itself, one compilation for all."""
    model, twin_of = build("llama"), build("llama")
    theirs = step(twin_of, twin_of)
    opt = optimize(model)
    with Operators() as seen:
        for layer in opt.model.layers:
            layer.compile(backend=seen, fullgraph=True)
        same(step(opt, opt), theirs)
    seen.judge(opt, breaks=len(opt.model.layers) - 1, rotary=1)


@pytest.mark.slow
def test_inside_a_compiled_function() -> None:
    model, twin_of = build("llama"), build("llama")
    inputs = make_inputs(model, 2, 9)

    def doubled(m: Any) -> Any:
        with torch.no_grad():
            return m(**inputs, use_cache=False).logits * 2

    theirs = doubled(twin_of)
    opt = optimize(model)
    with Operators() as seen:
        same(torch.compile(doubled, backend=seen)(opt), theirs)
    seen.judge(opt)


@pytest.mark.slow
def test_with_gradient_checkpointing() -> None:
    model, twin_of = build("llama"), build("llama")
    for m in (model, twin_of):
        m.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        m.train()
    theirs = step(twin_of, twin_of)
    opt = optimize(model)
    with Operators(aot=True) as seen:
        same(step(torch.compile(opt, backend=seen), opt), theirs)
    seen.judge(opt, breaks=None)


@pytest.mark.slow
def test_generate_with_a_compiled_forward() -> None:
    """The recipe of transformers' documentation: a static cache and a compiled forward."""
    model, twin_of = build("llama"), build("llama")
    inputs = make_inputs(model, 2, 5)
    options = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    theirs = twin_of.generate(**inputs, **options)
    opt = optimize(model)
    with Operators() as seen:
        opt.forward = torch.compile(opt.forward, backend=seen)
        same(opt.generate(**inputs, **options), theirs)
    seen.judge(opt, breaks=None)


def calls(m: Any, model: Any, compiled: Callable[[Any], Any]) -> dict[str, Any]:
    """A compiled call, what is changed then, and what the call gives after that."""
    inputs = make_inputs(model, 2, 9)
    call = compiled(m)

    def train_mode() -> Any:
        model.train()
        call(**inputs)
        model.eval()
        return call(**inputs).logits

    def one_mode() -> Any:
        model.train()
        call(**inputs)
        for layer in model.model.layers:
            layer.self_attn.eval()
        return call(**inputs).logits

    def no_cache() -> Any:
        first = call(**inputs)
        model.config.use_cache = False
        return first, call(**inputs)

    def hidden_states() -> Any:
        first = call(**inputs)
        model.config.output_hidden_states = True
        return first, call(**inputs), call(**inputs, output_attentions=False)

    def implementation() -> Any:
        first = call(**inputs).logits
        model.set_attn_implementation("eager")
        return first, call(**inputs).logits

    def in_between() -> Any:
        first = call(**inputs).logits
        return first, m(**inputs, use_cache=False), call(**inputs).logits

    return {f.__name__.replace("_", " "): f for f in (
        train_mode, one_mode, no_cache, hidden_states, implementation, in_between)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    ["train mode", "one mode", "no cache", "hidden states", "implementation", "in between"],
)
def test_changed_after_it_was_compiled(what: str) -> None:
    """What a graph took for granted of modes and configs is guarded in what is compiled, too."""
    model = build("llama", attention_dropout=0.5 if "mode" in what else 0.0)
    twin_of = copy.deepcopy(model)
    with torch.no_grad():
        theirs = calls(twin_of, twin_of, lambda m: m)[what]()
        opt = optimize(model)
        with Operators() as seen:
            ours = calls(opt, opt, lambda m: torch.compile(m, backend=seen))[what]()
    same(ours, theirs)
    seen.judge(opt, breaks=0 if what == "in between" else 2)


@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaDecoderLayer"])
def test_a_class_changed_after_it_was_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a named module replaced, and one whose code the graph followed."""
    model = build("llama")
    inputs = make_inputs(model, 2, 9)
    opt = optimize(model)
    call = torch.compile(opt, backend="eager")
    kind = getattr(modeling_llama, name)
    forward = kind.forward
    for patched in (forward, lambda *args, **kwargs: forward(*args, **kwargs) * 2, forward):
        monkeypatch.setattr(kind, "forward", patched)
        with torch.no_grad():
            same(call(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["function", "method"])
@pytest.mark.parametrize("path", ["model.layers.0.self_attn", "model.rotary_emb", "model.norm"])
def test_a_forward_set_after_it_was_compiled(path: str, kind: str) -> None:
    model = build("llama")
    inputs = make_inputs(model, 2, 9)
    opt = optimize(copy.deepcopy(model))
    call = torch.compile(opt, backend="eager")
    with torch.no_grad():
        before = call(**inputs).logits
        same(before, model(**inputs).logits)
        for m in (model, opt):
            module = m.get_submodule(path)
            was = module.forward

            def halved(*args: Any, was: Any = was, **kwargs: Any) -> Any:
                return tree_map_only(torch.Tensor, lambda x: x / 2, was(*args, **kwargs))

            def bound(self: Any, *args: Any, halved: Any = halved, **kwargs: Any) -> Any:
                return halved(*args, **kwargs)

            module.forward = halved if kind == "function" else MethodType(bound, module)
        assert not torch.allclose(model(**inputs).logits, before)
        same(call(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_cache_made_in_what_is_compiled(dynamic: bool | None) -> None:
    """Blocks are handed a cache that exists nowhere yet, then one that holds keys."""
    model, twin_of = build("llama"), build("llama")
    ids = make_inputs(model, 2, 9)["input_ids"]

    def program(m: Any, ids: torch.Tensor) -> Any:
        cache = DynamicCache(config=m.config)
        first = m(input_ids=ids, past_key_values=cache).logits
        return first, m(input_ids=ids[:, :3], past_key_values=cache).logits

    with torch.no_grad():
        theirs = program(twin_of, ids)
        opt = optimize(model)
        with Operators() as seen:
            compiled = torch.compile(program, backend=seen, fullgraph=True, dynamic=dynamic)
            same(compiled(opt, ids), theirs)
    seen.judge(opt, rotary=4)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor(dynamic: bool | None) -> None:
    """PyTorch's own backend, forward and backward."""
    model, twin_of = build("llama"), build("llama")
    theirs = step(twin_of, twin_of)
    opt = optimize(model)
    torch._dynamo.reset()
    same(step(torch.compile(opt, fullgraph=True, dynamic=dynamic), opt), theirs)
    torch._dynamo.reset()
    with Operators() as seen:  # what it compiled was the graph
        forward(torch.compile(opt, backend=seen, fullgraph=True), opt)
    seen.judge(opt)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_alike_layers_are_compiled_once(dynamic: bool | None) -> None:
    """Also where one between them is frozen, at which PyTorch's regions alone go wrong."""
    model, twin_of = build("llama", num_hidden_layers=5), build("llama", num_hidden_layers=5)
    for m in (model, twin_of):
        m.model.layers[2].requires_grad_(False)
    theirs = step(twin_of, twin_of)
    opt = optimize(model)
    torch._dynamo.reset()
    compiled = torch.compile(opt, fullgraph=True, dynamic=dynamic)
    ours, code = run_and_get_code(lambda: step(compiled, opt))
    same(ours, theirs)
    if CHECK == "graphs":
        calls = Counter(re.findall(r"= (partitioned_fw_subgraph\w*)\(", "".join(code)))
        assert max(calls.values()) >= 3, "one function for those that learn"
        assert len(calls) <= 3, "and others for the frozen one, and the first with its lengths"


def logits_read(m: Any, model: Any, how: str) -> Any:
    """The loss and logits of a training step, and gradients of what is made of them."""
    ids = torch.arange(3, 27).view(2, 12)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    model.zero_grad()
    out = m(input_ids=ids, labels=labels, use_cache=False)
    loss, logits = out if isinstance(out, tuple) else (out.loss, out.logits)
    read = logits.float().square().mean() if how == "read" else 0
    (loss + read).backward()
    return loss, logits, gradients(model)


@pytest.mark.parametrize("how", ["left", "read"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_logits_are_left_out_of_what_inductor_compiles(name: str, how: str) -> None:
    """They come lazy, and with their gradient, from a graph in which nothing is as wide as the
    vocabulary but the head."""
    model, twin_of = build(name).train(), build(name).train()
    theirs = logits_read(twin_of, twin_of, how)
    opt = optimize(model)
    torch._dynamo.reset()
    compiled = torch.compile(opt, fullgraph=True)
    ours, code = run_and_get_code(lambda: logits_read(compiled, opt, how))
    assert type(ours[1]) is LazyLogits
    same(ours, theirs)
    assert "linear_cross_entropy" in code[0] and "log_softmax" not in code[0]


@pytest.mark.parametrize("what", ["read", "returned and read", "twice", "tuple", "not given"])
def test_logits_of_a_compiled_function(what: str) -> None:
    """They are computed in it where it reads them, and left out elsewhere."""
    model, twin_of = build("llama").train(), build("llama").train()
    ids = torch.arange(3, 27).view(2, 12)

    def program(m: Any) -> tuple[torch.Tensor, ...]:
        out = m(input_ids=ids, labels=ids, use_cache=False, return_dict=what != "tuple")
        if what == "tuple":
            return tuple(out)
        if what == "not given":
            return (out.loss,)
        if what == "twice":
            return out.loss, out.logits, out.logits
        read = out.loss + out.logits.square().mean()
        return (read,) if what == "read" else (read, out.logits)

    def program_and_gradients(program: Any, m: Any) -> Any:
        m.zero_grad()
        results = program(m)
        sum(x.mean() for x in results).backward()
        return results, gradients(m)

    theirs = program_and_gradients(program, twin_of)
    opt = optimize(model)
    torch._dynamo.reset()
    ours = program_and_gradients(torch.compile(program, fullgraph=True), opt)
    lazy = [type(x) is LazyLogits for x in ours[0]]
    assert lazy == [what in ("twice", "tuple") and place > 0 for place in range(len(lazy))]
    same(ours, theirs)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("both", [False, True], ids=["the loss", "model and loss"])
def test_a_compiled_loss_of_lazy_logits(both: bool, backend: str) -> None:
    """What is compiled by itself is given their values, and hands their gradient back."""
    model, twin_of = build("llama").train(), build("llama").train()
    ids = torch.arange(3, 27).view(2, 12)

    def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows, wanted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(rows, wanted, label_smoothing=0.1)

    def program(m: Any, model: Any, loss: Any) -> Any:
        out = m(input_ids=ids, labels=ids, use_cache=False)
        again = loss(out.logits, ids)
        (out.loss + again).backward()
        return type(out.logits), (again, gradients(model))

    theirs = program(twin_of, twin_of, smoothed)
    opt = optimize(model)
    torch._dynamo.reset()
    m = torch.compile(opt) if both else opt
    ours = program(m, opt, torch.compile(smoothed, backend=backend, fullgraph=True))
    assert ours[0] is LazyLogits
    same(ours[1], theirs[1])


class Draws(modeling_llama.LlamaModel):
    """A model that no graph can serve."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        random.random()
        return super().forward(*args, **kwargs)


def test_a_model_without_a_graph_is_compiled_as_it_is() -> None:
    model, twin_of = build("llama"), build("llama")
    for m in (model, twin_of):
        m.model.__class__ = Draws
    with pytest.warns(FallbackWarning, match="random numbers"):
        opt = liger_fx.optimize(model)
    torch._dynamo.reset()
    ids = torch.arange(12)[None]
    compiled = torch.compile(opt, backend="aot_eager")
    same(compiled(ids, use_cache=False).logits, twin_of(ids, use_cache=False).logits)


@pytest.mark.parametrize("what", ["bias", "weight", "hidden states"])
def test_logits_before_what_is_written_after_them(what: str) -> None:
    """They are those of the call; where their gradient would be another's, PyTorch says so."""
    model, twin_of = tiny("phi").train(), tiny("phi").train()
    ids = torch.arange(3, 27).view(2, 12)

    def program(m: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = m(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True)
        with torch.no_grad():
            {
                "bias": m.lm_head.bias,
                "weight": m.lm_head.weight,
                "hidden states": out.hidden_states[-1],
            }[what].mul_(0.5)
        return out.loss, out.logits

    opt = optimize(model)
    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True)
    if what == "bias":
        same(compiled(opt), program(twin_of))
    else:
        with pytest.raises(Exception, match="modified by an inplace operation"):
            compiled(opt)


@pytest.mark.parametrize("asked", [{}, {"triton.autotune_pointwise": True}])
def test_options_for_inductor_are_kept(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And come back, for what is compiled next."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def compile_nothing(inductor: Any, graph: fx.GraphModule, inputs: Any) -> Any:
        seen.append((inductor, inductor.config))
        return graph

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", compile_nothing)
    opt = optimize(build("llama"))
    torch._dynamo.reset()
    compiled = torch.compile(opt, fullgraph=True, options={"epilogue_fusion": False, **asked})
    compiled(torch.arange(12)[None], use_cache=False)
    ((inductor, config),) = seen
    assert config["epilogue_fusion"] is False
    assert config["triton.autotune_pointwise"] is bool(asked)
    assert inductor.config.items() == {"epilogue_fusion": False, **asked}.items()


def test_other_compilers_compute_logits() -> None:
    opt = optimize(build("llama").train())
    ids = torch.arange(12)[None]
    torch._dynamo.reset()
    compiled = torch.compile(opt, backend="aot_eager", fullgraph=True)
    assert type(compiled(input_ids=ids, labels=ids, use_cache=False).logits) is torch.Tensor


@pytest.mark.parametrize(
    "name, what, masked",
    [
        ("llama", "plain", False),
        ("llama", "padded", True),
        ("llama", "packed", True),
        ("mistral", "plain", True),  # its window is shorter
        ("mistral", "short", False),
    ],
)
def test_no_mask_where_attention_masks_by_itself(name: str, what: str, masked: bool) -> None:
    """Its flag is enough there; torch.compile of the original makes a mask at every call."""
    model = build(name)
    ids = torch.arange(3, 27).view(2, 12)[:, : 5 if what == "short" else 12]
    more = {
        "padded": {"attention_mask": (ids > 4).long()},
        "packed": {"position_ids": torch.arange(6).repeat(2)[None]},
    }.get(what, {})
    expected = model(input_ids=ids, use_cache=False, **more)
    opt = optimize(model)
    torch._dynamo.reset()
    call = functools.partial(
        torch.compile(opt, fullgraph=True), input_ids=ids, use_cache=False, **more
    )
    out, code = run_and_get_code(call)
    same(out.logits, expected.logits)
    calls = re.findall(r"= torch.ops.aten._scaled_dot_product.*", "".join(code))
    assert calls and [("attn_mask" in call) for call in calls] == [masked] * len(calls)


def test_what_pytorch_asks_of_regions_comes_back() -> None:
    """Also after one compile inside another."""
    with region_schemas_kept(), region_schemas_kept():
        pass
    assert "gen_schema" not in vars(invoke_subgraph)


def test_floats_are_no_numbers_that_may_change() -> None:
    """With dynamic=True Dynamo would begin anew for each few of them; outside of blocks they stay
    what the program's author wants."""
    opt = optimize(build("llama"))
    ids = torch.arange(6)[None]

    def program(ids: torch.Tensor, factor: float) -> torch.Tensor:
        return opt(input_ids=ids, use_cache=False).logits * factor

    torch._dynamo.reset()
    seen = CompileCounter()
    compiled = torch.compile(program, backend=seen, fullgraph=True, dynamic=True)
    for factor in (0.5, 0.25):
        torch.testing.assert_close(compiled(ids, factor), program(ids, factor))
    (metrics,) = torch._dynamo.utils.get_compilation_metrics()[-seen.frame_count :]
    assert seen.frame_count == 1 and not metrics.restart_reasons
    assert torch._dynamo.config.specialize_float is False


def test_dynamos_settings_come_back_after_an_error() -> None:
    def note(context: Any) -> None:
        settings.append(torch._dynamo.config.specialize_float)
        raise ValueError("in the midst of a block")

    def program(x: torch.Tensor) -> torch.Tensor:
        comptime(take_floats_for_constants)
        comptime(note)
        return x

    settings: list[bool] = []
    with pytest.raises(Exception, match="in the midst of a block"):
        torch.compile(program, backend="eager", fullgraph=True)(torch.ones(2))
    assert settings and all(settings)
    assert torch._dynamo.config.specialize_float is False


@pytest.mark.parametrize("drops", [False, True], ids=["drops nothing", "drops"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_draws_random_numbers_is_no_region(name: str, drops: bool) -> None:
    """Neither where attention drops weights nor with dropout modules, whose mode may change."""
    model = tiny(name)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1 * drops
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1 * drops
    opt = optimize(model.train())
    opt(**tiny_inputs(model), use_cache=False)
    layer = (opt.model.layers if name == "llama" else opt.transformer.h)[0]
    plan = layer._block.last.plan
    assert can_be_region(plan, layer) is not drops


class Logits(torch.nn.Module):
    """A model whose answer torch.export can take: one tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "wrapped"])
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_export(name: str, strict: bool, wrapped: bool) -> None:
    """torch.export.export of the optimised model itself, at any batch and length."""
    model, twin_of = build(name), build(name)
    opt = optimize(model)
    inputs = make_inputs(model, 2, 9)
    other = make_inputs(model, 3, 14)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes: Any = {"input_ids": free, "attention_mask": free}

    def exported(m: Any) -> Any:
        given = dict(inputs) if wrapped else inputs | {"use_cache": False}
        dims = shapes if wrapped else shapes | {"use_cache": None}
        if not wrapped:
            dims = {"input_ids": free, "attention_mask": free, "use_cache": None}
        subject = Logits(m) if wrapped else m
        with torch.no_grad():
            program = torch.export.export(
                subject,
                (),
                {k: given[k] for k in dims},
                dynamic_shapes=dims if wrapped else _as_keywords(dims),
                strict=strict,
            )
            again = program.module()(**(other if wrapped else other | {"use_cache": False}))
        return program, again if wrapped else again.logits

    with torch.no_grad():
        theirs = twin_of(**other).logits
    program, ours = exported(opt)
    same(ours, theirs)
    if CHECK == "graphs":
        names = Counter(n for node in program.graph.nodes if (n := operator_name(node)))
        rotary = rotary_sites(opt)
        found = sum(count for name, count in names.items() if "rope" in name)
        if found < rotary or rotary == 0:
            raise NoGraph(f"{found} rotary operators of {rotary} in the program: {names}")


def _as_keywords(dims: dict[str, Any]) -> dict[str, Any]:
    return dims


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart", "gpt2"])
def test_compile_without_rotary(name: str) -> None:
    model, twin_of = tiny(name), tiny(name)
    inputs = tiny_inputs(model)

    def program(m: Any) -> Any:
        with torch.no_grad():
            return m(**inputs, use_cache=False).logits

    theirs = program(twin_of)
    opt = optimize(model)
    with Operators() as seen, graph_runs(opt):
        same(program(torch.compile(opt, backend=seen, fullgraph=True)), theirs)
    assert len(seen.graphs) == 1


def test_functional_call() -> None:
    """Other weights in the same model, without touching it."""
    model = build("llama")
    other = {k: v.detach() * 1.5 for k, v in model.named_parameters()}
    inputs = make_inputs(model, 2, 9)

    def program(m: Any) -> Any:
        before = copy.deepcopy(m.state_dict())
        out = torch.func.functional_call(m, other, (), inputs).logits
        same(dict(m.state_dict()), dict(before))
        return out, m(**inputs).logits

    compare(model, program, calls=2)


class TwoNorms(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LlamaRMSNorm(16), LlamaRMSNorm(16)

    def forward(self, x: torch.Tensor, second: bool = False) -> torch.Tensor:
        return (self.second if second else self.first)(x)


def test_functional_call_leaves_no_weights_behind() -> None:
    """Where a call with other weights is the first of its kind, no named module keeps them."""
    model = TwoNorms()
    x = torch.randn(2, 3, 16)
    opt = optimize(model, {"x": x})
    other = {name: p.detach() * 2 for name, p in model.named_parameters()}
    with torch.no_grad():
        once = torch.func.functional_call(opt, other, (x,), {"second": True})
        same(once, model(x, True) * 2)
        same(opt(x, second=True), model(x, True))
    assert dict(opt.named_parameters())["second.weight"] is model.second.weight
    if CHECK == "graphs":
        assert type(opt.second).__name__ == "LigerRMSNorm"


@pytest.mark.slow
def test_functional_grad() -> None:
    model = build("llama")
    inputs = make_inputs(model, 2, 9, labels=True)

    def program(m: Any) -> Any:
        parameters = {k: v.detach() for k, v in m.named_parameters()}

        def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(m, values, (), inputs | {"use_cache": False}).loss

        return torch.func.grad(loss)(parameters)

    compare(model, program)


@pytest.mark.parametrize("what", ["vmap over texts", "gradients of each text", "jvp"])
def test_transforms(what: str) -> None:
    model = build("llama", attention="eager")
    ids = make_inputs(model, 3, 9)["input_ids"]
    mask = torch.ones(9, 9).tril().log()[None, None]  # made by hand: mask builders read data

    def program(m: Any) -> Any:
        parameters = {k: v.detach() for k, v in m.named_parameters()}

        def loss(values: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
            given = {"input_ids": row[None], "attention_mask": mask, "use_cache": False}
            logits = torch.func.functional_call(m, values, (), given).logits
            return logits.square().mean()

        if what == "vmap over texts":
            return torch.func.vmap(loss, in_dims=(None, 0))(parameters, ids)
        if what == "gradients of each text":
            return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
        tangents = {k: torch.ones_like(v) for k, v in parameters.items()}
        return torch.func.jvp(lambda p: loss(p, ids[0]), (parameters,), (tangents,))

    theirs = run(program, copy.deepcopy(model))
    opt = optimize(model)
    with graph_runs(opt):
        same(run(program, opt), theirs)
