"""Wrong calls of all but `data`: each is refused before the work, in one line of three parts that can be followed."""

import math
import re
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import local_elasticity as le
from local_elasticity import collapse, flows, lesde, networks, runs
from local_elasticity.base.checks import in_words
from local_elasticity.base.errors import InputError
from local_elasticity.cli import main
from local_elasticity.impact.kernel import kernel_diagonal
from local_elasticity.impact.tiles import gradient_gram, measure_tiles
from local_elasticity.report import class_pair_curves, heat_map, intra_inter, save, write_all, write_page
from local_elasticity.similarity import definitions as similarity
from local_elasticity.similarity import phases
from local_elasticity.training.loop import Training
from local_elasticity.training.tracker import Tracker

NAN, INF = math.nan, math.inf
WORDS_OF_OTHERS = re.compile(
    r"Traceback|mat1|must match the size|should be the same|object has no attribute|object is not|unsupported operand|"
    r"not subscriptable|invalid literal|could not convert|argument '|takes \d|positional argument|broadcast together|"
    r"out of bounds|out of range\b.*dimension|Expected .* but|expected scalar|unhashable|not iterable|Errno|"
    r"cannot be interpreted|must be (real|int|str|Tensor)|setting an array| at 0x"
)

torch.manual_seed(0)
X, Y = torch.randn(12, 4), torch.arange(12) % 3
NET, NET_OF_ONE = nn.Linear(4, 3), nn.Linear(4, 1)
SGD = le.SGD(lr=0.1)
IMPACT = le.measure(NET, F.cross_entropy, (X, Y), update=SGD, engine="replay", check_pairs=0)
S = le.s_rel(IMPACT, "he_su")
EVERY = le.every(1)


def _tracked(**changes: Any) -> Tracker:
    arguments = {"model": NET, "loss_fn": F.cross_entropy, "probes": (X, Y), "update": SGD, **changes}
    return le.Tracker(**arguments)


def _run() -> runs.Run:
    tracker = _tracked(schedule=EVERY)
    for _ in range(2):
        tracker.step(loss=1.0)
    return tracker.finish()


RUN = _run()
SDE = le.LESDE(0.02, -0.01, 3, "logits", 0.1, np.eye(3))
PATH = np.cumsum(np.random.default_rng(0).random((12, 3, 3)), axis=0)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    FIT = le.estimate(PATH, n_boot=0)
T = np.arange(4.0)
STATE = collapse.NeuralCollapse(3, 4)
STATE.update(X, Y)
POINTS, CLASSES = X.numpy().copy(), Y.numpy().copy()
RIDGE = flows.RidgeFlow(POINTS, CLASSES, 0.1, np.zeros(4))
CURVES = np.exp(np.random.default_rng(0).normal(size=(20, 6)))


