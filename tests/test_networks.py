"""The networks: sizes, shapes, initial values, and the grammar of `build`."""

import copy
import math
import pickle
import sys

import pytest
import torch
from torch import nn

from local_elasticity import networks
from local_elasticity.base.errors import InputError

RESNETS = (networks.resnet18_plain, networks.resnet18_batchnorm, networks.resnet18_groupnorm)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_are_the_published_ones():
    assert count(networks.resnet18_plain(3)) == 11_168_451
    assert count(networks.SimpleConv(3)) == 61_111
    assert count(networks.SimpleConv(3, in_channels=3)) == 61_411
    assert count(networks.SimpleConv(3, image_size=28)) == 61_111
    # 4,800 normalised channels, with a scale and a shift each.
    assert count(networks.resnet18_batchnorm(3)) == count(networks.resnet18_groupnorm(3)) == 11_168_451 + 2 * 4_800
    assert count(networks.resnet18_batchnorm(1000)) == 11_689_512  # the well-known size of ResNet-18
    assert count(networks.MLP(10, 2, depth=3, width=4)) == 44 + 20 + 20 + 10
    assert count(networks.MLP(10, 2, depth=0)) == 22


@pytest.mark.parametrize("make", RESNETS)
def test_resnet_shapes(make):
    model = make(3).eval()
    x = model.stem(torch.zeros(2, 3, 32, 32))
    assert x.shape == (2, 64, 8, 8)
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert make(5, in_channels=1).eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 5)


def test_plain_resnet_has_no_normalisation_and_ignores_its_batch():
    model = networks.resnet18_plain(3)
    norms = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    assert not any(isinstance(module, norms) for module in model.modules())
    assert not any(isinstance(module, nn.ReLU) and module.inplace for module in model.modules())
    assert not list(model.buffers())
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", RESNETS)
def test_resnet_starts_from_kaiming_fan_out(make):
    torch.manual_seed(0)
    model = make(3)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_out = module.out_channels * math.prod(module.kernel_size)
            deviation = math.sqrt(2 / fan_out)
            n = module.weight.numel()
            assert abs(module.weight.mean().item()) < 5 * deviation / math.sqrt(n), name
            assert module.weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * n)), name
    bound = 1 / math.sqrt(512)  # the linear layer as PyTorch makes it: uniform
    assert 0.9 * bound < model.fc.weight.abs().max().item() <= bound
    assert model.fc.bias.abs().max().item() <= bound


def test_groupnorm_groups():
    groups = {m.num_groups for m in networks.resnet18_groupnorm(3).modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {32}
    with pytest.raises(InputError, match="divide 64"):
        networks.resnet18_groupnorm(3, groups=3)


@pytest.mark.parametrize(("size", "inner"), [(32, 28), (28, 28)])
def test_simple_conv_shapes(size, inner):
    model = networks.SimpleConv(3, image_size=size)
    x = torch.zeros(2, 1, size, size)
    assert model.conv1(x).shape == (2, 6, inner, inner)
    assert model.conv2(model.pool1(model.conv1(x))).shape == (2, 16, 10, 10)
    assert (model.fc1.in_features, model.fc1.out_features, model.fc2.out_features) == (400, 120, 84)
    assert model(x).shape == (2, 3)
    with pytest.raises(InputError, match=r"shape \(2, 1, 30, 30\)"):
        model(torch.zeros(2, 1, 30, 30))


def test_simple_conv_at_28_equals_32_with_a_black_frame():
    small, large = networks.SimpleConv(3, image_size=28), networks.SimpleConv(3)
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small(x), large(torch.nn.functional.pad(x, (2, 2, 2, 2))))


