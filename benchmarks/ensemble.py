"""Time lock-step training beside one network in a plain PyTorch loop, and beside the published procedure.

100 replicas of SimpleConv on GeoMNIST, batches of one sample, SGD at 0.005. References: the plain loop without
validation; the published procedure (arXiv:2110.05960, utils.train), which works in float64 and evaluates 600
validation images after every step; and the floor, the same multiply-adds as batched matrix products.

All times are CPU seconds of one thread and the smallest of several interleaved repeats, so that other work on the
machine disturbs them little. Run it as ``local-elasticity bench ensemble`` or ``python benchmarks/ensemble.py``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import local_elasticity as le
from local_elasticity.networks import SimpleConv
from local_elasticity.training.lockstep.optimizers import Rule
from local_elasticity.training.lockstep.routes import Kernels, Problem, Stack

REPLICAS, CHUNK, STEPS, LR, VALIDATION = 100, 25, 10_000, 0.005, 600
LEAST_PLAIN, LEAST_PUBLISHED, MOST_DIFFERENCE, MOST_BYTES = 4.0, 400.0, 1e-12, 10**9
RATES = 10  # corruption rates of the paper, one log each
EXACT_STEPS, EXACT_REPLICAS = 300, 4


@dataclass
class Row:
    """One line of the table."""

    what: str
    value: str
    ratio: str = ""
    bound: str = ""
    holds: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """What, value, ratio, bound, verdict."""
        return self.what, self.value, self.ratio, self.bound, {None: "", True: "holds", False: "FAILS"}[self.holds]


# --- the ways to take a step ----------------------------------------------------------------------------------------


def plain_steps(model: nn.Module, x: Tensor, y: Tensor, count: int) -> None:
    """One network, as PyTorch is used, with its loss and logits logged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    log = []
    for i in torch.randint(len(x), (count,)).tolist():
        optimizer.zero_grad()
        out = model(x[i : i + 1])
        loss = cross_entropy(out, y[i : i + 1])
        loss.backward()
        optimizer.step()
        log.append((loss.item(), out.detach()))


def published_steps(model: nn.Module, x: Tensor, y: Tensor, xv: Tensor, yv: Tensor, count: int) -> None:
    """The published procedure: after every step loss and accuracy of all validation images, in one forward pass."""
    optimizer, log = torch.optim.SGD(model.parameters(), lr=LR), []
    for i in torch.randint(len(x), (count,)).tolist():
        optimizer.zero_grad()
        loss = cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            out = model(xv)
            log.append((cross_entropy(out, yv).item(), float((out.argmax(1) == yv).double().mean())))


