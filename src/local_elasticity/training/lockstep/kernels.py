"""One layer of every replica at once: forward, and a backward that moves the weights as it goes.

Arrays are (replica, batch, features); images are (replica, channels, batch, height, width), so that a convolution is
one matrix product a replica, forward and backward, whatever the batch. A new layer is one class and one line of
``KERNELS``; what is not there goes through ``torch.func.vmap``.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from local_elasticity.training.lockstep.optimizers import StackedOptimizer

Features = Float[Tensor, "replicas batch features"]
Images = Float[Tensor, "replicas channels batch height width"]
aten: Any = torch.ops.aten


class Unsupported(Exception):
    """A layer, or its settings, that no kernel here does."""


class Kernel(ABC):
    """A layer of all replicas.

    Args:
        module: the layer, for its settings.
        prefix: its name in the network.
        weights: stacked weights of the whole network by name; a kernel uses those under its prefix.
    """

    def __init__(self, module: Any, prefix: str, weights: Mapping[str, Tensor]) -> None:
        self.module, self.prefix = module, prefix
        self.trained = {name for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        self.parameters = {name: weights[self.name(name)] for name, _ in module.named_parameters(recurse=False)}

        self._rooms: dict[str, Tensor] = {}
        self.overwrites = False  # whether its input is of no more use below, and may take the gradient

    def room(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of this layer for one large temporary: fresh pages at every step would cost more than the work."""
        kept = self._rooms.get(name)
        if kept is None or kept.shape != tuple(shape) or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._rooms[name] = like.new_empty(tuple(shape))
        return kept

    def name(self, parameter: str) -> str:
        """The full name of one of its parameters."""
        return f"{self.prefix}.{parameter}" if self.prefix else parameter

    @abstractmethod
    def forward(self, x: Tensor, keep: bool) -> Tensor:
        """The layer's output; with ``keep``, what ``backward`` needs stays here."""

    @abstractmethod
    def backward(self, gradient: Tensor, optimizer: StackedOptimizer, wanted: bool) -> Tensor | None:
        """Move the weights, and give the gradient at the input (from before the move) where it is wanted."""


def arrange(x: Float[Tensor, "samples ..."], replicas: int, batch: int) -> Tensor:
    """Samples, replica after replica, in the layout of the kernels."""
    x = x.view(replicas, batch, *x.shape[1:])
    return x.transpose(1, 2) if x.dim() == 5 else x


class Linear(Kernel):
    """y = W x + b."""

    def forward(self, x: Features, keep: bool) -> Features:
        """Matrix product of every replica."""
        if x.dim() != 3:
            raise Unsupported("a linear layer on more than one dimension")
        if keep:
            self.x = x
        weight, bias = self.parameters["weight"].transpose(1, 2), self.parameters.get("bias")
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)

    def backward(self, gradient: Features, optimizer: StackedOptimizer, wanted: bool) -> Features | None:
        """Gradient W^T g at the input; g x^T at the weight."""
        below = torch.bmm(gradient, self.parameters["weight"]) if wanted else None
        if "weight" in self.trained:
            optimizer.outer(self.name("weight"), gradient, self.x)
        if "bias" in self.trained:
            optimizer.dense(self.name("bias"), gradient.sum(dim=1))
        return below


