"""The page in a real browser: open, search, unfold, choose a site, read its drawing, use keys."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import liger_fx
from liger_fx.engine.drawing import Box
from liger_fx.report import GraphDiff
from liger_fx.report.layout import lines_of
from tests.report.browser import Page, needs_browser, started
from tests.report.sample import DRAWING, everything, sample
from tests.report.test_faces import hostile
from tests.support.families import build

pytestmark = needs_browser
LAYERS = 128


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with started(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def llama() -> GraphDiff:
    return made(LAYERS)


def made(layers: int) -> GraphDiff:
    report = liger_fx.optimize(build("llama", num_hidden_layers=layers)).report
    assert report is not None
    return report


@pytest.fixture(scope="module")
def llama_file(llama: GraphDiff, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "llama.html"
    llama.save(path)
    return path


@pytest.fixture
def page(chrome: Chrome, llama_file: Path) -> Page:
    return Page(chrome, llama_file)


@pytest.fixture
def small(chrome: Chrome, tmp_path: Path) -> Page:
    """Five layers, the fourth of them refused."""
    sample().save(tmp_path / "small.html")
    return Page(chrome, tmp_path / "small.html")


@pytest.mark.parametrize("layers", [32, LAYERS])
def test_it_is_small_and_opens_folded(
    chrome: Chrome, llama_file: Path, tmp_path: Path, layers: int
) -> None:
    if layers != LAYERS:
        llama_file = tmp_path / "report.html"
        made(layers).save(llama_file)
    assert llama_file.stat().st_size < 5_000_000
    page = Page(chrome, llama_file)
    assert len(page.rows()) < 20  # as many for any number of layers: no more to lay out
    assert page.complaints() == []
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.one("h1").text == "LlamaForCausalLM"
    sites = str(4 * layers + 1)
    assert page.one(".facts").text.split("\n")[:3] == [
        "Sites rewritten", sites, f"of {sites} found",
    ]  # fmt: skip


def test_alike_layers_are_one_row_that_unfolds(page: Page) -> None:
    folded = page.rows()
    assert folded[:6] == [
        "model", "  model", "    embed_tokens", "    layers", "      0–127", "        self_attn",
    ]  # fmt: skip
    assert page.one(".times").text == "128 ×" and len(folded) < 20
    page.one(".times").click()
    unfolded = page.rows()
    assert [r.strip() for r in unfolded if r.startswith("        ")] == [str(i) for i in range(128)]
    page.row("model.layers.77").find_element("css selector", ".twist").click()
    assert page.row("model.layers.77.input_layernorm").text.split() == [
        "input_layernorm", "LlamaRMSNorm((56,),", "eps=1e-06)",
        "LigerRMSNorm((56,),", "eps=1e-06,", "cast=promote)",
    ]  # fmt: skip
    page.run("scrollTo(0, 0)")
    page.one(".times").click()
    assert page.rows() == folded


def test_unfolding_everything_shows_every_module(page: Page, llama: GraphDiff) -> None:
    page.one("#unfold").click()
    paths = page.run(
        "return [...document.querySelectorAll('#tree tbody tr')].map(r => r.dataset.path)"
    )
    both = {row.path for side in (llama.before, llama.after) for row in side.tree}
    assert set(paths) == both and len(paths) == len(both) + 1  # the row that folds them again
    page.one("#unfold").click()
    assert len(page.rows()) < 20


def test_search_finds_one_layer_of_many_and_marks_it(page: Page) -> None:
    page.search("layers.77.mlp gate_")
    assert [row.strip() for row in page.rows()] == [
        "model",
        "model",
        "layers",
        "77",
        "mlp",
        "gate_proj",
    ]
    assert [mark.text for mark in page.all("#tree mark")] == ["gate_"]
    page.search("rms_norm layers.77.input")
    assert page.one("#found").text == "1 site"
    page.one("#sites button").click()
    assert page.one("#panel .path").text == "model.layers.77.input_layernorm"
    page.search("LigerSwiGLU")
    assert [row.strip() for row in page.rows()][-2:] == ["0–127", "mlp"]
    assert [row.text.split()[0] for row in page.all("#sites tbody tr")] == [
        "model.layers.0-127.mlp"
    ]
    page.search("no such thing")
    assert page.rows() == ["model"] and page.all("#sites tbody tr") == []


def drawn(page: Page, side: int) -> list[list[str]]:
    """The lines of each box of the chosen site's drawing."""
    svg = page.all("#panel article:not([hidden]) svg.drawing")[side]
    boxes = svg.find_elements("css selector", ".box")
    return [[t.text for t in box.find_elements("css selector", "text")] for box in boxes]


def written(boxes: tuple[Box, ...]) -> list[list[str]]:
    return [[text for _, text in lines_of(box)] for box in boxes]


