"""The proof of promise 6: an optimised model against its original, both against float64."""

from liger_fx.verification.verdict import Verification, verify

__all__ = ["Verification", "verify"]
