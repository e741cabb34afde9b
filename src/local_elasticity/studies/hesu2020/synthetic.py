"""Study hesu2020-synthetic: S_rel against geodesic distance, network and twin (arXiv:1910.06943; spec srel 6)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

import local_elasticity as le
from local_elasticity.report.figures import save
from local_elasticity.report.similarity import similarity_against_distance
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.similarity.kernels import loss_function
from local_elasticity.studies.engine.claims import Claim, judged, print_claims, status, write_claims
from local_elasticity.studies.engine.pieces import Arrays, kept
from local_elasticity.studies.engine.study import Study
from local_elasticity.studies.hesu2020.training import network, train

SEED = 666
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Geometry:
    """Points of two classes on two curves or surfaces, and how far those of class 1 are from each other on theirs.

    Attributes:
        points: (n, 3).
        labels: 0 or 1.
        distance: geodesic distance of every ordered pair of class 1.
        distance_published: the same as the published code computes it.
    """

    points: Float[ndarray, "n 3"]
    labels: Int[ndarray, " n"]
    distance: Float[ndarray, "m m"]
    distance_published: Float[ndarray, "m m"]


def torus(n: int, seed: int, radius: float = 8.0, turns: int = 4) -> Geometry:
    """Two strands that wind around a ring; a strand's distance is the angle between two points along the ring.

    (r cos t ± sin(kt) cos t, r sin t ± sin(kt) sin t, ± cos(kt)), + for class 1, t uniform in (-pi, pi).
    """
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    angle = random.uniform(-np.pi, np.pi, n)
    sign = np.where(labels == 1, 1.0, -1.0)
    ring = radius + sign * np.sin(turns * angle)
    points = np.stack([ring * np.cos(angle), ring * np.sin(angle), sign * np.cos(turns * angle)], 1)
    own = angle[labels == 1]
    apart = np.abs(own[:, None] - own)
    distance = np.minimum(apart, 2 * np.pi - apart)
    return Geometry(points, labels, distance, distance)


def folded_boxes(n: int, seed: int, slope: float = 1.2, height: float = 12.0, gap: float = 1.0) -> Geometry:
    """Two closed boxes, one inside the other: y = -+k|x| +- (b ± d), z in [-1, 1]; + is class 1, the outer one.

    The distance goes along the walls, around the shorter way, and along z. The published code takes the half-width of
    the outer box for 10 + d where it is 10 + d/k, so that its distances around the corners are too long.
    """
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    sign = np.where(labels == 1, 1.0, -1.0)
    upper = np.where(np.arange(n) < n // 2, 1.0, -1.0)
    half = 10.0 + sign * gap / slope
    x = random.uniform(-half, half)
    z = random.uniform(-1.0, 1.0, n)
    y = upper * (height + sign * gap - slope * np.abs(x))
    mine = labels == 1
    distances = [_around(x[mine], upper[mine], z[mine], slope, width) for width in (10.0 + gap / slope, 10.0 + gap)]
    return Geometry(np.stack([x, y, z], 1), labels, distances[0], distances[1])


def _around(
    x: Float[ndarray, " m"], upper: Float[ndarray, " m"], z: Float[ndarray, " m"], slope: float, half: float
) -> Float[ndarray, "m m"]:
    stretch = np.sqrt(1 + slope**2)
    same = stretch * np.abs(x[:, None] - x)
    over = stretch * (2 * half - x[:, None] - x)
    other = np.minimum(over, 4 * half * stretch - over)
    along = np.where(upper[:, None] == upper, same, other)
    return np.hypot(along, z[:, None] - z)


@dataclass(frozen=True)
class Setting:
    """One geometry with the network that the paper takes for it.

    Attributes:
        name: of the geometry.
        make: draws it.
        widths: published hidden units.
    """

    name: str
    make: Callable[[int, int], Geometry]
    widths: tuple[int, ...]


SETTINGS = (
    Setting("torus", torus, (40960,)),
    Setting("folded boxes", folded_boxes, (8192, 8192)),
)


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        points: of both classes together.
        shrink: published widths are divided by this, and the rate multiplied.
        passes: full-batch updates.
    """

    points: int
    shrink: dict[str, int]
    passes: int


SCALES = {
    "small": Scale(100, {"torus": 40, "folded boxes": 32}, 5000),
    "paper": Scale(100, {"torus": 1, "folded boxes": 1}, 20000),
}


