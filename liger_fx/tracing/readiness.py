"""Models that no trace may enter as they are, found before anything of theirs runs.

cpu_offload(model)               ->  each module has a forward of its own, that swaps weights
nn.LazyLinear(16), never called  ->  the first call gives its parameters their shape
"""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from liger_fx.errors import TraceError


def refuse_unready(root: nn.Module) -> None:
    """TraceError where a module's forward is the instance's own, or a parameter has no shape yet.

    The forward of an optimised model's root is not looked at: what wraps it runs around the graph.
    """
    optimised = hasattr(root, "model_class")
    for path, module in root.named_modules():
        if "forward" in module.__dict__ and not (optimised and module is root):
            hooked = hasattr(module, "_hf_hook")
            raise TraceError(
                path,
                None,
                f"{type(module).__name__} has a forward of its own in place of its class's"
                + (", set by a hook of accelerate" if hooked else ""),
                "Optimise the model first and put it on afterwards, or take it off: accelerate's "
                "hooks go with accelerate.hooks.remove_hook_from_submodules(model)."
                if hooked
                else "Delete that attribute, or make it the forward of a class.",
            )
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and is_lazy(tensor):
                raise TraceError(
                    path,
                    None,
                    f"{name} of {type(module).__name__} has no shape before its first call",
                    "Run the model on a batch first, and then optimise it.",
                )
