"""Killed at any of its writes, whatever makes a store goes on by the same call, loses nothing, and ends the same.

Each attempt is a forked process that sends itself SIGKILL just before one of its operations on files, in every second
attempt with the file that it wrote last cut in half.
"""

import contextlib
import faulthandler
import json
import math
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray  # noqa: F401  # here, so that no forked process has to import them again

import local_elasticity as le
from local_elasticity import cli
from local_elasticity.studies.hesu2020 import synthetic as hesu2020_synthetic
from local_elasticity.training.ensemble import train as ensemble

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that copy themselves (no Windows)"),
]

PATIENCE = 40  # seconds after which a process hangs
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Subject:
    """Something that makes a store.

    Attributes:
        make: makes or continues it in a folder, from nothing but what lies there.
        content: what readers see of it, all or only the most telling: by name, what must stay and be as in an
            uninterrupted one.
        kills: how many it must survive.
    """

    make: Callable[[Path], None]
    content: Callable[[Path, bool], dict[str, np.ndarray]]
    kills: int


@dataclass
class End:
    """How a process ended.

    Attributes:
        killed: whether by the signal.
        operations: on files, in one that was not killed.
        said: what it printed.
    """

    killed: bool
    operations: int
    said: str


class Strike:
    """Kills this process just before an operation on files below a folder."""

    def __init__(self, folder: Path, at: float, tear: bool) -> None:
        self.folder, self.at, self.tear = str(folder), at, tear
        self.operations, self.last = 0, ""
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and bool(arguments[2] & WRITING)
        if not opens and event not in CHANGES:
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if not path.startswith(self.folder) and not (event in CHANGES and path and not os.path.isabs(path)):
            return
        self.operations += 1
        if self.operations >= self.at:
            self.at = math.inf
            if self.tear and self.last:
                with contextlib.suppress(OSError):
                    os.truncate(self.last, os.path.getsize(self.last) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.last = path if opens else ""


def run(subject: Subject, folder: Path, at: float = math.inf, tear: bool = False) -> End:
    """Make or continue in a process of its own; one that was refused fails the test."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _work(subject, folder, at, tear, write)
    os.close(write)
    with os.fdopen(read, "r", errors="replace") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, said
        return End(True, 0, said)
    assert os.WEXITSTATUS(status) == 0, f"killed at {at}: {said}"
    return End(False, int(said.rsplit("operations ", 1)[1]), said)


def _work(subject: Subject, folder: Path, at: float, tear: bool, out: int) -> None:
    status = 1
    try:
        torch.set_num_threads(1)
        os.dup2(out, 1)
        os.dup2(out, 2)
        faulthandler.dump_traceback_later(PATIENCE, exit=True, file=2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        strike = Strike(folder, at, tear)
        with contextlib.suppress(SystemExit):
            subject.make(folder)
        print(f"operations {strike.operations}", flush=True)
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
    finally:
        os._exit(status)


# -- what is killed -------------------------------------------------------------------------------------------------


def run_content(folder: Path, brief: bool) -> dict[str, np.ndarray]:
    """Snapshots one by one, and what belongs to all of them; a run without snapshots holds nothing that counts."""
    if not (folder / "run.zarr").exists():
        return {}
    data = le.open_run(folder).dataset
    if not data.sizes["step"]:
        return {}
    data = data[["loss", "after"]].load() if brief else data.drop_vars("seconds").load()
    steps, content = data["step"].values.tolist(), {}
    for name in map(str, data.variables):
        if "step" not in data[name].dims:
            content[name] = data[name].values
            continue
        content |= {f"{name} after {step}": data[name].values[i] for i, step in enumerate(steps)}
    return content


DIGITS = ["--data", "digits", "--classes", "0", "1", "--per-class", "8", "--network", "mlp:depth=1,width=8"]


def command(*words: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main([*words, "--out", str(folder)])
        assert end.value.code in (0, 1), f"exit status {end.value.code}"  # 1: so small a study has claims that fail

    return make


def log_content(folder: Path, brief: bool) -> dict[str, np.ndarray]:
    """An ensemble's log row by row, as far as it is committed."""
    if not (folder / "ensemble.json").exists():
        return {}
    data = le.open_ensemble(folder)
    data, content = (data[["logits"]] if brief else data).load(), {}
    for name in map(str, data.variables):
        first = str(data[name].dims[0]) if data[name].dims else ""
        if first.endswith("step"):
            rows = zip(data[first].values, data[name].values, strict=True)
            content |= {f"{name} {first} {int(time)}": row for time, row in rows}
    return content


def study_content(folder: Path, brief: bool) -> dict[str, np.ndarray]:
    """The pieces of a study, and what it claims."""
    content: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("[!.]*.npz")):
        with np.load(path) as piece:
            content |= {f"{path.name} {name}": piece[name] for name in piece.files}
    if (folder / "claims.json").exists() and (folder / "figures" / "done").exists():
        content["claims"] = np.array(json.dumps(json.loads((folder / "claims.json").read_text())))
    return content


