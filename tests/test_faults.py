"""What a disk, another writer or a stranger's file can do to a store: told in one line, and nothing is lost."""

import errno
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity.base import files, locks
from local_elasticity.base.checkpoints import read_checkpoint, write_checkpoint
from local_elasticity.base.errors import InputError
from local_elasticity.base.locks import Lock
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.studies.engine.pieces import kept, read_arrays
from local_elasticity.training.loop import Session, Training

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("ignore")]
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


def tracker_at(store, **options):
    torch.manual_seed(0)
    settings = {"update": le.SGD(lr=0.1), "schedule": le.every(1), "keep": "outputs", **options}
    return le.Tracker(nn.Linear(4, 3), F.cross_entropy, (X, Y), store=store, **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Copies of a run and of an ensemble that was stopped, instead of making them anew."""
    place = tmp_path_factory.mktemp("made")
    run_at(place / "run.zarr")
    ensemble_at(place / "ensemble", stop_at=20)
    return lambda name, where: shutil.copytree(place / name, where)


def run_at(store, looks=2):
    tracker = tracker_at(store)
    for _ in range(looks):
        tracker.step()
    return tracker.finish()


def tiles_at(out, **options):
    torch.manual_seed(0)
    return le.measure_tiles(nn.Linear(4, 3), F.cross_entropy, (X, Y), update=le.SGD(lr=0.1), out=out, tile=3, **options)


def ensemble_at(folder, **options):
    def make():
        return nn.Linear(4, 3)

    settings = {"lr": 0.1, "steps": 30, "replicas": 2, "probes": (X, Y), "probe": le.every(10), **options}
    return le.train_ensemble(make, (X, Y), F.cross_entropy, store=folder, **settings)


def one_line(error):
    """The three parts, in one line."""
    assert error.expected
    assert error.got
    assert error.do
    assert "\n" not in str(error)
    return str(error)


# --- one writer -------------------------------------------------------------------------------------------------------

HOLDING = """
import sys, time
from pathlib import Path
from local_elasticity.base.locks import Lock
lock = Lock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held_elsewhere(path):
    """Another process that holds the lock of this path."""
    environment = {**os.environ, "PYTHONPATH": str(Path(le.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_what_another_process_writes_is_refused_with_its_name_and_read_all_the_same(tmp_path):
    stores = {"run.zarr": run_at, "tiles.zarr": tiles_at, "ensemble": ensemble_at}
    for name, make in stores.items():
        make(tmp_path / name)
    locked = {"run.zarr": "run.zarr", "tiles.zarr": "tiles.zarr", "ensemble": "ensemble/ensemble.zarr"}
    options = {"run.zarr": {"resume": True}, "tiles.zarr": {"overwrite": True}, "ensemble": {"resume": True}}
    writers = {"run.zarr": tracker_at, "tiles.zarr": tiles_at, "ensemble": ensemble_at}
    with held_elsewhere(tmp_path / "run.zarr") as process:
        with pytest.raises(InputError) as caught:
            tracker_at(tmp_path / "run.zarr", resume=True)
        said = one_line(caught.value)
        assert f"process {process.pid} on {socket.gethostname()}" in said
        assert "since 20" in said
        assert le.open_run(tmp_path / "run.zarr").dataset.sizes["step"] == 2
    for name in ("tiles.zarr", "ensemble"):
        (tmp_path / locked[name]).with_name(f".{Path(locked[name]).name}.lock").unlink(missing_ok=True)
        with Lock(tmp_path / locked[name]), pytest.raises(InputError, match="this process"):
            writers[name](tmp_path / name, **options[name])
    assert le.open_ensemble(tmp_path / "ensemble").attrs["updates"] == 30
    tracker_at(tmp_path / "run.zarr", resume=True).finish()  # the other one was killed: its lock is nobody's


def test_a_running_command_is_not_overwritten(tmp_path):
    prepare_folder(tmp_path / "out", {"seed": 0}, False)
    run_at(tmp_path / "out")
    with Lock(tmp_path / "out" / "run.zarr"), pytest.raises(InputError, match="this process"):
        prepare_folder(tmp_path / "out", {"seed": 0}, True)
    assert le.open_run(tmp_path / "out").dataset.sizes["step"] == 2
    assert prepare_folder(tmp_path / "out", {"seed": 1}, True) is False
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_the_newest_tracker_of_a_process_writes_and_the_one_before_is_told(tmp_path):
    store = tmp_path / "run.zarr"
    first = tracker_at(store)
    first.step()
    second = tracker_at(store, resume=True)
    with pytest.raises(InputError, match="newer writer"):
        first.step()
    second.step()
    assert second.finish().dataset["step"].values.tolist() == [1, 2]
    third = tracker_at(store, resume=True)
    with pytest.raises(InputError, match="updates of the stored run"):
        tracker_at(store, resume=True, update=le.SGD(lr=0.5))
    third.step()  # a writer that was refused has taken nothing over
    assert third.finish().dataset["step"].values.tolist() == [1, 2, 3]
    assert not list(tmp_path.glob(".*"))


def test_a_lock_is_free_again_when_its_owner_is_gone(tmp_path):
    class Owner:
        def __init__(self):
            self.lock, self.itself = Lock(tmp_path / "x"), self
            self.lock.acquire()

    Owner()  # in a circle: only the collector ends it
    lock = Lock(tmp_path / "x")
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()  # a child's copy lets go of nothing
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(InputError):
        Lock(tmp_path / "x").acquire()
    lock.release()
    Lock(tmp_path / "x").acquire()


def test_a_lock_whose_dead_owner_has_children_is_taken_over(tmp_path):
    holder = locks.Holder(2**22 + 1, socket.gethostname(), "long ago", locks._space(), "1")
    assert holder.is_dead
    with Lock(tmp_path / "x"):
        (tmp_path / ".x.lock").write_text(json.dumps(holder.__dict__))
        Lock(tmp_path / "x").acquire()
    here = locks.Holder.here()
    assert not here.is_dead
    assert (
        locks.Holder(here.pid, here.host, here.since, here.space, "1").is_dead or not here.began
    )  # a number used again
    assert not locks.Holder(2**22 + 1, "elsewhere", here.since, here.space, "1").is_dead


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks_go_by_the_file(tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_flock", refuse)
    lock = Lock(tmp_path / "x")
    lock.acquire()
    with pytest.raises(InputError, match="this process"):
        Lock(tmp_path / "x").acquire()
    lock.release()
    dead = locks.Holder(2**22 + 1, socket.gethostname(), "long ago", locks._space(), "1")
    (tmp_path / ".x.lock").write_text(json.dumps(dead.__dict__))
    with Lock(tmp_path / "x"):
        pass
    (tmp_path / ".x.lock").write_text(json.dumps({**dead.__dict__, "host": "elsewhere"}))
    with pytest.raises(InputError, match=r"process 4194305 on elsewhere.*remove"):
        Lock(tmp_path / "x").acquire()
    (tmp_path / ".x.lock").write_text("")  # torn, and not just now
    os.utime(tmp_path / ".x.lock", (0, 0))
    with Lock(tmp_path / "x"):
        pass


def test_two_threads_do_not_write_the_same_tiles(tmp_path, monkeypatch):
    from local_elasticity.impact import tiles

    entered, go_on, work = threading.Event(), threading.Event(), tiles.run_tiles

    def slow(*arguments):
        entered.set()
        assert go_on.wait(60)
        work(*arguments)

    monkeypatch.setattr(tiles, "run_tiles", slow)
    thread = threading.Thread(target=tiles_at, args=(tmp_path / "tiles.zarr",))
    thread.start()
    try:
        assert entered.wait(60)
        with pytest.raises(InputError, match="this process") as caught:
            tiles_at(tmp_path / "tiles.zarr", overwrite=True)
        one_line(caught.value)
    finally:
        go_on.set()
        thread.join()
    assert np.isfinite(tiles_at(tmp_path / "tiles.zarr")["change"].values).all()


# --- the disk ---------------------------------------------------------------------------------------------------------


@contextmanager
def failing_disk(monkeypatch, number, after=0):
    """A disk whose writes fail after so many."""
    writes = [0]
    write = Path.write_bytes

    def fail(self, content):
        writes[0] += 1
        if writes[0] > after:
            raise OSError(number, os.strerror(number), str(self))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        yield writes


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "room on the disk"), (errno.EDQUOT, "room on the disk"), (errno.EROFS, "may be written")],
)
def test_a_snapshot_that_the_disk_refuses_is_told_and_the_loop_may_go_on(tmp_path, monkeypatch, number, words):
    tracker = tracker_at(tmp_path / "run.zarr")
    tracker.step()
    for after in (0, 7, 30):
        with failing_disk(monkeypatch, number, after), pytest.raises(InputError, match=words) as caught:
            tracker.step()
        one_line(caught.value)
        data = le.open_run(tmp_path / "run.zarr").dataset
        assert data["step"].values.tolist() == [1]
        assert np.isfinite(data["after"].values).all()
    tracker.step()  # there is room again
    data = tracker.finish().dataset
    assert data["step"].values.tolist() == [1, 5]
    assert np.isfinite(data["after"].values).all()
    assert not list(tmp_path.rglob("*.partial"))


def test_checkpoints_ensembles_and_tiles_say_that_the_disk_is_full(tmp_path, monkeypatch):
    session = Session(nn.Linear(4, 3), F.cross_entropy, (X, Y), Training(1, 2), checkpoints=tmp_path / "c")
    with failing_disk(monkeypatch, errno.ENOSPC), pytest.raises(InputError, match="room on the disk"):
        session.save(1)
    ensemble_at(tmp_path / "ensemble", stop_at=10)
    with failing_disk(monkeypatch, errno.ENOSPC), pytest.raises(InputError, match="room on the disk"):
        ensemble_at(tmp_path / "ensemble", resume=True)
    whole = ensemble_at(tmp_path / "whole")
    rest = ensemble_at(tmp_path / "ensemble", resume=True)
    np.testing.assert_array_equal(rest.logits, whole.logits)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zarr.storage._local._put", full)
        with pytest.raises(InputError, match="room on the disk"):
            tiles_at(tmp_path / "tiles.zarr")
    assert np.isfinite(tiles_at(tmp_path / "tiles.zarr")["change"].values).all()


def test_a_lock_for_which_there_is_no_room_is_held_by_nobody(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for make in (tracker_at, ensemble_at, tiles_at):
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_write", full)
            with pytest.raises(InputError, match="room on the disk"):
                make(tmp_path / make.__name__)
        make(tmp_path / make.__name__)  # there is room again


@pytest.mark.parametrize("link", ["loop", "nowhere"])
def test_links_that_lead_to_no_folder_are_told(tmp_path, link):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for make in (tracker_at, ensemble_at, tiles_at):
        with pytest.raises(InputError, match="a link that leads nowhere") as caught:
            make(tmp_path / link / "below")
        one_line(caught.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_a_real_full_disk_says_is_understood():
    with pytest.raises(InputError, match="room on the disk"), files.told_of_disk(Path("/dev/full")):
        Path("/dev/full").write_text("x")


def test_a_place_that_is_none_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for make in (tracker_at, ensemble_at, tiles_at):
        with pytest.raises(InputError) as caught:
            make(tmp_path / "file" / "below" / "run.zarr")
        one_line(caught.value)
        with pytest.raises(InputError) as caught:
            make(tmp_path / ("x" * 251 + ".zarr"))
        one_line(caught.value)
    for make in (tracker_at, tiles_at):
        with pytest.raises(InputError, match="shorten it") as caught:
            make(tmp_path / ("x" * 250 + ".zarr"))  # short enough itself, but not with its lock's name
        one_line(caught.value)
    with pytest.raises(InputError):
        prepare_folder(tmp_path / "file" / "out", {"seed": 0}, False)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the root user may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    for make in (tracker_at, ensemble_at, tiles_at):
        with pytest.raises(InputError, match="may be written"):
            make(folder / "run.zarr")


def test_permissions_are_told(tmp_path, monkeypatch):
    def forbid(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(locks, "_opened", forbid)
    for make in (tracker_at, ensemble_at, tiles_at):
        with pytest.raises(InputError, match="may be written"):
            make(tmp_path / "run.zarr")


def test_a_run_that_is_gone_or_changed_meanwhile_is_told_and_not_begun_anew(tmp_path):
    tracker = tracker_at(tmp_path / "run.zarr")
    tracker.step()
    (tmp_path / "run.zarr").rename(tmp_path / "moved.zarr")
    for _ in range(2):
        with pytest.raises(InputError, match="moved or removed"):
            tracker.step()
    assert not (tmp_path / "run.zarr").exists()
    assert le.open_run(tmp_path / "moved.zarr").dataset.sizes["step"] == 1
    (tmp_path / "moved.zarr").rename(tmp_path / "run.zarr")
    tracker.step()
    assert tracker.finish().dataset["step"].values.tolist() == [1, 4]


# --- what is stored ---------------------------------------------------------------------------------------------------


def chunks_of(store, *names):
    return [path for name in names for path in sorted((store / name / "c").rglob("*")) if path.is_file()]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": flip,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["after", "mean", "step", "update", "source_label", "linearization_error"])
def test_a_chunk_of_a_run_that_is_missing_or_damaged_is_named(tmp_path, made, name, damage):
    store = tmp_path / "run.zarr"
    made("run.zarr", store)
    chunk = chunks_of(store, name)[0]
    DAMAGES[damage](chunk)
    with pytest.raises(InputError, match=f"{name}/c") as caught:
        le.open_run(store).dataset.load()
    one_line(caught.value)
    if damage == "missing":  # known before anything is read, and before a training is continued
        with pytest.raises(InputError, match=f"{name}/c"):
            le.open_run(store)
        with pytest.raises(InputError, match=f"{name}/c"):
            tracker_at(store, resume=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", DAMAGES)
def test_chunks_of_ensembles_and_tiles_too(tmp_path, made, damage):
    made("ensemble", tmp_path / "e")
    arrays = tmp_path / "e" / "ensemble.zarr"
    for name in ("logits", "probe_mean", "replica"):
        chunk = chunks_of(arrays, name)[0]
        content = chunk.read_bytes()
        DAMAGES[damage](chunk)
        with pytest.raises(InputError, match=f"{name}/c"):
            le.open_ensemble(tmp_path / "e").load()
        if name == "logits":
            with pytest.raises(InputError, match=f"{name}/c"):
                ensemble_at(tmp_path / "e", resume=True)
        chunk.write_bytes(content)
    assert le.open_ensemble(tmp_path / "e").load().attrs["updates"] == 20
    expected = tiles_at(tmp_path / "t.zarr")["change"].values
    data = tiles_at(tmp_path / "t.zarr")
    DAMAGES[damage](chunks_of(tmp_path / "t.zarr", "change")[1])
    with pytest.raises(InputError, match="change/c"):
        data.load()
    for name in ("change", "before", "losses", "done"):
        for chunk in chunks_of(tmp_path / "t.zarr", name)[:1]:
            if chunk.exists():
                DAMAGES[damage](chunk)
        again = tiles_at(tmp_path / "t.zarr").load()  # what is damaged is measured again
        np.testing.assert_array_equal(again["change"].values, expected)
        assert bool(again.notnull().all().to_array().all())


@pytest.mark.parametrize("damage", DAMAGES)
def test_both_halves_of_a_gram_matrix_are_measured_again(tmp_path, damage):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)

    def gram():
        return le.gradient_gram(model, F.cross_entropy, (X, Y), out=tmp_path / "g.zarr", tile=2)["gram"].values

    expected = gram()
    for place in ("0/1", "1/0", "2/2"):
        DAMAGES[damage](tmp_path / "g.zarr" / "gram" / "c" / place)
        np.testing.assert_array_equal(gram(), expected)


def test_tiles_replace_nothing_that_is_not_theirs(tmp_path):
    run_at(tmp_path / "run.zarr")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    for out in ("run.zarr", "folder"):
        with pytest.raises(InputError, match="something else") as caught:
            tiles_at(tmp_path / out, overwrite=True)
        one_line(caught.value)
    assert le.open_run(tmp_path / "run.zarr").dataset.sizes["step"] == 2
    tiles_at(tmp_path / "t.zarr")
    (tmp_path / "t.zarr" / "change" / "zarr.json").write_text("{")
    tiles_at(tmp_path / "t.zarr").load()  # mended from the metadata of the whole
    (tmp_path / "t.zarr" / "zarr.json").write_text("{")
    with pytest.raises(InputError, match=r"damaged zarr\.json"):
        tiles_at(tmp_path / "t.zarr")
    tiles_at(tmp_path / "t.zarr", overwrite=True).load()


@pytest.mark.parametrize(
    ("note", "content"),
    [("ensemble.json", '{"format": "local-elasticity ensemble"}'), ("progress.json", '{"step": -3, "steps": 30}')],
)
def test_damaged_notes_of_an_ensemble_are_named(tmp_path, note, content):
    ensemble_at(tmp_path / "e", stop_at=10)
    (tmp_path / "e" / note).write_text(content)
    for use in (le.open_ensemble, lambda folder: ensemble_at(folder, resume=True)):
        with pytest.raises(InputError, match=f"{note} as it was written") as caught:
            use(tmp_path / "e")
        one_line(caught.value)


def test_numbers_that_equal_the_fill_value_are_no_missing_chunks(tmp_path):
    tracker = tracker_at(tmp_path / "run.zarr")
    tracker.step()
    tracker.step(late=float("nan"), zero=0.0)
    data = tracker.finish().dataset.load()
    assert np.isnan(data["late"].values).all()
    np.testing.assert_array_equal(data["zero"].values, [np.nan, 0.0])


@pytest.mark.parametrize("text", ["", "{", '{"attributes": {"format": "local-elasticity run"}}', "[]"])
def test_damaged_metadata_is_named(tmp_path, made, text):
    made("run.zarr", tmp_path / "run.zarr")
    (tmp_path / "run.zarr" / "zarr.json").write_text(text)
    for read in (le.open_run, lambda store: tracker_at(store, resume=True)):
        with pytest.raises(InputError, match=r"zarr\.json|not a run") as caught:
            read(tmp_path / "run.zarr")
        one_line(caught.value)


def test_metadata_of_one_array_is_mended_from_the_whole(tmp_path):
    run_at(tmp_path / "run.zarr")
    (tmp_path / "run.zarr" / "mean" / "zarr.json").write_text("{")
    tracker = tracker_at(tmp_path / "run.zarr", resume=True)
    tracker.step()
    assert tracker.finish().dataset["step"].values.tolist() == [1, 2, 3]


@pytest.mark.parametrize("version", [2, "2", None, True])
def test_a_newer_format_is_refused(tmp_path, made, version):
    made("run.zarr", tmp_path / "run.zarr")
    made("ensemble", tmp_path / "e")
    tiles_at(tmp_path / "t.zarr")
    for path in ("run.zarr/zarr.json", "t.zarr/zarr.json", "e/ensemble.json"):
        note = json.loads((tmp_path / path).read_text())
        note.get("attributes", note)["format_version"] = version
        (tmp_path / path).write_text(json.dumps(note))
    for call in (
        lambda: le.open_run(tmp_path / "run.zarr"),
        lambda: tracker_at(tmp_path / "run.zarr", resume=True),
        lambda: le.open_ensemble(tmp_path / "e"),
        lambda: ensemble_at(tmp_path / "e", resume=True),
        lambda: tiles_at(tmp_path / "t.zarr"),
    ):
        with pytest.raises(InputError, match="format version 1") as caught:
            call()
        assert "version" in one_line(caught.value)


def without_checksums(store):
    """As versions before checksums left it: zarr's own codecs, nothing where a chunk equals the fill value."""
    import zarr

    group = zarr.open_group(store, mode="r+", use_consolidated=False)
    attributes = {name: value for name, value in group.attrs.items() if name != "checksums"}
    for name, array in list(group.arrays()):
        values, meta = array[...], array.metadata
        fresh = group.create_array(
            *(name,),
            shape=values.shape,
            dtype=str if values.dtype.kind in "OUT" else values.dtype,
            chunks=meta.chunk_grid.chunk_shape,
            fill_value=meta.fill_value,
            dimension_names=meta.dimension_names,
            overwrite=True,
        )
        fresh[...] = values
    group.attrs.put(attributes)
    zarr.consolidate_metadata(group.store)


def test_stores_from_before_checksums_are_read_and_continued(tmp_path):
    store = tmp_path / "run.zarr"
    expected = run_at(store).dataset.load()
    without_checksums(store)
    data = le.open_run(store).dataset.load()
    for name in data.variables:
        np.testing.assert_array_equal(data[name].values, expected[name].values, err_msg=str(name))
    tracker = tracker_at(store, resume=True)
    tracker.step()
    data = tracker.finish().dataset.load()
    assert data["step"].values.tolist() == [1, 2, 3]
    assert np.isfinite(data["after"].values).all()
    chunk = chunks_of(store, "after")[0]
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(InputError, match="after/c"):
        le.open_run(store).dataset.load()


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def strange(kind, content):
    """A file that is no checkpoint of this snapshot."""
    if kind == "truncated":
        return content[: len(content) // 2]
    if kind == "empty":
        return b""
    buffer = io.BytesIO()
    if kind == "pickle":
        return pickle.dumps(Malicious())
    torch.save(Malicious() if kind == "malicious" else {"weights": torch.zeros(3)}, buffer)
    return buffer.getvalue()


KINDS = ["truncated", "empty", "pickle", "malicious", "foreign"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_not_the_snapshots_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(4, 3)
    session = Session(model, F.cross_entropy, (X, Y), Training(1, 2), checkpoints=tmp_path / "checkpoint")
    settings = {"update": le.SGD(lr=0.1), "schedule": le.every(1), "store": tmp_path / "run.zarr"}
    tracker = le.Tracker(model, F.cross_entropy, (X, Y), before_commit=session.save, **settings)
    list(session.run(tracker))
    tracker.finish()
    tracker = le.Tracker(model, F.cross_entropy, (X, Y), resume=True, **settings)
    assert tracker.checkpoint is not None
    session.load(tracker.resume_step, tracker.checkpoint)
    path = tmp_path / "checkpoint" / f"step-{tracker.resume_step:09d}.pt"
    path.write_bytes(strange(kind, path.read_bytes()))
    for sha256 in (tracker.checkpoint, None):
        with pytest.raises(InputError) as caught:
            session.load(tracker.resume_step, sha256)
        assert path.name in one_line(caught.value)
    path.unlink()
    with pytest.raises(InputError, match="checkpoint"):
        session.load(tracker.resume_step, tracker.checkpoint)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", [*KINDS, "gone", "older"])
def test_a_checkpoint_of_an_ensemble_that_is_not_its_own_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "e"
    ensemble_at(folder, stop_at=10)
    (old,) = (folder / "checkpoint").iterdir()
    content = old.read_bytes()
    ensemble_at(folder, stop_at=20, resume=True)
    (path,) = (folder / "checkpoint").iterdir()
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(content if kind == "older" else strange(kind, path.read_bytes()))
    with pytest.raises(InputError, match="checkpoint") as caught:
        ensemble_at(folder, resume=True)
    one_line(caught.value)
    assert le.open_ensemble(folder).attrs["updates"] == 20  # what was logged can be read
    assert not (tmp_path / "executed").exists()


def test_checkpoints_without_a_hash_are_still_read(tmp_path):
    path = tmp_path / "state.pt"
    digest = write_checkpoint(path, {"a": torch.ones(2), "b": [1, "x", None]})
    assert read_checkpoint(path)["b"] == [1, "x", None]
    assert torch.equal(read_checkpoint(path, digest)["a"], torch.ones(2))
    folder = tmp_path / "e"
    whole = ensemble_at(tmp_path / "whole")
    ensemble_at(folder, stop_at=20)
    (path,) = (folder / "checkpoint").iterdir()
    path.rename(folder / "checkpoint" / "state.pt")  # as earlier versions wrote it
    (folder / "progress.json").write_text('{"step": 20, "steps": 30}')
    np.testing.assert_array_equal(ensemble_at(folder, resume=True).logits, whole.logits)


# --- pieces of studies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*DAMAGES, "pickle"])
def test_a_damaged_piece_of_a_study_is_made_again_and_never_executed(tmp_path, damage):
    path, arrays = tmp_path / "piece.npz", {"x": np.arange(40.0), "words": np.array("width 3")}
    assert kept(path, lambda: arrays).keys() == kept(path, dict).keys() == arrays.keys()
    if damage == "pickle":
        np.savez(path, x=np.array([Path("payload")], dtype=object))
    else:
        DAMAGES[damage](path)
    with pytest.raises(InputError, match="run the study again") as caught:
        read_arrays(path)
    one_line(caught.value)
    np.testing.assert_array_equal(kept(path, lambda: arrays)["x"], arrays["x"])
    assert [place.name for place in tmp_path.iterdir()] == ["piece.npz"]