@pytest.mark.parametrize("module", ["mlp", "input_layernorm", "self_attn"])
def test_a_chosen_site_is_drawn_before_and_after(page: Page, llama: GraphDiff, module: str) -> None:
    path = f"model.layers.0.{module}"
    page.row(path).click()
    site = next(site for site in llama.sites if site.path == path)
    assert site.drawing is not None
    heading = page.one("#panel article:not([hidden]) h2").text
    assert heading == f"{site.before_class} to {site.after_class}"
    assert page.one("#panel .path").text == path
    assert drawn(page, 0) == written(site.drawing.before)
    assert drawn(page, 1) == written(site.drawing.after)
    arrows = page.all("#panel article:not([hidden]) svg.drawing")[0].find_elements(
        "css selector", ".arrow"
    )
    edges = {(a.get_attribute("data-from"), a.get_attribute("data-to")) for a in arrows}
    assert edges == {(str(s), str(t)) for t, b in enumerate(site.drawing.before) for s in b.reads}


def test_every_text_fits_its_box(page: Page) -> None:
    page.run("for (const a of document.querySelectorAll('article')) a.hidden = false")
    too_wide = page.run("""return [...document.querySelectorAll('.box')].filter(box => {
        const room = box.querySelector('rect').getBBox().width;
        return [...box.querySelectorAll('text')].some(t => t.getBBox().width > room - 4);
    }).map(box => box.textContent)""")
    assert too_wide == [] and len(page.all(".box")) > 30


def test_a_drawing_opens_large_and_goes_back(page: Page) -> None:
    page.row("model.layers.0.self_attn").click()
    count = len(drawn(page, 0))
    button = page.all("#panel article:not([hidden]) .enlarge")[0]
    button.click()
    assert len(page.all("dialog .box")) == count == 20
    page.press(Keys.ESCAPE)
    assert page.all("dialog") == [] and len(drawn(page, 0)) == count
    assert page.chrome.switch_to.active_element == button


def test_keyboard_alone_reaches_a_site_and_its_drawing(page: Page) -> None:
    tree = "return document.activeElement.closest('#tree') !== null"
    for _ in range(20):
        page.press(Keys.TAB)
        if page.run(tree):
            break
    row = page.chrome.switch_to.active_element
    assert row.get_attribute("data-path") == "" and row.get_attribute("role") == "row"
    assert row.get_attribute("aria-expanded") == "true"
    assert page.press(Keys.ARROW_DOWN).get_attribute("data-path") == "model"
    assert page.press(Keys.ARROW_LEFT).get_attribute("aria-expanded") == "false"
    assert len(page.rows()) == 3
    row = page.press(Keys.ARROW_RIGHT)
    assert row.get_attribute("aria-expanded") == "true"
    row = page.press(*[Keys.ARROW_DOWN] * 3)
    assert row.get_attribute("data-path") == "model.layers.0"
    row = page.press("u")
    assert len(page.rows()) > LAYERS
    assert row.get_attribute("data-path") == "model.layers.0"
    row = page.press("u", *[Keys.ARROW_DOWN] * 2)
    assert row.get_attribute("data-path") == "model.layers.0.mlp"
    row = page.press(Keys.ENTER)
    assert row.get_attribute("aria-selected") == "true"
    assert page.one("#panel article:not([hidden]) h2").text == "LlamaMLP to LigerSwiGLUMLP"
    assert page.press(Keys.END).get_attribute("data-path") == "lm_head"
    assert page.press(Keys.HOME).get_attribute("data-path") == ""
    levels = [int(r.get_attribute("aria-level") or 0) for r in page.all("#tree tbody tr")]
    assert levels[:6] == [1, 2, 3, 3, 4, 5]
    for _ in range(8):  # the one stop after the tree is the panel
        page.press(Keys.TAB)
        if page.run("return document.activeElement.matches('.box')"):
            break
    name = page.chrome.switch_to.active_element.get_attribute("aria-label")
    assert name == "x, input, float32[batch, sequence, 56]"


def shown_graph(page: Page) -> str:
    """The only graph that is to be seen, once it is unfolded."""
    page.one("#panel article:not([hidden]) summary").click()
    return page.one("#panel article:not([hidden]) pre").text


def test_a_block_shows_its_graph_by_mouse_and_by_key(page: Page, llama: GraphDiff) -> None:
    code = {row.class_name: row.code.strip() for row in llama.blocks}
    page.row("model.layers.0").find_element("css selector", ".block").click()
    assert page.one("#panel article:not([hidden]) h2").text == "LlamaDecoderLayer"
    assert page.one("#panel .path").text == "model.layers.0"
    assert page.all("#panel pre") == [] and page.row("model.layers.0.mlp")
    assert shown_graph(page) == code["LlamaDecoderLayer"]
    page.row("model").find_element("css selector", ".block").click()
    assert shown_graph(page) == code["LlamaModel"]
    page.run("document.querySelector('#tree tbody tr').focus()")
    page.press("g")
    assert page.one("#panel .path").text == "the model"
    assert shown_graph(page) == code["LlamaForCausalLM"]
    page.row("model.layers.0.mlp").click()
    assert page.one("#panel article:not([hidden]) h2").text == "LlamaMLP to LigerSwiGLUMLP"


