"""Models, losses and data that users bring, one `Case` each: what is ordinary, and what breaks a tidy assumption.

A case is a recipe, never an instance: `Case.build` makes model, loss and data afresh, so that a loss that closes over
its model closes over the new one.
"""

import random
import types
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

DIM, CLASSES, SAMPLES = 6, 3, 16
Data = tuple[Tensor, Tensor]
Loss = Callable[..., Any]

VMAP, CONTRACT, JVP, LINEAR, DOUBLE = "vmap", "contract", "jvp", "linear", "double"
FORWARD_AD = frozenset({JVP, LINEAR, CONTRACT})
TRANSFORMS = FORWARD_AD | {VMAP}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _labels() -> Tensor:
    return torch.arange(SAMPLES) % CLASSES


def _normal(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=_generator(), dtype=torch.float64)


def vectors() -> Data:
    return _normal(DIM), _labels()


def series() -> Data:
    return _normal(2, 8), _labels()


def images() -> Data:
    return _normal(2, 6, 6), _labels()


def volumes() -> Data:
    return _normal(1, 4, 4, 4), _labels()


def sequences() -> Data:
    return _normal(3, 4), _labels()


def tokens() -> Data:
    return torch.randint(0, 11, (SAMPLES, 5), generator=_generator()), _labels()


def real_targets() -> Data:
    return _normal(DIM), torch.randn(SAMPLES, CLASSES, generator=_generator(1), dtype=torch.float64)


def soft_labels() -> Data:
    x, y = real_targets()
    return x, y.softmax(1)


def label_sets() -> Data:
    x, y = real_targets()
    return x, (y > 0).to(y)


def yes_or_no() -> Data:
    return _normal(DIM), (_labels() > 0).double()


def some_ignored() -> Data:
    x, y = vectors()
    y[3] = y[11] = -100
    return x, y


def cross_entropy(model: nn.Module) -> Loss:
    return F.cross_entropy


@dataclass(frozen=True)
class Case:
    """One situation.

    Attributes:
        name: what is odd about it.
        model: builds the network, in float32 or of its own dtype.
        loss: builds the loss for a network.
        data: builds inputs and labels.
        may_refuse: routes that may say no.
        why: what excuses the refusal.
        must_refuse: no route can be right.
        mode: flags during the measurement.
        around: context in which the user works.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Loss] = cross_entropy
    data: Callable[[], Data] = vectors
    may_refuse: frozenset[str] = frozenset()
    why: str = ""
    must_refuse: bool = False
    mode: str = "eval"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Loss, Tensor, Tensor]:
        """Model, loss, inputs and labels, always the same bits; the global streams are left alone."""
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)  # torch.manual_seed would write down the stack, for CUDA
            model = _cast(self.model(), dtype).train(self.mode == "train")
            loss = self.loss(model)
            loss = _cast(loss, dtype) if isinstance(loss, nn.Module) else loss
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002
        x, y = (t.to(dtype) if t.is_floating_point() else t for t in self.data())
        return model, loss, x, y


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.double() if dtype == torch.float64 else module.float()


# -- ordinary layers --------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def linear() -> nn.Module:
    return nn.Linear(DIM, CLASSES)


def _then_linear(features: int, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(features, CLASSES))


def conv1d() -> nn.Module:
    return _then_linear(24, nn.Conv1d(2, 3, 3, padding=1))


def conv2d() -> nn.Module:
    return _then_linear(12, nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3))


def conv3d() -> nn.Module:
    return _then_linear(54, nn.Conv3d(1, 2, 2))


def transposed_conv() -> nn.Module:
    return _then_linear(3 * 11 * 11, nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1))


def grouped_dilated_conv() -> nn.Module:
    return _then_linear(64, nn.Conv2d(2, 4, 2, dilation=2, groups=2))


def circular_conv() -> nn.Module:
    return _then_linear(108, nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"))


def _settled(norm: nn.Module) -> nn.Module:
    """A normalisation whose running statistics have moved."""
    norm.running_mean, norm.running_var = 0.1 * torch.randn(3), 1 + torch.rand(3)
    return norm


def batch_norm() -> nn.Module:
    return _then_linear(108, nn.Conv2d(2, 3, 3, padding=1), _settled(nn.BatchNorm2d(3)))


def batch_norm_without_statistics() -> nn.Module:
    return _then_linear(108, nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False))


def instance_norm() -> nn.Module:
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    return _then_linear(108, nn.Conv2d(2, 3, 3, padding=1), _settled(norm))


def group_norm() -> nn.Module:
    return _then_linear(144, nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, CLASSES))


def rms_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 8), nn.RMSNorm(8), nn.SiLU(), nn.Linear(8, CLASSES))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(4, 3, batch_first=True, **options)
        self.out = nn.Linear(6 if options.get("bidirectional") else 3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoding(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[:, 0])


class Reading(nn.Module):
    """Tokens, averaged; by a table with options of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 4, **options), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).tanh().mean(1))


