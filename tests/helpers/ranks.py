"""Two processes that Lightning takes for those of one machine; where autograd may go on in a fork, they are forked."""

import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.multiprocessing.spawn import start_processes


def on_two_ranks(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in both; what one of them raises is raised here, too."""
    method = "fork" if torch.version.cuda is None else "spawn"
    start_processes(_call, (find_free_network_port(), function, *arguments), nprocs=2, start_method=method)


def rank() -> int:
    """Of this process; 0 where there is but one."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _call(rank: int, port: int, function: Callable[..., Any], *arguments: Any) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(*arguments)
