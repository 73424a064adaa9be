"""Every face shows the same facts, and none lets a name in the report become markup."""

import html
import re
from dataclasses import replace

import pytest

from liger_fx.report import GraphDiff, TreeRow
from liger_fx.report.blocks import BlockRow, FallbackRow
from tests.report.sample import facts, sample, site

PAGE = sample().html()


def visible(markdown: str) -> str:
    """The text that a reader of the Markdown sees."""
    return html.unescape(re.sub(r"\\([\\`*\[\]|~_])", r"\1", markdown))


@pytest.mark.parametrize("fact", facts())
def test_text_and_markdown_show_every_fact(fact: str) -> None:
    text = sample().text(full=True)
    assert " ".join(fact.split()) in unwrapped(text)
    assert fact in visible(sample().markdown(full=True))


@pytest.mark.parametrize("fact", facts())
def test_the_page_shows_every_fact(fact: str) -> None:
    shown = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", PAGE, flags=re.DOTALL)
    read = re.sub(r'<[^>]*aria-label="([^"]*)"[^>]*>', r"\1 ", shown)
    text = " ".join(html.unescape(read).split()).replace("→", "->").replace("−", "-")
    assert fact.replace("layers.2.norm", "layers.0-2,4.norm") in text or fact in text


def unwrapped(text: str) -> str:
    """The text without the line breaks inside table cells: each column of a table read down."""
    return " ".join(text.split()) + " " + " ".join(columns(text))


def columns(text: str) -> list[str]:
    found = []
    blocks = re.split(r"\n\n", text)
    for block in blocks:
        lines = block.splitlines()
        rule = next((i for i, line in enumerate(lines) if re.fullmatch(r"-[- ]+", line)), None)
        if rule is None:
            continue
        for span in re.finditer(r"-+", lines[rule]):
            cells = (line[span.start() : span.end()].strip() for line in lines[rule + 1 :])
            found.append(" ".join(filter(None, cells)))
    return found


def test_what_is_bold_without_color_is_not_there() -> None:
    plain, colored = sample().text(), sample().text(color=True)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain != colored


def test_markdown_tables_have_as_many_cells_in_each_row() -> None:
    tables = re.findall(r"(?:^\|.*\|$\n?)+", sample().markdown(), re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        rows = [re.findall(r"(?<!\\)\|", row) for row in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, table


def test_markdown_folds_what_is_long() -> None:
    text = sample().markdown()
    assert text.count("<details>") == text.count("</details>") >= 4
    shown = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert "FusedNorm" in shown and "wanted mean" in shown and "ModuleList" not in shown


HOSTILE = [
    "<script>alert(1)</script>", "a|b", "```", "[x](javascript:alert(1))", "*bold*", "@someone",
    "</details>", "_x_", "http://example.org",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_no_markup_in_markdown(name: str) -> None:
    text = hostile(name).markdown()
    prose = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in prose and "://" not in prose
    assert "@someone" not in prose
    inline = re.sub(r"<summary>.*?</summary>", "", prose)  # raw HTML: Markdown does not look there
    assert not re.search(r"(?<!\\)(\*bold|_x_|\]\()", inline)
    assert text.count("<details>") == text.count("</details>")
    assert name in visible(text)


def hostile(name: str) -> GraphDiff:
    """A report in which modules, classes, reasons, calls, code and an input have this name."""
    diff = sample()
    rows = (*diff.after.tree, TreeRow(name, name, name))
    bad = replace(site(3), path=f"layers.{name}", reason=name, before_class=name)
    return replace(
        diff,
        after=replace(diff.after, class_name=name, tree=rows),
        sites=(*diff.sites, bad),
        inputs={name: name},
        blocks=(*diff.blocks, BlockRow(name, (name,), (f"x {name}",), name)),
        fallbacks=(FallbackRow(name, name, name, name),),
    )
