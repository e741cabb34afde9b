"""Matrices of pairs too large for memory: tile by tile into a zarr store, resumable, spread by joblib.

Each tile is one chunk of the store and is marked done after it was written: a run that was killed goes on where it
stopped. Tiles go through ``joblib.Parallel``, so ``joblib.parallel_config(backend=..., n_jobs=...)`` spreads them.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import torch
from torch import Tensor, nn

from local_elasticity.base.checks import check_choice, check_flag, check_path, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.base.files import discard, leftover_of, told_of_disk
from local_elasticity.base.locks import Lock
from local_elasticity.base.progress import Progress
from local_elasticity.base.tensors import check_module
from local_elasticity.impact import checks
from local_elasticity.impact.measurement import measure
from local_elasticity.impact.pairs.products import contract
from local_elasticity.impact.pairs.sweep import loss_factors
from local_elasticity.impact.plan import told_of_memory
from local_elasticity.impact.problem import LossFunction, Problem, match_rows
from local_elasticity.impact.subject import preserved
from local_elasticity.impact.update import SGD, Update
from local_elasticity.impact.wrappers import inner_module

if TYPE_CHECKING:
    import xarray
    import zarr

_OWN_SETTINGS = ("model", "loss_fn", "sources", "targets", "update", "engine", "progress")
FORMAT_VERSION = 1
DIMS = {
    "change": ("source", "target", "output"),
    "gram": ("source", "target"),
    "before": ("target", "output"),
    "source_before": ("source", "output"),
    "source_change": ("source", "output"),
    "losses": ("source",),
    "self_index": ("source",),
}


@told_of_memory()
def measure_tiles(
    model: nn.Module,
    loss_fn: LossFunction,
    sources: tuple[Tensor, Tensor],
    targets: Tensor | None = None,
    *,
    update: Update,
    out: str | Path,
    tile: int = 512,
    engine: str = "linear",
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> xarray.Dataset:
    """As ``measure``, into a zarr store: for more pairs than memory holds.

    Args:
        model: the network.
        loss_fn: ``loss_fn(outputs, labels)``, called with one sample.
        sources: inputs and labels.
        targets: inputs; the sources by default.
        update: the step.
        out: the store; the same call continues one that was interrupted.
        tile: sources, and targets, of one tile.
        engine: "linear" or "replay"; "auto" could choose differently from tile to tile.
        overwrite: throw away what is there.
        progress: show a progress bar over tiles.
        **settings: as in ``measure``.

    Returns:
        The store, read lazily: change (source, target, output), before, source_before, source_change, losses,
        self_index. ``dataset.change[:100].values`` reads a hundred sources.

    Raises:
        InputError: for bad input, or a store of another measurement.
    """
    check_choice("engine", engine, ("linear", "replay"))
    check_whole("tile", tile)
    check_flag("overwrite", overwrite)
    check_flag("progress", progress)
    place = check_path("out", out)
    known = inspect.signature(measure).parameters
    for name in settings:
        check_choice("a setting of measure", name, [key for key in known if key not in _OWN_SETTINGS])
    checks.check_loss_function(loss_fn)
    checks.check_update(update)
    model = inner_module(check_module("model", model))
    checks.check_model(model)
    inputs, labels = checks.check_sources(sources)
    looked_at = inputs if targets is None else checks.check_targets(targets)
    settings = {"check_pairs": 0, **settings, "engine": engine, "update": update}
    first = measure(model, loss_fn, (inputs[:1], labels[:1]), looked_at[:1], **settings)
    (n, m), k, dtype = (len(inputs), len(looked_at)), first.before.shape[1], _numpy_type(first.before)
    shapes = {
        "change": ((n, m, k), (tile, tile, k), dtype),
        "before": ((m, k), (tile, k), dtype),
        "source_before": ((n, k), (tile, k), dtype),
        "source_change": ((n, k), (tile, k), dtype),
        "losses": ((n,), (tile,), dtype),
        "self_index": ((n,), (n,), "int64"),
    }
    identity = fingerprint(model, inputs, labels, looked_at, update, {**settings, "update": update.name}, tile)
    rows, columns = -(-n // tile), -(-m // tile)

    def work(row: int, column: int) -> None:
        i, j = slice(row * tile, min((row + 1) * tile, n)), slice(column * tile, min((column + 1) * tile, m))
        impact = measure(model, loss_fn, (inputs[i], labels[i]), looked_at[j], **settings)
        _array(store, "change")[i, j] = impact.change.cpu().numpy()
        if row == 0:
            _array(store, "before")[j] = impact.before.cpu().numpy()
        if column == 0:
            _array(store, "source_before")[i] = impact.source_before.cpu().numpy()
            _array(store, "source_change")[i] = impact.source_change.cpu().numpy()
            _array(store, "losses")[i] = impact.losses.cpu().numpy()

    with Lock(place), told_of_disk(place):
        store = _open(place, shapes, (rows, columns), identity, overwrite)
        _array(store, "self_index")[:] = match_rows(inputs, looked_at).cpu().numpy()
        tiles = itertools.product(range(rows), range(columns))
        run_tiles(store, tiles, work, progress, f"{n} x {m} pairs, engine {engine}")
    return _dataset(place)


@told_of_memory()
def gradient_gram(
    model: nn.Module,
    loss_fn: LossFunction,
    samples: tuple[Tensor, Tensor],
    *,
    out: str | Path,
    tile: int = 512,
    overwrite: bool = False,
    progress: bool = False,
) -> xarray.Dataset:
    """Inner products of the samples' loss gradients, all pairs, into a zarr store; only the upper triangle is computed.

    Args:
        model: the network, measured in eval mode.
        loss_fn: ``loss_fn(outputs, labels)``, called with one sample.
        samples: inputs and labels.
        out: the store; the same call continues one that was interrupted.
        tile: samples a side of a tile.
        overwrite: throw away what is there.
        progress: show a progress bar over tiles.

    Returns:
        The store, read lazily: gram (source, target).

    Raises:
        InputError: for bad input, or a store of another measurement.
    """
    check_whole("tile", tile)
    check_flag("overwrite", overwrite)
    check_flag("progress", progress)
    place = check_path("out", out)
    checks.check_loss_function(loss_fn)
    model = inner_module(check_module("model", model))
    checks.check_model(model)
    x, y = checks.check_sources(samples, "samples")
    n = len(x)
    u = _cotangents(model, loss_fn, x, y, tile)
    shapes = {"gram": ((n, n), (tile, tile), _numpy_type(u))}
    identity = fingerprint(model, x, y, x, None, {"gram": True}, tile)
    rows = -(-n // tile)

    def work(row: int, column: int) -> None:
        i, j = (slice(a * tile, min((a + 1) * tile, n)) for a in (row, column))
        left = (x[i], u[i])
        right = left if row == column else (x[j], u[j])
        with preserved(model, "eval", loss_fn):
            block = contract(model, *left, *right).cpu().numpy()
        _array(store, "gram")[i, j] = block
        if row != column:
            _array(store, "gram")[j, i] = block.T

    with Lock(place), told_of_disk(place):
        store = _open(place, shapes, (rows, rows), identity, overwrite)
        pairs = itertools.combinations_with_replacement(range(rows), 2)
        run_tiles(store, pairs, work, progress, f"{n} x {n} pairs")
    return _dataset(place)


def _cotangents(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, tile: int) -> Tensor:
    """The gradient of every sample's loss by its outputs, (n, K).

    Raises:
        InputError: for a loss that reads more than the outputs, or forward passes that are not all alike.
    """
    with preserved(model, "eval", loss_fn) as subject:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        problem = Problem(subject, loss_fn, x, y, x, parameters, SGD(1.0).bind(parameters), tile)
        problem.look_before("values")
        factors = problem.restless or loss_factors(problem)
    if isinstance(factors, str) or factors.penalty is not None:
        got = factors if isinstance(factors, str) else "a loss with a term on the weights"
        raise InputError(
            expected="forward passes that are all alike, and a loss of nothing but the outputs and the label",
            got=got,
            do="use mode 'eval' modules and a loss of the outputs; le.measure takes any loss",
        )
    return factors.cotangents


def run_tiles(
    store: zarr.Group,
    tiles: Iterable[tuple[int, int]],
    work: Callable[[int, int], None],
    progress: bool,
    title: str,
) -> None:
    """Do the tiles that are not done yet, and mark each when it has been written; one intra-op thread a task."""
    left = [place for place in tiles if not _is_done(store, place) or not _is_whole(store, place)]

    def one(row: int, column: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            work(row, column)
        finally:
            torch.set_num_threads(threads)
        _array(store, "done")[row, column] = True

    with Progress(progress, len(left), title) as bar:
        for _ in joblib.Parallel(return_as="generator_unordered")(joblib.delayed(one)(*place) for place in left):
            bar.advance()


def fingerprint(
    model: nn.Module, inputs: Tensor, labels: Tensor, targets: Tensor, update: Update | None, settings: Any, tile: int
) -> str:
    """What a store belongs to: weights, samples, update and settings."""
    total = hashlib.sha256(repr((sorted(settings.items(), key=str), tile)).encode())
    tensors = [*model.state_dict().values(), inputs, labels, targets]
    optimizer = getattr(update, "optimizer", None)
    if optimizer is not None:
        state = optimizer.state_dict()
        total.update(repr(state["param_groups"]).encode())
        tensors += [x for one in state["state"].values() for x in one.values() if isinstance(x, Tensor)]
    elif update is not None:
        total.update(repr(update).encode())
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            total.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _open(out: Path, shapes: dict[str, Any], tiles: tuple[int, int], identity: str, overwrite: bool) -> zarr.Group:
    """The store of a measurement: the one that is there, or a new one."""
    from local_elasticity.base import chunks

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not _is_ours(out):
            raise InputError(
                expected="a zarr store of tiles, or a path where nothing is",
                got=f"something else at {out}",
                do="choose another out=",
            )
        document = {"attributes": {}} if overwrite else chunks.read_document(out)
        chunks.check_version(document["attributes"].get("format_version", 1), FORMAT_VERSION, str(out))
        if document["attributes"].get("identity") == identity:
            chunks.mend_metadata(out, document)
            chunks.open_arrays(out, [*shapes, "done"])
            return chunks.open_group(out)
        if not overwrite:
            raise InputError(
                expected="a store of the same weights, samples, update and settings",
                got=f"{out}, which belongs to another measurement",
                do="choose another out=, or pass overwrite=True",
            )
    _make(out, shapes, tiles, {"identity": identity, "format_version": FORMAT_VERSION, **chunks.SEALED})
    return chunks.open_group(out)


def _make(out: Path, shapes: dict[str, Any], tiles: tuple[int, int], attributes: dict[str, Any]) -> None:
    """Build a store beside its place and move it there whole, so that a kill leaves either nothing or a store."""
    import zarr

    from local_elasticity.base import chunks

    discard(out)
    building = leftover_of(out)
    store = zarr.open_group(str(building), mode="w", zarr_format=3)
    for name, (shape, tile, dtype) in shapes.items():
        chunks.create_array(
            *(store, name),
            shape=shape,
            chunks=tuple(max(1, min(c, s)) for c, s in zip(tile, shape, strict=True)),
            dtype=dtype,
            fill_value=0 if dtype == "int64" else float("nan"),
            dimension_names=DIMS[name],
        )
    chunks.create_array(
        *(store, "done"),
        shape=tiles,
        chunks=(1, 1),
        dtype="bool",
        fill_value=False,
        dimension_names=("row", "column"),
    )
    store.update_attributes(attributes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        zarr.consolidate_metadata(store.store)
    building.rename(out)


def _array(store: zarr.Group, name: str) -> zarr.Array:
    import zarr

    found = store[name]
    assert isinstance(found, zarr.Array)
    return found.with_config({"write_empty_chunks": "checksums" in store.attrs})


def _is_ours(out: Path) -> bool:
    """Whether a store of tiles is there, its metadata damaged or not; anything else is never overwritten."""
    from local_elasticity.base import chunks

    if not (out / "zarr.json").is_file():
        return False
    try:
        return "identity" in chunks.read_document(out)["attributes"]
    except InputError:
        return (out / "done").is_dir()


def _is_done(store: zarr.Group, tile: tuple[int, int]) -> bool:
    """Whether a tile was marked; one whose mark is damaged is measured again."""
    try:
        return bool(_array(store, "done")[tile])
    except (ValueError, RuntimeError):
        return False


def _is_whole(store: zarr.Group, tile: tuple[int, int]) -> bool:
    """Whether what was written of a tile is there and undamaged; in older stores that cannot be told."""
    from local_elasticity.base import chunks

    if "checksums" not in store.attrs:
        return True
    root, (row, column) = Path(str(store.store).removeprefix("file://")), tile
    for name, dims in DIMS.items():
        belongs = ("source" in dims or row == 0) and ("target" in dims or column == 0)
        if name not in store or name == "self_index" or not belongs:
            continue
        places = [{"source": row, "target": column, "output": 0}]
        if name == "gram":  # a tile is written with its mirror image
            places.append({"source": column, "target": row})
        for place in places:
            if not chunks.is_whole(root.joinpath(name, "c", *(str(place[dim]) for dim in dims))):
                return False
    return True


def _dataset(out: Path) -> xarray.Dataset:
    from local_elasticity.base import chunks

    return chunks.open_dataset(out, consolidated=False, chunks=None).drop_vars("done")


def _numpy_type(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
