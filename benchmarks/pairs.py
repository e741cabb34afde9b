"""Time the first-order engine beside the plain reference, peers and the floor: every pair of samples at once.

What is compared, always on the same inputs in one process (peers in a Python of their own):

- the mixed product <J_c(x'), grad L(x)> of an MLP with 1.84 M parameters, against the clone-and-step loop;
- the Gram matrix of per-sample gradients of an MLP, a small convolutional network and a ResNet-18, against
  ``vmap(grad)`` and a matrix product, and against kronfluence, captum and dattri where they are installed;
- He and Su's setting, a two-layer network of width 40,960 with 1,000 samples: seconds and memory;
- one snapshot of the published protocol with an SGD probe, against the bare passes that a finite step cannot leave out.

Seconds are of the processor (all threads together), which a busy machine disturbs less.
Peers need an environment of their own: ``--peers PYTHON`` or the variable LOCAL_ELASTICITY_PEERS.

Run it as ``local-elasticity bench pairs`` or ``python benchmarks/pairs.py [--quick] [--peers PYTHON] [--out FILE]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import local_elasticity
from local_elasticity.base.errors import NoiseWarning
from local_elasticity.impact import Impact, measure
from local_elasticity.impact.pairs.products import contract
from local_elasticity.impact.update import SGD
from local_elasticity.networks import MLP, SimpleConv, resnet18_plain
from local_elasticity.similarity.kernels import relative
from tables.comparison import VERDICTS, machine, report

MIB = 2**20
PEER_SECONDS = 120  # by the clock, warm-up and imports included
# Samples for each peer: as many as fit in 12 GB and in its time; ours is timed again with as many.
PEER_SAMPLES = {
    "MLP": {"kronfluence": 256, "captum": 512, "dattri": 64},
    "SimpleConv": {"kronfluence": 512, "captum": 512, "dattri": 512},
    "ResNet-18 plain": {"kronfluence": 64, "captum": 64, "dattri": 4},
}
PEER_ERROR = 1e-3  # relative difference from plain gradients beyond which a peer does other work
HEADINGS = ("work", "seconds", "ratio", "bound", "verdict")
HOW_TO_PEERS = (
    "peers: not installed. Make an environment for them (python -m venv peers; peers/bin/pip install torch kronfluence "
    "captum dattri; peers/bin/pip uninstall torchvision) and pass --peers peers/bin/python"
)


@dataclass
class Row:
    """One line of the table."""

    work: str
    seconds: float | None = None
    ratio: str = ""
    bound: str = ""
    holds: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        took = "" if self.seconds is None else f"{self.seconds:.3g}"
        return self.work, took, self.ratio, self.bound, VERDICTS[self.holds]


def least(row: str, one: float, other: float, bound: float | None) -> Row:
    """A row that asks for one / other >= bound, or only shows it."""
    if bound is None:
        return Row(row, None, f"{one / other:.1f}")
    return Row(row, None, f"{one / other:.1f}", f">= {bound:g}", one / other >= bound)


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """The smallest processor time of a few runs, after one that warms up."""
    work()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def quiet(*args: object, **settings: object) -> Impact:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoiseWarning)
        return measure(*args, **settings)  # type: ignore[arg-type]


# --- the mixed product -------------------------------------------------------------------------------------------


def clone_and_step(model: nn.Module, x: Tensor, y: Tensor, targets: Tensor, lr: float) -> Tensor:
    """Copy the network, take a step at each source, look at all targets; returns (sources, targets, outputs)."""
    looked = []
    with torch.no_grad():
        before = model(targets)
    for source in range(len(x)):
        stepped = copy.deepcopy(model)
        optimizer = torch.optim.SGD(stepped.parameters(), lr=lr)
        cross_entropy(stepped(x[source : source + 1]), y[source : source + 1]).backward()
        optimizer.step()
        with torch.no_grad():
            looked.append(stepped(targets) - before)
    return torch.stack(looked)


def same_sides(model: nn.Module, x: Tensor, y: Tensor, targets: Tensor, lr: float) -> Tensor:
    """(sources, targets): whether every ReLU stays on its side of 0 in the step: there is no derivative across."""

    def sides(network: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handles = [
            module.register_forward_hook(lambda _, args, out: seen.append(args[0] > 0))
            for module in network.modules()
            if isinstance(module, nn.ReLU)
        ]
        with torch.no_grad():
            network(targets)
        for handle in handles:
            handle.remove()
        return torch.cat(seen, dim=1)

    before, rows = sides(model), []
    for source in range(len(x)):
        stepped = copy.deepcopy(model)
        cross_entropy(stepped(x[source : source + 1]), y[source : source + 1]).backward()
        torch.optim.SGD(stepped.parameters(), lr=lr).step()
        rows.append((sides(stepped) == before).all(dim=1))
    return torch.stack(rows)


def mixed_product(n: int, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    model = MLP(3072, 10, depth=2, width=512).double()
    parameters = sum(p.numel() for p in model.parameters())
    x, y = torch.randn(n, 3072, dtype=torch.float64), torch.arange(n) % 10
    targets = torch.randn(n, 3072, dtype=torch.float64)
    impacts = []
    mine = cpu_seconds(
        lambda: impacts.append(measure(model, cross_entropy, (x, y), targets, update=SGD(1e-6), engine="linear")),
        repeats,
    )
    some = min(8, n)
    loop: list[Tensor] = []
    plain = cpu_seconds(lambda: loop.append(clone_and_step(model, x[:some], y[:some], targets, 1e-6)), 1) / some * n
    floor = cpu_seconds(lambda: torch.einsum("nd,md->nm", x, targets), repeats)
    impact = impacts[-1]
    difference, size = loop[-1] - impact.change[:some], loop[-1].norm()
    kept = same_sides(model, x[:some], y[:some], targets, 1e-6)
    error = float(difference[kept].norm() / loop[-1][kept].norm())
    peak = (impact.plan.peak_bytes or 0) / (2 * n * parameters * 8)
    name = f"mixed product, {n} x {n} x 10, {parameters / 1e6:.2f} M parameters, float64"
    return [
        Row(f"{name}: clone and step ({some} sources, scaled)", plain),
        Row(f"{name}: ours", mine),
        Row(f"{name}: floor, one matrix product of the inputs", floor),
        least("  clone and step / ours", plain, mine, 40 if n >= 1024 else None),
        Row("  relative error against a real step at 1e-6, all pairs", None, f"{float(difference.norm() / size):.1e}"),
        Row(
            f"  the same without the {int((~kept).sum())} of {kept.numel()} pairs in which a ReLU changes sides",
            None,
            f"{error:.1e}",
            "<= 1e-06",
            error <= 1e-6,
        ),
        Row("  memory / (samples x parameters)", None, f"{peak:.4f}", "<= 0.25", peak <= 0.25),
        estimate_row(impact, n >= 1024),
    ]


def estimate_row(impact: Impact, judged: bool) -> Row:
    """Estimate against measurement; at the small sizes a first call's warm-up is most of it, so it is only shown."""
    plan = impact.plan
    ratio = plan.estimated_seconds / plan.measured_seconds
    text = f"{plan.estimated_seconds:.2f} s / {plan.measured_seconds:.2f} s = {ratio:.2f}"
    return Row(
        "  the plan's estimate / what it took",
        None,
        text,
        "0.5 .. 2" if judged else "",
        0.5 <= ratio <= 2 if judged else None,
    )


