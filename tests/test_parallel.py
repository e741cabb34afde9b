"""Tasks in every backend: the same numbers, killed workers, clusters that do not answer."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "studies"))
from image_data import write_cifar10

from local_elasticity.base import parallel
from local_elasticity.base.errors import InputError
from local_elasticity.base.parallel import Task, Workers, perform
from local_elasticity.data import files
from local_elasticity.studies import STUDIES
from local_elasticity.studies.dan2023 import images as study
from local_elasticity.studies.dan2023.tables import Series, tables_of

TINY = study.Scale(per_class=6, batch_size=6, epochs=1, runs=2, probes_per_class=2, every=3, test_per_class=2)


def dying_task(folder):
    """A task whose worker is killed in its middle, the first time."""

    def work(place):
        import os
        import signal
        import time

        import torch

        mark = Path(place) / "begun"
        if not mark.exists():
            mark.write_text("")
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        return {"threads": torch.get_num_threads()}

    return Task("dies once", work, (str(folder),), folder / "died.json")  # a closure: pickled by value


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The tiny study in this process."""
    place = tmp_path_factory.mktemp("serial")
    write_cifar10(place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(files.ENVIRONMENT, str(place / "data"))
        found = study_in(place / "study", Workers())
    return place / "data", found


def study_in(out, workers) -> Series:
    whole, found = STUDIES["dan2023-cifar10"], []
    tiny = replace(
        whole,
        conditions={"small": tuple(replace(c, network="simple-conv") for c in whole.conditions["small"])},
        report=lambda this, runs, *_: found.extend(runs) or 0,
    )
    tiny.run_at(TINY, "small", out, workers=workers)
    return found[0]


def with_a_death(tasks, tmp_path, workers):
    """Perform tasks beside one whose worker dies."""
    found = perform([dying_task(tmp_path), *tasks], workers)
    assert found[0] == {"threads": 1}
    assert (tmp_path / "begun").exists()
    return found[1:]


def training_tasks(folder):
    """Short trainings, each with a seed of its own."""

    def work(seed):
        import torch
        from torch import nn

        torch.manual_seed(seed)
        model, loss = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), nn.CrossEntropyLoss()
        x, y = torch.randn(12, 5), torch.arange(12) % 3
        for _ in range(20):
            gradients = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(model.parameters(), gradients, strict=True):
                    weight.sub_(gradient, alpha=0.1)
        return {"outputs": model(x).tolist(), "threads": torch.get_num_threads()}

    return [Task(f"seed {seed}", work, (seed,), folder / f"{seed}.json") for seed in range(3)]


def equal_to_serial(tmp_path, workers):
    """Trainings beside a task whose worker dies have the numbers of this process, bit for bit."""
    wanted = perform(training_tasks(tmp_path / "serial"))
    assert with_a_death(training_tasks(tmp_path / "spread"), tmp_path, workers) == wanted


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:a worker was lost")
def test_loky_gives_the_serial_numbers_of_a_study_and_survives_a_death(serial, tmp_path, monkeypatch):
    data, wanted = serial
    monkeypatch.setenv(files.ENVIRONMENT, str(data))
    monkeypatch.setattr(study, "perform", lambda tasks, where: with_a_death(tasks, tmp_path, where))
    found = study_in(tmp_path / "study", Workers("loky", 2))
    np.testing.assert_array_equal(found.tables.values, wanted.tables.values)
    for mine, theirs in zip(found.datasets, wanted.datasets, strict=True):
        assert np.array_equal(mine["after"].values, theirs["after"].values)
        assert int(mine.attrs["threads"]) == 1


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_dask_gives_the_serial_numbers_and_survives_a_death(tmp_path):
    pytest.importorskip("distributed", reason='needs dask: pip install "local-elasticity[dask]"')
    equal_to_serial(tmp_path, Workers("dask", 2))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_gives_the_serial_numbers_and_survives_a_death(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else a token that lies in the home may be asked for
    pytest.importorskip("ray", reason='needs Ray: pip install "local-elasticity[ray]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    start = [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--include-dashboard=false"]
    place = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: Ray's sockets lie deep in it, and their paths are limited
    start += ["--disable-usage-stats", "--object-store-memory=100000000", f"--temp-dir={place}"]
    head = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert head.poll() is None, "ray start ended"
            time.sleep(0.2)
        equal_to_serial(tmp_path, Workers("ray", 2, f"127.0.0.1:{port}"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_that_does_not_answer_is_refused_in_seconds(backend, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(InputError, match=rf"answers at 127.0.0.1:{port}.*host, port and firewall"):
        perform([dying_task(tmp_path)], Workers(backend, 1, f"127.0.0.1:{port}"))
    assert time.monotonic() - begun < 10  # what is promised to the user, not how fast the machine is
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("luky",), "did you mean 'loky'"),
        (("loky", 0), "jobs: a whole number >= 1"),
        (("loky", 2, "127.0.0.1:1"), "no address"),
    ],
)
def test_bad_workers_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Workers(*arguments)


def test_a_task_with_a_record_is_not_done_again_and_threads_come_back(tmp_path):
    def work(number):
        (tmp_path / f"done-{number}").touch(exist_ok=False)
        return {"number": number, "threads": torch.get_num_threads()}

    tasks = [Task(str(n), work, (n,), tmp_path / f"{n}.json") for n in range(3)]
    before = torch.get_num_threads()
    first = perform(tasks)
    assert first == [{"number": n, "threads": 1} for n in range(3)]
    assert perform(tasks) == first
    assert torch.get_num_threads() == before


def test_workers_that_never_finish_are_given_up(tmp_path):
    class KilledWorker(Exception):
        pass

    def lost(tasks):
        raise KilledWorker("gone")

    with (
        pytest.warns(UserWarning, match="given out again"),
        pytest.raises(InputError, match=r"workers that finish a task.*dies once"),
    ):
        parallel._rounds([dying_task(tmp_path)], lost)
    with pytest.raises(ZeroDivisionError):  # a task's own error is not a lost worker
        parallel._rounds([dying_task(tmp_path)], lambda tasks: 1 / 0)


@pytest.mark.exhaustive
def test_series_are_by_condition(serial):
    _, series = serial
    places = [(series.condition, folder) for folder in series.folders]
    again = tables_of(places, series.records, series.seed)
    assert len(again) == 1
    assert len(again[0].datasets) == 2
