"""The page needs no network, runs nothing but its own script, and is readable in both colours."""

import base64
import hashlib
import html
import re
from pathlib import Path

import pytest

from tests.report.sample import sample
from tests.report.test_faces import HOSTILE, hostile

PAGE = sample().html()
CSS = re.search(r"<style>(.*?)</style>", PAGE, re.DOTALL)[1]  # type: ignore[index]


def test_nothing_is_fetched_from_anywhere() -> None:
    assert not re.search(r"https?:|//\w|@import|<link|<iframe|<img|\bsrc\s*=|\bhref\s*=", PAGE)
    assert re.findall(r"url\(([^)]*)\)", PAGE) == ["#head"]
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|sendBeacon|import)\s*\(", PAGE)


def test_the_policy_allows_nothing_but_the_page_s_own_style_and_script() -> None:
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]*)"', PAGE)[1])  # type: ignore[index]
    (script,) = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("style", CSS), ("script", script))
    }
    assert policy == "default-src 'none'; " + "; ".join(
        f"{kind}-src 'sha256-{digest}'" for kind, digest in hashes.items()
    )
    assert " style=" not in PAGE and not re.search(r"\son\w+=", PAGE)


@pytest.mark.parametrize("name", [*HOSTILE, "</script><script>x()</script>", "<!--<script>"])
def test_names_are_no_markup(name: str) -> None:
    page, plain = hostile(name).html(), PAGE
    assert name in html.unescape(page)
    for tag in ("<script", "</script", "<!--", "<img", "</details", "</svg", "<title"):
        more = tag in ("</details", "</svg")  # the hostile report has a site more
        assert page.count(tag) == plain.count(tag) or more, tag
    assert page.count("<details") == page.count("</details")


def test_the_page_of_many_layers_is_small() -> None:
    assert len(sample(layers=128).html().encode()) < 200_000


@pytest.mark.parametrize("theme", [":root", ':root[data-theme="dark"]'])
def test_every_text_has_enough_contrast(theme: str) -> None:
    """WCAG 2.2 AA asks for 4.5 for text, and 3 for what marks a state."""
    block = re.search(re.escape(theme) + r" \{(.*?)\}", CSS, re.DOTALL)[1]  # type: ignore[index]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    for ground in ("page", "card", "tint"):
        for text in ("text", "quiet", "good", "warn", "link"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        assert contrast(colors["focus"], colors[ground]) >= 3
    for name in ("good", "warn", "bad"):
        assert contrast(colors["text"], colors[f"{name}-tint"]) >= 4.5
        assert contrast(colors["quiet"], colors[f"{name}-tint"]) >= 4.5
    assert contrast(colors["text"], colors["mark"]) >= 4.5


def contrast(a: str, b: str) -> float:
    """WCAG's ratio of two colours' relative luminances."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_save_picks_the_face_by_the_file_s_name(tmp_path: Path) -> None:
    diff = sample()
    for name, text in (
        ("r.html", diff.html()),
        ("r.md", diff.markdown()),
        ("r.json", diff.json()),
        ("r.txt", diff.text()),
    ):
        diff.save(tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8") == text
    with pytest.raises(ValueError, match=r"r.pdf.*\.html, \.json, \.md, \.txt"):
        diff.save(tmp_path / "r.pdf")
    assert not (tmp_path / "r.pdf").exists()