# --- the Gram matrix ---------------------------------------------------------------------------------------------


def gram_reference(model: nn.Module, x: Tensor, y: Tensor, n: int) -> tuple[Tensor, float]:
    """Per-sample gradients by ``vmap(grad)``, flattened, and one matrix product; and the seconds for n samples.

    The gradients' seconds are scaled with the samples, the product's with their pairs.
    """
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, weights, sample[None]), label[None])

    def flattened(x: Tensor, y: Tensor) -> Tensor:
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, x, y)
        return torch.cat([g.flatten(1) for g in gradients.values()], 1)

    flattened(x[:2], y[:2])
    started = time.process_time()
    flat = flattened(x, y)
    formed = time.process_time()
    product = flat @ flat.T
    ended = time.process_time()
    return product, (formed - started) * n / len(x) + (ended - formed) * (n / len(x)) ** 2


def gram(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Ours: the loss's gradient by the outputs, then one contraction."""
    outputs = model(x).detach().requires_grad_()
    cotangents = torch.autograd.grad(cross_entropy(outputs, y, reduction="sum"), outputs)[0]
    return contract(model, x, cotangents, x, cotangents)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    "MLP": (lambda: MLP(3072, 10, depth=2, width=512), (3072,), 512, 50),
    "SimpleConv": (lambda: SimpleConv(10), (1, 32, 32), 512, 3),
    "ResNet-18 plain": (lambda: resnet18_plain(10), (3, 32, 32), 128, 10),
}


def make(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    build, shape, _, _ = NETWORKS[name]
    return build().eval(), torch.randn(n, *shape), torch.arange(n) % 10


def batch_gradient(model: nn.Module, x: Tensor, y: Tensor) -> object:
    return torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))


def keep(kept: dict[str, Tensor], name: str, work: Callable[..., Tensor], *args: object) -> None:
    kept[name] = work(*args)


