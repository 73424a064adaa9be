"""liger-fx explain: what it prints of a site that matched, that did not, that is none."""

from __future__ import annotations

import re

import pytest

from liger_fx import cli

Captured = pytest.CaptureFixture[str]


def explained(capsys: Captured, *arguments: str) -> str:
    assert cli.main(["explain", *arguments, "--layers", "1"]) == 0
    return capsys.readouterr().out


def test_a_site_that_matched(capsys: Captured) -> None:
    out = explained(capsys, "llama", "--site", "model.layers.0.mlp")
    assert out.startswith("model.layers.0.mlp: LlamaMLP\n")
    assert "gated_mlp: rewritten, model.layers.0.mlp is a LigerSwiGLUMLP" in out
    assert re.search(r"ok  silu\(linear\(x\)\) +silu\(gate_proj, False\) +activations.py:\d+", out)
    assert "all of the pattern fits" in out and "NO" not in out
    assert "rms_norm: no rsqrt(anything)" in out


def test_a_site_that_did_not_match_down_to_the_node(capsys: Captured) -> None:
    out = explained(capsys, "gpt2", "--site", "transformer.h.0.mlp")
    assert "gated_mlp: refused: no gated_mlp or plain_mlp was found in it" in out
    assert re.search(r"NO  linear\(any activation\) +dropout\(\w+\) +modeling_gpt2.py:\d+", out)


def test_a_site_whose_pattern_fits_and_that_a_check_refuses(capsys: Captured) -> None:
    out = explained(capsys, "llama4_text", "--site", "model.layers.0.self_attn")
    assert "rotary_embedding: refused: it turns complex numbers" in out
    assert "all of the pattern fits" in out
    assert "Sites further inside" in out and "self_attn.qk_norm (rms_norm): LigerRMSNorm" in out


def test_one_rule_alone(capsys: Captured) -> None:
    out = explained(capsys, "gpt2", "--site", "transformer.h.0.ln_1", "--rules", "rms_norm")
    assert "rms_norm: not found here" in out and "gated_mlp" not in out
    assert re.search(r"NO  .*\n.* ln_1\(|NO  .* ln_1\(", out)


def test_a_container_that_the_graph_does_not_call(capsys: Captured) -> None:
    out = explained(capsys, "llama", "--site", "model.layers")
    assert "model.layers: ModuleList\nThe graph does not call it." in out
    assert "model.layers.0.mlp (gated_mlp): LigerSwiGLUMLP" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--site", "model.layers.0.mpl"], "Did you mean model.layers.0.mlp"),
        (["--site", "nowhere"], "'nowhere' is no module of this LlamaForCausalLM."),
        (["--site", "model", "--rules", "norm"], "'norm' is no rule; there are adapted_linear, "),
    ],
)
def test_what_cannot_be_explained(arguments: list[str], said: str, capsys: Captured) -> None:
    assert cli.main(["explain", "llama", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err
