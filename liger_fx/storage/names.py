"""Names of the files of a saved graph, and the words by which they are told from others."""

GRAPH = "graph.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
REPORT = "report.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
BUFFERS = "buffers.safetensors"
MODULE = "module.py"

# The field of GRAPH that says what it is.
FORMAT = "liger_fx graph"
# The first line of every MODULE.
MODULE_MARK = "# A graph as Python source, written by liger_fx"


def report_name(plan: int) -> str:
    """The file of a plan's report."""
    return REPORT if plan == 0 else f"report-{plan + 1}.json"
