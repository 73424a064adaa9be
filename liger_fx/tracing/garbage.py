"""No garbage collection while many small objects are made that stay: a walk over those of a deep
model's graph takes as long as making them.

with garbage_kept(): ...   ->   gc.disable(); ...; gc.enable(), if it was
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Puts garbage collection off until the block is left."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
