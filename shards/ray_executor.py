"""Run shard tasks on a Ray cluster, with the same results as in local processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tidali.errors import TidaliError

T = TypeVar("T")
R = TypeVar("R")

_RETRIES = 3  # of a task whose worker or machine is lost; a task that fails by itself would fail again


def run_tasks_on_ray(job: Callable[[T], R], tasks: Sequence[T], workers: int | None) -> Iterator[tuple[int, R]]:
    """Each task's index and result, in the order in which they finish, from the cluster that ``RAY_ADDRESS`` names, or a local
    one of ``workers`` processes (None: all cores) if it is not set. The source and DEST must be reachable from its machines.

    Raises:
        TidaliError: Ray is not installed or not reachable, a task failed, or its worker was lost repeatedly.
    """
    try:
        import ray
    except ImportError:
        raise TidaliError("--executor ray needs Ray; pip install 'tidali[ray]'") from None
    ours = not ray.is_initialized()
    try:
        if ours:
            cluster: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="error", **cluster)
    except Exception as error:  # Ray has no common base of its errors
        raise TidaliError(f"Ray does not start: {error}") from None
    try:
        yield from _run(ray, job, tasks)
    finally:
        if ours:
            ray.shutdown()


def _run(ray: Any, job: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
    pickle, hiding = ray.cloudpickle, "" if Path(__file__).parents[1] == Path.cwd() else os.getcwd()

    def call(job: bytes, task: bytes) -> Any:
        """A function inside a function, and bytes, because Ray imports nothing from this package to make them: it puts the
        current folder of this process first on its workers' import path, where a folder ``shards`` or ``tidali`` would hide
        the package."""
        if hiding in sys.path:
            sys.path.remove(hiding)
        return pickle.loads(job)(pickle.loads(task))

    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(call)
    shared = ray.put(pickle.dumps(job))  # once a machine, not once a task
    waiting = {remote.remote(shared, pickle.dumps(task)): index for index, task in enumerate(tasks)}
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        try:
            result = ray.get(done)
        except ray.exceptions.RayTaskError as error:  # wraps what the task raised, with the remote traceback in its text
            if isinstance(error.cause, TidaliError):
                raise error.cause from None
            raise TidaliError(str(error).strip().splitlines()[-1]) from None
        except ray.exceptions.RayError as error:
            raise TidaliError(f"a Ray worker was lost: {str(error).splitlines()[0]}; run the same command again") from None
        yield waiting.pop(done), result
