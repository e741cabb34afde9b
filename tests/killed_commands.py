"""Small commands that write stores, the disk that kills them at any write, and a process that is really killed.

Every command continues what is in its folder, or begins; it returns what must not depend on kills, and calls
``announce`` with what it has told its user is stored.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.base.parallel import Task, perform
from local_elasticity.runs.ensembles import is_ensemble
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.studies.engine import reproduction
from local_elasticity.studies.engine.pieces import kept
from local_elasticity.studies.engine.study import Study
from local_elasticity.training.ensemble import train as ensemble
from local_elasticity.training.ensemble.store import EnsembleStore
from local_elasticity.training.loop import Session, Training

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ANNOUNCED = 99  # where a child says what it announced


class Killed(BaseException):
    """The process is no more."""


class Disk:
    """Counts the writes below a folder, and from the one with a given number on lets none through."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.writes, self.last, self.is_torn = 0, 0, False
        self.renamed: list[tuple[int, str]] = []
        sys.addaudithook(self._look)

    def run(self, command, folder, announce, last, is_torn=False):
        """The result of the command, or None when it was killed at write ``last``.

        Torn: the file of that write is there, and empty.
        """
        self.folder, self.writes, self.last, self.is_torn, self.renamed = str(folder), 0, last, is_torn, []
        try:
            return command(folder, announce)
        except Killed:
            return None
        finally:
            self.folder = None

    def _look(self, event, arguments):
        if self.folder is None or not self._is_write(event, arguments):
            return
        self.writes += 1
        if event == "os.rename":
            self.renamed.append((self.writes, os.path.basename(arguments[1])))
        if self.writes == self.last and self.is_torn and event == "open" and arguments[2] & os.O_TRUNC:
            folder, self.folder = self.folder, None
            open(arguments[0], "wb").close()
            self.folder = folder
        if self.writes >= self.last:
            raise Killed

    def _is_write(self, event, arguments):
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & WRITES):
                return False
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"):
            return False
        path = arguments[0]
        if not isinstance(path, str | os.PathLike):
            return False
        path = os.fspath(path)
        is_inside = path.startswith(str(self.folder)) or not os.path.isabs(path)  # relative ones are rmtree's
        return is_inside and not path.endswith(".lock")  # the system gives a dead process's lock back


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, 3))


def track(folder: Path, announce):
    """As ``local-elasticity track``: a run with a checkpoint at every snapshot."""
    model = network()
    session = Session(model, F.cross_entropy, (X, Y), Training(2, 4, "adam", 0.01), checkpoints=folder / "checkpoint")
    resume = prepare_folder(folder, {"epochs": 2}, overwrite=False)
    tracker = le.Tracker(
        model,
        F.cross_entropy,
        (X[:3], Y[:3]),
        update=le.from_optimizer(session.optimizer),
        schedule=le.every(2, per="epoch"),
        store=folder / "run.zarr",
        resume=resume,
        before_commit=session.save,
    )
    if resume and tracker.resume_step:
        session.load(tracker.resume_step, tracker.checkpoint)
    for progress in session.run(tracker):
        if progress.look is not None:
            announce(progress.update)
    data = tracker.finish().dataset.load()
    result = {str(name): data[name].values for name in data.variables if name != "seconds"}
    return result | {name: value.detach().numpy() for name, value in model.state_dict().items()}


def stored_steps(folder: Path):
    return le.open_run(folder).dataset["step"].values.tolist()


def train(folder: Path, announce):
    """As ``local-elasticity train``: an ensemble that is saved at every look."""

    class Announcing(EnsembleStore):
        def save(self, *arguments):
            super().save(*arguments)
            announce(self.written)

    seconds, store = ensemble._CHECKPOINT_SECONDS, ensemble.EnsembleStore
    ensemble._CHECKPOINT_SECONDS, ensemble.EnsembleStore = 0.0, Announcing
    try:
        prepare_folder(folder, {"steps": 40}, overwrite=False)
        trained = le.train_ensemble(
            network,
            (X, Y),
            F.cross_entropy,
            lr=0.05,
            steps=40,
            replicas=3,
            route="loop",
            probes=(X, Y),
            probe=le.every(13),
            store=folder,
            resume=is_ensemble(folder),
        )
    finally:
        ensemble._CHECKPOINT_SECONDS, ensemble.EnsembleStore = seconds, store
    data = le.open_ensemble(folder).load()
    result = {str(name): data[name].values for name in data.variables}
    return result | {name: value.numpy() for name, value in trained.weights.items()}


def stored_updates(folder: Path):
    return range(int(le.open_ensemble(folder).attrs["updates"]) + 1)


def tile(folder: Path, announce):
    """A store of tiles."""
    data = le.measure_tiles(
        network(), F.cross_entropy, (X, Y), update=le.SGD(lr=0.1), out=folder / "tiles.zarr", tile=5, mode="eval"
    )
    return {str(name): data[name].values for name in data.variables}


class Toy(Study):
    """Two runs, each a task with a record, and arrays that are kept."""

    title = "toy: two runs"
    cost = {"small": "1 s", "paper": "1 s"}  # noqa: RUF012

    def run(self, scale, out, overwrite=False):
        prepare_folder(out, {"scale": scale}, overwrite=False)
        tasks = [Task(f"run {i}", piece, (out / f"run-{i}", i), out / f"run-{i}.json") for i in range(2)]
        perform(tasks)
        return 0


def piece(folder: Path, number: int):
    prepare_folder(folder, {"number": number}, overwrite=False)
    run = track(folder / "tracked", lambda step: None)
    arrays = kept(folder / "mean.npz", lambda: {"mean": run["mean"]})
    return {"mean": np.nan_to_num(arrays["mean"]).tolist()}


def study(folder: Path, announce):
    """As ``local-elasticity reproduce``."""
    known = reproduction.studies
    reproduction.studies = lambda: {"toy": Toy()}
    try:
        assert reproduction.run(reproduction.Order("toy", "small", out=folder / "toy")) == 0
    finally:
        reproduction.studies = known
    records = sorted((folder / "toy").glob("run-*.json"))
    assert len(records) == 2
    return {path.name: np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in records}


COMMANDS = {"track": track, "train": train, "tile": tile, "study": study}


def same(one, other):
    assert set(one) == set(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def kill_children(name: str, folder: Path, delays) -> None:
    """Start the command in a child, and kill it so many seconds later; print what each child announced."""
    for delay in delays:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(writing, ANNOUNCED)
            COMMANDS[name](folder, lambda what: os.write(ANNOUNCED, f"{what} ".encode()))
            os._exit(0)
        os.close(writing)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading) as said:
            ended = "killed" if os.WIFSIGNALED(status) else f"exit {os.waitstatus_to_exitcode(status)}"
            print(ended, said.read(), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kill_children(sys.argv[1], Path(sys.argv[2]), [float(word) for word in sys.argv[3:]])
