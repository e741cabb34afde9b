"""The three ways to advance many networks by one step: own kernels, ``torch.func.vmap``, one after the other.

All keep the weights stacked (replica, ...) and give the same numbers up to rounding.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from local_elasticity.base.errors import InputError, first_line
from local_elasticity.base.streams import random_state, set_random_state
from local_elasticity.impact.shadows import private
from local_elasticity.impact.subject import preserved
from local_elasticity.training.lockstep.chain import Chain, find_chain
from local_elasticity.training.lockstep.kernels import KERNELS, Kernel, PooledConv2d, arrange, arranged
from local_elasticity.training.lockstep.losses import LossFunction, stacked_loss
from local_elasticity.training.lockstep.optimizers import Rule, StackedOptimizer

RouteName = Literal["kernels", "vmap", "loop"]
BLOCKS = 2**29  # bytes that the training set may take when it is cut into blocks for the first layer
AT_ONCE = 2**15  # numbers in the inputs of one forward pass when looking: its temporaries should stay in the cache
ACCELERATOR_AT_ONCE = 2**24  # of all replicas together


@dataclass(frozen=True)
class Problem:
    """What is trained on.

    Attributes:
        inputs: training inputs, of the replicas' dtype and device.
        labels: their labels.
        loss_fn: ``loss_fn(outputs, labels)``, a mean over the batch.
        rule: how weights move.
        batch_size: samples in a step.
        prepared: what routes made of the inputs, shared by all of them.
    """

    inputs: Float[Tensor, "samples ..."]
    labels: Shaped[Tensor, "samples ..."]
    loss_fn: LossFunction
    rule: Rule
    batch_size: int
    prepared: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)


class Stack:
    """Networks of one shape, their weights and buffers stacked.

    Attributes:
        template: one of them; its own weights are not used.
        weights: name -> (replica, ...).
        buffers: name -> (replica, ...).
        models: the networks themselves, in whose places the rows of ``weights`` and ``buffers`` lie.
        idle: names of weights that get no gradient: as in ``torch.optim`` nothing moves them, no decay either.
    """

    def __init__(
        self,
        template: nn.Module,
        weights: dict[str, Tensor],
        buffers: dict[str, Tensor],
        models: Sequence[nn.Module] = (),
        idle: frozenset[str] = frozenset(),
    ) -> None:
        self.template, self.weights, self.buffers = template, weights, buffers
        self.models, self.idle = models, idle

    @classmethod
    def of(cls, models: Sequence[nn.Module]) -> Stack:
        """Stack these networks.

        Raises:
            InputError: when they differ in shape.
        """
        kinds = [
            [(name, tuple(t.shape), t.dtype) for name, t in (*model.named_parameters(), *model.named_buffers())]
            for model in models
        ]
        odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
        if odd is not None:
            raise InputError(
                expected="make_model() to return networks of one shape",
                got=f"replica {odd} with other parameters or buffers than replica 0",
                do="draw weights in make_model(), not architectures",
            )
        template = copied(models[0])
        weights = _gathered(models, nn.Module.named_parameters)
        return cls(template, weights, _gathered(models, nn.Module.named_buffers), models)

    def rows(self, start: int, stop: int) -> Stack:
        """Some of the replicas; their tensors are views of these, with a template of their own."""
        return Stack(
            copied(self.template),
            {name: w[start:stop] for name, w in self.weights.items()},
            {name: b[start:stop] for name, b in self.buffers.items()},
            self.models[start:stop],
            self.idle,
        )

    def to(self, dtype: torch.dtype) -> Stack:
        """A copy in another dtype."""

        def convert(x: Tensor) -> Tensor:
            return x.to(dtype, copy=True) if x.is_floating_point() else x.clone()

        return Stack(
            copied(self.template).to(dtype),
            {name: convert(w) for name, w in self.weights.items()},
            {name: convert(b) for name, b in self.buffers.items()},
            idle=self.idle,
        )

    def __len__(self) -> int:
        return len(next(iter(self.weights.values())))

    def settle(self) -> None:
        """Let weights and buffers of the networks lie in the stack."""
        for i, model in enumerate(self.models):
            for name, parameter in model.named_parameters():
                parameter.data = self.weights[name][i]
            for name, buffer in model.named_buffers():
                buffer.data = self.buffers[name][i]

    @property
    def trained(self) -> dict[str, Tensor]:
        """The weights that training moves."""
        wanted = {name for name, p in self.template.named_parameters() if p.requires_grad} - self.idle
        return {name: w for name, w in self.weights.items() if name in wanted}


class Route(ABC):
    """Advances a stack of networks in place.

    Args:
        stack: the networks.
        problem: what they learn.
    """

    name: RouteName

    def __init__(self, stack: Stack, problem: Problem) -> None:
        self.stack, self.problem = stack, problem
        self.optimizer = StackedOptimizer(problem.rule, stack.trained)

    @abstractmethod
    def step(self, index: Int64[Tensor, "replicas batch"]) -> tuple[Tensor, Tensor]:
        """Take one step of every replica on its own samples.

        Returns:
            Outputs (replica, batch, outputs) from before the step, losses (replica,).
        """

    def outputs(self, x: Float[Tensor, "samples ..."]) -> Float[Tensor, "replicas samples outputs"]:
        """What every replica says of the same samples, in eval mode."""
        with torch.no_grad():
            parts = [
                self.look(private(part)) for part in x.split(max(1, min(4096, self.at_once // max(1, x[0].numel()))))
            ]
        return torch.cat(parts, dim=1)

    @property
    def at_once(self) -> int:
        """Numbers in the inputs of one forward pass."""
        return ACCELERATOR_AT_ONCE // len(self.stack) if self.accelerated else AT_ONCE

    @property
    def accelerated(self) -> bool:
        """Whether many small calls cost more than their arithmetic."""
        return self.problem.inputs.device.type != "cpu"

    @abstractmethod
    def look(self, x: Float[Tensor, "samples ..."]) -> Float[Tensor, "replicas samples outputs"]:
        """As ``outputs``, for a few samples."""

    def state(self) -> dict[str, Any]:
        """What the next step depends on besides the weights and buffers."""
        return {"moments": self.optimizer.state()}

    def load(self, state: Mapping[str, Any], steps: int) -> None:
        """Put a state back."""
        for name, value in self.optimizer.state().items():
            value.copy_(state["moments"][name])
        self.optimizer.steps = steps


class Kernels(Route):
    """Own kernels, one a layer; see ``kernels.py``."""

    name = "kernels"

    def __init__(self, stack: Stack, problem: Problem, chain: Chain | None = None) -> None:
        super().__init__(stack, problem)
        if chain is None:
            chain = find_chain(stack.template, problem.inputs[:2].clone())
        modules = [(name, stack.template.get_submodule(name)) for name, _ in chain]

        def layers(weights: Mapping[str, Tensor]) -> list[Kernel]:
            return arranged([KERNELS[type(module)](module, name, weights) for name, module in modules])

        self.layers = layers(stack.weights)
        # One replica at a time when looking: many samples make large matrices already, and stay in the cache.
        self.alone = [layers({n: w[i : i + 1] for n, w in stack.weights.items()}) for i in range(len(stack))]
        self.inputs: Tensor | None = None  # cut into blocks
        self._pool_first()
        self.loss = stacked_loss(problem.loss_fn)
        self.first = next((i for i, layer in enumerate(self.layers) if layer.trained), len(self.layers))

    def _pool_first(self) -> None:
        """Join the first convolution and its pooling, when the training set may be cut into blocks for it."""
        images, layers = self.problem.inputs, self.layers
        if len(layers) < 2 or not PooledConv2d.fits(layers[0], layers[1], images):
            return
        joined = PooledConv2d(layers[0].module, layers[0].prefix, self.stack.weights)
        kh, kw = joined.module.kernel_size
        if images.numel() * images.element_size() * (kh + 1) * (kw + 1) > 4 * BLOCKS:
            return
        if "blocks" not in self.problem.prepared:
            self.problem.prepared["blocks"] = joined.blocks(images)
        self.layers, self.inputs = [joined, *layers[2:]], self.problem.prepared["blocks"]

    @torch.no_grad()
    def step(self, index: Int64[Tensor, "replicas batch"]) -> tuple[Tensor, Tensor]:
        """Forward through the layers, then backward, every layer moving its weights on the way."""
        if self.inputs is not None:
            x = self.inputs.index_select(0, index.flatten()).unflatten(0, index.shape)
        else:
            x = arrange(self.problem.inputs.index_select(0, index.flatten()), *index.shape)
        for layer in self.layers:
            x = layer.forward(x, keep=True)
        labels = self.problem.labels
        losses, gradient = self.loss(x, labels.index_select(0, index.flatten()).view(*index.shape, *labels.shape[1:]))
        self.optimizer.begin()
        below: Tensor | None = gradient
        for i in range(len(self.layers) - 1, self.first - 1, -1):
            assert below is not None
            below = self.layers[i].backward(below, self.optimizer, wanted=i > self.first)
        return x, losses

    def look(self, x: Float[Tensor, "samples ..."]) -> Float[Tensor, "replicas samples outputs"]:
        """Forward through the layers, one replica after the other; on an accelerator all at once."""
        if self.accelerated:
            return forward_all(self.stack, x)
        start, parts = arrange(x, 1, len(x)), []
        for layers in self.alone:
            y = start
            for layer in layers:
                y = layer.forward(y, keep=False)
            parts.append(y)
        return torch.cat(parts)


class Vmap(Route):
    """``torch.func.vmap`` over stacked weights, for whatever it can batch."""

    name = "vmap"

    def __init__(self, stack: Stack, problem: Problem) -> None:
        super().__init__(stack, problem)
        self.model, trained = stack.template, stack.trained
        self.frozen = {name: w for name, w in stack.weights.items() if name not in trained}
        self.advance = torch.func.vmap(torch.func.grad(self._loss, has_aux=True))

    def _loss(self, trained: Any, rest: Any, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out = torch.func.functional_call(self.model, {**trained, **rest}, (x,))
        loss = self.problem.loss_fn(out, y)
        return loss, (out, loss)

    def gradients(self, index: Int64[Tensor, "replicas batch"]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Gradients of all replicas, and their outputs and losses."""
        x, y = self.problem.inputs[index], self.problem.labels[index]
        return self.advance(self.stack.trained, {**self.frozen, **self.stack.buffers}, x, y)

    def step(self, index: Int64[Tensor, "replicas batch"]) -> tuple[Tensor, Tensor]:
        """All gradients at once, then the step."""
        gradients, (outputs, losses) = self.gradients(index)
        with torch.no_grad():
            self.optimizer.begin()
            for name, gradient in gradients.items():
                self.optimizer.dense(name, gradient.detach())
        return _two_dimensional(outputs.detach()), losses.detach()

    def look(self, x: Float[Tensor, "samples ..."]) -> Float[Tensor, "replicas samples outputs"]:
        """All forward passes at once."""
        return forward_all(self.stack, x)


