"""Write files atomically: a new one replaces an older one when all of it is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files; no older one is replaced before all of the new ones are complete, so that an error changes none."""
    temporary = {path: path.with_name(f".{token_hex(8)}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            if path.exists() and not path.is_file():
                path.write_bytes(content)  # to a device or a pipe; a folder is an error
                del temporary[path]
                continue
            # no fsync: what a killed process has written is not lost, the system has it. Only a power failure may lose or
            # garble the last file.
            with open(temporary[path], "xb") as file:  # a name that nobody foresees, and no link is followed
                file.write(content)
        for path, other in temporary.items():
            os.replace(other, path)
    finally:
        for other in temporary.values():
            other.unlink(missing_ok=True)
