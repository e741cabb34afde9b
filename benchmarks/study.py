"""Benchmark: the image study: what its time goes to, tracking over its floor, and two processes over one.

The floor of a snapshot is what no implementation can avoid: for every source one forward and backward pass, and for
every source one forward pass of all targets. Two processes run the same independent runs as one, one thread each.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import local_elasticity as le
from local_elasticity.base.parallel import Workers, one_thread
from local_elasticity.studies import STUDIES
from local_elasticity.studies.dan2023 import images as dan2023_images
from local_elasticity.studies.dan2023.images import PROBE, Scale

TRACKING_BOUND = 1.3
PARALLEL_BOUND = 1.6


def floor_seconds(repeats: int, probes_per_class: int) -> float:
    """The bare passes of one snapshot with one probe step, the best of some repeats."""
    torch.manual_seed(0)
    model = le.networks.resnet18_plain(3)
    n = 3 * probes_per_class
    x, y = torch.randn(n, 3, 32, 32), torch.arange(n) % 3
    parameters = list(model.parameters())
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for source in range(n):
            loss = torch.nn.functional.cross_entropy(model(x[source : source + 1]), y[source : source + 1])
            torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                model(x)
        best = min(best, time.perf_counter() - started)
    return best


def look_seconds(repeats: int, probes_per_class: int) -> float:
    """One snapshot of the tracker with the published probe and all definitions, the best of some."""
    torch.manual_seed(0)
    model = le.networks.resnet18_plain(3)
    n = 3 * probes_per_class
    probes = (torch.randn(n, 3, 32, 32), torch.arange(n).sort().values % 3)
    tracker = le.Tracker(
        model,
        torch.nn.functional.cross_entropy,
        probes,
        update={PROBE: le.Adam(lr=1e-4)},
        definitions=dan2023_images.DEFINITIONS,
        route="step",
        check_pairs=0,
    )
    return min(tracker.snapshot().seconds for _ in range(repeats))


def update_seconds(repeats: int, batch: int = 256) -> float:
    """One update of training at the published batch size, the best of some."""
    torch.manual_seed(0)
    model = le.networks.resnet18_plain(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-4)
    x, y = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 3
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        best = min(best, time.perf_counter() - started)
    return best


def study_of(size: Scale, out: Path, workers: Workers) -> tuple[float, list[dict[str, Any]]]:
    """Wall seconds of the study with the published probe alone, and the records of its runs."""
    records: list[dict[str, Any]] = []
    study = replace(
        STUDIES["dan2023-cifar10"],
        probes=(PROBE,),
        report=lambda this, found, *_: records.extend(r for one in found for r in one.records) or 0,
    )
    started = time.perf_counter()
    study.run_at(size, "paper", out, workers=workers)
    return time.perf_counter() - started, records


def main(quick: bool = False, out: Path | None = None) -> int:
    """Print the table; 1 when a bound is missed."""
    per_class, epochs, every = (100, 1, 9) if quick else (500, 1, 9)
    size = Scale(per_class, 25, epochs, 2, probes_per_class=5 if quick else 20, every=every, test_per_class=50)
    console = Console(record=True, width=110)
    place = Path(tempfile.mkdtemp())
    try:
        with one_thread():
            least = floor_seconds(2 if quick else 3, size.probes_per_class)
            ours = look_seconds(2 if quick else 3, size.probes_per_class)
            update = update_seconds(2)
        # Warm workers first: what starting a process costs is paid once, not by every study.
        study_of(replace(size, per_class=9, batch_size=9, probes_per_class=1), place / "warm", Workers("loky", 2))
        two, _ = study_of(size, place / "two", Workers("loky", 2))
        one, records = study_of(size, place / "one", Workers("loky", 1))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    spent: dict[str, float] = {}
    for record in records:
        for name, seconds in record["seconds"].items():
            spent[name] = spent.get(name, 0.0) + seconds
    total = sum(spent.values())
    looks = sum(record["looks"] for record in records)
    rows = [
        ("a snapshot over its floor", ours, least, ours / least, f"≤ {TRACKING_BOUND}", ours / least <= TRACKING_BOUND),
        ("two processes over one", two, one, one / two, f"≥ {PARALLEL_BOUND}", one / two >= PARALLEL_BOUND),
    ]
    table = Table(title=f"dan2023-cifar10, {per_class} images a class, {size.runs} runs, probe {PROBE}")
    for heading in ("what", "ours", "beside", "ratio", "bound", "verdict"):
        table.add_column(heading)
    for what, mine, beside, ratio, bound, good in rows:
        table.add_row(what, f"{mine:.2f} s", f"{beside:.2f} s", f"{ratio:.2f}", bound, "holds" if good else "missed")
    console.print(table)
    console.print(
        f"one process: {one:.1f} s for {looks} snapshots; "
        + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in spent.items())
        + f", waiting {max(0.0, one - total) / one:.0%} of the wall"
    )
    training, tracking = 3 * 406 * update, 3 * 49 * ours * (20 / size.probes_per_class) ** 2
    console.print(
        f"at the published size (3 runs of 406 updates of 256 images, 49 snapshots of 60 probes each), from these: "
        f"{(training + tracking) / 60:.0f} min in one process, training {training / (training + tracking):.0%}, "
        f"tracking {tracking / (training + tracking):.0%}"
    )
    if out is not None:
        out.write_text(console.export_text())
    return int(not all(row[-1] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
