"""The command line, thin: it reads words, calls the library, and says where the result is."""

from __future__ import annotations

import bisect
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, Token
from rich.console import Console

from local_elasticity.base import interrupts
from local_elasticity.base.checks import (
    check_fraction,
    check_place,
    check_probability,
    check_rate,
    check_seed,
    check_whole,
    make_folder,
)
from local_elasticity.base.devices import usable_device
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.base.files import DISK, refusal_of


class _Terminal(Console):
    """A console that ends quietly where its reader has gone (``| head``)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        interrupts.end_quietly()


console = _Terminal(highlight=False, soft_wrap=True)
app = App(
    console=console,
    suppress_keyboard_interrupt=False,
    name="local-elasticity",
    help="When one update is taken at x, how much does the prediction at x' move?",
    version_flags=["--version"],
)

CONTINUED = {  # commands that go on where they stopped, and where that is
    "track": "from the last snapshot",
    "train": "from the last checkpoint",
    "reproduce": "with what is not yet done",
}
UNWRITTEN = ("measure",)  # commands that write at the very end

Words = Annotated[list[str] | None, Parameter(consume_multiple=True)]


def _whole_numbers(kind: Any, tokens: Sequence[Token]) -> Any:
    """Whole numbers as they were written: 1.5 is none, and is not rounded."""
    numbers = []
    for token in tokens:
        try:
            numbers.append(int(token.value))
        except ValueError:
            name = token.keyword or "the argument"
            raise InputError(
                expected=f"{name}: a whole number", got=repr(token.value), do=f"write for example {name} 3"
            ) from None
    return numbers if kind == list[int] else numbers[0]


Whole = Annotated[int, Parameter(converter=_whole_numbers)]
WholeOrNone = Annotated[int | None, Parameter(converter=_whole_numbers)]
Sizes = Annotated[list[int] | None, Parameter(consume_multiple=True, converter=_whole_numbers)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Exit status 0, 1 (a claim failed), 2 (bad input, one clear line), 130 or 143 (SIGINT or SIGTERM, one line that says
    how to go on), or 141 (nobody reads the output any more).
    """
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    with interrupts.ending(f"local-elasticity: {_after_interrupt(words)}"):
        try:
            status = app(words, exit_on_error=False, print_error=False)
        except InputError as error:
            _refuse(str(error))
        except CycloptsError as error:
            ours = error.__cause__ or error.__context__
            _refuse(str(ours) if isinstance(ours, InputError) else " ".join(str(error).split()) + "; see --help")
        except OSError as error:
            if error.filename is None and error.errno not in DISK:  # not of a file
                raise
            _refuse(str(refusal_of(error)))
        else:
            sys.stdout.flush()
            sys.exit(status if isinstance(status, int) else 0)


def _after_interrupt(words: Sequence[str]) -> str:
    """How to go on with a command that was interrupted."""
    command = words[0] if words else ""
    if command not in CONTINUED:
        return (
            "interrupted; nothing was written" if command in UNWRITTEN else "interrupted; the same command starts over"
        )
    same = "the same command without --overwrite" if "--overwrite" in words else "the same command"
    return f"interrupted; {same} continues {CONTINUED[command]}"


