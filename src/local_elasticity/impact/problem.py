"""The problem that every engine solves: a model, sources, targets, a step; and the outputs before the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from local_elasticity.errors import InputError
from local_elasticity.impact.checks import check_labels, check_output
from local_elasticity.impact.state import set_random_state
from local_elasticity.updates import Step

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Problem:
    """Forward passes, gradients and the outputs before the step, shared by the engines.

    A source that is no target is looked at in one batch with the targets; ``look_before`` uses batches of the same
    size for it, so that before and after go through the same kernels.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        inputs: Tensor,
        labels: Tensor,
        targets: Tensor,
        parameters: dict[str, nn.Parameter],
        step: Step,
        target_chunk_size: int | None,
        streams: dict[str, Any],
    ) -> None:
        self.model, self.loss_fn, self.step, self.streams = model, loss_fn, step, streams
        self.inputs, self.labels, self.targets = inputs, labels, targets
        self.parameters = list(parameters.values())
        self.self_index = match_rows(inputs, targets)
        self.n_sources, self.n_targets = len(inputs), len(targets)
        self.has_strangers = bool((self.self_index < 0).any())
        rows = self.n_targets + self.has_strangers
        self.target_chunk_size = min(rows, target_chunk_size or rows)
        # Modules in train mode may draw random numbers and write buffers: every sweep then starts from the same ones.
        self.stochastic = any(module.training for module in model.modules())
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if self.stochastic else []
        self.before: Float[Tensor, "targets outputs"]
        self.source_before: Float[Tensor, "sources outputs"]
        self.noise_floor: Float[Tensor, " targets"]

    @property
    def n_outputs(self) -> int:
        """K."""
        return self.before.shape[1]

    def _rewind(self) -> None:
        if self.stochastic:
            set_random_state(self.streams)
            for buffer, value in self.buffers:
                buffer.data.copy_(value)  # through .data: a graph that the caller built before stays valid

    def forward(self, x: Tensor) -> Tensor:
        """The model's outputs at ``x`` in chunks, as (batch, K)."""
        self._rewind()
        with torch.no_grad():
            parts = [check_output(self._call(part), len(part)) for part in x.split(self.target_chunk_size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _call(self, x: Tensor) -> Tensor:
        try:
            return self.model(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                expected="more than one value per channel for BatchNorm in train mode",
                got="a single sample",
                do="measure with mode='eval'",
            ) from error

    def rows(self, source: int) -> Tensor:
        """What is looked at after the step of a source: the targets, and the source itself where it is none of them."""
        if not self.has_strangers:
            return self.targets
        return torch.cat([self.targets, self.inputs[source : source + 1]])

    def look_before(self, outputs: str) -> None:
        """Outputs before the step, the noise of each target, and the checks that need an output."""
        first = self.forward(self.rows(0))
        check_labels(self.labels, first.shape[1], outputs)
        self.before = first[: self.n_targets].detach()
        self.noise_floor = self._noise()
        self.source_before = self.before[self.self_index.clamp(min=0)].clone()
        strangers = torch.nonzero(self.self_index < 0).flatten().tolist()
        size = self.n_targets + 1
        for start in range(0, len(strangers), size):
            some = strangers[start : start + size]
            padded = (some * size)[:size]
            self.source_before[some] = self.forward(self.inputs[padded])[: len(some)]

    def _noise(self) -> Float[Tensor, " targets"]:
        """Largest difference over two batch compositions, at least 4 ulp of the largest output."""
        if self.stochastic:
            difference = torch.zeros_like(self.before[:, 0])
        else:
            half = self.n_targets // 2 + 1
            other = torch.cat([self.forward(part) for part in self.targets.flip(0).split(half)]).flip(0)
            difference = (other - self.before).abs().amax(dim=1)
        ulp = 4 * torch.finfo(self.before.dtype).eps * self.before.abs().amax(dim=1)
        return torch.maximum(difference, ulp)

    def gradient(self, source: int) -> tuple[Tensor, list[Tensor | None]]:
        """Loss at one source and its gradient; the parameters' own ``.grad`` is not touched."""
        self._rewind()
        with torch.enable_grad():
            output = self._call(self.inputs[source : source + 1])
            check_output(output, 1)
            loss = as_scalar(self.loss_fn(output, self.labels[source : source + 1]))
            if not loss.requires_grad:
                raise InputError(
                    expected="a loss that depends on the model's trainable parameters",
                    got="a loss without gradient",
                    do="return loss_fn(outputs, labels) without detaching",
                )
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return loss.detach(), [None if g is None else g.detach() for g in gradients]

    def check_loss(self, loss: Tensor, source: int) -> None:
        """Refuse a loss that is not finite."""
        if not bool(torch.isfinite(loss)):
            raise InputError(
                expected="a finite loss at every source",
                got=f"loss {float(loss)} at source {source}",
                do="measure before training diverges, and check the labels and the loss function",
            )


def as_scalar(loss: Tensor) -> Tensor:
    """The loss of one sample as a scalar; one number in any shape will do."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(expected="one number from loss_fn for one sample", got=got, do="reduce over the outputs")
    return loss.reshape(())


def match_rows(inputs: Tensor, targets: Tensor) -> Int[Tensor, " sources"]:
    """For each input the position of the first equal row among the targets, -1 where there is none."""
    device = inputs.device
    if inputs is targets:
        return torch.arange(len(inputs), device=device)
    places: dict[bytes, int] = {}
    if inputs.shape[1:] == targets.shape[1:] and inputs.dtype == targets.dtype:
        for position, row in enumerate(_row_bytes(targets)):
            places.setdefault(row, position)
        return torch.tensor([places.get(row, -1) for row in _row_bytes(inputs)], device=device)
    return torch.full((len(inputs),), -1, device=device)


def _row_bytes(x: Tensor) -> list[bytes]:
    flat = x.detach().cpu().contiguous().reshape(len(x), -1)
    return [row.tobytes() for row in flat.view(torch.uint8).numpy()]
