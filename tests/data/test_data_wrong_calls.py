"""Wrong calls of `data`: each is refused before the work, in one line of three parts."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from local_elasticity import data
from local_elasticity.base import checks
from local_elasticity.base.errors import InputError
from local_elasticity.cli import main
from local_elasticity.data import files
from local_elasticity.data.images import LabelledImages

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def nothing_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(files.ENVIRONMENT, raising=False)
    monkeypatch.chdir(tmp_path)


def make(**changes: Any):
    parts: dict[str, Any] = {
        "images": torch.zeros(6, 1, 4, 4, dtype=torch.uint8),
        "labels": torch.arange(6) % 3,
        "class_names": ("ant", "bee", "cat"),
        "name": "bugs",
        "origin": "made here",
        "split": "train",
        "indices": torch.arange(6),
    }
    return LabelledImages(**{**parts, **changes})


IMAGES = make()
X, Y = torch.zeros(6, 2), torch.arange(6) % 3
OFFLINE = {"download": False}

# What is called -> its right arguments, and for each of them what is wrong.
TABLE: dict[Any, Any] = {
    data.digits: ({}, {"split": ("tset", None, 3, ["train"])}),
    data.mnist: (OFFLINE, {"split": ("tset", None), "folders": (3, [None], "", b"x", {"a": 1}), "download": ("no", 1)}),
    data.fashion_mnist: (OFFLINE, {"split": ("dev", 1), "folders": (3, "a\0b"), "progress": ("yes", None)}),
    data.svhn: (OFFLINE, {"split": ("extra", ()), "folders": (3, ["~nobody-of-this-name/x"]), "download": (2,)}),
    data.cifar10: (
        OFFLINE,
        {
            "split": ("val", None),
            "source": ("jpg", None, 1, []),
            "at_least": (0, -1, 1.5, "3", True, NAN, 6000),
            "classes": ([], "", 3, [None], [1.5], [True], torch.eye(2)),
            "folders": (3, [3]),
            "download": ("no", None),
        },
    ),
    data.cifar100: (OFFLINE, {"labels": ("fin", None, []), "at_least": (0, "x"), "classes": ([], 2)}),
    data.cifar10_subset: (
        OFFLINE,
        {
            "n_classes": (1, 11, "3", 2.5, None),
            "n_train": (0, "1", NAN),
            "n_validation": (0, True),
            "replacement": ("no", 1),
            "seed": (-1, None, "0", 0.5),
            "classes": (["cat"],),
            "at_last": (3,),
        },
    ),
    data.load: (
        {"name": "mnist", **OFFLINE},
        {
            "name": (None, 3, "", b"mnist", "mnsit", "a\0b", ["mnist"], "/nowhere/at/all"),
            "split": ("tset", None),
            "size": (3,),
            "sizes": (3,),
            "download": ("no",),
        },
    ),
    data.load_split: (
        {"name": "geomnist", "per_class": 2},
        {
            "name": (None, 3, "geomnits", ""),
            "classes": ([], ["square", "ellipse"], 3, [0, 0], [1], [None, 1], [0, 7]),
            "per_class": (0, -1, "2", 2.5),
            "seed": (-1, "a", None, 2**32),
            "size": (3,),
        },
    ),
    data.geomnist: (
        {"n_train": 1, "n_validation": 1},
        {
            "n_train": (0, "1", 1.5, None, True, NAN),
            "n_validation": (0, -2, [1]),
            "variant": ("vareid", None, [], 1),
            "n_classes": (1, 4, "3", None),
            "seed": (-1, 2**32, 0.5, None),
            "place": ("3", NAN, 7, None),
            "size": (0.4, INF, -1),
            "intensity": (0, 1.5, "x"),
            "noise": (-1, INF, NAN, None, 10**400),
        },
    ),
    data.corrupt_labels: (
        {"data": Y, "rate": 0.5},
        {
            "data": (None, 3, ["a", "b"], [0.5, 1.5], [], Y.bool(), Y.to(torch.complex64), (None, Y), (X[:2], Y), Y - 1,
                     {"a": 1}, torch.zeros(3, 2, dtype=torch.int64), [0, 0], np.array(["a"]), object()),
            "rate": (-0.1, 1.1, NAN, "0.5", None, True),
            "kind": ("exat", None, []),
            "n_classes": (0, 1, 2, 2.5, "3", -1),
            "seed": (-1, None, "0", 1.5),
        },
    ),
    data.probes: (
        {"dataset": IMAGES, "per_class": 1},
        {
            "dataset": (None, 3, X, (X,), (X, Y[:2]), (X, Y.double()), (X, Y - 1), (X, Y * 10**9), ("a", "b"), [],
                        (X * NAN, Y), (X, None), (X[:0], Y[:0]), "digits"),
            "per_class": (0, -1, 1.5, None, "1", 3, True),
            "seed": (-1, None, "0", 0.5),
            "tensors": (3, (X, Y[:3]), (X, Y.flip(0)), "x", (X * INF, IMAGES.labels)),
        },
    ),
    data.image_folder: (
        {"path": "."},
        {
            "path": (None, 3, "", b".", "a\0b", "nowhere", ["."], "~nobody-of-this-name"),
            "split": (None, 3, ["train"]),
            "size": (0, -1, 1.5, "8", (8,), (8, 8, 8), (0, 8), (8, None), 10**6, True, NAN, [[8, 8]]),
            "name": (3, b"x"),
            "cache": ("no", 1),
            "progress": ("no", None),
        },
    ),
    data.search_folders: ({}, {"folders": (3, [3], "nowhere", [None], "")}),
    data.catalogue: ({}, {"folders": (3, "nowhere")}),
    data.AugmentOnce: (
        {"seed": 0},
        {"seed": (-1, None, "0", 0.5), "padding": (-1, 1.5, None, 10**9), "flip": (-0.1, 1.1, NAN, "x", None)},
    ),
    data.AugmentOnce(0): ({}, {"images": (None, 3, X, [])}),
    make: (
        {},
        {
            "images": (None, 3, [], np.zeros((6, 1, 4, 4), np.uint8), torch.zeros(6, 1, 4, 4), torch.tensor(1),
                       IMAGES.images[0]),
            "labels": (None, [0] * 6, Y.int(), Y[:3], Y + 1),
            "class_names": ((), None, ("ant",), (1, 2, 3), "abc", ["ant", "bee", "cat"]),
            "indices": (None, Y[:2], list(range(6))),
            "white": (0, -1, None, 1.5, "255"),
        },
    ),
    IMAGES.at: ({}, {"positions": ([6], [-1], [0.5], None, "x", 3, [True, False], torch.eye(2), [[0]])}),
    IMAGES.class_label: ({}, {"wanted": ("wasp", 3, -1, None, 1.5, True, "9", [])}),
    IMAGES.subset: ({}, {"classes": ([], "", None, 3, ["ant", "ant"], ["wasp"], [1.5], [None], {"ant": 1}, [True])}),
    IMAGES.take: ({"per_class": 1, "seed": 0}, {"per_class": (0, 3, "1", None, True), "seed": (-1, None, 0.5)}),
    IMAGES.tensors: (
        {},
        {
            "normalise": ("atuo", 3, (1,), (0.5, 0), (0.5, -1), (NAN, 1), ("a", 1), ((1, 2), 1), (0.5, INF), (None, 1)),
            "augment": (-1, "x", 1.5, True, []),
        },
    ),
    data.TensorData: (
        {"train": (X, Y), "validation": (X, Y), "class_names": ("a", "b", "c"), "origin": "", "factors": {}},
        {"train": (None, 3, (X,), (X, Y[:2]), (X, None), X), "validation": ((X.numpy(), Y), (X, Y[:, None]))},
    ),
}  # fmt: skip
CALLS = [
    pytest.param(call, {**right, name: wrong}, id=f"{getattr(call, '__qualname__', 'call')}-{name}-{i}")
    for call, (right, wrongs) in TABLE.items()
    for name, values in wrongs.items()
    for i, wrong in enumerate(values)
]


@pytest.mark.parametrize(("call", "arguments"), CALLS)
def test_wrong_calls_are_refused_in_our_words(call, arguments):
    with pytest.raises(InputError) as error:
        call(**arguments)
    for part in (error.value.expected, error.value.got, error.value.do):
        assert part.strip()
        assert "\n" not in part
        assert " at 0x" not in part
    assert len(str(error.value)) < 700
    assert not re.search(r"Traceback|TypeError|AttributeError|RuntimeError", str(error.value))


def test_there_are_many():
    assert len(CALLS) >= 200


@pytest.mark.parametrize("name", ["diabets", None, 3, []])
def test_regression_sets_by_name(name):
    from local_elasticity.data.regression import regression

    with pytest.raises(InputError, match="known: diabetes, fair"):
        regression(name)


def test_advice_names_the_nearest_and_can_be_followed():
    with pytest.raises(InputError, match="did you mean 'mnist'"):
        data.load("mnsit")
    with pytest.raises(InputError, match="did you mean 'varied'"):
        data.geomnist(1, 1, variant="vareid")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"leave it out \(it has at_least, classes, source\)"):
        data.load("cifar10", sizes=3)
    with pytest.raises(InputError, match=r"for a mask: torch.nonzero\(mask\).squeeze\(1\)"):
        IMAGES.at(torch.tensor([True, False]))
    mask = torch.tensor([True, False, True, False, False, False])
    assert IMAGES.at(torch.nonzero(mask).squeeze(1)).indices.tolist() == [0, 2]


def test_numbers_of_numpy_and_lists_are_as_good():
    one: Any = np.int64(1)
    names: Any = np.array(["cat", "ant"])
    labels: Any = torch.tensor([2, 0])
    pair: Any = (X.tolist(), Y.tolist())
    assert IMAGES.take(one, one).counts.tolist() == [1, 1, 1]
    assert IMAGES.subset(names).class_names == IMAGES.subset(labels).class_names == ("cat", "ant")
    assert data.probes(pair, per_class=one + one).ys.tolist() == [0, 0, 1, 1, 2, 2]
    assert checks.check_real("x", np.float32(0.5), 0, 1) == 0.5


def test_a_value_is_shown_on_one_short_line():
    class Silent:
        def __repr__(self):
            raise RuntimeError

    for value in ("a\nb", "x" * 999, torch.zeros(3, 4), [["y" * 99] * 9], Silent()):
        assert len(checks.in_words(value)) <= 100
        assert "\n" not in checks.in_words(value)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow: install local-elasticity[data]")
    for split in ("Train", "val"):
        for name in ("cat", "dog"):
            for i in range(2):
                (tmp_path / "pets" / split / name).mkdir(parents=True, exist_ok=True)
                pixels = np.full((5 + i, 4, 3), 40 * i, np.uint8)
                image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{i}.png")
    return str(tmp_path / "pets")


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


def test_size_on_the_command_line(pets, tmp_path, capsys):
    assert run("data", pets) == 2
    assert "--size" in capsys.readouterr().err
    assert run("data", pets, "--size", "6", "3") == 0
    assert "4 training images of shape (3, 6, 3)" in capsys.readouterr().out
    for command in ("track", "measure", "train"):
        assert run(command, "--data", pets, "--size", "6", "3", "9") == 2
        assert "pixels, or height and width; got 6 3 9" in capsys.readouterr().err
    small = ("--steps", "1", "--replicas", "1", "--network", "mlp", "--probes-per-class", "1")
    assert run("train", "--data", pets, "--size", "6", *small, "--out", str(tmp_path / "run")) == 0
    assert run("data", "digits", "--size", "6") == 2
    assert "options that digits has; got 'size'; leave it out" in capsys.readouterr().err


def test_the_validation_split_of_a_folder(pets, tmp_path):
    split = data.load_split(pets, size=6)
    assert [len(split.train[1]), len(split.validation[1])] == [4, 4]
    (tmp_path / "pets" / "val" / "cat" / "0.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"val/cat/0\.png"):
        data.load_split(pets, size=6)
    assert run("track", "--data", pets, "--size", "6", "--out", str(tmp_path / "run")) == 2  # not passed over
