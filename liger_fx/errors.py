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


class ResultError(LigerFxError):
    """A module that a graph calls as it is returned a tensor of another dtype, or of another size
    where it always had one, than when the model was traced."""


class MissedSiteError(LigerFxError):
    """strict=True, and a site that looked like one was not rewritten, or none was found at all."""


class VerificationError(LigerFxError):
    """The optimised model is less accurate than promised, or verifying it was not possible."""


class SaveError(LigerFxError):
    """A model that cannot be written down so that what is loaded later would be the same."""


class LoadError(LigerFxError):
    """A saved graph that is damaged, not to be trusted, or not for this model or machine.

    cause: what is wrong. place: the file, and the node or the field in it, as far as known. Both
    may hold text of the file: they are one line each, printable, and not too long.
    """

    def __init__(self, cause: str, place: str = "") -> None:
        self.cause, self.place = printable(cause, 330), printable(place, 160)
        super().__init__(f"{self.place}: {self.cause}" if place else self.cause)

    def inside(self, place: str) -> "LoadError":
        """The same error with the place completed from outside: "args[1]" in "nodes[3]"."""
        joint = "" if not self.place or self.place.startswith("[") else "."
        return LoadError(self.cause, f"{place}{joint}{self.place}")

    def __reduce__(self) -> tuple[type["LoadError"], tuple[object, ...]]:
        return type(self), (self.cause, self.place)


class LigerFxWarning(UserWarning):
    """Base of every warning that liger_fx gives."""


class NothingRewrittenWarning(LigerFxWarning):
    """optimize() rewrote no site at all: the result computes exactly what the model does."""


class VerificationWarning(LigerFxWarning):
    """optimize(verify=True) left a site alone because its named module was found at fault."""


class FallbackWarning(LigerFxWarning):
    """A call that no graph serves ran the model's original forward, or decoding steps are not
    replayed as a CUDA graph; given once per reason."""


class RetraceWarning(LigerFxWarning):
    """A saved graph was loaded with other dtypes than it holds for: its calls are traced anew."""


def printable(text: str, longest: int) -> str:
    """``text`` as one line that a terminal only shows: what is not printable escaped, what is too
    long left out in the middle."""
    if len(text) > 8 * longest:
        text = text[: 4 * longest] + text[-4 * longest :]
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    half = longest // 2 - 3
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


def one_line(error: BaseException) -> str:
    """What an error of any library says, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error that was dealt with, and of its causes: their frames hold the
    error, and what the caller gave, a cache say, until Python next collects."""
    errors: list[BaseException | None] = [error]
    while errors:
        one = errors.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            errors += (one.__cause__, one.__context__)
