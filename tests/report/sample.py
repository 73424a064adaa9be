"""A report written by hand in which every field says something: what the faces are tested on."""

from dataclasses import replace

from liger_fx.engine.drawing import Box, Bytes, Cost, Drawing
from liger_fx.engine.site import Site
from liger_fx.report import GraphDiff, Side, TreeRow
from liger_fx.report.blocks import BlockRow, FallbackRow
from liger_fx.report.changes import SiteChange
from liger_fx.report.verified import Measured, Verified, VerifiedSite

X = Box("input", "hidden", "", "bfloat16", ("batch", "sequence", 8), (), False)
DRAWING = Drawing(
    before=(
        X,
        Box("operator", "pow", "2", "bfloat16", ("batch", "sequence", 8), (0,), False),
        Box(
            "operator", "mean", "-1, keepdim=True", "float32", ("batch", "sequence", 1), (1,), False
        ),
        Box("parameter", "scale", "", "float16", (8,), (), False),
        Box("operator", "mul", "", "bfloat16", ("batch", "sequence", 8), (2, 3), True),
    ),
    after=(
        X,
        Box(
            "module",
            "FusedNorm",
            "(8,), eps=1e-06",
            "bfloat16",
            ("batch", "sequence", 8),
            (0,),
            True,
        ),
    ),
    cost_before=Cost(Bytes(20480, 48), Bytes(3333, 0)),
    cost_after=Cost(Bytes(4321, 16), Bytes(1234, 0)),
)
REFUSED = replace(DRAWING, after=(), cost_after=None)


def tree(layers: int, norm: str, detail: str) -> tuple[TreeRow, ...]:
    rows = [TreeRow("", "TinyForCausalLM", ""), TreeRow("layers", "ModuleList", "")]
    for i in range(layers):
        rows.append(TreeRow(f"layers.{i}", "TinyLayer", ""))
        rows.append(TreeRow(f"layers.{i}.norm", "TinyNorm" if i == 3 else norm, detail))
    return tuple(rows)


def site(layer: int) -> Site:
    path = f"layers.{layer}.norm"
    before = (f"pow(hidden_{layer}, 2)", "mean(pow, -1)", "mul(mean, scale)")
    rewritten = Site(
        "rms_norm", path, ("/models/tiny/modeling_tiny.py", 41), "TinyNorm", before,
        f"call_module {path}", "FusedNorm", None, DRAWING,
    )  # fmt: skip
    if layer != 3:
        return rewritten
    reason = "wanted mean(square(x)), found sum(pow) at modeling_tiny.py:43"
    return replace(rewritten, after=None, after_class=None, reason=reason, drawing=REFUSED)


def measured(name: str, ratio: float | None, bound: float) -> Measured:
    return Measured(name, 2.5e-07, None if ratio is None else ratio * 2.5e-07, ratio, bound, True)


CODE = """


def forward(self, hidden_states):
    norm = self.norm(hidden_states);  hidden_states = None
    return norm
    """
IDS = "input_ids int64[batch, sequence] on cpu"
HIDDEN = "hidden_states bfloat16[batch, sequence, 8] on cpu, scales (float16[8] on cpu, 1)"
MASKED = f"{HIDDEN}, mask bool[batch, sequence] on cpu, cache a TinyCache, window 16"
BECAUSE = "scan branches on data in layers_2 at modeling_tiny.py:71"


def blocks(layers: int) -> tuple[BlockRow, ...]:
    code = CODE.replace("self.norm", "self.layers")
    root = BlockRow("TinyForCausalLM", ("",), (f"{IDS}, use_cache False",), code)
    paths = tuple(f"layers.{i}" for i in range(layers))
    return root, BlockRow("TinyLayer", paths, (HIDDEN, MASKED), CODE)


