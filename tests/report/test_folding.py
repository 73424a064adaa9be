"""Folded paths name exactly the paths they were folded from."""

import re
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from liger_fx.report import TreeRow
from liger_fx.report.folding import alike, fold_paths
from liger_fx.report.tree import aligned, lines


def unfold(text: str) -> set[str]:
    """The paths that a folded text stands for, read independently of how it was made."""
    parts = re.split(r", ", text)
    return {".".join(path) for part in parts for path in product(*map(choices, part.split(".")))}


def choices(part: str) -> list[str]:
    if not re.fullmatch(r"[\d,-]+", part):
        return [part]
    ranges = (run.partition("-") for run in part.split(","))
    return [str(n) for a, _, b in ranges for n in range(int(a), int(b or a) + 1)]


place = st.one_of(st.sampled_from(["mlp", "norm", "layers"]), st.integers(0, 12).map(str))
path = st.lists(place, min_size=1, max_size=4).map(".".join)


@given(st.lists(path, min_size=1, max_size=12))
def test_folded_paths_unfold_to_the_same_paths(paths: list[str]) -> None:
    assert unfold(fold_paths(paths)) == set(paths)


def test_how_folded_paths_read() -> None:
    layers = [f"model.layers.{i}.mlp" for i in (0, 1, 2, 10, 11)]
    assert fold_paths(layers) == "model.layers.0-2,10-11.mlp"
    experts = [f"layers.{i}.experts.{j}" for i in (0, 1) for j in range(4)]
    assert fold_paths(experts) == "layers.0-1.experts.0-3"
    assert fold_paths(["layers.0.experts.1", "layers.1.experts.0", "layers.1.experts.1"]) == (
        "layers.0.experts.1, layers.1.experts.0-1"
    )
    assert fold_paths(["", "norm"]) == ", norm"


def test_alike_drops_layer_and_node_numbers_but_no_constant() -> None:
    assert alike("layers.3.norm: mul_12(x_4, 1e-06)") == alike("layers.30.norm: mul(x, 1e-06)")
    for a, b in (("add(x, 1e-06)", "add(x, 1e-05)"), ("pow(x, 2)", "pow(x, 3)"), ("0.5", "0.7")):
        assert alike(a) != alike(b)


def tree(*rows: tuple[str, str]) -> tuple[TreeRow, ...]:
    return tuple(TreeRow(path, name, "") for path, name in rows)


def test_trees_align_where_either_side_has_a_module_more() -> None:
    before = tree(("", "M"), ("a", "Norm"), ("b", "Drop"))
    after = tree(("", "M"), ("a", "LigerNorm"), ("rotary", "LigerRotary"))
    assert list(lines(aligned(before, after), full=False)) == [
        ("", "M", "="),
        ("  a", "Norm", "LigerNorm"),
        ("  b", "Drop", ""),
        ("  rotary", "", "LigerRotary"),
    ]


def test_only_neighbours_alike_on_both_sides_fold() -> None:
    def layers(classes: list[str]) -> tuple[TreeRow, ...]:
        return tree(("", "ModuleList"), *((str(i), name) for i, name in enumerate(classes)))

    shown = list(lines(aligned(layers(["A"] * 4), layers(["A", "B", "A", "A"])), full=False))
    assert shown == [("", "ModuleList", "="), ("  0,2-3 (3 x)", "A", "="), ("  1", "A", "B")]