def gram_matrices(repeats: int, quick: bool, peers: str | None) -> list[Row]:
    rows = []
    for name, (_, _, whole, bound) in NETWORKS.items():
        n = min(whole, 16 if name.startswith("ResNet") else 128) if quick else whole
        model, x, y = make(name, n)
        kept: dict[str, Tensor] = {}
        mine = cpu_seconds(partial(keep, kept, "ours", gram, model, x, y), repeats)
        some = n if name == "SimpleConv" else min(n, 16 if name.startswith("ResNet") else 64)
        kept["plain"], plain = gram_reference(model, x[:some], y[:some], n)
        floor = cpu_seconds(partial(batch_gradient, model, x, y), repeats)
        error = float((kept["ours"][:some, :some] - kept["plain"]).norm() / kept["plain"].norm())
        work = f"Gram matrix, {name}, N = {n}"
        scaled = "" if some == n else f" ({some}, scaled)"
        rows += [
            Row(f"{work}: vmap(grad) and a matrix product{scaled}", plain),
            Row(f"{work}: ours (differs by {error:.0e})", mine, holds=error < 1e-4),
            Row(f"{work}: floor, one backward pass of the batch", floor),
            least("  reference / ours", plain, mine, None if quick else bound),
        ]
        if peers is not None:
            rows += peer_rows(peers, name, n if quick else None)
        if name.startswith("ResNet") and not quick:
            model, x, y = make(name, 512)
            rows.append(Row(f"Gram matrix, {name}, N = 512: ours", cpu_seconds(partial(gram, model, x, y), 1)))
    return rows


def peer_rows(python: str, name: str, most: int | None) -> list[Row]:
    """Each peer beside ours with as many samples; the bound is judged for the fastest."""
    rows, ratios = [], {}
    for peer, n in PEER_SAMPLES[name].items():
        n = min(n, most or n)
        found = run_peer(python, peer, name, n)
        if isinstance(found, str):
            rows.append(Row(f"  {peer}, N = {n}: {found}"))
            continue
        seconds, error = found
        if error > PEER_ERROR:
            rows.append(Row(f"  {peer}, N = {n}: other numbers than plain gradients (by {error:.0e})", seconds))
            continue
        mine = cpu_seconds(partial(gram, *make(name, n)), 2)
        ratios[peer] = seconds / mine
        rows.append(
            Row(f"  {peer}, N = {n} (differs by {error:.0e}) / ours {mine:.3g} s", seconds, f"{ratios[peer]:.1f}")
        )
    if ratios:
        fastest = min(ratios, key=ratios.__getitem__)
        rows.append(least(f"  fastest peer ({fastest}) / ours", ratios[fastest], 1.0, 1))
    return rows


