"""Time one snapshot of the published protocol beside the plain loop and beside the bare passes it cannot do without.

ResNet-18 without normalisation, 3 classes x 20 probes, all 9 ordered class pairs, a fresh Adam step of 1e-4 on the
cross-entropy of one source at a time, 32x32 images. The images are random numbers: time and memory do not depend on
what they show.

Run it as ``local-elasticity bench snapshot`` or ``python benchmarks/snapshot.py [--repeats 3] [--quick] [--out FILE]``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import local_elasticity
from local_elasticity.base.errors import NoiseWarning
from local_elasticity.impact import Impact, measure
from local_elasticity.impact.update import Adam
from local_elasticity.networks import MLP, resnet18_plain
from local_elasticity.training import Tracker, budget
from tables.comparison import Row, machine, report

N_CLASSES, PER_CLASS, LR, BATCH = 3, 20, 1e-4, 25
N_PROBES = N_CLASSES * PER_CLASS
N_COPIES = N_CLASSES * N_PROBES  # the plain loop makes one for each source of each ordered class pair
LEAST_SPEEDUP, MOST_OVER_FLOOR, MOST_COPIES = 8.0, 1.25, 3.0
MOST_OVERHEAD = 0.06
MIB = 2**20


HEADINGS = ("phase", "median s", "min s", "ratio (of mins)", "bound", "verdict")


# --- the three ways ----------------------------------------------------------------------------------------------


def make_probes() -> tuple[Tensor, Tensor]:
    """Random images and their labels, class after class."""
    labels = torch.arange(N_CLASSES).repeat_interleave(PER_CLASS)
    return torch.randn(N_PROBES, 3, 32, 32), labels


def published(model: nn.Module, x: Tensor, y: Tensor, n_copies: int = N_COPIES) -> Tensor:
    """Do what the published loop does; returns the targets' outputs after each step (copies, targets, classes).

    Every ordered class pair is gone through on its own: for each source forward passes before, a new model with the
    weights loaded, a new Adam, one step, forward passes after. The targets go in one batch and the forward passes keep
    no graph, which favours this loop.
    """
    looked: list[Tensor] = []
    groups = [torch.nonzero(y == c).flatten() for c in range(N_CLASSES)]
    pairs = [(sources, targets) for sources in groups for targets in groups]
    for source, targets in ((int(s), targets) for sources, targets in pairs for s in sources):
        if len(looked) == n_copies:
            break
        with torch.no_grad():
            model(x[source : source + 1]), model(x[targets])
        copy = resnet18_plain(N_CLASSES)
        copy.load_state_dict(model.state_dict())
        optimizer = torch.optim.Adam(copy.parameters(), lr=LR)
        optimizer.zero_grad()
        cross_entropy(copy(x[source : source + 1]), y[source : source + 1]).backward()
        optimizer.step()
        with torch.no_grad():
            copy(x[source : source + 1])
            looked.append(copy(x[targets]))
    return torch.stack(looked)


def ours(model: nn.Module, x: Tensor, y: Tensor) -> Impact:
    """Measure with the defaults, the check against the first-order change included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseWarning)  # random images: what is measured is of no interest here
        return measure(model, cross_entropy, (x, y), update=Adam(LR))


def floor(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The passes that no exact method can leave out, and nothing else; writes into the model's weights."""
    parameters = list(model.parameters())
    for source in range(N_PROBES):
        loss = cross_entropy(model(x[source : source + 1]), y[source : source + 1])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=-1e-12)  # costs what any step costs, and keeps the weights sane
            model(x)


# --- memory, in a process of its own -----------------------------------------------------------------------------


