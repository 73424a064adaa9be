"""liger-fx diff between models, optimised ones, saved graphs and reports; --fail-on-lost in CI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import liger_fx
from liger_fx import cli
from liger_fx.tiny import tiny_model

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of a Llama rewritten in whole.json and in part.json, and saved graphs of it."""
    folder = tmp_path_factory.mktemp("reports")
    model = tiny_model("llama", layers=2)
    opt = liger_fx.optimize(model)
    liger_fx.save(opt, folder / "graph")
    model.save_pretrained(folder / "model")
    opt.report.save(folder / "whole.json")
    part = liger_fx.optimize(model, exclude=["gated_mlp", "model.norm"])
    part.report.save(folder / "part.json")
    liger_fx.save(liger_fx.trace(model), folder / "plain")
    return folder


def diff(*arguments: object) -> int:
    return cli.main(["diff", *map(str, arguments)])


def test_a_lost_site_fails_and_is_named(folder: Path, capsys: Captured) -> None:
    assert diff(folder / "whole.json", folder / "part.json", "--fail-on-lost") == 1
    out, err = capsys.readouterr()
    assert "3 places are no longer rewritten as before" in out and "No longer rewritten" in out
    for path in ("model.layers.0.mlp", "model.layers.1.mlp"):
        assert f"lost: {path} (gated_mlp, LigerSwiGLUMLP): excluded by 'gated_mlp'" in err
    assert "lost: model.norm (rms_norm, LigerRMSNorm): excluded by 'model.norm'" in err


def test_without_the_flag_it_only_tells(folder: Path, capsys: Captured) -> None:
    assert diff(folder / "whole.json", folder / "part.json") == 0
    out, err = capsys.readouterr()
    assert "No longer rewritten" in out and err == ""


def test_what_is_gained_or_the_same_does_not_fail(folder: Path, capsys: Captured) -> None:
    assert diff(folder / "part.json", folder / "whole.json", "--fail-on-lost") == 0
    assert "Newly or otherwise rewritten" in capsys.readouterr().out
    assert diff(folder / "whole.json", folder / "whole.json", "--fail-on-lost") == 0
    out = capsys.readouterr().out
    assert "0 places are no longer rewritten as before, 0 changed otherwise" in out
    assert "No longer rewritten" not in out


def test_a_site_that_vanished_is_lost_too(folder: Path, tmp_path: Path, capsys: Captured) -> None:
    report = json.loads((folder / "whole.json").read_text())
    report["sites"] = [site for site in report["sites"] if site["path"] != "model.norm"]
    (tmp_path / "new.json").write_text(json.dumps(report))
    assert diff(folder / "whole.json", tmp_path / "new.json", "--fail-on-lost") == 1
    said = "lost: model.norm (rms_norm, LigerRMSNorm): nothing like it is there any more"
    assert said in capsys.readouterr().err


def test_models_and_optimised_models(capsys: Captured) -> None:
    assert diff("llama", "optimized:llama", "--layers", 1) == 0
    out = capsys.readouterr().out
    assert out.startswith("LlamaForCausalLM: 5 sites rewritten, 0 refused, ")
    assert diff("llama", "mistral", "--layers", 1) == 0
    out = capsys.readouterr().out
    assert "MistralRMSNorm" in out and "operators in both" in out


def test_a_saved_graph_with_a_model_and_with_a_report(folder: Path, capsys: Captured) -> None:
    assert diff(folder / "model", folder / "graph") == 0
    out, err = capsys.readouterr()
    assert "9 sites rewritten" in out and "tracing LlamaForCausalLM" in err
    assert diff(folder / "graph", folder / "part.json", "--fail-on-lost") == 1
    assert "model.norm" in capsys.readouterr().err


def test_a_saved_plain_graph_is_compared_as_it_is(folder: Path, capsys: Captured) -> None:
    assert diff(folder / "plain", f"optimized:{folder / 'model'}") == 0
    out, err = capsys.readouterr()
    assert "9 sites rewritten" in out and f"loading {folder / 'plain'}" in err


def test_what_was_not_optimised_cannot_lose(folder: Path, capsys: Captured) -> None:
    assert diff(folder / "plain", folder / "part.json", "--fail-on-lost") == 2
    assert f"{folder / 'plain'} was not optimised" in capsys.readouterr().err


@pytest.mark.parametrize("style", ["json", "markdown", "html", "text"])
def test_formats(style: str, folder: Path, tmp_path: Path, capsys: Captured) -> None:
    both = folder / "whole.json", folder / "part.json"
    assert diff(*both, "--format", style) == 0
    printed = capsys.readouterr().out
    assert diff(*both, "--format", style, "-o", tmp_path / "any") == 0
    assert (tmp_path / "any").read_text() == printed.removesuffix("\n")
    if style == "json":
        assert len(liger_fx.GraphDiff.from_json(printed).lost) == 3


def test_the_name_of_the_output_says_its_format(folder: Path, tmp_path: Path) -> None:
    both = folder / "whole.json", folder / "part.json"
    assert diff(*both, "-o", tmp_path / "a.html") == 0 == diff(*both, "-o", tmp_path / "a.json")
    assert (tmp_path / "a.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert len(liger_fx.GraphDiff.from_json((tmp_path / "a.json").read_bytes()).lost) == 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["whole.json", "no.json"], "no.json"),
        (["whole.json", "broken.json"], "broken.json is no JSON"),
        (["whole.json", "other.json"], "other.json is no report that this version reads"),
        (["whole.json", "later.json"], "its schema is version 99"),
        (["whole.json", "part.json", "-o", "a.pdf"], "a.pdf names no kind of report"),
        (["whole.json", "part.json", "-o", "nowhere/a.html"], "cannot be written"),
        (["whole.json", "damaged"], "graph.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_compared(
    arguments: list[str],
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    monkeypatch.chdir(folder)
    Path("broken.json").write_text("{")
    Path("other.json").write_text('{"a": 1}')
    later = json.loads(Path("whole.json").read_text()) | {"schema": 99}
    Path("later.json").write_text(json.dumps(later))
    Path("damaged").mkdir(exist_ok=True)
    Path("damaged/graph.json").write_text("{")
    assert diff(*arguments) == 2
    out, err = capsys.readouterr()
    said_lines = [line for line in err.splitlines() if not line.startswith(("==>", "    "))]
    assert out == "" and len(said_lines) == 1 and said in said_lines[0], err


def test_optimize_writes_the_report(tmp_path: Path, capsys: Captured) -> None:
    for name in ("r.json", "r.html", "r.md", "r.txt"):
        report = tmp_path / name
        assert cli.main(["optimize", "llama", "--layers", "1", "--report", str(report)]) == 0
        assert "LigerSwiGLUMLP" in report.read_text()
    capsys.readouterr()
    assert cli.main(["optimize", "llama", "--report", str(tmp_path / "r.doc")]) == 2
    assert "names no kind of report" in capsys.readouterr().err


def test_verify_writes_what_it_found(tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    assert cli.main(["verify", "llama", "--layers", "1", "--report", str(report)]) == 0
    found = liger_fx.GraphDiff.from_json(report.read_bytes())
    assert found.verified is not None and found.verified.ok and len(found.verified.sites) == 6
