"""Neural collapse of the layers of a network, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from local_elasticity.base.checks import check_choice, check_names, check_whole
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.base.tensors import check_class_labels, check_module, check_tensor, try_model
from local_elasticity.collapse.features import Positions, to_features
from local_elasticity.collapse.geometry import Weighting, check_weighting, metrics, metrics_of_many
from local_elasticity.collapse.state import Keep, NeuralCollapse
from local_elasticity.impact.plan import told_of_memory
from local_elasticity.impact.wrappers import inner_module

# Their outputs of three dimensions are (samples, channels, positions); those of other layers (samples, positions,
# channels), as in networks on sequences.
CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.MaxPool1d, nn.AvgPool1d)


OUTPUTS, PENULTIMATE = "outputs", "penultimate"
"""Words beside names of modules: what the network puts out, and what goes into its last linear layer."""


class LayerCollapse:
    """`NeuralCollapse` of several layers, by name, in one pass of a network over batches.

    Args:
        model: the network; called as it is (put it into eval mode yourself).
        n_classes: K.
        layers: names of modules, "outputs" or "penultimate"; every layer with weights by default.
        positions: convolution outputs are averaged over positions ("mean") or flattened.
        weighting: as in `NeuralCollapse`.
        keep: as in `NeuralCollapse`.
    """

    def __init__(
        self,
        model: nn.Module,
        n_classes: int,
        layers: Sequence[str] | None = None,
        *,
        positions: Positions = "mean",
        weighting: Weighting = "classes",
        keep: Keep = "sums",
    ) -> None:
        self.model = inner_module(check_module("model", model, trainable=False))
        self.n_classes = check_whole("n_classes", n_classes, 2)
        check_weighting(weighting)
        check_choice("positions", positions, Positions)
        check_choice("keep", keep, Keep)
        self.layers = check_layers(self.model, layers)
        self.positions: Positions = positions
        self.weighting: Weighting = weighting
        self.keep: Keep = keep
        self.states: dict[str, NeuralCollapse] = {}

    def update(self, x: Float[Tensor, "samples ..."], labels: Int[Tensor, " samples"]) -> None:
        """Show the network a batch."""
        for name, features in layer_outputs(self.model, x, self.layers, self.positions).items():
            self._state(name, features.shape[1]).update(features, labels)

    def merge(self, other: LayerCollapse) -> Self:
        """Add what another shard saw of the same layers."""
        for name, state in other.states.items():
            self._state(name, state.dim).merge(state)
        return self

    def reset(self) -> None:
        """Forget everything."""
        self.states.clear()

    def compute(self) -> dict[str, dict[str, float]]:
        """Layer -> metrics; "penultimate" has those of the classifier too."""
        return {
            name: state.compute(*_classifier_for(self.model, name, range(self.n_classes)))
            for name, state in self.states.items()
        }

    def _state(self, name: str, dim: int) -> NeuralCollapse:
        if name not in self.states:
            self.states[name] = NeuralCollapse(self.n_classes, dim, weighting=self.weighting, keep=self.keep)
        return self.states[name]


@told_of_memory()
def layer_metrics(
    model: nn.Module,
    x: Float[Tensor, "samples ..."],
    labels: Int[Tensor, " samples"],
    layers: Sequence[str] | None = None,
    *,
    positions: Positions = "mean",
    weighting: Weighting = "classes",
    batch_size: int = 256,
) -> dict[str, dict[str, float]]:
    """Layer -> `metrics` of its outputs on these samples, after one forward pass over them.

    Args:
        model: the network; called as it is.
        x: samples.
        labels: their classes; any whole numbers.
        layers: names of modules, "outputs" (of the network) or "penultimate" (what goes into its last linear layer,
            with the metrics of this classifier too); every layer with weights by default.
        positions: convolution outputs are averaged over positions ("mean") or flattened.
        weighting: as in `NeuralCollapse`.
        batch_size: samples in one forward pass.

    Raises:
        InputError: for an unknown layer, or labels that do not fit.
    """
    model = inner_module(check_module("model", model, trainable=False))
    check_weighting(weighting)
    check_choice("positions", positions, Positions)
    check_whole("batch_size", batch_size)
    names = check_layers(model, layers)
    check_tensor("x", x, finite=False)
    check_class_labels("labels", labels, n=len(x), negative=True)
    parts = [layer_outputs(model, part, names, positions) for part in x.split(batch_size)]
    classes, places = torch.unique(labels, return_inverse=True)
    together = {name: torch.cat([part[name] for part in parts]) for name in names}
    plain = [name for name in names if _classifier_for(model, name, classes.tolist())[0] is None]
    shared = metrics_of_many([together[name] for name in plain], places, n_classes=len(classes), weighting=weighting)
    found = dict(zip(plain, shared, strict=True))
    for name in names:
        if name not in found:
            head = _classifier_for(model, name, classes.tolist())
            found[name] = metrics(together[name], places, *head, n_classes=len(classes), weighting=weighting)
    return {name: found[name] for name in names}


def check_layers(model: nn.Module, layers: Sequence[str] | None) -> tuple[str, ...]:
    """The layers asked for; those with weights by default.

    Raises:
        InputError: for a name that the network does not have, or no layers at all.
    """
    if layers is None:
        layers = weighted_layers(model)
    layers = check_names("layers", layers, least=0)
    known = {name for name, _ in model.named_modules() if name} | {OUTPUTS}
    if last_linear(model) is not None:
        known.add(PENULTIMATE)
    for layer in layers:
        if layer not in known:
            raise InputError(expected="a layer of the network", got=repr(layer), do=nearest(str(layer), known))
    if not layers or len(set(layers)) < len(layers):
        raise InputError(expected="layers, each once", got=str(list(layers)), do=nearest("", known))
    return layers


def weighted_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers that have weights of their own, in the order of the network."""
    return tuple(name for name, module in model.named_modules() if name and any(True for _ in _own(module)))


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The classifier: the last linear layer, in the order of the network's attributes."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return found[-1] if found else None


