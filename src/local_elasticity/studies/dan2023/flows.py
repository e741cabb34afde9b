"""Study dan2023-flows: S_rel(t) of every solvable flow, and networks trained by SGD (arXiv 2111.01166; srel 2, C8)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from local_elasticity import flows
from local_elasticity.base.errors import NoiseWarning
from local_elasticity.impact import measure
from local_elasticity.impact.update import SGD
from local_elasticity.report.curves import Line, Panel, panels
from local_elasticity.report.figures import save
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.runs.provenance import versions
from local_elasticity.similarity.definitions import s_rel
from local_elasticity.similarity.phases import Phases, find_phases
from local_elasticity.studies.engine.claims import Claim, judged, print_claims, status, write_claims
from local_elasticity.studies.engine.pieces import Arrays, kept
from local_elasticity.studies.engine.study import Study


@dataclass(frozen=True)
class Problem:
    """One flow and the network that is its twin.

    Attributes:
        flow: the closed form.
        x: (n, p) sources; x_prime the targets.
        x_prime: (m, p).
        label: (n,) labels of the sources, None where S_rel does not depend on them.
        model: builds the network at the flow's initial weights.
        objective: the loss whose full gradient trains it.
        probe: the loss of one sample.
        label_of: labels for the probe where the flow needs none.
        definition: of S_rel.
    """

    flow: flows.Flow
    x: np.ndarray
    x_prime: np.ndarray
    label: np.ndarray | None
    model: Callable[[], nn.Module]
    objective: Callable[[nn.Module], Tensor]
    probe: Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]
    label_of: np.ndarray
    definition: str = "he_su"


class Power(nn.Module):
    """f(x) = <w^d, x>."""

    def __init__(self, w: np.ndarray, depth: int = 1) -> None:
        super().__init__()
        self.w, self.depth = nn.Parameter(torch.from_numpy(w.copy())), depth

    def forward(self, x: Tensor) -> Tensor:
        """(batch,)."""
        return x @ self.w**self.depth


class Gate(nn.Module):
    """f(x) = max(0, w.x)."""

    def __init__(self, w: np.ndarray) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(w.copy()))

    def forward(self, x: Tensor) -> Tensor:
        """(batch,)."""
        return torch.relu(x @ self.w)


class Rows(nn.Module):
    """f(x) = W x."""

    def __init__(self, w: np.ndarray) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(w.copy()))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, K)."""
        return x @ self.w.T


class TwoLayers(nn.Module):
    """f(x) = a.s(W x)."""

    def __init__(self, hidden: np.ndarray, output: np.ndarray) -> None:
        super().__init__()
        self.hidden, self.output = (nn.Parameter(torch.from_numpy(v.copy())) for v in (hidden, output))

    def forward(self, x: Tensor) -> Tensor:
        """(batch,)."""
        return (x @ self.hidden.T) @ self.output


