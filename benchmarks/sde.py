"""Time the LE-SDE beside the authors' loop, beside torchsde and diffrax, and beside the bare normal numbers.

1. The authors' simulation, 500 trials x 10,000 steps, K = 3: their loop, written plainly here and timed on 2 trials.
2. A linear SDE of 9 dimensions, 500 paths, 10 save points: exact against Euler of 1,000 steps by torchsde and diffrax.
3. K = 10, n = 500, 100 paths, 100 save points: clouds with their statistics against drawing the same numbers.
4. Estimation from 100 trials x 10,000 steps, K = 3, with intervals (``estimation.py`` has more).

CPU seconds of one thread; verdicts go by the smallest of each. The peers live in an environment of their own
(``python -m venv peers && peers/bin/pip install torch torchsde diffrax jax``), named by --peers or by the variable
LOCAL_ELASTICITY_PEERS (its Python).

Run it as ``local-elasticity bench sde`` or ``python benchmarks/sde.py [--quick] [--out FILE] [--peers PYTHON]``.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

import local_elasticity as le
from tables.comparison import Row, machine, report

TRIALS, T = 500, 10_000
LEAST_PUBLISHED, LEAST_TORCHSDE, LEAST_DIFFRAX, MOST_OVER_FLOOR, MOST_MEMORY = 3000.0, 100.0, 30.0, 2.0, 2 * 2**30
HERE = Path(__file__).resolve().parent
HOW = (
    "python -m venv peers && peers/bin/pip install torch torchsde diffrax jax; LOCAL_ELASTICITY_PEERS=peers/bin/python"
)
HEADINGS = ("what", "median CPU s", "min CPU s", "ratio (of mins)", "bound", "verdict")


def cpu(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


# --- 1: the authors' simulation --------------------------------------------------------------------------------------


def plain_published(starts: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """The authors' loop as it is: for each trial, step, class and class an outer product and a norm."""
    trials, k, _ = starts.shape
    x = np.zeros((trials, len(alpha), k, k))
    x[:, 0] = starts
    d = np.eye(k) - 1 / k
    for trial in range(trials):
        for m in range(1, len(alpha)):
            for a in range(k):
                move = np.zeros(k)
                for b in range(k):
                    h = np.outer(d[b], d[b]) / np.linalg.norm(d[b]) ** 2
                    move += (alpha[m] if a == b else beta[m]) * h @ x[trial, m - 1, b]
                x[trial, m, a] = x[trial, m - 1, a] + move / k
    return x


def published_rows(repeats: int, console: Console) -> list[Row]:
    t = np.arange(T)
    alpha, beta = 0.02 * np.exp(-t / 2000), np.full(T, -0.002)
    sde = le.LESDE((t, alpha), (t, beta), 3, "logits", 0.0, (np.zeros((3, 3)), 1.0), kind="step")
    starts = np.random.default_rng(0).normal(size=(TRIALS, 3, 3))
    out = np.empty((TRIALS, T, 3, 3))
    ours, moments, loop = Row("ours, 500 trials"), Row("mean and sd, no trials"), Row("the authors' loop, a trial")

    def run() -> None:
        sde.sample(t, 1, TRIALS, 0, method="published", starts=starts, out=out)

    run(), sde.published_moments(t)  # the second call counts
    ours.seconds = [cpu(run) for _ in range(2 * repeats)]
    moments.seconds = [cpu(lambda: sde.published_moments(t)) for _ in range(2 * repeats)]
    console.print("the authors' loop on 2 trials, about 5 s ...", style="dim")
    plain = np.empty(0)
    for trial in range(2):
        begun = time.process_time()
        plain = plain_published(starts[trial : trial + 1], alpha, beta)
        loop.seconds.append(time.process_time() - begun)
        error = np.abs(out[trial] - plain[0]).max(axis=(1, 2)) / np.abs(plain[0]).max(axis=(1, 2))
    speedup = min(loop.seconds) * TRIALS / min(ours.seconds)
    return [
        loop,
        ours,
        moments,
        Row(
            "500 x loop / ours",
            ratio=f"{speedup:.0f}",
            bound=f">= {LEAST_PUBLISHED:g}",
            holds=speedup >= LEAST_PUBLISHED,
        ),
        Row("largest difference / largest |X|", f"{error.max():.1e}", bound="<= 1e-12", holds=error.max() <= 1e-12),
    ]


# --- 2: exact paths against Euler ------------------------------------------------------------------------------------


