"""Mark errors of the user's own code as such."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType


class UserErrors(AbstractContextManager[None]):
    """Names what was run, and what to do, in errors that do not come from this package itself."""

    def __init__(self, what: str, advice: str) -> None:
        self._what, self._advice = what, advice

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Mark an error, unless this package has raised it itself, which raises no errors of names and keys."""
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        if traceback is None or not isinstance(error, Exception):
            return
        frame = traceback.tb_frame
        own = str(frame.f_globals.get("__name__")).startswith(f"{__package__.partition('.')[0]}.")
        watched = frame.f_code.co_name == "__torch_function__"  # a torch function
        if not own or watched or isinstance(error, (AttributeError, LookupError)):
            raise RuntimeError(f"{self._what} and raised {type(error).__name__}: {error}. {self._advice}") from error
