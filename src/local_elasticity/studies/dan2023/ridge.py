"""Study dan2023-ridge: ridge classification, as published and as defined (arXiv 2111.01166; spec srel 3.2, C7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from local_elasticity.flows import RidgeClassifierFlow
from local_elasticity.report.curves import Line, Panel, panels
from local_elasticity.report.figures import save
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.runs.provenance import versions
from local_elasticity.similarity.phases import Phases, find_phases
from local_elasticity.studies.engine.claims import Claim, judged, print_claims, status, write_claims
from local_elasticity.studies.engine.pieces import Arrays, kept
from local_elasticity.studies.engine.study import Study

# The mean curve of the published figures, read off the images: (t, "inter" figure, "intraclass" figure). Both figures
# are of pairs between the classes; they differ in their random pairs and initial weights.
PUBLISHED_TIMES = (0, 100, 200, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000)
PUBLISHED_CURVES = {
    10: np.array(
        [
            [2.423, 21.27, 31.66, 32.49, 36.3, 59.21, 154.5, 427.3, 509.6, 483.7, 474.4, 474.4],
            [3.848, 18.92, 33.7, 37.39, 37.39, 57.98, 139.4, 342.9, 576.5, 463.0, 463.0, 463.0],
        ]
    )
    * 1e-4,
    100: np.array(
        [
            [1.094, 2.864, 2.864, 3.249, 4.958, 13.58, 41.42, 125.2, 396.0, 982.2, 1486.0, 2072.0],
            [1.736, 5.126, 5.079, 5.222, 5.945, 13.18, 40.0, 126.0, 473.4, 939.0, 1548.0, 1698.0],
        ]
    )
    * 1e-4,
}
# First values of the authors' stored losses, seed 5, p = 10 and then p = 100 in the same process.
PUBLISHED_LOSSES = {10: (19274.0957, 131854.717, 46443.4945), 100: (221278.1149,)}
PUBLISHED_MEAN_LOSS = {0: 7.1e4, 100: 1.7e3, 1000: 205.0, 2000: 21.6, 4000: 1.06, 8000: 0.828}  # p = 10
DIVIDED_BY = 20  # the published average: a sum over 20 pairs divided by 20 squared


@dataclass(frozen=True)
class RidgeStudy(Study):
    """The setting of spec srel 3.2.

    Attributes:
        title: one line for lists.
        cost: time to expect.
        features: the numbers of features, in the order in which the published process ran them.
        dim: size of the inputs.
        per_class: samples of each of the two classes.
        pairs: pairs (x of the far class, x' of the near one).
        starts: initial weights a pair.
        penalty: lambda.
        theta: time scale.
        last: last time; times are whole numbers.
        draws: other draws of the pairs, for the interval of the published curve.
        seed: of NumPy's legacy stream, as published; pairs, unseeded there, are seeded with it here.
    """

    title: str = "dan2023-ridge: S_rel of one-hot ridge classification, as published and as defined"
    cost: Mapping[str, str] = field(default_factory=lambda: {"small": "10 s on 1 core", "paper": "1 min on 1 core"})
    features: tuple[int, ...] = (10, 100)
    dim: int = 100
    per_class: int = 1000
    pairs: int = 20
    starts: int = 10
    penalty: float = 1.0
    theta: float = 1e-3
    last: int = 8000
    draws: int = 200
    seed: int = 5

    def run(self, scale: str, out: Path, overwrite: bool = False) -> int:
        """Compute, judge and draw; every time at "paper", every 20th at "small"; see ``Study.run``."""
        return self.run_at(1 if scale == "paper" else 20, scale, out, overwrite)

    def run_at(self, every: int, scale: str, out: Path, overwrite: bool = False) -> int:
        """As ``run``, looking at every so many times."""
        settings = {
            **{k: v for k, v in asdict(self).items() if k != "cost"},
            "schedule": f"every {every}",
            "definitions": ["he_su as published", "he_su as defined"],
            "scale": scale,
            "versions": versions(),
        }
        prepare_folder(out, settings, overwrite)
        print(f"{self.title}, scale {scale}: about {self.cost.get(scale, 'unknown time')}", flush=True)
        stream = np.random.RandomState(self.seed)
        found = {}
        for p in self.features:
            problem = self._draw(p, stream)  # always drawn: the next p continues the stream
            found[p] = kept(out / f"p{p}.npz", lambda problem=problem: self._compute(*problem, every))
            print(f"p = {p}: {self.pairs} pairs x {self.starts} starts x {len(found[p]['times'])} times", flush=True)
        return self._report(found, scale, out)

    def _draw(self, p: int, stream: Any) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, p) and initial weights (pairs, starts, 2, p), drawn in the published order."""
        mixing = stream.standard_normal((p, self.dim))
        near = 1 + 2 * stream.standard_normal((self.per_class, self.dim))
        far = 9 + stream.standard_normal((self.per_class, self.dim))
        features = np.maximum(np.concatenate([near, far]) @ mixing.T, 0.0)
        return features, stream.standard_normal((self.pairs, self.starts, 2, p))

    def _flow(self, features: np.ndarray, published: bool) -> RidgeClassifierFlow:
        labels = np.arange(2).repeat(self.per_class)
        return RidgeClassifierFlow(features, labels, self.penalty, self.theta, published=published)

    def _compute(self, features: np.ndarray, starts: np.ndarray, every: int) -> Arrays:
        times = np.arange(0, self.last + 1, every, dtype=float)
        rng = np.random.default_rng(self.seed)
        near = rng.choice(self.per_class, self.pairs, replace=False)
        far = self.per_class + rng.choice(self.per_class, self.pairs, replace=False)
        other_far = self.per_class + rng.choice(self.per_class, self.pairs, replace=False)
        arrays = {"times": times, "loss_times": np.arange(0.0, self.last + 1, 100)}
        x, x_prime = features[far], features[near]
        for name, published in (("published", True), ("defined", False)):
            # one flow a pair, because every pair has starts of its own
            flow = self._flow(features, published)
            one = [flow.restarted(start) for start in starts]
            arrays[name] = np.stack(
                [f.s_rel(times, a, b, 1) for f, a, b in zip(one, x, x_prime, strict=True)], axis=-1
            )  # (T, starts, pairs)
            arrays[f"self_{name}"] = np.stack([f.s_rel(0.0, a, a, 1) for f, a in zip(one, x, strict=True)], -1)
            arrays[f"loss_{name}"] = flow.restarted(starts).loss(arrays["loss_times"])
        arrays["within far"] = np.stack(
            [f.s_rel(times, a, b, 1) for f, a, b in zip(one, x, features[other_far], strict=True)], -1
        )
        arrays["draws"] = self._draws(features, starts, rng)
        return arrays

    def _draws(self, features: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The published mean at the times of the figures, for other draws of the pairs: (draws, times)."""
        out = np.zeros((self.draws, len(PUBLISHED_TIMES)))
        times = np.array([t for t in PUBLISHED_TIMES if t <= self.last], dtype=float)
        near = np.array([rng.choice(self.per_class, self.pairs, replace=False) for _ in range(self.draws)])
        far = np.array([rng.choice(self.per_class, self.pairs, replace=False) for _ in range(self.draws)])
        flow = self._flow(features, True)
        for i, start in enumerate(starts):
            s = flow.restarted(start).s_rel(times, features[self.per_class + far[:, i]], features[near[:, i]], 1)
            out[:, : len(times)] += s.mean(1).T / self.pairs / DIVIDED_BY
        return out

    def _report(self, found: dict[int, Arrays], scale: str, out: Path) -> int:
        claims, notes = [], self._notes(found)
        for p, arrays in found.items():
            claims += self._claims(p, arrays)
        path = write_claims(claims, out, f"{self.title}, scale {scale}", notes)
        figure = save(self._figure(found), out / "figures", "ridge")[0]
        print_claims(claims, f"{self.title}, scale {scale}")
        for note in notes:
            print(note)
        print(f"claims: {path}\nfigure: {figure}")
        return status(claims)

    def _claims(self, p: int, a: Arrays) -> list[Claim]:
        mean = a["published"].mean((1, 2)) / DIVIDED_BY
        median = np.median(a["defined"], (1, 2))
        phases = {name: two_phases(a["times"], a[name]) for name in ("published", "defined")}
        low, high = np.percentile(a["draws"], [2.5, 97.5], axis=0)
        inside = [(low <= c) & (c <= high) for c in PUBLISHED_CURVES[p]]
        ratios = PUBLISHED_CURVES[p] / np.median(a["draws"], 0)
        first = a["loss_published"][0].reshape(-1)[: len(PUBLISHED_LOSSES[p])]
        spread = median.max() / median.min()
        ends = np.percentile(_resampled_spread(a["defined"], self.seed), [2.5, 97.5])
        return [
            Claim(
                f"p={p}, as published: the stored losses (needs the broadcast)",
                ", ".join(f"{v:.10g}" for v in PUBLISHED_LOSSES[p]),
                ", ".join(f"{v:.10g}" for v in first),
                "exact arithmetic, seed 5",
                judged(bool(np.allclose(first, PUBLISHED_LOSSES[p], rtol=1e-8, atol=1e-4))),
            ),
            *([self._mean_loss_claim(a)] if p == 10 else []),
            Claim(
                f"p={p}, as published: the drawn curve",
                "inside the 95 % range over draws of the 20 pairs at 80 % of 12 times or more",
                f"at {inside[0].mean():.0%}; drawn over ours: from {ratios[0].min():.2f} to {ratios[0].max():.2f} "
                f"(“intraclass” figure, of other features and weights, not judged: at {inside[1].mean():.0%}, from "
                f"{ratios[1].min():.2f} to {ratios[1].max():.2f})",
                f"{len(a['draws'])} draws; at t = {PUBLISHED_TIMES[-1]}: [{low[-1]:.3g}, {high[-1]:.3g}]",
                judged(bool(inside[0].mean() >= 0.8)),
            ),
            Claim(
                f"p={p}, as published: S_rel rises by 2 decades or more",
                "largest / first >= 100",
                f"from {mean[0]:.3g} to {mean.max():.3g} ({mean.max() / mean[0]:.0f} times)",
                "one draw of pairs",
                judged(bool(mean.max() / mean[0] >= 100)),
            ),
            _phase_claim(f"p={p}, as published: elastic, then inelastic phase", phases["published"]),
            _phase_claim(f"p={p}, as defined: elastic, then inelastic phase (the paper's claim)", phases["defined"]),
            Claim(
                f"p={p}, as defined: S_rel is flat (derived)",
                "largest / smallest median over time < 1.6",
                f"{spread:.3f} (median {median.min():.4g} to {median.max():.4g})",
                f"[{ends[0]:.3f}, {ends[1]:.3f}], 95 % over pairs",
                judged(bool(spread < 1.6)),
            ),
            Claim(
                f"p={p}: S_rel(h, h) = 1",
                "as defined exactly; as published not, for its 1/N",
                f"as defined within {np.abs(a['self_defined'] - 1).max():.1e}; as published "
                f"{np.median(a['self_published']):.3g} in the median",
                "all pairs and starts, t = 0",
                judged(bool(np.abs(a["self_defined"] - 1).max() < 1e-10)),
            ),
        ]

    def _mean_loss_claim(self, a: Arrays) -> Claim:
        mean = a["loss_published"].mean((1, 2))
        seen = {t: mean[t // 100] for t in PUBLISHED_MEAN_LOSS if t <= self.last}
        worst = max(abs(seen[t] / PUBLISHED_MEAN_LOSS[t] - 1) for t in seen)
        return Claim(
            "p=10, as published: mean loss path",
            ", ".join(f"{v:.3g} (t={t})" for t, v in PUBLISHED_MEAN_LOSS.items()),
            ", ".join(f"{v:.4g}" for v in seen.values()),
            "200 paths",
            judged(worst < 0.02),
        )

    def _notes(self, found: dict[int, Arrays]) -> list[str]:
        notes = [
            "as published: h h^T / N in the numerator, mean divided by 20, loss with lost labels; as defined: h h^T",
            f"{self.pairs} pairs (x of the far class, x' of the near one) x {self.starts} initial weights; features "
            f"and weights from NumPy's legacy stream, seed {self.seed}; pairs, unseeded as published, {self.seed}",
            "closed form, steps of any size; phases of the median over pairs and starts, both resampled; without t = 0",
            "the division by 20 scales the curve and the loss does not enter S_rel: only the 1/N changes its shape",
        ]
        for p, a in found.items():
            only = two_phases(a["times"], a["defined"] / DIVIDED_BY)
            undivided = two_phases(a["times"], a["published"] * DIVIDED_BY)
            notes.append(
                f"p={p}, one change at a time: as defined but divided by 20: {only.verdict}; with 1/N but not divided: "
                f"{undivided.verdict}; within the far class as defined: median {np.median(a['within far'][0]):.3g} to "
                f"{np.median(a['within far'][-1]):.3g}, {two_phases(a['times'], a['within far']).verdict}"
            )
        return notes

    def _figure(self, found: dict[int, Arrays]) -> Any:
        content = []
        for p, a in found.items():
            loss = [
                Line(name, a["loss_times"], a[f"loss_{key}"].mean((1, 2)))
                for name, key in (("as published", "published"), ("as defined", "defined"))
            ]
            content.append(Panel(f"p = {p}: mean loss", loss, "loss", "t", "linear"))
            per_start = a["published"].mean(2) / DIVIDED_BY
            drawn = [
                Line(f"{name} figure", PUBLISHED_TIMES, c, points=True)
                for name, c in zip(("published", "“intraclass”"), PUBLISHED_CURVES[p], strict=True)
            ]
            band = (per_start.min(1), per_start.max(1))
            content.append(
                Panel(
                    "as published, ÷ 20",
                    [Line("ours (range over starts)", a["times"], per_start.mean(1), band), *drawn],
                    "$S_{rel}$, mean",
                    "t",
                    "linear",
                )
            )
            quartiles = np.percentile(a["defined"], [25, 50, 75], axis=(1, 2))
            within = np.median(a["within far"], (1, 2))
            lines = [
                Line("between classes (quartiles)", a["times"], quartiles[1], (quartiles[0], quartiles[2])),
                Line("within the far class", a["times"], within),
            ]
            content.append(Panel("as defined", lines, "$S_{rel}$, median", "t", "linear", y_limits=(0.01, 10)))
        return panels(content, 3, "Ridge classification: the published rise of S_rel comes from a 1/N in its formula")


def two_phases(times: np.ndarray, s: np.ndarray) -> Phases:
    """The phases of the median of S_rel (T, starts, pairs); starts and pairs are resampled independently."""
    return find_phases(times, s, over="starts and pairs")


def _resampled_spread(s: np.ndarray, seed: int, n_boot: int = 100) -> np.ndarray:
    """Largest over smallest median over time, for resampled pairs."""
    rng = np.random.default_rng(seed)
    some = s[:: max(1, len(s) // 200)]
    medians = [np.median(some[:, :, rng.integers(0, s.shape[2], s.shape[2])], (1, 2)) for _ in range(n_boot)]
    return np.array([m.max() / m.min() for m in medians])


def _phase_claim(name: str, phases: Phases) -> Claim:
    found = phases.verdict == "two phases"
    low, high = phases.interval
    seen = f"until t = {phases.change_point:.4g}: {phases.reason}" if found else f"none; {phases.reason}"
    last = phases.final_slope_interval
    interval = f"t in [{low:.4g}, {high:.4g}]; " if found else ""
    interval += f"last slope in [{last[0]:+.2f}, {last[1]:+.2f}]; {phases.n_units} curves"
    return Claim(name, "two phases", seen, interval, judged(found))


RIDGE = RidgeStudy()
