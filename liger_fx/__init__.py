"""liger_fx: fused, named modules for any transformers model, by rewriting its torch.fx graph.

The names below are imported on first use, so that `import liger_fx` is cheap and a lower room can
be imported (liger_fx.kernels.rms_norm, say) without the rooms above it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0.dev0"

_HOME = {
    "optimize": "liger_fx.api",
    "trace": "liger_fx.api",
    "compare": "liger_fx.api",
    "flatten": "liger_fx.model.flatten",
    "restore": "liger_fx.model.restore",
    "verify": "liger_fx.verification",
    "save": "liger_fx.storage.save",
    "load": "liger_fx.storage.load",
    "to_folder": "liger_fx.source.folder",
    "export": "liger_fx.exporting",
    "GraphDiff": "liger_fx.report",
    "Verification": "liger_fx.verification",
    "LigerFxError": "liger_fx.errors",
    "TraceError": "liger_fx.errors",
    "VerificationError": "liger_fx.errors",
    "SaveError": "liger_fx.errors",
    "LoadError": "liger_fx.errors",
    "FallbackWarning": "liger_fx.errors",
    "RetraceWarning": "liger_fx.errors",
    "NothingRewrittenWarning": "liger_fx.errors",
    "VerificationWarning": "liger_fx.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'liger_fx' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
