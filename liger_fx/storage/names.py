"""The files of a saved graph: their names, and how the directory of an earlier save is known.

graph.json {"format": "liger_fx graph", ...}, config.json     ->  a saved graph, may be replaced
graph.json {"nodes": [...]}, config.json                      ->  somebody else's
"""

from __future__ import annotations

import re
from pathlib import Path

from liger_fx.errors import LoadError
from liger_fx.storage.directory import Kind, first_bytes, is_file
from liger_fx.storage.json_file import parse
from liger_fx.storage.reading import read_file

GRAPH = "graph.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
REPORT = "report.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
BUFFERS = "buffers.safetensors"
# The field of GRAPH that says what it is.
FORMAT = "liger_fx graph"
# Patterns of the files that any transformers checkpoint may have, and of BUFFERS.
MODEL_FILES = (
    r"config\.json|generation_config\.json|buffers\.safetensors"
    r"|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
)


def report_name(plan: int) -> str:
    """The file of a plan's report."""
    return REPORT if plan == 0 else f"report-{plan + 1}.json"


def _is_graph(file: Path) -> bool:
    """Whether it says that it is a saved graph; one that is damaged further on still is."""
    if not is_file(file):
        return False
    if re.match(rb'\s*\{\s*"format"\s*:\s*"%b"' % FORMAT.encode(), first_bytes(file)):
        return True
    try:
        whole = parse(read_file(file))
    except LoadError:
        return False
    return isinstance(whole, dict) and whole.get("format") == FORMAT


SAVED_GRAPH = Kind(
    GRAPH, {r"graph\.json": _is_graph, rf"report(-\d+)?\.json|{MODEL_FILES}": is_file}
)
