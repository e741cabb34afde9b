"""The training loop of the command line and the studies: repeatable, tracked, checkpointed with every snapshot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from local_elasticity.base.checkpoints import read_checkpoint, write_checkpoint
from local_elasticity.base.checks import check_choice, check_flag, check_rate, check_seed, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.base.files import discard
from local_elasticity.base.streams import random_state, set_random_state
from local_elasticity.impact.subject import preserved
from local_elasticity.training.tracker import Look, Tracker

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        epochs: passes over the data.
        batch_size: images in one update.
        optimizer: "adam", "adamw" or "sgd".
        lr: learning rate.
        weight_decay: as in ``torch.optim``.
        momentum: of "sgd".
        drop_last: leave out the last, smaller batch of an epoch, as the published protocol does.
        seed: of initial weights and of the order of the data.
    """

    epochs: int = 3
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    drop_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        for name in ("epochs", "batch_size"):
            check_whole(name, getattr(self, name))
        for name in ("lr", "weight_decay", "momentum"):
            check_rate(name, getattr(self, name))
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_flag("drop_last", self.drop_last)
        check_seed("seed", self.seed)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser over all trainable parameters."""
        extra = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise InputError(
                expected="a model with parameters that require gradients", got="none", do="unfreeze some of them"
            )
        return OPTIMIZERS[self.optimizer](parameters, lr=self.lr, weight_decay=self.weight_decay, **extra)

    def updates_per_epoch(self, samples: int) -> int:
        """Batches in one epoch.

        Raises:
            InputError: when there is not one whole batch.
        """
        whole, rest = divmod(samples, self.batch_size)
        updates = whole if self.drop_last or not rest else whole + 1
        if updates == 0:
            raise InputError(
                expected=f"at least one batch of {self.batch_size}", got=f"{samples} samples", do="use smaller batches"
            )
        return updates

    def order(self, epoch: int, samples: int) -> Iterator[Tensor]:
        """Batches of sample positions in one epoch, from a stream of its own for (seed, epoch)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        batches = torch.randperm(samples, generator=generator).split(self.batch_size)
        yield from batches[: self.updates_per_epoch(samples)]


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        update: updates made.
        total: updates in all.
        epoch: epoch, from 0.
        look: the snapshot just committed, or None.
    """

    update: int
    total: int
    epoch: int
    look: Look | None


class Session:
    """Model, optimiser and their position in training, saved with every snapshot of the tracker.

    Args:
        model: the network.
        loss_fn: ``loss_fn(outputs, labels)``.
        data: training inputs and labels.
        training: how to train.
        test: inputs and labels for ``test_loss`` and ``test_accuracy``, looked at with each snapshot.
        checkpoints: folder for the checkpoint of the last snapshot; none are written without.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        data: tuple[Tensor, Tensor],
        training: Training,
        test: tuple[Tensor, Tensor] | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        self.model, self.loss_fn, self.training = model, loss_fn, training
        self.inputs, self.labels = data
        self.test, self.checkpoints = test, checkpoints
        self.optimizer = training.build_optimizer(model)
        self.per_epoch = training.updates_per_epoch(len(self.inputs))
        self.total = training.epochs * self.per_epoch
        self.updates = self._saved = 0
        self._loss = self._right = 0.0
        self._seen = self._batches = 0

    def run(self, tracker: Tracker) -> Iterator[Progress]:
        """Train to the end from where the session stands, telling after each update."""
        for epoch in range(self.training.epochs):
            for batch, positions in enumerate(self.training.order(epoch, len(self.inputs))):
                if epoch * self.per_epoch + batch < self.updates:
                    continue
                if batch == 0:
                    self._loss = self._right = 0.0
                    self._seen = self._batches = 0
                loss = self._update(positions)
                self.updates += 1
                look = tracker.step(epoch=epoch + batch / self.per_epoch, loss=loss, **self._scalars())
                yield Progress(self.updates, self.total, epoch, look)

    def _update(self, positions: Tensor) -> float:
        self.model.train()
        labels = self.labels[positions]
        outputs = self.model(self.inputs[positions])
        loss = self.loss_fn(outputs, labels)
        if not bool(torch.isfinite(loss)):
            raise InputError(
                expected="a finite loss", got=f"loss {float(loss)} at update {self.updates + 1}", do="lower --lr"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._loss += loss.item()
        self._right += int((outputs.detach().argmax(dim=1) == labels).sum())
        self._seen, self._batches = self._seen + len(labels), self._batches + 1
        return loss.item()

    def _scalars(self) -> dict[str, Any]:
        scalars: dict[str, Any] = {
            "train_loss": self._loss / self._batches,
            "train_accuracy": self._right / self._seen,
        }
        if self.test is not None:
            memo: list[tuple[float, float]] = []

            def look(index: int) -> float:
                if not memo and self.test is not None:
                    memo.append(evaluate(self.model, self.loss_fn, *self.test))
                return memo[0][index]

            scalars |= {"test_loss": lambda: look(0), "test_accuracy": lambda: look(1)}
        return scalars

    def save(self, step: int) -> str | None:
        """Write the checkpoint of this step, whole or not at all; older ones go once it is there.

        Returns:
            Its SHA-256, which the tracker stores with the snapshot; None without checkpoints.
        """
        if self.checkpoints is None:
            return None
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": _portable(random_state()),
            "updates": self.updates if self.updates == step else step,
            "means": [self._loss, self._right, self._seen, self._batches],
        }
        digest = write_checkpoint(self._path(step), state)
        # The snapshot of this step is not committed yet: the one before stays until then.
        needed = {self._path(step), self._path(self._saved)}
        for old in sorted(self.checkpoints.glob("step-*.pt")):
            if old not in needed:
                discard(old)
        self._saved = step
        return digest

    def load(self, step: int, sha256: str | None = None) -> None:
        """Continue from the checkpoint of this step.

        Args:
            step: of the snapshot.
            sha256: of its checkpoint, as the run has it: ``tracker.checkpoint``; not compared without.

        Raises:
            InputError: when it is not there, another one, damaged, or not of this network and optimiser.
        """
        path, again = self._path(step), "use --overwrite to start again"
        state = read_checkpoint(path, sha256, do=again)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            updates, self._saved = int(state["updates"]), step
            self._loss, self._right, self._seen, self._batches = state["means"]
            set_random_state(_native(state["random"]))
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise InputError(
                expected=f"the checkpoint of step {step} of this network and optimiser",
                got=f"{path}, which holds something else ({type(error).__name__})",
                do=again,
            ) from error
        self.updates = updates

    def _path(self, step: int) -> Path:
        assert self.checkpoints is not None
        return self.checkpoints / f"step-{step:09d}.pt"


def evaluate(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Float[Tensor, "samples ..."],
    labels: Int[Tensor, " samples"],
    batch_size: int = 256,
) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode; the model and the random streams stay as they are."""
    loss, right = 0.0, 0
    with preserved(model, "eval", restore_streams=True), torch.no_grad():
        for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            outputs = model(x)
            loss += float(loss_fn(outputs, y)) * len(y)
            right += int((outputs.argmax(dim=1) == y).sum())
    return loss / len(inputs), right / len(inputs)


def _portable(state: dict[str, Any]) -> dict[str, Any]:
    """Random streams as tensors and plain values, readable with ``weights_only=True``."""
    kind, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    numpy_state = [kind, torch.from_numpy(keys.astype(np.int64)), *(float(x) for x in rest)]
    return {**state, "numpy": numpy_state, "python": [version, list(internal), gauss]}


def _native(state: dict[str, Any]) -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = state["numpy"]
    version, internal, python_gauss = state["python"]
    numpy_state = (kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss)
    return {**state, "numpy": numpy_state, "python": (version, tuple(internal), python_gauss)}