def sample(layers: int = 5) -> GraphDiff:
    """``layers`` norms, the fourth of them refused."""
    return GraphDiff(
        before=Side(
            "TinyForCausalLM", {"mul": 17, "pow": 5, "Linear": 7}, tree(layers, "TinyNorm", "")
        ),
        after=Side(
            "TinyForCausalLM",
            {"mul": 13, "pow": 1, "Linear": 7, "FusedNorm": 4},
            tree(layers, "FusedNorm", "eps=1e-06"),
        ),
        sites=tuple(map(site, range(layers))),
        rules=("rms_norm", "rotary_embedding"),
        inputs={"input_ids": "int64[batch, sequence] on cpu", "use_cache": "False"},
        guards=("input_ids is int64[batch, sequence] on cpu", "the model is in eval mode"),
        opaque=("layers.9.scan: Scan stays a module that is called, it branches on data",),
        versions={"liger_fx": "0.1.0", "torch": "2.13.0"},
        verified=Verified(
            True, "bfloat16", "cpu", "input_ids 2 x 7", (),
            (measured("outputs", 0.97, 1.1), measured("all gradients", 1.01, 1.1)),
            measured("layers.2.norm.scale", 1.23, 1.5),
            (
                VerifiedSite("layers.0.norm", "rms_norm", None, measured("out", 0.91, 1.5), None),
            ),
            ("the graph for position_ids was not run",),
        ),
        blocks=blocks(layers),
        fallbacks=(
            FallbackRow("layers.1", "TinyLayer", "hidden_states, packed", BECAUSE),
            FallbackRow("layers.2", "TinyLayer", "hidden_states, packed", BECAUSE),
        ),
    )  # fmt: skip


def everything() -> GraphDiff:
    """``sample()`` after an upgrade that lost one site and found another, with a fault in it."""
    diff = sample()
    assert diff.verified is not None
    fault = "gradient of scale: 7.50 times the original's error, at most 1.5"
    wrong = VerifiedSite("layers.4.norm", "rms_norm", fault, None, measured("out", 7.5, 1.5))
    reason = diff.refused[0].reason
    return replace(
        diff,
        changes=(
            SiteChange("rms_norm", "layers.3.norm", "FusedNorm", None, reason, True),
            SiteChange("gated_mlp", "layers.2.mlp", "FusedMLP", None, None, True),
            SiteChange("rms_norm", "layers.4.norm", None, "FusedNorm", None, False),
        ),
        versions_before={"liger_fx": "0.0.9", "torch": "2.11.0"},
        verified=replace(
            diff.verified, ok=False, faults=(f"layers.4.norm: {fault}",),
            sites=(*diff.verified.sites, wrong),
        ),
    )  # fmt: skip


FACTS = """
TinyForCausalLM; 4 sites rewritten, 1 refused, 29 -> 25 operators
input_ids; int64[batch, sequence] on cpu; use_cache; the model is in eval mode
layers.9.scan: Scan stays a module that is called, it branches on data
rms_norm; rotary_embedding; layers.2.norm; layers.3.norm; modeling_tiny.py:41
wanted mean(square(x)), found sum(pow) at modeling_tiny.py:43
TinyNorm; FusedNorm; TinyLayer; ModuleList; Linear; eps=1e-06; pow; mean; mul
bfloat16[batch, sequence, 8]; float32[batch, sequence, 1]; float16[8]; hidden; scale; keepdim=True
20.0 KiB -> 4,321 B; 3,333 B -> 1,234 B; 48 B -> 16 B a call
at least as accurate as the original, in bfloat16 on cpu; 2.50e-07; 0.97; 1.01; 1.23; 0.91
TinyLayer; layers.0-4; hidden_states, packed
scan branches on data in layers_2 at modeling_tiny.py:71
3 distinct graphs for 6 blocks; 2 calls fell back to the model's own code
cache a TinyCache, window 16; norm = self.norm(hidden_states)
layers.2.norm.scale; torch 2.13.0; liger_fx 0.1.0
"""


def facts() -> list[str]:
    """Texts that every face for people must show of ``sample()``, unfolded."""
    return [fact for line in FACTS.strip().splitlines() for fact in line.split("; ")]