def test_mlp_flattens():
    model = networks.MLP(3 * 4 * 4, 5, depth=1, width=7)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model(x), model(x.flatten(1)))
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("name", sorted(networks.NETWORKS))
def test_networks_pickle_copy_and_have_per_sample_gradients(name):
    model = networks.build(name, 3, (3, 32, 32)).eval()
    again = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    parameters = dict(model.named_parameters())

    def loss(parameters, one):
        return torch.func.functional_call(model, parameters, (one[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert all(g.shape == (2, *parameters[name].shape) for name, g in gradients.items())


def test_build_reads_settings():
    model = networks.build("mlp:depth=3, width=16", 4, (1, 5, 5))
    assert isinstance(model, networks.MLP)
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [16, 16, 16, 4]
    assert networks.build("mlp", 4, (25,))(torch.zeros(1, 25)).shape == (1, 4)
    assert networks.build("simple-conv", 4, (3, 28, 28))(torch.zeros(1, 3, 28, 28)).shape == (1, 4)
    group = networks.build("resnet18-groupnorm:groups=8", 4, (1, 32, 32))
    assert next(m for m in group.modules() if isinstance(m, nn.GroupNorm)).num_groups == 8


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet18-plian", (3, 32, 32), "did you mean 'resnet18-plain'"),
        ("resnet:depth=3", (3, 32, 32), "name of a network"),
        ("mlp:dept=3", (4,), "did you mean 'depth'"),
        ("mlp:depth", (4,), "key=value"),
        ("mlp:depth=1,depth=2", (4,), "each once"),
        ("mlp:depth=deep", (4,), "depth: a whole number"),
        ("resnet18-plain:depth=3", (3, 32, 32), "known: width"),
        ("simple-conv:depth=3", (3, 32, 32), "no settings"),
        ("vit-small:patch=5", (3, 32, 32), "divide"),
        ("vit-small", (3, 32, 28), "square"),
        ("resnet18-plain", (784,), "channels, height, width"),
        ("simple-conv", (1, 28, 32), "square"),
        ("simple-conv", (1, 8, 8), "image_size 32 or 28"),
        ("", (3, 32, 32), "name: a text"),
        ("no_such_module:make", (4,), "no module 'no_such_module'"),
        ("math:no_such_function", (4,), "no_such_function"),
        ("math:pi", (4,), "nothing callable"),
        ("nowhere.py:make", (4,), "no file nowhere.py"),
    ],
)
def test_build_refuses(name, shape, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        networks.build(name, 3, shape)


@pytest.mark.parametrize("n_classes", [0, -1, 2.0, True])
def test_build_refuses_a_wrong_number_of_classes(n_classes):
    with pytest.raises(InputError, match="n_classes"):
        networks.build("mlp", n_classes, (4,))


def test_build_calls_your_own_function(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 6\n")
    file = tmp_path / "nets_of_mine.py"
    file.write_text(
        "from torch import nn\n"
        "from neighbour_of_mine import WIDTH\n"
        "def by_classes(n_classes): return nn.Linear(WIDTH, n_classes)\n"
        "def fixed(): return nn.Linear(WIDTH, 9)\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, n): super().__init__(WIDTH, n)\n"
        "def wrong(n): return n\n"
    )
    for name in ("nets_of_mine", "neighbour_of_mine"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    before = list(sys.path)
    assert networks.build(f"{file}:by_classes", 4, (6,)).out_features == 4
    assert networks.build(f"{file}:fixed", 4, (6,)).out_features == 9
    pickle.loads(pickle.dumps(networks.build(f"{file}:Net", 4, (6,))))
    assert sys.path == before
    with pytest.raises(InputError, match=r"return a torch\.nn\.Module; got int"):
        networks.build(f"{file}:wrong", 4, (6,))
    with pytest.raises(InputError, match="did you mean 'fixed'"):
        networks.build(f"{file}:fixd", 4, (6,))
    monkeypatch.syspath_prepend(tmp_path)
    assert networks.build("nets_of_mine:by_classes", 5, (6,)).out_features == 5


def test_a_new_network_is_one_registration(monkeypatch):
    monkeypatch.setattr(networks, "NETWORKS", dict(networks.NETWORKS))

    @networks.register("linear")
    def linear(n_classes, example_shape, *, bias=True):
        return nn.Linear(example_shape[0], n_classes, bias=bias)

    assert networks.build("linear:bias=False", 3, (4,)).bias is None
