"""Models, their state and their inputs of every shape against a real step of ``torch.optim`` on a fresh copy."""

import collections
import functools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import local_elasticity as le
from local_elasticity.base.reach import MOST_FIXED_ITEMS, MOST_ITEMS, Reach, substituted

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = 0.05
MakeModel = Callable[[], nn.Module]


def samples() -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(6) % 3


def fresh(make_model: MakeModel) -> nn.Module:
    torch.manual_seed(7)
    return make_model().double().eval()


def real_changes(make_model: MakeModel) -> Tensor:
    """(sources, targets, outputs): a step at each source, looked at by a network that is made afresh."""
    x, y = samples()
    before, changes = fresh(make_model)(x).detach().clone(), []
    for source in range(len(x)):
        stepping, looking = fresh(make_model), fresh(make_model)
        F.cross_entropy(stepping(x[source : source + 1]), y[source : source + 1]).backward()
        torch.optim.SGD(stepping.parameters(), lr=RATE).step()
        for weight, stepped in zip(looking.parameters(), stepping.parameters(), strict=True):
            weight.data.copy_(stepped)
        changes.append(looking(x).detach() - before)
    return torch.stack(changes)


def measured(model: nn.Module, **options: Any) -> le.Impact:
    return le.measure(model, F.cross_entropy, samples(), update=le.SGD(lr=RATE), engine="replay", **options)


def check_right(make_model: MakeModel, outside: Callable[[Any], Any] = lambda model: None, **options: Any) -> None:
    """The changes are those of real steps, and what is seen ``outside`` is as before."""
    model = fresh(make_model)
    before = outside(model)
    torch.testing.assert_close(measured(model, **options).change, real_changes(make_model), rtol=1e-6, atol=1e-12)
    assert outside(model) == before


