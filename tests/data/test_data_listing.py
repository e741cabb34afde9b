"""Which files of an image folder are images, of which class and split: links, pipes, odd names, splits, archives."""

import io
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest

from local_elasticity.base.errors import InputError
from local_elasticity.data import files, folder, image_folder, listing

Image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow: install local-elasticity[data]")


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv(files.ENVIRONMENT, raising=False)


def png(level=0):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def save(top, *names):
    """Write images, each of a grey level of its own, in the order of their names."""
    for level, name in enumerate(sorted(names)):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(png(level))
    return top


def levels(images):
    """Class -> grey levels of its images: what was read, and as what."""
    read: dict[str, list[int]] = {}
    for label, image in zip(images.labels.tolist(), images.images, strict=True):
        read.setdefault(images.class_names[label], []).append(int(image[0, 0, 0]))
    return read


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


# --- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("cat/again", "cat"),  # a loop
        ("cat/round", "."),  # a loop over the whole folder
        ("cat/up", ".."),  # and out of it
        ("kitten", "cat"),  # a second name of a class
        ("aaa", "cat"),  # also one that is sorted before it
        ("dog/more", "cat"),  # a class in another
        ("cat/9.png", "cat/0.png"),
        ("dog/9.png", "cat/0.png"),  # the real place has the say
    ],
)
def test_a_link_inside_adds_nothing(tmp_path, link, to):
    top = save(tmp_path / "a" / "pets", "cat/0.png", "cat/1.png", "dog/0.png")
    save(tmp_path / "a" / "others", "x/0.png")
    os.symlink(top / to, top / link)
    images = image_folder(top)
    assert levels(images) == {"cat": [0, 1], "dog": [2]}
    assert images.origin.endswith("as their files encode them; passed over 1 link to what is there already")


def test_links_that_lead_round_each_other_end(tmp_path):
    top = save(tmp_path, *(f"{name}/0.png" for name in "abcdefgh"))
    for first in "abcdefgh":
        for second in "abcdefgh":
            os.symlink(top / second, top / first / f"to-{second}")
    assert len(image_folder(top)) == 8


def test_what_lies_outside_is_read_once(tmp_path):
    save(tmp_path / "pool", "one/0.png", "one/1.png", "2.png")
    top = save(tmp_path / "pets", "dog/9.png")
    os.symlink(tmp_path / "pool" / "one", top / "cat")
    os.symlink(tmp_path / "pool" / "one", top / "cat-again")
    os.symlink(tmp_path / "pool" / "2.png", top / "dog" / "2.png")
    os.symlink(tmp_path / "pool" / "2.png", top / "dog" / "3.png")
    with pytest.raises(InputError, match=r"in one class; got cat-again, the same file as cat; take one"):
        image_folder(top)
    (top / "cat-again").unlink()
    assert levels(image_folder(top)) == {"cat": [1, 2], "dog": [0, 0]}
    assert len(image_folder(top)) == 4


def test_hard_links_count_once_in_a_class_and_are_refused_in_two(tmp_path):
    top = save(tmp_path, "cat/0.png", "dog/0.png")
    os.link(top / "cat" / "0.png", top / "cat" / "1.png")
    assert levels(image_folder(top)) == {"cat": [0], "dog": [1]}
    os.link(top / "cat" / "0.png", top / "dog" / "1.png")
    with pytest.raises(InputError, match=r"in one class; got dog/1\.png, the same file as cat/0\.png"):
        image_folder(top)


def test_a_split_may_be_a_link_to_another(tmp_path):
    top = save(tmp_path, "train/cat/0.png", "train/dog/0.png")
    os.symlink(top / "train", top / "val")
    for split in ("train", "val"):
        assert levels(image_folder(top, split)) == {"cat": [0], "dog": [1]}


