"""Follow local elasticity through a training loop of your own: a small network on three digits, in seconds.

Run it with ``python examples/your_own_loop.py [FOLDER]``; it needs ``pip install -e ".[data]"``. The three lines that
you would add to a loop are marked.
"""

import sys
from pathlib import Path

import torch

import local_elasticity as le
from local_elasticity.report import figures


def main(folder: Path) -> None:
    """Train, follow, then look once more at the end, and draw."""
    torch.manual_seed(0)
    digits = le.data.digits().subset(["0", "1", "8"])
    xs, ys = digits.tensors()
    probes = le.data.probes(digits, per_class=10, seed=0)

    model = le.networks.MLP(in_features=64, n_classes=3, width=64)
    loss_fn = torch.nn.CrossEntropyLoss()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)

    tracker = le.Tracker(  # 1: what to look at, and when
        model,
        loss_fn,
        probes,
        update={"published": le.Adam(lr=1e-4), "own": le.from_optimizer(opt)},
        definitions=("kl", "kl_published"),
        schedule=le.every(9),
        store=folder / "run.zarr",
    )
    for _ in range(5):
        for batch in torch.randperm(len(xs)).split(32):
            loss = loss_fn(model(xs[batch]), ys[batch])
            opt.zero_grad()
            loss.backward()
            opt.step()
            tracker.step(loss=loss.item())  # 2: after each update
    run = tracker.finish()  # 3: the run; `le.open_run(folder / "run.zarr")` reads it again

    impact = le.measure(model, loss_fn, sources=(probes.xs, probes.ys), update=le.SGD(lr=0.01))
    table = le.by_class(le.s_rel(impact, definition="kl"), probes.ys, probes.ys)
    print(f"after training, one SGD step: intra {float(table.intra):.3g}, inter {float(table.inter):.3g}")
    for path in figures.write_all(run, folder / "figures"):
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/your_own_loop"))
