"""``local-elasticity track``."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from local_elasticity.base.checks import (
    check_seed,
)
from local_elasticity.base.devices import usable_device
from local_elasticity.base.errors import InputError
from local_elasticity.cli.app import app, console
from local_elasticity.cli.options import (
    Sizes,
    Whole,
    WholeOrNone,
    Words,
    check_counts,
    check_folder,
    check_rates,
    images_option,
    schedule_option,
    schedule_words,
    size_option,
)


@app.command
def track(
    *,
    data: str = "digits",
    classes: Words = None,
    size: Sizes = None,
    network: str = "mlp",
    optimizer: str = "adam",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    epochs: Whole = 3,
    batch_size: WholeOrNone = None,
    per_class: WholeOrNone = None,
    probes_per_class: Whole = 20,
    every: Whole = 9,
    log_spaced: WholeOrNone = None,
    budget: float | None = None,
    update: Words = None,
    definition: Words = None,
    collapse: Words = None,
    keep: Literal["outputs", "pairs", "tables"] | None = None,
    exclude_self: bool = False,
    augment_once: bool = False,
    device: str = "cpu",
    seed: Whole = 0,
    out: Path = Path("runs/track"),
    overwrite: bool = False,
) -> int:
    """Train a network and follow how much a step on each class moves every class.

    Example: local-elasticity track --data digits --classes 0 1 8 --network mlp --optimizer adam --lr 1e-3 --epochs 3
    --probes-per-class 20 --every 9 --update adam:1e-4 --definition kl --seed 0 --out runs/digits

    Args:
        data: digits, cifar10, cifar100, svhn, mnist, fashion-mnist, geomnist, geomnist-varied, or a folder of class
            folders of images.
        classes: which classes, by name or label; all of them by default.
        size: bring the images of a folder to this size: pixels, or height and width.
        network: mlp, simple-conv, resnet18-plain, resnet18-batchnorm, resnet18-groupnorm, or module:function.
        optimizer: adam, adamw or sgd.
        lr: learning rate of training.
        weight_decay: of training.
        momentum: of sgd.
        epochs: passes over the data.
        batch_size: 32 by default, 8 for sets of fewer than 1,000 images.
        per_class: use only this many training images a class.
        probes_per_class: fixed probes a class.
        every: look after update 1, 1 + N, 1 + 2N, …
        log_spaced: look this many times instead, evenly on a logarithmic axis.
        budget: look as often as this fraction of the time allows instead.
        update: probe step, sgd:LR, adam:LR or optimizer, with an optional NAME= before; repeatable.
        definition: definition of S_rel, repeatable.
        collapse: also follow neural collapse of the probes at these layers: names of modules, outputs, penultimate.
        keep: what the run keeps: outputs (any definition afterwards), pairs or tables.
        exclude_self: leave pairs of a sample with itself out of the tables.
        augment_once: crop and flip once, then freeze, as the published protocol does.
        device: cpu or cuda.
        seed: of weights, data order, probes and intervals.
        out: folder of the run; the same command continues an interrupted one.
        overwrite: throw away a run that is already there.
    """
    import torch

    import local_elasticity as le
    from local_elasticity.runs.folders import prepare_folder
    from local_elasticity.training.loop import Session, Training

    check_counts(
        epochs=epochs, batch_size=batch_size, per_class=per_class, probes_per_class=probes_per_class, every=every,
        log_spaced=log_spaced,
    )  # fmt: skip
    check_rates(lr=lr, weight_decay=weight_decay, momentum=momentum)
    check_seed("--seed", seed)
    check_folder("--out", out)
    from local_elasticity.impact.update import parse_updates

    configuration: dict[str, Any] = {
        "data": data,
        "classes": classes or "all",
        **size_option(size),
        "network": network,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "epochs": epochs,
        "batch_size": batch_size,
        "images_per_class": per_class or "all",
        "probes_per_class": probes_per_class,
        "schedule": schedule_words(every, log_spaced, budget),
        "updates": update or ["adam:1e-4"],
        "definitions": definition or ["kl", "kl_published"],
        **({"collapse": collapse} if collapse else {}),
        "exclude_self": exclude_self,
        "augment_once": augment_once,
        "device": device,
        "seed": seed,
    }
    for name in configuration["definitions"]:
        le.similarity.get_definition(name)
    where = usable_device(device)
    train, test, test_words = images_option(data, classes, per_class, seed, size_option(size))
    configuration["data_origin"], configuration["test_data"] = train.origin, test_words
    if batch_size is None:
        batch_size = configuration["batch_size"] = 8 if len(train) < 1000 else 32
    tensors = train.tensors(augment=seed if augment_once else None)
    chosen = le.data.probes(train, per_class=probes_per_class, seed=seed, tensors=tensors)
    torch.manual_seed(seed)
    model = trainable(network, le.networks.build(network, train.n_classes, train.shape), tensors[0].dtype).to(where)
    training = Training(epochs, batch_size, optimizer, lr, weight_decay, momentum, seed=seed)
    session = Session(
        model,
        torch.nn.functional.cross_entropy,
        (tensors[0].to(where), tensors[1].to(where)),
        training,
        None if test is None else tuple(x.to(where) for x in test.tensors()),
        out / "checkpoint",
    )
    updates = parse_updates(configuration["updates"], session.optimizer)
    schedule = schedule_option(every, log_spaced, budget, session.total)
    resume = prepare_folder(out, configuration, overwrite)
    chosen = type(chosen)(
        chosen.xs.to(where), chosen.ys.to(where), chosen.indices, chosen.origin_indices, chosen.class_names, chosen.seed
    )
    tracker = le.Tracker(
        model,
        torch.nn.functional.cross_entropy,
        chosen,
        update=updates,
        definitions=configuration["definitions"],
        schedule=schedule,
        store=out / "run.zarr",
        resume=resume,
        keep=keep,
        exclude_self=exclude_self,
        collapse_layers=collapse or (),
        configuration=configuration,
        seed=seed,
        before_commit=session.save,
    )
    if resume and tracker.resume_step:
        session.load(tracker.resume_step, tracker.checkpoint)
        console.print(f"continuing {out} from update {tracker.resume_step}")
    shown = ", ".join(f"{n} {c}" for n, c in zip(train.class_names, train.counts.tolist(), strict=True))
    console.print(f"{train.origin}: {len(train)} images ({shown}); {network}, {session.total} updates", markup=False)
    _run(session, tracker)
    return finish(tracker.finish(), out)


def trainable(name: str, model: Any, dtype: Any) -> Any:
    """Refuse a network that cannot be trained on images as they are."""
    from local_elasticity.base.tensors import check_module

    check_module("--network", model)
    other = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != dtype), None)
    if other is not None:
        raise InputError(
            expected=f"--network: weights of {dtype}, as the images are",
            got=f"{other} from {name!r}",
            do="leave out .half(), .double() and the like in that function",
        )
    return model


def _run(session: Any, tracker: Any) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from local_elasticity.base.progress import Pace, duration

    looks_after = _looks_after(tracker.schedule, session.total)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console) as bar:
        first, began, pace = session.updates, time.perf_counter(), Pace()
        task = bar.add_task("training", total=session.total, completed=first, left="")
        told = False
        for progress in session.run(tracker):
            looked = 0.0 if progress.look is None else progress.look.seconds
            pace.add(time.perf_counter() - began, looked)
            left = pace.left(progress.total - progress.update, looks_after(progress.update))
            bar.update(task, completed=progress.update, left="" if left is None else f"{duration(left)} left")
            if progress.look is None:
                continue
            line = f"update {progress.update}: {said_of(progress.look.tables)} ({progress.look.seconds:.2f} s)"
            bar.console.print(line, markup=False)
            if not told and left is not None:
                bar.console.print(f"about {duration(left)} to go")
                told = True


def _looks_after(schedule: Any, total: int) -> Callable[[int], int | None]:
    """How many looks come after so many updates; None where the clock decides."""
    from local_elasticity.training.ensemble.looks import due
    from local_elasticity.training.schedule import Budget

    if isinstance(schedule, Budget):
        return lambda update: None
    times = due(schedule, total, first=False, last=False)
    return lambda update: len(times) - bisect.bisect_right(times, update)


def said_of(tables: dict[tuple[str, str], Any]) -> str:
    """The last tables in a line."""
    several = len({update for update, _ in tables}) > 1
    return "; ".join(
        f"{definition}{' by ' + update if several else ''} intra {table.intra:.3f} inter {table.inter:.3f}"
        for (update, definition), table in tables.items()
    )


def finish(run: Any, out: Path) -> int:
    """Say what was measured, draw it and write the page."""
    if not run.dataset.sizes.get("step", 0):
        console.print(f"no snapshot was taken; the run is {out}")
        return 0
    from local_elasticity.report import write_all, write_page

    figures = write_all(run, out / "figures")
    try:
        page = write_page(run, out / "report.html", [path for path in figures if path.stem.startswith("collapse")])
    except InputError as error:  # plotly is an extra: without it there are still the figures
        console.print(f"no page: {error}", markup=False)
        page = None
    console.print(f"figure: {next((f for f in figures if f.suffix == '.png'), figures[0])}", markup=False)
    if page is not None:
        console.print(f"page:   {page}", markup=False)
    return 0