class Loop(Route):
    """One replica after the other, each with a random stream of its own: whatever PyTorch can train."""

    name = "loop"

    def __init__(self, stack: Stack, problem: Problem) -> None:
        stack.idle = frozenset()  # each batch shows anew what it reaches
        super().__init__(stack, problem)
        self.models = stack.models
        self.generators = _default_generators(problem.inputs.device)
        self.streams: list[list[Tensor]] | None = None  # of every replica, one for each generator

    def seed(self, seeds: Sequence[int]) -> None:
        """Give every replica its random stream (dropout and the like draw from it)."""
        self.streams = [
            [torch.Generator(generator.device).manual_seed(seed).get_state() for generator in self.generators]
            for seed in seeds
        ]

    def step(self, index: Int64[Tensor, "replicas batch"]) -> tuple[Tensor, Tensor]:
        """One gradient after the other, then the step of all."""
        outputs, losses, gradients, trained = [], [], [], self.stack.trained
        absent: list[tuple[str, int]] = []
        here = random_state()
        try:
            for i, model in enumerate(self.models):
                if self.streams is not None:
                    for generator, stream in zip(self.generators, self.streams[i], strict=True):
                        generator.set_state(stream)
                out = model(self.problem.inputs[index[i]])
                loss = self.problem.loss_fn(out, self.problem.labels[index[i]])
                named = {name: p for name, p in model.named_parameters() if name in trained}
                found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                absent += [(name, i) for name, gradient in zip(named, found, strict=True) if gradient is None]
                gradients.append(
                    {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
                )
                self._gather(i)
                outputs.append(out.detach())
                losses.append(loss.detach())
                if self.streams is not None:
                    self.streams[i] = [generator.get_state() for generator in self.generators]
        finally:
            set_random_state(here)
        with torch.no_grad(), self.optimizer.left_alone(absent):
            self.optimizer.begin()
            for name in gradients[0]:
                self.optimizer.dense(name, torch.stack([part[name] for part in gradients]))
        return _two_dimensional(torch.stack(outputs)), torch.stack(losses)

    def _gather(self, replica: int) -> None:
        """Forward passes may put other tensors in the place of buffers and weights: the stack takes what they hold."""
        model = self.models[replica]
        for held, rows in ((model.named_buffers(), self.stack.buffers), (model.named_parameters(), self.stack.weights)):
            for name, tensor in held:
                row = rows[name][replica]
                if tensor.data_ptr() != row.data_ptr():
                    row.copy_(tensor.detach())
                    tensor.data = row

    def look(self, x: Float[Tensor, "samples ..."]) -> Float[Tensor, "replicas samples outputs"]:
        """One forward pass after the other."""
        parts = []
        for model in self.models:
            with preserved(model, "eval", restore_streams=True):
                parts.append(model(x).detach())
        return _two_dimensional(torch.stack(parts))

    def state(self) -> dict[str, Any]:
        """The random streams too."""
        return {**super().state(), "streams": self.streams or [], "absent": sorted(self.optimizer.absent)}

    def load(self, state: Mapping[str, Any], steps: int) -> None:
        """Put a state back."""
        super().load(state, steps)
        self.optimizer.absent = {(name, i) for name, i in state.get("absent", ())}
        # Generators take their states from main memory, wherever a checkpoint was read to.
        self.streams = [[stream.cpu().clone() for stream in streams] for streams in state["streams"]] or None
        if self.streams is not None and any(len(streams) != len(self.generators) for streams in self.streams):
            raise InputError(
                expected="a checkpoint with one random stream a replica and generator",
                got="one of an earlier version",
                do="train again into another folder",
            )


def _gathered(models: Sequence[nn.Module], names: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Name -> (replica, ...) of all parameters, or all buffers."""
    parts = [dict(names(model)) for model in models]
    return {name: torch.stack([part[name].detach() for part in parts]) for name in parts[0]}


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with a network, whose weights may be rows of larger tensors.

    Raises:
        InputError: when it cannot be copied.
    """
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()):
        raise InputError(
            expected="weights without hooks, which copies would lose",
            got="Tensor.register_hook on a weight",
            do="register it in the forward pass, on what is computed there",
        )
    _check_memory(model)
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.detach().clone() for b in model.buffers()}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            expected="a network that copy.deepcopy can copy",
            got=f"{type(error).__name__}: {first_line(error)}",
            do="keep out of its attributes what cannot be copied (locks, files, tensors with a graph)",
        ) from error


