"""``local-elasticity simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from local_elasticity.base.devices import usable_device
from local_elasticity.cli.app import app, console
from local_elasticity.cli.options import Whole, WholeOrNone, check_folder


@app.command
def simulate(
    *,
    classes: Whole = 3,
    features: WholeOrNone = None,
    drift: Literal["isotropic", "logits"] = "logits",
    alpha: str = "0.02*exp(-t/2000)",
    beta: str = "-0.002",
    sigma: str = "0.02",
    steps: Whole = 10_000,
    samples_per_class: Whole = 100,
    paths: Whole = 500,
    save: Whole = 201,
    separability_paths: Whole = 50,
    scale: float = 0.1,
    start_variance: float = 0.0,
    label_noise: float = 0.0,
    method: Literal["exact", "discrete", "euler-maruyama"] = "exact",
    step: float | None = None,
    seed: Whole = 0,
    device: str = "cpu",
    out: Path = Path("runs/sde"),
    overwrite: bool = False,
) -> int:
    """Sample the locally elastic SDE, and say whether its classes separate and collapse.

    Example: local-elasticity simulate --classes 3 --drift logits --alpha "0.02*exp(-t/2000)" --beta "-0.002"
    --steps 10000 --samples-per-class 100 --paths 500 --out runs/sde

    Args:
        classes: K.
        features: p; K by default (the logits drift takes no other).
        drift: isotropic (I-model) or logits (L-model).
        alpha: impact within a class, arithmetic of t.
        beta: impact between classes, arithmetic of t.
        sigma: standard deviation of the noise, arithmetic of t.
        steps: the last time; one training step is one unit of time.
        samples_per_class: n.
        paths: independent paths.
        save: save points, evenly spaced.
        separability_paths: clouds a time in which separability is decided.
        scale: size of the initial class means.
        start_variance: variance of samples about them.
        label_noise: probability of a wrong label.
        method: exact law, discrete recursion or Euler-Maruyama.
        step: step size of the latter two.
        seed: of the start, the paths and the clouds.
        device: cpu or cuda.
        out: folder of the simulation; estimate reads it.
        overwrite: replace an earlier simulation there.
    """
    from local_elasticity.report.simulation import ARRAYS, Settings
    from local_elasticity.report.simulation import simulate as run

    usable_device(device)
    check_folder("--out", out)
    given = {name: value for name, value in locals().items() if name in Settings.__dataclass_fields__}
    numbers = run(Settings(**given), out, overwrite=overwrite)
    low, high = numbers["separable_interval"]
    console.print(
        f"A = {numbers['A']:.4g}, B = {numbers['B']:.4g} at t = {steps}; all pairs separable with probability "
        f"{numbers['separable_at_end']:.3g} [{low:.3g}, {high:.3g}]; log R = {numbers['log_ratio_at_end']:.3g}",
        markup=False,
    )
    console.print(f"limit: {numbers['limit']}: {numbers['limit_reason']}", markup=False)
    console.print(f"collapse: {numbers['collapse']}; NC1 {numbers['nc1_at_end']:.3g}", markup=False)
    for figure in numbers["figures"]:
        console.print(f"figure: {figure}", markup=False)
    console.print(f"paths:  {out / ARRAYS}", markup=False)
    return 0
