"""liger_fx.to_folder: the graph as a Python package, readable, beside its weights.

    llama_graph/__init__.py  module.py  config.json  model.safetensors  buffers.safetensors

    import llama_graph
    model = llama_graph.load()          a LlamaForCausalLM whose forward is the graph, written out

It needs torch, transformers and liger_fx's modules, and nothing that traces or rewrites.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from torch import nn

from liger_fx.errors import LoadError, SaveError, TraceError, UsageError
from liger_fx.model.block import Block
from liger_fx.model.flatten import flat_plan
from liger_fx.model.plan import Plan
from liger_fx.report.facts import versions
from liger_fx.source.check import check_source
from liger_fx.source.statements import Statements, folded
from liger_fx.source.values import (
    assign_text,
    comment,
    is_name,
    name_text,
    path_text,
    value_text,
)
from liger_fx.storage import expressions, named_modules
from liger_fx.storage.directory import Kind, first_bytes, is_file, replacing, write_file
from liger_fx.storage.files import MODEL_FILES
from liger_fx.storage.model_class import is_known
from liger_fx.storage.save import Group, wanted_tensors, write_configs, write_tensors
from liger_fx.storage.weights import Tensor, describe
from liger_fx.tracing.call import UnsupportedCall

# The first line of every module.
MODULE_MARK = "# A graph as Python source, written by liger_fx"
_MODULE = '''\
{mark} {version}.
"""One graph of a model: the operations of a call, in order.

