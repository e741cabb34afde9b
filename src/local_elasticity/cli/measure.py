"""``local-elasticity measure``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from local_elasticity.base.checks import (
    check_seed,
    make_folder,
)
from local_elasticity.base.devices import usable_device
from local_elasticity.base.errors import InputError
from local_elasticity.cli.app import app, console
from local_elasticity.cli.options import Sizes, Whole, Words, check_counts, check_file, size_option


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

    check_counts(per_class=per_class)
    check_seed("--seed", seed)
    check_file(out)
    names = definition or ["he_su", "kl"]
    for name in names:
        get_definition(name)
    rule = parse_update(update)[1]
    where = usable_device(device)
    images = le.data.load(data, split, **size_option(size))
    images = images.subset(classes) if classes else images
    samples = le.data.probes(images, per_class=per_class, seed=seed)
    torch.manual_seed(seed)
    model = le.networks.build(network, images.n_classes, images.shape)
    if checkpoint is not None:
        load_weights(model, checkpoint)
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
        print_table(name, table)
    if out is not None:
        make_folder("the folder of --out", out.parent)
        content = {name: table.to_xarray().to_dict() for name, table in tables.items()}
        out.write_text(json.dumps({"plan": asdict(plan), "tables": content}, indent=2, default=str))
        console.print(f"table: {out}", markup=False)
    return 0


def load_weights(model: Any, path: Path) -> None:
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


def print_table(name: str, table: Any) -> None:
    """Show a table of classes."""
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
