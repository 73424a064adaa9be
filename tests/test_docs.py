"""The pages tell the truth: links lead somewhere, tables are as measured, the example runs."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    named = re.findall(r"`((?:docs|tools|tests|examples|passes|kernels|liger_fx)/[\w./-]+)`", text)
    places = [page.parent / link for link in linked] + [ROOT / name for name in named]
    assert [str(place) for place in places if not place.exists()] == []


def test_tables_are_what_the_result_files_say() -> None:
    command = [sys.executable, "tools/readme_tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_readme_example_prints_what_the_readme_shows() -> None:
    printed = runpy.run_path(str(ROOT / "tools" / "readme_tables.py"))["printed"]
    # the errors that verify measures are each machine's own
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, verify, after = re.split(r"(?=and `verify`)|(?=`optimize` also)", text)
    assert "LigerSwiGLUMLP" in before and "at least as accurate as the original" in verify
    assert printed(before + after) == before + after


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