def peak_bytes() -> int:
    """The highest resident memory of this process so far.

    Linux carries the parent's peak over into the child's ``ru_maxrss``, hence ``VmHWM`` where there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_child() -> None:
    """Train for two steps (the second has activations and Adam's state at once), measure, print the rise as JSON."""
    torch.manual_seed(0)
    model = resnet18_plain(N_CLASSES)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    x, y = make_probes()
    for start in (0, BATCH):
        optimizer.zero_grad()
        cross_entropy(model(x[start : start + BATCH]), y[start : start + BATCH]).backward()
        optimizer.step()
    training = peak_bytes()
    impact = ours(model, x, y)
    found = {
        "training": training,
        "rise": peak_bytes() - training,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "after": impact.after.numel() * impact.after.element_size(),
    }
    print(json.dumps(found))


def memory_row() -> Row:
    """The rise of peak memory over training's own, in copies of the parameters."""
    source = str(Path(local_elasticity.__file__).resolve().parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--memory-child", str(torch.get_num_threads())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return Row("memory over training's", "unknown", bound=f"<= {MOST_COPIES:g} copies", holds=False)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Row(
        "memory over training's",
        f"{found['rise'] / MIB:.0f} MiB",
        ratio=f"{(found['rise'] - found['after']) / found['weights']:.2f} copies",
        bound=f"<= {MOST_COPIES:g} copies",
        holds=found["rise"] <= MOST_COPIES * found["weights"] + found["after"],
    )


# --- a budget of time, kept ---------------------------------------------------------------------------------------


def budget_row(fraction: float = 0.05, snapshots: int = 100) -> Row:
    """Overhead of a tracker on a budget, in a loop that trains for as long as so many snapshots cost.

    All time inside the tracker's calls counts, whether it looked or not, over all time outside.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseWarning)
        torch.manual_seed(0)
        model, (x, y) = MLP(3 * 32 * 32, N_CLASSES, width=64), make_probes()
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        pilot = Tracker(model, cross_entropy, (x, y), update=Adam(LR))
        cost = min(pilot.snapshot().seconds for _ in range(3))
        tracker = Tracker(model, cross_entropy, (x, y), update=Adam(LR), schedule=budget(fraction))
        inside, started = 0.0, time.perf_counter()
        while time.perf_counter() - started < snapshots * cost:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            before = time.perf_counter()
            tracker.step()
            inside += time.perf_counter() - before
        overhead = inside / (time.perf_counter() - started - inside)
        looks = tracker.finish().dataset.sizes.get("step", 0)
    return Row(
        f"budget({fraction:g}), run of {snapshots} snapshots' cost",
        f"{looks} looks",
        ratio=f"{overhead:.1%}",
        bound=f"<= {MOST_OVERHEAD:.0%}",
        holds=looks > 0 and overhead <= MOST_OVERHEAD,
    )


# --- the comparison ----------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio_text(one: list[float], other: list[float]) -> str:
    return f"{statistics.median(one) / statistics.median(other):.2f} ({min(one) / min(other):.2f})"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def difference(model: nn.Module, looked: Tensor, impact: Impact) -> float:
    """How far the plain loop's changes of the outputs are from ours, over their size."""
    after = looked.view(N_CLASSES, N_CLASSES, PER_CLASS, PER_CLASS, -1).transpose(1, 2).reshape(impact.after.shape)
    change = after - impact.before
    return float((change - impact.change).norm() / change.norm())


def main(repeats: int = 3, quick: bool = False, out: Path | None = None) -> int:
    """Run the comparison and print it.

    Args:
        repeats: rounds of floor and ours, interleaved.
        quick: the plain loop once rather than twice.
        out: also write the table here, as markdown.

    Returns:
        0 where every bound holds, 1 where one does not.
    """
    repeats = max(1, repeats)
    console = Console(soft_wrap=True)
    facts = machine(processor())
    console.print(facts, highlight=False)
    console.print("peak memory, in a process of its own ...", style="dim")
    memory = memory_row()  # first: this process is small yet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, spare = resnet18_plain(N_CLASSES), resnet18_plain(N_CLASSES)
        spare.load_state_dict(model.state_dict())
        x, y = make_probes()
        console.print(f"warm-up, then {repeats} rounds of floor and ours ...", style="dim")
        floor(spare, x, y)
        impact = ours(model, x, y)
        bare, mine, plain = Row("floor: bare passes (d)"), Row("ours: measure() (b)"), Row("plain loop (a)")
        ways = [(bare, lambda: floor(spare, x, y)), (mine, lambda: ours(model, x, y))]
        for turn in range(repeats):
            for row, work in ways if turn % 2 == 0 else ways[::-1]:
                row.seconds.append(seconds(work))
        published(model, x, y, 1)
        expected = seconds(lambda: published(model, x, y, 3)) / 3 * N_COPIES
        looked = torch.empty(0)
        for turn in range(1 if quick else 2):
            again = " again" if turn else ""
            console.print(f"the plain loop{again}, {N_COPIES} copies, about {expected:.0f} s ...", style="dim")
            started = time.perf_counter()
            looked = published(model, x, y)
            plain.seconds.append(time.perf_counter() - started)

    speedup = statistics.median(plain.seconds) / statistics.median(mine.seconds)
    over_floor = statistics.median(mine.seconds) / statistics.median(bare.seconds)
    rows = [
        bare,
        mine,
        plain,
        Row(
            "plain loop / ours",
            ratio=ratio_text(plain.seconds, mine.seconds),
            bound=f">= {LEAST_SPEEDUP:g}",
            holds=speedup >= LEAST_SPEEDUP,
        ),
        Row(
            "ours / floor",
            ratio=ratio_text(mine.seconds, bare.seconds),
            bound=f"<= {MOST_OVER_FLOOR:g}",
            holds=over_floor <= MOST_OVER_FLOOR,
        ),
        memory,
        budget_row(),
    ]
    note = (
        f"One snapshot: ResNet-18 plain, {N_CLASSES} classes x {PER_CLASS} probes, {N_CLASSES**2} ordered class pairs, "
        f"fresh Adam {LR:g}, cross-entropy, random 32x32 images. Ours by route {impact.plan.route!r}, check included. "
        f"Verdicts go by medians ({repeats} rounds; the plain loop {len(plain.seconds)}). "
        f"The plain loop's changes differ from ours by {difference(model, looked, impact):.1e} of their size. "
        "Memory: the rise of the peak of two training steps (batch 25, Adam) while measuring, in a process of its own, "
        "less `after`, in copies of the parameters. Budget: a small MLP; "
        "all time inside the tracker over all time outside."
    )
    cells = [replace(row, digits=".2f").cells() for row in rows]
    return report(console, [("", HEADINGS, cells)], [note, facts], out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory-child"]:
        torch.set_num_threads(int(sys.argv[2]))
        memory_child()
        sys.exit(0)
    parser = argparse.ArgumentParser(description="Time one snapshot beside the plain loop and the bare passes.")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of floor and ours (default 3)")
    parser.add_argument("--quick", action="store_true", help="the plain loop once rather than twice")
    parser.add_argument("--out", type=Path, help="also write the table here, as markdown")
    arguments = parser.parse_args()
    sys.exit(main(arguments.repeats, arguments.quick, arguments.out))