def _classifier_for(model: nn.Module, layer: str, classes: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias for the penultimate features, where the classifier has an output for each class."""
    linear = last_linear(model) if layer == PENULTIMATE else None
    if linear is None or linear.out_features <= max(classes):
        return None, None
    rows = list(classes)
    return linear.weight[rows], None if linear.bias is None else linear.bias[rows]


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def layer_outputs(
    model: nn.Module, x: Float[Tensor, "samples ..."], layers: Iterable[str], positions: Positions = "mean"
) -> dict[str, Float[Tensor, "samples dim"]]:
    """Outputs of the named layers for a batch, as features; no gradients, no change of the network.

    Raises:
        InputError: when a layer is not reached, is reached more than once, or puts out no tensor with samples first.
    """
    check_module("model", model, trainable=False)
    check_tensor("x", x, finite=False)
    check_choice("positions", positions, Positions)
    found: dict[str, Tensor] = {}
    layers = check_layers(model, list(layers) if isinstance(layers, Iterable) else layers)
    with _listening(model, layers, found, positions, len(x)), torch.no_grad():
        try_model(model, x, "x")
    missing = [name for name in layers if name not in found]
    if missing:
        raise InputError(
            expected="layers that the forward pass goes through", got=f"{missing} not reached", do="leave them out"
        )
    return {name: found[name] for name in layers}


def _maps_means(module: nn.Module) -> bool:
    """Whether a layer's output averaged over positions is the layer's output for the average.

    So it is for batch normalisation by running statistics, channel by channel an affine map; a second hook may be the
    caller's and change the output.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    running = type(module) in kinds and not module.training and module.running_mean is not None
    alone = len(module._forward_hooks) == 1 and not module._forward_pre_hooks and "forward" not in vars(module)
    return running and alone


def _statistics(module: Any) -> tuple[Any, ...]:
    return module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps


@contextmanager
def _listening(
    model: nn.Module, layers: Iterable[str], found: dict[str, Tensor], positions: Positions, samples: int
) -> Iterator[Mapping[str, Tensor]]:
    modules = dict(model.named_modules())
    before: tuple[Tensor, int, Tensor] | None = None  # the last output, its version, and its features

    def keep(name: str, module: nn.Module, x: Any, source: Any = None) -> None:
        nonlocal before
        if name in found:
            raise InputError(expected="layers that are used once", got=f"{name!r} used again", do="leave it out")
        if not isinstance(x, Tensor) or x.dim() < 1 or len(x) != samples:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                expected=f"outputs of layer {name!r} as a tensor ({samples}, ...)", got=got, do="leave it out"
            )
        same = before is not None and before[0] is source and before[0]._version == before[1]
        if before is not None and same and positions == "mean" and _maps_means(module):
            found[name] = nn.functional.batch_norm(before[2], *_statistics(module))
            last = False
        else:
            last = x.dim() == 3 and not isinstance(module, CHANNELS_FIRST)
            found[name] = to_features(x, positions, channels_last=last)
        # Tensors of inference mode have no version; channels that come last are averaged over other positions.
        before = None if last or x.is_inference() else (x, x._version, found[name])

    def listen(name: str) -> Any:
        linear = last_linear(model) if name == PENULTIMATE else None
        if linear is not None:
            return linear.register_forward_pre_hook(lambda module, arguments: keep(name, module, arguments[0]))
        module = model if name == OUTPUTS else modules[name]
        return module.register_forward_hook(
            lambda module, arguments, output: keep(name, module, output, *arguments[:1])
        )

    handles = [listen(name) for name in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
