"""What verify found, as data: errors of the whole and of each site, and the verdict.

Findings(together=(Comparison("outputs", ...), ...), ...)   ->   .ok, .faults
"""

from __future__ import annotations

from dataclasses import dataclass

from liger_fx.verification.accuracy import Comparison
from liger_fx.verification.sites import SiteCheck


@dataclass(frozen=True)
class Findings:
    """What was found; `ok` is the verdict and `str()` the tables.

    together: the outputs, and all gradients, each as one; single: each parameter's gradient.
    sites: the named modules one by one; empty when `opt` does not come from liger_fx.
    notes: what is wrong apart from accuracy, as sentences. remarks: what was not looked at.
    """

    class_name: str
    dtype: str
    device: str
    inputs: str
    together: tuple[Comparison, ...]
    single: tuple[Comparison, ...]
    sites: tuple[SiteCheck, ...]
    notes: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def faults(self) -> tuple[str, ...]:
        """Everything that breaks the promise, the faulty sites first; empty when it holds."""
        faulty = (site for site in self.sites if site.fault)
        return (
            *(f"{s.path} ({s.class_name}, rule {s.rule}): {s.fault}" for s in faulty),
            *self.notes,
            *(_broken(c) for c in self.together if not c.ok),
            *(_broken(c) for c in self.single if not c.ok),
        )

    @property
    def ok(self) -> bool:
        """Whether the optimised model keeps promise 6."""
        return not self.faults

    @property
    def in_doubt(self) -> bool:
        """Whether nothing is wrong but errors that fail by little."""
        if self.ok or self.notes:
            return False
        failing = (c for c in (*self.together, *self.single) if not c.ok)
        return all(c.in_doubt for c in failing) and all(s.in_doubt for s in self.sites if s.fault)


def _broken(c: Comparison) -> str:
    what = c.name if c.name in ("outputs", "all gradients") else f"the gradient of {c.name}"
    return f"{what}: {c.ratio:.2f} x the original's error, more than {c.bound} x"