def embedding_bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(11, 4, mode="mean"), nn.Tanh(), nn.Linear(4, CLASSES))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).tanh().mean(1))[:, :CLASSES]


class Shared(nn.Module):
    """One layer under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.again, self.out = self.first, nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.again(self.first(self.first(x).tanh()).tanh()).tanh())


class Residual(nn.Module):
    """Adds in place to an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(DIM, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = F.relu(h, inplace=True)
        g = self.b(h)
        g += h
        return self.out(g)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.heads = nn.ModuleDict({"main": nn.Linear(DIM, CLASSES), "unused": nn.Linear(DIM, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.heads["main"](x)


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


def one_output() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, CLASSES))


# -- parameters of odd shape, dtype and place -------------------------------------------------------------------------


class Bare(nn.Module):
    """Parameters that no layer owns: a scalar, a transposed one, a third-order one, lists and dicts of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.transposed = nn.Parameter(torch.randn(8, DIM).t())
        self.cube = nn.Parameter(0.2 * torch.randn(8, 8, CLASSES))
        self.several = nn.ParameterList([torch.randn(8), torch.randn(1, 8)])
        self.named = nn.ParameterDict({"shift": torch.randn(CLASSES)})

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.transposed * self.scale + self.several[0]).tanh() * self.several[1]
        return torch.einsum("bi,bj,ijk->bk", h, h, self.cube) + self.named["shift"]


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope, self.product = nn.PReLU(DIM), nn.Bilinear(DIM, DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.slope(x)
        return self.product(h, x)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(DIM, 8, dtype=torch.complex128))
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x.to(self.w.dtype) @ self.w).abs().to(self.out.weight.dtype))


class Spectrum(nn.Module):
    """Real weights, complex activations."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(4)), nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=DIM))


class Expanded(nn.Module):
    """A parameter whose rows are one memory: torch.optim itself cannot step on it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(1, CLASSES).expand(DIM, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.w.data = fn(self.w.data[:1]).expand(DIM, CLASSES)
        return self


class Unregistered(nn.Module):
    """Weights in a plain list: nobody trains them, and ``double()`` does not reach them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [torch.randn(DIM, 8, dtype=torch.float64, requires_grad=True)]
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ self.hidden[0].to(x)).tanh())


class Slots(nn.Module):
    __slots__ = ("width",)

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, CLASSES)
        self.width = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.width


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(DIM, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


def old_weight_norm() -> nn.Module:
    return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(DIM, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


def spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(DIM, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


def old_spectral_norm() -> nn.Module:
    return nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(DIM, 8)), nn.Tanh(), nn.Linear(8, CLASSES))


def orthogonal() -> nn.Module:
    layer = parametrizations.orthogonal(nn.Linear(DIM, DIM), orthogonal_map="cayley")
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(DIM, CLASSES))


def pruned() -> nn.Module:
    layer = prune.l1_unstructured(nn.Linear(DIM, 8), "weight", 0.4)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(8, CLASSES))


# -- graphs of their own ----------------------------------------------------------------------------------------------


