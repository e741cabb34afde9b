"""The networks of the two papers, and `build`, which makes one from its name.

Sources: the residual network of "Dynamics of Local Elasticity During Training of Neural Nets" (arXiv:2111.01166,
published notebooks) and the convolutional network of "Imitating Deep Learning Dynamics via Locally Elastic Stochastic
Differential Equations" (arXiv:2110.05960, published code).

A new network is one function and one line: decorate it with `register`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from local_elasticity.base.checks import check_text, check_whole, check_whole_list, is_whole
from local_elasticity.base.errors import InputError, nearest

__all__ = [
    "MLP",
    "NETWORKS",
    "BasicBlock",
    "ResNet18",
    "SimpleConv",
    "TransformerBlock",
    "VisionTransformer",
    "build",
    "register",
    "resnet18_batchnorm",
    "resnet18_groupnorm",
    "resnet18_plain",
]

Norm = Callable[[int], nn.Module]
"""Makes the normalisation layer of a given number of channels."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way around them (He et al., arXiv:1512.03385, figure 2).

    Every activation is a module of its own and none works in place, so that hooks and `torch.func` see each once.

    Args:
        n_in: channels that come in.
        n_out: channels that go out.
        stride: of the first convolution; the way around is a strided 1x1 convolution when the shape changes.
        norm: makes the normalisation layers.
    """

    def __init__(self, n_in: int, n_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = norm(n_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, padding=1, bias=False)
        self.bn2 = norm(n_out)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), norm(n_out))

    def forward(self, x: Float[Tensor, "samples n_in height width"]) -> Float[Tensor, "samples n_out h w"]:
        """Compute relu(two convolutions + the way around)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 with a free choice of normalisation.

    7x7 convolution (stride 2), 3x3 max pooling (stride 2), four stages of two blocks with 64, 128, 256 and 512
    channels, global average, one linear layer. A 32x32 image is 8x8 after the pooling and 1x1 after the last stage.
    Convolutions have no bias and start from ``kaiming_normal_(mode="fan_out", nonlinearity="relu")``; the linear layer
    starts as PyTorch makes it. Parameter names are the usual ones (``layer1.0.conv1.weight``), so that published
    weights load.

    Args:
        n_classes: outputs.
        in_channels: channels of the images.
        norm: makes the normalisation layer of a number of channels.
        width: channels of the first stage; 64 is the network of the paper, fewer make it narrow everywhere.
    """

    def __init__(self, n_classes: int, in_channels: int, norm: Norm, width: int = 64) -> None:
        super().__init__()
        _check_count("n_classes", n_classes)
        _check_count("in_channels", in_channels)
        _check_count("width", width)
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        w = width
        self.layer1 = nn.Sequential(BasicBlock(w, w, 1, norm), BasicBlock(w, w, 1, norm))
        self.layer2 = nn.Sequential(BasicBlock(w, 2 * w, 2, norm), BasicBlock(2 * w, 2 * w, 1, norm))
        self.layer3 = nn.Sequential(BasicBlock(2 * w, 4 * w, 2, norm), BasicBlock(4 * w, 4 * w, 1, norm))
        self.layer4 = nn.Sequential(BasicBlock(4 * w, 8 * w, 2, norm), BasicBlock(8 * w, 8 * w, 1, norm))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * w, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x: Float[Tensor, "samples channels height width"]) -> Float[Tensor, "samples 64 h w"]:
        """Compute what comes before the residual stages: a quarter of the height and width."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x: Float[Tensor, "samples channels height width"]) -> Float[Tensor, "samples classes"]:
        """Compute the logits."""
        for stage in (self.stem, self.layer1, self.layer2, self.layer3, self.layer4, self.avgpool, self.flatten):
            x = stage(x)
        return self.fc(x)