class Conv2d(Kernel):
    """A convolution as one matrix product with the unfolded input (im2col)."""

    def __init__(self, module: nn.Conv2d, prefix: str, weights: Mapping[str, Tensor]) -> None:
        super().__init__(module, prefix, weights)
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise Unsupported("groups, padding by name or padding with anything but zeros")

    def forward(self, x: Images, keep: bool) -> Images:
        """Unfold, multiply."""
        columns, size = self.unfold(x)
        if keep:
            self.columns, self.size, self.input_shape = columns, size, x.shape
        weight, bias = self.parameters["weight"].flatten(2), self.parameters.get("bias")
        y = self.room("y", (*weight.shape[:2], columns.shape[2]), x)
        if bias is None:
            torch.bmm(weight, columns, out=y)
        else:
            torch.baddbmm(bias.unsqueeze(2), weight, columns, out=y)
        return y.view(*y.shape[:2], x.shape[2], *size)

    def unfold(self, x: Images) -> tuple[Float[Tensor, "replicas patch places"], tuple[int, int]]:
        """Every patch as a column, and the size of the output.

        Along the width first, then along the height, where whole rows are copied: half the time of one copy.
        """
        if x.dim() != 5:
            raise Unsupported("a convolution without a batch of images")
        conv = self.module
        (kh, kw), (sh, sw), (dh, dw), (ph, pw) = conv.kernel_size, conv.stride, conv.dilation, conv.padding
        if ph or pw:
            x = torch.nn.functional.pad(x, (pw, pw, ph, ph))
        replicas, channels, batch, height, width = x.shape
        rows, wide = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
        r, c, b, h, w = x.stride()
        shape = (replicas, channels, kw, batch, height, wide)
        tall = self.room("tall", shape, x)
        tall.copy_(x.as_strided(shape, (r, c, dw * w, b, h, sw * w), x.storage_offset()))
        r, c, k, b, h, w = tall.stride()
        shape = (replicas, channels, kh, kw, batch, rows, wide)
        columns = self.room("columns", shape, x)
        columns.copy_(tall.as_strided(shape, (r, c, dh * h, k, b, sh * h, w)))
        return columns.view(replicas, channels * kh * kw, -1), (rows, wide)

    def fold(self, columns: Float[Tensor, "replicas patch places"]) -> Images:
        """The transpose of ``unfold``: every patch added where it came from."""
        conv = self.module
        (kh, kw), (sh, sw), (dh, dw), (ph, pw) = conv.kernel_size, conv.stride, conv.dilation, conv.padding
        replicas, channels, batch, height, width = self.input_shape
        (rows, wide), height, width = self.size, height + 2 * ph, width + 2 * pw
        columns = columns.view(replicas, channels, kh, kw, batch, rows, wide)
        tall = self.room("tall", (replicas, channels, kw, batch, height, wide), columns).zero_()
        for i in range(kh):
            tall[..., i * dh : i * dh + sh * (rows - 1) + 1 : sh, :] += columns[:, :, i]
        x = self.room("x", (replicas, channels, batch, height, width), columns).zero_()
        for j in range(kw):
            x[..., j * dw : j * dw + sw * (wide - 1) + 1 : sw] += tall[:, :, j]
        return x[..., ph : height - ph, pw : width - pw] if ph or pw else x

    def backward(self, gradient: Images, optimizer: StackedOptimizer, wanted: bool) -> Images | None:
        """Gradient W^T g, folded, at the input; g columns^T at the weight."""
        flat, weight = gradient.flatten(2), self.parameters["weight"]
        slope = torch.bmm(flat, self.columns.transpose(1, 2)) if "weight" in self.trained else None
        below = None
        if wanted:  # the columns have served: their memory takes the gradient at the columns
            below = self.fold(torch.bmm(weight.flatten(2).transpose(1, 2), flat, out=self.columns))
        if slope is not None:
            optimizer.dense(self.name("weight"), slope.view(weight.shape))
        if "bias" in self.trained:
            optimizer.dense(self.name("bias"), flat.sum(dim=2))
        return below


