"""Time the estimation of the LE-SDE from 100 trials x 10,000 steps x 3 classes, and count how often intervals cover.

Verdicts on time go by CPU seconds, all threads together: other work on the machine does not change them much.

Run it as ``local-elasticity bench estimation``, or ``python benchmarks/estimation.py [--quick] [--out FILE]``.
``estimation_rows`` and ``coverage_rows`` give its two halves.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.stats import binomtest

import local_elasticity as le
from local_elasticity.lesde.estimation.observations import observe
from tables.comparison import VERDICTS, report

STEPS, TRIALS, DRAWS, MOST_SECONDS = 10_000, 100, 200, 1.0
LEAST, MOST = 0.90, 0.99  # coverage of 95 % intervals that is called right
HEADINGS = ("what", "seen", "ratio to ours", "bound", "verdict")
START = np.array([[1.6, -0.8, -0.8], [-0.3, 0.6, -0.3], [-0.2, -0.7, 0.9]])
Row = tuple[str, str, str, str, bool | None]


def record(model: str, t: np.ndarray, trials: int, sd: float, logs: bool, seed: int = 0) -> tuple[dict, np.ndarray]:
    """Trials that stay where they started relative to their mean, and are seen with noise; the true A and B too."""
    rng = np.random.default_rng(seed)
    tau = t[-1] / 4
    X0 = START + (model == "isotropic") * np.arange(3) / 2
    path = le.LESDE(lambda s: 4.5 / tau * np.exp(-s / tau), lambda s: -1.2 / tau * np.exp(-s / tau), 3, model, 0.0, X0)
    X = path.mean(t)
    truth = np.stack([4.5 * (1 - np.exp(-t / tau)), -1.2 * (1 - np.exp(-t / tau))])
    if logs:
        labels = rng.integers(0, 3, size=(len(t), trials))
        own = sd * rng.normal(size=(1, trials, 3))
        logits = X[np.arange(len(t))[:, None], labels] + own + sd * rng.normal(size=(*labels.shape, 3))
        return {"logits": logits, "labels": labels}, truth
    return {"class_means": X + sd * (rng.normal(size=(trials, 1, 3, 3)) + rng.normal(size=(trials, *X.shape)))}, truth


def quietly(work: Callable[[], object]) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", le.IdentifiabilityWarning)
        return work()


def least(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Smallest wall-clock and CPU seconds of a few rounds, after one to warm up."""
    quietly(work)
    walls, cpus = [], []
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        quietly(work)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def plain(data: dict, model: str, t: np.ndarray, draws: int) -> None:
    """What a user would write: resample the trials, average again, estimate again."""
    rng = np.random.default_rng(0)
    for _ in range(draws):
        again = rng.integers(0, TRIALS, size=TRIALS)
        drawn = {name: x[:, again] if "logits" in data else x[again] for name, x in data.items()}
        le.estimate(observe(t=t, **drawn).class_means, t, model, n_boot=0, baseline_window=1, window=151)


def estimation_rows(rounds: int = 3) -> list[Row]:
    """Seconds of an estimate with intervals from 200 draws, beside the plain loop over draws."""
    t, rows = np.arange(float(STEPS)), []
    for model in ("logits", "isotropic"):
        for logs in (True, False):
            data, _ = record(model, t, TRIALS, 0.3, logs)
            wall, cpu = least(lambda d=data, m=model: le.estimate(t=t, model=m, n_boot=DRAWS, **d), rounds)
            form = "logits and labels" if logs else "class means"
            seen = f"{wall:.2f} s ({cpu:.2f} CPU s)"
            rows.append((f"{form}, {model}, {DRAWS} draws", seen, "", f"< {MOST_SECONDS:g} CPU s", cpu < MOST_SECONDS))
            loop = least(lambda d=data, m=model: plain(d, m, t, 2), 1)[1] / 2 * DRAWS
            rows.append(("  plain loop over draws (2, scaled)", f"{loop:.1f} CPU s", f"{loop / cpu:.0f}", "", None))
    return rows


def coverage_rows(sets: int = 200) -> list[Row]:
    """How often 95 % intervals of A(T), B(T) and of averages of alpha and beta hold the truth."""
    t, rows = np.linspace(0, 600, 150), []
    stretch = (50, 100)
    for model in ("logits", "isotropic"):
        for logs in (True, False):
            hits, clear = np.zeros(4, dtype=int), []
            for seed in range(sets):
                data, truth = record(model, t, 120 if logs else 60, 0.2, logs, seed)
                fit = quietly(lambda d=data, m=model, s=seed: le.estimate(t=t, model=m, seed=s, **d))
                clear.append(min(fit.signal_to_noise.values()))
                for at, (integral, rate) in enumerate((("A", "alpha"), ("B", "beta"))):
                    low, high = fit.intervals[integral]
                    hits[at] += low[-1] <= truth[at, -1] <= high[-1]
                    first, last = stretch
                    mean = (truth[at, last] - truth[at, first]) / (t[last] - t[first])
                    found = fit.average(rate, t[first], t[last])
                    hits[2 + at] += found.low <= mean <= found.high
            form = "logits and labels" if logs else "class means"
            for name, hit in zip(("A(T)", "B(T)", "average alpha", "average beta"), hits, strict=True):
                low, high = binomtest(int(hit), sets).proportion_ci()
                seen = f"{hit / sets:.1%} [{low:.1%}, {high:.1%}]"
                what = f"{form}, {model}: {name} (S/N {min(clear):.1f} to {max(clear):.1f})"
                rows.append((what, seen, "", f"{LEAST:.0%} to {MOST:.0%}", LEAST <= hit / sets <= MOST))
    return rows


def main(quick: bool = False, out: Path | None = None) -> int:
    """Run both halves and print them.

    Args:
        quick: one round, and 50 data sets.
        out: also write the tables here, as markdown.

    Returns:
        0 where every bound holds, 1 where one does not.
    """
    console = Console(soft_wrap=True)
    sets = 50 if quick else 200
    console.print(f"estimation of {TRIALS} trials x {STEPS} steps x 3 classes, about half a minute ...", style="dim")
    parts = {"Seconds (least of a few rounds)": estimation_rows(1 if quick else 3)}
    console.print(f"coverage over {sets} data sets each, about {sets // 2} s ...", style="dim")
    parts[f"Coverage of 95 % intervals over {sets} simulated data sets, [95 %] binomial"] = coverage_rows(sets)
    tables = [(title, HEADINGS, [(*cells, VERDICTS[holds]) for *cells, holds in rows]) for title, rows in parts.items()]
    return report(console, tables, [], out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the estimation of the LE-SDE and count coverage.")
    parser.add_argument("--quick", action="store_true", help="one round, and 50 data sets")
    parser.add_argument("--out", type=Path, help="also write the tables here, as markdown")
    arguments = parser.parse_args()
    sys.exit(main(arguments.quick, arguments.out))