@pytest.mark.parametrize(("link", "to"), [("cat/9.png", "nowhere.png"), ("bird", "nowhere"), ("cat/a.png", "a.png")])
def test_broken_links_are_refused_by_name(tmp_path, link, to):
    top = save(tmp_path, "cat/0.png", "dog/0.png")
    os.symlink(to, top / link)  # the last one leads to itself
    with pytest.raises(InputError, match=rf"got {link}, a broken link; mend or remove the link"):
        image_folder(top)


# --- what is no image ----------------------------------------------------------------------------------------------


def test_pipes_and_sockets_are_passed_over_and_counted(tmp_path, monkeypatch):
    top = save(tmp_path / "pets", "cat/0.png", "dog/0.png")
    os.mkfifo(top / "cat" / "9.png")
    os.symlink("/dev/null", top / "dog" / "8.jpg")
    monkeypatch.chdir(top / "dog")  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("9.png")
        images = image_folder(top)
    assert levels(images) == {"cat": [0], "dog": [1]}
    assert images.origin.endswith("; passed over 3 pipes, sockets or devices")
    (top / "cat" / "0.png").unlink()
    (top / "dog" / "0.png").unlink()
    with pytest.raises(InputError, match=r"got none in .*pipe"):
        image_folder(top)


def test_hidden_files_and_capitals(tmp_path):
    top = save(tmp_path, "cat/0.PNG", "dog/1.Png", "__MACOSX/cat/x.png", "cat/.hidden.png", ".git/cat/x.png")
    (top / "cat" / "._0.PNG").write_bytes(b"of another system")
    (top / ".DS_Store").write_bytes(b"")
    (top / "cat" / "Thumbs.db").write_bytes(b"")
    images = image_folder(top)
    assert images.class_names == ("cat", "dog")
    assert len(images) == 2
    save(top, "cat/new.heic")
    with pytest.raises(InputError, match=r"can be decoded .*; got cat/new\.heic; convert it"):
        image_folder(top)


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    top = save(tmp_path, "cat/0.png", "dog/0.png")
    odd = os.fsencode(top) + b"/cat/caf\xe9\n.png"
    try:
        Path(os.fsdecode(odd)).write_bytes(png(7))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    monkeypatch.setattr(folder, "CACHE_FROM", 2)  # the cache's key holds the names
    assert levels(image_folder(top)) == levels(image_folder(top)) == {"cat": [0, 7], "dog": [1]}
    Path(os.fsdecode(odd)).write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"cat/caf\\udce9\\n\.png: a whole image"):
        image_folder(top)
    os.unlink(odd)
    os.mkdir(os.fsencode(top) + b"/\xff")
    Path(os.fsdecode(os.fsencode(top) + b"/\xff/0.png")).write_bytes(png())
    with pytest.raises(InputError, match=r"names can be printed; got \\udcff; rename"):
        image_folder(top)


def test_what_may_not_be_read_and_what_vanishes(tmp_path, monkeypatch):
    top = save(tmp_path, "cat/0.png", "dog/0.png")
    scandir, read_bytes, closed = os.scandir, Path.read_bytes, str(top / "cat")

    def refuse(place):
        if os.fspath(place) == closed:
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    with monkeypatch.context() as patch:
        patch.setattr(listing.os, "scandir", refuse)
        with pytest.raises(InputError, match=r"a folder that can be read; got .*cat \(PermissionError: Perm.*permiss"):
            image_folder(top)

    def vanish(path):
        (top / "dog" / "0.png").unlink(missing_ok=True)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", vanish)
    with pytest.raises(InputError, match=r"an image that can be read; got .*dog/0\.png \(FileNotFoundError"):
        image_folder(top)


