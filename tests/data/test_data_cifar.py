"""CIFAR-10 and CIFAR-100 from files in the official layouts that are written here."""

import dataclasses
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from local_elasticity.base.errors import InputError
from local_elasticity.data import cifar, cifar10, cifar100, files

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path, monkeypatch):
    """No cache, no environment, no neighbouring data folder; a download is an error of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(files.ENVIRONMENT, raising=False)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "p/src/package/data/files.py"))
    work = tmp_path / "w"
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def small(monkeypatch):
    """A CIFAR-10 whose official files have 20 images each, two a class, and the checksums of those made here."""
    blobs = {file: as_pickle(*batch(20), protocol=4) for file in [*cifar.CIFAR10.python["train"], "test_batch"]}

    def with_md5(split):
        return {file: hashlib.md5(blobs[file]).hexdigest() for file in cifar.CIFAR10.python[split]}

    changed = dataclasses.replace(
        cifar.CIFAR10,
        python={"train": with_md5("train"), "test": with_md5("test")},
        records={"train": 20, "test": 20},
    )
    monkeypatch.setattr(cifar, "CIFAR10", changed)
    return blobs


def batch(n, classes=10):
    return RNG.integers(0, 256, (n, 3072), np.uint8), np.arange(n) % classes


def as_pickle(pixels, labels, protocol=2, key=b"labels"):
    return pickle.dumps({b"data": pixels, key: labels.tolist(), b"batch_label": b"made here"}, protocol)


def as_binary(pixels, *labels):
    return np.column_stack([*(np.asarray(column, np.uint8) for column in labels), pixels]).tobytes()


def write(folder, blobs):
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in blobs.items():
        (folder / name).write_bytes(blob)
    return folder


def write_tar(path, blobs, folder="cifar-10-batches-py"):
    with tarfile.open(path, "w:gz") as archive:
        for name, blob in blobs.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    return path


def read(folder, split="train", **options):
    return cifar10(split, folders=folder, download=False, **options)


def test_binary_layout(tmp_path):
    pixels, labels = batch(7)
    folder = write(tmp_path / "cifar10-subset-bin", {"data_batch_1.bin": as_binary(pixels, labels)})
    for where in (folder, tmp_path):  # the folder itself, or the one around it
        images = read(where)
        assert torch.equal(images.images, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        assert images.labels.tolist() == labels.tolist()
        assert images.indices.tolist() == list(range(7))
        assert "partial: 7 of 50,000" in images.origin
        assert "lossless" in images.origin
        assert str(tmp_path) not in images.origin
        assert images.source == "subset"
    assert images.subset(["car", "plane"]).class_names == ("automobile", "airplane")
    with pytest.raises(InputError, match="files of cifar10 test"):
        read(folder, "test")


def test_batches_are_read_in_their_order(tmp_path):
    parts = {f"data_batch_{i}.bin": batch(3 + i) for i in (3, 1, 2)}
    write(tmp_path, {name: as_binary(*part) for name, part in parts.items()})
    images = read(tmp_path)
    expected = np.concatenate([parts[f"data_batch_{i}.bin"][0] for i in (1, 2, 3)])
    assert torch.equal(images.images.flatten(1), torch.from_numpy(expected))
    assert images.indices.tolist() == list(range(15))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_python_layout(tmp_path, protocol):
    pixels, labels = batch(6)
    write(tmp_path, {"test_batch": as_pickle(pixels, labels, protocol)})
    images = read(tmp_path, "test")
    assert torch.equal(images.images.flatten(1), torch.from_numpy(pixels))
    assert images.labels.tolist() == labels.tolist()
    assert "python layout, partial: 6 of 10,000" in images.origin


def test_pickles_of_python_2_and_old_numpy(tmp_path):
    pixels, labels = batch(2)
    modern = as_pickle(pixels, labels)
    old = modern.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    write(tmp_path, {"test_batch": old})
    assert torch.equal(read(tmp_path, "test").images.flatten(1), torch.from_numpy(pixels))
    # Python 2 wrote text where Python 3 writes bytes: (dp0 S'data' ... ) with the pixels as a string.
    raw = pixels.tobytes()
    python2 = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87Rq\x05(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tbU\x06labelsq\x07]q\x08(K\x00K\x01eu."
    )
    write(tmp_path, {"test_batch": python2})
    images = read(tmp_path, "test")
    assert torch.equal(images.images.flatten(1), torch.from_numpy(pixels))
    assert images.labels.tolist() == [0, 1]


def test_python_archive(tmp_path, small):
    write_tar(tmp_path / "cifar-10-python.tar.gz", small)
    images = read(tmp_path)
    assert len(images) == 100
    assert images.source == "official"
    assert "cifar-10-python.tar.gz, python layout, complete, lossless" in images.origin
    assert images.counts.tolist() == [10] * 10
    first = pickle.loads(small["data_batch_1"])
    assert torch.equal(images.images[:20].flatten(1), torch.from_numpy(first[b"data"]))
    assert len(read(tmp_path, "test")) == 20


def test_damaged_archive(tmp_path, small):
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", small)
    path.write_bytes(path.read_bytes()[:200_000])
    with pytest.raises(InputError, match=r"whole tar archive|official|images"):
        read(tmp_path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(InputError, match="whole tar archive"):
        read(tmp_path)


def test_archive_in_the_cache_must_be_the_official_one(tmp_path, small):
    cache = files.cache_folder()
    cache.mkdir(parents=True)
    write_tar(cache / "cifar-10-python.tar.gz", small)
    with pytest.raises(InputError, match="MD5 c58f30108f718f92721af3b95e74349a"):
        cifar10(download=False)


def test_whole_file_with_another_checksum_is_refused(tmp_path, small):
    write(tmp_path, {**small, "data_batch_2": as_pickle(*batch(20), protocol=4)})
    with pytest.raises(InputError, match=r"data_batch_2: MD5 .* as this file is whole"):
        read(tmp_path)
    assert len(read(tmp_path, "test")) == 20
    write(tmp_path, {"data_batch_2": as_pickle(*batch(19), protocol=4)})  # a subset is none of our business
    assert "partial: 99 of 100" in read(tmp_path).origin


def test_cifar100_both_layouts_and_labels(tmp_path):
    pixels, fine = batch(120, classes=100)
    coarse = fine // 5
    binary = write(tmp_path / "b" / "cifar-100-binary", {"train.bin": as_binary(pixels, coarse, fine)})
    data = {b"data": pixels, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
    python = write(tmp_path / "p" / "cifar-100-python", {"train": pickle.dumps(data, 2), "meta": b""})
    for folder in (binary, python):
        images = cifar100(folders=folder, download=False)
        assert torch.equal(images.images.flatten(1), torch.from_numpy(pixels))
        assert images.labels.tolist() == fine.tolist()
        assert images.n_classes == 100
        supers = cifar100(labels="coarse", folders=folder, download=False)
        assert supers.labels.tolist() == coarse.tolist()
        assert supers.n_classes == 20
    with pytest.raises(InputError, match="did you mean 'fine'"):
        cifar100(labels="fin", folders=binary)
    # Folders of images are called "train" too: not a CIFAR-100.
    (tmp_path / "other" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="files of cifar100"):
        cifar100(folders=tmp_path / "other", download=False)


def test_class_names():
    assert [cifar.CIFAR100_CLASSES[i] for i in (48, 53, 94)] == ["motorcycle", "orange", "wardrobe"]
    assert [cifar.CIFAR10_CLASSES[i] for i in (0, 1, 8)] == ["airplane", "automobile", "ship"]
    for names, n in ((cifar.CIFAR10_CLASSES, 10), (cifar.CIFAR100_CLASSES, 100), (cifar.CIFAR100_SUPERCLASSES, 20)):
        assert len(set(names)) == len(names) == n
        assert list(names) == sorted(names)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (as_binary(*batch(3))[:-1], "multiple of 3,073"),
        (b"", "multiple of 3,073"),
        (as_binary(batch(3)[0], [0, 10, 1]), "a label 10"),
    ],
)
def test_wrong_binary_files(tmp_path, blob, message):
    write(tmp_path, {"data_batch_1.bin": blob})
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path)
    assert "delete the file and download it again" in str(error.value)
    assert "data_batch_1.bin" in str(error.value)


PIXELS3, LABELS3 = batch(3)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (as_pickle(PIXELS3, LABELS3)[:4000], "whole pickle"),
        (b"not a pickle", "whole pickle"),
        (b"", "whole pickle"),
        (pickle.dumps([1, 2]), "uint8 'data'"),
        (pickle.dumps({b"labels": [0]}), "uint8 'data'"),
        (as_pickle(PIXELS3.astype(np.float32), LABELS3), "float32"),
        (as_pickle(PIXELS3[:, :100], LABELS3), r"\(3, 100\)"),
        (as_pickle(PIXELS3, LABELS3[:2]), "3 whole numbers"),
        (as_pickle(PIXELS3, LABELS3 + 0.5), "3 whole numbers"),
        (as_pickle(PIXELS3, LABELS3, key=b"fine_labels"), "3 whole numbers"),
        (as_pickle(PIXELS3, LABELS3 + 8), "a label 10"),
        (as_pickle(PIXELS3, LABELS3 - 1), "a label -1"),
    ],
)
def test_wrong_python_files(tmp_path, blob, message):
    write(tmp_path, {"test_batch": blob})
    with pytest.raises(InputError, match=message):
        read(tmp_path, "test")


class Runs:
    """A pickle of it calls anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickles_do_not_run(tmp_path, protocol):
    import builtins
    import codecs
    import os
    import subprocess

    marker = tmp_path / "ran"
    attacks = {
        "open": Runs(open, str(marker), "w"),
        "system": Runs(os.system, f"touch {marker}"),
        "Popen": Runs(subprocess.Popen, ["touch", str(marker)]),
        "eval": Runs(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "load": Runs(np.load, str(marker)),
        "encode": Runs(codecs.encode, "text", "zlib"),
        "getattr": Runs(getattr, {}, "keys"),
    }
    for name, attack in attacks.items():
        blob = pickle.dumps({b"data": PIXELS3, b"labels": [0, 1, 2], b"x": attack}, protocol)
        write(tmp_path, {"test_batch": blob})
        with pytest.raises(InputError, match=r"nothing was run|encoding") as error:
            read(tmp_path, "test")
        assert name in str(error.value) or name == "encode"
        assert not marker.exists()


def test_auto_prefers_the_official_files_then_the_subset(tmp_path, small):
    subset = write(tmp_path / "s" / "cifar10-subset-bin", {"data_batch_1.bin": as_binary(*batch(15))}).parent
    whole = write(tmp_path / "o" / "cifar-10-batches-py", small).parent
    assert read([subset, whole]).source == "official"
    assert read([subset, whole], source="subset").source == "subset"
    assert read(subset).source == "subset"
    with pytest.raises(InputError, match="source 'official'"):
        read(subset, source="official")
    with pytest.raises(InputError, match="did you mean 'official'"):
        read(subset, source="oficial")


def test_at_least_takes_the_first_source_that_has_enough(tmp_path, small):
    blobs = {"data_batch_1.bin": as_binary(*batch(15)), "data_batch_2.bin": as_binary(*batch(10))}
    subset = write(tmp_path / "s" / "cifar10-subset-bin", blobs).parent
    # Classes 0-4 have three images, the others two.
    assert read(subset, at_least=2).source == "subset"
    assert read(subset, at_least=3, classes=["plane", 4]).counts.tolist() == [3, 3]
    with pytest.raises(InputError, match=r"at least 3 images of each class.*got 2 of 'dog' in subset"):
        read(subset, at_least=3)
    with pytest.raises(InputError, match="got 2 of 'truck'"):
        read(subset, at_least=3, classes="plane, truck")
    with pytest.raises(InputError, match="at most 10 images a class"):
        read(subset, at_least=11)
    with pytest.raises(InputError, match="did you mean 'truck'"):
        read(subset, classes=["trunk"])
    with pytest.raises(InputError, match="did you mean 'train'"):
        read(subset, "trian")


def test_a_subset_without_the_class_is_passed_over(tmp_path):
    folder = write(tmp_path, {"data_batch_1.bin": as_binary(*batch(6, classes=3))})
    assert read(folder, classes=["bird"]).counts.tolist() == [2]
    with pytest.raises(InputError, match="got 0 of 'cat'"):
        read(folder, classes=["cat"])
