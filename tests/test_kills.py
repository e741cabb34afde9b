"""A hundred kills and more, at any write, also of the making: nothing announced is lost, everything goes on."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import killed_commands as commands
import local_elasticity as le

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("ignore")]
DISK = commands.Disk()
STORED = {"track": commands.stored_steps, "train": commands.stored_updates}
# Kills in a row, each a few writes after the command was given again: while its store is made, and at growing distance.
MAKING = {"track": 12, "train": 12, "tile": 12, "study": 8}
MOVED = ("config.json", "run.zarr", "ensemble.zarr", "ensemble.json", "progress.json", "tiles.zarr", "study.json")
DONE: dict[str, int] = {}
WANTED = 100


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What each command comes to when nothing happens."""
    results = {}

    def result(name):
        if name not in results:
            folder = tmp_path_factory.mktemp(name)
            results[name] = commands.COMMANDS[name](folder, lambda what: None)
        return results[name]

    return result


def distances(making):
    """Writes between kills: every small number once, then more and more, so that the command gets to its end."""
    yield from range(1, making + 1)
    yield from itertools.accumulate(itertools.repeat(1.35), lambda distance, factor: distance * factor, initial=30)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_kill_beside_any_step_of_the_making_is_made_good(tmp_path, name, whole):
    """Before and after everything that is moved to its place, each time from an empty folder."""
    command, announced = commands.COMMANDS[name], []
    commands.same(DISK.run(command, tmp_path / "count", announced.append, 10**9), whole(name))
    seen: dict[str, int] = {}
    for write, what in DISK.renamed:
        seen.setdefault(what, write)
    moments = sorted({seen[what] + after for what in MOVED if what in seen for after in (0, 1)})
    for number, moment in enumerate(moments):
        folder = tmp_path / str(moment)
        assert DISK.run(command, folder, announced.append, moment, is_torn=number % 2 == 0) is None
        commands.same(command(folder, announced.append), whole(name))
    assert len(moments) >= 2
    DONE[f"{name}, made"] = len(moments)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_command_that_is_killed_again_and_again_comes_to_the_same_bits(tmp_path, name, whole):
    command, announced, kills = commands.COMMANDS[name], [], 0
    for number, distance in enumerate(distances(MAKING[name])):
        result = DISK.run(command, tmp_path, announced.append, int(distance), is_torn=number % 2 == 0)
        if result is not None:
            break
        kills += 1
        if announced:
            assert set(announced) <= set(STORED[name](tmp_path)), f"lost after kill {kills}"
    commands.same(result, whole(name))
    commands.same(command(tmp_path, announced.append), whole(name))  # what is done stays
    assert not [path.name for path in tmp_path.rglob("*.lock")]
    DONE[name] = kills


def test_a_kill_at_every_write_of_one_snapshot_leaves_what_was_there(tmp_path):
    """The second look of a run, killed at each of its writes in turn."""
    command, kills = commands.track, 0
    announced: list[int] = []

    def until_second(step):
        announced.append(step)
        if len(announced) == 1:
            first.append(DISK.writes)

    first: list[int] = []
    DISK.run(command, tmp_path / "count", until_second, 10**9)
    begin = first[0]
    for distance in range(begin + 1, begin + 90, 8):
        folder = tmp_path / str(distance)
        said: list[int] = []
        assert DISK.run(command, folder, said.append, distance, is_torn=distance % 4 == 1) is None
        assert said
        data = le.open_run(folder).dataset.load()
        assert set(said) <= set(data["step"].values.tolist())
        assert bool(data["after"].notnull().all())
        kills += 1
    DONE["one snapshot"] = kills


@pytest.mark.skipif(not (hasattr(os, "fork") and hasattr(signal, "SIGKILL")), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("name", ["track", "train"])
def test_a_process_that_is_really_killed_leaves_its_lock_and_store_to_the_next(tmp_path, name, whole):
    script = Path(commands.__file__)
    delays = ["0.02", "0.1", "0.2", "0.3", "0.5", "0.8"]
    done = subprocess.run(
        [sys.executable, str(script), name, str(tmp_path), *delays],
        env={**os.environ, "PYTHONPATH": str(Path(le.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    endings = [line.partition(" ") for line in done.stdout.splitlines()]
    assert {ending for ending, _, _ in endings} <= {"killed", "exit"}, done.stdout
    assert "exit 1" not in done.stdout, done.stderr[-2000:]
    announced = {int(word) for ending, _, said in endings if ending == "killed" for word in said.split()}
    if announced:
        assert announced <= set(STORED[name](tmp_path))
    commands.same(commands.COMMANDS[name](tmp_path, lambda what: None), whole(name))
    DONE[f"{name}, really"] = sum(ending == "killed" for ending, _, _ in endings)


def test_there_were_enough_of_them():
    if set(commands.COMMANDS) - set(DONE):
        pytest.skip("not all of this file was run")
    assert sum(DONE.values()) >= WANTED, DONE