# --- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [("train", "val"), ("Train", "VALID"), ("TRAINING", "Dev"), ("train", "validation")])
def test_split_folders_whatever_their_capitals(tmp_path, named):
    train, val = named
    top = save(tmp_path, f"{train}/cat/0.png", f"{train}/dog/0.png", f"{val}/dog/0.png", f"{val}/eel/0.png")
    one, other = image_folder(top), image_folder(top, split=val)
    assert one.class_names == other.class_names == ("cat", "dog", "eel")
    assert [len(one), len(other), one.split, other.split] == [2, 2, "train", "val"]
    assert one.labels.tolist() == [0, 1]
    assert other.labels.tolist() == [1, 2]
    with pytest.raises(InputError, match=r"split of .*; got 'test'; .*known: train, val"):
        image_folder(top, "test")
    with pytest.raises(InputError, match=r"got 'vall'; did you mean 'val'\?"):
        image_folder(top, "vall")


def test_labels_agree_in_archives_too(tmp_path):
    path = pack(
        tmp_path / "a.tar",
        *(("set/Train/cat/0.png", png(0)), ("set/Train/dog/0.png", png(1)), ("set/val/dog/0.png", png(2))),
    )
    assert levels(image_folder(path)) == {"cat": [0], "dog": [1]}
    assert levels(image_folder(path, "val")) == {"dog": [2]}
    assert image_folder(path, "val").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("train/cat/0.png", "extra/dog/0.png"), r"split folders only .*: train, extra; name every split folder so"),
        (("train/cat/0.png", "val/cat/0.png", "cat/0.png"), "split folders only .*train, val, cat"),
        (("train2017/cat/0.png", "val2017/cat/0.png"), "may be either: train2017, val2017"),
        (("val/cat/0.png", "valid/cat/0.png", "train/cat/0.png"), "got val and valid, both val; join them"),
        (("train/cat/0.png", "Train/cat/0.png"), "got Train and train, both train"),
        (("train/0.png", "test/0.png"), r"in the folder of its class; got train/0\.png beside them"),
        (("train/cat/0.png", "train/1.png"), r"got train/1\.png beside them"),
        (("train/cat/0.png", "val/cat/0.png", "1.png"), "may be either: train, val, 1.png"),
        (("cat/train/0.png", "cat/val/0.png", "dog/train/0.png"), "at the top .*; got the split folder cat/train"),
        (("a/train/cat/0.png", "b/train/cat/0.png"), "got the split folder a/train"),
        (("train/Cat/0.png", "val/cat/0.png"), "one spelling of a class .*; got Cat and cat; rename"),
        (("test/cat/0.png", "val/cat/0.png"), "got 'train'; .*known: test, val"),
    ],
)
def test_splits_that_are_not_clear_are_refused(tmp_path, names, says):
    if len({name.casefold() for name in names}) < len(names) and not _minds_capitals(tmp_path):
        pytest.skip("this file system does not tell capitals")
    with pytest.raises(InputError, match=says):
        image_folder(save(tmp_path / "top", *names))


def _minds_capitals(place):
    (place / "probe").touch()
    return not (place / "PROBE").exists()


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("train/0.png", "car/0.png"), ("car", "train")),  # a train is a vehicle too
        (("testis/a/0.png", "valley/0.png"), ("testis", "valley")),
        (("cat/old/0.png", "cat/new/1.png", "dog/0.png"), ("cat", "dog")),
        (("train/images/cat/0.png", "train/images/dog/0.png", "val/images/cat/0.png"), ("cat", "dog")),
        (("around/it/cat/0.png", "around/it/dog/0.png"), ("cat", "dog")),
        (("train/A/0.png", "train/a/0.png"), ("A", "a")),  # letters: both in one split
    ],
)
def test_class_folders(tmp_path, names, classes):
    if len({name.casefold() for name in names}) < len(names) and not _minds_capitals(tmp_path):
        pytest.skip("this file system does not tell capitals")
    assert image_folder(save(tmp_path / "top", *names)).class_names == classes