def _squared(outputs: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * ((outputs - labels) ** 2).sum() / len(labels)


def problems(n: int = 20, seed: int = 0) -> dict[str, Problem]:
    """Every flow with n sources and n targets, and its twin."""
    rng = np.random.default_rng(seed)
    tensor = torch.from_numpy

    def pairs(p: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal((n, p)), rng.standard_normal((n, p))

    found: dict[str, Problem] = {}
    X, y = rng.standard_normal((60, 6)) * np.array([3, 2, 1, 1, 0.5, 0.3]), rng.standard_normal(60)
    w0, labels = rng.standard_normal(6), rng.standard_normal(n)
    for name, penalty in (("linear regression", 0.0), ("ridge regression", 0.2)):
        flow = flows.RidgeFlow(X, y, penalty, w0) if penalty else flows.LinearRegressionFlow(X, y, w0)

        def penalised(model: nn.Module, penalty: float = penalty) -> Tensor:
            (w,) = model.parameters()
            return 0.5 * penalty * (w**2).sum()

        found[name] = Problem(
            flow,
            *pairs(6),
            labels,
            lambda: Power(w0),
            lambda m, extra=penalised: _squared(m(tensor(X)), tensor(y)) + extra(m),
            lambda m, extra=penalised: lambda f, v: _squared(f, v) + extra(m),
            labels,
        )
    classes = np.arange(60) % 3
    features = np.maximum(rng.standard_normal((60, 8)) + 0.5 * np.eye(3, 8)[classes], 0)
    W0, rho, at = rng.standard_normal((3, 8)), 60 * 0.01 / 3, np.arange(n) % 3
    one_hot = torch.eye(3, dtype=torch.float64)

    def per_sample(m: nn.Module, f: Tensor, v: Tensor) -> Tensor:
        (w,) = m.parameters()
        return 0.5 * ((f - one_hot[v]) ** 2).sum() / len(v) + 0.5 * rho * (w**2).sum()

    found["ridge classifier"] = Problem(
        flows.RidgeClassifierFlow(features, classes, 0.01, w0=W0),
        *pairs(8),
        at,
        lambda: Rows(W0),
        lambda m: per_sample(m, m(tensor(features)), tensor(classes)),
        lambda m: lambda f, v: per_sample(m, f, v),
        at,
    )
    scale, target = np.ones(25), np.r_[np.ones(5), np.full(20, 0.25)]
    for depth in (1, 2, 3):
        alpha = np.full(25, 0.03 if depth == 2 else 0.2)

        def population(m: nn.Module, depth: int = depth) -> Tensor:
            (w,) = m.parameters()
            return 0.5 * ((w**depth - tensor(target)) ** 2).sum()

        found[f"diagonal, d = {depth}"] = Problem(
            flows.DiagonalFlow(depth, scale, target, alpha),
            *pairs(25),
            None,
            lambda alpha=alpha, depth=depth: Power(alpha, depth),
            population,
            lambda m: _squared,
            rng.standard_normal(n),
        )
    star, start = rng.standard_normal(5), rng.standard_normal(5)
    for kind in ("population", "glmtron"):

        def gate_loss(m: nn.Module, kind: str = kind) -> Tensor:
            (w,) = m.parameters()
            u = tensor(star)
            if kind == "glmtron":
                return ((w - u) ** 2).sum() / 4
            rho, size = w.norm(), u.norm()
            phi = torch.arccos((w @ u) / rho / size)
            return ((w - u) ** 2).sum() / 4 + rho * size * (phi * torch.cos(phi) - torch.sin(phi)) / (2 * np.pi)

        found[f"ReLU gate, {kind}"] = Problem(
            flows.ReLUGateFlow(start, star, kind),
            *pairs(5),
            None,
            lambda: Gate(start),
            gate_loss,
            lambda m: _squared,
            rng.standard_normal(n),
        )
    V = 0.3 * rng.standard_normal((3, 8))
    for definition in ("l2", "kl"):
        found[f"softmax layer, {definition}"] = Problem(
            flows.SoftmaxLayerFlow(V, features, classes, definition=definition),
            *pairs(8),
            at,
            lambda: Rows(V),
            lambda m: nn.functional.cross_entropy(m(tensor(features)), tensor(classes)),
            lambda m: nn.functional.cross_entropy,
            at,
            definition,
        )
    hidden, output = 0.1 * rng.standard_normal((6, 6)), 0.1 * rng.standard_normal(6)
    deep = X @ rng.standard_normal(6)
    found["two linear layers"] = Problem(
        flows.TwoLayerNTK(hidden, output, activation="linear", X=X, y=deep),
        *pairs(6),
        None,
        lambda: TwoLayers(hidden, output),
        lambda m: _squared(m(tensor(X)), tensor(deep)),
        lambda m: _squared,
        rng.standard_normal(n),
    )
    return found


def trained(problem: Problem, lr: float, t: float) -> nn.Module:
    """The twin after t / lr full-gradient steps of size lr."""
    model = problem.model()
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(round(t / lr)):
        opt.zero_grad()
        problem.objective(model).backward()
        opt.step()
    return model


def measured(problem: Problem, model: nn.Module, engine: Any, n: int = 6, probe_lr: float = 1e-6) -> np.ndarray:
    """S_rel (n, n) of the first sources and targets on a trained twin, by an engine of ``measure``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseWarning)
        impact = measure(
            model,
            problem.probe(model),
            sources=(torch.from_numpy(problem.x[:n]), torch.from_numpy(problem.label_of[:n])),
            targets=torch.from_numpy(problem.x_prime[:n]),
            update=SGD(lr=probe_lr),
            engine=engine,
            outputs="logits" if problem.definition != "he_su" else "values",
            check_pairs=0,
            route="step" if engine == "replay" else None,
        )
        return s_rel(impact, problem.definition, eps=0).numpy()


def exact(problem: Problem, t: Any, n: int | None = None) -> np.ndarray:
    """The formula's S_rel for all pairs of the first n: (T, n, n) or (n, n)."""
    label = None if problem.label is None else problem.label[:n, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flows.UndefinedWarning)
        return problem.flow.s_rel(t, problem.x[:n, None], problem.x_prime[None, :n], label)


@dataclass(frozen=True)
class FlowStudy(Study):
    """S_rel of each flow through time, its phases, and the order at which SGD follows it.

    Attributes:
        title: one line for lists.
        cost: time to expect.
        twin_time: time at which the trained twins are measured.
        seed: of data, weights and pairs.
    """

    title: str = "dan2023-flows: S_rel(t) of every solvable gradient flow, and the networks that follow it"
    cost: Mapping[str, str] = field(default_factory=lambda: {"small": "30 s on 1 core", "paper": "3 min on 1 core"})
    twin_time: float = 0.8
    seed: int = 0

    def run(self, scale: str, out: Path, overwrite: bool = False) -> int:
        """Compute, judge and draw.

        Args:
            scale: "small" (60 times, 20 x 20 pairs, steps 0.02 and 0.01) or "paper" (200 times, 60 x 60 pairs, steps
                down to 0.0025).
            out: the study's folder; an interrupted study continues there.
            overwrite: throw away what is there.

        Returns:
            1 when a claim fails, else 0.
        """
        n, times = (20, 60) if scale == "small" else (60, 200)
        steps = (0.02, 0.01) if scale == "small" else (0.01, 0.005, 0.0025)
        return self.run_at(n, np.logspace(-2, 3, times), steps, scale, out, overwrite)

    def run_at(
        self, n: int, times: np.ndarray, steps: tuple[float, ...], scale: str, out: Path, overwrite: bool = False
    ) -> int:
        """As ``run``, with the sizes given."""
        settings = {
            **asdict(self),
            "schedule": [float(times[0]), float(times[-1]), len(times)],
            "definitions": ["he_su", "l2", "kl"],
            "scale": scale,
            "n": n,
            "steps": steps,
            "versions": versions(),
        }
        prepare_folder(out, settings, overwrite)
        print(f"{self.title}, scale {scale}: about {self.cost.get(scale, 'unknown time')}", flush=True)
        found = {}
        for name, problem in problems(n, self.seed).items():
            file = out / f"{name.replace(' ', '-').replace(',', '').replace('=', '')}.npz"
            found[name] = kept(file, lambda problem=problem: self._compute(problem, times, steps))
            found[name]["times"] = times
            orders = found[name]["orders"]
            print(f"{name}: order of the twin in its step {orders.min():.3f} to {orders.max():.3f}", flush=True)
        return self._report(found, n, steps, scale, out)

    def _compute(self, problem: Problem, times: np.ndarray, steps: tuple[float, ...]) -> Arrays:
        formula = exact(problem, self.twin_time, 6)
        twins = [trained(problem, h, self.twin_time) for h in steps]
        errors = np.array(
            [[_distance(measured(problem, m, engine), formula) for m in twins] for engine in ("replay", "linear")]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            orders = np.log2(errors[:, :-1] / errors[:, 1:])
        return {"s": exact(problem, times), "errors": errors, "orders": np.nan_to_num(orders, nan=0.0)}

    def _report(self, found: dict[str, Arrays], n: int, steps: tuple[float, ...], scale: str, out: Path) -> int:
        phases = {name: _phases(a) for name, a in found.items()}
        claims = self._claims(found, phases)
        notes = [
            f"{n} x {n} pairs of standard normal x and x', seed {self.seed}; median over pairs; sources and targets "
            "resampled; 95 % intervals",
            f"twins: full-gradient SGD of steps {', '.join(f'{h:g}' for h in steps)} up to t = {self.twin_time}, 6 x 6 "
            "pairs, probe SGD 1e-6, float64, engines replay and linear",
            *(f"{name}: {p}" for name, p in phases.items() if p is not None),
        ]
        path = write_claims(claims, out, f"{self.title}, scale {scale}", notes)
        figure = save(self._figure(found, phases), out / "figures", "flows")[0]
        print_claims(claims, f"{self.title}, scale {scale}")
        for note in notes:
            print(note)
        print(f"claims: {path}\nfigure: {figure}")
        return status(claims)

    def _claims(self, found: dict[str, Arrays], phases: dict[str, Phases | None]) -> list[Claim]:
        linear = found["linear regression"]["s"]
        drift = float(np.nanmax(np.abs(linear / linear[0] - 1)))
        gate = found["ReLU gate, population"]["s"]
        alone = _inner_ratio(problems(gate.shape[1], self.seed)["ReLU gate, population"])
        stray = np.minimum(np.abs(gate), np.abs(gate - alone))
        mean, error, expected = _isotropic(self.seed)
        curved = {k: a for k, a in found.items() if a["errors"][1].max() > 1e-9}  # the others agree at any step
        orders = np.concatenate([a["orders"].ravel() for a in curved.values()])
        exactly = [k for k in found if k not in curved]
        diagonal = problems(2, self.seed)["diagonal, d = 2"].flow
        assert isinstance(diagonal, flows.DiagonalFlow)
        predicted = float(np.nanmax(diagonal.transition_times()))
        return [
            Claim("linear regression: S_rel is constant", "drift 0", f"{drift:.1e}", "exact", judged(drift < 1e-12)),
            Claim(
                "one ReLU gate: S_rel is 0 or abs(x.x')/x.x at every time, so it jumps",
                "at all pairs and times",
                f"largest distance {float(np.nanmax(stray)):.1e}",
                f"{int(np.isnan(gate).sum())} of {gate.size} undefined: gate closed at x",
                judged(bool(np.nanmax(stray) < 1e-10)),
            ),
            Claim(
                "one ReLU gate: mean over directions at angle 1.1 is abs(cos a) (1 - a/pi)",
                f"{expected:.4f}",
                f"{mean:.4f}",
                f"+- {2 * error:.4f} (2 standard errors)",
                judged(abs(mean - expected) < 3 * error),
            ),
            Claim(
                "networks trained by SGD follow their flow, at order 1 in the step",
                "0.8 to 1.2 by both engines",
                f"{orders.min():.3f} to {orders.max():.3f} of {len(curved)} flows; "
                f"{', '.join(exactly)}: equal to {max(found[k]['errors'].max() for k in exactly):.0e}",
                "2 engines, every halving of the step",
                judged(bool((np.abs(orders - 1) < 0.2).all())),
            ),
            *self._transition(predicted, nine_tenths(diagonal), phases["diagonal, d = 2"]),
            *(
                Claim(
                    f"{name}: no phases",
                    "none",
                    p.verdict if p else "none: too few defined pairs",
                    "" if p is None else p.reason,
                    judged(p is None or p.verdict == "none"),
                )
                for name, p in ((k, phases[k]) for k in ("linear regression", "diagonal, d = 1"))
            ),
        ]

    def _transition(self, half: float, grown: float, found: Phases | None) -> list[Claim]:
        """The predicted time of 2.4, which is the middle of the growth, and the time at which it is nearly complete."""
        ways = (("half grown, log(u/alpha^2)/(4 s^2 u)", half), ("9/10 grown", grown))
        claims = []
        for words, predicted in ways:
            name = f"diagonal, d = 2: the inelastic phase begins when the last coordinate is {words}"
            expected = f"t = {predicted:.3g}, inside the interval of the change point"
            if found is None or found.verdict == "none":
                claims.append(Claim(name, expected, "none" if found is None else str(found), "", "fails"))
                continue
            low, high = found.interval
            seen = f"{found.change_point:.3g}, {found.change_point / predicted:.2f} times that"
            claims.append(Claim(name, expected, seen, f"[{low:.3g}, {high:.3g}]", judged(low <= predicted <= high)))
        return claims

    def _figure(self, found: dict[str, Arrays], phases: dict[str, Phases | None]) -> Any:
        content = []
        for name, a in found.items():
            gated = name.startswith("ReLU")  # half of the pairs are 0: a median would say nothing
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                q = np.nanpercentile(a["s"], [25, 50, 75], axis=(1, 2))
                mean = np.nanmean(a["s"], axis=(1, 2))
            line = Line("", a["times"], mean) if gated else Line("", a["times"], q[1], (q[0], q[2]))
            p = phases[name]
            marks = [] if p is None or p.verdict == "none" else [(p.change_point, "inelastic from here")]
            if name == "diagonal, d = 2":
                flow: Any = problems(2, self.seed)[name].flow
                marks += [(float(v), "predicted") for v in np.unique(np.round(flow.transition_times(), 9))]
            limits = (0.0, 1.0) if gated else (float(np.nanmin(q[0])) / 2, float(np.nanmax(q[2])) * 2)
            title, scale = (f"{name} (mean)", "linear") if gated else (name, "log")
            content.append(Panel(title, [line], x_label="t", marks=marks, y_limits=limits, y_scale=scale))
        return panels(
            content, 3, "S_rel along solvable gradient flows: median over pairs, band between quartiles", height=1.9
        )


def nine_tenths(flow: flows.Flow) -> float:
    """When the last coordinate of a diagonal flow of d = 2 is 9/10 grown: log 9 / (4 s^2 u) after it is half grown."""
    assert isinstance(flow, flows.DiagonalFlow)
    return float(np.nanmax(flow.transition_times() + np.log(9) / (4 * flow.scale**2 * flow.target)))


def _phases(a: Arrays) -> Phases | None:
    s = a["s"][:, ~np.isnan(a["s"]).all((0, 2))]
    with np.errstate(invalid="ignore"):
        if np.nanmedian(s) <= 0:
            return None
    return find_phases(a["times"], s)


def _distance(found: np.ndarray, formula: np.ndarray) -> float:
    """Median over pairs: where a denominator passes 0 a ratio is far from its asymptotics at any affordable step."""
    return float(np.nanmedian(np.abs(found - formula)))


def _inner_ratio(problem: Problem) -> np.ndarray:
    return np.abs(problem.x @ problem.x_prime.T) / (problem.x**2).sum(1)[:, None]


def _isotropic(seed: int, angle: float = 1.1, n: int = 100_000) -> tuple[float, float, float]:
    """Mean S_rel over directions where the gate is open, its standard error, and the formula."""
    rng = np.random.default_rng(seed)
    flow = flows.ReLUGateFlow(rng.standard_normal(3), rng.standard_normal(3))
    x, across = rng.standard_normal((2, n, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    across -= (across * x).sum(1, keepdims=True) * x
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flows.UndefinedWarning)
        s = flow.s_rel(0.5, x, np.cos(angle) * x + np.sin(angle) * across)
    s = s[np.isfinite(s)]
    return float(s.mean()), float(s.std() / np.sqrt(len(s))), float(flow.isotropic_mean(angle))


FLOWS = FlowStudy()