@dataclass(frozen=True)
class SyntheticStudy(Study):
    """The study at its published settings.

    Attributes:
        title: one line for lists.
        cost: time to expect at each scale.
        lr: published rate of gradient descent, at published width.
        seed: of points and weights.
    """

    title: str
    cost: Mapping[str, str]
    lr: float = 1e-5
    seed: int = SEED

    def run(self, scale: str, out: Path, overwrite: bool = False) -> int:
        """Train every network and twin, compare similarity with distance, judge, draw; see ``Study.run``."""
        return self.run_at(SCALES[scale], scale, out, overwrite)

    def run_at(self, size: Scale, scale: str, out: Path, overwrite: bool = False) -> int:
        """As ``run``, with the size given."""
        settings = {"title": self.title, "lr": self.lr, "seed": self.seed, **asdict(size), "scale": scale}
        prepare_folder(out, settings, overwrite)
        print(f"{self.title}, scale {scale}: about {self.cost.get(scale, 'unknown time')}", flush=True)
        results = {}
        for setting in SETTINGS:
            geometry = setting.make(size.points, self.seed)
            for kind in ("network", "linear"):
                results[setting.name, kind] = self._one(setting, geometry, kind == "linear", size, out)
        return self._report(results, scale, size, out)

    def _one(self, setting: Setting, geometry: Geometry, linear: bool, size: Scale, out: Path) -> dict[str, Any]:
        name = f"{setting.name.replace(' ', '-')}-{'linear' if linear else 'network'}"
        path = out / f"{name}.npz"
        result = kept(path, lambda: self._measured(setting, geometry, linear, size, out / f"{name}.pt"))
        (out / f"{name}.pt").unlink(missing_ok=True)
        words = str(result["words"])
        print(f"{setting.name}, {'linear twin' if linear else 'network'}: {words}", flush=True)
        return {**result, "words": words}

    def _measured(self, setting: Setting, geometry: Geometry, linear: bool, size: Scale, checkpoint: Path) -> Arrays:
        shrink = size.shrink[setting.name]
        widths = [width // shrink for width in setting.widths]
        x = torch.tensor(geometry.points, dtype=torch.float32)
        labels = torch.tensor(geometry.labels, dtype=torch.float32)
        pair = [network(3, widths, linear, self.seed) for _ in range(2)]
        model, rate, loss = train(
            pair, x, labels, "mse", self.lr * shrink, size.passes, len(x), self.seed, checkpoint, checkpoint.stem
        )
        mine = torch.tensor(geometry.labels == 1)
        with torch.no_grad():
            right = float(((model(x).squeeze(1) >= 0.5).float() == labels).float().mean())
        limit = le.s_rel_limit(model, x[mine], dtype=torch.float64)
        looked = le.ripple(model, loss_function("mse"), (x[mine], labels[mine]), x)
        published = le.s_rel(looked, "he_su")[:, mine]
        words = f"width {'-'.join(map(str, widths))}, {rate.words()}; loss {loss:.3g}, accuracy {right:.0%}"
        return {
            "s_rel": limit.numpy(),
            "s_rel_published": published.numpy(),
            "distance": geometry.distance,
            "distance_published": geometry.distance_published,
            "points": geometry.points,
            "labels": geometry.labels,
            "accuracy": np.array(right),
            "loss": np.array(loss),
            "lr_used": looked.lr.numpy(),
            "words": np.array(words),
        }

    def _report(self, results: dict[tuple[str, str], dict[str, Any]], scale: str, size: Scale, out: Path) -> int:
        rows = {}
        for key, result in results.items():
            interval = bootstrap(result["s_rel"], result["distance"], self.seed)
            rows[key] = {
                "r": correlation(result["s_rel"], result["distance"]),
                "interval": interval,
                "published": correlation(result["s_rel_published"], result["distance_published"]),
                "undefined": int((~np.isfinite(result["s_rel_published"])).any(1).sum()),
                "r_without_self": correlation(_without_self(result["s_rel"]), result["distance"]),
            }
        claims = check_claims(results, rows, self.seed)
        notes = [
            f"{size.points} points, seed {self.seed}; full-batch descent, {size.passes} updates, squared error",
            f"rate {self.lr:g} at published width (torus 40960, folded boxes 8192-8192), times published over present "
            "width",
            "S_rel: small-step limit |K(x, x')| / K(x, x) of the trained network, float64; all ordered pairs of class "
            "1, self pairs in",
            "intervals: 95 % bootstrap over the points of class 1; one network a row",
        ]
        for (name, kind), row in rows.items():
            undefined = f", {row['undefined']} sources never moved" if row["undefined"] else ""
            notes.append(
                f"{name}, {kind}: {results[name, kind]['words']}; r {row['r']:.3f} (self pairs out "
                f"{row['r_without_self']:.3f}); as published, finite step from 1e-6 in float32 and published distance: "
                f"r {row['published']:.3f}{undefined}"
            )
        title = f"{self.title}, scale {scale}"
        path = write_claims(claims, out, title, notes)
        numbers = {f"{name}, {kind}": row for (name, kind), row in rows.items()}
        (out / "correlations.json").write_text(json.dumps(numbers, indent=2))
        panels = [
            {**results[name, kind], "name": name, "kind": kind, "r": rows[name, kind]["r"]} for name, kind in results
        ]
        figure = similarity_against_distance(panels, f"{title}, seed {self.seed}")
        drawn = save(figure, out / "figures", "similarity-against-distance")
        print_claims(claims, title)
        for note in notes[4:]:
            print(note)
        print(f"claims: {path}\nfigure: {drawn[0]}")
        return status(claims)


def correlation(similarity: Float[ndarray, "m m"], distance: Float[ndarray, "m m"]) -> float:
    """Pearson's correlation over all ordered pairs that are defined; NaN where nothing varies."""
    s, d = similarity.ravel(), distance.ravel()
    defined = np.isfinite(s)
    if defined.sum() < 2 or s[defined].std() == 0 or d[defined].std() == 0:
        return float("nan")
    return float(np.corrcoef(s[defined], d[defined])[0, 1])


def _without_self(similarity: Float[ndarray, "m m"]) -> Float[ndarray, "m m"]:
    return np.where(np.eye(len(similarity), dtype=bool), np.nan, similarity)


def resampled(
    matrices: list[tuple[ndarray, ndarray]], seed: int, repeats: int = BOOTSTRAPS
) -> Float[ndarray, "repeats matrices"]:
    """Correlations of (similarity, distance) matrices over the same resampled points.

    A point that is drawn c times counts c times in every pair, with itself in c self pairs: a copy of a point is no
    other point.
    """
    random = np.random.default_rng(seed)
    m = len(matrices[0][0])
    counts = np.stack([np.bincount(draw, minlength=m) for draw in random.integers(0, m, (repeats, m))]).astype(float)
    columns = []
    for s, d in matrices:
        defined = np.isfinite(s)
        s = np.where(defined, s, 0.0)
        moments = [_weighted_sums(counts, defined * term) for term in (np.ones_like(d), s, d, s * s, d * d, s * d)]
        n, s1, d1, ss, dd, sd = moments
        with np.errstate(invalid="ignore", divide="ignore"):
            columns.append((n * sd - s1 * d1) / np.sqrt((n * ss - s1**2) * (n * dd - d1**2)))
    return np.stack(columns, 1)


def _weighted_sums(counts: Float[ndarray, "repeats m"], terms: Float[ndarray, "m m"]) -> Float[ndarray, " repeats"]:
    """The sum over ordered pairs, each counted as often as it was drawn."""
    own = np.diagonal(terms)
    return ((counts @ terms) * counts).sum(1) - counts**2 @ own + counts @ own


def bootstrap(similarity: ndarray, distance: ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of the correlation over the choice of points."""
    low, high = np.nanquantile(resampled([(similarity, distance)], seed)[:, 0], [0.025, 0.975])
    return float(low), float(high)


def check_claims(
    results: dict[tuple[str, str], dict[str, Any]], rows: dict[tuple[str, str], dict[str, Any]], seed: int
) -> list[Claim]:
    """C9 of spec srel 5 for the synthetic data: decreasing for the network, and not for its linear twin."""
    claims = []
    for setting in SETTINGS:
        name = setting.name
        net, twin = rows[name, "network"], rows[name, "linear"]
        pair = [(results[name, kind]["s_rel"], results[name, kind]["distance"]) for kind in ("network", "linear")]
        draws = resampled(pair, seed)
        low, high = (float(q) for q in np.nanquantile(draws[:, 0] - draws[:, 1], [0.025, 0.975]))
        claims += [
            Claim(
                f"{name}: the network's S_rel falls with geodesic distance",
                "Pearson correlation below 0, interval and all",
                f"r = {net['r']:.3f}",
                _words(net["interval"]),
                judged(net["interval"][1] < 0),
            ),
            Claim(
                f"{name}: the linear twin's does not",
                "its correlation is less than half of the network's, or positive",
                f"r = {twin['r']:.3f} against {net['r']:.3f}",
                _words(twin["interval"]),
                judged(twin["r"] > 0.5 * net["r"]),
            ),
            Claim(
                f"{name}: the network's correlation lies below its twin's",
                "difference below 0, interval and all",
                f"{net['r'] - twin['r']:+.3f}",
                _words((low, high)),
                judged(high < 0),
            ),
        ]
    return claims


def _words(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


SYNTHETIC = SyntheticStudy(
    title="hesu2020-synthetic: S_rel against geodesic distance on a torus and on folded boxes",
    cost={"small": "1 to 2 min on 2 cores", "paper": "6 hours on 2 cores, by operation counts"},
)
