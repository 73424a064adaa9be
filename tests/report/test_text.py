"""The report's facts and its plain text, on a small model whose diff can be written out by hand."""

import dataclasses

import pytest
import torch
from tabulate import tabulate
from torch import fx, nn

import liger_fx
from liger_fx.engine.counts import count_operators
from liger_fx.engine.site import Site
from liger_fx.model.account import tree_rows
from liger_fx.report import GraphDiff, Side
from liger_fx.report.fitting import fitted
from liger_fx.tiny import tiny_model


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class FusedNorm(nn.Module):
    """Stands for a named module: a leaf of the graph after."""

    def extra_repr(self) -> str:
        return "(4,), eps=1e-06"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear | FusedNorm)


def side(model: nn.Module) -> Side:
    return counted(model, Tracer().trace(model))


def counted(model: nn.Module, graph: fx.Graph) -> Side:
    return Side(type(model).__name__, count_operators(graph, model), tree_rows(model))


def done(layer: int) -> Site:
    before = (f"pow(x_{layer}, 2)", "mean", "add(mean, 1e-06)", "rsqrt", "mul", "mul")
    path = f"layers.{layer}.norm"
    source = ("/somewhere/model.py", 13)
    return Site("rms_norm", path, source, "Norm", before, f"call_module {path}", "FusedNorm", None)


def left(layer: int) -> Site:
    reason = f"layers.{layer}.norm.weight is read by add_{layer} as well"
    site = dataclasses.replace(done(layer), after=None, after_class=None, reason=reason)
    return dataclasses.replace(site, path=f"layers.{layer}.norm")


@pytest.fixture
def diff() -> GraphDiff:
    before, model = side(Model(4)), Model(4)
    for layer in model.layers[:3]:
        layer.norm = FusedNorm()
    sites = (done(0), done(1), done(2), left(3))
    return GraphDiff(
        before,
        side(model),
        sites,
        rules=("rms_norm", "rotary"),
        guards=("x is float32",),
        opaque=("layers.9.scan: Scan stays a module that is called, it branches on data",),
        versions={"torch": "2.13.0"},
    )


EXPECTED = """\
Model: 3 sites rewritten, 1 refused, 32 -> 17 operators

Rules
rule        found    rewritten    refused
--------  -------  -----------  ---------
rms_norm        4            3          1
rotary          0            0          0

Refused
rule      where            sites  why                                            model code
--------  -------------  -------  ---------------------------------------------  ------------
rms_norm  layers.3.norm        1  layers.3.norm.weight is read by add_3 as well  model.py:13

Sites
where              sites  in    nodes before                                          node after
---------------  -------  ----  ----------------------------------------------------  ------------
layers.0-2.norm        3  Norm  pow(x_0, 2); mean; add(mean, 1e-06); rsqrt; mul; mul  FusedNorm

Opaque modules
layers.9.scan: Scan stays a module that is called, it branches on data

Modules
module         before      after
-------------  ----------  --------------------------
model          Model       =
  layers       ModuleList  =
    0-2 (3 x)  Layer       =
      norm     Norm        FusedNorm((4,), eps=1e-06)
      linear   Linear      =
    3          Layer       =
      norm     Norm        =
      linear   Linear      =

Operators
operator                   before    after  change
-----------------------  --------  -------  --------
add                             8        5  -3
mul                             8        2  -6
mean                            4        1  -3
pow                             4        1  -3
rsqrt                           4        1  -3
FusedNorm                       0        3  +3
1 other kind, unchanged         4        4  =

The graph holds while
x is float32

Versions
torch 2.13.0"""


def test_the_whole_text(diff: GraphDiff) -> None:
    assert str(diff) == EXPECTED


def test_full_unfolds_every_layer(diff: GraphDiff) -> None:
    text = diff.text(full=True)
    for layer in range(3):
        assert f"layers.{layer}.norm " in text
    assert text.count("FusedNorm((4,), eps=1e-06)") == 3
    assert text.count("Linear(in_features=4, out_features=4, bias=False)  =") == 4


def test_alike_reasons_of_different_layers_fold_into_one_line(diff: GraphDiff) -> None:
    refused = dataclasses.replace(diff, sites=tuple(left(layer) for layer in (0, 1, 3, 7)))
    text = str(refused)
    assert "layers.0-1,3,7.norm" in text
    assert text.count("is read by") == 1


def test_reasons_that_differ_do_not_fold(diff: GraphDiff) -> None:
    other = dataclasses.replace(left(1), reason="eps is no number")
    text = str(dataclasses.replace(diff, sites=(left(0), other)))
    assert "eps is no number" in text and "is read by" in text


def test_a_different_eps_is_another_kind_of_site(diff: GraphDiff) -> None:
    before = tuple(text.replace("1e-06", "1e-05") for text in done(1).before)
    sites = (done(0), dataclasses.replace(done(1), before=before))
    text = str(dataclasses.replace(diff, sites=sites))
    assert "add(mean, 1e-06)" in text and "add(mean, 1e-05)" in text


def test_a_method_a_function_and_an_operator_of_one_name_are_counted_together() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, 2) * x.mul(3)

    graph = fx.symbolic_trace(forward)
    assert counted(graph, graph.graph).operators == {"mul": 3}


def test_counts_before_are_kept_when_the_graph_changes_later() -> None:
    model = Model(1)
    graph = Tracer().trace(model)
    before = counted(model, graph)
    add = next(node for node in graph.nodes if node.name.startswith("add"))
    with graph.inserting_after(add):
        graph.call_function(torch.neg, (add,))
    assert before.operators != counted(model, graph).operators
    assert "neg" not in before.operators


def test_nothing_changed_says_so() -> None:
    same = side(Model(2))
    text = str(GraphDiff(same, same, versions={}))
    assert "0 sites rewritten, 0 refused, 16 -> 16 operators" in text
    assert "the same 16 operators in both" in text


NARROW = """\
where                  sites  nodes
-------------------  -------  ----------------
model.layers.0-1           9  pow, mean, mul,
  .input_layernorm,           add(mean, 1e-06)
  .post_layernorm,
model.norm"""


def test_a_table_is_broken_where_paths_and_arguments_end() -> None:
    where = "model.layers.0-1.input_layernorm, model.layers.0-1.post_layernorm, model.norm"
    headers, row = ("where", "sites", "nodes"), (where, 9, "pow, mean, mul, add(mean, 1e-06)")
    (cells,) = fitted(headers, [[str(cell) for cell in row]], 48)
    assert tabulate([cells], headers, colalign=("left", "right", "left")) == NARROW


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "deepseek_v3"])
def test_a_hundred_columns_are_enough(model_type: str) -> None:
    report = liger_fx.optimize(tiny_model(model_type, 2)).report
    assert report is not None
    whole, _, rest = report.text().partition("\n\nOperators\n")
    assert max(map(len, whole.splitlines())) <= 100
    assert rest.endswith(whole.partition("\n\n")[0]), "the main facts are on the last screen"


def test_colours_say_what_stands_there_now_and_what_is_wrong(diff: GraphDiff) -> None:
    text = diff.text(color=True)
    assert text.startswith("\x1b[1;33mModel: 3 sites rewritten, 1 refused")
    assert "\x1b[32mFusedNorm\x1b[0m" in text and "\x1b[2m=\x1b[0m" in text
    assert "\x1b[33mlayers.3.norm.weight is read by add_3 as well\x1b[0m" in text
