"""Independent tasks on any machines, through ``joblib.Parallel``: serial, loky, Ray or dask, with the same numbers.

A task writes what it makes into its own folder and returns a small record, which is kept beside it: a task that has a
record is never done twice. A worker that dies costs its task, which is given out again and goes on from its own
checkpoint. Every task has one intra-op thread, in every backend.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from local_elasticity.base.checks import check_choice, check_text, check_whole
from local_elasticity.base.errors import InputError, first_line, missing_extra
from local_elasticity.base.files import told_of_disk

Backend = Literal["serial", "loky", "ray", "dask"]
ANSWER_SECONDS = 5.0  # a cluster that takes longer to accept a connection does not answer
START_SECONDS = 60.0  # what answers at all may be busy
ATTEMPTS = 4  # rounds in which no task is finished before it is no accident
PORTS = {"ray": 6379, "dask": 8786}
START = {"ray": "ray start --head --port=6379", "dask": "dask scheduler"}
LOST = (  # what the backends raise when a worker is gone
    *("TerminatedWorkerError", "BrokenProcessPool", "ActorDiedError", "ActorUnavailableError", "RayActorError"),
    *("WorkerCrashedError", "NodeDiedError", "OwnerDiedError", "OutOfMemoryError", "KilledWorker", "CommClosedError"),
)


@dataclass(frozen=True)
class Workers:
    """Where tasks run.

    Attributes:
        backend: "serial" (this process), "loky" (processes on this machine), "ray" or "dask" (a cluster).
        jobs: tasks at once; with Ray and dask also the workers of a cluster that is started here for want of one.
        address: of a running cluster: "HOST:PORT" (Ray also "auto", "ray://HOST:PORT"; dask "tcp://HOST:PORT", or a
            scheduler file).
    """

    backend: Backend = "serial"
    jobs: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        """Refuse what names no workers."""
        check_choice("backend", self.backend, Backend)
        check_whole("jobs", self.jobs)
        check_text("address", self.address, or_none=True)
        if self.address and self.backend not in PORTS:
            raise InputError(
                expected="no address: only ray and dask have clusters",
                got=f"{self.address!r} with backend {self.backend!r}",
                do="add --backend ray or --backend dask",
            )

    @property
    def words(self) -> str:
        """One line for people."""
        if self.backend == "serial":
            return "one task after the other in this process"
        where = f" of the cluster at {self.address}" if self.address else ""
        return f"{self.jobs} {self.backend} worker{'s' if self.jobs > 1 else ''}{where}"


@dataclass(frozen=True)
class Task:
    """One independent piece of work.

    Attributes:
        name: for people.
        function: a module's own function; called with the arguments, returns a small record that JSON can hold.
        arguments: what it is called with; anything that pickles.
        record: the JSON file that the record is kept in.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    record: Path


def perform(tasks: Sequence[Task], workers: Workers | None = None) -> list[dict[str, Any]]:
    """Do the tasks that have no record yet; the records of all, in their order.

    Args:
        tasks: independent of each other, each with a record file of its own on a disk that all workers share.
        workers: where; in this process by default.

    Raises:
        InputError: what a task refused, a cluster that does not answer, or workers that keep dying.
    """
    workers = workers or Workers()
    tasks = [*tasks]
    if workers.backend == "serial" or all(task.record.exists() for task in tasks):
        return [_perform(task) for task in tasks]
    with _backend(workers) as parallel:
        _rounds(tasks, parallel)
    return [read_record(task.record) for task in tasks]


