"""MNIST, Fashion-MNIST and SVHN from files in the official formats that are written here; the bundled digits."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import scipy.io
import torch

from local_elasticity.base.errors import InputError
from local_elasticity.data import digits, fashion_mnist, files, idx, load, matlab, mnist, svhn

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 28, 28), np.uint8)
LABELS = (np.arange(12) % 10).astype(np.uint8)


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(files.ENVIRONMENT, raising=False)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "p/src/package/data/files.py"))
    work = tmp_path / "w"
    work.mkdir()
    monkeypatch.chdir(work)


def as_idx(array, magic=None):
    header = struct.pack(">I", magic or 0x0800 + array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_idx(folder, split="train", images=None, labels=None, packed=True, dotted=False):
    folder.mkdir(parents=True, exist_ok=True)
    blobs = (as_idx(PIXELS) if images is None else images, as_idx(LABELS) if labels is None else labels)
    for stem, blob in zip(idx.stems(split), blobs, strict=True):
        name = stem.replace("-idx", ".idx") if dotted else stem
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(blob) if packed else blob)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dotted", [True, False])
@pytest.mark.parametrize(("reader", "place"), [(mnist, "MNIST/raw"), (fashion_mnist, "fashion-mnist"), (mnist, "any")])
def test_idx(tmp_path, packed, dotted, reader, place):
    folder = write_idx(tmp_path / place, "test", packed=packed, dotted=dotted)
    images = reader("test", folders=folder, download=False)
    assert torch.equal(images.images[:, 0], torch.from_numpy(PIXELS))
    assert images.labels.tolist() == LABELS.tolist()
    assert "partial: 12 of 10,000" in images.origin
    assert "lossless" in images.origin
    assert images.shape == (1, 28, 28)


def test_the_two_sets_are_not_confused(tmp_path):
    write_idx(tmp_path / "fashion-mnist")
    with pytest.raises(InputError, match=r"files of mnist train: train-images-idx3-ubyte\.gz and"):
        mnist(folders=tmp_path, download=False)
    with pytest.raises(InputError, match="files of mnist train"):
        mnist(folders=tmp_path / "fashion-mnist", download=False)
    assert fashion_mnist(folders=tmp_path, download=False).class_names[0] == "T-shirt/top"
    write_idx(tmp_path / "mnist")
    assert mnist(folders=tmp_path, download=False).name == "mnist"


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (as_idx(PIXELS)[:-5], None, r"9,424 bytes .* got 9,419"),
        (as_idx(PIXELS) + b"x", None, "got 9,425"),
        (as_idx(PIXELS, magic=2049), None, "magic number 2051 .* got 2049"),
        (None, as_idx(LABELS, magic=2051), "magic number 2049 .* got 2051"),
        (b"", None, "magic number 2051"),
        (as_idx(PIXELS[:11]), None, "12 images, one for each label; got 11"),
        (None, as_idx(LABELS + np.uint8(5)), "labels in 0 ... 9; got 14"),
        (as_idx(PIXELS[:0]), as_idx(LABELS[:0]), "got none"),
    ],
)
def test_wrong_idx(tmp_path, images, labels, message):
    write_idx(tmp_path, images=images, labels=labels)
    with pytest.raises(InputError, match=message) as error:
        mnist(folders=tmp_path, download=False)
    assert "delete the file and download it again" in str(error.value)


def test_wrong_gzip(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for blob in (whole[:-20], b"nonsense", whole[:100] + b"zz" + whole[102:]):
        path.write_bytes(blob)
        with pytest.raises(InputError, match="whole gzip file"):
            mnist(folders=tmp_path, download=False)


def test_whole_idx_must_have_the_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "SIZES", {"train": 12, "test": 12})
    write_idx(tmp_path)
    with pytest.raises(InputError, match="MD5 6bbc9ace898e44ae57da46a324031adb of the unpacked bytes"):
        mnist(folders=tmp_path, download=False)
    for stem, array in zip(idx.stems("train"), (PIXELS, LABELS), strict=True):
        monkeypatch.setitem(idx.MNIST.unpacked, stem, hashlib.md5(as_idx(array)).hexdigest())
    assert "complete" in mnist(folders=tmp_path, download=False).origin


def test_partial_idx_in_the_cache_is_refused(tmp_path):
    write_idx(files.cache_folder() / "mnist")
    with pytest.raises(InputError, match="MD5"):
        mnist(download=False)


def write_mat(path, pixels, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"X": pixels, "y": labels})
    return path


def test_svhn(tmp_path):
    pixels = RNG.integers(0, 256, (32, 32, 3, 11), np.uint8)
    labels = np.array([10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])[:, None].astype(np.uint8)
    write_mat(tmp_path / "svhn" / "train_32x32.mat", pixels, labels)
    images = svhn(folders=tmp_path, download=False)
    assert torch.equal(images.images[4], torch.from_numpy(pixels[..., 4].transpose(2, 0, 1).copy()))
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert images.subset(["0", "2", "4"]).counts.tolist() == [2, 1, 1]
    assert "partial: 11 of 73,257" in images.origin
    with pytest.raises(InputError, match=r"svhn test: test_32x32\.mat"):
        svhn("test", folders=tmp_path, download=False)


def test_wrong_svhn(tmp_path, monkeypatch):
    pixels = RNG.integers(0, 256, (32, 32, 3, 4), np.uint8)
    labels = np.array([[1], [2], [3], [10]], np.uint8)
    path = tmp_path / "train_32x32.mat"
    for wrong_pixels, wrong_labels, message in (
        (pixels, labels + 1, "labels from 2 to 11"),
        (pixels, labels - 1, "labels from 0 to 9"),
        (pixels[..., :3], labels, r"X: bytes of shape \(32, 32, 3, 4\)"),
        (pixels.astype(float), labels, "float64"),
    ):
        write_mat(path, wrong_pixels, wrong_labels)
        with pytest.raises(InputError, match=message):
            svhn(folders=tmp_path, download=False)
    write_mat(path, pixels, labels)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="whole MATLAB file"):
        svhn(folders=tmp_path, download=False)
    scipy.io.savemat(path, {"X": pixels})
    with pytest.raises(InputError, match="whole MATLAB file"):
        svhn(folders=tmp_path, download=False)
    monkeypatch.setattr(matlab, "SIZES", {"train": 4, "test": 4})
    write_mat(path, pixels, labels)
    with pytest.raises(InputError, match="MD5 e26dedcc434d2e4c54c9b2d4a06d8373"):
        svhn(folders=tmp_path, download=False)


def test_digits():
    pytest.importorskip("sklearn", reason="the digits come inside scikit-learn: install local-elasticity[data]")
    train, test, every = (digits(split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(every)) == (1437, 360, 1797)
    assert torch.equal(torch.cat([train.indices, test.indices]), every.indices)
    assert torch.equal(test.images, every.images[test.indices])
    assert every.images.max() == every.white == 16
    assert every.tensors(None)[0].max() == 1
    x, _ = train.tensors()
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    assert load("digits", "test").labels.tolist() == test.labels.tolist()
    with pytest.raises(InputError, match="did you mean 'train'"):
        digits("trian")
