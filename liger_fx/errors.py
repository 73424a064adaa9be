"""What can go wrong, in one sentence each: every error says where, why, and what to do about it."""


class LigerFxError(Exception):
    """Base of every error that liger_fx raises on purpose; its text is written for the user."""


class UsageError(LigerFxError, ValueError):
    """What was handed in cannot be worked with: no model, an unknown architecture, no inputs."""


class TraceError(LigerFxError):
    """A module that cannot be put into a graph.

    module: its path in the model ("" is the model itself).
    source: file and line of the model's code at which tracing stopped, if known.
    cause: what stopped it, without a full stop.
    way_out: what the user can do, as a full sentence.
    """

    def __init__(
        self, module: str, source: tuple[str, int] | None, cause: str, way_out: str
    ) -> None:
        self.module, self.source, self.cause, self.way_out = module, source, cause, way_out
        where = f" ({source[0]}:{source[1]})" if source else ""
        super().__init__(f"Cannot trace {module or 'the model'}{where}: {cause}. {way_out}")

    def __reduce__(self) -> tuple[type["TraceError"], tuple[object, ...]]:
        return type(self), (self.module, self.source, self.cause, self.way_out)


class MissedSiteError(LigerFxError):
    """strict=True, and a site that looked like one was not rewritten, or none was found at all."""


class VerificationError(LigerFxError):
    """The optimised model is less accurate than promised, or verifying it was not possible."""


class LigerFxWarning(UserWarning):
    """Base of every warning that liger_fx gives."""


class NothingRewrittenWarning(LigerFxWarning):
    """optimize() rewrote no site at all: the result computes exactly what the model does."""


class FallbackWarning(LigerFxWarning):
    """A call that no graph serves ran the model's original forward; given once per reason."""


def one_line(error: BaseException) -> str:
    """What an error of any library says, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
