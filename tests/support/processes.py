"""Runs a function in several processes connected by gloo, for tests of synchronized layers."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def member(
    rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], queue: Any
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        queue.put((rank, function(rank, size, *arguments), None))
        dist.barrier()
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `function(rank, size, *arguments)` in `size` processes.

    They are forked from a server that has imported PyTorch and has no threads yet: each import takes seconds.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "batchnorm.torch"])
    queue, port = context.Queue(), free_port()
    processes = [
        context.Process(target=member, args=(rank, size, port, function, arguments, queue)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        answers = sorted((queue.get(timeout=120) for _ in processes), key=lambda answer: answer[0])
    finally:
        for process in processes:  # they have answered, or wait for one that failed
            process.kill()
            process.join()
    for _, _, error in answers:
        assert error is None, error
    return [result for _, result, _ in answers]