class _HandTanh(torch.autograd.Function):
    """The older form: ``forward`` saves by itself, so neither vmap nor forward-mode can pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


class _StraightThrough(torch.autograd.Function):
    """A backward pass that is not the derivative of the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class HandWritten(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(DIM, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function.apply(self.a(x)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.a, self.b, self.out = nn.Linear(DIM, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda h: self.b(h.tanh()).tanh(), self.a(x), use_reentrant=self.reentrant)
        return self.out(h)


class Energy(nn.Module):
    """Outputs that are themselves gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            h = self.a(x)
            energy = h.tanh().pow(2).sum()
            (force,) = torch.autograd.grad(energy, h, create_graph=True)
        return self.b(force)


class Branching(nn.Module):
    """Which way a sample goes depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, CLASSES), nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(row) if bool(row[0] > 0) else self.b(row).tanh() for row in x])


class Detaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x).tanh()
        return self.b(h) + self.b(h.detach()) * self.b.bias


def scripted() -> nn.Module:
    return torch.jit.script(mlp())


def traced() -> nn.Module:
    return torch.jit.trace(mlp().double(), torch.zeros(2, DIM, dtype=torch.float64))  # type: ignore[return-value]


def unoptimised() -> AbstractContextManager[Any]:
    """The compiler of scripts counts calls, and computes in another order after a few."""
    return torch.jit.optimized_execution(False)


def compiled() -> nn.Module:
    return torch.compile(mlp(), backend="eager", dynamic=True)  # type: ignore[return-value]


def instance_forward() -> nn.Module:
    """The forward method is replaced on the instance."""
    model = mlp()
    model.forward = types.MethodType(lambda self, x: self[2](self[1](self[0](x)) * 2), model)
    return model


# -- forwards that write ----------------------------------------------------------------------------------------------


def relu_in_place() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(DIM, CLASSES))


class ScalesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.mul_(1.5))


