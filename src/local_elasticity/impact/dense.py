"""The tangent kernel of networks of linear layers, without Jacobians: sum over layers of (A A'^T + 1) o (B B'^T).

A holds a layer's inputs and B the derivatives of an output by the layer's outputs, one row a sample; the 1 is the
bias. This is exact (spec srel 2.7 is the case of two layers) and holds (inputs + outputs) numbers a sample and layer,
not inputs x outputs. `Factors.of` gives None for every network that it does not cover, and checks itself by one
backward pass, so that shared or differently used weights never give a wrong kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from local_elasticity.impact.checks import check_output

FORWARD_CHUNK = 64  # samples whose graph is alive at once
CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass
class Factors:
    """What the kernel is made of, of some samples.

    Attributes:
        inputs: each layer's inputs.
        slopes: the derivatives of the chosen outputs by each layer's outputs.
        layers: the layers.
    """

    inputs: list[Float[Tensor, "samples n_in"]]
    slopes: list[Float[Tensor, "samples k n_out"]]
    layers: list[nn.Linear]

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, outputs: Sequence[int]) -> Factors | None:
        """The factors at ``x``, or None where the network is not made of linear layers alone."""
        layers = covered(model)
        if not layers:
            return None
        found = cls([], [], layers)
        for start in range(0, len(x), FORWARD_CHUNK):
            part = _chunk(model, layers, x[start : start + FORWARD_CHUNK], outputs, check=start == 0)
            if part is None:
                return None
            for kept, new in ((found.inputs, part[0]), (found.slopes, part[1])):
                if not kept:
                    kept.extend(tensor.new_empty((len(x), *tensor.shape[1:])) for tensor in new)
                for whole, piece in zip(kept, new, strict=True):
                    whole[start : start + len(piece)] = piece
        return found

    def contract(self, other: Factors, full: bool) -> Float[Tensor, "samples others k k"]:
        """The kernel of these samples with others; summed over equal outputs unless ``full``."""
        n, m, k = len(self.inputs[0]), len(other.inputs[0]), self.slopes[0].shape[1]
        total = self.inputs[0].new_zeros((n, m, k, k) if full else (n, m, 1, 1))
        for layer, a, a2, b, b2 in zip(
            self.layers, self.inputs, other.inputs, self.slopes, other.slopes, strict=True
        ):
            weight = a @ a2.T if layer.weight.requires_grad else a.new_zeros((n, m))
            if layer.bias is not None and layer.bias.requires_grad:
                weight += 1.0
            if full:
                products = (b.flatten(0, 1) @ b2.flatten(0, 1).T).view(n, k, m, k).permute(0, 2, 1, 3)
                total += weight[:, :, None, None] * products
            else:
                total[:, :, 0, 0] += weight.mul_(b.flatten(1) @ b2.flatten(1).T)
        return total


def covered(model: nn.Module) -> list[nn.Linear]:
    """The trainable linear layers, where they own all trainable weights, each its own; else none."""
    layers = [m for m in model.modules() if type(m) is nn.Linear and any(p.requires_grad for p in m.parameters())]
    owned = [id(p) for layer in layers for p in layer.parameters() if p.requires_grad]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    names = [id(p) for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return layers if sorted(owned) == sorted(trainable) == sorted(names) and not hooked else []


def bytes_per_sample(layers: Sequence[nn.Linear], n_outputs: int) -> int:
    """What the factors of one sample take."""
    return sum((m.in_features + n_outputs * m.out_features) * m.weight.element_size() for m in layers)


def _chunk(
    model: nn.Module, layers: list[nn.Linear], x: Tensor, outputs: Sequence[int], check: bool
) -> tuple[list[Tensor], list[Tensor]] | None:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {id(layer): [] for layer in layers}

    def keep(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        seen[id(layer)].append((given[0], made))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        with torch.enable_grad():
            emitted = check_output(model(x), len(x))
    finally:
        for handle in handles:
            handle.remove()
    calls = [seen[id(layer)] for layer in layers]
    if any(len(one) != 1 or one[0][0].dim() != 2 or len(one[0][0]) != len(x) for one in calls):
        return None
    inputs = [one[0][0].detach() for one in calls]
    made = [one[0][1] for one in calls]
    slopes = []
    for at, output in enumerate(outputs):
        more = check or at + 1 < len(outputs)
        grads = torch.autograd.grad(emitted[:, output].sum(), made, retain_graph=more, allow_unused=True)
        slopes.append([torch.zeros_like(m) if g is None else g for g, m in zip(grads, made, strict=True)])
    stacked = [torch.stack([one[i] for one in slopes], 1) for i in range(len(layers))]
    if check and not _agrees(layers, inputs, stacked, emitted, outputs):
        return None
    return inputs, stacked


def _agrees(
    layers: list[nn.Linear], inputs: list[Tensor], slopes: list[Tensor], emitted: Tensor, outputs: Sequence[int]
) -> bool:
    """Whether the factors give the gradient of all samples' outputs together, as one backward pass does."""
    pairs = [(p, layer, i) for i, layer in enumerate(layers) for p in layer.parameters() if p.requires_grad]
    truth = torch.autograd.grad(emitted[:, list(outputs)].sum(), [p for p, _, _ in pairs], allow_unused=True)
    for (parameter, layer, i), gradient in zip(pairs, truth, strict=True):
        b = slopes[i].sum(1)
        mine = b.T @ inputs[i] if parameter is layer.weight else b.sum(0)
        gradient = torch.zeros_like(mine) if gradient is None else gradient
        size = float(gradient.norm()) + float(mine.norm())
        if float((mine - gradient).norm()) > CHECK_TOLERANCE.get(mine.dtype, 5e-2) * size:
            return False
    return True