def _check_memory(model: nn.Module) -> None:
    """Refuse weights and buffers that are views of one another: in a stack they would come apart."""
    held = [t for t in (*model.parameters(), *model.buffers()) if t.numel()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in held if t.device.type != "meta")
    if any(following[0] < span[1] for span, following in itertools.pairwise(spans)):
        raise InputError(
            expected="weights and buffers with memory of their own",
            got="some that are views of one another",
            do="compute the view within forward()",
        )


ROUTES: dict[RouteName, type[Route]] = {"kernels": Kernels, "vmap": Vmap, "loop": Loop}


def _default_generators(device: torch.device) -> list[torch.Generator]:
    """Where layers draw from: PyTorch's own streams, and those of the CUDA device."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


def forward_all(stack: Stack, x: Float[Tensor, "samples ..."]) -> Float[Tensor, "replicas samples outputs"]:
    """What all replicas say of the same samples in eval mode, in one batched forward pass."""

    def outputs(everything: Any) -> Tensor:
        return torch.func.functional_call(stack.template, everything, (x,))

    with preserved(stack.template, "eval", restore_streams=True):
        return _two_dimensional(torch.func.vmap(outputs)({**stack.weights, **stack.buffers}))


def _two_dimensional(outputs: Tensor) -> Float[Tensor, "replicas batch outputs"]:
    """(replica, batch) becomes (replica, batch, 1)."""
    return outputs.unsqueeze(2) if outputs.dim() == 2 else outputs
