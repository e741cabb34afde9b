"""``local-elasticity train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from local_elasticity.base.checks import (
    check_probability,
    check_seed,
)
from local_elasticity.base.devices import usable_device
from local_elasticity.cli.app import app, console
from local_elasticity.cli.options import (
    Sizes,
    Whole,
    WholeOrNone,
    Words,
    check_counts,
    check_folder,
    check_rates,
    size_option,
)


@app.command
def train(
    *,
    data: str = "geomnist",
    classes: Words = None,
    size: Sizes = None,
    network: str = "simple-conv",
    replicas: Whole = 100,
    steps: Whole = 10_000,
    lr: float = 0.005,
    batch_size: Whole = 1,
    optimizer: Literal["sgd", "adam"] = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    corruption: float = 0.0,
    per_class: WholeOrNone = None,
    validate: WholeOrNone = None,
    probe: WholeOrNone = None,
    probes_per_class: Whole = 20,
    collapse_layer: Words = None,
    dtype: Literal["float32", "float64"] = "float32",
    threads: WholeOrNone = None,
    device: str = "cpu",
    seed: Whole = 0,
    out: Path = Path("runs/train"),
    overwrite: bool = False,
) -> int:
    """Train many replicas of a network in lock step and log every step of all of them.

    Example: local-elasticity train --data geomnist --replicas 100 --steps 10000 --lr 0.005 --batch-size 1
    --out runs/shapes

    Args:
        data: geomnist, geomnist-varied, or as in track.
        classes: which classes, by name or label; all of them by default.
        size: as in track.
        network: simple-conv, mlp or another as in track; every replica has its own initial weights.
        replicas: how many.
        steps: updates of each.
        lr: learning rate.
        batch_size: samples in an update, drawn with replacement, by every replica for itself.
        optimizer: sgd or adam.
        momentum: of sgd.
        weight_decay: of training.
        corruption: fraction of the training labels of each class that are wrong.
        per_class: training samples a class.
        validate: look at the validation samples every so many updates; 20 times by default.
        probe: look at the probes every so many updates; 100 times by default.
        probes_per_class: validation samples a class of which class means, variances and neural collapse are followed.
        collapse_layer: layer whose neural collapse is followed too, repeatable.
        dtype: of weights and images.
        threads: processor threads; the numbers do not depend on it.
        device: cpu or cuda.
        seed: of the data, the corruption, and all replicas.
        out: folder of the run; the same command continues an interrupted one.
        overwrite: throw away a run that is already there.
    """
    import torch

    import local_elasticity as le
    from local_elasticity.runs.ensembles import is_ensemble, overwrite_ensemble
    from local_elasticity.runs.folders import prepare_folder

    check_counts(
        replicas=replicas, steps=steps, batch_size=batch_size, per_class=per_class, validate=validate, probe=probe,
        probes_per_class=probes_per_class, threads=threads,
    )  # fmt: skip
    check_rates(lr=lr, weight_decay=weight_decay, momentum=momentum)
    check_probability("--corruption", corruption)
    check_seed("--seed", seed)
    check_folder("--out", out)
    configuration: dict[str, Any] = {
        "data": data,
        "classes": classes or "all",
        **size_option(size),
        "network": network,
        "corruption": corruption,
        "samples_per_class": per_class or "all",
        "probes_per_class": probes_per_class,
        "device": device,
        "seed": seed,
    }
    where = usable_device(device)
    samples = le.data.load_split(data, classes, per_class, seed, **size_option(size))
    x, y = samples.train
    y = le.data.corrupt_labels(y, corruption, n_classes=samples.n_classes, seed=seed)
    configuration |= {"data_origin": samples.origin, "class_names": list(samples.class_names)}
    if overwrite:
        overwrite_ensemble(out)
    prepare_folder(
        out,
        configuration
        | {
            "replicas": replicas,
            "steps": steps,
            "lr": lr,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "dtype": dtype,
        },
        overwrite,
    )
    resume = is_ensemble(out)
    wrong = int((y != samples.train[1]).sum())
    console.print(
        f"{samples.origin}: {len(x)} training samples{f', {wrong} with a wrong label' if wrong else ''}; "
        f"{replicas} x {network}, {steps} updates of {batch_size}",
        markup=False,
    )
    if resume:
        console.print(f"continuing {out} from update {le.open_ensemble(out).attrs['updates']}", markup=False)
    ensemble = le.train_ensemble(
        lambda: le.networks.build(network, samples.n_classes, samples.shape),
        (x, y),
        torch.nn.functional.cross_entropy,
        lr=lr,
        steps=steps,
        replicas=replicas,
        seed=seed,
        batch_size=batch_size,
        optimizer=optimizer,
        momentum=momentum,
        weight_decay=weight_decay,
        validation=samples.validation,
        validate=None if validate is None else le.every(validate),
        probes=_first_of_each(samples.validation, probes_per_class),
        probe=None if probe is None else le.every(probe),
        collapse_layers=tuple(collapse_layer or ()),
        store=out,
        resume=resume,
        configuration=configuration,
        threads=threads,
        dtype=getattr(torch, dtype),
        device=where,
        progress=True,
    )
    _say_trained(ensemble, out)
    return 0


def _first_of_each(samples: Any, count: int) -> Any:
    """The first samples of each class."""
    import torch

    x, y = samples
    kept = torch.cat([torch.nonzero(y == label).flatten()[:count] for label in y.unique()])
    return x[kept], y[kept]


def _say_trained(ensemble: Any, out: Path) -> None:
    plan, gone = ensemble.plan, int((ensemble.diverged >= 0).sum())
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(
        f"route {plan.route}, chunks of {plan.chunk_size}, {plan.threads} threads: {plan.seconds:.1f} s of training, "
        f"{plan.seconds_looking:.1f} s of looking; {size / 1e6:.1f} MB in {out}",
        markup=False,
    )
    if gone:
        first = int(ensemble.diverged[ensemble.diverged >= 0].min())
        console.print(f"{gone} of {len(ensemble.replicas)} replicas diverged, the first at update {first}; lower --lr")
    kept = ensemble.diverged < 0
    if kept.any():
        words = []
        for name, values in (
            ("accuracy", ensemble.log.get("validation_accuracy")),
            ("loss", ensemble.log.get("validation_loss")),
        ):
            if values is not None:
                last = values[-1, kept]
                words.append(f"{name} {last.mean():.4g} (sd {last.std(ddof=min(1, len(last) - 1)):.2g} over replicas)")
        console.print("validation " + ", ".join(words), markup=False)
    console.print(f"next: local-elasticity estimate {out}; local-elasticity report {out}", markup=False)
