"""Neural collapse: NC1 beside the D x D pseudo-inverse, and all layers of ResNet-18 beside the bare forward pass.

Run it as ``local-elasticity bench collapse`` or ``python benchmarks/collapse.py [--repeats 3] [--quick] [--out FILE]``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from local_elasticity.collapse import NeuralCollapse, layer_metrics, metrics, weighted_layers
from local_elasticity.networks import resnet18_batchnorm, resnet18_plain
from tables.comparison import Row, machine, report

DIM, N_CLASSES, N_SAMPLES = 2048, 100, 4000
PER_CLASS, PROBE_CLASSES = 20, 3
LEAST_SPEEDUP, MOST_DIFFERENCE, MOST_OVER_FORWARD = 20.0, 1e-6, 1.2
HEADINGS = ("phase", "median CPU s", "min CPU s", "ratio (of mins)", "bound", "verdict")


def compare(ways: list[tuple[Row, Callable[[], object]]], repeats: int, warm_up: int = 1) -> None:
    """Interleaved rounds of CPU seconds, after those that do not count."""
    for turn in range(repeats + warm_up):
        for row, work in ways if turn % 2 else ways[::-1]:
            started = time.process_time()
            work()
            if turn >= warm_up:
                row.seconds.append(time.process_time() - started)


def ratio(one: Row, other: Row) -> tuple[float, str]:
    """Of the medians, and in words with that of the minima."""
    middle = statistics.median(one.seconds) / statistics.median(other.seconds)
    return middle, f"{middle:.3g} ({min(one.seconds) / min(other.seconds):.3g})"


# --- NC1 -----------------------------------------------------------------------------------------------------------


def clusters() -> tuple[Tensor, Tensor]:
    """Features (samples, D) of K classes in float64, with a spread that no axis shares with another."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N_CLASSES).repeat(N_SAMPLES // N_CLASSES)
    means = torch.randn(N_CLASSES, DIM, generator=generator, dtype=torch.float64)
    scales = torch.rand(DIM, generator=generator, dtype=torch.float64) + 0.5
    return means[labels] + torch.randn(N_SAMPLES, DIM, generator=generator, dtype=torch.float64) * scales, labels


def plain_nc1(within: Tensor, means: Tensor) -> float:
    """NC1 as it is written: the D x D between-class covariance, its pseudo-inverse, the trace of a D x D product."""
    centred = means - means.mean(dim=0)
    between = centred.T @ centred / len(means)
    return float(torch.trace(within @ torch.linalg.pinv(between)) / len(means))


def nc1_rows(repeats: int) -> list[Row]:
    """The D x D pseudo-inverse and ours, from the same sums; and ours from the features themselves."""
    x, y = clusters()
    state = NeuralCollapse(N_CLASSES, DIM)
    state.update(x, y)
    within, means = state.within(), state.means()
    plain, symmetric = Row("NC1 by the D x D pseudo-inverse (a)"), Row("NC1 by D x D eigenvalues")
    ours, svd, whole = (
        Row("all of NC1 and NC2, ours (b)"),
        Row("the same, NC1 by the thin SVD"),
        Row("the same from the features, ours"),
    )
    values: list[float] = []
    # The slow ones need no warm-up: they take seconds.
    compare(
        [(plain, lambda: values.append(plain_nc1(within, means))), (symmetric, lambda: state.compute(form="pinv"))],
        repeats,
        0,
    )
    fast = [(ours, state.compute), (svd, lambda: state.compute(form="svd")), (whole, lambda: metrics(x, y))]
    compare(fast, 3 * repeats, 1)
    speedup, words = ratio(plain, ours)
    found = (state.compute()["nc1"], state.compute(form="svd")["nc1"], metrics(x, y)["nc1"])
    difference = max(abs(value / values[0] - 1) for value in found)
    return [
        plain,
        symmetric,
        ours,
        svd,
        whole,
        Row("(a) / (b)", ratio=words, bound=f">= {LEAST_SPEEDUP:g}", holds=speedup >= LEAST_SPEEDUP),
        Row(
            "largest relative difference of NC1",
            f"{difference:.1e}",
            bound=f"<= {MOST_DIFFERENCE:g}",
            holds=difference <= MOST_DIFFERENCE,
        ),
    ]


# --- all layers of a network ---------------------------------------------------------------------------------------


def layers_rows(name: str, model: nn.Module, repeats: int) -> list[Row]:
    """The forward pass over the probes with the metrics of every layer, beside the bare one."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(PROBE_CLASSES).repeat_interleave(PER_CLASS)
    x = torch.randn(len(y), 3, 32, 32, generator=generator)
    layers = weighted_layers(model)

    def bare() -> Tensor:
        with torch.no_grad():
            return model(x)

    forward = Row(f"{name}: bare forward pass")
    ours = Row(f"{name}: with NC of {len(layers)} layers")
    compare([(forward, bare), (ours, lambda: layer_metrics(model, x, y, layers))], repeats)
    value, words = ratio(ours, forward)
    bound = f"<= {MOST_OVER_FORWARD:g}"
    return [forward, ours, Row(f"{name}: ratio", ratio=words, bound=bound, holds=value <= MOST_OVER_FORWARD)]


def main(quick: bool = False, out: Path | None = None, repeats: int = 3) -> int:
    """Run the comparison and print it.

    Args:
        quick: fewer rounds.
        out: also write the table here, as markdown.
        repeats: rounds, interleaved.

    Returns:
        0 where every bound holds, 1 where one does not.
    """
    repeats = 1 if quick else max(1, repeats)
    console = Console(soft_wrap=True)
    facts = machine()
    console.print(facts, highlight=False)
    console.print(f"NC1 at D = {DIM}, K = {N_CLASSES}, {repeats} rounds ...", style="dim")
    rows = nc1_rows(repeats)
    console.print(f"every layer of ResNet-18, {5 * repeats} rounds ...", style="dim")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks = {"ResNet-18 plain": resnet18_plain, "ResNet-18 with BatchNorm": resnet18_batchnorm}
        for name, build in networks.items():
            rows += layers_rows(name, build(PROBE_CLASSES).eval(), 5 * repeats)
    note = (
        f"NC1: float64, D = {DIM}, K = {N_CLASSES}, {N_SAMPLES} samples; all but the last start from the same class "
        "means and within-class sums. Layers: the outputs of every layer with weights, convolutions averaged over "
        f"positions, {PROBE_CLASSES} x {PER_CLASS} probes of 32x32, eval mode, no gradients; the bound is on one "
        "forward pass with all metrics over one bare forward pass. CPU seconds of the process; "
        f"verdicts go by medians of {repeats} rounds (a), {3 * repeats} (b) and {5 * repeats} (layers), interleaved."
    )
    return report(console, [("", HEADINGS, [row.cells() for row in rows])], [note, facts], out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time NC1 beside the pseudo-inverse, layers beside passes.")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--out", type=Path, help="also write the table here, as markdown")
    arguments = parser.parse_args()
    sys.exit(main(arguments.quick, arguments.out, arguments.repeats))
