"""What both studies of He and Su share: their networks and linear twins, their training, and the rate it is run at.

Source: arXiv:1910.06943 and the code published with it; spec srel 6.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from local_elasticity.base.checkpoints import read_checkpoint, write_checkpoint
from local_elasticity.base.errors import InputError
from local_elasticity.impact.kernel import kernel
from local_elasticity.training.loop import Training

Loss = Literal["mse", "bce"]

GROWTH = 100.0  # a loss this many times its start has diverged; so has one that ends above its start
KERNEL_SAMPLES = 200  # of the training set, for its top eigenvalue
SAVE_SECONDS = 60.0


def network(n_in: int, widths: Sequence[int], linear: bool, seed: int) -> nn.Sequential:
    """A fully connected network with one output, or its linear twin: the same layers without ReLU.

    Args:
        n_in: inputs.
        widths: hidden units, layer by layer.
        linear: leave the ReLU out.
        seed: of PyTorch's own initial values; network and twin of one seed start from the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise([n_in, *widths]):
            layers += [nn.Linear(n, m)] if linear else [nn.Linear(n, m), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 1))


@dataclass(frozen=True)
class Rate:
    """A learning rate, and why it was taken.

    Attributes:
        lr: the rate that training went on with.
        published: the published rate, scaled to this width.
        bound: above this rate gradient descent on the linearised network diverges.
        diverged: whether the published rate did.
    """

    lr: float
    published: float
    bound: float
    diverged: bool

    def words(self) -> str:
        """One line for tables."""
        if not self.diverged:
            return f"lr {self.lr:.3g}, as published for this width (stable below {self.bound:.3g})"
        return (
            f"lr {self.published:.3g}, as published for this width, diverged (stable below {self.bound:.3g}); "
            f"used {self.lr:.3g}, one over the top eigenvalue"
        )


def top_curvature(model: nn.Module, x: Tensor, loss: Loss, seed: int = 0) -> float:
    """The top eigenvalue of the mean loss's Gauss-Newton matrix at the present weights, from the tangent kernel.

    2 lambda(K) / n for the squared error, and at most lambda(K) / (4 n) for the cross-entropy of a sigmoid. Gradient
    descent on the linearised network is stable below 2 over it. At most 200 samples are looked at.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:KERNEL_SAMPLES]
    values = torch.linalg.eigvalsh(kernel(model, x[order], form=0).double())
    return float(values[-1]) / len(order) * (2.0 if loss == "mse" else 0.25)


def loss_of(outputs: Float[Tensor, "n 1"], labels: Float[Tensor, " n"], loss: Loss) -> Tensor:
    """The mean squared error, or the cross-entropy of the sigmoid of a logit."""
    flat = outputs.squeeze(1)
    return F.mse_loss(flat, labels) if loss == "mse" else F.binary_cross_entropy_with_logits(flat, labels)


def train(
    make: Sequence[nn.Sequential],
    x: Tensor,
    labels: Float[Tensor, " n"],
    loss: Loss,
    published: float,
    epochs: int,
    batch_size: int,
    seed: int,
    checkpoint: Path | None = None,
    words: str = "",
) -> tuple[nn.Sequential, Rate, float]:
    """Train by SGD at the published rate; where that diverges, from the start again at one over the top curvature.

    Args:
        make: two equal networks at their initial weights; one is trained, the other is kept for a second start.
        x: inputs.
        labels: 0 or 1.
        loss: "mse" or "bce".
        published: the rate to try first.
        epochs: passes over the data.
        batch_size: samples in one update; all of them for gradient descent.
        seed: of the order of the data.
        checkpoint: written every minute and continued from.
        words: what to call this training when telling the time left; silent without.

    Returns:
        The trained network, the rate, and the last epoch's mean loss.

    Raises:
        InputError: when the second rate diverges too.
    """
    first, spare = make
    curvature = top_curvature(first, x, loss)
    bound = 2.0 / curvature
    state = None
    if checkpoint is not None and checkpoint.exists():
        state = read_checkpoint(checkpoint, do="remove it: the same command trains again")
    again = bool(state["diverged"]) if state else False
    if not again:
        last = _descend(first, x, labels, loss, published, epochs, batch_size, seed, checkpoint, state, words)
        if math.isfinite(last):
            return first, Rate(published, published, bound, False), last
        state = None
    rate = Rate(1.0 / curvature, published, bound, True)
    last = _descend(spare, x, labels, loss, rate.lr, epochs, batch_size, seed, checkpoint, state, words, True)
    if not math.isfinite(last):
        raise InputError(
            expected="a training that converges", got=f"divergence at lr {published:.3g} and {rate.lr:.3g}",
            do="lower the published rate in the study's settings",
        )  # fmt: skip
    return spare, rate, last


def _descend(
    model: nn.Sequential,
    x: Tensor,
    labels: Tensor,
    loss: Loss,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    checkpoint: Path | None,
    state: dict | None,
    words: str,
    diverged: bool = False,
) -> float:
    """SGD; the last epoch's mean loss, or infinity as soon as it diverges."""
    training = Training(epochs, min(batch_size, len(x)), "sgd", lr, seed=seed)
    optimizer = training.build_optimizer(model)
    start, mean = 0, math.inf
    with torch.no_grad():
        initial = float(loss_of(model(x[:KERNEL_SAMPLES]), labels[:KERNEL_SAMPLES], loss))
    if state:
        model.load_state_dict(state["model"])
        start, mean = int(state["epoch"]), float(state["loss"])
    began = saved = told = time.perf_counter()
    for epoch in range(start, epochs):
        total = torch.zeros(())
        batches = 0
        whole = training.batch_size == len(x)
        for batch in [slice(None)] if whole else training.order(epoch, len(x)):
            value = loss_of(model(x[batch]), labels[batch], loss)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.detach()
            batches += 1
        mean = float(total) / batches
        if not mean <= GROWTH * max(initial, 0.1):
            return math.inf
        now = time.perf_counter()
        if words and now - told > 30:
            told = now
            left = (now - began) / (epoch + 1 - start) * (epochs - epoch - 1)
            print(f"{words}: pass {epoch + 1} of {epochs}, loss {mean:.4g}, about {left:.0f} s left", flush=True)
        if checkpoint is not None and now - saved > SAVE_SECONDS:
            saved = now
            _save(checkpoint, model, epoch + 1, mean, diverged)
    return mean if mean <= initial else math.inf


def _save(path: Path, model: nn.Module, epoch: int, loss: float, diverged: bool) -> None:
    """Whole or not at all."""
    write_checkpoint(path, {"model": model.state_dict(), "epoch": epoch, "loss": loss, "diverged": diverged})