def _rounds(tasks: list[Task], parallel: Callable[[list[Task]], None]) -> None:
    """Give out what is left until nothing is; workers that die only cost another round."""
    idle, left = 0, [task for task in tasks if not task.record.exists()]
    while left:
        try:
            parallel(left)
            reason = "tasks without a record: do the workers share this disk?"
        except Exception as error:
            if not _lost(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(f"a worker was lost ({reason}); its task is given out again", stacklevel=4)
        after = [task for task in tasks if not task.record.exists()]
        idle = idle + 1 if len(after) == len(left) else 0
        left = after
        if idle >= ATTEMPTS:
            names = ", ".join(task.name for task in left)
            raise InputError(
                expected="workers that finish a task",
                got=f"{reason} ({names})",
                do="check their memory and disk; the same command goes on where this one stopped",
            )


def _lost(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, means that a worker is gone."""
    while error is not None:
        if {kind.__name__ for kind in type(error).__mro__} & set(LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def _perform(task: Task) -> dict[str, Any]:
    if task.record.exists():
        return read_record(task.record)
    with one_thread():
        record = task.function(*task.arguments)
    building = task.record.with_name(f".{task.record.name}.{os.getpid()}.partial")  # two workers may share a task
    with told_of_disk(task.record):
        task.record.parent.mkdir(parents=True, exist_ok=True)
        building.write_text(json.dumps(record, indent=2))
        os.replace(building, task.record)
    return read_record(task.record)


def read_record(path: Path) -> dict[str, Any]:
    """The record that a task left.

    Raises:
        InputError: for a damaged one.
    """
    with told_of_disk(path):
        content = path.read_text(errors="replace")
    try:
        return json.loads(content)
    except ValueError as error:
        raise InputError(
            expected="the record of a task as it was written",
            got=f"a damaged file, {path}",
            do="remove it: the same command does that task again",
        ) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread inside: sums then have one order, wherever they are made."""
    import torch

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: the process that waits ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- backends ----------------------------------------------------------------------------------------------------


@contextmanager
def _backend(workers: Workers) -> Iterator[Callable[[list[Task]], None]]:
    """What gives tasks out, and returns when all are done."""
    with {"loky": _loky, "ray": _ray, "dask": _dask}[workers.backend](workers) as give_out:
        yield give_out


def _by_joblib(workers: Workers, tasks: list[Task]) -> None:
    import joblib

    # No generator returns: Ray's backend has none. A batch is one task, so that a lost worker costs one.
    options: dict[str, Any] = {"batch_size": 1, "pre_dispatch": "all"}
    jobs = min(workers.jobs, len(tasks))
    if workers.backend == "loky":
        with _deaf_to_interrupts():  # its workers are started by the first call, and serve the second
            joblib.Parallel(n_jobs=jobs, **options)(joblib.delayed(os.getpid)() for _ in range(jobs))
    joblib.Parallel(n_jobs=jobs, **options)(joblib.delayed(_perform)(task) for task in tasks)


@contextmanager
def _loky(workers: Workers) -> Iterator[Callable[[list[Task]], None]]:
    import joblib

    with warnings.catch_warnings(), joblib.parallel_config("loky", n_jobs=workers.jobs, inner_max_num_threads=1):
        # Workers that have grown are replaced between tasks, which take minutes; nothing is lost by it.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
        yield partial(_by_joblib, workers)


@contextmanager
def _ray(workers: Workers) -> Iterator[Callable[[list[Task]], None]]:
    import joblib

    if workers.address and workers.address != "auto":
        _check_answers("ray", workers.address)
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.util.joblib import register_ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise missing_extra("ray", "ray", "workers of a Ray cluster") from None
    ours = not ray.is_initialized()
    if ours:
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if workers.address:
            settings["address"] = workers.address
        else:
            settings |= {"num_cpus": workers.jobs, "include_dashboard": False}
        try:
            with _deaf_to_interrupts():
                ray.init(**settings)
        except Exception as error:  # what a cluster can do is open-ended
            raise _no_answer("ray", workers.address or "this machine", error) from error
    try:
        register_ray()
        # A lost actor is started again by Ray, and its task with it: the pool itself would wait for it for ever.
        retries = {"max_restarts": -1, "max_task_retries": ATTEMPTS}
        with joblib.parallel_config(backend="ray", n_jobs=workers.jobs, ray_remote_args=retries):
            yield partial(_by_joblib, workers)
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _dask(workers: Workers) -> Iterator[Callable[[list[Task]], None]]:
    address = workers.address
    if address and not Path(address).is_file():
        _check_answers("dask", address)
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise missing_extra("distributed", "dask", "workers of a dask cluster") from None
    cluster = None
    try:
        if address is None:
            options: dict[str, Any] = {"dashboard_address": None, "silence_logs": 50}
            with _deaf_to_interrupts():
                cluster = LocalCluster(n_workers=workers.jobs, threads_per_worker=1, processes=True, **options)
        where: Any = cluster or (None if Path(str(address)).is_file() else address)
        file: dict[str, Any] = {"scheduler_file": address} if address and Path(address).is_file() else {}
        client = Client(where, timeout=START_SECONDS, **file)
    except (OSError, TimeoutError, ValueError) as error:
        raise _no_answer("dask", address or "this machine", error) from error

    def give_out(tasks: list[Task]) -> None:
        # Futures, not joblib, whose backend was seen to wait for ever after a worker was lost.
        client.gather(client.map(_perform, tasks, pure=False))

    try:
        yield give_out
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


def _check_answers(backend: str, address: str) -> None:
    """Knock at HOST:PORT, so that a wrong address is refused in seconds and not after a client's own patience."""
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        host, port = parts.hostname, parts.port or (10001 if parts.scheme == "ray" else PORTS[backend])
        if not host:
            raise ValueError("no host in it")
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_answer(backend, address, error) from error


def _no_answer(backend: str, address: str, error: BaseException) -> InputError:
    return InputError(
        expected=f"a {backend} cluster that answers at {address}",
        got=first_line(error),
        do=f"check host, port and firewall, and that it runs ({START[backend]!r} starts one); "
        f"its versions must be those of this environment; without --address one is started on this machine",
    )