def run_peer(python: str, peer: str, name: str, n: int) -> tuple[float, float] | str:
    """A peer's seconds for one Gram matrix in its own Python, and how far it is from plain gradients; or why not."""
    child = Path(__file__).resolve().parent / "peers" / "pairs.py"
    source = str(Path(local_elasticity.__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as folder:
        model, x, y = make(name, n)
        torch.save({"state": model.state_dict(), "x": x, "y": y}, Path(folder) / "problem.pt")
        try:
            done = subprocess.run(
                [python, str(child), peer, name, folder, source, str(torch.get_num_threads())],
                capture_output=True,
                text=True,
                check=False,
                timeout=PEER_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no result ({type(error).__name__}, {PEER_SECONDS} s by the clock at most)"
    try:
        found = json.loads((done.stdout.strip().splitlines() or ["{}"])[-1])
        return float(found["seconds"]), float(found["error"])
    except (ValueError, KeyError):
        return f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1][:100]}"


# --- He and Su's setting -----------------------------------------------------------------------------------------


def he_su_child(n: int, width: int) -> None:
    """The whole S_rel and S_ker matrices of the two-layer network, in a process of its own; prints what they cost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 1))
    x, y = torch.rand(n, 784) * 2 - 1, (torch.arange(n) % 2).float().unsqueeze(1)
    start, started, cpu = _resident("VmRSS"), time.perf_counter(), time.process_time()
    kernelised = local_elasticity.kernel(model, x, form=0, max_memory=900 * MIB)
    related = relative(kernelised)
    found: dict[str, float] = {"seconds": time.perf_counter() - started, "processor": time.process_time() - cpu}
    found["bytes"] = _resident("VmHWM") - start
    started, cpu = time.perf_counter(), time.process_time()
    impact = quiet(
        model, nn.functional.mse_loss, (x, y), update=SGD(1e-6), engine="linear", outputs="values", max_memory=900 * MIB
    )
    s = local_elasticity.s_rel(impact, definition="he_su")
    found |= {"measured": time.perf_counter() - started, "measured_processor": time.process_time() - cpu}
    found["differ"] = float((s - related).norm() / related.norm())
    print(json.dumps({**found, "estimated": impact.plan.estimated_seconds, "took": impact.plan.measured_seconds}))


def _resident(what: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    return 0


def he_su(quick: bool) -> list[Row]:
    n, width = (250, 40_960) if quick else (1000, 40_960)
    source = str(Path(local_elasticity.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--he-su-child", str(n), str(width)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    name = f"He and Su: {n} samples, 784-{width}-1, the whole S_rel and S_ker matrices"
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return [Row(name, None, "failed", "", False)]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    ratio, threads = found["estimated"] / found["took"], torch.get_num_threads()
    clock = f"{found['seconds']:.3g} s by the clock, {threads} threads"
    return [
        Row(f"{name} ({clock})", found["processor"], "", "<= 10 s", found["processor"] <= 10),
        Row("  working memory", None, f"{found['bytes'] / MIB:.0f} MiB", "<= 1 GB", found["bytes"] <= 1e9),
        Row(f"  S_rel by measure() instead (differs by {found['differ']:.0e})", found["measured_processor"]),
        Row("  the plan's estimate / what it took", None, f"{ratio:.2f}", "0.5 .. 2", 0.5 <= ratio <= 2),
    ]


# --- a snapshot --------------------------------------------------------------------------------------------------


def snapshot(repeats: int, quick: bool) -> list[Row]:
    torch.manual_seed(0)
    model, x, y = resnet18_plain(3).eval(), torch.randn(60, 3, 32, 32), torch.arange(3).repeat_interleave(20)
    impacts = []
    mine = cpu_seconds(
        lambda: impacts.append(quiet(model, cross_entropy, (x, y), update=SGD(1e-4), engine="linear")), repeats
    )
    some = 3 if quick else 60
    spare = copy.deepcopy(model)
    parameters = list(spare.parameters())

    def bare() -> None:
        for source in range(some):
            loss = cross_entropy(spare(x[source : source + 1]), y[source : source + 1])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.add_(gradient, alpha=-1e-12)
                spare(x)

    floor = cpu_seconds(bare, 2 if quick else 1) / some * 60
    return [
        Row("snapshot, ResNet-18 plain, 60 x 60 x 3, SGD: replay's floor", floor),
        Row("snapshot, ResNet-18 plain, 60 x 60 x 3, SGD: ours, engine linear", mine),
        least("  replay's floor / ours", floor, mine, 4),
        estimate_row(impacts[-1], not quick),
    ]


def main(quick: bool = False, out: Path | None = None, peers: str | None = None) -> int:
    """Run the comparison and print it.

    Args:
        quick: smaller sizes and fewer repeats, under a minute; bounds only where they are of the same sizes.
        out: also write the table here, as markdown.
        peers: a Python that has kronfluence, captum and dattri; the variable LOCAL_ELASTICITY_PEERS by default.

    Returns:
        0 where every bound holds, 1 where one does not.
    """
    peers = peers or os.environ.get("LOCAL_ELASTICITY_PEERS")
    console = Console(soft_wrap=True)
    facts = machine()
    console.print(facts, highlight=False)
    repeats = 1 if quick else 2
    rows: list[Row] = []
    with torch.random.fork_rng(devices=[]):
        steps: list[tuple[str, Callable[[], list[Row]]]] = [
            ("mixed product", lambda: mixed_product(256 if quick else 1024, repeats)),
            ("He and Su's setting", lambda: he_su(quick)),
            ("a snapshot", lambda: snapshot(repeats, quick)),
            ("Gram matrices", lambda: gram_matrices(repeats, quick, peers)),
        ]
        for name, step in steps:
            console.print(f"{name} ...", style="dim")
            rows += step()
            for row in [r for r in rows if r.ratio][-3:]:
                console.print("  " + " ".join(filter(None, row.cells())), style="dim", highlight=False)
    note = "Seconds of the processor, smallest of the repeats. " + ("" if peers else HOW_TO_PEERS)
    return report(console, [("", HEADINGS, [row.cells() for row in rows])], [note, facts], out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--he-su-child"]:
        he_su_child(int(sys.argv[2]), int(sys.argv[3]))
        sys.exit(0)
    parser = argparse.ArgumentParser(description="Time the first-order engine beside references, peers and the floor.")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, one repeat")
    parser.add_argument("--out", type=Path, help="also write the table here, as markdown")
    parser.add_argument("--peers", help="a Python with kronfluence, captum and dattri")
    arguments = parser.parse_args()
    sys.exit(main(arguments.quick, arguments.out, arguments.peers))