class Layer(nn.Module):
    """One layer, to be made odd."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)


# -- memory that weights share ----------------------------------------------------------------------------------------


class PartsOfOneBuffer(nn.Module):
    """Weights that are parts of one tensor, as in flat training; one of them is read through the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.randn(27, dtype=torch.float64)
        self.a, self.b = nn.Parameter(self.flat[:12].view(3, 4)), nn.Parameter(self.flat[12:15])
        self.c = nn.Parameter(self.flat[15:].view(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a, self.b) + F.linear(x, self.c).tanh() * self.flat[15:].pow(2).sum()


def test_a_tensor_that_several_weights_are_parts_of() -> None:
    check_right(PartsOfOneBuffer)


class TwoOfOneMemory(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.a, self.b, self.turned = nn.Linear(4, 4), nn.Linear(4, 4), turned

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn)
        self.b.weight.data = self.a.weight.data.t() if self.turned else self.a.weight.data
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("turned", [False, True])
def test_two_weights_of_one_memory_are_refused(turned: bool) -> None:
    with pytest.raises(le.InputError, match="one after the other"):
        measured(fresh(lambda: TwoOfOneMemory(turned)))


class HoldsRows(Layer):
    """Holds a view of its weight, with its graph or without."""

    def __init__(self, with_graph: bool) -> None:
        super().__init__()
        self.rows = self.layer.weight[:2] if with_graph else self.layer.weight.data[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.rows.pow(2).sum()


@pytest.mark.parametrize("with_graph", [False, True])
def test_views_of_weights_that_are_to_be_converted(with_graph: bool) -> None:
    x, y = samples()
    settings: dict[str, Any] = {"update": le.SGD(lr=RATE), "engine": "replay"}

    def look(model: nn.Module, x: Tensor, **more: Any) -> le.Impact:
        return le.measure(model, F.cross_entropy, (x, y), **settings, **more)

    torch.manual_seed(7)
    narrow = HoldsRows(with_graph)
    if with_graph:
        with pytest.raises(le.InputError, match="a graph from before the look"):
            look(narrow, x.float(), dtype=torch.float64)
        return
    wide = HoldsRows(with_graph).double()
    wide.load_state_dict(narrow.state_dict())
    wide.rows = wide.layer.weight.data[:2]
    got, want = look(narrow, x.float(), dtype=torch.float64), look(wide, x.float().double())
    torch.testing.assert_close(got.change, want.change)


def test_weights_that_are_parts_of_what_is_to_be_converted_are_refused() -> None:
    torch.manual_seed(7)
    model = PartsOfOneBuffer()
    x, y = samples()
    with pytest.raises(le.InputError, match="holds the memory of a weight and more"):
        le.measure(model, F.cross_entropy, (x, y), update=le.SGD(lr=RATE), dtype=torch.float32)


class HoldsSum(Layer):
    """Computes with its weights once, when it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.layer.weight.sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.total


class KeepsHidden(Layer):
    """Keeps the output of the last call with its graph, and does not read it."""

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.layer(x)
        return self.hidden


def test_a_graph_from_before_the_look_is_not_lost_by_a_conversion() -> None:
    x, y = samples()
    settings: dict[str, Any] = {"update": le.SGD(lr=RATE), "engine": "replay", "dtype": torch.float64}
    with pytest.raises(le.InputError, match="a graph from before the look"):
        le.measure(HoldsSum(), F.cross_entropy, (x.float(), y), **settings)
    model = KeepsHidden()
    hidden = model(x.float())
    impact = le.measure(model, F.cross_entropy, (x.float(), y), **settings)
    assert model.hidden is hidden
    again = le.measure(model.double(), F.cross_entropy, (x.float().double(), y), **settings)
    torch.testing.assert_close(impact.change, again.change)


class SeesWeightAsArray(Layer):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn)
        self.seen = self.layer.weight.detach().numpy()[1:]
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float((self.seen**2).sum())


def test_an_array_that_is_a_view_of_a_weight_is_refused() -> None:
    with pytest.raises(le.InputError, match="NumPy array"):
        measured(fresh(SeesWeightAsArray))


class SeesWeightInDistribution(Layer):
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn)
        self.prior = torch.distributions.Normal(self.layer.bias.detach(), 1.0)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.prior.mean.pow(2).sum()


def test_a_distribution_that_holds_the_memory_of_a_weight() -> None:
    check_right(SeesWeightInDistribution)


# -- where models keep their state ------------------------------------------------------------------------------------


class CountsInCounter(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.seen = collections.Counter(calls=3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen["calls"] += 1
        return self.layer(x) * self.seen["calls"]


def test_a_counter_whose_update_adds() -> None:
    check_right(CountsInCounter, lambda model: dict(model.seen))


class HoldsSystemRandom(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.source = random.SystemRandom()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_random_source_without_a_state() -> None:
    check_right(HoldsSystemRandom)


class CountsInSlot(Layer):
    __slots__ = ("calls",)

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def test_a_slot_of_a_module() -> None:
    check_right(CountsInSlot, lambda model: model.calls)


class CountsAtWeight(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.layer.weight.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.calls += 1
        return self.layer(x) * self.layer.weight.calls


class KeepsFirstWeights(Layer):
    """As binary networks keep the weights before they are made binary, at the first call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if not hasattr(weight, "first"):
            weight.first = weight.data.clone()
        return self.layer(x) * weight.first.pow(2).sum()


@pytest.mark.parametrize("make_model", [CountsAtWeight, KeepsFirstWeights])
def test_attributes_of_a_weight(make_model: MakeModel) -> None:
    check_right(make_model, lambda model: str(vars(model.layer.weight)))


class Scaled(nn.Parameter):
    """A kind of weight of the user's own."""

    def scaled(self) -> Tensor:
        return self * self.scale


class ReadsWeight(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.layer.weight = Scaled(self.layer.weight.data)
        self.layer.weight.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight.scaled(), self.layer.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attributes_and_kind_of_a_weight_that_is_converted(dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    model = ReadsWeight().to(dtype)
    model.layer.weight.scale = 2.0
    x, y = samples()
    impact = le.measure(model, F.cross_entropy, (x.to(dtype), y), update=le.SGD(lr=RATE), dtype=torch.float64)
    wide = ReadsWeight().to(dtype)
    wide.load_state_dict(model.state_dict())
    wide = wide.double()
    wide.layer.weight.scale = 2.0
    assert type(wide.layer.weight) is Scaled
    again = le.measure(
        wide, F.cross_entropy, (x.to(dtype).double(), y), update=le.SGD(lr=RATE), engine=impact.plan.engine
    )
    torch.testing.assert_close(impact.change, again.change)


def test_attributes_of_a_weight_under_transforms() -> None:
    x, y = samples()
    settings: dict[str, Any] = {"update": le.SGD(lr=1e-6), "engine": "linear"}
    got = le.measure(fresh(CountsAtWeight), F.cross_entropy, (x, y), route="jvp", **settings).change
    want = le.measure(fresh(CountsAtWeight), F.cross_entropy, (x, y), route="contract", **settings).change
    torch.testing.assert_close(got, want)


class RefusesTransforms(Layer):
    """Raises without a word where a tensor is no plain one."""

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(self.layer.weight):
            raise NotImplementedError
        return self.layer(x)


@pytest.mark.parametrize("make_model", [ReadsWeight, RefusesTransforms])
def test_what_no_transform_can_follow(make_model: MakeModel) -> None:
    check_right(make_model)
    for engine, route in (("linear", "jvp"), ("replay", "vmap")):
        with pytest.raises(le.InputError, match=route):
            le.measure(
                fresh(make_model), F.cross_entropy, samples(), update=le.SGD(lr=RATE), engine=engine, route=route
            )


class RenamesItsFlag(Layer):
    """The same value under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.is_first = True

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "is_first"):
            del self.is_first
            self.is_later = True
            return self.layer(x)
        return self.layer(x) * 3


class Later(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 3


class BecomesAnother(Layer):
    """As lazy modules do after their first call."""

    def forward(self, x: Tensor) -> Tensor:
        self.__class__ = Later
        return self.layer(x)


@pytest.mark.parametrize("make_model", [RenamesItsFlag, BecomesAnother])
def test_a_module_that_is_another_after_the_first_call(make_model: MakeModel) -> None:
    check_right(make_model, lambda model: (type(model), hasattr(model, "is_first")))


class WritesToLarge(Layer):
    """Scores by sample, in containers that are too large to be entered."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        large = {dict: dict.fromkeys(range(5000), 0.0), list: [0.0] * 5000, np.ndarray: np.zeros(200_000)}
        self.scores: Any = large[kind]

    def forward(self, x: Tensor) -> Tensor:
        self.scores[4711] += 1.0
        return self.layer(x) * self.scores[4711]


@pytest.mark.parametrize("kind", [dict, list, np.ndarray])
def test_large_containers_are_put_back_too(kind: type) -> None:
    check_right(lambda: WritesToLarge(kind), lambda model: model.scores[4711])


def test_large_containers_that_are_written_late_are_put_back_at_the_end() -> None:
    class WritesForOneSample(WritesToLarge):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1 and bool((x == last).all()):
                self.scores[17] = 1.0
            return self.layer(x)

    last = samples()[0][-1]
    check_right(lambda: WritesForOneSample(list), lambda model: model.scores[17])


def test_walks_over_large_trees_of_tuples_end() -> None:
    tree = tuple((i, tuple((i, j) for j in range(900))) for i in range(900))
    reach = Reach(lambda: tree)
    assert reach.is_cut
    assert len(reach.held) < 2 * MOST_FIXED_ITEMS
    many = tuple(range(MOST_ITEMS + 1))
    assert substituted(many, lambda value: None) is many


# -- hooks ------------------------------------------------------------------------------------------------------------


class HooksItself(Layer):
    """Registers a hook when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.is_hooked = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_hooked:
            self.layer.register_forward_hook(lambda module, arguments, output: output * 1.3)
            self.is_hooked = True
        return self.layer(x)


class HooksEachCall(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 1.1,))
        return self.layer(x)


@pytest.mark.parametrize("make_model", [HooksItself, HooksEachCall])
def test_hooks_that_a_forward_pass_registers(make_model: MakeModel) -> None:
    check_right(make_model, lambda model: (len(model.layer._forward_hooks), len(model.layer._forward_pre_hooks)))


# -- state outside of attributes --------------------------------------------------------------------------------------

settings = types.ModuleType("settings_of_the_user")
settings.calls, settings.table = 0, {"calls": 0}


class CountsInPythonModule(Layer):
    def forward(self, x: Tensor) -> Tensor:
        settings.calls += 1
        settings.table["calls"] += 1
        return self.layer(x) * (settings.calls + settings.table["calls"])


def test_variables_of_another_python_module() -> None:
    settings.calls = settings.table["calls"] = 0
    model = fresh(CountsInPythonModule)
    changes = measured(model).change
    assert (settings.calls, settings.table["calls"]) == (0, 0)

    class AlwaysFirst(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 2

    torch.testing.assert_close(changes, real_changes(AlwaysFirst), rtol=1e-6, atol=1e-12)


class DrawsSobol(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.engine = torch.quasirandom.SobolEngine(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.engine.draw(1, dtype=torch.float64))


def test_a_quasirandom_sequence() -> None:
    check_right(DrawsSobol, lambda model: model.engine.num_generated)


class DrawsBits(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.bits = np.random.PCG64(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * np.random.Generator(self.bits).random()


class ScalesLoss(Layer):
    """A scaler of losses makes its scale at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaler.scale(self.layer(x))


def test_a_bit_generator_and_a_scaler() -> None:
    check_right(DrawsBits, lambda model: str(model.bits.state))
    check_right(ScalesLoss, lambda model: model.scaler._scale)


class CountsInScript(Layer):
    calls: int
    seen: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, [torch.ones(1, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        return self.layer(x) * self.calls * len(self.seen)


def test_attributes_of_a_script() -> None:
    check_right(lambda: torch.jit.script(CountsInScript()), lambda model: (model.calls, len(model.seen)))


def test_a_cache_of_a_function_is_emptied_or_refused() -> None:
    class Caching(Layer):
        @functools.lru_cache  # noqa: B019 (as users do)
        def size(self, n: int) -> Tensor:
            return self.layer.weight.detach().pow(2).sum() * n

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.size(1)

    model = fresh(Caching)
    changes = measured(model).change
    assert Caching.size.cache_info().currsize == 0
    torch.testing.assert_close(changes, real_changes(Caching), rtol=1e-6, atol=1e-12)
    with pytest.raises(le.InputError, match="cache_clear"):
        measured(fresh(Caching))


# -- inputs and outputs -----------------------------------------------------------------------------------------------


def test_nested_inputs_and_outputs_that_are_classes_are_refused() -> None:
    x, y = samples()
    with pytest.raises(le.InputError, match="to_padded_tensor"):
        le.measure(fresh(KeepsHidden), F.cross_entropy, (torch.nested.nested_tensor(list(x)), y), update=le.SGD(lr=0.1))

    class Classifying(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(1)

    with pytest.raises(le.InputError, match=r"torch\.int64"):
        measured(fresh(Classifying))


def test_a_default_device_that_is_not_the_models() -> None:
    """``torch.set_default_device`` is where users make tensors, not where their model is."""
    x, y = samples()
    model = fresh(KeepsHidden)

    def looks(where: Any) -> list[Tensor]:
        with torch.device(where):
            settings: dict[str, Any] = {"update": le.SGD(lr=RATE)}
            routes = [("replay", "step"), ("replay", "vmap"), ("linear", "contract"), ("linear", "jvp")]
            changes = [
                le.measure(model, F.cross_entropy, (x, y), engine=engine, route=route, **settings).change
                for engine, route in routes
            ]
            return [*changes, le.kernel(model, x)]

    torch.testing.assert_close(looks("meta"), looks("cpu"))


# -- kinds of tensors -------------------------------------------------------------------------------------------------


class Wrapped(Tensor):
    """A tensor around another, as quantised and sharded weights are."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inside = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*tree_map(lambda x: x.inside if isinstance(x, Wrapped) else x, args), **(kwargs or {}))
        return Wrapped(result) if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) else result


class HoldsWrapped(Layer):
    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.layer.double()
        self.turn = nn.Parameter(Wrapped(torch.eye(4, dtype=torch.float64)), requires_grad=trained)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.turn)


def test_trained_weights_that_wrap_others_are_refused() -> None:
    frozen = measured(fresh(lambda: HoldsWrapped(False)))
    torch.testing.assert_close(frozen.change, real_changes(KeepsHidden), rtol=1e-6, atol=1e-12)
    with pytest.raises(le.InputError, match="Wrapped"):
        measured(fresh(lambda: HoldsWrapped(True)))


class SomeOfThem(nn.Linear):
    """Gives an optimiser its bias alone."""

    def parameters(self, recurse: bool = True) -> Any:
        yield self.bias


def test_parameters_of_the_models_own_are_refused() -> None:
    with pytest.raises(le.InputError, match=r"parameters\(\) gives others"):
        measured(SomeOfThem(4, 3).double())
    model = SomeOfThem(4, 3).double()
    model.weight.requires_grad_(False)
    assert bool(measured(model).change.any())
