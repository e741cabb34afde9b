"""The networks that every engine must get right: one shared list, each with its inputs."""

import torch
from torch import nn
from torch.nn import functional as F

from local_elasticity.networks import MLP, BasicBlock, SimpleConv


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


class TinyGpt(nn.Module):
    """Token table and output layer are one parameter; positions are a bare one."""

    def __init__(self, layer=None):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8))
        self.block = layer or nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=self.positions.dtype)
        z = self.block(self.tokens(x) + self.positions, src_mask=mask, is_causal=True)
        return F.linear(self.norm(z)[:, -1], self.tokens.weight)


class TinyVit(nn.Module):
    def __init__(self, batch_first=True, positions=5):
        super().__init__()
        self.batch_first = batch_first
        self.patches, self.cls = nn.Conv2d(1, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, positions, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
        self.encoder, self.out = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x):
        z = self.patches(x).flatten(2).transpose(1, 2)
        z = torch.cat([self.cls.expand(len(z), -1, -1), z], 1) + self.positions
        z = self.encoder(z) if self.batch_first else self.encoder(z.transpose(0, 1)).transpose(0, 1)
        return self.out(z[:, 0])


class CrossAttention(nn.Module):
    """Query and key differ, so the in-projection is used in blocks; keys have a dimension of their own elsewhere."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(4, 6)
        self.packed = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)
        self.separate = nn.MultiheadAttention(6, 3, batch_first=True, kdim=4, vdim=4)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        z = torch.tanh(self.start(x))
        a, _ = self.packed(z, z.flip(1), z.flip(1))
        b, _ = self.separate(z, x, x, need_weights=False)
        return self.out((a + b).mean(1))


class Bare(nn.Module):
    """Parameters without a layer: a matrix, a scale, a shift, a scalar."""

    def __init__(self):
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
        self.scale, self.gain = nn.Parameter(torch.randn(5)), nn.Parameter(torch.ones(()))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.gain * self.out(torch.tanh(self.scale * (x @ self.matrix) + self.shift))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class TiedPart(nn.Module):
    """A layer whose weight is also used where no rule looks: without the check its product would be wrong."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(x)) + 0.01 * x @ self.layer.weight.t().exp())


class Wrapped(nn.Linear):
    """A linear layer in name only."""

    def forward(self, x):
        return torch.tanh(super().forward(x)) * self.weight.sum()


class Positions(nn.Module):
    """Positions and samples in one axis, positions slower, then faster."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        n, t, d = x.shape
        z = torch.tanh(self.one(x.transpose(0, 1).reshape(t * n, d))).view(t, n, d).transpose(0, 1)
        return self.out(torch.tanh(self.two(z.reshape(n * t, d))).view(n, t, d).sum(1))


class ImagesOfASample(nn.Module):
    """Several images a sample go through one convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 3, 3), nn.Linear(3, 3)

    def forward(self, x):
        z = torch.tanh(self.conv(x.flatten(0, 1))).mean((2, 3))
        return self.out(z.view(*x.shape[:2], -1).mean(1))


def residual(norm):
    return nn.Sequential(BasicBlock(2, 4, 2, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def batchnorm():
    net = residual(nn.BatchNorm2d)
    net(torch.randn(20, 2, 6, 6))
    return net


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, padding=2, dilation=2, groups=2),
        nn.Tanh(),
        nn.Conv2d(8, 6, 3, padding="same", padding_mode="circular"),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2),
        nn.PReLU(4),
        nn.Conv2d(4, 4, (2, 4), padding="same", groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, 3),
    )


def volumes():
    return nn.Sequential(
        nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)),
        nn.InstanceNorm3d(4, affine=True),
        nn.ReLU(inplace=True),
        nn.ConvTranspose3d(4, 2, 2),
        nn.Flatten(),
        nn.Linear(2 * 5 * 6 * 5, 3),
    )


def sequences():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding="same"), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
        nn.ConvTranspose1d(4, 4, 3, stride=2, dilation=2), nn.RMSNorm(17), nn.Flatten(), nn.Linear(68, 3),
    )  # fmt: skip


def frozen():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    net[4].weight.requires_grad_(False)
    return net


def table():
    return nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(24, 3))


def numbers(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def tokens(n):
    return torch.randint(0, 9, (n, 6))


NETWORKS = {  # name: (network, inputs, parameters that must fall back)
    "mlp": (lambda: MLP(6, 3, depth=2, width=10), numbers(6), set()),
    "simple-conv": (lambda: SimpleConv(3), numbers(1, 32, 32), set()),
    "convolutions": (convolutions, numbers(4, 7, 7), set()),
    "sequences": (sequences, numbers(2, 7), set()),
    "volumes": (volumes, numbers(2, 4, 4, 4), {"1.weight", "1.bias"}),
    "resnet-plain": (lambda: residual(lambda n: nn.Identity()), numbers(2, 6, 6), set()),
    "resnet-groupnorm": (lambda: residual(lambda n: nn.GroupNorm(2, n)), numbers(2, 6, 6), set()),
    "resnet-batchnorm": (batchnorm, numbers(2, 6, 6), set()),
    "vit": (TinyVit, numbers(1, 8, 8), {"cls"}),
    "vit, sequence first": (lambda: TinyVit(False), numbers(1, 8, 8), {"cls"}),
    "cross-attention": (CrossAttention, numbers(5, 4), {"packed.bias_k", "packed.bias_v"}),
    "gpt": (TinyGpt, tokens, {"tokens.weight"}),
    "table": (table, tokens, set()),
    "lstm": (Lstm, numbers(4, 4), {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"}),
    "bare": (Bare, numbers(6), {"matrix"}),
    "twice": (Twice, numbers(6), set()),
    "tied-part": (TiedPart, numbers(6), {"layer.weight"}),
    "wrapped": (lambda: nn.Sequential(Wrapped(6, 5), nn.Linear(5, 3)), numbers(6), {"0.weight"}),
    "bilinear": (lambda: Pairwise(), numbers(6), set()),
    "positions": (Positions, numbers(5, 4), set()),  # as many as the check has samples
    "images": (ImagesOfASample, numbers(2, 1, 5, 5), set()),
    "frozen": (frozen, numbers(6), set()),
}


class Pairwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.pairs = nn.Bilinear(3, 3, 3)

    def forward(self, x):
        return self.pairs(x[:, :3], x[:, 3:])
