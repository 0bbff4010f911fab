"""A lock for one writer of a path, which ends with its process."""

from __future__ import annotations

import errno
import hashlib
import os
import warnings
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class WriterLock:
    """Locks a path against other processes until it is released, or raises ``BlockingIOError`` if another has it.

    It is a POSIX lock on an empty hidden file beside the path. It dies with its process, is not inherited by forks, and
    works over NFS if the server has locks; a file system without locks (Lustre may have none) gets a warning and no
    lock.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        name = hashlib.sha256(path.name.encode(errors="surrogateescape")).hexdigest()[:8]
        self._path = path.parent / f".{path.name[:40]}.{name}.lock"
        self._file: IO[bytes] | None = None
        while fcntl is not None and self._file is None:
            self._file = self._locked(path, wait)

    def release(self) -> None:
        """Let others write."""
        if self._file is not None:
            if _is_at(self._file, self._path):
                self._path.unlink()
            self._file.close()
            self._file = None

    def __enter__(self) -> WriterLock:
        return self

    def __exit__(self, *_: object) -> None:
        """Let others write."""
        self.release()

    def _locked(self, path: Path, wait: bool) -> IO[bytes] | None:
        """Lock the file that is there now; None if its owner has removed it meanwhile."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(self._path, flags, 0o666), "r+b", buffering=0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise BlockingIOError(
                    f"Another process is writing {path}. Give each a path of its own, or let that one end first."
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"The file system of {path} has no locks ({error.strerror}), so nothing keeps a second process from writing "
                "there, too. Files are whole all the same.",
                stacklevel=2,
            )
            return file
        if _is_at(file, self._path):
            return file
        file.close()
        return None


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False
