"""The problem that every engine solves: a model, sources, targets, a step; and the outputs before the step.

All outputs and losses of every engine and route come from here, by way of the `Subject`: each forward pass starts from
the same state, and the loss is the user's real one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from local_elasticity.base.errors import USER_ERRORS, InputError
from local_elasticity.base.tensors import check_fits, refusal_of_inputs, refusal_of_loss
from local_elasticity.impact.checks import check_labels, check_output
from local_elasticity.impact.losses import (
    cancelling_class_weights,
    check_class_weights,
    ignored_labels,
    ignores,
    one_distribution,
    one_number,
    read_loss,
)
from local_elasticity.impact.shadows import private
from local_elasticity.impact.subject import Subject
from local_elasticity.impact.update import Step

LossFunction = Callable[[Tensor, Tensor], Tensor]
Gradients = list[Tensor | None]


class Problem:
    """Forward passes, gradients and the outputs before the step, shared by the engines.

    A source that is no target is looked at in one batch with the targets; ``look_before`` uses batches of the same
    size for it, so that before and after go through the same kernels.

    Args:
        subject: the model and its loss, entered.
        loss_fn: ``loss_fn(outputs, labels)``.
        inputs: of the sources.
        labels: of the sources.
        targets: inputs where we look.
        parameters: the trainable weights by name.
        step: the update, bound to them.
        target_chunk_size: targets in one forward pass; None for all.

    Attributes:
        ignored: sources whose label the loss ignores, and at which nothing else of it has a gradient.
        first_source: the first that is not ignored.
        independent: whether the labels or the loss show that the outputs are not one distribution.
        notes: what the loss says that the user should know.
        idle: positions of the parameters without gradient.
        is_flat: whether the model's own outputs are (batch,).
        output_dtype: of the model's own outputs.
    """

    def __init__(
        self,
        subject: Subject,
        loss_fn: LossFunction,
        inputs: Tensor,
        labels: Tensor,
        targets: Tensor,
        parameters: dict[str, nn.Parameter],
        step: Step,
        target_chunk_size: int | None = None,
    ) -> None:
        self.subject, self.model, self.loss_fn, self.step = subject, subject.model, loss_fn, step
        self.inputs, self.labels, self.targets = inputs, labels, targets
        self.parameters = list(parameters.values())
        self._hooks = [len(p._backward_hooks or ()) for p in self.parameters]
        self.ignored: Bool[Tensor, " sources"] = torch.zeros(len(inputs), dtype=torch.bool, device="cpu")
        self.first_source = 0
        self._started, self.seconds_per_target = time.perf_counter(), 0.0
        self.independent = False
        self.notes: list[str] = []
        self.self_index = match_rows(inputs, targets)
        self.n_sources, self.n_targets = len(inputs), len(targets)
        self.has_strangers = bool((self.self_index < 0).any())
        rows = self.n_targets + self.has_strangers
        self.target_chunk_size = min(rows, target_chunk_size or rows)
        # Modules in train mode mix the samples of a batch, draw random numbers and write buffers.
        self.in_train_mode = any(module.training for module in self.model.modules())
        self.output_dtype = torch.get_default_dtype()
        self.idle: set[int] = set()
        self._first_gradient: tuple[Tensor, Gradients] | None = None
        self._is_examined = False
        self.is_flat = False
        self.before: Float[Tensor, "targets outputs"]
        self.source_before: Float[Tensor, "sources outputs"]
        self.noise_floor: Float[Tensor, " targets"]

    @property
    def n_outputs(self) -> int:
        """K."""
        return self.before.shape[1]

    @property
    def narrow(self) -> str | None:
        """Why first-order changes would be rounding; None for weights of 32 bits and more."""
        is_narrow = any(p.element_size() == 2 for p in self.parameters)
        return "weights of 16 bits, in which a first-order change is rounding" if is_narrow else None

    @property
    def seconds_so_far(self) -> float:
        """Since the problem was made; for estimates alone, no number depends on it."""
        return time.perf_counter() - self._started

    @property
    def restless(self) -> str | None:
        """Why forward passes are not all alike, in words; None where they are."""
        if self.in_train_mode:
            return "modules in train mode"
        if self.subject.draws:
            return "a forward pass or a loss that draws random numbers"
        kinds = {"buffer": "buffers", "generator": "a generator", "tensor": "tensors in place", "weights": "weights"}
        moved = [word for kind, word in kinds.items() if kind in self.subject.moved]
        return f"a forward pass or a loss that moves {', '.join(moved)}" if moved else None

    # -- outputs ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """The model's outputs at ``x`` in chunks, as (batch, K); of 16 bits widened to 32."""
        with torch.no_grad():
            parts = [self._outputs(part) for part in x.split(self.target_chunk_size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _outputs(self, x: Tensor) -> Tensor:
        output = check_output(raw := self._call(x), len(x))
        self.is_flat, self.output_dtype = raw.dim() == 1, output.dtype
        return widened(output)

    def _call(self, x: Tensor) -> Any:
        if self._is_examined:
            return self.subject.call(x)
        return asked(self.subject, x)

    def output_at(self, values: Sequence[Tensor], x: Tensor) -> Tensor:
        """The outputs with other tensors in the place of the weights, for transforms of ``torch.func``."""
        with self.subject.standing_in(self.parameters, values):
            return widened(check_output(self.model(x.clone()), len(x)))

    def loss_at(self, values: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The loss of one sample with other tensors in the place of the weights, for the loss too."""
        with self.subject.standing_in(self.parameters, values):
            return self._scaled(one_number(self.loss_fn(self.model(x.clone()), y.clone())))

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.step.loss_scale == 1 else loss * self.step.loss_scale

    @contextmanager
    def weights_at(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Let the weights be other values."""
        with self.subject.weights_at(self.parameters, values):
            yield

    def rows(self, source: int) -> Tensor:
        """What is looked at after the step of a source: the targets, and the source itself where it is none of them."""
        if not self.has_strangers:
            return self.targets
        return torch.cat([self.targets, self.inputs[source : source + 1]])

    # -- before the step --------------------------------------------------------------------------------------------

    def look_before(self, outputs: str) -> None:
        """Outputs before the step, the noise of each target, and the checks that need an output."""
        first = self.forward(self.rows(0)) if self._is_examined else self._examine(outputs)
        self.before = first[: self.n_targets].detach()
        self.noise_floor = self._noise()
        self.source_before = self.before[self.self_index.clamp(min=0)].clone()
        strangers = torch.nonzero(self.self_index < 0).flatten().tolist()
        size = self.n_targets + 1
        for start in range(0, len(strangers), size):
            some = strangers[start : start + size]
            padded = (some * size)[:size]
            self.source_before[some] = self.forward(self.inputs[padded])[: len(some)]

    def _examine(self, outputs: str) -> Tensor:
        """The first forward pass and the first gradient: what they move, and whether they draw random numbers."""

        def work() -> tuple[Tensor, tuple[Tensor, Gradients] | None]:
            first = self.forward(self.rows(0))
            self._read_labels(first.shape[1], outputs)
            return first, None if bool(self.ignored.all()) else self._gradient(self.first_source, examine=True)

        first, gradient = self.subject.find_draws(work)
        self.subject.rewind()
        self._is_examined = True
        if gradient is not None:
            self._check_state(self._plain_loss() if self.subject.restless else gradient[0])
        if self.subject.restless:
            return self.forward(self.rows(0))
        self._first_gradient = gradient
        return first

    def _plain_loss(self) -> Tensor:
        with torch.enable_grad():
            return self.loss(self.first_source)[1].detach()

    def _check_state(self, loss: Tensor) -> None:
        """Refuse a state that was not reached, and so not put back: the loss is another the next time."""
        again = self._plain_loss()
        if bool(torch.isfinite(loss)) and not close(again, loss):
            raise InputError(
                expected="a model and a loss whose every call starts from the same state",
                got=f"loss {float(again):.6g} at source {self.first_source} after {float(loss):.6g}: "
                "something that the look cannot put back was moved, such as a variable of another module",
                do="keep it in an attribute, a list or a dict that the model or the loss holds",
            )

    def _read_labels(self, n_outputs: int, outputs: str) -> None:
        """What the loss says of the labels: which it ignores, which are out of range, what its outputs stand for."""
        with torch.no_grad():
            output = self._call(self.inputs[:1])
        check_output(output, 1)
        calls = read_loss(self.loss_fn, output, self.labels[:1].clone())
        ignored = ignored_labels(self.labels, calls)
        if self.labels.dim() == 1 and not self.labels.is_floating_point():
            outside = ((self.labels < 0) | (self.labels >= n_outputs)) & ~ignored
            for label in self.labels[outside].unique():
                same = self.labels == label
                if ignores(self.loss_fn, output, self.labels[same][:1]):
                    ignored |= same
        counted = self.labels[~ignored]
        if len(counted):
            check_labels(counted, n_outputs, outputs)
            self.independent = not one_distribution(counted, n_outputs, calls)
        check_class_weights(calls, self.labels)
        note = cancelling_class_weights(calls, self.labels)
        self.notes += [] if note is None else [note]
        self.ignored = self._still(ignored.cpu())
        self.first_source = int((~self.ignored).int().argmax())

    def _still(self, ignored: Bool[Tensor, " sources"]) -> Bool[Tensor, " sources"]:
        """Of the sources whose labels the loss ignores, those at which none of its other terms has a gradient."""
        still = ignored.clone()
        for source in torch.nonzero(ignored).flatten().tolist():
            with torch.enable_grad():
                loss = self.loss(source)[1]
                gradients = self._gradients(loss, source) if loss.requires_grad else ()
            still[source] = not any(bool(g.any()) for g in gradients if g is not None)
        return still

    def _noise(self) -> Float[Tensor, " targets"]:
        """Largest difference over two batch compositions, at least 4 ulp of the largest output."""
        if self.restless:
            difference = torch.zeros_like(self.before[:, 0])
        else:
            half, started = self.n_targets // 2 + 1, time.perf_counter()
            other = torch.cat([self.forward(part) for part in self.targets.flip(0).split(half)]).flip(0)
            self.seconds_per_target = (time.perf_counter() - started) / self.n_targets
            difference = (other - self.before).abs().amax(dim=1)
        ulp = 4 * torch.finfo(self.output_dtype).eps * self.before.abs().amax(dim=1)
        return torch.maximum(difference, ulp)

    # -- gradients --------------------------------------------------------------------------------------------------

    def gradient(self, source: int) -> tuple[Tensor, Gradients]:
        """Loss at one source and its gradient, as the step takes it; the parameters' ``.grad`` is not touched."""
        if source == self.first_source and self._first_gradient is not None:
            first, self._first_gradient = self._first_gradient, None  # it is as large as the weights
            return first
        return self._gradient(source)

    def forget_first_gradient(self) -> None:
        """The weights are others now."""
        self._first_gradient = None

    def _gradient(self, source: int, examine: bool = False) -> tuple[Tensor, Gradients]:
        if self.ignored[source]:
            still = [None if i in self.idle else torch.zeros_like(p) for i, p in enumerate(self.parameters)]
            return self.parameters[0].detach().new_zeros(()), still
        with torch.enable_grad():
            _, loss = self.loss(source)
            if not loss.requires_grad:
                raise no_gradient()
            if examine:
                refuse_hidden_graph(loss, self.subject.cut)
            gradients = self._gradients(loss, source)
        self._refuse_leftovers()
        if examine:
            self.idle = {index for index, gradient in enumerate(gradients) if gradient is None}
        if "weights" in self.subject.moved or self.subject.weights_written():
            self.subject.moved.add("weights")
            self.step.weights[:] = [p.detach() for p in self.parameters]
        return loss.detach(), [None if g is None else g.detach() for g in gradients]

    def _refuse_leftovers(self) -> None:
        """What the loss leaves at the weights would be part of the user's step, and of the next loss."""
        if any(p.grad is not None for p in self.parameters):
            raise InputError(
                expected="a loss that leaves .grad of the weights as it was",
                got="a backward() within the forward pass or the loss, whose gradients stay there",
                do="use torch.autograd.grad, or return the sum of what is differentiated and call backward() on that",
            )
        if [len(p._backward_hooks or ()) for p in self.parameters] != self._hooks:
            raise InputError(
                expected="a model and a loss that leave the hooks of the weights as they are",
                got="a forward pass or a loss that registers a hook at each call, or removes one",
                do="register it once, before the look",
            )

    def _gradients(self, loss: Tensor, source: int) -> Sequence[Tensor | None]:
        scaled = self._scaled(loss)
        try:
            return torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        except USER_ERRORS as error:
            raise InputError(
                expected="a loss that can be differentiated by the weights",
                got=f"{type(error).__name__} in its backward pass at source {source}",
                do="make loss_fn(model(x[:1]), y[:1]).backward() work",
            ) from error

    def loss(self, source: int) -> tuple[Tensor, Tensor]:
        """The model's own output at one source, and the user's loss there, both with their graph."""
        some = slice(source, source + 1)
        output = self._call(self.inputs[some])
        check_output(output, 1)
        y = private(self.labels[some])
        try:
            return output, one_number(self.loss_fn(output, y))
        except USER_ERRORS as error:
            if isinstance(error, InputError):
                raise
            raise refusal_of_loss(output, y, "loss_fn", error) from error

    def check_loss(self, loss: Tensor, source: int) -> None:
        """Refuse a loss that is not finite."""
        if not self.ignored[source] and not bool(torch.isfinite(loss)):
            raise InputError(
                expected="a finite loss at every source",
                got=f"loss {float(loss)} at source {source}",
                do="measure before training diverges, and check the labels and the loss function",
            )

    def check_late_draws(self) -> None:
        """See ``Subject.check_late_draws``."""

        def work() -> None:
            for source in range(self.n_sources):
                self._gradient(source)

        self.subject.check_late_draws(work)


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two losses are the same but for rounding."""
    eps = torch.finfo(torch.bfloat16 if torch.is_autocast_enabled(one.device.type) else one.dtype).eps
    return bool((one - other).abs() <= (1e3 * eps if eps < 1e-3 else 4 * eps) * (one.abs() + 1))


def widened(x: Tensor) -> Tensor:
    """Outputs of 16 bits in 32, so that their differences are."""
    return x.float() if x.is_floating_point() and x.element_size() == 2 else x


def measured_in(model: nn.Module, dtype: torch.dtype | Literal["as_is"] | None) -> tuple[torch.dtype | None, bool]:
    """The dtype to convert to, None for none; and whether tensors of 16 bits alone are."""
    if dtype is None:
        narrow = any(p.requires_grad and p.is_floating_point() and p.element_size() == 2 for p in model.parameters())
        return (torch.float32, True) if narrow else (None, False)
    return (None if dtype == "as_is" else dtype), False


def all_converted(
    tensors: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype | None, only_narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and targets in another dtype; targets that are the inputs stay the same tensor."""
    if dtype is None:
        return tensors
    inputs, labels, targets = tensors
    other = _converted(inputs, dtype, only_narrow)
    rest = other if targets is inputs else _converted(targets, dtype, only_narrow)
    return other, _converted(labels, dtype, only_narrow), rest


def _converted(x: Tensor, dtype: torch.dtype, only_narrow: bool) -> Tensor:
    if only_narrow and x.element_size() != 2:
        return x
    if x.is_complex():
        return x.to(dtype.to_complex())
    return x.to(dtype) if x.is_floating_point() else x


def asked(subject: Subject, x: Tensor) -> Any:
    """A first forward pass: what the model raises is told in our words."""
    check_fits(subject.model, "the inputs", x)
    try:
        return subject.call(x)
    except USER_ERRORS as error:
        if isinstance(error, InputError):
            raise
        if "more than 1 value per channel" in str(error):
            raise InputError(
                expected="more than one value per channel for BatchNorm in train mode",
                got="a single sample",
                do="measure with mode='eval'",
            ) from error
        raise refusal_of_inputs(subject.model, x, "inputs", error) from error


def no_gradient() -> InputError:
    """The error for a loss without a graph."""
    return InputError(
        expected="a loss that depends on the model's trainable parameters",
        got="a loss without gradient",
        do="return loss_fn(outputs, labels) without detaching",
    )


def refuse_hidden_graph(loss: Tensor, cut: Sequence[Tensor] = ()) -> None:
    """Refuse what hides weights from ``torch.autograd.grad``: reentrant checkpoints, and graphs cut by conversion."""
    nodes, known = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise InputError(
                expected="gradients that autograd can follow to the weights",
                got="a reentrant checkpoint, which hides the weights used inside",
                do="call torch.utils.checkpoint.checkpoint with use_reentrant=False",
            )
        variable = getattr(node, "variable", None)
        if any(variable is each for each in cut):
            raise InputError(
                expected="a loss that depends on the weights by what is computed in its forward pass",
                got="a tensor with a graph from before the look, which a conversion (dtype=) cuts off",
                do="compute it in the forward pass, or convert the model yourself (dtype='as_is' for 16 bits)",
            )
        nodes += [following for following, _ in node.next_functions]


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
    flat = x.detach().cpu().contiguous().reshape(len(x), math.prod(x.shape[1:]))
    return [row.tobytes() for row in flat.view(torch.uint8).numpy()]
