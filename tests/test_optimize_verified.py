"""optimize(verify=True) leaves alone what it finds at fault; verify in another dtype."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch

import liger_fx
from liger_fx.errors import MissedSiteError, UsageError, VerificationError, VerificationWarning
from liger_fx.modules import LigerRMSNorm, LigerRotaryEmbedding
from liger_fx.tiny import tiny_model


def test_a_right_model_is_rewritten_whole() -> None:
    model = tiny_model("llama", layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VerificationWarning)
        opt = liger_fx.optimize(model, verify=True)
    assert not opt.report.refused and len(opt.report.rewritten) == 10


def test_faulty_sites_are_dropped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LigerRotaryEmbedding.forward

    def wrong_sign(self, q, k, cos, sin):  # type: ignore[no-untyped-def]
        return right(self, q, k, cos, -sin)

    monkeypatch.setattr(LigerRotaryEmbedding, "forward", wrong_sign)
    model = tiny_model("llama", layers=2)
    with pytest.warns(VerificationWarning, match="rotary_embedding"):
        opt = liger_fx.optimize(model, verify=True)
    refused = {site.path: site for site in opt.report.refused}
    assert set(refused) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert all("verify dropped it" in str(site.reason) for site in refused.values())
    assert len(opt.report.rewritten) == 8
    assert not any(isinstance(m, LigerRotaryEmbedding) for m in opt.modules())
    ids = torch.randint(0, 64, (2, 7))
    torch.testing.assert_close(opt(ids).logits, model(ids).logits)


def test_a_fault_of_no_site_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_fx.verification import verdict
    from liger_fx.verification.graph import GraphCheck

    found = GraphCheck(faults=["the graph lost a node"])
    monkeypatch.setattr(verdict, "check_graph", lambda *_: found)
    with pytest.raises(VerificationError, match="lost a node"):
        liger_fx.optimize(tiny_model("llama", layers=2), verify=True)


def test_a_fault_that_shows_in_train_mode_alone_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = LigerRMSNorm.forward

    def wrong_in_training(self, x, weight=None):  # type: ignore[no-untyped-def]
        return right(self, x, weight) * (1.01 if self.training else 1)

    monkeypatch.setattr(LigerRMSNorm, "forward", wrong_in_training)
    with pytest.warns(VerificationWarning, match="rms_norm"):
        opt = liger_fx.optimize(tiny_model("llama", layers=2).train(), verify=True)
    assert {site.rule for site in opt.report.refused} == {"rms_norm"}
    left = {"add_rms_norm": 2, "rotary_embedding": 2, "gated_mlp": 2, "linear_cross_entropy": 1}
    assert Counter(site.rule for site in opt.report.rewritten) == left


def test_verify_in_another_dtype_leaves_the_models_alone() -> None:
    model = tiny_model("llama", layers=2)
    opt = liger_fx.optimize(model)
    found = liger_fx.verify(model, opt, dtype=torch.bfloat16)
    assert found.ok and found.dtype == "bfloat16"
    assert {p.dtype for p in (*model.parameters(), *opt.parameters())} == {torch.float32}
    opt.model.norm.eps = 1e-2
    found = liger_fx.verify(model, opt, dtype=torch.bfloat16)
    assert [check.path for check in found.sites if check.fault] == ["model.norm"]


def test_one_rule_at_one_place_can_be_left_alone() -> None:
    opt = liger_fx.optimize(
        tiny_model("llama", layers=2), exclude=["rms_norm@model.layers.0", "gated_mlp@*"]
    )
    kinds = {path: type(m).__name__ for path, m in opt.named_modules()}
    assert kinds["model.layers.0.input_layernorm"] == "LlamaRMSNorm"
    assert isinstance(opt.model.layers[1].input_layernorm, LigerRMSNorm)
    assert kinds["model.layers.1.mlp"] == "LlamaMLP"
    assert kinds["model.layers.0.self_attn.rotary_embedding"] == "LigerRotaryEmbedding"
    with pytest.raises(UsageError, match="rms_norm@nowhere"):
        liger_fx.optimize(tiny_model("llama"), exclude=["rms_norm@nowhere"])


def test_strict_does_not_count_what_was_left_alone_on_purpose() -> None:
    opt = liger_fx.optimize(tiny_model("llama"), exclude=["gated_mlp"], strict=True)
    assert {site.rule for site in opt.report.refused} == {"gated_mlp"}
    with pytest.raises(MissedSiteError, match="the two linear layers sit in different modules"):
        liger_fx.optimize(tiny_model("bert"), exclude=["add_layer_norm"], strict=True)
