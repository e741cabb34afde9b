"""Trained replicas and their log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from local_elasticity.base.errors import InputError
from local_elasticity.runs.ensembles import as_dataset
from local_elasticity.training.lockstep import Route, RouteName
from local_elasticity.training.lockstep.routes import Loop, copied

if TYPE_CHECKING:
    import xarray as xr

    from local_elasticity.runs.run import Run


@dataclass(frozen=True)
class Plan:
    """How an ensemble was advanced.

    Attributes:
        route: "kernels", "vmap" or "loop".
        chunk_size: replicas in one batched step.
        threads: chunks that advanced at the same time, each with one intra-op thread.
        seconds: seconds of training in this call, looks left out.
        seconds_looking: seconds of validation, probes, trackers and callbacks.
    """

    route: RouteName
    chunk_size: int
    threads: int
    seconds: float = 0.0
    seconds_looking: float = 0.0


@dataclass(eq=False)
class Ensemble:
    """Trained replicas and their log.

    Attributes:
        step: updates made.
        steps: updates asked for.
        replicas: the replicas' numbers, which decide their random streams.
        weights: parameter name -> (replica, ...).
        buffers: buffer name -> (replica, ...).
        diverged: the update (from 0) at which a replica's loss was first not finite; -1 where it never was.
        log: name -> array. Per step: logits (steps, replicas, outputs) from before the update, losses (steps,
            replicas), samples and labels (steps, replicas); with batches there is a dimension of the batch after the
            replicas. On schedules: validation_loss, validation_accuracy (looks, replicas); probe_mean, probe_variance
            (looks, replicas, classes, outputs) and the collapse metrics (looks, replicas, layers). Rows that were not
            reached hold NaN or -1.
        times: "validation" and "probe" -> updates made at each look.
        layers: what the collapse metrics are of, "outputs" first.
        plan: how it was advanced.
        runs: replica -> run of its tracker.
    """

    step: int
    steps: int
    replicas: tuple[int, ...]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    diverged: np.ndarray
    log: dict[str, np.ndarray]
    times: dict[str, np.ndarray]
    layers: tuple[str, ...]
    plan: Plan
    runs: dict[int, Run] = field(default_factory=dict)
    _template: Any = field(default=None, repr=False)
    _routes: Sequence[Route] = field(default=(), repr=False)
    _map: Callable[..., Iterable[Any]] = field(default=map, repr=False)

    def __repr__(self) -> str:
        gone = int((self.diverged >= 0).sum())
        return (
            f"Ensemble({len(self.replicas)} replicas, {self.step} of {self.steps} steps, route {self.plan.route!r}"
            + (f", {gone} diverged)" if gone else ")")
        )

    def __getattr__(self, name: str) -> Any:
        log = self.__dict__.get("log", {})
        if name in log:
            return log[name]
        raise AttributeError(f"an ensemble without {name!r}; its log has {sorted(log)}")

    def model(self, position: int) -> nn.Module:
        """A network with the weights of the replica at this position, independent of the ensemble."""
        live = self._live(position)
        model = copied(live or self._template)
        if live is None:
            load_weights(model, self.weights, self.buffers, position)
        return model

    def _live(self, position: int) -> nn.Module | None:
        """The replica itself, where it is a network of its own, with all that it keeps."""
        networks = [model for route in self._routes if isinstance(route, Loop) for model in route.models]
        return networks[position] if networks else None

    def outputs(self, x: Float[Tensor, "samples ..."]) -> Float[Tensor, "replicas samples outputs"]:
        """What every replica says of these samples now, in eval mode."""
        if not self._routes:
            with torch.no_grad():
                models = [self.model(i).eval() for i in range(len(self.replicas))]
                return torch.stack([_rows(model(x)) for model in models])
        like = self._routes[0].problem.inputs
        return torch.cat(list(self._map(lambda route: route.outputs(x.to(like)), self._routes)))

    def class_means(self, n_classes: int | None = None) -> Float[np.ndarray, "steps classes outputs"]:
        """Mean logits over the replicas whose sample at a step has a class: spec lesde 3.2.

        NaN where no replica saw the class at that step. Replicas that diverge are left out from then on.

        Raises:
            InputError: for a log without classes.
        """
        logits, labels = self.log.get("logits"), self.log.get("labels")
        if logits is None or labels is None or labels.dtype.kind not in "iu":
            raise InputError(expected="a log with logits and classes", got="none", do="train with log=True on classes")
        logits = logits[: self.step].reshape(self.step, -1, logits.shape[-1]).astype(np.float64)
        labels = labels[: self.step].reshape(self.step, -1)
        seen = np.isfinite(logits).all(axis=2)
        means = []
        for label in range(n_classes or int(labels.max()) + 1):
            chosen = (labels == label) & seen
            count = chosen.sum(axis=1)
            total = np.einsum("trk,tr->tk", np.where(chosen[:, :, None], logits, 0.0), chosen.astype(np.float64))
            means.append(np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], np.nan))
        return np.stack(means, axis=1)

    def to_xarray(self) -> xr.Dataset:
        """The log as a dataset, as it lies on disk."""
        return as_dataset(self.log, self.times, self.replicas, self.layers, self.diverged, self.step)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], position: int) -> None:
    """Copy one replica's weights and buffers into a module."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][position])
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name][position])


@contextmanager
def output_of(model: nn.Module) -> Any:
    """A list that the model's output is put into."""
    found: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, arguments, output: found.append(output.detach()))
    try:
        yield found
    finally:
        handle.remove()


def _rows(outputs: Tensor) -> Tensor:
    return outputs.unsqueeze(1) if outputs.dim() == 1 else outputs
