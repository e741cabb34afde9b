"""Study dan2023-regression: two phases in S_rel of regression networks? (arXiv 2111.01166; spec srel 3.3, C6)."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from local_elasticity.base.errors import InputError, NoiseWarning
from local_elasticity.base.progress import duration
from local_elasticity.data.regression import regression
from local_elasticity.impact import measure
from local_elasticity.impact.update import SGD
from local_elasticity.networks import MLP
from local_elasticity.report.curves import Line, Panel, panels
from local_elasticity.report.figures import save
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.runs.provenance import versions
from local_elasticity.similarity.definitions import s_rel
from local_elasticity.similarity.phases import Phases, find_phases
from local_elasticity.studies.engine.claims import Claim, judged, print_claims, status, write_claims
from local_elasticity.studies.engine.pieces import Arrays, kept
from local_elasticity.studies.engine.study import Study

SYNTHETIC = {"sine": 1, "sine-10": 10, "sine-100": 100, "teacher": 10, "linear": 10}
REAL = ("diabetes", "fair")


@dataclass(frozen=True)
class Setting:
    """One network and how it is trained.

    Attributes:
        data: "sine" (d = 1), "sine-10", "sine-100", "teacher", "linear", "diabetes" or "fair".
        depth: hidden layers.
        width: units in each.
        lr: of training and of the probe, both SGD.
    """

    data: str = "sine-10"
    depth: int = 2
    width: int = 50
    lr: float = 1e-2

    @property
    def name(self) -> str:
        """One word for files and tables."""
        return f"{self.data}-depth{self.depth}-width{self.width}-lr{self.lr:g}"


@dataclass(frozen=True)
class Scale:
    """How large the study is: the settings, seeds, updates, looks, and probes a side."""

    settings: tuple[Setting, ...]
    seeds: int
    updates: int
    looks: int
    sources: int
    targets: int
    samples: int = 500
    batch_size: int = 10


def _around(base: Setting, **ways: Sequence[Any]) -> tuple[Setting, ...]:
    """The base and one change at a time: what decides is then read off."""
    changed = [Setting(**{**asdict(base), name: value}) for name, values in ways.items() for value in values]
    return tuple(dict.fromkeys([base, *changed]))


BASE = Setting()
SCALES = {
    "small": Scale(
        _around(BASE, data=["linear", "diabetes", "fair"], depth=[4], lr=[1e-3]), 6, 1500, 16, 8, 24, samples=200
    ),
    "paper": Scale(
        _around(
            BASE,
            data=["sine", "sine-100", "teacher", "linear", "diabetes", "fair"],
            depth=[1, 4, 8],
            width=[200, 1000],
            lr=[1e-3, 3e-2],
        ),
        20,
        20_000,
        40,
        20,
        60,
    ),
}


def dataset(name: str, samples: int, seed: int = 0) -> tuple[Tensor, Tensor, str]:
    """Inputs (n, d) and labels (n,) in float64, and what they are; real sets give at most ``samples`` rows."""
    rng = np.random.default_rng(seed)
    if name in REAL:
        x, y, origin = regression(name)
        rows = torch.from_numpy(rng.permutation(len(x))[:samples])
        return x[rows], y[rows], f"{origin}, {len(rows)} of them"
    if name not in SYNTHETIC:
        raise InputError(expected=f"one of {', '.join([*SYNTHETIC, *REAL])}", got=repr(name), do="choose one of them")
    d = SYNTHETIC[name]
    x = rng.uniform(-1, 1, (samples, d))
    if name == "teacher":
        hidden, out = rng.standard_normal((20, d)), rng.standard_normal(20)
        y, words = np.maximum(x @ hidden.T, 0) @ out, "a two-layer ReLU teacher of width 20"
    elif name == "linear":
        y, words = x @ rng.standard_normal(d) + 0.1 * rng.standard_normal(samples), "linear, noise 0.1"
    else:
        y, words = np.sin(np.pi * (x**2).sum(1) / d), "sin(pi |x|^2 / d)"
    y = (y - y.mean()) / y.std()
    return torch.from_numpy(x), torch.from_numpy(y), f"{words}, x uniform in [-1, 1]^{d}, {samples} samples"


def look_times(updates: int, looks: int) -> list[int]:
    """Numbers of updates at which to look, evenly on a logarithmic axis, from 1."""
    return sorted({round(float(v)) for v in np.geomspace(1, updates, looks)})


class LockStep:
    """Replicas of one network that train in lock step, each on batches of its own (SGD, with replacement)."""

    def __init__(self, setting: Setting, x: Tensor, y: Tensor, seeds: int, batch_size: int) -> None:
        self.x, self.y, self.lr, self.batch_size = x, y, setting.lr, batch_size
        self.streams = [torch.Generator().manual_seed(1000 + seed) for seed in range(seeds)]
        networks = []
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                networks.append(MLP(x.shape[1], 1, depth=setting.depth, width=setting.width).double())
        self.network: nn.Module = networks[0]
        self.weights = {name: w.detach().clone() for name, w in stack_module_state(networks)[0].items()}

        def loss(weights: dict[str, Tensor], bx: Tensor, by: Tensor) -> Tensor:
            return squared(functional_call(self.network, weights, (bx,)), by)

        self._step = vmap(grad_and_value(loss))
        self._all = vmap(loss, in_dims=(0, None, None))

    def update(self) -> None:
        """One SGD step of every replica."""
        n, size = len(self.x), self.batch_size
        rows = torch.stack([torch.randint(n, (size,), generator=g) for g in self.streams])
        gradients, _ = self._step(self.weights, self.x[rows], self.y[rows])
        for name, w in self.weights.items():
            w.sub_(gradients[name], alpha=self.lr)

    def losses(self) -> np.ndarray:
        """Training loss of every replica."""
        with torch.no_grad():
            return self._all(self.weights, self.x, self.y).numpy()

    def replica(self, index: int) -> nn.Module:
        """The network with the weights of one replica."""
        self.network.load_state_dict({name: w[index] for name, w in self.weights.items()})
        return self.network


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    """Half the mean squared error."""
    return 0.5 * (outputs.reshape(-1) - labels).square().mean()


def follow(setting: Setting, scale: Scale, seed: int = 0) -> Arrays:
    """Train the replicas of a setting and measure S_rel of near and far pairs: (looks, seeds, pairs)."""
    x, y, _ = dataset(setting.data, scale.samples, seed)
    count = max(2, scale.targets // 4)
    sources, targets = slice(0, scale.sources), slice(scale.sources, scale.sources + scale.targets)
    if len(x) < scale.sources + scale.targets:
        raise InputError(expected=f"{scale.sources + scale.targets} samples", got=f"{len(x)}", do="use fewer probes")
    order = torch.cdist(x[sources], x[targets]).argsort(1)
    kinds = {"near": order[:, :count].numpy(), "far": order[:, -count:].numpy()}
    times = look_times(scale.updates, scale.looks)
    found: dict[str, list] = {"near": [], "far": [], "loss": []}
    replicas, done = LockStep(setting, x, y, scale.seeds, scale.batch_size), 0
    for at in times:
        for _ in range(at - done):
            replicas.update()
        done = at
        losses = replicas.losses()
        found["loss"].append(losses)
        looks = [
            _look(replicas.replica(i), x, y, sources, targets, setting.lr)
            if np.isfinite(losses[i])
            else np.full((scale.sources, scale.targets), np.nan)
            for i in range(scale.seeds)
        ]
        for kind, nearest in kinds.items():
            found[kind].append([np.take_along_axis(s, nearest, 1) for s in looks])
    return {"times": np.array(times), **{name: np.array(values) for name, values in found.items()}}


def _look(model: nn.Module, x: Tensor, y: Tensor, sources: slice, targets: slice, lr: float) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseWarning)
        impact = measure(
            model,
            squared,
            sources=(x[sources], y[sources]),
            targets=x[targets],
            update=SGD(lr=lr),
            engine="replay",
            outputs="values",
            route="step",
            check_pairs=0,
        )
    return s_rel(impact, "he_su").numpy()


@dataclass(frozen=True)
class RegressionStudy(Study):
    """S_rel of MLPs through training, near and far pairs, over seeds.

    Attributes:
        title: one line for lists.
        cost: time to expect.
        seed: of the data; replicas are seeded 0, 1, ...
    """

    title: str = "dan2023-regression: S_rel of regression networks through training, near and far pairs"
    cost: Mapping[str, str] = field(
        default_factory=lambda: {"small": "1 min on 1 core", "paper": "2 to 3 hours on 2 cores"}
    )
    seed: int = 0

    def run(self, scale: str, out: Path, overwrite: bool = False) -> int:
        """Train, measure, judge and draw; see ``Study.run``."""
        return self.run_at(SCALES[scale], scale, out, overwrite)

    def run_at(self, size: Scale, scale: str, out: Path, overwrite: bool = False) -> int:
        """As ``run``, with the size given."""
        settings = {
            **asdict(size),
            "title": self.title,
            "seed": self.seed,
            "schedule": look_times(size.updates, size.looks),
            "definitions": ["he_su"],
            "scale": scale,
            "versions": versions(),
        }
        for setting in size.settings:
            dataset(setting.data, 10, self.seed)  # what is missing is said before the work
        prepare_folder(out, settings, overwrite)
        print(f"{self.title}, scale {scale}: about {self.cost.get(scale, 'unknown time')}", flush=True)
        found, started = {}, time.perf_counter()
        for at, setting in enumerate(size.settings, 1):
            file = out / f"{setting.name}.npz"
            found[setting] = kept(file, lambda setting=setting: follow(setting, size, self.seed))
            left = (time.perf_counter() - started) / at * (len(size.settings) - at)
            loss = np.median(found[setting]["loss"][[0, -1]], 1)
            print(
                f"{at} of {len(size.settings)}, {setting.name}: median loss {loss[0]:.3g} to {loss[1]:.3g}; about "
                f"{duration(left)} left",
                flush=True,
            )
        return self._report(found, size, scale, out)

    def _report(self, found: dict[Setting, Arrays], size: Scale, scale: str, out: Path) -> int:
        phases = {(s, kind): over_seeds(a, kind) for s, a in found.items() for kind in ("near", "far")}
        claims = [self._claim(s, kind, phases[s, kind], found[s]) for s in found for kind in ("near", "far")]
        claims.append(self._decisive(phases))
        notes = [
            "settings are ours (the paper's are unknown): ReLU MLPs, half squared error, SGD of batches of "
            f"{size.batch_size} with replacement, {size.updates} updates, {size.looks} looks; probe: SGD step of the "
            "training's size on one sample, engine replay, float64, definition he_su",
            f"{size.seeds} seeds in lock step, {size.sources} sources, {size.targets} targets; near and far: the "
            "closest and the farthest quarter of the targets of each source; medians over pairs, 95 % over seeds",
            *(f"{name}: {dataset(name, size.samples, self.seed)[2]}" for name in dict.fromkeys(s.data for s in found)),
            *(_within_one_run(s, a) for s, a in found.items()),
            *_factors(phases),
            _direction(found),
        ]
        path = write_claims(claims, out, f"{self.title}, scale {scale}", notes)
        figure = save(self._figure(found, phases), out / "figures", "regression")[0]
        print_claims(claims, f"{self.title}, scale {scale}")
        for note in notes:
            print(note)
        print(f"claims: {path}\nfigure: {figure}")
        return status(claims)

    def _claim(self, setting: Setting, kind: str, phases: Phases | None, a: Arrays) -> Claim:
        curve = np.nanmedian(a[kind], (1, 2, 3))
        seen = f"median {curve[0]:.3g} to {curve[-1]:.3g}; "
        if phases is None:
            return Claim(
                f"{setting.name}, {kind}: elastic, then inelastic", "two phases", seen + "undefined", "", "fails"
            )
        low, high = phases.interval
        found = phases.verdict == "two phases"
        last = phases.final_slope_interval
        interval = f"until update {phases.change_point:.4g} [{low:.4g}, {high:.4g}]; " if found else ""
        return Claim(
            f"{setting.name}, {kind}: elastic, then inelastic",
            "two phases",
            f"{seen}{phases.verdict}: {phases.reason}",
            f"{interval}last slope [{last[0]:+.2f}, {last[1]:+.2f}], {phases.n_units} seeds",
            judged(found),
        )

    def _decisive(self, phases: dict[tuple[Setting, str], Phases | None]) -> Claim:
        near = {s: p for (s, kind), p in phases.items() if kind == "near"}
        yes = sum(p is not None and p.verdict == "two phases" for p in near.values())
        return Claim(
            "two phases whatever the setting (the paper's claim, near pairs)",
            f"in all {len(near)} settings",
            f"in {yes} of {len(near)}",
            "each verdict as above",
            judged(yes == len(near)),
        )

    def _figure(self, found: dict[Setting, Arrays], phases: dict[tuple[Setting, str], Phases | None]) -> Any:
        content = []
        for setting, a in found.items():
            lines = []
            for kind in ("near", "far"):
                per_seed = np.nanmedian(a[kind], (2, 3))
                q = np.nanpercentile(per_seed, [10, 50, 90], axis=1)
                lines.append(Line(f"{kind} pairs", a["times"], q[1], (q[0], q[2])))
            loss = np.median(a["loss"], 1)
            lines.append(Line("loss / first", a["times"], loss / loss[0]))
            p = phases[setting, "near"]
            marks = [] if p is None or p.verdict == "none" else [(p.change_point, "near: inelastic")]
            title = f"{setting.data}, {setting.depth} x {setting.width}, lr {setting.lr:g}"
            content.append(Panel(title, lines, "$S_{rel}$, loss", "updates", marks=marks))
        return panels(content, 3, "Regression networks: S_rel, median over pairs, 10-90 % over seeds", height=2.0)


def over_seeds(a: Arrays, kind: str) -> Phases | None:
    """Phases of the band over seeds; None where S_rel is 0 or undefined for half of the pairs."""
    curves = np.nanmedian(a[kind], (2, 3))
    try:
        return find_phases(a["times"], curves, over="seeds")
    except InputError:
        if np.isfinite(curves).all() and (curves > 0).all():
            raise
        return None


def _within_one_run(setting: Setting, a: Arrays) -> str:
    """The verdicts of each seed on its own, over its pairs."""
    counted = Counter()
    for i in range(a["near"].shape[1]):
        s = a["near"][:, i].reshape(len(a["times"]), -1)
        try:
            counted[find_phases(a["times"], s, n_boot=100).verdict] += 1
        except InputError:
            counted["undefined"] += 1
    words = ", ".join(f"{verdict} in {n}" for verdict, n in counted.most_common())
    return f"{setting.name}, near pairs, each seed by itself (resampling pairs): {words}"


def _direction(found: dict[Setting, Arrays]) -> str:
    """Whether S_rel ends above or below its beginning: the paper has it large at the end."""
    ends = {s: np.nanmedian(a["near"], (1, 2, 3))[[0, -1]] for s, a in found.items()}
    falls = sum(last < first for first, last in ends.values())
    return f"direction, near pairs: the median ends below its beginning in {falls} of {len(ends)} settings"


def _factors(phases: dict[tuple[Setting, str], Phases | None]) -> list[str]:
    """For every factor the verdicts along it, all else at the base: which of them decide."""
    lines = []
    near = {s: p for (s, kind), p in phases.items() if kind == "near"}
    base = next(iter(near))
    for factor in ("depth", "width", "data", "lr"):
        others = [f for f in ("depth", "width", "data", "lr") if f != factor]
        along = {
            getattr(s, factor): "undefined" if p is None else p.verdict
            for s, p in near.items()
            if all(getattr(s, f) == getattr(base, f) for f in others)
        }
        if len(along) > 1:
            decides = "decides" if len(set(along.values())) > 1 else "does not decide here"
            lines.append(f"{factor} {decides}: " + ", ".join(f"{v}: {verdict}" for v, verdict in along.items()))
    return lines


REGRESSION = RegressionStudy()