The comment above the class says for which calls it holds; inputs, train mode and autocast are
checked at each. ``load`` gives the model with the weights beside this file.
"""

# ruff: noqa

from pathlib import Path

{imports}

HERE = Path(__file__).resolve().parent


{guards}
class {name}(transformers.{base}):
    """transformers' {base}, with liger_fx's modules in place and the graph for its forward."""

    def __init__(self, config):
        super().__init__(config)
{modules}
    def forward(self, {optional}, **others):
        _check_given({given}, others, {constants})
        self._check({inputs})
{body}

    def _check(self, {inputs}):
        """ValueError for a call that the graph was not traced for."""
{checks}

def _check_given(given, others, constants):
    """ValueError for an argument that the graph does not take, and for one that it lacks."""
    other = [n for n, v in others.items() if v is not None and v != constants.get(n)]
    lacking = [n for n, v in given.items() if v is None]
    for name in (*other, *lacking):
        raise ValueError(
            f"this graph takes {{', '.join(given)}}, so it cannot be called "
            f"{{'with this' if other else 'without'}} {{name}}; generate, which calls a model in "
            "several ways, needs the model that liger_fx.load gives"
        )


def load():
    """The model with its weights on {device}, in {mode} mode."""
    config = transformers.AutoConfig.from_pretrained(HERE)
{settings}
    with torch.device("meta"):
        model = {name}(config)
    for file in sorted(HERE.glob("*.safetensors")):
        for path, tensor in load_file(file, device={device!r}).items():
            owner, _, name = path.rpartition(".")
            module = model.get_submodule(owner)
            if name in module._parameters:
                tensor = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            setattr(module, name, tensor)
{ties}    return model.train({training})
'''


def to_folder(opt: nn.Module, folder: str | PathLike[str], module_name: str | None = None) -> None:
    """Write ``opt.graph`` as a Python package: readable source, config and safetensors weights.

    The package needs liger_fx's modules, not its tracer, and no pickle; its ``load()`` makes the
    model.

    module_name: what its class is called, the model's own name by default.

    Raises SaveError for what is no model of transformers, or when ``folder`` holds anything else;
    UsageError for what is no optimised or traced model.
    """
    if not isinstance(opt, Block):
        raise UsageError(f"Expected what optimize() returned, got a {type(opt).__name__}.")
    class_name = opt.block_class.__name__ if module_name is None else module_name
    if not is_name(class_name):
        raise SaveError(f"{class_name!r} is no name for a class.")
    if not is_known(opt.block_class, getattr(opt, "config", None)):
        raise SaveError(
            f"{opt.block_class.__name__} is no model class of transformers, so no source can make "
            "it again. Its graph is opt.code."
        )
    if not opt.plans:
        raise SaveError(f"This {class_name} has no graph of its own, only the blocks inside it.")
    try:
        flat, plan = flat_plan(opt, opt.plans[0].guards.call)
    except (TraceError, UnsupportedCall) as error:
        raise SaveError(f"This {class_name} is no one graph: {error}") from error
    tensors = describe(flat, wanted_tensors([Group([""], (), {0: plan})]))
    text = _source(flat, plan, tensors, class_name)
    check_source(text, class_name)
    with replacing(Path(folder), PACKAGE) as new:
        write_file(new / "module.py", text.encode())
        write_file(new / "__init__.py", f"from .module import {class_name}, load\n".encode())
        write_configs(opt, new)
        write_tensors(opt, new, tensors)


def _source(opt: Block, plan: Plan, tensors: list[Tensor], class_name: str) -> str:
    statements = Statements(plan.graph)
    names = [name for name, _ in plan.guards.call.leaves()]
    body = [f"        {line}" if line else "" for line in statements.lines()]
    constants = [
        f"        self.register_buffer({t.path!r}, torch.empty({list(t.shape)}), persistent=False)"
        for t in tensors
        if t.path.startswith("_tensor_constant")
    ]
    modules = [f"        {line}" for line in _module_lines(opt)] + constants
    return _MODULE.format(
        mark=MODULE_MARK,
        name=class_name,
        base=opt.block_class.__name__,
        version=versions()["liger_fx"],
        # the graph's own regions leave the caller's grad mode as it is
        guards="\n".join(comment(t) for t in plan.guards.describe() if "grad mode" not in t),
        imports="\n".join(_import_lines(opt, statements)),
        modules="".join(f"{line}\n" for line in modules),
        inputs=", ".join(map(name_text, names)),
        optional=", ".join(f"{name}=None" for name in names),
        given="{" + ", ".join(f"{name!r}: {name}" for name in names) + "}",
        constants=value_text(plan.guards.call.constants),
        body="\n".join(body),
        checks="\n".join(f"        {line}" for line in _check_lines(plan)) + "\n",
        device=str(next(opt.parameters()).device),
        mode="train" if plan.guards.training else "eval",
        settings=f"    config._attn_implementation = {opt.config._attn_implementation!r}",  # type: ignore[union-attr]
        ties="".join(f"    {line}\n" for line in _tie_lines(tensors)),
        training=plan.guards.training,
    )


def _import_lines(opt: Block, statements: Statements) -> Iterator[str]:
    named = {type(m).__name__ for m in opt.modules() if named_modules.is_named(m)}
    if not named <= named_modules.CLASSES.keys():
        raise SaveError("A model with LoRA layers cannot be written as source: merge them first.")
    imports = {**statements.imports, "safetensors.torch": {"load_file"}}
    if named:
        imports["liger_fx.modules"] = named
    if any("math." in guard for guard in opt.plans[0].guards.sizes):
        imports["math"] = set()
    yield from (f"import {name}" for name in (*_plain(imports), "torch", "transformers"))
    for module, names in sorted(imports.items()):
        if names:
            yield f"from {module} import {', '.join(sorted(names))}"


def _plain(imports: dict[str, set[str]]) -> list[str]:
    return sorted(module for module, names in imports.items() if not names)


def _module_lines(opt: nn.Module) -> Iterator[str]:
    """Lines that put each named module into its place."""
    for record in named_modules.describe(opt):
        here = path_text(record.path)
        parameters = inspect.signature(named_modules.CLASSES[record.class_]).parameters
        options = {n: v for n, v in record.options.items() if v != parameters[n].default}
        children = [f"{name!r}: {path_text(name, here)}" for name in record.children]
        given = [f"{{{', '.join(children)}}}"] if children else []
        given += [f"{name_text(name)}={value_text(value)}" for name, value in options.items()]
        roles = {} if children else named_modules.roles(record)
        given += [f"{role}={path_text(name, here)}" for role, name in roles.items()]
        yield from folded(f"{_mount(record.path)}{record.class_}(", given, "))")
        yield from (f"{_mount(path)}{here})" for path in record.also)


def _mount(path: str) -> str:
    parent, _, name = path.rpartition(".")
    return f"{path_text(parent)}.add_module({name!r}, "


def _tie_lines(tensors: list[Tensor]) -> Iterator[str]:
    for tensor in tensors:
        for path in list(tensor.places)[1:]:
            yield assign_text(path, path_text(tensor.path, "model"), "model")


def _check_lines(plan: Plan) -> Iterator[str]:
    guards = plan.guards
    conditions = [f"self.training is {guards.training}"]
    known: set[str] = set()
    for name, spec in guards.call.tensors.items():
        name_text(name)
        conditions.append(f"{name}.dtype is {spec.dtype} and {name}.dim() == {len(spec.sizes)}")
        yield f"{name}_sizes = dict(enumerate({name}.shape))"
        for i, size in enumerate(spec.sizes):
            if isinstance(size, str) and size not in known:
                known.add(name_text(size))
                yield f"{size} = {name}_sizes.get({i})"
            else:
                conditions.append(f"{name}_sizes.get({i}) == {size}")
    for device, dtype in guards.autocast.items():
        is_on = f"torch.is_autocast_enabled({device!r})"
        if dtype is None:
            conditions.append(f"not {is_on}")
        else:
            conditions.append(f"{is_on} and torch.get_autocast_dtype({device!r}) is {dtype}")
    conditions += map(_size_guard, guards.sizes)
    yield "holds = ("
    yield from (f"    {'and ' if i else ''}({text})" for i, text in enumerate(conditions))
    yield ")"
    yield "if not holds:"
    yield '    raise ValueError("this graph was traced for other calls: the file says which")'


def _size_guard(text: str) -> str:
    try:
        return expressions.check(text)
    except LoadError as error:
        raise SaveError(f"A guard of the graph cannot be written as source: {error}.") from None


def _is_module(file: Path) -> bool:
    return is_file(file) and first_bytes(file).startswith(MODULE_MARK.encode())


def _is_init(file: Path) -> bool:
    imports = rb"from \.module import \w+, load\s*"
    return is_file(file) and re.fullmatch(imports, first_bytes(file)) is not None


def _is_python_cache(folder: Path) -> bool:
    name = re.compile(r"(module|__init__)\.[\w.-]+\.pyc")
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(is_file(entry) and name.fullmatch(entry.name) for entry in folder.iterdir())


PACKAGE = Kind(
    "module.py",
    {
        r"module\.py": _is_module,
        r"__init__\.py": _is_init,
        "__pycache__": _is_python_cache,
        MODEL_FILES: is_file,
    },
)