def floor_products() -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of every matrix product of one step of one replica."""
    conv1, conv2 = (6, 25, 784), (16, 150, 100)
    linear = [(120, 400), (84, 120), (3, 84)]
    products = [conv1, (6, 784, 25), conv2, (16, 100, 150), (150, 16, 100)]
    for rows, columns in linear:
        products += [(1, columns, rows), (1, rows, columns)]
    return products


def floor_step(arrays: list[tuple[Tensor, Tensor]], updates: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """The multiply-adds of one step, as batched products and in-place rank-one updates, and nothing else."""
    for left, right in arrays:
        torch.bmm(left, right)
    for weight, left, right in updates:
        weight.addcmul_(left, right, value=-LR)


def fastest(ways: dict[str, Callable[[], None]], counts: dict[str, int], repeats: int) -> dict[str, float]:
    """Smallest CPU seconds of one call of each, divided by its count; the ways take turns."""
    best = dict.fromkeys(ways, float("inf"))
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.thread_time()
            way()
            best[name] = min(best[name], (time.thread_time() - started) / counts[name])
    return best


# --- rows -----------------------------------------------------------------------------------------------------------


def speed_rows(repeats: int) -> list[Row]:
    """The ratios that count."""
    shapes = le.data.geomnist(500, VALIDATION // 3)
    x, y, xv, yv = shapes.train[0].float(), shapes.train[1], shapes.validation[0], shapes.validation[1]
    problem = Problem(x, y, cross_entropy, Rule("sgd", LR), 1)
    chunks = [Kernels(Stack.of([SimpleConv(3) for _ in range(CHUNK)]), problem) for _ in range(REPLICAS // CHUNK)]
    one, exact = SimpleConv(3), SimpleConv(3).double()
    arrays = [(torch.randn(CHUNK, a, b), torch.randn(CHUNK, b, c)) for a, b, c in floor_products()]
    updates = [
        (torch.randn(CHUNK, a, b), torch.randn(CHUNK, a, 1), torch.randn(CHUNK, 1, b))
        for a, b in ((120, 400), (84, 120), (3, 84))
    ]
    steps, few = 3, 3

    def ours() -> None:
        index = torch.randint(len(x), (steps, REPLICAS, 1))
        for at, chunk in enumerate(chunks):
            for i in range(steps):
                outputs, losses = chunk.step(index[i, at * CHUNK : (at + 1) * CHUNK])
                outputs.numpy(), losses.numpy()

    ways = {
        "plain": lambda: plain_steps(one, x, y, 40),
        "ours": ours,
        "floor": lambda: floor_step(arrays, updates),
        "published": lambda: published_steps(exact, shapes.train[0], y, xv, yv, few),
    }
    counts = {"plain": 40, "ours": steps * REPLICAS, "floor": CHUNK, "published": few}
    best = fastest(ways, counts, repeats)
    mine, hours = best["ours"], REPLICAS * STEPS / 3600
    plain, published = best["plain"] / mine, best["published"] / mine
    return [
        Row("lock step, 100 replicas, float32", _micro(mine), "1"),
        Row(
            "plain PyTorch loop, no validation, float32",
            _micro(best["plain"]),
            f"{plain:.1f}",
            f">= {LEAST_PLAIN:g}",
            plain >= LEAST_PLAIN,
        ),
        Row(
            f"published: float64, {VALIDATION} images after every step ({few} steps timed, scaled)",
            _micro(best["published"]),
            f"{published:.0f}",
            f">= {LEAST_PUBLISHED:g}",
            published >= LEAST_PUBLISHED,
        ),
        Row("floor: the same products, nothing else", _micro(best["floor"]), f"{best['floor'] / mine:.2f}"),
        Row(
            "100 x 10,000 steps by these, CPU hours: ours, plain, published",
            " ".join(f"{best[k] * hours:.3g}" for k in ("ours", "plain", "published")),
        ),
    ]


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


def layer_rows(repeats: int) -> list[Row]:
    """Where the time of one step goes, by layer: the smallest of each call over the repeats."""
    x, y = le.data.geomnist(100, 10).train
    route = Kernels(
        Stack.of([SimpleConv(3) for _ in range(CHUNK)]), Problem(x.float(), y, cross_entropy, Rule("sgd", LR), 1)
    )
    best: dict[str, float] = {}

    def timed(owner: object, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def outer(*arguments: object, **options: object) -> object:
            started = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                best[label] = min(best.get(label, float("inf")), time.perf_counter() - started)

        setattr(owner, name, outer)

    for layer in route.layers:
        timed(layer, "forward", f"{layer.prefix} forward")
        timed(layer, "backward", f"{layer.prefix} backward, with its update")
    timed(route, "loss", "loss and its gradient")
    for _ in range(20 * repeats):
        route.step(torch.randint(len(x), (CHUNK, 1)))
    whole = sum(best.values())
    largest = sorted(best.items(), key=lambda item: -item[1])
    return [
        Row(f"  {name}", _micro(seconds / CHUNK), f"{seconds / whole:.0%} of the step") for name, seconds in largest[:9]
    ]


def equality_row() -> Row:
    """The largest difference of logits from one-by-one training, float64."""
    data = le.data.geomnist(20, 4).train
    made = []

    def make() -> nn.Module:
        made.append(SimpleConv(3).double())
        return made[-1]

    ensemble = le.train_ensemble(make, data, cross_entropy, lr=0.02, steps=EXACT_STEPS, replicas=EXACT_REPLICAS)
    worst = 0.0
    for position, model in enumerate(made):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for step, sample in enumerate(ensemble.samples[:, position].tolist()):
            out = model(data[0][sample : sample + 1])
            optimizer.zero_grad()
            cross_entropy(out, data[1][sample : sample + 1]).backward()
            optimizer.step()
            worst = max(worst, float((out.detach()[0] - torch.from_numpy(ensemble.logits[step, position])).abs().max()))
    what = f"logits against one-by-one training, {EXACT_STEPS} steps, float64"
    return Row(what, f"{worst:.1g}", "", f"<= {MOST_DIFFERENCE:g}", worst <= MOST_DIFFERENCE)


def memory_child(steps: int) -> None:
    """Train 100 replicas with a log of ``STEPS`` steps, of which some are taken; print its bytes and the peak."""
    import resource

    shapes = le.data.geomnist(500, VALIDATION // 3)
    with tempfile.TemporaryDirectory() as folder:
        le.train_ensemble(
            lambda: SimpleConv(3),
            shapes.train,
            cross_entropy,
            lr=LR,
            steps=STEPS,
            stop_at=steps,
            replicas=REPLICAS,
            dtype=torch.float32,
            validation=shapes.validation,
            validate=le.at([]),
            store=Path(folder) / "run",
        )
        arrays = sum(p.stat().st_size for p in (Path(folder) / "run" / "ensemble.zarr").rglob("*") if p.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(arrays, peak)


def memory_rows(steps: int) -> list[Row]:
    """Log on disk and peak memory, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-child", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return [Row("log and memory", "unknown", holds=False)]
    size, peak = map(int, done.stdout.split()[-2:])
    whole = size * STEPS / steps * RATES
    return [
        Row(
            f"log of {RATES} x 100 x 10,000 steps on disk (from {steps} steps, scaled)",
            f"{whole / 1e6:.0f} MB",
            bound="< 1 GB",
            holds=whole < MOST_BYTES,
        ),
        Row(
            "peak memory of 100 x 10,000 steps (the log is held whole from the start)",
            f"{peak / 1e9:.2f} GB",
            bound="< 6 GB",
            holds=peak < 6e9,
        ),
    ]


def main(quick: bool = False, out: Path | None = None) -> int:
    """Time everything, print the table; 0 when every bound holds."""
    torch.set_num_threads(1)
    repeats = 3 if quick else 12
    rows = [*speed_rows(repeats), *layer_rows(repeats), equality_row(), *memory_rows(64 if quick else 512)]
    table = Table(title=f"Lock-step training, per network-step; torch {torch.__version__}, 1 thread", box=box.SIMPLE)
    for heading in ("what", "value", "times ours", "bound", "verdict"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row.cells())
    Console(width=140).print(table)
    if out is not None:
        with out.open("w", encoding="utf-8") as file:
            Console(file=file, width=140).print(table)
    return int(any(row.holds is False for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-child", type=int)
    given = parser.parse_args()
    if given.memory_child:
        torch.set_num_threads(1)
        memory_child(given.memory_child)
        sys.exit(0)
    sys.exit(main(given.quick, given.out))