def _refuse(line: str, status: int = 2) -> None:
    print(f"local-elasticity: {line}", file=sys.stderr)
    sys.exit(status)


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

    _check_counts(
        epochs=epochs, batch_size=batch_size, per_class=per_class, probes_per_class=probes_per_class, every=every,
        log_spaced=log_spaced,
    )  # fmt: skip
    _check_rates(lr=lr, weight_decay=weight_decay, momentum=momentum)
    check_seed("--seed", seed)
    _check_folder("--out", out)
    from local_elasticity.impact.update import parse_updates

    configuration: dict[str, Any] = {
        "data": data,
        "classes": classes or "all",
        **_size(size),
        "network": network,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "epochs": epochs,
        "batch_size": batch_size,
        "images_per_class": per_class or "all",
        "probes_per_class": probes_per_class,
        "schedule": _schedule_words(every, log_spaced, budget),
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
    train, test, test_words = _images(data, classes, per_class, seed, _size(size))
    configuration["data_origin"], configuration["test_data"] = train.origin, test_words
    if batch_size is None:
        batch_size = configuration["batch_size"] = 8 if len(train) < 1000 else 32
    tensors = train.tensors(augment=seed if augment_once else None)
    chosen = le.data.probes(train, per_class=probes_per_class, seed=seed, tensors=tensors)
    torch.manual_seed(seed)
    model = _trainable(network, le.networks.build(network, train.n_classes, train.shape), tensors[0].dtype).to(where)
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
    schedule = _schedule(every, log_spaced, budget, session.total)
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
    return _finish(tracker.finish(), out)


def _trainable(name: str, model: Any, dtype: Any) -> Any:
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
            line = f"update {progress.update}: {_words(progress.look.tables)} ({progress.look.seconds:.2f} s)"
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


def _words(tables: dict[tuple[str, str], Any]) -> str:
    several = len({update for update, _ in tables}) > 1
    return "; ".join(
        f"{definition}{' by ' + update if several else ''} intra {table.intra:.3f} inter {table.inter:.3f}"
        for (update, definition), table in tables.items()
    )


def _finish(run: Any, out: Path) -> int:
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


def _check_counts(**counts: int | None) -> None:
    """Refuse options that count something and are given as less than one."""
    for name, count in counts.items():
        check_whole(f"--{name.replace('_', '-')}", count, or_none=True)


def _check_file(out: Path | None) -> None:
    """Refuse an --out that cannot be a file."""
    if out is not None and check_place("--out", out).is_dir():
        raise InputError(expected="--out: a file", got=f"a folder, {out}", do="write for example --out table.json")


def _check_folder(option: str, place: Path | None) -> None:
    """Refuse an option that cannot be a folder."""
    if place is not None and check_place(option, place).is_file():
        raise InputError(expected=f"{option}: a folder", got=f"a file, {place}", do=f"choose another {option}")


def _check_rates(**rates: float) -> None:
    for name, rate in rates.items():
        check_rate(f"--{name.replace('_', '-')}", rate)


def _size(size: list[int] | None) -> dict[str, Any]:
    """The size of images as an option of `load`; none where it was not given."""
    if not size:
        return {}
    if len(size) > 2:
        given = " ".join(map(str, size))
        raise InputError(expected="--size: pixels, or height and width", got=given, do="give one or two numbers")
    return {"size": size[0] if len(size) == 1 else tuple(size)}


def _images(
    data: str, classes: list[str] | None, per_class: int | None, seed: int, options: dict[str, Any]
) -> tuple[Any, Any, str]:
    """Training and test images of the chosen classes, and what the test images are."""
    import local_elasticity as le
    from local_elasticity.data.sets import other_split

    train = le.data.load(data, "train", **options)
    split, of_the_same = other_split(train, data)
    try:
        test = None if split is None else le.data.load(data, split, **options, **of_the_same)
    except InputError:
        if train.source == "folder":  # its split is there, and damaged
            raise
        test = None
    if classes:
        train = train.subset(classes)
        test = None if test is None else test.subset(classes)
    if per_class is not None:
        train = train.take(per_class, seed)
    return train, test, "none at hand" if test is None else f"{len(test)} images, {test.origin}"


def _schedule_words(every: int, log_spaced: int | None, budget: float | None) -> str:
    if budget is not None:
        return f"budget({budget})"
    return f"log_spaced({log_spaced})" if log_spaced is not None else f"every({every})"


def _schedule(every: int, log_spaced: int | None, budget: float | None, total: int) -> Any:
    import local_elasticity as le

    if log_spaced is not None and budget is not None:
        raise InputError(expected="one schedule", got="--log-spaced and --budget", do="leave one of them out")
    if budget is not None:
        return le.budget(budget)
    return le.log_spaced(log_spaced, total) if log_spaced is not None else le.every(every)


@app.command
def measure(
    *,
    data: str = "digits",
    classes: Words = None,
    network: str = "mlp",
    size: Sizes = None,
    checkpoint: Path | None = None,
    per_class: Whole = 20,
    split: Literal["train", "test", "val"] = "train",
    update: str = "sgd:0.01",
    definition: Words = None,
    engine: Literal["auto", "replay", "linear"] = "auto",
    exclude_self: bool = False,
    device: str = "cpu",
    seed: Whole = 0,
    out: Path | None = None,
) -> int:
    """Measure one moment: take a step at each sample, look at all of them, print the class-by-class table.

    Example: local-elasticity measure --data digits --classes 0 1 8 --network mlp --checkpoint weights.safetensors
    --update sgd:0.01 --engine linear --definition he_su --definition kl

    Args:
        data: as in track.
        classes: as in track.
        network: as in track.
        size: as in track.
        checkpoint: weights, as safetensors or a torch file that holds nothing but tensors; fresh weights without.
        per_class: samples a class.
        split: which images.
        update: the step, sgd:LR or adam:LR.
        definition: definition of S_rel, repeatable.
        engine: replay (finite step), linear (first order: all pairs at once, no rounding of tiny steps) or auto.
        exclude_self: leave pairs of a sample with itself out.
        device: cpu or cuda.
        seed: of fresh weights, samples and intervals.
        out: write the table of every definition to this .json file.
    """
    import torch

    import local_elasticity as le
    from local_elasticity.impact.update import parse_update
    from local_elasticity.similarity.definitions import get_definition, movements

    _check_counts(per_class=per_class)
    check_seed("--seed", seed)
    _check_file(out)
    names = definition or ["he_su", "kl"]
    for name in names:
        get_definition(name)
    rule = parse_update(update)[1]
    where = usable_device(device)
    images = le.data.load(data, split, **_size(size))
    images = images.subset(classes) if classes else images
    samples = le.data.probes(images, per_class=per_class, seed=seed)
    torch.manual_seed(seed)
    model = le.networks.build(network, images.n_classes, images.shape)
    if checkpoint is not None:
        _load_weights(model, checkpoint)
    xs, ys = samples
    impact = le.measure(
        model.to(where),
        torch.nn.functional.cross_entropy,
        (xs.to(where), ys.to(where)),
        update=rule,
        engine=engine,
        progress=True,
    )
    plan = impact.plan
    console.print(
        f"{images.origin}; {rule.name}, engine {plan.engine}, route {plan.route} (chunk {plan.chunk_size}), "
        f"{plan.measured_seconds:.2f} s (estimated {plan.estimated_seconds:.2f} s); "
        f"linearisation error {impact.linearization_error:.2g}",
        markup=False,
    )
    fallen = {key: way for key, way in plan.ways.items() if way.startswith("fallback")}
    if plan.ways:
        ruled = sum(way.startswith("rule") for way in plan.ways.values())
        console.print(f"{ruled} parameters by layer rules, {len(fallen)} by per-sample gradients", markup=False)
        for key, way in fallen.items():
            console.print(f"  {key}: {way}", markup=False)
    for note in plan.notes:
        console.print(f"  {note}", markup=False)
    tables = {}
    for name in names:
        numerators, denominators = movements(impact, name)
        table = le.by_class(
            numerators / denominators[:, None],
            ys,
            ys,
            class_names=images.class_names,
            exclude_self=exclude_self,
            denominators=denominators.cpu(),
            seed=seed,
        )
        tables[name] = table
        _print_table(name, table)
    if out is not None:
        make_folder("the folder of --out", out.parent)
        content = {name: table.to_xarray().to_dict() for name, table in tables.items()}
        out.write_text(json.dumps({"plan": asdict(plan), "tables": content}, indent=2, default=str))
        console.print(f"table: {out}", markup=False)
    return 0


def _load_weights(model: Any, path: Path) -> None:
    """Read weights without executing anything."""
    import pickle

    import torch

    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing"
        raise InputError(expected="a checkpoint file", got=f"{what} at {path}", do="check --checkpoint")
    state: Any = None
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError:
                from local_elasticity.base.errors import missing_extra

                raise missing_extra("safetensors", "safetensors", "reads .safetensors files") from None
            state = load_file(path)
        else:
            state = torch.load(path, weights_only=True, map_location="cpu")
            state = state.get("model", state) if isinstance(state, dict) else state
        model.load_state_dict(state)
    except InputError:
        raise
    except (
        RuntimeError,
        pickle.UnpicklingError,
        TypeError,
        AttributeError,
        LookupError,
        EOFError,
        OSError,
        ValueError,
    ) as error:
        raise InputError(
            expected="a checkpoint with the weights of this network, and nothing but tensors",
            got=_unlike(model, state, path),
            do="save model.state_dict() as safetensors, and pass the matching --network",
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(
            expected="a whole safetensors file", got=f"another file, {path}", do="save the weights again"
        ) from error


def _unlike(model: Any, state: Any, path: Path) -> str:
    """In what a state read from a file is not that of a network."""
    if state is None:
        return f"a file that cannot be read as such, {path}"
    if not isinstance(state, dict):
        return f"an object of type {type(state).__name__} in {path}"
    own = model.state_dict()
    missing, more = [name for name in own if name not in state], [str(name) for name in state if name not in own]
    if missing or more:
        return f"{len(missing)} weights missing and {len(more)} unknown ({', '.join([*missing, *more][:3])} ...)"
    odd = [n for n, w in own.items() if tuple(getattr(state[n], "shape", ())) != tuple(w.shape)]
    return f"other shapes, of {odd[0]!r}" if odd else f"something that cannot be loaded, {path}"


def _print_table(name: str, table: Any) -> None:
    from rich.table import Table

    shown = Table(title=f"S_rel {name}: mean of ratios [95 %], a step on the row moves the column")
    shown.add_column("step on")
    for column in table.class_names:
        shown.add_column(str(column))
    for row, label in enumerate(table.class_names):
        cells = []
        for column in range(len(table.class_names)):
            low, high = table.interval_low[row, column], table.interval_high[row, column]
            interval = "" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]"
            heavy = " heavy-tailed" if table.heavy_tailed[row, column] else ""
            cells.append(f"{table.values[row, column]:.3g}{interval}{heavy}".replace("[", r"\["))
        shown.add_row(str(label), *cells)
    console.print(shown)
    console.print(
        f"{name}: intra {table.intra:.4g}, inter {table.inter:.4g}, inter/intra {table.ratio:.4g}; "
        f"{int(table.n_pairs.sum())} pairs, {int(table.n_undefined.sum())} undefined, self pairs {table.self_pairs}",
        markup=False,
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

    _check_counts(
        replicas=replicas, steps=steps, batch_size=batch_size, per_class=per_class, validate=validate, probe=probe,
        probes_per_class=probes_per_class, threads=threads,
    )  # fmt: skip
    _check_rates(lr=lr, weight_decay=weight_decay, momentum=momentum)
    check_probability("--corruption", corruption)
    check_seed("--seed", seed)
    _check_folder("--out", out)
    configuration: dict[str, Any] = {
        "data": data,
        "classes": classes or "all",
        **_size(size),
        "network": network,
        "corruption": corruption,
        "samples_per_class": per_class or "all",
        "probes_per_class": probes_per_class,
        "device": device,
        "seed": seed,
    }
    where = usable_device(device)
    samples = le.data.load_split(data, classes, per_class, seed, **_size(size))
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


@app.command
def report(run: Path) -> int:
    """Write the page and the figures of a run.

    Example: local-elasticity report runs/digits

    Args:
        run: the run's folder, or its run.zarr; or the folder of an ensemble.
    """
    import local_elasticity as le
    from local_elasticity.runs.ensembles import is_ensemble

    if is_ensemble(run):
        from local_elasticity.report.ensemble import write_ensemble

        figures, page = write_ensemble(run)
        for figure in figures:
            if figure.suffix == ".png":
                console.print(f"figure: {figure}", markup=False)
        console.print(f"page:   {page}", markup=False)
        return 0
    opened = le.open_run(run)
    assert opened.path is not None
    return _finish(opened, opened.path.parent)


@app.command
def estimate(
    recording: Path,
    *,
    model: Literal["auto", "logits", "isotropic"] = "auto",
    estimator: Literal["defined", "published"] = "defined",
    baseline_window: WholeOrNone = None,
    window: WholeOrNone = None,
    missing: Literal["raise", "interpolate"] = "raise",
    n_boot: Whole = 200,
    confidence: float = 0.95,
    seed: Whole = 0,
    out: Path | None = None,
) -> int:
    """Estimate the locally elastic SDE from training: alpha, beta, their decay, and whether classes will separate.

    Example: local-elasticity estimate runs/digits --model logits --out runs/digits/estimate

    Args:
        recording: a run, the folder of an ensemble, or a .npz file with class_means (T, K, p) or (trials, T, K, p), or
            with logits (T, trials, K) and labels (T, trials); an array t beside them gives the times.
        model: logits (the features are the K logits), isotropic, or auto: logits where there are as many outputs as
            classes.
        estimator: as defined, or as published (the authors' code, number for number).
        baseline_window: first steps of which the baseline is the mean; chosen from the data by default.
        window: odd number of points of the local slopes; chosen from the data by default.
        missing: what to do where no trial saw a class at a step.
        n_boot: resamples of the trials.
        confidence: coverage of the intervals.
        seed: of the resampling.
        out: folder for estimate.json and figures; estimate/ in the run, or NAME-estimate/ beside the file, by default.
    """
    import warnings

    from local_elasticity.base.errors import IdentifiabilityWarning
    from local_elasticity.lesde.estimation.estimate import estimate as estimate_model
    from local_elasticity.lesde.estimation.recordings import read_recording
    from local_elasticity.lesde.estimation.summary import print_summary, write_summary
    from local_elasticity.report.estimation import write_estimation

    check_fraction("--confidence", confidence)
    check_whole("--n-boot", n_boot, 0)
    check_seed("--seed", seed)
    _check_folder("--out", out)
    _check_counts(baseline_window=baseline_window, window=window)
    found = read_recording(recording)
    chosen = model if model != "auto" else "logits" if found.square else "isotropic"
    console.print(f"{found.what}; model {chosen}, estimator {estimator}", markup=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IdentifiabilityWarning)  # the summary says what they say
        fit = estimate_model(
            **found.data,
            model=chosen,
            estimator=estimator,
            baseline_window=baseline_window,
            window=window,
            missing=missing,
            n_boot=n_boot,
            confidence=confidence,
            seed=seed,
        )
    summary = print_summary(fit, console)
    folder = out or (
        recording / "estimate" if recording.is_dir() else recording.with_name(f"{recording.stem}-estimate")
    )
    if folder.exists() and not folder.is_dir():
        raise InputError(expected="a folder for the estimates", got=f"a file, {folder}", do="choose another --out")
    path = write_summary(fit, summary, folder)
    figures = write_estimation(fit, folder / "figures", found.class_names)
    console.print(f"numbers: {path}", markup=False)
    for figure in figures:
        if figure.suffix == ".png":
            console.print(f"figure:  {figure}", markup=False)
    return 0


@app.command(name="data")
def data_command(name: str | None = None, *, size: Sizes = None) -> int:
    """List the data sets: where each was found, or what would be downloaded; with a name, read it and count.

    Example: local-elasticity data cifar10

    Args:
        name: a data set to read (and to download where it is not at hand), or a folder of class folders of images.
        size: as in track.
    """
    import local_elasticity as le

    if name is not None:
        images = le.data.load(name, **_size(size))
        console.print(f"{images.name}: {images.origin}; {len(images)} training images of shape {images.shape}")
        for label, count in zip(images.class_names, images.counts.tolist(), strict=True):
            console.print(f"  {label}: {count}", markup=False)
        return 0
    for entry in le.data.catalogue():
        console.print(f"{entry.name}: {entry.where}", markup=False)
    return 0


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
    from local_elasticity.cli.simulation import ARRAYS, Settings
    from local_elasticity.cli.simulation import simulate as run

    usable_device(device)
    _check_folder("--out", out)
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


@app.command
def bench(name: str = "snapshot", *, quick: bool = False, out: Path | None = None) -> int:
    """Run a benchmark: the plain reference, ours and the floor side by side; needs the source tree.

    Example: local-elasticity bench snapshot

    Args:
        name: which benchmark.
        quick: fewer repeats.
        out: write the table to this file too.
    """
    import runpy

    _check_file(out)
    folder = Path(__file__).resolve().parents[3] / "benchmarks"
    known = sorted(path.stem for path in folder.glob("*.py")) if folder.is_dir() else []
    if not known:
        raise InputError(
            expected="the source tree with its benchmarks/ folder",
            got="an installed package",
            do='clone the repository and install it with pip install -e "."',
        )
    if name not in known:
        raise InputError(expected="a benchmark", got=repr(name), do=nearest(name, known))
    sys.path.insert(0, str(folder))  # as when the file is run by itself: they share the table
    module = runpy.run_path(str(folder / f"{name}.py"))
    return int(module["main"](quick=quick, out=out))


@app.command
def reproduce(
    *names: str,
    scale: Literal["small", "paper"] = "small",
    size: Words = None,
    out: Path | None = None,
    list_: Annotated[bool, Parameter(name="--list", negative="")] = False,
    from_: Annotated[Path | None, Parameter(name="--from")] = None,
    backend: Literal["serial", "loky", "ray", "dask"] | None = None,
    jobs: Whole = 1,
    address: str | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    trainings: Path | None = None,
    train_only: bool = False,
    only: Literal["geomnist", "cifar10"] | None = None,
    results: Path | None = None,
    so_far: bool = False,
) -> int:
    """Run studies of the papers and judge their claims; exit status 1 when a claim that was expected to hold does not.

    Example: local-elasticity reproduce dan2023-cifar10 --scale small

    Args:
        names: the studies, or all; several end with a page that joins their claims.
        scale: small (minutes) or paper (the published size).
        size: a size between, as NAME=VALUE: for example --size epochs=7 runs=1 every=18; the tables say so.
        out: folder of the study (of several: the folder of their folders); runs/NAME-SCALE by default. A study that
            was interrupted continues there.
        list_: list the studies: paper, figure, claim, and what they cost.
        from_: replay the study that made this folder, with its settings and seeds.
        backend: where independent runs are made: serial, loky (processes here), ray or dask (a cluster).
        jobs: runs at once; with more than one, loky unless a backend is named.
        address: of a running Ray or dask cluster, HOST:PORT.
        device: of the networks, cpu or cuda; for studies of images and of ensembles.
        overwrite: throw away what is already there.
        trainings: for studies of ensembles: a folder of trainings to share; else those of neighbouring studies are.
        train_only: for studies of ensembles: stop after the trainings.
        only: for studies of ensembles: one of their data sets.
        results: keep the tables, figures and timings of all studies here too, small files only.
        so_far: judge and draw what an unfinished study has so far; nothing is run.
    """
    from local_elasticity.base.parallel import Workers
    from local_elasticity.studies.engine import reproduction

    if list_ or not (names or from_):
        return reproduction.show_list(sys.stdout.isatty())
    check_whole("--jobs", jobs)
    for option, place in (("--out", out), ("--results", results), ("--trainings", trainings)):
        _check_folder(option, place)
    workers = Workers(backend or ("loky" if jobs > 1 else "serial"), jobs, address)
    if from_ is not None:
        if device != "cpu":
            raise InputError(
                expected="the device of the study that is replayed", got=f"--device {device}", do="leave it out"
            )
        return reproduction.replay(from_, out, workers, overwrite)
    usable_device(device)
    if so_far:
        return reproduction.so_far(names, scale, _sizes(size), out)
    ensembles = {"trainings": trainings, "train_only": train_only, "only": only}
    return reproduction.reproduce(names, scale, _sizes(size), out, workers, overwrite, results, ensembles, device)


def _sizes(words: list[str] | None) -> dict[str, str]:
    pairs = [word.partition("=") for word in words or ()]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise InputError(expected="sizes as NAME=VALUE", got=repr(name + equals + value), do="for example runs=1")
    return {name: value for name, _, value in pairs}
