"""What a model's code asks of tensors and of the process besides sizes, to be guarded.

x.stride(0), h.is_contiguous()      every tensor input must be contiguous, as in the trace
type(x), isinstance(x, Parameter)   every tensor input must be a plain tensor
x is y                              no tensor may be given twice
self.weight.requires_grad           it must be trained, or frozen, as it was
hidden.requires_grad                refused where gradients are recorded: the trace records none
torch.get_default_dtype()           must be what it was
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor

from liger_fx.tracing.fakes import node_of
from liger_fx.tracing.guards import MODES, TensorFacts, layout_of

# ``recorder`` is what records the calls of this thread, if anything does.
of_thread = threading.local()


class CannotRecord(Exception):
    """A value reached the graph of which no node is known, or a question has no answer that could
    be guarded; its text says which.

    The trace is told at once: the model's own ``except`` may be around it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        recorder = getattr(of_thread, "recorder", None)
        if recorder is not None:
            recorder.owner.failed(self)


class Asking(Protocol):
    """What is asked of the tracer."""

    def note_question(self, what: str) -> None:
        """The code of the innermost module call asked about this."""

    def path_of_real(self, tensor: torch.Tensor) -> str | None:
        """Where the model holds a parameter, buffer or plain tensor."""


class AskedFacts:
    """The questions of one trace. ``grad_mode_asked``: whether the code asked for the grad mode, or
    changes it; ``layout_asked``: whether it asked how a tensor lies in memory;
    ``fixed_shape_asked``: or for the shape of one in which no size of the call is; ``class_asked``:
    of which class one is. ``compares``: whether code that may be followed compares objects;
    ``twins``: what may have given one object in two places then, for which the trace has two."""

    def __init__(self, owner: Asking) -> None:
        self.owner = owner
        self.grad_mode_asked = self.layout_asked = False
        self.fixed_shape_asked = self.class_asked = False
        self.compares = False
        self.twins: str | None = None
        self.modes: dict[str, Any] = {}
        self.tensors = TensorFacts()

    def ask_about_gradients(self) -> None:
        """The code asked for the grad mode, or for what follows from it."""
        self.grad_mode_asked = True
        self.owner.note_question("whether gradients are recorded")

    def note_twins(self, what: str) -> None:
        """This may give back the very object that it was given."""
        self.twins = self.twins or what

    def ask_mode(self, name: str) -> Any:
        """What a function of MODES answers."""
        return self.modes.setdefault(name, MODES[name]())

    def note(self, tensor: torch.Tensor, asked: str, kind: str | None, answer: Any) -> None:
        """A question of that kind about a tensor, and the trace's answer. CannotRecord for one that
        a trace cannot answer."""
        if kind == "version":
            raise CannotRecord("how often a tensor was written to is asked")
        if kind in ("shape", "rank") and all(type(size) is int for size in tensor.shape):
            self.fixed_shape_asked = True
        if not isinstance(tensor, FakeTensor):
            self._note_of_real(tensor, asked, kind)
        elif kind == "class":
            self.class_asked = True
        elif kind == "layout":
            self.layout_asked = True
        elif kind == "rank":
            self.owner.note_question("how many dimensions there are")
        elif kind == "gradients":
            self.ask_about_gradients()
            self.ask_mode("is_inference_mode_enabled")
            node = node_of(tensor)
            if torch.is_grad_enabled() or (node is not None and node.op == "placeholder"):
                raise CannotRecord(f"{asked} of a tensor is asked, which no trace can tell")

    def note_layout(self, path: str, tensor: torch.Tensor) -> None:
        """It is asked how this tensor of the model lies in memory."""
        self.tensors.shapes[path] = tuple(tensor.shape)
        self.tensors.layouts[path] = layout_of(tensor)

    def note_used(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """What was asked of results may come from any of these tensors of the model, by path."""
        for path, tensor in tensors.items():
            if self.fixed_shape_asked:
                self.tensors.shapes[path] = tuple(tensor.shape)
            if self.layout_asked and tensor.layout is torch.strided:
                self.note_layout(path, tensor)

    def _note_of_real(self, tensor: torch.Tensor, asked: str, kind: str | None) -> None:
        path = self.owner.path_of_real(tensor)
        if path is None:
            return
        if asked == "grad":
            raise CannotRecord(f"the gradient of {path} is asked for")
        if kind == "layout":
            self.note_layout(path, tensor)
        elif kind in ("shape", "rank"):
            self.tensors.shapes[path] = tuple(tensor.shape)
        elif kind == "class":
            self.tensors.classes[path] = type(tensor)
        elif kind == "dtype":
            self.tensors.dtypes[path] = tensor.dtype
        elif kind == "gradients":
            self.tensors.trained[path] = tensor.requires_grad
