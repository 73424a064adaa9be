"""A number of a named module that torch.compile takes for a constant, also with dynamic=True.

    class LigerRMSNorm(NamedModule):
        eps = constant("_eps")      # self.eps = 1e-6; self.eps is 1e-06, kept as its text

Dynamo would take a float for an input that may be another at each call. An operator takes no such
thing, so that the whole was traced again for each float of each module, sixteen times for a small
model. A text is a constant that it guards; it tells the number to the last bit.
"""

from __future__ import annotations

from typing import Any


def constant(place: str) -> Any:
    """A property for a float or None, which is kept as its text under the name ``place``."""

    def get(module: Any) -> float | None:
        text = module.__dict__[place]
        return None if text is None else float(text)

    def put(module: Any, value: float | None) -> None:
        module.__dict__[place] = None if value is None else repr(float(value))

    return property(get, put)