class Wrong(nn.Module):
    """A network whose forward pass fails."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("mask")


class Pair(nn.Linear):
    """A network that returns two tensors."""

    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(input), input


async def awaited(outputs, labels):
    return F.cross_entropy(outputs, labels)


def yielding(outputs, labels):
    yield F.cross_entropy(outputs, labels)


def generator():
    yield from (X, Y)


MODELS = (
    None, "mlp", nn.Linear, lambda x: x, NET.state_dict(), X, nn.ReLU(), nn.LazyLinear(3), [NET],
    nn.Linear(4, 3, device="meta"), nn.Linear(4, 3).requires_grad_(False),
)  # fmt: skip
LOSSES = (
    None, "cross_entropy", nn.CrossEntropyLoss, lambda outputs: 0.0, lambda outputs, labels, weights: 0.0, awaited,
    yielding, 3, lambda outputs, labels: 1.0, lambda outputs, labels: outputs.detach().sum(),
    lambda outputs, labels: F.cross_entropy(outputs, labels).item(), lambda outputs, labels: outputs @ outputs,
    lambda outputs, labels: outputs[:, 7].sum(), nn.CrossEntropyLoss(weight=torch.ones(5)),
)  # fmt: skip
PAIRS = (
    None, X, "digits", {"x": X, "y": Y}, (X,), (X, Y, Y), (X, None), (X.numpy(), Y), (X, Y.tolist()), (X, Y[:5]),
    (X, Y + 1), (X, -Y), (X, Y.double()), (X[:0], Y[:0]), (X * NAN, Y), (Y, X), (X.tolist(), Y), {1, 2},
    (X, np.array(list("abc"))[Y.numpy()]), (X[0], Y[0]), (X.double(), Y), (X[:, :2], Y), (X.long(), Y), 3, (X, "labels"),
    (torch.empty(12, 4, device="meta"), Y), (X.to_sparse(), Y), list(zip(X, Y, strict=True)),
    torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y)),
)  # fmt: skip
ITERATED = (generator(), iter([X, Y]))  # of two things, a pair may come from anywhere
INPUTS = ("x", X.numpy(), X.tolist(), {"x": X}, X[:0], X * INF, X[:, :2], X.double(), torch.tensor(1.0), [X, X], 3, Y)
UPDATES = (None, "sgd:0.1", 0.1, le.SGD, torch.optim.SGD(NET.parameters(), lr=0.1), {"probe": "sgd"}, [SGD])
COUNTS = (0, -1, 1.5, "3", True, NAN, [2])
BYTES = (0, -1, 1.5e9, "1GB", "many", True, [1])
FLAGS = ("no", 1, None)
SEEDS = (-1, 0.5, "0", None, True)
MODES = ("evl", None, True, nn.Linear)
DTYPES = ("float64", np.float32, torch.int64, float, 64)
FRACTIONS = (0, 1, -0.5, 1.5, NAN, "0.5", None, True)
LABELS = (
    None,
    "abc",
    Y.double(),
    Y.tolist()[:5],
    -Y.numpy(),
    np.eye(3)[Y],
    np.array(list("abc"))[Y.numpy()],
    3,
    {1, 2},
)
DEFINITIONS = ("kll", None, 3, ("kl", "he_su"), "", ["kl"])
PATHS = (3, None, b"run", "", "a\0b", ["run"], "n" * 300)
PLACES = (*PATHS, "nowhere", "file.txt", "folder")
TIMES = (None, "now", [NAN], [-1.0], [], [[0.0]], {0: 1}, [0, "1"])
ARRAYS = (None, "x", {"a": 1}, [[1], [1, 2]], [1j], generator(), {1.0})

MEASURE = {"model": NET, "loss_fn": F.cross_entropy, "sources": (X, Y), "update": SGD}
WRONG_MODELS = (*MODELS, Wrong(), Pair(4, 3), nn.Linear(9, 3), nn.Linear(4, 3).double(), nn.Embedding(5, 3))
TRACKED = {"model": NET, "loss_fn": F.cross_entropy, "probes": (X, Y), "update": SGD}
TRAINED = {
    "make_model": partial(nn.Linear, 4, 3), "data": (X, Y), "loss_fn": F.cross_entropy, "lr": 0.1, "steps": 2,
    "replicas": 2,
}  # fmt: skip
LESDES = {"alpha": 0.1, "beta": 0.0, "n_classes": 3, "drift": "logits", "sigma": 0.1, "initial": np.eye(3)}
SAMPLED = {"t": T, "n_per_class": 2, "n_paths": 2, "seed": 0}

# What is called, its right arguments, and for each of them what is wrong.
TABLE: list[tuple[str, Any, dict[str, Any], dict[str, tuple[Any, ...]]]] = [
    (
        "measure", le.measure, MEASURE,
        {
            "model": WRONG_MODELS, "loss_fn": LOSSES, "sources": (*PAIRS, *ITERATED), "update": UPDATES, "targets": INPUTS,
            "engine": ("rpelay", None, 1), "outputs": ("logit", None, 3), "mode": MODES, "chunk_size": COUNTS,
            "target_chunk_size": COUNTS, "route": ("vamp", True, 3), "dtype": DTYPES, "max_memory": BYTES,
            "check_pairs": (-1, 1.5, "8", None, True), "progress": FLAGS,
        },
    ),
    (
        "kernel", le.kernel, {"model": NET, "xs": X},
        {
            "model": WRONG_MODELS, "xs": (None, *INPUTS), "xt": INPUTS, "form": ("ful", 3, -1, True, 1.0, None),
            "chunk_size": COUNTS, "max_memory": BYTES, "dtype": DTYPES, "mode": ("evl", None), "progress": FLAGS,
        },
    ),
    ("kernel_diagonal", kernel_diagonal, {"model": NET, "xs": X}, {"form": ("x", 3, None), "xs": INPUTS[:4]}),
    (
        "measure_tiles", measure_tiles, {**MEASURE, "out": "tiles.zarr"},
        {
            "model": MODELS, "loss_fn": LOSSES[:7], "sources": PAIRS[:12], "targets": INPUTS[:6], "update": UPDATES,
            "out": (*PATHS, "file.txt", "folder"), "tile": COUNTS, "engine": ("auto", None, 3),
            "overwrite": FLAGS, "progress": FLAGS, "chunk_size": COUNTS, "chunk_sise": (3,), "max_memory": BYTES,
            "dtype": DTYPES,
        },
    ),
    (
        "gradient_gram", gradient_gram,
        {"model": NET, "loss_fn": F.cross_entropy, "samples": (X, Y), "out": "gram.zarr"},
        {
            "model": MODELS, "loss_fn": LOSSES[:7], "samples": PAIRS[:12], "out": PATHS, "tile": COUNTS,
            "overwrite": FLAGS, "progress": FLAGS,
        },
    ),
    (
        "ripple", le.ripple, {"model": NET, "loss_fn": F.cross_entropy, "sources": (X[:2], Y[:2])},
        {
            "model": MODELS, "loss_fn": LOSSES[:7], "sources": PAIRS[:12], "targets": INPUTS[:6], "outputs": ("x", None),
            "mode": MODES, "progress": FLAGS,
        },
    ),
    (
        "measure_across_ranks", le.measure_across_ranks, MEASURE,
        {"model": MODELS[:5], "loss_fn": LOSSES[:3], "sources": PAIRS[:5], "update": UPDATES, "engine": ("x",)},
    ),
    (
        "s_rel_limit", le.s_rel_limit, {"model": NET, "xs": X},
        {
            "model": MODELS[:6], "xs": (None, *INPUTS), "xt": INPUTS, "outputs": ("logit", None), "chunk_size": COUNTS,
            "output": ("trcae", 3, -1, None, True), "max_memory": BYTES, "dtype": DTYPES, "mode": MODES,
            "progress": FLAGS,
        },
    ),
    (
        "s_ker", le.s_ker, {"model": NET_OF_ONE, "xs": X},
        {
            "form": ("limits", None, "published"), "symmetrise": FLAGS, "normalise": FLAGS, "loss": ("mse2", F.mse_loss),
            "outputs": ("logit", None), "output": (3, "x"), "xt": INPUTS[:4],
        },
    ),
    (
        "s_ker published", partial(le.s_ker, form="published"),
        {"model": NET_OF_ONE, "xs": X[:2], "labels": Y[:2].float(), "loss": "mse"},
        {"loss": ("mes", None, F.mse_loss), "labels": (None, Y, Y.tolist(), "x"), "dtype": (torch.float64, "x")},
    ),
    (
        "s_rel", le.s_rel, {"impact": IMPACT, "definition": "kl"},
        {
            "impact": (None, S, "run.zarr", RUN, {"after": X}, le.measure), "definition": DEFINITIONS,
            "eps": (-1, NAN, INF, "0", X, True),
        },
    ),
    (
        "s_rel_of", similarity.s_rel_of,
        {
            "before": IMPACT.before, "after": IMPACT.after, "source_before": IMPACT.source_before,
            "source_after": IMPACT.source_after,
        },
        {
            "before": (*ARRAYS, X, IMPACT.after), "after": (*ARRAYS, X), "source_before": (None, Y), "source_after": (X,),
            "definition": DEFINITIONS, "outputs": ("logit", None, 3, "probabilities"), "eps": (-1, "0", NAN),
            "limit": FLAGS,
        },
    ),
    (
        "define", le.define, {"name": "mine"},
        {
            "name": (3, None, "kl", "", ["mine"]), "on": ("output", None, 3), "eps": (-1, NAN, "0", None),
            "words": (3, None), "denominator": ("kl", 3, lambda: 0),
        },
    ),
    ("define decorator", le.define("mine"), {"movement": lambda before, after: 0}, {"movement": (None, "kl", 3)}),
    ("get_definition", similarity.get_definition, {"name": "kl"}, {"name": DEFINITIONS}),
    ("movements", similarity.movements, {"impact": IMPACT}, {"impact": (None, S), "eps": (-1, "x")}),
    (
        "by_class", le.by_class, {"s": S, "ys": Y, "yt": Y},
        {
            "s": (*ARRAYS, S[0], S[:3], IMPACT), "ys": (*LABELS, Y[:3]), "yt": (*LABELS, Y[:3], torch.zeros(12).long()),
            "class_names": (("a",), 3, "abc", {1, 2, 3}, ("a", "a", "b"), (1.5, 2, 3)), "exclude_self": FLAGS, "n_boot": (-1, 1.5, "x", None),
            "confidence": FRACTIONS, "seed": SEEDS, "denominators": (*ARRAYS[1:], X, [1.0]),
        },
    ),
    (
        "by_class with ids", partial(le.by_class, exclude_self=True),
        {"s": S, "ys": Y, "yt": Y, "source_ids": range(12), "target_ids": range(12)},
        {"source_ids": (range(3), "abc", 3, {"a": 1}), "target_ids": (None, X, generator())},
    ),
    (
        "Tracker", le.Tracker, TRACKED,
        {
            "model": WRONG_MODELS, "loss_fn": LOSSES, "probes": PAIRS, "update": (*UPDATES, {}, {1: SGD}, {"": SGD}),
            "definitions": ((), ("kll",), 3, None, {"kl"}, ("kl", "kl"), [1], "kll", (None,)),
            "schedule": (9, "every(9)", le.every, [1, 2], 0.05, lambda n: True, {}, le.Tracker),
            "store": (3, b"run", "", "a\0b", ["run"], "n" * 300, "file.txt/run.zarr", "other.zarr"),
            "resume": ("yes", -1, 1.5, None, True, 3), "keep": ("output", 3, True, ["outputs"]), "mode": MODES,
            "outputs": ("logit", None, 3), "exclude_self": FLAGS,
            "class_names": (("a",), 3, {1, 2, 3}, "abc", (None, 2, 3), ("a", "a", "b"), {"a": 0, "b": 1, "c": 2}),
            "route": ("vamp", 3, "contract", True), "chunk_size": COUNTS, "check_pairs": (-1, 1.5, "x", None, True),
            "collapse_layers": (("fc9",), 3, None, "fc9", {"weight"}, ("outputs", "outputs"), [None]),
            "configuration": (3, "x", [1], {1: 2}), "seed": SEEDS,
            "before_commit": (3, "save", lambda: 0, lambda step, extra: 0, awaited),
            "limits": (("sgd9",), 3, None, "sgd9", {1}, [None]),
        },
    ),
    ("Tracker.step", lambda **given: _tracked(schedule=EVERY).step(**given), {}, {
        "epoch": ("1", NAN, INF, [1], X), "loss": ("1.0", X, None, [1], lambda: "x", lambda x: x), "kl": (X,),
        "step": ("x", X),
    }),
    ("every", le.every, {"n": 1}, {"n": (*COUNTS, None), "per": ("epochs", 3, True)}),
    ("log_spaced", le.log_spaced, {"n": 3, "total": 10}, {"n": (*COUNTS, None, 11), "total": (*COUNTS, None, 2)}),
    ("at", le.at, {"calls": [1, 2]}, {
        "calls": (3, None, "12", [-1], [1.5], ["1"], [None], iter([]), [True], {"a": 1}, X, [NAN], np.eye(2)),
    }),
    ("budget", le.budget, {"fraction": 0.1}, {"fraction": FRACTIONS}),
    ("schedule union", EVERY.__or__, {"other": EVERY}, {"other": (9, None, "every(9)", [1])}),
    (
        "train_ensemble", le.train_ensemble, TRAINED,
        {
            "make_model": (None, nn.Linear, NET, "mlp", lambda: None, lambda: NET, lambda n: nn.Linear(4, 3), 3,
                           lambda: nn.ReLU(), lambda: nn.LazyLinear(3), awaited, lambda: nn.Linear(5, 3),
                           lambda: nn.Linear, lambda: 1 / 0, lambda: Pair(4, 3), Wrong),
            "data": (*(p for i, p in enumerate(PAIRS[:20]) if i not in (7, 8, 16)), (X[:, :2], Y), (X, Y[:, None])),
            "loss_fn": LOSSES[:12], "lr": (-1, NAN, INF, "0.1", None, True, [0.1], torch.tensor(0.1)),
            "steps": (*COUNTS, None), "replicas": (0, -1, 1.5, "3", True, None, [], [1, 1], [-1], [0.5], {"a": 1}, NAN),
            "seed": SEEDS, "batch_size": (*COUNTS, None, 13), "optimizer": ("sdg", None, torch.optim.SGD, 3),
            "momentum": (-1, NAN, "x", None), "weight_decay": (-1, NAN, "x", None),
            "betas": ((0.9,), (0.9, 1.0), 0.9, None, ("a", "b"), (0.9, 0.99, 0.999), {0.1, 0.2}), "eps": (0, -1, "x", None),
            "replacement": FLAGS, "log": ("no", 1), "validation": (X, "x", (X, Y[:3]), (X.double() * NAN, Y)),
            "validate": (9, "x", le.budget(0.1), EVERY), "probes": (X, (X, Y.double()), (X[:, :2], Y), (X, Y + 1), 3),
            "probe": (9, EVERY, "x"), "collapse_layers": (("fc",), "fc", 3, None, {1}), "callback": (3, lambda: 0, "x"),
            "call": (9, EVERY, "x"), "trackers": (3, [1], {0: 3}, {9: lambda m, r: None}, {"0": lambda m, r: None}),
            "store": (3, "", "file.txt", b"x", "a\0b", ["x"], "n" * 300, "folder"), "resume": ("yes", 1, True, None),
            "stop_at": (-1, 3, 0.5, "1", True), "configuration": (3, "x", {1: 2}), "route": ("kernel", 3, True),
            "chunk_size": COUNTS, "threads": COUNTS, "dtype": DTYPES, "device": ("gpu", 3, "cuda:99", "meta"),
            "progress": FLAGS,
        },
    ),
    ("Training", Training, {}, {
        "epochs": COUNTS, "batch_size": (*COUNTS, None), "optimizer": ("adm", None, 3), "lr": (-1, NAN, "x", None),
        "weight_decay": (-1, "x"), "momentum": (-1, "x", None), "drop_last": FLAGS, "seed": SEEDS,
    }),
    ("open_run", le.open_run, {"path": "run.zarr"}, {"path": PLACES}),
    ("open_ensemble", le.open_ensemble, {"path": "ensemble"}, {"path": PLACES}),
    (
        "Run.s_rel", RUN.s_rel, {},
        {"definition": DEFINITIONS, "update": ("sgd9", 3, ["x"]), "eps": (-1, "x", NAN)},
    ),
    ("Run.plot", RUN.plot, {}, {"definition": ("kll", 3), "update": ("x", 3)}),
    (
        "Run.phases", RUN.phases, {},
        {"definition": DEFINITIONS, "update": ("x", 3), "over": ("pair", 3), "time": ("steps", 3), "flat": (-1,)},
    ),
    (
        "find_phases", phases.find_phases, {"times": np.arange(20.0), "values": CURVES},
        {
            "times": (*ARRAYS, np.arange(3.0), np.zeros(20)), "values": (*ARRAYS, CURVES[:, :2], CURVES[0], -CURVES),
            "flat": (-1, NAN, "x", None), "confidence": FRACTIONS, "n_boot": (*COUNTS, None), "seed": SEEDS,
            "over": (3, None),
        },
    ),
    (
        "LESDE", le.LESDE, LESDES,
        {
            "alpha": (None, "0.1", NAN, [0.1, 0.2], ([0, 1], [1]), {1: 2}, lambda: 0, lambda t: "x", awaited),
            "beta": (None, "x", ([0, 0], [1, 1]), ([], []), (1, 2, 3), lambda t: 1 / 0),
            "n_classes": (1, 2, 3.5, "3", True, None, NAN), "drift": ("logit", None, 3, np.eye(3), {"a": 1}),
            "sigma": (None, -1, "x", NAN, [1, 2], {"a": 1}, lambda t: -1.0),
            "initial": (None, "x", np.eye(2), np.zeros((3, 4)), np.full((3, 3), NAN), (np.eye(3), -1), (np.eye(3), "x"),
                        {"a": 1}, [1, 2, 3]),
            "class_weights": ([1, 1], [-1, 1, 1], "x", [0, 0, 0], {"a": 1}, [NAN, 0, 1]), "kind": ("steps", None, 3),
            "acts_on": ("mean", None, 3), "start": ("x", NAN, None, [0]),
        },
    ),
    ("LESDE.mean", SDE.mean, {"t": T}, {"t": TIMES, "log": FLAGS}),
    ("LESDE.covariance", SDE.covariance, {"t": T, "n": 2}, {"t": TIMES[:3], "n": (*COUNTS, None)}),
    ("LESDE.within_variance", SDE.within_variance, {"t": T}, {"t": TIMES}),
    ("LESDE.impact_matrix", SDE.impact_matrix, {"t": T}, {"t": TIMES}),
    ("LESDE.with_label_noise", SDE.with_label_noise, {"p": 0.1}, {"p": (-0.1, 1.1, NAN, "x", None, [0.1], True)}),
    (
        "LESDE.sample", SDE.sample, SAMPLED,
        {
            "t": (*TIMES, [1, 1]), "n_per_class": (*COUNTS, None), "n_paths": (*COUNTS, None), "seed": SEEDS,
            "method": ("exakt", None, 3), "keep": ("cloud", 3), "dtype": ("float16", torch.int64, 3, "x"),
            "device": ("gpu", 3), "out": (X,), "starts": (X,), "velocity": (3,), "step": (0, -1, "x"),
            "progress": FLAGS,
        },
    ),
    ("LESDE.sample discrete", partial(SDE.sample, method="discrete"), SAMPLED, {"step": (0, -1, "x", NAN, True)}),
    (
        "LESDE.sample euler", partial(SDE.sample, method="euler-maruyama"), SAMPLED,
        {"step": (0, -1, "x", NAN), "velocity": (3, "x", lambda t: 0, lambda t, x: None, lambda t, x: x[:, :1])},
    ),
    (
        "LESDE.separability", SDE.separability, {"t": T[1:], "n_per_class": 5, "n_paths": 2},
        {
            "t": TIMES, "n_per_class": COUNTS, "n_paths": COUNTS, "seed": SEEDS, "gamma": ("gaps", None),
            "confidence": FRACTIONS, "progress": FLAGS,
        },
    ),
    ("LESDE.collapse", SDE.collapse, {"t": T}, {"t": TIMES}),
    (
        "separable", lesde.separable, {"a": X, "b": X + 9},
        {"a": (*ARRAYS, X[0], X * NAN, X[:0]), "b": (*ARRAYS, X[:, :2])},
    ),
    ("cover_probability", lesde.cover_probability, {"n_per_class": 2, "n_features": 2}, {
        "n_per_class": (*COUNTS, None), "n_features": (*COUNTS, None),
    }),
    ("simplex", lesde.simplex, {"n_classes": 3}, {"n_classes": (1, 0, "3", 2.5, None, True)}),
    ("lesde.register", lesde.register, {"name": "mine"}, {"name": (3, None, "", "logits")}),
    (
        "estimate", le.estimate, {"class_means": PATH, "n_boot": 0},
        {
            "class_means": (*ARRAYS, PATH[0], PATH[:3], PATH * INF, PATH[:, :1], RUN), "logits": (PATH,),
            "labels": (Y,), "t": ("x", [1, 2], np.zeros(12), {"a": 1}, T),
            "model": ("logit", None, 3), "estimator": ("define", None, 3), "baseline_window": (*COUNTS, 99),
            "window": (0, -1, 2, "x", 1.5, 999, True), "missing": ("drop", None, 3), "n_boot": (-1, 1.5, "x", None, True),
            "confidence": FRACTIONS, "seed": SEEDS, "within_variance": (*ARRAYS[1:], [1.0], -np.ones(12)),
        },
    ),
    (
        "estimate of logits", partial(le.estimate, n_boot=0),
        {"logits": np.tile(PATH[:, :1], (1, 9, 1)), "labels": np.tile(np.arange(9) % 3, (12, 1))},
        {"logits": (None, "x", PATH[0]), "labels": (None, "abc", np.zeros((12, 9)), np.full((12, 9), 3), Y), "trial": (3,)},
    ),
    ("Fit.tail", FIT.tail, {}, {"method": ("log", None, 3), "quantity": ("alphas", None, 3)}),
    ("Fit.draws", FIT.draws, {"quantity": "A"}, {"quantity": ("a", None, 3, ["A"])}),
    (
        "Fit.average", FIT.average, {"quantity": "alpha", "start": 1, "stop": 5},
        {"quantity": ("A", None), "start": (-1, "x", None, 6), "stop": (99, "x", None, NAN)},
    ),
    (
        "Fit.to_sde", FIT.to_sde, {},
        {"rates": ("smoth", None), "sigma": (-1, "x"), "initial": ("x", np.eye(2))},
    ),
    ("Fit.compare", FIT.compare, {}, {"observed": ("x", PATH[0], {"a": 1}), "rates": ("x", None), "sd": (-1, "x"),
                                      "last": (0, "x"), "coordinate": (9, "x"), "n": (0, "x")}),
    ("Fit.held_out", FIT.held_out, {}, {"folds": (0, 1, "x", None, 1.5), "seed": SEEDS}),
    (
        "impact_matrix", le.impact_matrix, {"impact": IMPACT, "ys": Y, "yt": Y},
        {
            "impact": (None, S, RUN, "x"), "ys": (*LABELS, Y[:3]), "yt": LABELS[:4], "drift": ("logit", None, 3),
            "n_boot": (-1, 1.5, "x", None), "confidence": FRACTIONS, "seed": SEEDS,
        },
    ),
    (
        "RidgeFlow", flows.RidgeFlow, {"X": POINTS, "y": CLASSES, "penalty": 0.1, "w0": np.zeros(4)},
        {
            "X": (*ARRAYS, X[0], X * NAN), "y": (*ARRAYS, Y[:3]), "penalty": (-1, NAN, "x", None, [1]),
            "w0": (*ARRAYS, np.zeros(3)),
        },
    ),
    (
        "Flow.s_rel", RIDGE.s_rel, {"t": T, "x": X, "x_prime": X, "label": Y},
        {
            "t": (*TIMES, [1, 1]), "x": (*ARRAYS, X[:, :2], X[:5]), "x_prime": ("x", X[:, :2]), "label": ("x", T),
            "lr": (0, -1, NAN, "x", [1]),
        },
    ),
    ("Flow.weights", RIDGE.weights, {"t": T}, {"t": TIMES}),
    ("Flow.loss", RIDGE.loss, {"t": T}, {"t": TIMES}),
    (
        "DiagonalFlow", flows.DiagonalFlow, {"depth": 2, "scale": [1.0], "target": [1.0], "w0": [0.1]},
        {"depth": (0, 1.5, "2", True, None, NAN, [2]), "scale": (*ARRAYS, [0.0]), "target": ("x", [1, 2]), "w0": ("x",)},
    ),
    (
        "ReLUGateFlow", flows.ReLUGateFlow, {"w0": [1.0, 0.0], "w_star": [0.0, 1.0]},
        {"w0": (*ARRAYS, [0.0, 0.0]), "w_star": ("x", [1.0]), "kind": ("x", None, 3)},
    ),
    (
        "SoftmaxLayerFlow", flows.SoftmaxLayerFlow, {"V": np.eye(3), "features": np.eye(3), "labels": [0, 1, 2]},
        {
            "V": (*ARRAYS, [1.0]), "features": ("x", np.eye(2), None), "labels": ("abc", [0, 1], [0, 1, 9], [0, 1, 0.5]),
            "definition": DEFINITIONS,
        },
    ),
    (
        "RidgeClassifierFlow", flows.RidgeClassifierFlow, {"features": POINTS, "labels": CLASSES, "penalty": 0.1},
        {
            "features": (*ARRAYS, X[0]), "labels": ("abc", Y.double() + 0.5, Y[:3], -Y.numpy(), np.eye(3)[Y], {1, 2}, None, 3), "penalty": (-1, "x", None),
            "theta": (0, NAN, "x", None), "w0": ("x", np.zeros(3)), "published": FLAGS,
        },
    ),
    (
        "TwoLayerNTK", flows.TwoLayerNTK, {"hidden": np.ones((2, 3)), "output": np.ones(2)},
        {
            "hidden": (*ARRAYS, [1.0]), "output": ("x", np.ones(3)), "bias": ("x", np.ones(3)), "output_bias": ("x", None),
            "activation": ("rellu", None, 3), "X": (X,), "y": (Y,),
        },
    ),
    (
        "collapse.metrics", collapse.metrics, {"features": X, "labels": Y},
        {
            "features": (None, "x", X.numpy(), X.tolist(), X[0], X[:0], X[:5], {"x": X}),
            "labels": (None, "x", Y.numpy(), Y.tolist(), Y + 1, -Y, Y.double(), Y[:3], np.array(list("abc"))[Y.numpy()]),
            "weight": ("x", X, np.eye(3), [1]), "n_classes": (0, 1, 1.5, "3", True, 2, 5), "weighting": ("class", None, 3),
        },
    ),
    (
        "collapse.metrics with weight", collapse.metrics,
        {"features": X, "labels": Y, "weight": NET.weight, "bias": NET.bias}, {"bias": ("x", X, np.zeros(3), [1])},
    ),
    (
        "collapse.metrics_of_many", collapse.metrics_of_many, {"features": [X, X], "labels": Y},
        {"features": (None, X[0], [X, "x"], [X, X[:3]], 3, generator()), "labels": (None, Y.tolist()), "n_classes": (0,)},
    ),
    (
        "NeuralCollapse", collapse.NeuralCollapse, {"n_classes": 3, "dim": 4},
        {
            "n_classes": (1, "3", 2.5, None, True), "dim": (0, "4", 1.5, None, 10**6), "weighting": ("x", None),
            "keep": ("sum", None), "positions": ("means", None), "device": ("gpu", 3),
        },
    ),
    (
        "NeuralCollapse.update", STATE.update, {"features": X, "labels": Y},
        {
            "features": (None, "x", X.numpy(), X[:, :2], X * NAN, X[0], X.tolist()),
            "labels": (None, "x", Y.numpy(), Y + 1, -Y, Y.double(), Y[:3], Y.tolist()),
        },
    ),
    (
        "NeuralCollapse.compute", STATE.compute, {},
        {"weight": ("x", X, np.eye(3)), "form": ("spam", None, 3)},
    ),
    ("NeuralCollapse.update_nc4", STATE.update_nc4, {"features": X, "weight": NET.weight}, {
        "features": (None, X.numpy(), X[:, :2]), "weight": (None, "x", X), "bias": ("x", X),
    }),
    ("NeuralCollapse.merge", STATE.merge, {"other": collapse.NeuralCollapse(3, 4)}, {
        "other": (None, "x", collapse.NeuralCollapse(2, 4), {"counts": X}),
    }),
    ("NeuralCollapse.recentre", STATE.recentre, {"shift": torch.zeros(3, 4)}, {"shift": (None, "x", X, np.zeros((3, 4)))}),
    (
        "layer_metrics", collapse.layer_metrics, {"model": NET, "x": X, "labels": Y, "layers": ["outputs"]},
        {
            "model": (None, "x", nn.Linear, nn.LazyLinear(3)), "x": (None, X.numpy(), X[:, :2], X[:0], "x", X.double()),
            "labels": (None, Y[:3], Y.double(), "x", Y.tolist()), "layers": (("fc",), 3, (), {1}, ("outputs", "outputs")),
            "positions": ("means", None), "weighting": ("x", None), "batch_size": (*COUNTS, None),
        },
    ),
    (
        "layer_outputs", collapse.layer_outputs, {"model": NET, "x": X, "layers": ["outputs"]},
        {"model": (None, "x"), "x": (None, X[:, :2], X.numpy()), "layers": (["fc"], 3, None), "positions": ("x",)},
    ),
    (
        "LayerCollapse", collapse.LayerCollapse, {"model": NET, "n_classes": 3, "layers": ["outputs"]},
        {
            "model": (None, nn.Linear, "x"), "n_classes": (1, "3", 1.5, None), "layers": (["fc"], 3, ()),
            "positions": ("x", None), "weighting": ("x",), "keep": ("x",),
        },
    ),
    ("to_features", collapse.to_features, {"x": X}, {"x": (None, "x", X.numpy(), torch.tensor(1.0)), "positions": ("x", 3)}),
    (
        "networks.build", networks.build, {"name": "mlp", "n_classes": 3, "example_shape": (4,)},
        {
            "name": ("mpl", None, 3, "", "mlp:depht=3", "mlp:width=0", "mlp:width=x", "mlp:width", "no.module:net", "x.py:f",
                     "simple-conv", "torch.nn:nothing", "mlp:width=3,width=4", ["mlp"], "torch.nn:Linear", "math:cos",
                     "broken.py:make", "failing.py:make", ":"),
            "n_classes": (0, -1, 1.5, "3", True, None), "example_shape": (None, 4, "4", (0,), (-1,), (1.5,), (), ("a",)),
        },
    ),
    ("MLP", networks.MLP, {"in_features": 4, "n_classes": 3}, {
        "in_features": COUNTS, "n_classes": COUNTS, "depth": (-1, 1.5, "x", None), "width": COUNTS,
    }),
    ("SimpleConv", networks.SimpleConv, {"n_classes": 3}, {
        "n_classes": COUNTS, "in_channels": COUNTS, "image_size": (0, 30, "x", None, 28.0),
    }),
    ("resnet18_plain", networks.resnet18_plain, {"n_classes": 3, "width": 8}, {
        "n_classes": COUNTS, "in_channels": COUNTS, "width": COUNTS,
    }),
    ("resnet18_groupnorm", networks.resnet18_groupnorm, {"n_classes": 3, "width": 8, "groups": 2}, {
        "groups": (*COUNTS, 3), "width": COUNTS,
    }),
    ("VisionTransformer", networks.VisionTransformer, {"n_classes": 3, "depth": 1, "width": 8, "heads": 2}, {
        "n_classes": COUNTS, "image_size": (0, 30, "x", None), "patch": COUNTS, "heads": (3, 0), "depth": COUNTS,
    }),
    ("networks.register", networks.register, {"name": "mine"}, {"name": (3, None, "", "mlp", "a:b")}),
    ("class_pair_curves", class_pair_curves, {"run": RUN}, {
        "run": (None, "nowhere", 3, X), "definition": ("kll", 3), "update": ("x", 3), "width": (0, -1, "x", None),
    }),
    ("intra_inter", intra_inter, {"run": RUN}, {"run": (None, X), "definition": ("x",), "width": (0, "x")}),
    ("heat_map", heat_map, {"run": RUN}, {"run": (None, X), "definition": ("x",), "step": ("x", 99, 1.5)}),
    ("write_page", write_page, {"run": RUN, "path": "page.html"}, {
        "run": (None, X, "nowhere"), "path": (*PATHS, "folder", "file.txt/page.html"), "figures": (3, ["nowhere.png"], "x"),
    }),
    ("write_all", write_all, {"run": RUN, "folder": "figures"}, {
        "run": (None, X), "folder": (*PATHS, "file.txt", "file.txt/figures"),
    }),
    ("save", save, {"figure": RUN.plot(), "folder": "figures", "name": "x", "dpi": 20}, {
        "figure": (None, "x"), "folder": (3, None, "file.txt"), "name": (3, None, "", "a/b"), "dpi": (0, -1, "x", None),
    }),
]  # fmt: skip
CALLS = [
    pytest.param(call, right, name, values, id=f"{words}-{name}")
    for words, call, right, wrongs in TABLE
    for name, values in wrongs.items()
]


@pytest.fixture(autouse=True)
def place(tmp_path_factory, monkeypatch):
    """A folder with things that are no runs."""
    folder = tmp_path_factory.getbasetemp() / "place"
    if not folder.exists():
        (folder / "folder").mkdir(parents=True)
        (folder / "other.zarr").mkdir()
        for name in ("file.txt", "folder/note.txt", "other.zarr/zarr.json"):
            (folder / name).write_text("something else")
        (folder / "broken.npz").write_text("no archive")
        np.savez(folder / "means.npz", class_means=PATH)
        np.savez(folder / "odd.npz", other=np.zeros(3))
        np.savez(folder / "objects.npz", class_means=np.array([None, 1], dtype=object), t=np.arange(2))
        (folder / "broken.py").write_text("def make(:\n")
        (folder / "failing.py").write_text("def make(n):\n    raise OSError('no licence')\n")
    monkeypatch.chdir(folder)


def assert_ours(error: InputError) -> None:
    for part in (error.expected, error.got, error.do):
        assert isinstance(part, str)
        assert part.strip()
        assert "\n" not in part
    assert len(str(error)) < 700
    assert not WORDS_OF_OTHERS.search(str(error)), str(error)


@pytest.mark.parametrize(("call", "right", "name", "values"), CALLS)
@pytest.mark.filterwarnings("ignore")
def test_wrong_calls_are_refused_in_our_words(call, right, name, values):
    for value in values:
        try:
            call(**{**right, name: value})
        except InputError as error:
            assert_ours(error)
        else:
            pytest.fail(f"{name}={in_words(value)} was accepted")


RIGHT = [e for e in TABLE if e[0] not in ("Run.phases", "open_run", "open_ensemble", "write_all")]


@pytest.mark.parametrize(("call", "arguments"), [pytest.param(*entry[1:3], id=entry[0]) for entry in RIGHT])
@pytest.mark.filterwarnings("ignore")
def test_the_right_calls_are_accepted(call, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(similarity, "DEFINITIONS", dict(similarity.DEFINITIONS))
    call(**arguments)


def test_there_are_many():
    assert sum(len(values) for *_, wrongs in TABLE for values in wrongs.values()) >= 2000


TRACK, TRAIN = (
    ("track", "--data", "digits", "--classes", "0", "1"),
    ("train", "--data", "digits", "--classes", "0", "1"),
)
MEASURED, ESTIMATED = ("measure", "--data", "digits", "--classes", "0", "1"), ("estimate", "means.npz")
RIDGE_STUDY = ("reproduce", "dan2023-ridge")
# The beginning of a command, and what is wrong about its end.
COMMANDS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): (
        "trcak", "--verzion", "track extra", "report", "report nowhere", "report file.txt", "report folder", "estimate",
        "estimate nowhere", "estimate file.txt", "estimate folder", "estimate broken.npz", "estimate odd.npz",
        "estimate objects.npz", "data nosuch", "data digits --size 8.5", "data digits --size x", "data folder", "bench nosuch",
        "bench snapshot --out folder", "reproduce nosuch", "reproduce all --size epochs=3", "reproduce --from nowhere",
        "reproduce --from file.txt", "reproduce --from folder",
    ),
    TRACK: (
        "--epochs 0", "--epochs -1", "--epochs 1.5", "--epochs x", "--lr -1", "--lr nan", "--lr x", "--lr inf",
        "--batch-size 0", "--batch-size x", "--per-class 0", "--probes-per-class 0", "--probes-per-class 10000", "--every 0",
        "--every 1.5", "--log-spaced 0", "--log-spaced 3 --budget 0.1", "--budget 2", "--budget 0", "--budget nan",
        "--update sgd", "--update sgd:x", "--update sdg:0.1", "--update sgd:-1", "--update ", "--definition kll",
        "--collapse fc9", "--keep nothing", "--device gpu", "--device cuda:99", "--seed -1", "--seed 0.5",
        "--seed 99999999999999999999", "--network mpl", "--network mlp:width=0", "--network nowhere.py:f",
        "--network broken.py:make", "--optimizer sdg", "--momentum -1", "--momentum x", "--weight-decay -1",
        "--out file.txt", "--out file.txt/run", "--out folder", "--out " + "n" * 300, "--size 8 8 8", "--exclude-self maybe",
    ),
    TRAIN: (
        "--network mlp --steps 0", "--steps x", "--replicas 0", "--replicas -1", "--network mlp --lr -1", "--lr nan",
        "--network mlp --batch-size 100000 --out new", "--batch-size 0", "--optimizer sdg", "--momentum -1", "--corruption 2",
        "--corruption nan", "--per-class 0", "--validate 0", "--probe 0", "--probes-per-class 0", "--threads 0",
        "--network mlp --collapse-layer fc9 --out newer", "--dtype float16", "--device gpu", "--seed -1", "--out file.txt",
        "--out folder", "--out file.txt/x", "--weight-decay x",
    ),
    MEASURED: (
        "--checkpoint nowhere", "--checkpoint file.txt", "--checkpoint folder", "--per-class 0", "--per-class 99999",
        "--split dev", "--update x", "--definition x", "--engine x", "--device gpu", "--seed -1", "--out folder",
        "--out file.txt/x.json",
    ),
    ("simulate",): (
        "--classes 1", "--classes x", "--features 2", "--features 0", "--drift x", "--alpha x", "--alpha __import__('os')",
        "--alpha ", "--alpha 1/0", "--beta t**", "--sigma -1", "--sigma x", "--steps 0", "--steps -1",
        "--samples-per-class 0", "--paths 0", "--save 1", "--separability-paths 0", "--scale nan", "--start-variance -1",
        "--label-noise 2", "--method x", "--step 0", "--step -1 --method discrete", "--seed -1", "--device gpu",
        "--out file.txt", "--out file.txt/x", "--out folder",
    ),
    ESTIMATED: (
        "--model x", "--estimator x", "--baseline-window 0", "--window 2", "--window 1000", "--missing x", "--n-boot -1",
        "--n-boot x", "--confidence 2", "--confidence 0", "--seed -1", "--out file.txt", "--out file.txt/x",
    ),
    RIDGE_STUDY: (
        "--scale big", "--size x", "--size epochs=x", "--jobs 0", "--jobs x", "--backend x", "--address here", "--device gpu",
        "--device cuda:99", "--out file.txt", "--trainings folder", "--train-only", "--only x", "--so-far",
        "--results file.txt",
    ),
}  # fmt: skip
WRONG_COMMANDS = [(*begin, *end.split(" ")) for begin, ends in COMMANDS.items() for end in ends]


@pytest.mark.parametrize("words", WRONG_COMMANDS, ids=lambda words: " ".join(words)[:100])
@pytest.mark.filterwarnings("ignore")
def test_wrong_commands_end_with_status_2_and_one_line(words, capsys):
    pytest.importorskip("sklearn", reason="the digits are inside scikit-learn")
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("local-elasticity: ")
    assert error.count("\n") == 1, error
    assert not WORDS_OF_OTHERS.search(error), error
