"""Small data sets in their official file formats, with classes that differ in brightness, and noise."""

import numpy as np
from scipy.io import savemat


def _pixels(rng, labels, classes):
    centres = 30 + 200 * labels[:, None] / classes
    return np.clip(rng.normal(centres, 30, (len(labels), 3072)), 0, 255).astype(np.uint8)


def write_cifar10(folder, train=14, test=4):
    rng, place = np.random.default_rng(0), folder / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    for name, count in (("data_batch_1.bin", train), ("test_batch.bin", test)):
        labels = np.repeat(np.arange(10), count).astype(np.uint8)
        (place / name).write_bytes(np.column_stack([labels, _pixels(rng, labels, 10)]).tobytes())


def write_cifar100(folder, train=14, test=4):
    """The binary layout: coarse label, fine label, pixels."""
    rng, place = np.random.default_rng(1), folder / "cifar-100-binary"
    place.mkdir(parents=True)
    for name, count in (("train.bin", train), ("test.bin", test)):
        fine = np.repeat(np.arange(100), count).astype(np.uint8)
        coarse = (fine // 5).astype(np.uint8)
        (place / name).write_bytes(np.column_stack([coarse, fine, _pixels(rng, fine, 100)]).tobytes())


def write_svhn(folder, train=14, test=4):
    """MATLAB files; the label 10 is the digit 0."""
    rng, place = np.random.default_rng(2), folder / "svhn"
    place.mkdir(parents=True)
    for name, count in (("train_32x32.mat", train), ("test_32x32.mat", test)):
        digits = np.repeat(np.arange(10), count)
        pixels = _pixels(rng, digits, 10).reshape(-1, 3, 32, 32).transpose(2, 3, 1, 0)
        savemat(place / name, {"X": pixels, "y": np.where(digits == 0, 10, digits)[:, None].astype(np.uint8)})
