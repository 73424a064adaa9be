"""Attention, mask builders and caches as seen by a trace: one node each, never traced through.

What an attention implementation or a mask builder does inside depends on the implementation, the
device and the data (an all-ones mask is dropped); as leaves they decide when the graph runs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from liger_fx.tracing import leaves
from liger_fx.tracing.asked import CannotRecord
from liger_fx.tracing.call import PLAIN
from liger_fx.tracing.fakes import node_of
from liger_fx.tracing.members import Members
from liger_fx.tracing.positions import without_counted_positions
from liger_fx.tracing.recorder import Recorder
from liger_fx.tracing.stand_ins import Host, Origin, become, origin_of


class TransformersLeaves:
    """Records the calls that the patches of transformers hand over."""

    def __init__(self, recorder: Recorder, members: Members, host: Host) -> None:
        self.recorder, self.members, self.host = recorder, members, host
        self._masks: list[tuple[fx.Node, str]] = []
        self.masks_are_read = False

    def attention(
        self,
        interface: Any,
        implementation: str,
        default: Any,
        module: torch.nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Record ``attention_interface(module, q, k, v, mask, ...)`` and return fakes of its
        results."""
        recorder = self.recorder
        with recorder.paused():
            args, kwargs = recorder.with_fakes(args), recorder.with_fakes(kwargs)
            arguments = (recorder.argument(module), *map(recorder.argument, args))
            keywords = {key: recorder.argument(value) for key, value in kwargs.items()}
            if default is not None:
                keywords["default"] = leaves.reference_to(default)
            if implementation != getattr(
                getattr(module, "config", None), "_attn_implementation", None
            ):
                keywords["implementation"] = implementation
            if implementation == "eager" or not isinstance(args[0], torch.Tensor):
                result = _eager(interface, module, args, kwargs)
            else:
                query, value = args[0], args[2]
                shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
                result = (torch.empty(shape, dtype=value.dtype, device=value.device), None)
            node = recorder.create_node("call_function", leaves.attention, arguments, keywords)
            return recorder.bind(result, node)

    def mask(self, name: str, builder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a mask builder; its stand-in is the full mask, whatever the builder would shorten
        it to."""
        recorder = self.recorder
        given = dict(inspect.signature(builder).bind(*args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        cache = given.get("past_key_values")
        known_cache = cache is None or node_of(cache) is not None
        if (
            any(callable(value) for value in given.values() if not isinstance(value, Cache))
            or not known_cache
        ):
            return builder(
                *args, **kwargs
            )  # a mask function of the model's own: trace what it does
        with recorder.paused():
            given = recorder.with_fakes(given)
            config = given.pop("config")
            owner = self._owner_of(config)
            stand_in = self._mask_stand_in(name, config, given)
            if stand_in is None:
                return None
            keywords = {key: recorder.argument(value) for key, value in given.items()}
            keywords = without_counted_positions(name, keywords, self.members.root)
            node = recorder.create_node("call_function", leaves.build_mask, (name, owner), keywords)
            self._masks.append((node, name))
            return recorder.bind(stand_in, node)

    def _mask_stand_in(
        self, name: str, config: PreTrainedConfig, given: dict[str, Any]
    ) -> torch.Tensor | None:
        # transformers before 5.1 called it input_embeds.
        embeds = given["inputs_embeds" if "inputs_embeds" in given else "input_embeds"]
        mask = given.get("attention_mask")
        if name == "create_recurrent_attention_mask":
            return None if mask is None or mask.ndim != 2 else torch.empty_like(mask)
        if mask is not None and mask.ndim == 4:
            return torch.empty_like(mask)
        keys = given.get("encoder_hidden_states")
        keys = embeds if keys is None else keys
        width = keys.shape[1] if mask is None else mask.shape[-1]
        origin = origin_of(given.get("past_key_values"))
        if origin is not None and (origin.argument is not None or origin.changed):
            queries = self.recorder.world.hint(embeds.shape[1])
            width = self.recorder.world.fresh_size(origin.length(queries, 0))
        # Eager attention adds its mask; the others select by it.
        eager = config._attn_implementation == "eager"
        dtype = embeds.dtype if eager else torch.bool
        shape = (embeds.shape[0], 1, embeds.shape[1], width)
        return torch.empty(shape, dtype=dtype, device=embeds.device)

    def _owner_of(self, config: PreTrainedConfig) -> fx.Node:
        """The node of a module that carries this very config."""
        owner = self._find_owner(config)
        if owner is None:
            raise CannotRecord(f"a {type(config).__name__} that no module carries as .config")
        return owner

    def _find_owner(self, config: PreTrainedConfig) -> fx.Node | None:
        """The node of a module below the root that carries this very config, or of the root's
        config; None where no module does."""
        owner = self.members.owner_of_config(config)
        if owner is not None:
            return self.recorder.owner.get_attr(owner)
        if getattr(self.members.root, "config", None) is config:
            return self.recorder.owner.get_attr("config")
        return None

    def _owner_and_changes(self, config: PreTrainedConfig) -> tuple[fx.Node, dict[str, Any]]:
        """The same for a config that may be a changed copy of the root's, and the changes."""
        own, owner, changes = (
            getattr(self.members.root, "config", None),
            self._find_owner(config),
            {},
        )
        if owner is None and type(own) is type(config) and vars(own).keys() == vars(config).keys():
            changes = {k: v for k, v in vars(config).items() if v != vars(own)[k]}
            if all(isinstance(value, PLAIN) for value in changes.values()):
                owner = self._find_owner(own)
        return owner or self._owner_of(config), changes

    def materialise_masks(self) -> None:
        """Have masks built in full wherever something other than attention reads them."""
        for node, name in self._masks:
            if all(_hands_it_on(user, self.members.root) for user in node.users):
                continue
            self.masks_are_read = True
            if not leaves.MASK_BUILDERS[name] and name != "create_recurrent_attention_mask":
                raise CannotRecord(f"a mask of {name}, which may be None, and is read by its code")
            node.kwargs = {**node.kwargs, "materialise": True}

    def new_cache(
        self, init: Any, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Record the construction of a DynamicCache, empty and for a config or for none."""
        recorder = self.recorder
        with recorder.paused():
            given = dict(inspect.signature(init).bind(cache, *args, **kwargs).arguments)
            config = given.pop("config", None)
            if any(value for key, value in given.items() if key != "self"):
                raise CannotRecord("a cache that is filled or offloaded from the start")
            owner, changes = (None, {}) if config is None else self._owner_and_changes(config)
            example = object.__new__(type(cache))
            init(example, *args, **kwargs)
            node = recorder.create_node("call_function", leaves.new_cache, (owner,), changes)
            become(cache, Origin(self.host, example, node, None))

    def new_cache_pair(self, init: Any, cache: Any, caches: tuple[Any, ...]) -> None:
        """Record the construction of an EncoderDecoderCache from two caches."""
        recorder = self.recorder
        with recorder.paused():
            origins = [origin_of(inner) for inner in caches]
            if not all(origins):
                raise CannotRecord("an EncoderDecoderCache of caches that the graph does not know")
            example = object.__new__(type(cache))
            init(example, *(origin.example for origin in origins if origin))
            arguments = tuple(map(recorder.argument, caches))
            node = recorder.create_node("call_function", leaves.encoder_decoder_cache, arguments)
            become(cache, Origin(self.host, example, node, None))


def _eager(interface: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What eager attention returns. A mask says nothing about that, and may be of other sizes."""
    if len(args) > 3:
        try:
            return interface(module, *args[:3], None, *args[4:], **kwargs)
        except (TypeError, AttributeError):  # an implementation that cannot do without
            pass
    return interface(module, *args, **kwargs)


def _hands_it_on(node: fx.Node, root: torch.nn.Module) -> bool:
    """Whether the node gives a mask to attention, or to a block that sees what it was given."""
    if node.target is leaves.attention:
        return True
    return node.op == "call_module" and isinstance(
        root.get_submodule(str(node.target)), fx.GraphModule
    )
