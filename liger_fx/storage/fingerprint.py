"""What a graph was traced from: the text of the model's code, and the versions that ran it.

    {"code": {"transformers.models.llama.modeling_llama": "9c1f...", ...},
     "versions": {"transformers": "5.23.0", "torch": "2.13.0", ...}}

A graph says what the code did when it was traced. Where that code is another now, the graph is not
loaded. Other versions with the same code are fine.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from liger_fx.codec import shown
from liger_fx.errors import LoadError, SaveError
from liger_fx.report.facts import versions
from liger_fx.storage.model_code import ModelCode, hash_of_module
from liger_fx.storage.records import Fingerprint
from liger_fx.storage.sources import locate, module_of

# Where calls pass through, not what computes.
_LOOK_UPS = ("transformers.modeling_utils", "liger_fx.")


def fingerprint(model: ModelCode, graphs: Iterable[fx.Graph]) -> Fingerprint:
    """The hashes of the files of the model's code, and of those that nodes of its graphs come from;
    no hash stands for code that is in no file. Then, by its class, what serves a patched method."""
    names = set(model.modules)
    for graph in graphs:
        sources = {node.meta["source"] for node in graph.nodes if node.meta.get("source")}
        traced = {module_of(locate(source)[0]) for source in sources}
        names |= {name for name in traced if not name.startswith(_LOOK_UPS)}
    code = {name: hash_of_module(name) for name in sorted(names)}
    return Fingerprint({**code, **dict(sorted(model.patched().items()))}, {}, versions())


def require(record: Fingerprint) -> Fingerprint:
    """The fingerprint; SaveError where code has no file, so that no change could be noticed."""
    if nowhere := [name for name, digest in record.code.items() if not digest]:
        raise SaveError(
            f"The code of {_few(nowhere)} is in no file, so that a later change of it could not be "
            "noticed: put it into a module."
        )
    return record


def compare(saved: Fingerprint, now: Fingerprint) -> None:
    """LoadError, naming what changed, unless the code is what it was."""
    # with a colon, earlier versions named single functions
    then = {name: digest for name, digest in saved.code.items() if ":" not in name}
    code = {**{name: hash_of_module(name) for name in then}, **now.code}
    changed = sorted(name for name in code if then.get(name) != code[name])
    if not changed:
        return
    pairs = [
        f"{name} {saved.versions.get(name, 'none')}, here {version}"
        for name, version in now.versions.items()
        if saved.versions.get(name) != version and name != "python"
    ]
    versions_then = f" It was saved with {'; '.join(pairs)}." if pairs else ""
    raise LoadError(
        f"the code that the graph was traced from has changed ({_few(changed)})."
        f"{versions_then} The graph could compute something else than the model: make it anew with "
        "liger_fx.optimize",
        "fingerprint",
    )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(shown(name).strip("'") for name in names[:4]) + more
