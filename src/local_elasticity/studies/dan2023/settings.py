"""What the image studies measure, on what, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

DEFINITIONS = ("kl_published", "suhe_published", "kl", "kl_reverse", "l1", "l2", "he_su")
PROBE, LIVE, LIMIT = "adam:0.0001", "optimizer", "sgd:limit"
PROBES = (PROBE, "sgd:0.01", "sgd:0.0001", LIVE, LIMIT)
MEASURE = "kl_published"
HELD = 200  # test images a class looked at with each snapshot


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        per_class: training images a class.
        batch_size: images in one update; smaller rests are dropped.
        epochs: passes over the data.
        runs: repetitions with other initial weights and another order of the data.
        probes_per_class: fixed sources and targets a class.
        every: look when the batch's number in its epoch is a multiple of this.
        test_per_class: images of the true test split looked at with each snapshot.
    """

    per_class: int
    batch_size: int
    epochs: int
    runs: int
    probes_per_class: int = 20
    every: int = 9
    test_per_class: int = HELD


@dataclass(frozen=True)
class Condition:
    """What is trained on what.

    Attributes:
        data: name of the data set.
        classes: its classes, in the paper's order.
        network: name of the network.
        optimizer: of training.
        lr: of training.
        weight_decay: of training.
        momentum: of training.
        labels: of CIFAR-100: "fine" or "coarse".
    """

    data: str
    classes: tuple[str, ...]
    network: str = "resnet18-plain"
    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    momentum: float = 0.0
    labels: str = "fine"

    @property
    def name(self) -> str:
        """For folders and tables."""
        return f"{self.data}-{self.network.partition(':')[0]}-{self.optimizer}"