def no_figure(figure: Any, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done").write_text(name)
    return [folder / "done"]


TRACK = ("--probes-per-class", "3", "--every", "1", "--epochs", "2", "--definition", "kl")
SMALL = ("--network", "mlp:depth=1,width=4", "--per-class", "6", "--replicas", "2", "--steps", "40", "--threads", "1")
TRAIN = (*SMALL, "--lr", "0.02", "--validate", "20", "--probe", "20")
STUDY = hesu2020_synthetic.Scale(12, {"torus": 4096, "folded boxes": 1024}, 3)
SUBJECTS = {
    "track": Subject(command("track", *DIGITS, *TRACK), run_content, 4),
    "train": Subject(command("train", *TRAIN), log_content, 4),
    "a study": Subject(command("reproduce", "hesu2020-synthetic"), study_content, 4),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_killed_at_any_write_it_goes_on_and_loses_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "track":
        pytest.importorskip("sklearn", reason="the digits are inside scikit-learn")
    monkeypatch.setitem(dask.config.config, "scheduler", "synchronous")  # threads of a pool do not survive a fork
    monkeypatch.setattr(cli.track, "finish", lambda run, out: 0)
    monkeypatch.setattr(cli.train, "_say_trained", lambda ensemble, out: None)
    monkeypatch.setattr(ensemble, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setitem(hesu2020_synthetic.SCALES, "small", STUDY)
    monkeypatch.setattr(hesu2020_synthetic, "save", no_figure)
    subject, draws = SUBJECTS[name], random.Random(name)
    subject.make(tmp_path / "whole")  # in this process: what is imported on the way is there for all the others
    whole = run(subject, tmp_path / "counted")
    want = subject.content(tmp_path / "whole", False)
    assert want
    kills = place = 0
    while kills < subject.kills:
        place += 1
        folder = tmp_path / f"{place}"
        before: dict[str, np.ndarray] = {}
        for attempt in range(4):
            # Half of the first kills fall into the making, a quarter of the operations.
            longest = whole.operations // (4 if attempt == 0 and place % 2 else 1)
            end = run(subject, folder, draws.randint(1, max(1, longest)), bool(draws.getrandbits(1)))
            if not end.killed:
                break
            kills += 1
            before = preserved(subject, folder, before, want, end.said)
        else:
            run(subject, folder)
        content = subject.content(folder, False)
        assert_same(content, want)
        assert set(content) == set(want)


def preserved(
    subject: Subject, folder: Path, before: dict[str, np.ndarray], want: dict[str, np.ndarray], said: str
) -> dict[str, np.ndarray]:
    """What readers see after a kill: all that they saw before it, all that was announced, and nothing else."""
    content = subject.content(folder, True)
    assert set(before) <= set(content)
    assert_same(content, want)
    for line in said.splitlines():
        if line.startswith(("announced ", "update ")):
            assert f"loss after {line.split()[1].rstrip(':')}" in content
    return content


def assert_same(content: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert set(content) <= set(want)
    for name, values in content.items():
        np.testing.assert_array_equal(values, want[name], err_msg=name)