class PooledConv2d(Conv2d):
    """A first layer and the 2 x 2 maximum after it: one kernel, for places in the order of the pooling.

    The four places of every window lie in four blocks, so that the maximum is one of whole blocks. The training set
    is cut into such blocks once (`blocks`); the layer has no input gradient to give.
    """

    @staticmethod
    def fits(first: Kernel, second: Kernel, x: Float[Tensor, "samples channels height width"]) -> bool:
        """Whether two layers are a plain convolution and a pooling that leaves out no place."""
        if type(first) is not Conv2d or not isinstance(second, MaxPool2d) or x.dim() != 4 or not second.pairs:
            return False
        conv = first.module
        (kh, kw), (ph, pw) = conv.kernel_size, conv.padding
        high, wide = x.shape[2] + 2 * ph - kh + 1, x.shape[3] + 2 * pw - kw + 1
        return conv.stride == conv.dilation == (1, 1) and not high % 2 and not wide % 2

    def blocks(self, x: Float[Tensor, "samples channels height width"]) -> Float[Tensor, "samples c s t h w"]:
        """Pixels (2 i + s, 2 j + t) of every sample, all i and j in one block."""
        (kh, kw), (ph, pw) = self.module.kernel_size, self.module.padding
        x = torch.nn.functional.pad(x, (pw, pw, ph, ph)).contiguous()
        n, c, h, w = x.shape
        shape = (n, c, kh + 1, kw + 1, (h - kh + 1) // 2, (w - kw + 1) // 2)
        a, b, d, e = x.stride()
        return x.as_strided(shape, (a, b, d, e, 2 * d, 2 * e)).contiguous()

    def pooled(self, x: Float[Tensor, "replicas batch c s t h w"]) -> Images:
        """The largest output of every window."""
        replicas, batch, channels, _, _, high, wide = x.shape
        kh, kw = self.module.kernel_size
        r, n, c, s, t, h, w = x.stride()
        columns = self.room("columns", (replicas, channels, kh, kw, 2, 2, batch, high, wide), x)
        columns.copy_(x.as_strided(columns.shape, (r, c, s, t, s, t, n, h, w), x.storage_offset()))
        self.columns = columns.view(replicas, channels * kh * kw, -1)
        weight, bias = self.parameters["weight"].flatten(2), self.parameters.get("bias")
        y = self.room("y", (*weight.shape[:2], self.columns.shape[2]), x)
        if bias is None:
            torch.bmm(weight, self.columns, out=y)
        else:
            torch.baddbmm(bias.unsqueeze(2), weight, self.columns, out=y)
        self.blocked = y.view(*y.shape[:2], 4, -1)
        one, two, three, four = self.blocked.unbind(2)
        top, bottom = torch.maximum(one, two), torch.maximum(three, four)
        self.where = bottom > top, two > one, four > three
        return torch.maximum(top, bottom).view(*y.shape[:2], batch, high, wide)

    def forward(self, x: Tensor, keep: bool) -> Images:
        """As ``pooled``: samples come cut into blocks."""
        return self.pooled(x)

    def backward(self, gradient: Images, optimizer: StackedOptimizer, wanted: bool) -> None:
        """The gradient where the maximum was (a tie goes to the first), times the patches."""
        flat = gradient.flatten(2)
        lower, second, fourth = self.where
        below = flat * lower
        above = flat - below
        parts = self.blocked.unbind(2)
        for (first, other), part, mask in ((parts[:2], above, second), (parts[2:], below, fourth)):
            torch.mul(part, mask, out=other)
            torch.sub(part, other, out=first)
        if "weight" in self.trained:
            slope = torch.bmm(self.blocked.flatten(2), self.columns.transpose(1, 2))
            optimizer.dense(self.name("weight"), slope.view(self.parameters["weight"].shape))
        if "bias" in self.trained:
            optimizer.dense(self.name("bias"), flat.sum(dim=2))


class Flatten(Kernel):
    """Images to features: channels, height and width of a sample in one row."""

    def __init__(self, module: nn.Flatten, prefix: str, weights: Mapping[str, Tensor]) -> None:
        super().__init__(module, prefix, weights)
        if (module.start_dim, module.end_dim) not in ((1, -1), (1, 3)):
            raise Unsupported("flattening of some dimensions only")

    def forward(self, x: Tensor, keep: bool) -> Features:
        """Rows of features."""
        if keep:
            self.shape = x.shape
        return x.transpose(1, 2).flatten(2) if x.dim() == 5 else x.flatten(2)

    def backward(self, gradient: Features, optimizer: StackedOptimizer, wanted: bool) -> Tensor | None:
        """The gradient in the shape of the images."""
        if len(self.shape) != 5:
            return gradient.reshape(self.shape)
        replicas, channels, batch, height, width = self.shape
        return gradient.reshape(replicas, batch, channels, height, width).transpose(1, 2)


class MaxPool2d(Kernel):
    """Maximum over windows; a tie goes to the first, as in PyTorch."""

    def __init__(self, module: nn.MaxPool2d, prefix: str, weights: Mapping[str, Tensor]) -> None:
        super().__init__(module, prefix, weights)
        if module.return_indices:
            raise Unsupported("max pooling that returns indices")
        self.window = [_two(x) for x in (module.kernel_size, module.stride, module.padding, module.dilation)]
        self.pairs = self.window == [[2, 2], [2, 2], [0, 0], [1, 1]]

    def forward(self, x: Images, keep: bool) -> Images:
        """Every image of every replica is one channel."""
        flat = x.flatten(0, 1)
        if self.pairs and not (x.shape[-1] % 2 or x.shape[-2] % 2):
            y, index = _pool_pairs(flat, keep)
        else:
            y, index = aten.max_pool2d_with_indices(flat, *self.window, self.module.ceil_mode)
        if keep:
            self.x, self.index = flat, index
        return y.view(*x.shape[:3], *y.shape[2:])

    def backward(self, gradient: Images, optimizer: StackedOptimizer, wanted: bool) -> Images | None:
        """The gradient where the maximum was."""
        flat, settings = gradient.flatten(0, 1), (*self.window, self.module.ceil_mode, self.index)
        if self.overwrites:
            below = aten.max_pool2d_with_indices_backward.grad_input(flat, self.x, *settings, grad_input=self.x)
        else:
            below = aten.max_pool2d_with_indices_backward(flat, self.x, *settings)
        return below.view(*gradient.shape[:3], *below.shape[2:])


def _pool_pairs(x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """2 x 2 pooling by maxima of neighbours, which the processor does many at a time; the index is PyTorch's."""
    left, right = x[..., 0::2], x[..., 1::2]
    rows = torch.maximum(left, right)
    top, bottom = rows[..., 0::2, :], rows[..., 1::2, :]
    y = torch.maximum(top, bottom)
    if not keep:
        return y, None
    second, lower, width = right > left, bottom > top, x.shape[-1]
    column = torch.where(lower, second[..., 1::2, :], second[..., 0::2, :])
    return y, (_corners(x.shape[-2], width, x.device) + column).add_(lower, alpha=width)


@functools.cache
def _corners(height: int, width: int, device: torch.device) -> Tensor:
    """The place of the upper left corner of every 2 x 2 window."""
    return torch.arange(0, width, 2, device=device) + torch.arange(0, height, 2, device=device)[:, None] * width


class AvgPool2d(Kernel):
    """Mean over windows."""

    def _settings(self) -> tuple[Any, ...]:
        pool = self.module
        windows = (_two(x) for x in (pool.kernel_size, pool.stride, pool.padding))
        return (*windows, pool.ceil_mode, pool.count_include_pad, pool.divisor_override)

    def forward(self, x: Images, keep: bool) -> Images:
        """Every image of every replica is one channel."""
        flat = x.flatten(0, 1)
        if keep:
            self.x = flat
        y = aten.avg_pool2d(flat, *self._settings())
        return y.view(*x.shape[:3], *y.shape[2:])

    def backward(self, gradient: Images, optimizer: StackedOptimizer, wanted: bool) -> Images | None:
        """The gradient, shared out."""
        below = aten.avg_pool2d_backward(gradient.flatten(0, 1), self.x, *self._settings())
        return below.view(*gradient.shape[:3], *below.shape[2:])


class Pointwise(Kernel):
    """An activation: the same function of every number."""

    def forward(self, x: Tensor, keep: bool) -> Tensor:
        """The module itself, which has no weights; never in place, for the layer before may need its output."""
        function, slope = POINTWISE[type(self.module)]
        y = function(self.module, x)
        if keep:
            self.slope = lambda gradient: slope(self.module, gradient, x, y)
        return y

    def backward(self, gradient: Tensor, optimizer: StackedOptimizer, wanted: bool) -> Tensor | None:
        """PyTorch's own derivative."""
        return self.slope(gradient)


POINTWISE: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Identity: (lambda m, x: x, lambda m, g, x, y: g),
    nn.ReLU: (lambda m, x: torch.relu(x), lambda m, g, x, y: aten.threshold_backward(g, y, 0)),
    nn.Tanh: (lambda m, x: torch.tanh(x), lambda m, g, x, y: aten.tanh_backward(g, y)),
    nn.Sigmoid: (lambda m, x: torch.sigmoid(x), lambda m, g, x, y: aten.sigmoid_backward(g, y)),
    nn.SiLU: (lambda m, x: aten.silu(x), lambda m, g, x, y: aten.silu_backward(g, x)),
    nn.GELU: (
        lambda m, x: aten.gelu(x, approximate=m.approximate),
        lambda m, g, x, y: aten.gelu_backward(g, x, approximate=m.approximate),
    ),
    nn.LeakyReLU: (
        lambda m, x: aten.leaky_relu(x, m.negative_slope),
        lambda m, g, x, y: aten.leaky_relu_backward(g, x, m.negative_slope, False),
    ),
    nn.Softplus: (
        lambda m, x: aten.softplus(x, m.beta, m.threshold),
        lambda m, g, x, y: aten.softplus_backward(g, x, m.beta, m.threshold),
    ),
}
"""Activation -> (function, derivative of (module, gradient above, input, output))."""


def arranged(layers: list[Kernel]) -> list[Kernel]:
    """The layers in an order that computes the same for less.

    The maximum of what a ReLU left is the ReLU of the maximum, on a quarter of the numbers; where a window has no
    positive number neither passes a gradient. What a convolution gave is of no use to it later.
    """
    layers = list(layers)
    for i in range(len(layers) - 1):
        if type(layers[i].module) is nn.ReLU and isinstance(layers[i + 1], MaxPool2d):
            layers[i], layers[i + 1] = layers[i + 1], layers[i]
    for below, layer in itertools.pairwise(layers):
        layer.overwrites = isinstance(below, Conv2d) and isinstance(layer, MaxPool2d)
    return layers


KERNELS: dict[type[nn.Module], type[Kernel]] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.Flatten: Flatten,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    **dict.fromkeys(POINTWISE, Pointwise),
}
"""Layer type -> its kernel; looked up by the exact type, since a subclass may compute something else."""


def _two(value: Any) -> list[int]:
    return [int(x) for x in value] if isinstance(value, tuple | list) else [int(value)] * 2
