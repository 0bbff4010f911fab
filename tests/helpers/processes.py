"""Processes that tests start, and what they need."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment", "exit_code", "fork", "forked", "peak_megabytes", "run"]

fork = multiprocessing.get_context("fork")  # whose processes import nothing anew


def forked(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """A process that calls a function, and has begun."""
    process = fork.Process(target=function, args=arguments, kwargs=more)
    process.start()
    return process


def training(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """The same of a function that trains: autograd of a build for GPUs may not go on in a fork."""
    context: Any = fork if torch.version.cuda is None else multiprocessing.get_context("spawn")
    process = context.Process(target=function, args=arguments, kwargs=more)
    process.start()
    return process


def exit_code(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """Call a function that trains in a process of its own."""
    process = training(function, *arguments, **more)
    process.join()
    return process.exitcode


def environment(**variables: str) -> dict[str, str]:
    """Variables for a process on one core that imports what this process does."""
    paths = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths, **variables}


def run(code: str) -> Any:
    """Run Python code; what it prints last, read as JSON."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def peak_megabytes() -> float:
    """The most memory that this process has had, on Linux; ``getrusage`` tells that of its parent if it is more."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
