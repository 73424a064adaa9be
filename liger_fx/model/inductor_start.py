"""What Inductor needs before it can compile, made ready while Dynamo is at work.

    Dynamo follows the model    beside it: Inductor's workers start, PyTorch's files are hashed for
                                its caches; for a CPU its vector instructions are tried out
    Inductor compiles           with what is there by then; for the rest it waits

The first compile of a process spends seconds on that, most of them in other processes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import maybe_warm_pool


class InductorStart:
    """Begins at once. for_cpu: whether code for a CPU will be compiled."""

    def __init__(self, *, for_cpu: bool) -> None:
        self._has_workers = threading.Event()
        self._thread = threading.Thread(target=self._start, args=(for_cpu,), daemon=True)
        self._thread.start()

    def _start(self, for_cpu: bool) -> None:
        try:
            maybe_warm_pool()
        finally:
            self._has_workers.set()
        if for_cpu:
            cpu_vec_isa.valid_vec_isa_list()  # which PyTorch keeps

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within it Inductor finds the workers there, and waits for the vector instructions where
        it asks for them: to try them out twice at a time is not safe. (Dynamo compiles for one
        thread at a time.)"""
        self._has_workers.wait()
        kept: Any = cpu_vec_isa
        found = kept.valid_vec_isa_list

        def waiting() -> Any:
            self._thread.join()
            return found()

        kept.valid_vec_isa_list = waiting
        try:
            yield
        finally:
            kept.valid_vec_isa_list = found
