"""A simulation on disk: paths of an LE-SDE, what is known about them exactly, figures, and the numbers beneath."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from local_elasticity.base.checks import check_probability, check_rate, check_real, check_seed, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.lesde.estimation.recordings import SIMULATION
from local_elasticity.lesde.expressions import parse
from local_elasticity.lesde.model import LESDE

ARRAYS, NOTE, NUMBERS = SIMULATION, "config.json", "numbers.json"


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    classes: int
    features: int | None
    drift: str
    alpha: str
    beta: str
    sigma: str
    steps: int
    samples_per_class: int
    paths: int
    save: int
    separability_paths: int
    scale: float
    start_variance: float
    label_noise: float
    method: str
    step: float | None
    seed: int
    device: str


def build(settings: Settings) -> LESDE:
    """The model: its start is ``scale`` times the unit vectors, plus a normal draw of the seed (half that size).

    Raises:
        InputError: for expressions that are no arithmetic, or numbers that the model refuses.
    """
    k = check_whole("--classes", settings.classes, 2)
    p = k if settings.features is None else check_whole("--features", settings.features)
    for name in ("samples_per_class", "paths", "separability_paths"):
        check_whole(f"--{name.replace('_', '-')}", getattr(settings, name))
    check_real("--scale", settings.scale)
    check_rate("--start-variance", settings.start_variance)
    check_probability("--label-noise", settings.label_noise)
    check_real("--step", settings.step, 0.0, above=True, or_none=True)
    check_seed("--seed", settings.seed)
    generator = np.random.default_rng(settings.seed)
    initial = settings.scale * (np.eye(k, p) + 0.5 * generator.standard_normal((k, p)))
    rates = [parse(getattr(settings, name), name) for name in ("alpha", "beta", "sigma")]
    model = LESDE(rates[0], rates[1], k, settings.drift, rates[2], (initial, settings.start_variance))
    return model.with_label_noise(settings.label_noise) if settings.label_noise else model


def save_points(settings: Settings) -> np.ndarray:
    """Evenly spaced whole steps, the start and the end among them."""
    check_whole("--steps", settings.steps)
    check_whole("--save", settings.save, 2)
    return np.unique(np.linspace(0, settings.steps, min(settings.save, settings.steps + 1)).round())


def simulate(settings: Settings, out: Path, *, progress: bool = True, overwrite: bool = False) -> dict[str, Any]:
    """Sample, judge, write ``simulation.npz``, figures, ``numbers.json`` and ``config.json`` into ``out``.

    ``simulation.npz`` holds t (T,), class_means (paths, T, K, p), within_variance (paths, T, K, p), and the truth:
    mean, standard_deviation (T, K, p), alpha, beta, sigma, A, B (T,), drift. `local-elasticity estimate` reads it.

    Returns:
        The numbers.
    """
    from local_elasticity.lesde import exact
    from local_elasticity.report.figures import save
    from local_elasticity.report.sde import paths_figure, separability_figure
    from local_elasticity.runs.provenance import git_revision, versions

    model, t = build(settings), save_points(settings)
    for rate in (model.alpha, model.beta, model.noise.variance):
        rate(t)  # refuse what is not finite before anything is written
    _prepare(out, overwrite)
    on = None if settings.device == "cpu" else settings.device
    drawn = model.sample(
        t,
        settings.samples_per_class,
        settings.paths,
        settings.seed,
        method=settings.method,  # pyright: ignore[reportArgumentType]
        keep="statistics",
        step=settings.step,
        device=on,
        progress=progress,
    )
    means, within = (
        x.cpu().numpy() if on is not None else np.ascontiguousarray(x)
        for x in (drawn.class_means, drawn.within_variance)
    )
    mean, shape = model.mean(t), (t.size, model.n_classes, model.n_features)
    diagonal = np.einsum("tii->ti", model.covariance(t, settings.samples_per_class)).reshape(shape)
    spread = np.sqrt(diagonal.clip(min=0))
    a, b, _ = exact.integral(model, t)
    looks = t[np.unique(np.linspace(1, t.size - 1, min(15, t.size - 1)).round().astype(int))]
    found = model.separability(
        looks, settings.samples_per_class, settings.separability_paths, settings.seed, progress=progress
    )
    collapse = model.collapse(t[1:])
    np.savez_compressed(
        out / ARRAYS,
        t=t,
        class_means=means,
        within_variance=within,
        n_per_class=settings.samples_per_class,
        mean=mean,
        standard_deviation=spread,
        alpha=model.alpha(t),
        beta=model.beta(t),
        sigma=np.sqrt(model.noise.variance(t)),
        A=a,
        B=b,
        drift=settings.drift,
        separability_t=found.t,
        separability=found.probability,
        separability_low=found.low,
        separability_high=found.high,
    )
    words = f"{settings.drift} drift · alpha = {settings.alpha} · beta = {settings.beta} · sigma = {settings.sigma}"
    figures = save(paths_figure(t, means, mean, spread, detail=words), out / "figures", "paths")
    figures += save(separability_figure(found), out / "figures", "separability")
    standard_error = spread[-1] / np.sqrt(settings.paths)
    z = np.abs(means[:, -1].mean(axis=0) - mean[-1]) / np.where(standard_error > 0, standard_error, np.inf)
    numbers = {
        "A": float(a[-1]),
        "B": float(b[-1]),
        "mean_at_end": mean[-1].tolist(),
        "largest_z_of_sampled_mean": float(z.max()),
        "separable_at_end": float(found.probability[-1]),
        "separable_interval": [float(found.low[-1]), float(found.high[-1])],
        "limit": found.theory.limit,
        "limit_reason": found.theory.reason,
        "log_ratio_at_end": float(found.theory.log_ratio[-1]),
        "pairs_decided_by_projection": f"{found.n_fast} of {found.n_pairs}",
        "nc1_at_end": float(collapse.nc1[-1]),
        "cosine_deviation_at_end": float(collapse.cosine_deviation[-1]),
        "collapse": collapse.reason,
        "figures": [str(path) for path in figures if path.suffix == ".png"],
    }
    (out / NUMBERS).write_text(json.dumps(numbers, indent=2))
    note = {"kind": "lesde simulation", **asdict(settings), "versions": versions(), "git": git_revision()}
    (out / NOTE).write_text(json.dumps(note, indent=2))
    return numbers


def _prepare(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(expected="a folder", got=f"a file, {out}", do="choose another --out")
    there = list(out.iterdir()) if out.exists() else []
    if there and not (overwrite and (out / ARRAYS).exists()):
        raise InputError(
            expected="an empty folder",
            got=f"something in {out}",
            do="choose another --out, or --overwrite an earlier simulation",
        )
    out.mkdir(parents=True, exist_ok=True)
