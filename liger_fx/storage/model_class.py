"""The class of a saved graph's model, and the model without weights.

    "LlamaForCausalLM", LlamaConfig   ->   LlamaForCausalLM on the meta device

The class is one that transformers' own tables name, for configs of its kind. No more modules, and
none larger, are made than the saved graph has.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from liger_fx.codec import shown
from liger_fx.errors import LoadError, one_line


def is_known(cls: type, config: Any) -> bool:
    """Whether the model can be made by name: transformers' tables have its class and its config."""
    kind = str(getattr(config, "model_type", ""))
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] is not type(config):
        return False
    return cls.__name__ in _class_names() and getattr(transformers, cls.__name__, None) is cls


@functools.cache
def _class_names() -> dict[str, set[str]]:
    """The model types for which transformers' tables have each class."""
    found: dict[str, set[str]] = {}
    for table, names in vars(modeling_auto).items():
        if table.startswith("MODEL_") and table.endswith("_MAPPING_NAMES"):
            for kind, name in names.items():
                for each in [name] if isinstance(name, str) else name:
                    found.setdefault(each, set()).add(kind)
    return found


def find_class(model_type: str, name: str) -> type[PreTrainedModel]:
    """The class of that name; LoadError unless transformers' tables have it, for such configs."""
    if name not in _class_names():
        raise LoadError(f"{shown(name)} is no model class of this transformers", "class")
    try:
        cls = getattr(transformers, name)
    except (AttributeError, ImportError) as error:
        raise LoadError(f"{name} cannot be imported: {one_line(error)}", "class") from None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise LoadError(f"{shown(name)} is no model class", "class")
    wanted = getattr(cls, "config_class", None)
    fits = wanted is not None and issubclass(CONFIG_MAPPING[model_type], wanted)
    if not fits and model_type not in _class_names()[name]:
        raise LoadError(f"{name} is not made from {model_type} configs", "class")
    return cls


def build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, modules: int, largest: int
) -> PreTrainedModel:
    """The model on the meta device.

    LoadError if it cannot be, or has more ``modules`` or a tensor of more elements than given.
    """
    try:
        with torch.device("meta"), _NoInit(), _at_most(modules, largest):
            model: PreTrainedModel = cls._from_config(config)
            return model
    except LoadError:
        raise
    except Exception as error:  # a config class may accept what its model cannot be built from
        raise LoadError(f"gives no {cls.__name__}: {one_line(error)}") from None


class _NoInit(TorchFunctionMode):
    """Leaves out what would initialise tensors without memory: a third of the time they take."""

    _initialising = frozenset(filter(inspect.isfunction, vars(nn.init).values()))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._initialising:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@contextmanager
def _at_most(modules: int, largest: int) -> Iterator[None]:
    """LoadError for more modules or larger parameters than that, in models made in this thread."""
    thread, left = threading.get_ident(), modules
    error = LoadError("asks for a larger model than the one that was saved")

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise error

    def measure(parent: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        ours = threading.get_ident() == thread
        if ours and parameter is not None and parameter.numel() > largest:
            raise error

    handles = [
        register_module_module_registration_hook(count),
        register_module_parameter_registration_hook(measure),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
