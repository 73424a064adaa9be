"""What the faces say of blocks: alike ones once, calls in short words, each graph's code once."""

import dataclasses
import re

import pytest

import liger_fx
from liger_fx.report import GraphDiff
from liger_fx.report.block_sections import block_kinds
from liger_fx.report.blocks import BlockRow
from liger_fx.report.calls import arguments, short_calls
from liger_fx.tiny import tiny_model
from tests.report.sample import CODE, HIDDEN, sample

IDS = "input_ids int64[batch, sequence] on cpu"


@pytest.mark.parametrize(
    "calls, said",
    [
        ((), "none yet"),
        (("",), "no argument"),
        ((IDS,), "input_ids"),
        ((IDS, IDS), "input_ids (2 x)"),
        ((IDS, f"{IDS}, labels int64[batch] on cuda:0"), "input_ids: alone; with labels"),
        (("x float32[4] on cpu", "y a Cache, z any int"), "with x; with y, z"),
        (
            (f"{IDS}, n the size rows, pair (float32[2, 3] on cpu, None), scale -1.5, on True",),
            "input_ids, n, pair, scale=-1.5, on=True",
        ),
        (
            ("kind 'a (b', x {a: int64[2] on cpu, b: 3}",),
            "kind='a (b', x {a: int64[2] on cpu, b: 3}",
        ),
    ],
)
def test_calls_in_short_words(calls: tuple[str, ...], said: str) -> None:
    assert short_calls(calls) == said


def test_arguments_are_parted_where_no_bracket_is_open() -> None:
    assert list(arguments("a (int64[2, 3] on cpu, {k: None, l: 1}), b 'x'")) == [
        "a (int64[2, 3] on cpu, {k: None, l: 1})", "b 'x'",
    ]  # fmt: skip


BLOCKS = """\
Blocks
class            where         graphs  calls
---------------  ----------  --------  -------------------------------------------------------
TinyForCausalLM  the model          1  input_ids, use_cache=False
TinyLayer        layers.0-4         2  hidden_states, scales: alone; with mask, cache, window=16"""
FELL_BACK = """\
Calls that no graph served
where       in         call                   why
----------  ---------  ---------------------  -------------------------------------------------
layers.1-2  TinyLayer  hidden_states, packed  scan branches on data in layers_2 at
                                              modeling_tiny.py:71"""


def test_the_text_has_alike_blocks_in_a_row_and_what_no_graph_served() -> None:
    sections = sample().text().split("\n\n")
    (blocks,) = (section for section in sections if section.startswith("Blocks"))
    (fell_back,) = (section for section in sections if section.startswith("Calls that"))
    assert unfilled(blocks) == unfilled(BLOCKS)
    assert unfilled(fell_back) == unfilled(FELL_BACK)
    assert sections[0].split("\n")[1] == (
        "3 distinct graphs for 6 blocks; 2 calls fell back to the model's own code"
    )
    assert "def forward" not in sample().text()
    assert sample().text(full=True).count("self.norm(hidden_states)") == 1


def unfilled(text: str) -> list[str]:
    return re.sub(r"-{3,}", "-", text).split()


def different(layers: int) -> GraphDiff:
    """Layers that are called alike, each with a graph of its own."""
    own = [
        BlockRow("TinyLayer", (f"layers.{i}",), (HIDDEN,), CODE.replace("self.norm", f"self.n{i}"))
        for i in range(layers)
    ]
    diff = sample(layers)
    return dataclasses.replace(diff, blocks=(diff.blocks[0], *own), fallbacks=())


def test_blocks_that_differ_in_their_code_alone_are_a_row_of_several_graphs() -> None:
    diff = different(128)
    assert [len(rows) for rows in block_kinds(diff)] == [1, 128]
    text = diff.text()
    assert re.search(r"TinyLayer +layers.0-127 +128 +hidden_states, scales\n", text)
    assert "129 distinct graphs for 129 blocks; no call fell back to the model's own code" in text
    assert "Calls that no graph served" not in text + diff.html()
    assert len(text.splitlines()) == len(different(8).text().splitlines())


def test_the_page_has_the_code_of_each_graph_once() -> None:
    page = different(128).html()
    assert page.count('<details class="graph">') == 129
    assert all(page.count(f"self.n{i}(") == 1 for i in range(128))
    shared = dataclasses.replace(
        sample(), blocks=(*sample().blocks, BlockRow("Other", ("head",), ("x any int",), CODE))
    )
    assert shared.html().count("self.norm(hidden_states)") == 1
    assert "the same graph as layers.0-4" in shared.html()


def test_a_block_without_a_graph_says_so() -> None:
    diff = dataclasses.replace(sample(), blocks=(BlockRow("Unused", ("spare",), (), ""),))
    assert re.search(r"Unused +spare +0 +none yet", diff.text())
    assert "no graph yet" in diff.html()


def test_a_real_model_of_many_layers_is_three_rows() -> None:
    report = liger_fx.optimize(tiny_model("llama", 12)).report
    assert report is not None
    assert "3 distinct graphs for 14 blocks; no call fell back" in report.text()
    assert re.search(r"LlamaDecoderLayer +model.layers.0-11 +1 +hidden_states", report.text())
    assert report.html().count("self.mlp(") == 1
