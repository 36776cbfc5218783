"""Run a function on several gloo ranks of this machine, each its own process.

Ranks are forked from a server that has imported the trainer once: started each on its own, four ranks took 16 s of CPU
to import it, now 0.1 s.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

from molmo2core.errors import PlatformError

Result = TypeVar("Result")
_PRELOADED = "molmo2core.training.trainer"


def run_distributed(
    fn: Callable[..., Result], ranks: int, *args: object, timeout_seconds: float = 120.0
) -> list[Result]:
    """Call `fn(*args)` on `ranks` fresh processes that share a gloo process group.

    The environment of each is torchrun's (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_*).
    As soon as one rank fails, the others are killed: they would wait for it in a collective.

    Args:
        fn: a function of an importable module (it is pickled by name), as are the things in `args`.
        ranks: number of processes.
        timeout_seconds: for everything, start-up included.

    Returns:
        What each rank returned, in order of rank.

    Raises:
        Exception: the first error of any rank, with its rank and stack in a note.
        PlatformError: a rank died without an error (a signal), or time is up.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    environment = dict(os.environ)  # the server has that of the first call
    with tempfile.TemporaryDirectory(prefix="molmo2-ranks-") as folder:
        port = _free_port()
        processes: list[ForkServerProcess] = []
        readers: dict[Connection, int] = {}
        for rank in range(ranks):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(writer, fn, args, rank, ranks, f"{folder}/store", port, timeout_seconds, environment),
            )
            process.start()
            writer.close()  # else the reader would not see the end of a rank that dies
            processes.append(process)
            readers[reader] = rank
        try:
            return _collect(readers, ranks, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()  # every result is here, or no longer wanted
                process.join()


def _collect(readers: dict[Connection, int], ranks: int, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while readers:
        ready = wait(list(readers), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise PlatformError(f"ranks {sorted(readers.values())} of {ranks}", found="no result in time")
        errors: list[tuple[float, BaseException]] = []
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = readers.pop(reader)
            try:
                moment, error, value, stack = pickle.loads(reader.recv_bytes())
            except EOFError:  # earlier than any error of another rank, which would be its consequence
                moment, error, stack = 0.0, PlatformError(f"rank {rank} of {ranks}", found="the process died"), "killed"
            if error is None:
                results[rank] = value
            else:
                error.add_note(f"on rank {rank} of {ranks}:\n{stack}")
                errors.append((moment, error))
        if errors:
            raise min(errors, key=lambda pair: pair[0])[1]
    return [results[rank] for rank in range(ranks)]


def _rank_main(
    writer: Connection,
    fn: Callable[..., Any],
    args: tuple[object, ...],
    rank: int,
    ranks: int,
    store: str,
    port: int,
    timeout_seconds: float,
    environment: dict[str, str],
) -> None:
    # A server's children would start loader workers through the server too; ranks that torchrun starts fork them.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ |= environment
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        message = _pickled(None, fn(*args), "")
    except BaseException as error:
        message = _pickled(error, None, traceback.format_exc())
    writer.send_bytes(message)
    writer.close()


def _pickled(error: BaseException | None, value: object, stack: str) -> bytes:
    moment = time.monotonic()  # one clock for all processes of a machine
    message = pickle.dumps((moment, error, value, stack))
    try:
        pickle.loads(message)  # an exception may pickle and not unpickle
    except Exception:
        message = pickle.dumps((moment, RuntimeError(f"{type(error).__name__}: {error}"), None, stack))
    return message


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
