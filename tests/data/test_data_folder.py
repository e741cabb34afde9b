"""Image folders and archives of them, written here with Pillow."""

import io
import tarfile

import numpy as np
import pytest
import torch

from local_elasticity.base.errors import InputError
from local_elasticity.data import cifar10, files, folder, image_folder, load
from local_elasticity.data.cifar import CIFAR10_CLASSES

Image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow: install local-elasticity[data]")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(files.ENVIRONMENT, raising=False)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "p/src/package/data/files.py"))
    work = tmp_path / "w"
    work.mkdir()
    monkeypatch.chdir(work)


def colour(height=5, width=4):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def save_tree(top, n=3, make=colour, suffix="png"):
    pictures = {}
    for name in ("dog", "ant", "cat"):
        for i in reversed(range(n)):
            pictures[name, i] = make()
            save(top / name / f"{i}.{suffix}", pictures[name, i])
    return pictures


def check(images, pictures, n=3):
    assert images.class_names == ("ant", "cat", "dog")
    assert images.labels.tolist() == [label for label in range(3) for _ in range(n)]
    assert images.indices.tolist() == list(range(3 * n))
    for k, name in enumerate(images.class_names):
        for i in range(n):
            assert np.array_equal(images.images[k * n + i].numpy(), pictures[name, i].transpose(2, 0, 1))


def tar(path, top, mode, wrap=""):
    with tarfile.open(path, mode) as archive:
        archive.add(top, arcname=wrap or ".")
    return path


def test_folder(tmp_path):
    top = tmp_path / "animals"
    pictures = save_tree(top)
    (top / "notes.txt").write_text("no image")
    (top / "dog" / ".hidden.png").write_bytes(b"")
    (top / "__MACOSX").mkdir()
    images = image_folder(top)
    check(images, pictures)
    assert images.name == "animals"
    assert images.shape == (3, 5, 4)
    assert str(tmp_path) not in images.origin
    check(load(str(top)), pictures)
    assert not files.cache_folder().exists()
    x, _ = images.tensors()
    assert -1 <= x.min() < x.max() <= 1


def test_split_folders(tmp_path):
    pictures = {split: save_tree(tmp_path / "animals" / split) for split in ("train", "val")}
    check(image_folder(tmp_path / "animals"), pictures["train"])
    check(image_folder(tmp_path / "animals", "val"), pictures["val"])
    check(image_folder(tmp_path), pictures["train"])  # one folder around it
    with pytest.raises(InputError, match=r"split of .*; got 'test'; .*known: train, val"):
        image_folder(tmp_path / "animals", "test")
    save_tree(tmp_path / "plain")
    with pytest.raises(InputError, match="no split folders"):
        image_folder(tmp_path / "plain", "test")


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz"), (".tgz", "w:gz")]
)
@pytest.mark.parametrize("wrap", ["", "animals"])
def test_archives(tmp_path, suffix, mode, wrap):
    pictures = save_tree(tmp_path / "tree" / "train")
    path = tar(tmp_path / f"zoo{suffix}", tmp_path / "tree", mode, wrap)
    images = image_folder(path)
    check(images, pictures)
    assert images.name == "zoo"
    assert "archive zoo" in images.origin
    check(load(path), pictures)


def test_decoded_images_are_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "CACHE_FROM", 5)
    pictures = save_tree(tmp_path / "tree")
    path = tar(tmp_path / "zoo.tar", tmp_path / "tree", "w")
    for place in (path, tmp_path / "tree"):
        check(image_folder(place), pictures)
        with monkeypatch.context() as patch:
            patch.setattr(folder, "_decode", None)  # not called again
            check(image_folder(place), pictures)
    kept = sorted((files.cache_folder() / "decoded").iterdir())
    assert len(kept) == 2
    assert not [file for file in kept if file.suffix == ".tmp"]
    for file in kept:  # a damaged one is made anew
        file.write_bytes(file.read_bytes()[:100])
    check(image_folder(path), pictures)
    changed = save_tree(tmp_path / "tree")
    check(image_folder(tmp_path / "tree"), changed)
    tar(path, tmp_path / "tree", "w")
    check(image_folder(path), changed)
    resized = image_folder(path, size=8)
    assert resized.shape == (3, 8, 8)
    before = len(list((files.cache_folder() / "decoded").iterdir()))
    image_folder(path, size=7, cache=False)
    assert len(list((files.cache_folder() / "decoded").iterdir())) == before


def test_a_cache_that_cannot_be_written_is_no_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "CACHE_FROM", 5)
    pictures = save_tree(tmp_path / "tree")
    (tmp_path / "cache").write_text("a file where the folder should be")
    check(image_folder(tmp_path / "tree"), pictures)


