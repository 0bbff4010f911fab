"""An error at a line of the package, whichever is chosen, while something runs."""

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mlu_lightning

PACKAGE = Path(mlu_lightning.__file__).parent
Line = tuple[str, int]


class Injection:
    """Raises an error at the n-th time that a line of some folders or files is reached; counts how often lines are."""

    def __init__(
        self, parts: list[str], at: tuple[Line, int] | None = None, error: BaseException | None = None
    ) -> None:
        self.counts: defaultdict[Line, int] = defaultdict(int)
        self.happened = False
        self._prefixes = tuple(str(PACKAGE / part) for part in parts)
        self._at, self._error = at, error

    def run(self, do: Callable[[], object]) -> BaseException | None:
        """Run something; what it raised."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            do()
        except BaseException as error:
            return error
        finally:
            sys.settrace(before)
        return None

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        # errors in finalizers, which run at any time, are printed by Python and not raised
        finalizes = frame.f_back is not None and frame.f_back.f_code.co_filename == weakref.__file__
        return self._line if frame.f_code.co_filename.startswith(self._prefixes) and not finalizes else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            line = frame.f_code.co_filename.removeprefix(str(PACKAGE)), frame.f_lineno
            self.counts[line] += 1
            if self._at == (line, self.counts[line]):
                self.happened = True
                assert self._error is not None
                raise self._error
        return self._line
