"""Where files are found, downloads (from this machine only), the catalogue, and what is not imported."""

import functools
import gzip
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from local_elasticity import data
from local_elasticity.base.errors import InputError
from local_elasticity.data import Official, catalogue, cifar10, files, idx, load, matlab, mnist, search_folders, svhn


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(files.ENVIRONMENT, raising=False)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "p/src/package/data/files.py"))
    work = tmp_path / "w"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def server(tmp_path):
    """A server on this machine that gives the files of a folder."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield served, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def record(folder, n=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data_batch_1.bin").write_bytes(bytes(3073 * n))


def test_the_order_of_the_search(tmp_path, monkeypatch):
    places = [tmp_path / name for name in ("given", "listed1", "listed2", "shared/data")]
    monkeypatch.setenv(files.ENVIRONMENT, os.pathsep.join([str(places[1]), "", str(places[2])]))
    for place in places:
        place.mkdir(parents=True)
    cache = tmp_path / "cache" / "local-elasticity"
    system = [Path("/usr/share/datasets"), Path("/usr/local/share/datasets")]
    assert search_folders(places[0]) == [*places, *system, cache]
    assert search_folders() == [*places[1:], *system, cache]
    for n, place in reversed(list(enumerate([*places, cache], start=1))):
        record(place / "cifar10-subset-bin", n)
        assert len(cifar10(folders=places[0], download=False)) == n
    with pytest.raises(InputError, match=r"folder with data files; got .*nowhere"):
        search_folders([tmp_path / "nowhere"])


def test_the_source_tree_has_a_neighbour(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "w")
    beside = tmp_path / "elsewhere" / "shared" / "data"
    source = tmp_path / "elsewhere" / "project"
    monkeypatch.setattr(files, "__file__", str(source / "src/package/data/files.py"))
    assert beside not in search_folders()
    source.mkdir(parents=True)
    (source / "pyproject.toml").touch()
    assert beside in search_folders()


def test_the_cache_folder_needs_no_package(tmp_path, monkeypatch):
    assert data.cache_folder() == tmp_path / "cache" / "local-elasticity"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert data.cache_folder() == tmp_path / ".cache" / "local-elasticity"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data.cache_folder() == tmp_path / "Library" / "Caches" / "local-elasticity"


@pytest.mark.parametrize(
    ("name", "file", "site"),
    [
        ("cifar10", "cifar-10-python.tar.gz", "www.cs.toronto.edu"),
        ("cifar100", "cifar-100-python.tar.gz", "www.cs.toronto.edu"),
        ("svhn", "train_32x32.mat", "ufldl.stanford.edu"),
        ("mnist", "train-images-idx3-ubyte.gz", "ossci-datasets"),
    ],
)
def test_missing_data_says_which_files_go_where(name, file, site):
    with pytest.raises(InputError) as error:
        load(name, download=False)
    for word in (file, site, files.ENVIRONMENT, str(files.cache_folder())):
        assert word in str(error.value)


def serve_mnist(served, address, monkeypatch):
    """Put a small MNIST on the server, with checksums to match."""
    header = {3: (12, 28, 28), 1: (12,)}
    for stem, ndim in zip(idx.stems("train"), (3, 1), strict=True):
        array = np.arange(np.prod(header[ndim])).astype(np.uint8).reshape(header[ndim]) % 10
        blob = bytes([0, 0, 8, ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
        (served / f"{stem}.gz").write_bytes(gzip.compress(blob))
        packed = hashlib.md5((served / f"{stem}.gz").read_bytes()).hexdigest()
        monkeypatch.setitem(idx.MNIST.packed, f"{stem}.gz", packed)
        monkeypatch.setitem(idx.MNIST.unpacked, stem, hashlib.md5(blob).hexdigest())
    changed = idx.MNIST.__class__(**{**vars(idx.MNIST), "site": address})
    monkeypatch.setattr(idx, "MNIST", changed)


def test_download(server, monkeypatch):
    pytest.importorskip("pooch", reason="downloads need pooch: install local-elasticity[data]")
    served, address = server
    serve_mnist(served, address, monkeypatch)
    images = mnist(progress=False)
    assert len(images) == 12
    for file in served.iterdir():
        file.unlink()
    again = mnist(download=False)  # now from the cache
    assert torch.equal(again.images, images.images)
    kept = files.cache_folder() / "mnist" / "train-labels-idx1-ubyte.gz"
    kept.write_bytes(gzip.compress(gzip.decompress(kept.read_bytes())[:-1] + b"\7"))
    with pytest.raises(InputError, match="MD5"):
        mnist()


def test_download_of_a_wrong_file(server, monkeypatch):
    pytest.importorskip("pooch", reason="downloads need pooch: install local-elasticity[data]")
    served, address = server
    (served / "train_32x32.mat").write_bytes(b"an error page")
    official = Official("train_32x32.mat", address + "train_32x32.mat", "0" * 32)
    monkeypatch.setitem(matlab.FILES, "train", official)
    with pytest.raises(InputError, match=f"MD5 {'0' * 32}.*got a file with another checksum.*put the file into"):
        svhn()
    assert not list(files.cache_folder().rglob("*.mat"))
    (served / "train_32x32.mat").unlink()
    with pytest.raises(InputError, match=r"got a failed download .*404"):
        svhn()


def test_download_without_a_connection(monkeypatch):
    pytest.importorskip("pooch", reason="downloads need pooch: install local-elasticity[data]")
    official = Official("train_32x32.mat", "http://127.0.0.1:9/train_32x32.mat", "0" * 32)
    monkeypatch.setitem(matlab.FILES, "train", official)
    with pytest.raises(InputError, match="got a failed download") as error:
        svhn()
    assert files.ENVIRONMENT in str(error.value)
    assert "\n" not in str(error.value)


def test_download_shows_its_progress(server, monkeypatch):
    pytest.importorskip("pooch", reason="downloads need pooch: install local-elasticity[data]")
    served, address = server
    (served / "file.bin").write_bytes(bytes(3 << 20))
    seen = []
    update = files._Bar.update
    monkeypatch.setattr(files._Bar, "update", lambda bar, n: (update(bar, n), seen.append((bar._done, bar.total))))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    md5 = hashlib.md5(bytes(3 << 20)).hexdigest()
    (path,) = files.fetch([Official("file.bin", address + "file.bin", md5)], files.cache_folder())
    assert path.stat().st_size == 3 << 20
    assert seen[-1] == (3 << 20, 3 << 20)


def test_without_pooch(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(InputError, match=r"local-elasticity\[data\]"):
        svhn()


def test_without_pillow_or_scikit_learn(tmp_path, monkeypatch):
    for package in ("PIL", "sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"scikit-learn.*local-elasticity\[data\]"):
        load("digits")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.png").touch()
    with pytest.raises(InputError, match=r"pillow.*local-elasticity\[data\]"):
        load(tmp_path / "images")


def test_load_by_name(tmp_path):
    record(tmp_path / "here", 3)
    for name in ("cifar10", "CIFAR-10", "cifar_10"):
        assert load(name, folders=tmp_path / "here", download=False).name == "cifar10"
    assert len(load("cifar10", folders=tmp_path / "here", download=False, classes=["plane"])) == 3
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        load("cifra10")
    with pytest.raises(InputError, match="path of an image folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="options that svhn has; got 'source'"):
        load("svhn", source="auto")


def test_catalogue(tmp_path):
    record(tmp_path / "cifar10-subset-bin", 50)
    (tmp_path / "cifar10-jpeg.tar.xz").touch()
    entries = {(entry.name, entry.source): entry for entry in catalogue(tmp_path)}
    assert {name for name, _ in entries} == set(data.READERS)
    subset = entries["cifar10", "subset"]
    assert subset.found == tmp_path / "cifar10-subset-bin"
    assert subset.state == "partial, lossless"
    assert subset.per_class == "about 5 train + 0 test"
    assert entries["cifar10", "jpeg"].state == "JPEG, lossy"
    missing = entries["cifar100", "official"]
    assert missing.where == missing.state == "not at hand"
    assert missing.downloads[0].md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert missing.shape == (3, 32, 32)
    assert len(entries["mnist", ""].downloads) == 4


def test_importing_data_imports_no_extra():
    # Whatever torch imports by itself is not ours to avoid.
    code = (
        "import torch, sys; before = set(sys.modules); import local_elasticity.data, local_elasticity.networks\n"
        "print({'pooch', 'PIL', 'sklearn', 'scipy', 'matplotlib', 'rich', 'torchvision'} & (set(sys.modules) - before))"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True
    )
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there():
    assert all(hasattr(data, name) for name in data.__all__)