def test_a_split_without_classes_does_not_spoil_the_others(tmp_path):
    top = save(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/0.png")
    assert len(image_folder(top)) == 2
    with pytest.raises(InputError, match=r"got test/0\.png beside them"):
        image_folder(top, "test")


# --- archives --------------------------------------------------------------------------------------------------------


def test_links_in_archives(tmp_path):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    whole = (("cat/0.png", png(0)), ("dog/0.png", png(1)))
    again = pack(
        tmp_path / "again.tar",
        *(*whole, ("cat/1.png", (hard, "cat/0.png")), ("dog/2.png", (soft, "../cat/0.png"))),
        *(("cat/up", (soft, "..")), ("kitten", (soft, "./cat")), ("cat/p.png", (tarfile.FIFOTYPE, ""))),
    )
    images = image_folder(again)
    assert levels(images) == {"cat": [0], "dog": [1]}
    assert images.origin.endswith("passed over 1 pipe, socket or device and 4 links to what is there already")
    two = pack(tmp_path / "two.tar", *whole, ("dog/1.png", (hard, "cat/0.png")))
    with pytest.raises(InputError, match=r"in one class; got dog/1\.png, the same file as cat/0\.png"):
        image_folder(two)
    pool = pack(tmp_path / "pool.tar", *whole, (".pool/7", png(7)), ("dog/7.png", (soft, "../.pool/7")))
    with pytest.raises(InputError, match=r"dog/7\.png, a link to what is not in it"):
        image_folder(pool)
    blob = pack(tmp_path / "blob.tar", *whole, ("pool/7", png(7)), ("dog/7.png", (soft, "../pool/7")))
    assert levels(image_folder(blob)) == {"cat": [0], "dog": [1, 7]}
    lost = pack(tmp_path / "lost.tar", *whole, ("bird", (soft, "/elsewhere/bird")))
    with pytest.raises(InputError, match="got bird, a link to what is not in it; pack it again"):
        image_folder(lost)


def test_the_last_member_of_a_name_counts(tmp_path):
    path = pack(tmp_path / "a.tar", ("cat/0.png", png(0)), ("dog/0.png", png(1)), ("cat/0.png", png(5)))
    assert levels(image_folder(path)) == {"cat": [5], "dog": [1]}


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz"])
def test_no_image_is_lost_from_a_damaged_archive(tmp_path, ending):
    blank = tmp_path / "whole.tar"
    pack(blank, *((f"{name}/{i}.png", png(i)) for name in ("cat", "dog") for i in range(3)))
    with tarfile.open(blank) as archive:
        last = [member.offset for member in archive][-1]
    blob = blank.read_bytes()
    damages = {
        "a header": blob[:last] + b"?" * 512 + blob[last + 512 :],
        "the end": blob[:last],
        "half a header": blob[: last + 100],
        "half an image": blob[: last + 530],
        "two archives": blob + blob,
    }
    for what, bytes_ in damages.items():
        path = tmp_path / f"{what.replace(' ', '-')}.{ending}"
        path.write_bytes(_compressed(bytes_, ending))
        with pytest.raises(InputError, match="whole tar archive") as error:
            image_folder(path)
        assert "\n" not in str(error.value), what
    whole = tmp_path / f"again.{ending}"
    whole.write_bytes(_compressed(blob, ending))
    assert len(image_folder(whole)) == 6


def _compressed(blob, ending):
    if ending == "tar":
        return blob
    import gzip
    import lzma

    return gzip.compress(blob) if ending == "tar.gz" else lzma.compress(blob)


def test_an_image_that_is_listed_and_not_read_is_an_error(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.tar", ("cat/0.png", png(0)), ("dog/0.png", png(1)))
    listed = folder.list_split(path, "train")
    path = pack(tmp_path / "a.tar", ("cat/0.png", png(0)))  # changed between listing and reading
    monkeypatch.setattr(folder, "list_split", lambda *_: listed)
    with pytest.raises(InputError, match=r"every image that it lists; got none for dog/0\.png"):
        image_folder(path)


@pytest.mark.parametrize("name", ["pets.zip", "pets.7z"])
def test_other_archives_are_refused_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(InputError, match=r"tar archive of one; got .*; unpack it, and give its folder"):
        image_folder(tmp_path / name)