def test_what_no_graph_served_is_said(small: Page) -> None:
    tile = next(tile for tile in small.all(".facts > div") if tile.text.startswith("Graphs"))
    assert tile.text.split("\n")[1:] == [
        "3", "3 distinct graphs for 6 blocks; 2 calls fell back to the model's own code",
    ]  # fmt: skip
    (section,) = (s for s in small.all("section.wide") if s.text.startswith("Calls that"))
    assert section.find_element("css selector", "tbody").text == (
        "layers.1-2 TinyLayer hidden_states, packed "
        "scan branches on data in layers_2 at modeling_tiny.py:71"
    )


def test_filters_by_rule_and_by_refused(small: Page) -> None:
    assert [r.strip() for r in small.rows()] == ["model", "layers", "0–2,4", "norm", "3", "norm"]
    small.one("#refused").click()
    assert [r.strip() for r in small.rows()] == ["model", "layers", "3", "norm"]
    assert len(small.all("#sites tbody tr")) == 1
    assert "wanted mean(square(x)), found sum(pow)" in small.one("#sites tbody").text
    small.one("#sites button").click()
    assert small.one("#panel article:not([hidden]) h2").text == "TinyNorm refused"
    assert drawn(small, 0) == written(DRAWING.before)
    small.one("#refused").click()
    small.one('.filter[data-rule="rms_norm"]').click()
    assert len(small.all("#sites tbody tr")) == 2
    assert not small.one('.filter[data-rule="rotary_embedding"]').is_enabled()


def test_what_was_lost_is_said_at_the_top(chrome: Chrome, tmp_path: Path) -> None:
    everything().save(tmp_path / "diff.html")
    page = Page(chrome, tmp_path / "diff.html")
    assert page.one(".facts .bad:first-child dd:not(.quiet)").text == "2"
    lost, other = page.all("section.changed")
    assert [row.text for row in lost.find_elements("css selector", "tbody tr")] == [
        "rms_norm layers.3.norm 1 FusedNorm - "
        "wanted mean(square(x)), found sum(pow) at modeling_tiny.py:43",
        "gated_mlp layers.2.mlp 1 FusedMLP - nothing like it is there any more",
    ]
    assert (
        other.find_element("css selector", "tbody").text == "rms_norm layers.4.norm 1 - FusedNorm"
    )
    assert lost.location["y"] < page.one("#tree").location["y"]


def test_what_verify_found_stands_at_its_site(small: Page) -> None:
    small.row("layers.0.norm").click()
    assert small.one("#panel .verified").text.startswith("verified: outputs 0.91 x")


def test_colours_follow_the_system_and_the_button(small: Page) -> None:
    def ground(color: str) -> bool:
        found = "return getComputedStyle(document.body).backgroundColor"
        return bool(WebDriverWait(small.chrome, 5).until(lambda _: small.run(found) == color))

    light, dark = "rgb(247, 247, 245)", "rgb(18, 19, 21)"
    small.set_media("dark")
    assert ground(dark)
    small.set_media("light")
    assert ground(light)
    small.one("#theme").click()
    assert ground(dark)
    small.one("#theme").click()
    assert ground(light)


@pytest.mark.parametrize("width", [360, 600, 1280])
def test_nothing_sticks_out_sideways(page: Page, width: int) -> None:
    page.set_size(width)
    try:
        assert page.run("return document.scrollingElement.scrollWidth") <= width
        page.row("model.layers.0.self_attn").click()
        assert page.run("return document.scrollingElement.scrollWidth") <= width
    finally:
        page.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


ATTACKS = [
    '<img src=x onerror="hit=1">',
    "</script><script>hit=1</script>",
    '"><svg onload="hit=1">',
    "<!--<script>hit=1//",
    "{{ 7 * 7 }}",
    "');hit=1;//",
]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_name_is_shown_and_not_run(chrome: Chrome, tmp_path: Path, name: str) -> None:
    hostile(name).save(tmp_path / "hostile.html")
    page = Page(chrome, tmp_path / "hostile.html")
    page.one("#unfold").click()
    page.search(name.split()[0])
    page.row(name).click()
    assert page.run("return window.hit") is None
    assert page.one("h1").text == name
    assert page.row(name).find_element("css selector", ".name").text == name
    page.row(name).find_element("css selector", ".block").click()
    assert shown_graph(page) == name and page.run("return window.hit") is None
    assert page.complaints() == []
