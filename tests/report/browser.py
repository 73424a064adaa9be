"""A real headless Chromium for the tests of the page; nothing is installed here."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
)  # fmt: skip
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")

needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)",
)


@contextmanager
def started(profile: Path) -> Iterator[Chrome]:
    """A browser with a new profile, 1280 pixels wide, that logs what a page complains of."""
    options = ChromeOptions()
    assert BROWSER is not None
    options.binary_location = BROWSER
    for flag in (*_FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(DRIVER))
    try:
        yield chrome
    finally:
        chrome.quit()


class Page:
    """An opened report and what a reader does with it."""

    def __init__(self, chrome: Chrome, file: Path) -> None:
        self.chrome = chrome
        chrome.get(file.as_uri())

    def all(self, selector: str) -> list[WebElement]:
        """The elements that are to be seen."""
        return [e for e in self.chrome.find_elements("css selector", selector) if e.is_displayed()]

    def one(self, selector: str) -> WebElement:
        """The only such element that is to be seen."""
        (element,) = self.all(selector)
        return element

    def rows(self) -> list[str]:
        """The names in the tree, indented by their level."""
        script = """return [...document.querySelectorAll('#tree tbody tr')].map(r =>
            '  '.repeat(r.ariaLevel - 1) + r.querySelector('.name').textContent)"""
        return list(self.run(script))

    def row(self, path: str) -> WebElement:
        """The row of a module."""
        return self.one(f"#tree tbody tr[data-path={json.dumps(path)}]")

    def search(self, text: str) -> None:
        field = self.one("#search")
        field.clear()
        field.send_keys(text)

    def press(self, *keys: str) -> WebElement:
        """Press keys wherever the focus is; the element that has it then."""
        for key in keys:
            self.chrome.switch_to.active_element.send_keys(key)
        return self.chrome.switch_to.active_element

    def run(self, script: str, *arguments: Any) -> Any:
        """The result of a script."""
        return self.chrome.execute_script(script, *arguments)

    def set_media(self, scheme: str) -> None:
        """What the reader's system prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def set_size(self, width: int, height: int = 900) -> None:
        """The part of the page that is to be seen, in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def complaints(self) -> list[str]:
        """What stands in the browser's console."""
        return [entry["message"] for entry in self.chrome.get_log("browser")]
