"""A process that has imported torch and Lightning and nothing of this package, and answers questions in forks of itself."""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from typing import Any

from helpers.processes import environment


class Bare:
    """Starts the process when the first question comes."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, code: str, **names: str) -> str:
        """Run Python code that knows some names; what it prints."""
        if self.process is None:
            command = [sys.executable, "-W", "ignore", "-m", "helpers.bare"]
            piped: Any = {"text": True, "bufsize": 1, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(command, env=environment(), **piped)
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps([code, names]) + "\n")
        code_, printed = json.loads(stdout.readline())
        assert code_ == 0, printed
        return str(printed)

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()


def answer(code: str, names: dict[str, str], output: int) -> None:
    """In a fork: run the code with what it prints in a file, and end."""
    for stream in (1, 2):
        os.dup2(output, stream)
    failed = 0
    try:
        exec(code, names)
    except BaseException:
        traceback.print_exc()
        failed = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failed)


if __name__ == "__main__":
    import lightning.pytorch
    import torch

    assert lightning.pytorch.Trainer and not any(name.startswith("mlu_lightning") for name in sys.modules)
    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as file:
            child = os.fork()
            if child == 0:
                answer(*json.loads(line), file.fileno())
            _, status = os.waitpid(child, 0)
            file.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), file.read()]), flush=True)
