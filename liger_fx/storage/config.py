"""The config of a saved graph's model, as transformers writes and reads it.

    {"model_type": "llama", ...}                       ->  LlamaConfig
    {"auto_map": ...}, {"quantization_config": ...}    ->  LoadError

What a config may ask for beyond plain values (code of a hub, quantisation) is refused.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from liger_fx.codec import expect, inside, shown
from liger_fx.errors import LoadError, one_line
from liger_fx.storage.facts import config_facts as facts
from liger_fx.storage.records import Implementations
from liger_fx.storage.values import read_dtype

_KEY = re.compile(r"(?!__)[A-Za-z_][\w.-]{0,199}|\d{1,9}", re.ASCII)
_ELSEWHERE = re.compile(r"(hf[-_]hub|local-dir|file|https?|ftp):", re.IGNORECASE)
_REFUSED = {
    "auto_map": "code of a hub",
    "quantization_config": "quantised weights",
    "use_pretrained_backbone": "weights of a hub",
    "trust_remote_code": "code of a hub",
    "compile_config": "compilation",
    "custom_generate": "code of a hub",
    "backbone": "a model by its name",
}
# Sizes of a model are below. Counts, which something is made for each of, are far below.
_LARGEST, _LARGEST_COUNT = 2**24, 2**16
_COUNT = re.compile(r"(?!.*size)(num_|n_(?!positions|ctx)|.*(layer|label|head|expert|block))")


def check_config(raw: Any) -> dict[str, Any]:
    """``raw``, the object of a config.json that asks for nothing but a model of plain values."""
    expect(raw, dict)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise LoadError(f"{shown(kind)} is no model type of this transformers", "model_type")
    check_plain(raw)
    return raw


def check_plain(value: Any, place: str = "") -> None:
    """LoadError for keys that are no plain names, what is not run, and numbers beyond all sizes."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_entry(key, item, place)
            if key not in ("id2label", "label2id"):
                check_plain(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, place)


def _check_entry(key: str, item: Any, place: str) -> None:
    if key != "__float__" and (not _KEY.fullmatch(key) or _is_taken(key)):
        raise LoadError(f"{shown(key)} is no field of a config", place)
    if key in _REFUSED and item:
        raise LoadError(f"asks for {_REFUSED[key]}, which is not loaded", key)
    if key.endswith("_implementation") and isinstance(item, str) and "/" in item:
        raise LoadError(f"asks for code of a hub: {shown(item)}", key)
    if isinstance(item, str) and _ELSEWHERE.match(item):
        raise LoadError(f"asks for something from elsewhere: {shown(item)}", key)
    if key in ("dtype", "torch_dtype") and isinstance(item, str):
        with inside(key):
            read_dtype(item.removeprefix("torch."))  # transformers looks it up in torch
    largest = _LARGEST_COUNT if _COUNT.match(key) else _LARGEST
    if type(item) is int and abs(item) > largest and not _is_base(key):
        raise LoadError(f"{shown(item)} is larger than any size of a model", key)


def _is_taken(key: str) -> bool:
    """Whether a config's class has a method or a table of that name, which the value would hide."""
    for cls in (PreTrainedConfig, GenerationConfig):
        found = inspect.getattr_static(cls, key, None)
        if isinstance(found, property):
            if found.fset is None:
                return True
        elif callable(getattr(cls, key, None)) or isinstance(found, dict):
            return True
    return False


def _is_base(key: str) -> bool:
    """Whether it is the base of rotary frequencies, a large number that is no size."""
    return "theta" in key or "base" in key


def config_text(config: PreTrainedConfig, class_name: str) -> bytes:
    """config.json as transformers writes it, for a model of this class."""
    raw = json.loads(config.to_json_string())
    return (
        json.dumps({**raw, "architectures": [class_name]}, indent=2, sort_keys=True) + "\n"
    ).encode()


def generation_text(config: GenerationConfig) -> bytes:
    """generation_config.json as transformers writes it."""
    return str(config.to_json_string()).encode()


def implementations(config: PreTrainedConfig) -> dict[str, Implementations]:
    """Attention and experts implementation of a config and its parts: no config.json has them."""
    found = {"": _implementation_of(config)}
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            found[name] = _implementation_of(part)
    return found


def _implementation_of(config: PreTrainedConfig) -> Implementations:
    return Implementations(
        attention=getattr(config, "_attn_implementation", None),
        experts=getattr(config, "_experts_implementation", None),
    )


def check_parts(record: Iterable[str], model_type: str) -> None:
    """LoadError unless each part is one that configs of this type have."""
    known = CONFIG_MAPPING[model_type].sub_configs
    for part in record:
        if part and part not in known:
            raise LoadError(f"{shown(part)} is no part of a {model_type} config")


def read_config(raw: Mapping[str, Any], chosen: Mapping[str, Implementations]) -> PreTrainedConfig:
    """The config of a checked ``raw``, with the implementations that were ``chosen``."""
    cls: Any = CONFIG_MAPPING[raw["model_type"]]
    try:
        config: PreTrainedConfig = cls.from_dict(_special_floats(raw))
        choose(config, chosen)
    except LoadError:
        raise
    except Exception as error:  # a config class may refuse its fields in any way it likes
        raise LoadError(f"is no {raw['model_type']} config: {one_line(error)}") from None
    return config


def choose(config: PreTrainedConfig, chosen: Mapping[str, Implementations]) -> None:
    """Set the implementations that ``implementations`` wrote down."""
    for part, names in chosen.items():  # the whole first: it sets those of its parts, too
        inner: Any = _part(config, part) if part else config
        inner._attn_implementation = names.attention
        if hasattr(inner, "_experts_implementation"):
            inner._experts_implementation = names.experts


def _part(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    found = getattr(config, name) if name in type(config).sub_configs else None
    if not isinstance(found, PreTrainedConfig):
        raise LoadError(f"has no part {shown(name)}")
    return found


def _special_floats(value: Any) -> Any:
    """What JSON has no numbers for, as transformers writes it: {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(str(value["__float__"]))
        return {key: _special_floats(item) for key, item in value.items()}
    return [_special_floats(item) for item in value] if isinstance(value, list) else value


def read_generation(raw: Mapping[str, Any]) -> GenerationConfig:
    """The generation config of a checked ``raw``."""
    try:
        return GenerationConfig.from_dict(_special_floats(raw))
    except Exception as error:  # its class may refuse fields in any way it likes
        raise LoadError(f"is no generation config: {one_line(error)}") from None


def compare(wanted: PreTrainedConfig, model: PreTrainedConfig) -> None:
    """LoadError, naming the field, unless both say the same; attention may differ."""
    ours, theirs = facts(wanted), facts(model)
    different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if different:
        key = different[0]
        raise LoadError(
            f"is {shown(theirs.get(key))} in the model, {shown(ours.get(key))} here", key
        )
