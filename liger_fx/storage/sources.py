"""Lines of model code as a file may hold them: by the module's name, not by a path of one machine.

   ("/home/me/env/.../models/llama/modeling_llama.py", 57)
<->
   ["transformers.models.llama.modeling_llama", 57]
"""

from __future__ import annotations

import sys
from dataclasses import replace

from liger_fx.engine.site import Site
from liger_fx.tracing.trace import Source

_names: dict[str, str] = {}


def write_source(source: Source) -> Source:
    """The name of the module that was read from the file, the file's own where there is none."""
    file, line = source
    return module_of(file), line


def module_of(file: str) -> str:
    """The name of the imported module whose source this file is, else the file's own name."""
    if file not in _names:
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if isinstance(path, str):
                _names[path] = name
        _names.setdefault(file, file.replace("\\", "/").rsplit("/", 1)[-1])
    return _names[file]


def locate(source: Source) -> Source:
    """File and line, where the module of that name is imported; else the same."""
    file = getattr(sys.modules.get(source[0]), "__file__", None)
    return (file if isinstance(file, str) else source[0]), source[1]


def portable(site: Site) -> Site:
    """The site with its source as ``write_source`` writes it."""
    return replace(site, source=site.source and write_source(site.source))


def located(site: Site) -> Site:
    """A ``portable`` site with the file of this machine."""
    return replace(site, source=site.source and locate(site.source))
