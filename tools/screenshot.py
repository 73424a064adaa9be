"""Takes docs/report.png: the HTML report of a small Gemma 2 in Chromium, one of its MLPs chosen.

    python tools/screenshot.py            light
    python tools/screenshot.py --dark OUT.png

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver) and selenium.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import liger_fx  # noqa: E402
from liger_fx.tiny import tiny_model  # noqa: E402
from tests.report.browser import Page, started  # noqa: E402

LAYERS, SITE = 26, "model.layers.0.mlp"
WIDTH, HEIGHT = 1440, 1180


def report_page(folder: Path) -> Path:
    """A verified report as an HTML file."""
    torch.manual_seed(0)
    model = tiny_model("gemma2", LAYERS)
    opt = liger_fx.optimize(model, verify=True)
    path = folder / "report.html"
    opt.report.save(path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "report.png")
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        file = report_page(Path(name))
        with started(Path(name) / "profile") as chrome:
            page = Page(chrome, file)
            page.set_media("dark" if arguments.dark else "light")
            page.set_size(WIDTH, HEIGHT)
            page.row(SITE).click()
            page.run("document.activeElement.blur(); scrollTo(0, 0)")
            chrome.save_screenshot(str(arguments.out))
    print(f"{arguments.out}: {arguments.out.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