def test_sizes(tmp_path):
    save_tree(tmp_path)
    save(tmp_path / "cat" / "odd.png", colour(7, 9))
    with pytest.raises(InputError, match=r"one size \(ant/0.png has 5x4\); got cat/odd.png with 7x9.*size="):
        image_folder(tmp_path)
    assert image_folder(tmp_path, size=6).shape == (3, 6, 6)
    assert image_folder(tmp_path, size=(6, 3)).shape == (3, 6, 3)
    with pytest.raises(InputError, match="size"):
        image_folder(tmp_path, size=0)


def test_grey_and_mixed_images(tmp_path):
    grey = save_tree(tmp_path, make=lambda: RNG.integers(0, 256, (5, 4), np.uint8))
    images = image_folder(tmp_path)
    assert images.shape == (1, 5, 4)
    assert np.array_equal(images.images[0, 0].numpy(), grey["ant", 0])
    save(tmp_path / "ant" / "9.png", colour(), "RGBA")
    images = image_folder(tmp_path)
    assert images.shape == (3, 5, 4)
    assert np.array_equal(images.images[0].numpy(), np.stack([grey["ant", 0]] * 3))
    save(tmp_path / "ant" / "deep.png", RNG.integers(0, 60_000, (5, 4)).astype(np.uint16))
    with pytest.raises(InputError, match=r"8 bits a channel; got ant/deep\.png"):
        image_folder(tmp_path)


def test_wrong_folders(tmp_path):
    with pytest.raises(InputError, match="folder of class folders"):
        image_folder(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="none in"):
        image_folder(empty)
    save(tmp_path / "flat" / "a.png", colour())
    with pytest.raises(InputError, match=r"a\.png beside them"):
        image_folder(tmp_path / "flat")
    save_tree(tmp_path / "tree")
    (tmp_path / "tree" / "cat" / "1.png").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"cat/1\.png: a whole image"):
        image_folder(tmp_path / "tree")
    for name, blob in (
        ("a.tar", b"nonsense"),
        ("a.tar.xz", b"\xfd7zXZ\x00nonsense"),
        ("a.tar.gz", b"\x1f\x8bnonsense"),
    ):
        (tmp_path / name).write_bytes(blob)
        with pytest.raises(InputError, match="whole tar archive"):
            image_folder(tmp_path / name)
    save_tree(tmp_path / "good")
    whole = tar(tmp_path / "b.tar.xz", tmp_path / "good", "w:xz")
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"whole tar archive|whole image"):
        image_folder(whole)


def pack(path, *members):
    """Write an archive of (name, what): bytes, or (type, link)."""
    with tarfile.open(path, "w") as archive:
        for name, what in members:
            member = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                member.size = len(what)
                archive.addfile(member, io.BytesIO(what))
            else:
                member.type, member.linkname = what
                archive.addfile(member)
    return path


def png(pixels=None):
    buffer = io.BytesIO()
    Image.fromarray(colour() if pixels is None else pixels).save(buffer, "png")
    return buffer.getvalue()


def test_an_archive_writes_nothing_outside(tmp_path):
    climbing = pack(tmp_path / "evil.tar", ("cat/a.png", png()), ("../../outside/a.png", png()))
    leading_out = pack(tmp_path / "link.tar", ("cat/a.png", png()), ("cat/link.png", (tarfile.SYMTYPE, "/etc/passwd")))
    rooted = pack(tmp_path / "root.tar", ("/outside/b.png", png()))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"inside of their archive; got \.\./\.\./outside/a\.png"):
        image_folder(climbing)
    with pytest.raises(InputError, match=r"got cat/link\.png, a link to what is not in it; pack it again"):
        image_folder(leading_out)
    assert image_folder(rooted).class_names == ("outside",)
    assert set(tmp_path.rglob("*")) == before


def test_cifar10_as_jpegs(tmp_path):
    top = tmp_path / "tree"
    for split, n in (("train", 2), ("test", 1)):
        for name in CIFAR10_CLASSES:
            for i in range(n):
                save(top / split / name / f"{i:04d}.jpg", colour(32, 32))
    tar(tmp_path / "cifar10-jpeg.tar.xz", top, "w:xz")
    images = cifar10(folders=tmp_path, download=False, at_least=2, classes=["plane", "ship"])
    assert images.counts.tolist() == [2, 2]
    assert images.source == "jpeg"
    assert "JPEG image folder, partial: 20 of 50,000 train images, lossy" in images.origin
    test = cifar10("test", source=images.source, folders=tmp_path, download=False)
    assert len(test) == 10
    (tmp_path / "cifar10-jpeg.tar.xz").unlink()
    (top / "train" / "ship").rename(top / "train" / "boat")
    top.rename(tmp_path / "cifar10-jpeg")
    with pytest.raises(InputError, match="CIFAR-10's ten classes"):
        cifar10(folders=tmp_path, download=False)


def test_torch_owns_the_pixels(tmp_path):
    save_tree(tmp_path)
    images = image_folder(tmp_path)
    assert images.images.is_contiguous()
    assert images.images.dtype == torch.uint8
