"""The command line: what it prints, where, and with which exit code; never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import liger_fx
from liger_fx import cli
from liger_fx.tiny import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's directory as save_pretrained leaves it; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", layers=2).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


Captured = pytest.CaptureFixture[str]


def test_optimize_prints_the_report_and_says_what_it_made(capsys: Captured) -> None:
    assert cli.main(["optimize", "llama", "--layers", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("LlamaForCausalLM: 9 sites rewritten, 0 refused, ")
    assert "model.layers.0-1.input_layernorm" in out and "LigerSwiGLUMLP(64 -> 96" in out
    assert "a tiny random LlamaForCausalLM" in err and "tracing and rewriting" in err


def test_full_folds_nothing(capsys: Captured) -> None:
    cli.main(["optimize", "llama", "--layers", "2", "--full"])
    out = capsys.readouterr().out
    assert "model.layers.0.mlp " in out and "model.layers.1.mlp " in out and "(2 x)" not in out


def test_a_directory_is_read_with_its_weights(folder: Path, capsys: Captured) -> None:
    assert cli.main(["optimize", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "9 sites rewritten" in out and "no weights" not in err and "random" not in err


def test_a_config_alone_is_optimised_and_that_is_said(folder: Path, capsys: Captured) -> None:
    (folder / "model.safetensors").unlink()
    assert cli.main(["optimize", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "9 sites rewritten" in out
    assert f"no weights in {folder}: optimised from the config alone" in err


def test_layers_of_a_directory(folder: Path, capsys: Captured) -> None:
    assert cli.main(["optimize", str(folder), "--layers", "1"]) == 0
    out, err = capsys.readouterr()
    assert "5 sites rewritten" in out and "2 layers became 1" in err


def test_rules_and_exclude_choose(capsys: Captured) -> None:
    choice = ["--rules", "rms_norm", "--exclude", "model.norm"]
    cli.main(["optimize", "llama", "--layers", "2", *choice])
    assert capsys.readouterr().out.startswith("LlamaForCausalLM: 4 sites rewritten")


def test_verify_prints_the_tables_and_succeeds(folder: Path, capsys: Captured) -> None:
    assert cli.main(["verify", str(folder), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("LlamaForCausalLM in bfloat16 on cpu: at least as accurate")
    assert "all gradients" in out and "model.layers.0-1.mlp" in out


def test_verify_fails_when_the_promise_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from liger_fx.modules.rms_norm import LigerRMSNorm

    right = LigerRMSNorm.forward
    monkeypatch.setattr(LigerRMSNorm, "forward", lambda self, x: right(self, x) * 1.01)
    assert cli.main(["verify", "llama", "--layers", "1"]) == 1
    assert "NOT as promised" in capsys.readouterr().out


def test_nothing_rewritten_warns_and_fails_only_when_strict(capsys: Captured) -> None:
    command = ["optimize", "bert", "--layers", "1", "--rules", "plain_mlp"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "BertLMHeadModel: 0 sites rewritten" in out
    assert "liger-fx: warning: BertLMHeadModel: nothing was rewritten" in err
    assert cli.main([*command, "--strict"]) == 1
    out, err = capsys.readouterr()
    assert "BertLMHeadModel: 0 sites rewritten" in out and "--strict: " in err


def test_rules_lists_every_rule(capsys: Captured) -> None:
    assert cli.main(["rules"]) == 0
    out = capsys.readouterr().out
    passes = Path(liger_fx.__file__).parent / "passes"
    for name in (path.stem for path in passes.glob("*.py")):
        assert f"\n{name} " in out


def fails_with_one_sentence(capsys: Captured, *arguments: str) -> str:
    assert cli.main(["optimize", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    said = [line for line in err.splitlines() if not line.startswith(("==>", "    "))]
    assert len(said) == 1 and said[0].startswith("liger-fx: "), err
    return said[0]


def test_unknown_architecture(capsys: Captured) -> None:
    said = fails_with_one_sentence(capsys, "lama")
    assert "'lama' is no directory and no transformers model type. Did you mean llama" in said


def test_no_name(capsys: Captured) -> None:
    assert "No model was named" in fails_with_one_sentence(capsys, "")


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"liger_fx {liger_fx.__version__}\n"


def test_unknown_rule(capsys: Captured) -> None:
    assert "no_such_rule" in fails_with_one_sentence(capsys, "llama", "--rules", "no_such_rule")


def test_missing_directory(tmp_path: Path, capsys: Captured) -> None:
    said = fails_with_one_sentence(capsys, str(tmp_path / "nowhere"))
    assert said == f"liger-fx: There is no directory {tmp_path / 'nowhere'}."


def test_a_file_is_no_directory(folder: Path, capsys: Captured) -> None:
    said = fails_with_one_sentence(capsys, str(folder / "config.json"))
    assert "is a file: give the directory" in said


def test_directory_without_config(tmp_path: Path, capsys: Captured) -> None:
    assert "has no config.json" in fails_with_one_sentence(capsys, str(tmp_path))


@pytest.mark.parametrize("text", ["{ not json", "[1]", '{"model_type": "nonsuch"}', "\xff"])
def test_config_that_is_none(text: str, folder: Path, capsys: Captured) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in fails_with_one_sentence(capsys, str(folder))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"hidden_size": -3}, {"num_attention_heads": 7}, {"hidden_act": "x"}],
    ids=str,
)
def test_config_that_no_model_can_be_made_of(
    changes: dict[str, object], folder: Path, capsys: Captured
) -> None:
    (folder / "model.safetensors").unlink()
    edit_config(folder, **changes)
    assert str(folder) in fails_with_one_sentence(capsys, str(folder))


def test_truncated_weights(folder: Path, capsys: Captured) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    said = fails_with_one_sentence(capsys, str(folder))
    assert f"The weights in {folder} cannot be read" in said


def test_weights_of_other_sizes(folder: Path, capsys: Captured) -> None:
    edit_config(folder, hidden_size=32)
    said = fails_with_one_sentence(capsys, str(folder))
    assert f"The weights in {folder} do not fit its config.json: lm_head.weight is (256" in said


def test_a_missing_weight_is_said(folder: Path, capsys: Captured) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["optimize", str(folder)]) == 0
    assert "the checkpoint lacks 1 weights: model.norm.weight" in capsys.readouterr().err


def test_pickled_weights_are_not_read(folder: Path, capsys: Captured) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "can run code and is not read" in fails_with_one_sentence(capsys, str(folder))


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_code_from_a_hub_is_not_run(name: str, folder: Path, capsys: Captured) -> None:
    edit_config(folder, **{name: "somebody/kernel"})
    assert "a hub's code" in fails_with_one_sentence(capsys, str(folder))


def test_code_beside_the_config_is_not_run(folder: Path, capsys: Captured) -> None:
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    edit_config(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    assert cli.main(["optimize", str(folder)]) == 0
    capsys.readouterr()
    edit_config(folder, model_type="evil")
    assert "does not know" in fails_with_one_sentence(capsys, str(folder))


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "liger_fx", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_python_dash_m_is_the_same_command() -> None:
    assert "gated_mlp" in run("rules").stdout
    wrong = run("optimize", "nonsuch")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    assert "'nonsuch' is no directory" in wrong.stderr
    usage = run("optimize", "llama", "--layers", "no")
    assert usage.returncode == 2 and "'no' is no number above 0" in usage.stderr


def test_a_reader_that_stops_reading_is_no_error() -> None:
    command = f"{sys.executable} -m liger_fx optimize llama --layers 1"
    pipe = f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and "Traceback" not in done.stderr