def peer_rows(repeats: int, peers: str | None, console: Console) -> list[Row]:
    setting = runpy.run_path(str(HERE / "peers" / "sde.py"))
    sigma, end, paths = setting["SIGMA"], setting["END"], setting["PATHS"]
    t = np.linspace(0, end, setting["SAVES"] + 1)[1:]
    sde = le.LESDE(setting["alpha"], setting["beta"], 3, "logits", sigma, setting["start"]().reshape(3, 3))
    ours = Row(f"exact, {paths} paths, {t.size} save points")

    def run() -> np.ndarray:
        return sde.sample(t, 1, paths, 0, keep="means")

    run()
    ours.seconds = [cpu(run) for _ in range(10 * repeats)]
    mean, sd = sde.mean(end).ravel(), np.sqrt(np.diag(sde.covariance(end, 1)[0]))
    rows = [ours]
    for name, least in (
        ("torchsde", LEAST_TORCHSDE),
        ("diffrax-tree", LEAST_DIFFRAX),
        ("diffrax-unsafe", LEAST_DIFFRAX),
    ):
        row = Row(f"Euler, 1,000 steps, {name}", bound=f">= {least:g}")
        rows.append(row)
        if not peers:
            row.value, row.ratio = "not installed", HOW
            continue
        console.print(f"{name}, in a process of its own ...", style="dim")
        done = subprocess.run(
            [peers, str(HERE / "peers" / "sde.py"), name, str(max(2, repeats))],
            env={**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no word"]
            row.value, row.ratio = f"not run: {last[0][:60]}", HOW
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        row.seconds = found["seconds"]
        ratio = min(row.seconds) / min(ours.seconds)
        z = np.abs((np.array(found["mean"]) - mean) / (sd / np.sqrt(paths))).max()
        row.ratio, row.holds = f"{ratio:.0f} (its mean lies {z:.1f} se from the exact one)", ratio >= least
    return rows


# --- 3: clouds against the bare normal numbers -----------------------------------------------------------------------


def cloud_rows(repeats: int, console: Console) -> list[Row]:
    k, n, paths, saves = 10, 500, 100, 100
    t = np.linspace(0, 5, saves + 1)[1:]
    start = np.eye(k, dtype=np.float32)
    sde = le.LESDE(lambda s: np.exp(-s), -0.2, k, "logits", 0.3, (start, 0.1))
    ours, floor = Row("clouds drawn, statistics kept"), Row("the same normal numbers alone")
    from local_elasticity.lesde.sample import _CHUNK

    each = max(1, _CHUNK // (k * n * k))
    buffer = torch.empty((each, k, n, k), dtype=torch.float32)

    def bare() -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(paths // each * (saves + 1)):
            buffer.normal_(generator=generator)

    def run() -> None:
        sde.sample(t, n, paths, 0, keep="statistics")

    console.print("clouds of 10 x 500 x 100 paths x 100 save points, about 10 s a turn ...", style="dim")
    before = peak_bytes()
    for _ in range(repeats):
        floor.seconds.append(cpu(bare))
        ours.seconds.append(cpu(run))
    rise = peak_bytes() - before
    ratio = min(ours.seconds) / min(floor.seconds)
    apart = Row("separability of 2 paths (90 pairs, n = 500), apart")
    apart.seconds = [cpu(lambda: sde.separability(t[-1:], n, 2, 0))]
    return [
        floor,
        ours,
        Row("ours / floor", ratio=f"{ratio:.2f}", bound=f"<= {MOST_OVER_FLOOR:g}", holds=ratio <= MOST_OVER_FLOOR),
        Row("rise of peak memory", f"{rise / 2**20:.0f} MiB", bound="< 2 GiB", holds=rise < MOST_MEMORY),
        apart,
    ]


def estimation_rows(repeats: int, console: Console) -> list[Row]:
    """4: seconds of an estimate with its intervals, beside a plain loop over the resamples."""
    console.print("estimation, about half a minute ...", style="dim")
    estimated = runpy.run_path(str(HERE / "estimation.py"))["estimation_rows"]
    return [
        Row(f"estimate: {what}", seen, [], ratio, bound, holds)
        for what, seen, ratio, bound, holds in estimated(repeats)
    ]


def peak_bytes() -> int:
    """The highest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- the comparison --------------------------------------------------------------------------------------------------


def main(quick: bool = False, out: Path | None = None, peers: str | None = None) -> int:
    """Run the comparison and print it.

    Args:
        quick: fewer repeats.
        out: also write the table here, as markdown.
        peers: the Python of an environment with torchsde and diffrax; LOCAL_ELASTICITY_PEERS by default.

    Returns:
        0 where every bound holds, those of estimation included, 1 where one does not.
    """
    console = Console(soft_wrap=True)
    peers, repeats = peers or os.environ.get("LOCAL_ELASTICITY_PEERS"), 1 if quick else 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clouds = cloud_rows(repeats, console)  # first: this process is small yet
        rows = [*published_rows(repeats, console), *peer_rows(repeats, peers, console), *clouds]
        rows += estimation_rows(repeats, console)
    finally:
        torch.set_num_threads(threads)
    facts = f"CPU seconds, one thread; numpy {np.__version__}, {machine()}"
    return report(console, [("", HEADINGS, [row.cells() for row in rows])], [facts], out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the LE-SDE beside the authors' loop, its peers and the floor.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--out", type=Path, help="also write the table here, as markdown")
    parser.add_argument("--peers", help="the Python of an environment with torchsde and diffrax")
    arguments = parser.parse_args()
    sys.exit(main(arguments.quick, arguments.out, arguments.peers))
