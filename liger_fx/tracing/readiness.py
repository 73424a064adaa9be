"""Models that no trace may enter as they are, found before anything of theirs runs.

nn.LazyLinear(16), never called  ->  the first call gives its parameters their shape
register_module_forward_hook(f)  ->  f wants to see every module
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn
from torch.nn.parameter import is_lazy

from liger_fx.errors import TraceError
from liger_fx.tracing.tree_state import GLOBAL_HOOKS


def _own_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block without those of the blocks inside it."""
    pending = [("", block)]
    for path, module in pending:  # grows while it is walked
        yield path, module
        for name, child in module.named_children():
            if not isinstance(child, fx.GraphModule):
                pending.append((f"{path}.{name}" if path else name, child))


def refuse_unready(root: nn.Module) -> None:
    """TraceError where a parameter has no shape yet, or a hook stands on all modules of the
    process."""
    if any(GLOBAL_HOOKS):
        raise TraceError(
            "",
            None,
            "a hook stands on all modules, which a graph would skip (it was registered by a "
            "function of torch.nn.modules.module)",
            "While it stands, each module's own code runs. Without it, graphs do.",
        )
    for path, module in _own_modules(root):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and is_lazy(tensor):
                raise TraceError(
                    path,
                    None,
                    f"{name} of {type(module).__name__} has no shape before its first call",
                    "Run the model on a batch first, and then optimise it.",
                )
