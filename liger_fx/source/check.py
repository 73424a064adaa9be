"""Source that was written is looked at once more, as Python reads it, before it is saved.

class torch(transformers.LlamaForCausalLM): ...     ->  SaveError: the source needs torch itself
mul = 1 = 2                                         ->  SaveError
"""

from __future__ import annotations

import ast
import warnings

from liger_fx.errors import SaveError, one_line

# What folder.py and values.py write besides imports.
_NEEDED = {
    "self", "super", "dict", "enumerate", "sorted", "setattr", "getattr", "slice", "float",
    "ValueError",
}  # fmt: skip


def check_source(text: str, class_name: str) -> None:
    """SaveError unless it is Python in which no name has two meanings.

    A class or a value of a function that has the name of an import, of a builtin that the source
    calls, or of another definition would hide it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a graph computes
            compile(
                text, "module.py", "exec", dont_inherit=True
            )  # which finds more than the parser
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SaveError(f"The graph has no form as Python source: {one_line(error)}.") from None
    outer = [name for statement in tree.body for name in _defined(statement)]
    inner = {name for node in ast.walk(tree) for name in _bound_in(node)}
    if outer.count(class_name) != 1 or class_name in inner | _NEEDED:
        raise SaveError(f"{class_name!r} is a name that the source itself needs: give another.")
    taken = inner & ({*outer} | _NEEDED)
    if taken:
        raise SaveError(
            f"The graph has a value {min(taken)!r}, a name that the source itself needs."
        )


def _defined(statement: ast.stmt) -> list[str]:
    """The names that a statement of the module gives a meaning."""
    if isinstance(statement, ast.Import):
        return [(alias.asname or alias.name).partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _bound_in(node: ast.AST) -> list[str]:
    """The names that a function gives a meaning: its arguments but self, what it assigns."""
    if not isinstance(node, ast.FunctionDef):
        return []
    arguments = node.args.args[1:] if node.args.args[:1] else []
    stored = [
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    ]
    return [*(argument.arg for argument in arguments), *stored]