class SimpleConv(nn.Module):
    """The LeNet-5-shaped network of the SDE paper's code.

    Convolution to 6 channels (5x5), ReLU, 2x2 max pooling, convolution to 16 channels (5x5), ReLU, 2x2 max pooling,
    then linear layers 400-120-84-``n_classes`` with ReLU between. No dropout, no normalisation, PyTorch's own initial
    values: 61,111 parameters for three classes and one channel, 61,411 for three channels.
    The paper trains it in float64: call ``.double()``.

    Args:
        n_classes: outputs.
        in_channels: channels of the images.
        image_size: 32 as in the paper, or 28 (MNIST), where the first convolution pads by 2 as LeNet-5 did, so that
            every later layer and every parameter keeps its shape.

    Raises:
        InputError: for another image size.
    """

    def __init__(self, n_classes: int, in_channels: int = 1, image_size: int = 32) -> None:
        super().__init__()
        _check_count("n_classes", n_classes)
        _check_count("in_channels", in_channels)
        if not is_whole(image_size) or image_size not in (28, 32):
            raise InputError(
                expected="image_size 32 or 28, whose 16 maps of 5x5 fill the first linear layer",
                got=f"image_size={image_size}",
                do="resize the images, or use resnet18-plain or mlp, which take any size",
            )
        self.image_size = image_size
        self.conv1 = nn.Conv2d(in_channels, 6, 5, padding=(32 - image_size) // 2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(400, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, n_classes)

    def forward(self, x: Float[Tensor, "samples channels height width"]) -> Float[Tensor, "samples classes"]:
        """Compute the logits.

        Raises:
            InputError: when the images are not ``image_size`` high and wide.
        """
        if tuple(x.shape[-2:]) != (self.image_size, self.image_size):
            raise InputError(
                expected=f"images of {self.image_size}x{self.image_size} pixels",
                got=f"an input of shape {tuple(x.shape)}",
                do="make the network with SimpleConv(..., image_size=28 or 32) to match, or resize the images",
            )
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.flatten(self.pool2(self.relu2(self.conv2(x))))
        return self.fc3(self.relu4(self.fc2(self.relu3(self.fc1(x)))))


class MLP(nn.Module):
    """Linear layers with ReLU between; the input is flattened.

    Args:
        in_features: numbers in one example (channels x height x width for an image).
        n_classes: outputs.
        depth: hidden layers; 0 is a linear model.
        width: units of a hidden layer.
    """

    def __init__(self, in_features: int, n_classes: int, depth: int = 2, width: int = 256) -> None:
        super().__init__()
        for name, count in (("in_features", in_features), ("n_classes", n_classes), ("width", width)):
            _check_count(name, count)
        _check_count("depth", depth, least=0)
        sizes = [in_features] + [width] * depth
        hidden = [layer for n_in, n_out in itertools.pairwise(sizes) for layer in (nn.Linear(n_in, n_out), nn.ReLU())]
        self.flatten = nn.Flatten()
        self.hidden = nn.Sequential(*hidden)
        self.out = nn.Linear(sizes[-1], n_classes)

    def forward(self, x: Float[Tensor, "samples ..."]) -> Float[Tensor, "samples classes"]:
        """Compute the logits."""
        return self.out(self.hidden(self.flatten(x)))


class VisionTransformer(nn.Module):
    """A small vision transformer (Dosovitskiy et al., arXiv:2010.11929), normalised before each block.

    Patches as tokens, learned positions, ``depth`` blocks of self-attention and a two-layer perceptron (GELU, four
    times as wide), a last layer norm, the mean over tokens, one linear layer. No dropout, no class token.

    Args:
        n_classes: outputs.
        in_channels: channels of the images.
        image_size: height and width of the images.
        patch: height and width of a patch; must divide ``image_size``.
        width: numbers in a token.
        depth: blocks.
        heads: of attention; must divide ``width``.

    Raises:
        InputError: for patches or heads that do not divide.
    """

    def __init__(
        self,
        n_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        for name, count in (("n_classes", n_classes), ("in_channels", in_channels), ("patch", patch)):
            _check_count(name, count)
        for name, count in (("width", width), ("depth", depth), ("heads", heads)):
            _check_count(name, count)
        _check_count("image_size", image_size)
        if image_size % patch or width % heads:
            raise InputError(
                expected="a patch that divides the image and heads that divide the width",
                got=f"patch={patch} of {image_size}, heads={heads} of {width}",
                do="for example patch=4, width=64, heads=4",
            )
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, n_classes)

    def forward(self, x: Float[Tensor, "samples channels height width"]) -> Float[Tensor, "samples classes"]:
        """Compute the logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.blocks(tokens)).mean(dim=1))


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each normalised before and with a way around.

    Args:
        width: numbers in a token.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.back = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "samples tokens width"]) -> Float[Tensor, "samples tokens width"]:
        """Compute x + attention, then + perceptron."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # written out, because forward-mode differentiation does not know the fused kernel
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // self.heads), dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.back(self.gelu(self.hidden(self.norm2(x))))


def resnet18_plain(n_classes: int, in_channels: int = 3, width: int = 64) -> ResNet18:
    """Make the paper's ResNet-18: without any normalisation (11,168,451 parameters for three classes).

    Without batch statistics one example's prediction does not depend on its batch, which a probe update needs.
    Source: arXiv:2111.01166, published notebooks.
    """
    return ResNet18(n_classes, in_channels, lambda channels: nn.Identity(), width)


def resnet18_batchnorm(n_classes: int, in_channels: int = 3, width: int = 64) -> ResNet18:
    """Make the ResNet-18 of He et al. (arXiv:1512.03385), batch normalisation after every convolution."""
    return ResNet18(n_classes, in_channels, nn.BatchNorm2d, width)


def resnet18_groupnorm(n_classes: int, in_channels: int = 3, groups: int = 32, width: int = 64) -> ResNet18:
    """Make a ResNet-18 with group normalisation (Wu & He, arXiv:1803.08494), free of batch statistics.

    Args:
        n_classes: outputs.
        in_channels: channels of the images.
        groups: groups in every layer: 32 (that paper's choice) puts 2 channels of the first stage and 16 of the last
            in a group. Must divide ``width``.
        width: channels of the first stage.

    Raises:
        InputError: when ``groups`` does not divide ``width``, the smallest number of channels.
    """
    _check_count("groups", groups)
    _check_count("width", width)
    if width % groups:
        raise InputError(
            expected=f"groups that divide {width} channels", got=f"groups={groups}", do=f"use 1, 2, 4, ... {width}"
        )
    return ResNet18(n_classes, in_channels, lambda channels: nn.GroupNorm(groups, channels), width)


# --- by name -----------------------------------------------------------------------------------------------------

Builder = Callable[..., nn.Module]
"""Called with (n_classes, example_shape, **settings); the settings are its keyword-only parameters."""

NETWORKS: dict[str, Builder] = {}
"""The networks that `build` knows by name."""


def register(name: str) -> Callable[[Builder], Builder]:
    """Make a builder known to `build` under ``name``; its keyword-only arguments are what may follow the name.

    Args:
        name: without a colon; one that there is already is refused.

    Returns:
        A decorator that registers the builder and hands it back unchanged.

    Raises:
        InputError: for what is no such name.
    """
    if check_text("name", name) in NETWORKS or ":" in name:
        what = "one with a colon" if ":" in name else "one that is there"
        raise InputError(expected="a new name without a colon", got=f"{name!r}, {what}", do="choose another name")

    def add(builder: Builder) -> Builder:
        NETWORKS[name] = builder
        return builder

    return add


@register("mlp")
def _mlp(n_classes: int, example_shape: Sequence[int], *, depth: int = 2, width: int = 256) -> nn.Module:
    return MLP(math.prod(example_shape), n_classes, depth, width)


@register("resnet18-plain")
def _resnet18_plain(n_classes: int, example_shape: Sequence[int], *, width: int = 64) -> nn.Module:
    return resnet18_plain(n_classes, _channels(example_shape), width)


@register("resnet18-batchnorm")
def _resnet18_batchnorm(n_classes: int, example_shape: Sequence[int], *, width: int = 64) -> nn.Module:
    return resnet18_batchnorm(n_classes, _channels(example_shape), width)


@register("resnet18-groupnorm")
def _resnet18_groupnorm(
    n_classes: int, example_shape: Sequence[int], *, groups: int = 32, width: int = 64
) -> nn.Module:
    return resnet18_groupnorm(n_classes, _channels(example_shape), groups, width)


@register("vit-small")
def _vit_small(
    n_classes: int, example_shape: Sequence[int], *, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4
) -> nn.Module:
    channels, (height, other) = _channels(example_shape), example_shape[1:]
    if height != other:
        raise InputError(
            expected="square images", got=f"examples of shape {tuple(example_shape)}", do="crop or resize the images"
        )
    return VisionTransformer(n_classes, channels, height, patch, width, depth, heads)


@register("simple-conv")
def _simple_conv(n_classes: int, example_shape: Sequence[int]) -> nn.Module:
    channels, (height, width) = _channels(example_shape), example_shape[1:]
    if height != width:
        raise InputError(
            expected="square images of 32 or 28 pixels",
            got=f"examples of shape {tuple(example_shape)}",
            do="resize the images, or use resnet18-plain or mlp",
        )
    return SimpleConv(n_classes, channels, height)


def build(name: str, n_classes: int, example_shape: Sequence[int]) -> nn.Module:
    """Make a network from its name.

    Args:
        name: a known network (``"resnet18-plain"``), with settings after a colon where it has any
            (``"mlp:depth=3,width=128"``), or your own function as ``"package.module:function"`` or
            ``"path/to/file.py:function"``, called with ``n_classes`` (or with nothing if it takes no argument).
        n_classes: outputs.
        example_shape: the shape of one example, without the batch: (channels, height, width) or (features,).

    Raises:
        InputError: for an unknown name or setting, a function that is not there, or one that returns no network.
    """
    _check_count("n_classes", n_classes)
    check_text("name", name)
    example_shape = check_whole_list("example_shape", example_shape, 1, at_least=1)
    head, _, tail = name.rpartition(":") if ":" in name else (name, "", "")
    if head in NETWORKS:
        builder = NETWORKS[head]
        return builder(n_classes, example_shape, **_settings(name, builder, tail))
    if not tail or "=" in tail:
        raise InputError(
            expected="the name of a network, or your own as package.module:function or path/to/file.py:function",
            got=repr(name),
            do=nearest(head or tail, NETWORKS),
        )
    return _call(name, _find(name, head, tail), n_classes)


def _settings(name: str, builder: Builder, text: str) -> dict[str, Any]:
    """Read ``depth=3,width=128`` against the builder's keyword-only parameters."""
    known = {p.name: p for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY}
    settings: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in known or key in settings:
            raise InputError(
                expected="settings as key=value, each once",
                got=f"{part!r} in {name!r}",
                do=nearest(key, known) if known else "leave it out: this network has no settings",
            )
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = value
    return settings


def _find(name: str, module_name: str, function_name: str) -> Callable[..., Any]:
    """Import the user's own function."""
    if module_name.endswith(".py"):
        module = _import_file(name, Path(module_name).expanduser())
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            parents = {module_name[:end] for end, c in enumerate(module_name + ".") if c == "."}
            if error.name not in parents:  # the module is there; something that it imports is not
                raise _not_importable(module_name, error) from error
            raise InputError(
                expected="a known network or an importable module",
                got=f"{name!r}: there is no module {error.name!r}",
                do=f"give the file as path/to/file.py:{function_name}, or use a known network: "
                + nearest(module_name, NETWORKS),
            ) from error
        except Exception as error:
            raise _not_importable(module_name, error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(
            expected=f"a function {function_name!r} in {module_name}",
            got="nothing callable of that name",
            do=nearest(function_name, public) if public else "define it there",
        )
    return function


def _not_importable(module: str, error: Exception) -> InputError:
    missing = f" (no module {error.name!r})" if isinstance(error, ModuleNotFoundError) and error.name else ""
    command = f"python {module}" if module.endswith(".py") else f"python -c 'import {module}'"
    return InputError(
        expected="a module that can be imported",
        got=f"{type(error).__name__}{missing} in {module}",
        do=f"make this work first: {command}",
    )


def _import_file(name: str, path: Path) -> Any:
    """Import a Python file by its path, its neighbours importable meanwhile as for ``python file.py``."""
    if not path.is_file():
        raise InputError(expected="a Python file", got=f"{name!r}: no file {path}", do="check the path")
    path = path.resolve()
    module_name = path.stem
    there = sys.modules.get(module_name)
    if there is not None and getattr(there, "__file__", None) != str(path):
        module_name += f"_{zlib.crc32(str(path).encode()):08x}"  # never over another module of that name
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(expected="a Python file", got=str(path), do="check the path")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # so that the networks made from it can be pickled
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, InputError) or not isinstance(error, Exception):
            raise
        raise _not_importable(path.name, error) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _call(name: str, function: Callable[..., Any], n_classes: int) -> nn.Module:
    """Call the user's function with ``n_classes``, or with nothing if it takes nothing."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some compiled functions have no signature
        parameters = ()
    try:
        network = function(n_classes) if parameters else function()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            expected=f"{name!r} to make a network when it is called with {'n_classes' if parameters else 'nothing'}",
            got=f"{type(error).__name__} from it",
            do="make that call work by itself first",
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(
            expected=f"{name!r} to return a torch.nn.Module",
            got=f"{type(network).__name__}",
            do="return the network itself from that function",
        )
    return network


def _channels(example_shape: Sequence[int]) -> int:
    """The channels of an image's shape."""
    if len(example_shape) != 3:
        raise InputError(
            expected="examples of shape (channels, height, width) for a convolutional network",
            got=f"shape {tuple(example_shape)}",
            do="give images, or use mlp",
        )
    return example_shape[0]


def _check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse anything but a whole number of at least ``least``."""
    check_whole(name, value, least)
