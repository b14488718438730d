"""Run independent tasks in this process or in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from typing import TypeVar

from tidali.errors import TidaliError
from tidali.hardware.limits import cpu_count
from tidali.hardware.processes import own_import_path

T = TypeVar("T")
R = TypeVar("R")


def run_tasks(job: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    """Each task's index and result, in the order in which they finish.

    Raises:
        TidaliError: a task failed, or a worker died; the other tasks are abandoned at once.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        return ((index, job(task)) for index, task in enumerate(tasks))
    return _run_in_pool(job, tasks, workers)


def in_task_order(found: Iterable[tuple[int, R]], on_done: Callable[[int], None] = lambda index: None) -> list[R]:
    """The results of all tasks.

    Args:
        found: each task's index and result, in any order.
        on_done: called with the index of each task as it finishes.
    """
    results = {}
    for index, result in found:
        results[index] = result
        on_done(index)
    return [results[index] for index in range(len(results))]


def default_workers() -> int:
    """One more than there are cores, because each spends at least a tenth of its time waiting for the disk to sync a shard.

    Packing 110,000 images on two cores took 16.6 to 18.1 s with three workers and 18.4 to 19.7 s with two, taking turns.
    """
    return cpu_count() + 1


def start_early() -> None:
    """Start the server that workers are forked from, which imports for 0.4 s, while the caller still does other work."""
    _context()


def _context() -> multiprocessing.context.ForkServerContext:
    """Not plain fork: the packer may be called from a process with threads."""
    context = multiprocessing.get_context("forkserver")
    if sys.version_info >= (3, 11):  # an earlier one would import from the current folder, see `own_import_path`
        context.set_forkserver_preload(["shards.write"])
    resource_tracker.ensure_running()  # it unblocks signals, so it has to be there before they are blocked
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # else Ctrl-C while the server imports is a traceback
    try:
        with own_import_path():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


def _run_in_pool(job: Callable[[T], R], tasks: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    children_before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=_context(), initializer=_start_worker)
    try:
        futures: dict[Future[R], int] = {pool.submit(job, task): index for index, task in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
        pool.shutdown()
    except BaseException as error:
        # At once, as a kill would: the next run repeats the unfinished tasks.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - children_before:
            process.terminate()
            process.join()
        if isinstance(error, BrokenProcessPool | EOFError | ConnectionError):  # the latter two: the server died
            text = "a worker process died (killed, or out of memory); run the same command again to resume"
            raise TidaliError(text) from None
        raise


def _start_worker() -> None:
    """Exit when the parent dies, for whatever reason: an orphan would wait for work for ever. Ctrl-C is left to the parent: the
    server's children inherit that it is blocked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
