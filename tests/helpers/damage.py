"""Files that somebody has damaged or forged, read by a process of its own, with limits of time and memory."""

import os
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.processes import fork, forked

__all__ = ["Read", "damaged", "edited", "limits", "refused_of", "respelled", "run_to_end", "small_disk"]

MEMORY = 64 * 2**20  # bytes beyond those that the process has, for files of a few thousand bytes
SECONDS = 2.0  # of processor time, for each
Read = Callable[[Path, bytes], bool]  # reads a file with a content, checks it, and says whether it was refused

SCALARS = """
0 1 -1 2 1e3 1e-3 1.0e+400 -.inf .nan NaN 1_000 0x10 0b1 0o7 1:30:00 99999999999999999999 1.7976931348623157e308 5e-324
null ~ true no on 2001-99-99 2001-01-01 = << [] {} [1] [[1,2]] {a:1} readout branch_in mlp hook 'x' "\\ud800" "\\x00"
"\\u202e" é 𝛼 &a *a &a,[*a] !!python/object/apply:os.mkdir,[made] !!python/name:os.system !!binary,aGk= !!float,x !<a>
!!set,{a} !t % @ ` | > ? - , : #
""".split()
MARKS = (b"[", b"{", b"]", b"}", b'"', b"\n", b": ", b",", b"\xff")


def damaged(content: bytes, draw: random.Random) -> bytes:
    mutated = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        start = draw.randrange(len(mutated) + 1)
        end = min(len(mutated), start + draw.choice((0, 1, 1, 4, 20, 200)))
        kind = draw.randrange(6)
        if kind == 0 and start < len(mutated):
            mutated[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            mutated[start:end] = draw.randbytes(draw.randrange(8))
        elif kind == 2:
            mutated[start:end] = mutated[start:end] * draw.choice((0, 2, 50))
        elif kind == 3:
            mutated[start:end] = draw.choice(MARKS) * draw.choice((1, 2000))
        elif kind == 4:
            del mutated[start:]
        else:
            other = draw.randrange(len(content))
            mutated[start:end] = content[other : other + 40]
    return bytes(mutated)


def edited(text: str, draw: random.Random) -> str:
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(len(lines))
        kind = draw.randrange(5)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(draw.randrange(len(lines)), lines[at])
        else:
            words = lines[at].split(" ")
            word, end = draw.choice(SCALARS).replace(",", " "), draw.choice(("", ",", "}", "]", ":"))
            words[draw.randrange(len(words))] = word + end
            lines[at] = " ".join(words)
    return "\n".join(lines) + "\n"


def respelled(content: bytes, draw: random.Random) -> bytes:
    """A text of which a word or two are others."""
    words = re.split(rb"([\s,:{}\[\]]+)", content)
    for _ in range(draw.choice((1, 1, 2))):
        words[2 * draw.randrange((len(words) + 1) // 2)] = draw.choice(SCALARS).encode("utf-8", "surrogatepass")
    return b"".join(words)


@contextmanager
def small_disk() -> Iterator[None]:
    """No file of more than 1000 bytes can be written, not even what pytest prints: leave it before the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def limits(memory: int) -> Iterator[None]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, most))

    def late(number: int, frame: Any) -> None:
        raise AssertionError("it takes too long")

    signal.signal(signal.SIGPROF, late)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def read_all(read: Read, path: Path, inputs: Iterator[bytes], count: int, results: Any) -> None:
    os.chdir(path.parent)
    refused = 0
    with limits(MEMORY):
        for number, content in enumerate(inputs):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                refused += read(path, content)
            except BaseException as error:
                path.with_suffix(".bad").write_bytes(content)
                results.put(f"input {number}, kept in {path.with_suffix('.bad')}: {type(error).__name__}: {error}")
                raise
            if number + 1 == count:
                break
    results.put(refused)


def refused_of(read: Read, folder: Path, inputs: Iterator[bytes], count: int) -> int:
    """How many of the inputs were refused, by a process of its own; none may make something else happen."""
    results = fork.Queue()
    run_to_end(read_all, read, folder / "input", inputs, count, results, said=results)
    assert not (folder / "made").exists()
    return results.get(timeout=1)


def run_to_end(target: Callable[..., None], *args: Any, said: Any = None) -> None:
    (process := forked(target, *args)).join()
    assert process.exitcode == 0, said.get(timeout=1) if said and not said.empty() else f"it died: {process.exitcode}"
