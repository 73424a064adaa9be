"""Mutations of the files of a saved graph: JSON by its structure, anything by its bytes.

mutate("graph.json", b'{"schema": 1, ...}', random)   ->   b'{"schema": "os.system", ...}'
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Values that mean something somewhere: paths into Python, file names, extremes, forms of values.
ATTACKS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, -(2**63), 0.0, 1.5, 1e308,
    "", " ", "x", "self", "class", "import", "None", "__class__", "__init__", "__globals__",
    "__reduce__", "__import__('os').system('true')", "os.system", "os:system", "posix.system",
    "subprocess.Popen", "subprocess:Popen", "builtins.eval", "builtins:eval", "builtins.exec",
    "operator.attrgetter", "operator.methodcaller", "torch.load", "torch.hub.load", "torch.save",
    "torch.ops.load_library", "importlib.import_module", "getattr", "torch.set_grad_enabled",
    "torch.enter_autocast", "torch.exit_autocast", "liger_fx.attention", "liger_fx.build_mask",
    "liger_fx.cache_call", "liger_fx.model_output", "liger_fx.new_cache", "liger_fx.resolve",
    "torch.add", "torch.nn.functional.linear", "operator.getitem", "register_hook", "apply_",
    "numpy", "data_ptr", "to", "view", "save_pretrained", "push_to_hub", "model", "model.config",
    "model.layers.0", "lm_head", "model.__class__", "model..norm", "../../etc/passwd",
    "/etc/passwd", "..\\..\\x", "a/b.safetensors", "x.safetensors", "graph.json", "kernels/x",
    "cpu", "cuda", "cuda:99", "meta", "xla", "float32", "float64", "int64", "complex64", "F32",
    "BF16", "I64", "parameter", "buffer", "constant", "attribute", "LigerRMSNorm",
    "LigerSwiGLUMLP", "LigerRotaryEmbedding", "Linear", "LlamaForCausalLM", "MistralForCausalLM",
    "PreTrainedModel", "Trainer", "AutoModel", "llama", "mistral", "gpt2", "sdpa", "eager",
    "flash_attention_2", "flex_attention", "batch", "sequence", "batch * sequence", "batch > 1",
    "sequence == 11", "(lambda: 1)()", "batch if open('x') else 1", "1 // 0", "9 ** 9 ** 9 ** 9",
    "-" * 600 + "1", "(" * 300, "\x00", "\ud800", "\u0131", "a" * 10_000, "create_causal_mask",
    "transformers.modeling_outputs:CausalLMOutputWithPast", "transformers.modeling_outputs:torch",
    "transformers.models.llama.modeling_llama:eager_attention_forward",
    "transformers.models.llama.modeling_llama:LlamaModel", "placeholder", "call_function",
    "call_method", "call_module", "get_attr", "output", [], {}, [[]], [None], {"": None},
    {"node": "input_ids"}, {"node": "nowhere"}, {"node": None}, {"tuple": []}, {"tuple": None},
    {"slice": [None, 1]}, {"slice": ["a", None, None]}, {"ellipsis": True}, {"float": "inf"},
    {"float": "nan"}, {"dtype": "float64"}, {"dtype": "object"}, {"device": "meta"},
    {"dict": {"a": 1}}, {"dict": {"a b": 1}}, {"layout": "strided"}, {"pickle": "gASVAA=="},
    {"__float__": "Infinity"}, {"__float__": "x"},
    {"auto_map": {"AutoModel": "x--y"}}, {"dtype": "float32", "shape": [2**40], "data_offsets": []},
]  # fmt: skip
KEYS = [
    "auto_map", "quantization_config", "_attn_implementation", "attn_implementation", "__class__",
    "to_dict", "from_dict", "torch_dtype", "dtype", "num_hidden_layers", "num_labels",
    "layer_types", "compile_config", "custom_generate", "same_as", "frozen", "also", "args",
    "kwargs", "spec", "device", "rewrite", "source", "materialise", "default", "implementation",
    "size", "self", "__metadata__", "per_layer_config", "rope_parameters", "output_attentions",
    "name_or_path",
]  # fmt: skip


def mutate(name: str, data: bytes, rng: random.Random) -> bytes:
    """A damaged version of a file; now and then it is only another spelling of the same."""
    if rng.random() < 0.25:
        return _mutate_bytes(data, rng)
    if name == "graph.json" and rng.random() < 0.15:
        document = json.loads(data)
        attack_graph(document, rng)
        return _dump(document)
    if name.endswith(".json"):
        return _dump(_mutate_json(json.loads(data), rng))
    length = int.from_bytes(data[:8], "little")
    header = _dump(_mutate_json(json.loads(data[8 : 8 + length]), rng))
    stated = len(header) if rng.random() < 0.95 else rng.choice([0, 1, length, 2**62, 2**64 - 1])
    return stated.to_bytes(8, "little") + header + data[8 + length :]


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        start = rng.randrange(len(out) + 1)
        end = min(len(out), start + rng.choice([1, 2, 16, 300]))
        kind = rng.randrange(6)
        if kind == 0 and start < len(out):
            out[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[start:end]
        elif kind == 2:
            out[start:start] = out[start:end]
        elif kind == 3:
            out[start:start] = rng.randbytes(rng.choice([1, 4]))
        elif kind == 4:
            del out[start:]
        else:
            out[start:end] = rng.choice(
                [b"\x00", b"[", b"{", b"}", b'"', b",", b"9" * 5000, b"NaN"]
            )
    return bytes(out)


# -- attacks that take more than one place ---------------------------------------------------------

_GUARDS = [
    "batch / (batch - 2) > 0", "((batch**8)**8)**8 > 1", "1/0 > 1", "max() > 1", "abs(1, 2) > 0",
    "round(batch, -10**9) > 0", "batch > 1 # ", "(batch >\n1)", "batch - batch",
]  # fmt: skip
_VIEWS: list[tuple[str, str, list[Any]]] = [
    ("call_function", "getattr", ["data"]), ("call_method", "detach", []),
    ("call_method", "view", [-1]), ("call_function", "operator.getitem", [0]),
    ("call_function", "torch.transpose", [0, -1]), ("call_method", "float", []),
    ("call_function", "torch.add", [1]), ("call_method", "chunk", [2]),
]  # fmt: skip
_WRITES: list[tuple[str, str, list[Any]]] = [
    ("call_method", "fill_", [0.5]), ("call_method", "zero_", []),
    ("call_function", "operator.setitem", [0, 0.5]), ("call_function", "operator.iadd", [1]),
    ("call_function", "torch.nn.init.zeros_", []), ("call_method", "requires_grad_", [False]),
    ("call_function", "torch.nn.functional.relu", [True]),
]  # fmt: skip


def attack_graph(document: Any, rng: random.Random) -> None:
    """Change a whole graph.json in several places at once, so that its parts still agree."""
    plan = rng.choice(document["blocks"][0]["plans"])
    guards, nodes = plan["guards"], plan["nodes"]
    text = str(rng.choice([*KEYS, *ATTACKS]))
    kind = rng.randrange(5)
    if kind == 0:
        document["implementations"][text] = {"attention": "eager", "experts": None}
    elif kind == 1:  # an input, renamed wherever it is named
        record = rng.choice([node for node in nodes if node["op"] == "placeholder"])
        guards["inputs"][text] = guards["inputs"].pop(record["target"])
        record["target"] = text
    elif kind == 2:
        guards["constants"][rng.choice(["use_cache", text])] = copy.deepcopy(rng.choice(ATTACKS))
    elif kind == 3:
        guards["sizes"].append(rng.choice(_GUARDS))
    else:
        _overwrite(document, nodes, rng)


def _overwrite(document: Any, nodes: list[Any], rng: random.Random) -> None:
    """A tensor of the model, some views of it, and a write."""
    name = "zz_0"
    added = [{"name": name, "op": "get_attr", "target": rng.choice(document["tensors"])["path"]}]
    for op, target, rest in [*rng.choices(_VIEWS, k=rng.randrange(3)), rng.choice(_WRITES)]:
        args = [{"node": name}, *rest]
        name = f"zz_{len(added)}"
        added.append({"name": name, "op": op, "target": target, "args": args})
    nodes[2:2] = added


def _mutate_json(value: Any, rng: random.Random) -> Any:
    root = [value]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(root))
        if not places:  # the whole was removed
            break
        parent, key = rng.choice(places)
        _change(parent, key, places, rng)
    return root[0] if root else None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything below ``value``, itself a container."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def _change(parent: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    kind = rng.randrange(8)
    if kind <= 2:
        parent[key] = copy.deepcopy(rng.choice(ATTACKS))
    elif kind == 3:  # something else of the same file
        other, there = rng.choice(places)
        parent[key] = copy.deepcopy(other[there])
    elif kind == 4:
        del parent[key]
    elif kind == 5 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
    elif kind == 5:
        parent[rng.choice(KEYS)] = copy.deepcopy(rng.choice(ATTACKS))
    elif kind == 6 and isinstance(parent, list):
        rng.shuffle(parent)
    elif kind == 6:
        new = rng.choice([*KEYS, str(rng.choice(ATTACKS))])
        parent[new] = parent.pop(key)
    else:
        parent[key] = _nudged(parent[key], rng)


def _nudged(value: Any, rng: random.Random) -> Any:
    if type(value) is bool:
        return not value
    if isinstance(value, int | float):
        return rng.choice([value + 1, -value, value * 2, value * 1000, str(value)])
    if isinstance(value, str):
        return rng.choice(
            [f"{value}x", value[:-1], f"{value}.{value}", f"__{value}", value.upper()]
        )
    return [value]
