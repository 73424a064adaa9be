"""The report: the facts of a rewrite with a method for each face.

print(opt.report)                  text for a terminal
opt.report.save("report.html")     the page; also .txt, .md, .json
GraphDiff.from_json(text)          the report that json() wrote
"""

from __future__ import annotations

from pathlib import Path

from liger_fx.errors import UsageError
from liger_fx.report import json_face
from liger_fx.report.facts import Facts
from liger_fx.report.html_face import render as render_html
from liger_fx.report.markdown_face import render as render_markdown
from liger_fx.report.text import render as render_text

FACES = {".txt": "text", ".md": "markdown", ".json": "json", ".html": "html"}


class GraphDiff(Facts):
    """Two graphs of one model, the sites at which they differ, and the faces that show them."""

    def text(self, full: bool = False, color: bool = False) -> str:
        """The report as text of a hundred columns where its longest words allow.

        `full` lists every layer instead of folding alike ones, the settings of modules that did not
        change, and the code of each graph; `color` adds the escapes of a terminal.
        """
        return render_text(self, full, color)

    def markdown(self, full: bool = False) -> str:
        """The report as Markdown for GitHub; `full` as for text."""
        return render_markdown(self, full)

    def html(self) -> str:
        """The report as one HTML page that needs no other file and no network."""
        return render_html(self)

    def json(self) -> str:
        """The report as JSON text, which ``GraphDiff.from_json`` reads again."""
        return json_face.to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "the report") -> GraphDiff:
        """The report that ``json()`` wrote; UsageError, naming ``name`` and the field, if it is
        none."""
        return json_face.from_json(text, name, cls)

    def face(self, name: str) -> str:
        """The report as "text", "markdown", "json" or "html"."""
        return str(getattr(self, name)())

    def save(self, path: str | Path) -> None:
        """Write the report to a file whose name says how: .txt, .md, .json or .html.

        UsageError for any other name; OSError where the file cannot be written.
        """
        style = check_name(path)
        Path(path).write_text(self.face(style), encoding="utf-8")

    def __str__(self) -> str:
        return self.text()


def check_name(path: str | Path) -> str:
    """The face that a file's name asks for; UsageError for a name that asks for none."""
    suffix = Path(path).suffix
    if suffix not in FACES:
        known = ", ".join(sorted(FACES))
        raise UsageError(f"{path} names no kind of report: its end should be one of {known}.")
    return FACES[suffix]
