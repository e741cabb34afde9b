"""Time the ridge study's published S_rel beside ours: a matrix exponential for each cell, or one eigh.

20 pairs x 10 starts x 8,001 times, p = 100, two classes of 1,000 samples (spec srel 3.2). The notebook's loop calls
``expm`` for both weight vectors at every (pair, start, time); it is timed on a few times and scaled. In between: one
``expm`` a time that all pairs, starts and classes share. Ours: ``RidgeClassifierFlow(published=True)``.

Run it as ``local-elasticity bench flows`` or ``python benchmarks/flows.py [--quick] [--out FILE]``.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy
from rich.console import Console
from scipy import linalg

from local_elasticity.flows import RidgeClassifierFlow
from local_elasticity.studies.dan2023.ridge import RIDGE
from tables.comparison import report

P, LAST, N_TIMED = 100, 8000, 50
LEAST_SPEEDUP, MOST_DIFFERENCE = 200.0, 1e-10
HEADINGS = ("way", "CPU s", "ratio to ours", "bound", "verdict")


class Problem:
    """Features, pairs and starts of the study, and what the loops precompute."""

    def __init__(self) -> None:
        self.features, self.starts = RIDGE._draw(P, np.random.RandomState(RIDGE.seed))
        n_k, self.n = RIDGE.per_class, len(self.features)
        rng = np.random.default_rng(0)
        self.x = self.features[n_k + rng.choice(n_k, RIDGE.pairs, replace=False)]
        self.x_prime = self.features[rng.choice(n_k, RIDGE.pairs, replace=False)]
        self.rho = self.n * RIDGE.penalty / 2
        self.matrix = self.rho * np.eye(P) + self.features.T @ self.features / self.n
        self.sums = np.stack([self.features[:n_k].sum(0), self.features[n_k:].sum(0)]) / self.n

    def ratio(self, w: np.ndarray, pair: int) -> float:
        """The published formula for one pair (class 1 sampled) at weights (2, p)."""
        h, g = self.x[pair], self.x_prime[pair]
        tilted = self.rho * g + h * (h @ g) / self.n
        inner, square = h @ g, h @ h
        scale = self.rho + square
        num = inner**2 - 2 * inner * (w[1] @ tilted) + (w[1] @ tilted) ** 2 + (w[0] @ tilted) ** 2
        den = square**2 - 2 * square * scale * (w[1] @ h) + scale**2 * ((w[1] @ h) ** 2 + (w[0] @ h) ** 2)
        return float(np.sqrt(num / den))


def published(problem: Problem, cells: list[tuple[int, int, float]]) -> np.ndarray:
    """What the notebook does for each (pair, start, time): an inverse and an exponential for each weight vector."""
    out = np.empty(len(cells))
    for i, (pair, start, t) in enumerate(cells):
        w = []
        for k in (0, 1):
            limit = linalg.inv(problem.matrix) @ problem.sums[k]
            decay = linalg.expm(-(RIDGE.theta**2) * t * problem.matrix)
            w.append(decay @ (problem.starts[pair, start, k] - limit) + limit)
        out[i] = problem.ratio(np.array(w), pair)
    return out


def shared(problem: Problem, times: np.ndarray) -> np.ndarray:
    """One exponential a time for all pairs, starts and classes: (T, pairs, starts).

    Numerator and denominator as sums of squares: the published expansion loses ten digits where they are nearly 0.
    """
    limit = linalg.solve(problem.matrix, problem.sums.T, assume_a="pos").T
    out = np.empty((len(times), RIDGE.pairs, RIDGE.starts))
    h, g, n, rho = problem.x, problem.x_prime, problem.n, problem.rho
    inner, square = ((h * v).sum(-1)[:, None, None] for v in (g, h))
    label = np.array([0.0, 1.0])
    for i, t in enumerate(times):
        w = (problem.starts - limit) @ linalg.expm(-(RIDGE.theta**2) * t * problem.matrix) + limit
        at_x, at_target = (np.einsum("abkp,ap->abk", w, v) for v in (h, g))
        num = (((at_x / n - label) * inner + rho * at_target) ** 2).sum(-1)
        out[i] = np.sqrt(num / (((at_x - label) * square + rho * at_x) ** 2).sum(-1))
    return out


def ours(problem: Problem, times: np.ndarray) -> np.ndarray:
    """All pairs, starts and times: (T, pairs, starts)."""
    labels = np.arange(2).repeat(RIDGE.per_class)
    flow = RidgeClassifierFlow(problem.features, labels, RIDGE.penalty, RIDGE.theta, problem.starts[0], published=True)
    out = []
    for x, x_prime, start in zip(problem.x, problem.x_prime, problem.starts, strict=True):
        out.append(flow.restarted(start).s_rel(times, x, x_prime, 1))  # every pair has starts of its own
    return np.stack(out, axis=1)


def cpu(work) -> tuple[float, object]:
    """CPU seconds of this process, and the result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def main(quick: bool = False, out: Path | None = None) -> int:
    """Run the comparison and print it.

    Args:
        quick: fewer of the notebook's cells.
        out: also write the table here, as markdown.

    Returns:
        0 where every bound holds, 1 where one does not.
    """
    console = Console(soft_wrap=True)
    facts = f"numpy {np.__version__}, scipy {scipy.__version__}, {os.cpu_count()} processors, {platform.platform()}"
    console.print(facts, highlight=False)
    problem = Problem()
    times = np.arange(LAST + 1.0)
    some = np.linspace(0, LAST, 5 if quick else N_TIMED).round()
    cells = [(i % RIDGE.pairs, i % RIDGE.starts, t) for i, t in enumerate(some)]
    total = RIDGE.pairs * RIDGE.starts * len(times)
    ours(problem, times[:10])
    runs = [cpu(lambda: ours(problem, times)) for _ in range(1 if quick else 3)]
    mine, s = min(r[0] for r in runs), np.asarray(runs[0][1])
    published(problem, cells[:1])
    loop, looked = cpu(lambda: published(problem, cells))
    loop = loop / len(cells) * total
    between, together = cpu(lambda: shared(problem, some))
    between = between / len(some) * len(times)
    at = some.astype(int)
    mirrored = np.array([s[int(t), pair, start] for pair, start, t in cells])
    gap = max(
        float(np.max(np.abs(np.asarray(looked) / mirrored - 1))),
        float(np.max(np.abs(np.asarray(together) / s[at] - 1))),
    )
    rows = [
        ("notebook's loop, one expm a weight vector", f"{loop:.0f}", f"{loop / mine:.0f}", "", ""),
        ("one expm a time, shared", f"{between:.1f}", f"{between / mine:.1f}", "", ""),
        ("ours: one eigendecomposition", f"{mine:.2f}", "1", "", ""),
        ("loop / ours", "", f"{loop / mine:.0f}", f">= {LEAST_SPEEDUP:g}", _verdict(loop / mine >= LEAST_SPEEDUP)),
        ("largest relative difference", "", f"{gap:.1e}", f"<= {MOST_DIFFERENCE:g}", _verdict(gap <= MOST_DIFFERENCE)),
    ]
    note = (
        f"{RIDGE.pairs} pairs x {RIDGE.starts} starts x {len(times)} times, p = {P}. The loop was timed on "
        f"{len(cells)} of {total} cells and scaled, the shared exponentials on {len(some)} times; ours in full, best "
        f"of {len(runs)}."
    )
    return report(console, [("", HEADINGS, rows)], [note, facts], out)


def _verdict(holds: bool) -> str:
    return "holds" if holds else "FAILS"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the published ridge computation beside ours.")
    parser.add_argument("--quick", action="store_true", help="fewer of the notebook's cells")
    parser.add_argument("--out", type=Path, help="also write the table here, as markdown")
    arguments = parser.parse_args()
    sys.exit(main(arguments.quick, arguments.out))