class Averaging(nn.Module):
    """A buffer that follows the inputs, in eval too.

    Args:
        how: "reassign" the buffer, write "in place", write through ".data".
        used: the output depends on it.
    """

    def __init__(self, how: str, used: bool) -> None:
        super().__init__()
        self.how, self.used, self.out = how, used, nn.Linear(DIM, CLASSES)
        self.register_buffer("mean", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        new = x.detach().mean(0)
        if self.how == "reassign":
            self.mean = 0.9 * self.mean + 0.1 * new
        elif self.how == "in place":
            self.mean.mul_(0.9).add_(new, alpha=0.1)
        else:
            self.mean.data.mul_(0.9).add_(new, alpha=0.1)
        return self.out(x - self.mean if self.used else x)


class ClampsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.out.weight.data.clamp_(-0.2, 0.2)
        return self.out(x)


class Counting(nn.Module):
    """The n-th call differs from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.calls = nn.Linear(DIM, CLASSES), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.out(x) * (1 + 0.1 * self.calls)


class Logging(nn.Module):
    """Keeps what it saw in a list, a dict, a deque, a set and an object."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, CLASSES)
        self.log: list[float] = []
        self.by_size: dict[int, Tensor] = {}
        self.recent: deque[int] = deque(maxlen=3)
        self.sizes: set[int] = set()
        self.record = types.SimpleNamespace(total=0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(float(x.detach().sum()))
        self.by_size[len(x)] = x.detach().mean(0)
        self.recent.append(len(x))
        self.sizes.add(len(x))
        self.record.total += len(x)
        return self.out(x) * (1 + 0.1 * len(self.log) + 0.01 * len(self.recent))


class LazyTable(nn.Module):
    """A table that the first call makes and later ones reuse."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.table = nn.Linear(DIM, CLASSES), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(DIM).to(x).cos()
        return self.out(x * self.table)


class CachesWeights(nn.Module):
    """Keeps a value computed from its weights; a look with other weights must not read it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out, self.folded = nn.Linear(DIM, 8), nn.Linear(8, CLASSES), None

    def forward(self, x: Tensor) -> Tensor:
        if self.folded is None or torch.is_grad_enabled():
            self.folded = self.out.weight @ self.a.weight
        return x @ self.folded.t() + self.out.bias


class StoresActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out, self.hidden = nn.Linear(DIM, 8), nn.Linear(8, CLASSES), None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.a(x).tanh()
        return self.out(self.hidden)


class Noisy(nn.Module):
    """Adds noise from a generator of its own."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, CLASSES)
        makers = {
            "torch": _generator,
            "numpy": lambda: np.random.default_rng(0),
            "old numpy": lambda: np.random.RandomState(0),
            "python": lambda: random.Random(0),
        }
        self.generator = makers[source]()

    def draw(self, x: Tensor) -> Tensor:
        if isinstance(self.generator, torch.Generator):
            return torch.randn(CLASSES, generator=self.generator, dtype=x.dtype)
        if isinstance(self.generator, random.Random):
            return torch.tensor([self.generator.gauss(0, 1) for _ in range(CLASSES)], dtype=x.dtype)
        return torch.as_tensor(self.generator.normal(size=CLASSES), dtype=x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * (1 + 0.3 * self.draw(x)[0])) + 0.1 * self.draw(x)


class GlobalNoise(nn.Module):
    """Draws from a global stream, in eval too."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.out = source, nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.source == "torch":
            return self.out(F.dropout(x, 0.5, training=True))
        noise = np.random.normal(size=DIM) if self.source == "numpy" else [random.gauss(0, 1) for _ in range(DIM)]  # noqa: NPY002
        return self.out(x + 0.1 * torch.as_tensor(noise, dtype=x.dtype))


def class_counter() -> nn.Module:
    class Counted(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(DIM, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return self.out(x) * (1 + 0.1 * type(self).calls)

        def outside(self) -> int:
            return type(self).calls

    return Counted()


CALLS = {"global": 0}


class GlobalCounter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, CLASSES)
        CALLS["global"] = 0

    def forward(self, x: Tensor) -> Tensor:
        CALLS["global"] += 1
        return self.out(x) * (1 + 0.1 * CALLS["global"])

    def outside(self) -> int:
        return CALLS["global"]


def closure_counter() -> nn.Module:
    model, calls = linear(), 0

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.linear(x, model.weight, model.bias) * (1 + 0.1 * calls)

    model.forward = forward
    model.outside = lambda: calls
    return model


class SetsFlags(nn.Module):
    """Puts a part of itself into train mode, whatever the user said."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train(not self.norm.training)
        return self.out(self.norm(x))


# -- hooks ------------------------------------------------------------------------------------------------------------


def forward_hook() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    return model


def forward_pre_hook() -> nn.Module:
    model = mlp()
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    return model


def backward_hook() -> nn.Module:
    model = mlp()
    model[2].register_full_backward_hook(lambda module, into, out: (into[0] * 3,))
    return model


def backward_pre_hook() -> nn.Module:
    model = mlp()
    model[0].register_full_backward_pre_hook(lambda module, out: (out[0] * 3,))
    return model


class ReversesGradient(nn.Module):
    """A hook on an activation turns the gradient round, as in domain adaptation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(DIM, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda gradient: -0.5 * gradient)
        return self.out(h)


class HookedWeights(nn.Module):
    """Hooks on parameters change gradients: before, or after, they are stored in ``.grad``."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.a, self.out, self.stored = nn.Linear(DIM, 8), nn.Linear(8, CLASSES), stored

    def hook(self) -> "HookedWeights":
        if self.stored:
            self.a.weight.register_post_accumulate_grad_hook(_halve_stored_gradient)
        else:
            self.a.weight.register_hook(lambda gradient: 3 * gradient)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).tanh())


def _halve_stored_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def observer_hook() -> nn.Module:
    """A hook that keeps the last output of a layer, as feature extractors do."""
    model, features = mlp(), {}
    model[1].register_forward_hook(lambda module, inputs, output: features.update(hidden=output))
    model.features = features
    return model
