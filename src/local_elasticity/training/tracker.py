"""The tracker: follows local elasticity through any training loop, and never disturbs it."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from local_elasticity.base.checks import (
    check_choice,
    check_class_names,
    check_flag,
    check_mapping,
    check_names,
    check_place,
    check_real,
    check_seed,
    check_whole,
    in_words,
    is_whole,
)
from local_elasticity.base.errors import InputError, nearest
from local_elasticity.base.files import told_of_disk
from local_elasticity.base.progress import duration
from local_elasticity.base.streams import kept_streams
from local_elasticity.base.tensors import check_callable, check_module
from local_elasticity.collapse import CLASSIFIER, GEOMETRY, PENULTIMATE, check_layers, layer_metrics
from local_elasticity.impact import Impact, measure
from local_elasticity.impact.checks import check_labels, check_sources, check_update
from local_elasticity.impact.measurement import Outputs
from local_elasticity.impact.problem import LossFunction
from local_elasticity.impact.subject import Mode, preserved
from local_elasticity.impact.update import Update
from local_elasticity.impact.wrappers import check_alone, first_rank, inner_module
from local_elasticity.runs.folders import locate
from local_elasticity.runs.provenance import git_revision, versions
from local_elasticity.runs.run import Run, open_run
from local_elasticity.runs.stores import OUTPUTS, MemoryStore, Snapshot, ZarrStore
from local_elasticity.similarity.definitions import at_limit, get_definition, is_built_in, movements
from local_elasticity.similarity.tables import ClassTable, by_class
from local_elasticity.training.schedule import Budget, Moment, Schedule, check_schedule, every

if TYPE_CHECKING:
    import xarray as xr

Keep = Literal["outputs", "pairs", "tables"]
Scalar = float | Callable[[], float]
PILOT_SOURCES = 4
MOST_LETTERS = 60  # in the name of a number: file systems take 255 bytes
CHECKPOINTS = 16  # snapshots whose checkpoints' hashes are kept
KEEP_LIMIT = 500 * 10**6  # bytes of outputs kept by default
PER_PAIR = ("update", "definition", "source_class", "target_class")


@dataclass(frozen=True)
class Look:
    """What one snapshot saw.

    Attributes:
        step: optimiser updates made so far.
        tables: (update, definition) -> class table.
        seconds: what it cost.
    """

    step: int
    tables: dict[tuple[str, str], ClassTable]
    seconds: float


class Tracker:
    """Follows S_rel through training.

    Args:
        model: the network being trained. Of ``DistributedDataParallel`` and ``DataParallel`` the inner module is
            measured; with ``DistributedDataParallel`` rank 0 looks and writes, and the trackers of the other ranks
            only count.
        loss_fn: ``loss_fn(outputs, labels)`` of the probe step.
        probes: (inputs, labels), any count >= 1 a class, or ``le.data.probes(...)``, which remembers sample indices.
        update: the probe step, or a dict name -> update for several at each snapshot.
        definitions: names of definitions; others can be evaluated afterwards from the outputs that are kept.
        schedule: when to look; ``every(9)`` by default.
        store: path of the run (``….zarr``); in memory without.
        resume: True continues the run in ``store`` from its last snapshot (``resume_step``); a number continues from
            that step, and what came after it is replaced.
        keep: "outputs" (by default while under 500 MB), "pairs" (S_rel of each pair) or "tables".
        mode: flags of the modules while looking.
        outputs: what the model emits, as in ``measure``.
        exclude_self: leave pairs of a sample with itself out of the class tables.
        class_names: names by label; taken from the probes where they know.
        route: force the route of ``measure``; by default it follows from counts, alike at every snapshot.
        chunk_size: force its chunk.
        check_pairs: as in ``measure``.
        collapse_layers: also measure neural collapse (NC1 to NC4) of the probes' features at these layers, at every
            snapshot: names of modules, "outputs" (of the network) or "penultimate" (what goes into its last linear
            layer, with NC3 and NC4); convolution outputs are averaged over positions.
        configuration: anything that describes the run; stored with it.
        seed: of the bootstrap intervals.
        before_commit: called with the step just before a snapshot is committed, for example to write a checkpoint;
            where it returns a text, the hash of that checkpoint, the text is stored with the snapshot
            (``Tracker.checkpoint``).
        limits: names of updates, affine in the gradient (SGD), to be looked at in their small-step limit: by the engine
            "linear", every definition at its limit. Their ``after`` holds before + first-order change.

    Raises:
        InputError: for bad probes, unknown definitions, a store that holds something else.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        probes: Any,
        *,
        update: Update | Mapping[str, Update],
        definitions: Sequence[str] = ("kl",),
        schedule: Schedule | None = None,
        store: str | Path | None = None,
        resume: bool | int = False,
        keep: Keep | None = None,
        mode: Mode = "eval",
        outputs: Outputs = "logits",
        exclude_self: bool = False,
        class_names: Sequence[str] | None = None,
        route: Literal["step", "vmap"] | None = None,
        chunk_size: int | None = None,
        check_pairs: int = 8,
        collapse_layers: Sequence[str] = (),
        configuration: Mapping[str, Any] | None = None,
        seed: int = 0,
        before_commit: Callable[[int], Any] | None = None,
        limits: Sequence[str] = (),
    ) -> None:
        self.model, self.loss_fn = inner_module(check_module("model", model)), loss_fn
        self.looks = first_rank(model)
        self.mode: Mode = check_choice("mode", mode, Mode)
        check_alone(self.model, mode)
        self.outputs: Outputs = check_choice("outputs", outputs, Outputs)
        self.inputs, self.labels = check_sources(_pair(probes), "probes")
        self.updates = _named(update)
        self.definitions = _checked_definitions(definitions)
        self.schedule = check_schedule("schedule", schedule, or_none=True) or every(9)
        self.keep: Keep | None = check_choice("keep", keep, Keep, or_none=True)
        self.exclude_self, self.seed = check_flag("exclude_self", exclude_self), check_seed("seed", seed)
        self.check_pairs = check_whole("check_pairs", check_pairs, 0)
        self.before_commit = before_commit
        if before_commit is not None:
            check_callable("before_commit", before_commit, 1, "lambda step: torch.save(model.state_dict(), 'last.pt')")
        self.class_names = _class_names(probes, self.labels, class_names)
        self.sample_index = np.asarray(getattr(probes, "indices", np.arange(len(self.inputs))))
        names = check_names("collapse_layers", collapse_layers, least=0)
        self.collapse_layers = check_layers(self.model, names) if names else ()
        if self.collapse_layers and len(torch.unique(self.labels)) < 2:
            raise InputError(expected="probes of at least 2 classes", got="one", do="leave out collapse_layers")
        self.limits = _checked_limits(limits, self.updates)
        check_choice("route", route, ("step", "vmap"), or_none=True)
        check_whole("chunk_size", chunk_size, or_none=True)
        self._asked: dict[str, tuple[Any, int | None]] = dict.fromkeys(self.updates, (route, chunk_size))
        if self.looks:
            self._try()
        self._started = time.perf_counter()
        self._measuring, self._cost, self._kept_bytes = 0.0, math.nan, 0
        self._epoch: float | None = None
        self._epoch_start = 0
        self.updates_made = self.resume_step = 0
        self._checkpoints: dict[str, str] = {}
        self._attributes = self._describe(check_mapping("configuration", configuration, or_none=True))
        self._open(store, _checked_resume(resume))

    # -- the loop's face ------------------------------------------------------------------------------------------

    def step(self, epoch: float | None = None, **scalars: Scalar) -> Look | None:
        """Count one update of the loop, after ``optimizer.step()``; look if the schedule says so.

        Args:
            epoch: the epoch, where the loop knows it, also in fractions (2.5 is the middle of the third);
                ``every(n, per="epoch")`` restarts when its whole part changes.
            scalars: loss, accuracy or any other number, or a function that gives one, called only when looking.

        Returns:
            The snapshot, committed to the store, or None: not due, or not rank 0.
        """
        epoch = check_real("epoch", epoch, or_none=True)
        _check_scalar_names(scalars)
        if _whole(epoch) != _whole(self._epoch):
            self._epoch_start = self.updates_made
        self._epoch = epoch
        call = self.updates_made
        self.updates_made += 1
        if not self.looks:
            return None
        elapsed = time.perf_counter() - self._started
        moment = Moment(call, call - self._epoch_start, elapsed, self._measuring, self._estimate)
        with nullcontext() if type(self.schedule).__module__ == Schedule.__module__ else kept_streams():
            is_due = self.schedule.due(moment)
        return self.snapshot(**scalars) if is_due else None

    def snapshot(self, **scalars: Scalar) -> Look:
        """Look now, also before the first update; replaces an earlier look at the same step. Empty but on rank 0."""
        if not self.looks:
            return Look(self.updates_made, {}, 0.0)
        _check_scalar_names(scalars)
        started = time.perf_counter()
        with kept_streams():
            numbers = {name: _number(name, value) for name, value in scalars.items()}
        impacts = {name: self._measure(name, update) for name, update in self.updates.items()}
        tables, pairs = self._evaluate(impacts)
        content = self._content(impacts, tables, pairs, numbers)
        plans = {name: impact.plan.as_dict() for name, impact in impacts.items()}
        attributes = self._route_attributes(plans)
        attributes["independent"] = any(impact.independent for impact in impacts.values())
        attributes["epoch_start"] = [_whole(self._epoch), self._epoch_start]
        content["seconds"] = ((), np.float64(time.perf_counter() - started))
        if not self._created:
            self._store.create(self._static(impacts), {**self._attributes, **attributes})
            self._created = True
        if self.before_commit is not None:
            with kept_streams():
                returned = self.before_commit(self.updates_made)
            attributes |= self._note_checkpoint(returned)
        self._store.append(self.updates_made, content, attributes)
        seconds = time.perf_counter() - started
        self._measuring += seconds
        self._cost = seconds
        return Look(self.updates_made, tables, seconds)

    def finish(self) -> Run:
        """The run; says so when the budget never allowed a look. Without snapshots but on rank 0."""
        if self.looks:
            self._report_unfit()
        if not self._created:
            self._store.create(self._static({}), self._attributes)
            self._created = True
        if isinstance(self._store, ZarrStore):
            self._store.drop_replaced()
        self._store.set_attributes({"finished": True, "overhead": self.overhead})
        self._store.close()
        return self._store.open()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._store.close()

    @property
    def checkpoint(self) -> str | None:
        """What ``before_commit`` returned for the snapshot that the run continues from; None where it returned nothing.

        A checkpoint without this hash is not that snapshot's.
        """
        return self._checkpoints.get(str(self.resume_step))

    def _note_checkpoint(self, returned: Any) -> dict[str, Any]:
        """The hashes of the last checkpoints, as an attribute of the run."""
        if isinstance(returned, str):
            here = str(self.updates_made)
            others = [(step, text) for step, text in self._checkpoints.items() if step != here]
            self._checkpoints = {**dict(others[1 - CHECKPOINTS :]), here: returned}
        return {"checkpoints": self._checkpoints} if self._checkpoints else {}

    @property
    def overhead(self) -> float:
        """Seconds spent measuring / all other seconds since the tracker was made."""
        elapsed = time.perf_counter() - self._started
        return self._measuring / max(elapsed - self._measuring, 1e-9)

    # -- measuring ------------------------------------------------------------------------------------------------

    def _try(self) -> None:
        """Take each update at two probes, so that what cannot be measured is refused before training starts.

        The largest label is the one that shows whether labels are classes of the outputs.
        """
        some = torch.unique(torch.tensor([0, int(self.labels.argmax())]))
        for name, update in self.updates.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                impact = self._measure(name, update, some)
                self._n_outputs = impact.before.shape[1]
                check_labels(self.labels, self._n_outputs, self.outputs)
                for definition in self.definitions:
                    self._movements(name, impact, definition)

    def _measure(self, name: str, update: Update, some: Tensor | None = None) -> Impact:
        """An update at some probes, all by default, looked at on all of them."""
        is_limit = name in self.limits
        route, chunk_size = self._asked[name]
        sources = (self.inputs, self.labels) if some is None else (self.inputs[some], self.labels[some])
        return measure(
            self.model,
            self.loss_fn,
            sources,
            None if some is None else self.inputs,
            update=update,
            engine="linear" if is_limit else "replay",
            outputs=self.outputs,
            route=None if is_limit else route,
            chunk_size=len(self.inputs) if is_limit else chunk_size,
            mode=self.mode,
            check_pairs=self.check_pairs if some is None else 0,
        )

    def _estimate(self) -> float:
        """Seconds that a snapshot is expected to take: the last one's, or from pilots of one and of a few sources."""
        if math.isnan(self._cost):
            few = min(PILOT_SOURCES, len(self.inputs))
            self._pilot(1)  # the first call of all warms up
            one, some = self._pilot(1), self._pilot(few)
            slope = max(some - one, 0.0) / max(few - 1, 1)
            self._cost = one + slope * (len(self.inputs) - 1)
        return 1.1 * self._cost

    def _pilot(self, n: int) -> float:
        """Seconds that looks at the first sources take, every update."""
        started = time.perf_counter()
        for update in (update for name, update in self.updates.items() if name not in self.limits):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                measure(
                    self.model,
                    self.loss_fn,
                    (self.inputs[:n], self.labels[:n]),
                    self.inputs,
                    update=update,
                    engine="replay",
                    outputs=self.outputs,
                    mode=self.mode,
                    route="step",
                    check_pairs=0,
                )
        seconds = time.perf_counter() - started
        self._measuring += seconds
        return seconds

    def _report_unfit(self) -> None:
        if isinstance(self.schedule, Budget) and not self._store.steps and self.updates_made:
            cost, elapsed = self._estimate(), time.perf_counter() - self._started
            warnings.warn(
                f"no snapshot was taken: it would cost {duration(cost)}, and budget({self.schedule.fraction}) "
                f"allows it in runs of at least {duration(cost / self.schedule.fraction)}; this one took "
                f"{duration(elapsed)}. Use fewer probes, a larger budget, or every(n)",
                stacklevel=3,
            )

    # -- what a snapshot holds --------------------------------------------------------------------------------------

    def _evaluate(
        self, impacts: Mapping[str, Impact]
    ) -> tuple[dict[tuple[str, str], ClassTable], dict[tuple[str, str], np.ndarray]]:
        tables, pairs = {}, {}
        ids = self.sample_index if len(set(self.sample_index.tolist())) == len(self.sample_index) else None
        for update, impact in impacts.items():
            for definition in self.definitions:
                numerators, denominators = self._movements(update, impact, definition)
                ratio = numerators / denominators[:, None]
                if update in self.limits:
                    denominators = movements(at_limit(impact, together=True), definition, 0.0)[1]
                ratio = torch.where(torch.isfinite(ratio) & (denominators[:, None] != 0), ratio, torch.nan).cpu()
                pairs[update, definition] = ratio.numpy()
                tables[update, definition] = by_class(
                    ratio,
                    self.labels.cpu(),
                    self.labels.cpu(),
                    class_names=self.class_names,
                    exclude_self=self.exclude_self,
                    source_ids=ids,
                    target_ids=ids,
                    denominators=denominators.cpu(),
                    seed=self.seed,
                )
        return tables, pairs

    def _movements(self, update: str, impact: Impact, definition: str) -> tuple[Tensor, Tensor]:
        """Numerators and denominators of a definition, those of an update in its limit at their limit."""
        with nullcontext() if is_built_in(definition) else kept_streams():
            if update in self.limits:
                return movements(at_limit(impact), definition, 0.0)
            return movements(impact, definition)

    def _content(
        self,
        impacts: Mapping[str, Impact],
        tables: Mapping[tuple[str, str], ClassTable],
        pairs: Mapping[tuple[str, str], np.ndarray],
        scalars: Mapping[str, float],
    ) -> Snapshot:
        content: Snapshot = {"epoch": ((), np.float64(math.nan if self._epoch is None else self._epoch))}
        content |= self._tables_content(tables)
        first = next(iter(impacts.values()))
        content |= self._collapse()
        content["probe_loss"] = ((), np.float64(first.losses.double().mean().item()))
        content["probe_accuracy"] = ((), np.float64(_accuracy(first.source_before, self.labels, self.outputs)))
        content["class_mean_output"] = (("class", "output"), self._class_means(first.before))
        per_update = {
            "below_noise_fraction": [float(impact.below_noise.double().mean()) for impact in impacts.values()],
            "linearization_error": [impact.linearization_error for impact in impacts.values()],
        }
        content |= {name: (("update",), np.array(values)) for name, values in per_update.items()}
        if self.keep == "pairs":
            stacked = [[pairs[u, d] for d in self.definitions] for u in self.updates]
            content["pairs"] = (("update", "definition", "source", "target"), np.array(stacked))
        elif self.keep != "tables":
            content |= self._outputs_content(impacts)
        taken = {*content, *OUTPUTS, *self._static({}), "pairs", "seconds", "step"}
        for name in scalars:
            if name in taken:
                raise InputError(expected="names that the run does not use", got=repr(name), do="rename this number")
        return content | {name: ((), np.float64(value)) for name, value in scalars.items()}

    def _outputs_content(self, impacts: Mapping[str, Impact]) -> Snapshot:
        first = next(iter(impacts.values()))
        after = np.stack([_array(impact.after) for impact in impacts.values()])
        self._kept_bytes += after.nbytes
        if self.keep is None and self._kept_bytes > KEEP_LIMIT:
            warnings.warn(
                f"the outputs of this run pass {KEEP_LIMIT // 10**6} MB: from here on only tables are kept; "
                "track with keep='outputs' to keep them all",
                stacklevel=4,
            )
            self.keep = "tables"
            return {}
        return {
            "before": (("target", "output"), _array(first.before)),
            "after": (("update", "source", "target", "output"), after),
            "source_before": (("source", "output"), _array(first.source_before)),
            "source_after": (
                ("update", "source", "output"),
                np.stack([_array(impact.source_after) for impact in impacts.values()]),
            ),
        }

    def _collapse(self) -> Snapshot:
        """Every metric of neural collapse, (layer,); NaN where a layer does not have it."""
        if not self.collapse_layers:
            return {}
        with preserved(self.model, self.mode) as subject:
            found = subject.find_draws(
                lambda: layer_metrics(self.model, self.inputs, self.labels, self.collapse_layers)
            )
        names = (*GEOMETRY, *CLASSIFIER) if PENULTIMATE in self.collapse_layers else GEOMETRY
        return {
            name: (("layer",), np.array([found[layer].get(name, math.nan) for layer in self.collapse_layers]))
            for name in names
        }

    def _tables_content(self, tables: Mapping[tuple[str, str], ClassTable]) -> Snapshot:
        sets = [[tables[u, d].arrays() for d in self.definitions] for u in self.updates]
        content: Snapshot = {}
        for name in sets[0][0]:
            values = np.array([[one[name] for one in row] for row in sets])
            content[name] = (PER_PAIR[: values.ndim], values)
        return content

    def _class_means(self, before: Tensor) -> np.ndarray:
        labels = self.labels.to(before.device)
        classes = torch.unique(labels)
        return np.stack([_array(before[labels == label].double().mean(dim=0)) for label in classes])

    # -- the run ----------------------------------------------------------------------------------------------------

    def _static(self, impacts: Mapping[str, Impact]) -> Snapshot:
        names = np.array([self.class_names[int(label)] for label in torch.unique(self.labels)])
        labels, index = self.labels.cpu().numpy(), self.sample_index
        static: Snapshot = {
            "update": (("update",), np.array(list(self.updates))),
            "definition": (("definition",), np.array(self.definitions)),
            "source_class": (("source_class",), names),
            "target_class": (("target_class",), names),
            "class": (("class",), names),
            "source_label": (("source",), labels),
            "target_label": (("target",), labels),
            "source_index": (("source",), index),
            "target_index": (("target",), index),
        }
        if self.collapse_layers:
            static["layer"] = (("layer",), np.array(self.collapse_layers))
        return static

    def _describe(self, configuration: dict[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256(_bytes(self.inputs))
        digest.update(_bytes(self.labels))
        words = {name: get_definition(name).words for name in self.definitions if not is_built_in(name)}
        return {
            "configuration": json.dumps(configuration, default=str),
            "definitions": json.dumps({name: text for name, text in words.items() if text}),
            "outputs": self.outputs,
            "limits": list(self.limits),
            "mode": self.mode,
            "self_pairs": "out" if self.exclude_self else "in",
            "probes_sha256": digest.hexdigest(),
            "seed": self.seed,
            "versions": json.dumps(versions()),
            "git_revision": git_revision(),
            "finished": False,
        }

    def _route_attributes(self, plans: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        routes = {name: [plan["route"], plan["chunk_size"]] for name, plan in plans.items()}
        short = ", ".join(dict.fromkeys(f"{route} (chunk {chunk})" for route, chunk in routes.values()))
        engines = "replay and linear" if self.limits else "replay"
        return {
            "route": f"{engines}, {short}",
            "routes": json.dumps(routes),
            "asked_routes": json.dumps(self._asked),
            "threads": torch.get_num_threads(),
        }

    def _open(self, store: str | Path | None, resume: bool | int) -> None:
        self._created = False
        if store is None:
            if resume:
                raise InputError(expected="a store to resume", got="store=None", do="pass the path of the run")
            self._store: MemoryStore | ZarrStore = MemoryStore()
            return
        path = check_place("store", store)
        if path.suffix != ".zarr":
            path = path / "run.zarr"
        if not self.looks:
            self._follow(path, resume)
            return
        self._store = ZarrStore(path)
        self._store.hold()  # before anything is read: another writer would make it untrue
        try:
            with told_of_disk(path):
                self._take_up(path, resume)
        except BaseException:
            self._store.lock.withdraw()
            raise

    def _take_up(self, path: Path, resume: bool | int) -> None:
        """Continue the run that is there, if any; one without snapshots, killed while it was made, is made again."""
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if locate(path) is None:
            raise InputError(
                expected="an empty place or a run",
                got=f"something else at {path}, or a run whose zarr.json is damaged",
                do="choose another path, or move it away",
            )
        run = open_run(path)
        if not run.dataset.sizes.get("step", 0) and not run.dataset.attrs.get("finished", False):
            return
        if resume is False:
            raise InputError(
                expected="a new path", got=f"a run at {path}", do="pass resume=True to continue it, or another path"
            )
        self._continue(run, resume)

    def _follow(self, path: Path, resume: bool | int) -> None:
        """Count on from where rank 0 continues, without a store of its own: two processes never write one run."""
        self._store = MemoryStore()
        if resume is False or locate(path) is None:
            return
        steps = ZarrStore(path).open().dataset["step"].values if resume is True else [int(resume)]
        self.resume_step = self.updates_made = int(max(steps, default=0))

    def _continue(self, run: Run, resume: bool | int) -> None:
        assert isinstance(self._store, ZarrStore)
        dataset = run.dataset
        checks = {
            "probes": (dataset.attrs.get("probes_sha256"), self._attributes["probes_sha256"]),
            "updates": ([str(x) for x in dataset["update"].values], list(self.updates)),
            "definitions": ([str(x) for x in dataset["definition"].values], self.definitions),
            "outputs": (dataset.attrs.get("outputs"), self.outputs),
            "collapse_layers": (
                [str(x) for x in dataset["layer"].values] if "layer" in dataset.coords else [],
                list(self.collapse_layers),
            ),
            "class_names": ([str(x) for x in dataset["class"].values], self._static({})["class"][1].tolist()),
            "number of outputs": (dataset.sizes.get("output"), self._n_outputs),
            "keep": (kept := _kept(dataset), self.keep or kept),
        }
        checks |= {name: (dataset.attrs.get(name), self._attributes[name]) for name in ("mode", "self_pairs", "limits")}
        for name, (stored, now) in checks.items():
            if stored is not None and stored != now:
                raise InputError(
                    expected=f"the {name} of the stored run, {stored}",
                    got=str(now),
                    do="resume with the same settings, or store elsewhere",
                )
        self.keep = self.keep if kept == "outputs" else kept
        self._store.resume(None if resume is True else int(resume))
        self._created = True
        steps = self._store.steps
        self.resume_step = (max(steps) if steps else 0) if resume is True else int(resume)
        self.updates_made = self.resume_step
        if all(asked == (None, None) for asked in self._asked.values()):
            # runs from before routes followed from counts say only what was taken
            stored = json.loads(dataset.attrs.get("asked_routes", dataset.attrs.get("routes", "{}")))
            self._asked |= {name: tuple(asked) for name, asked in stored.items() if name in self._asked}
        self._checkpoints = dict(dataset.attrs.get("checkpoints", {}))
        if resume is True and "epoch_start" in dataset.attrs:
            self._epoch, self._epoch_start = dataset.attrs["epoch_start"]
        self._store.set_attributes({"finished": False})


def _kept(dataset: xr.Dataset) -> Keep | None:
    """What the snapshots of a run keep; None where it has none."""
    if not dataset.sizes.get("step", 0):
        return None
    return "outputs" if "after" in dataset else "pairs" if "pairs" in dataset else "tables"


def _pair(probes: Any) -> tuple[Tensor, Tensor]:
    try:
        inputs, labels = probes
    except (TypeError, ValueError):
        raise InputError(
            expected="probes=(inputs, labels) or le.data.probes(...)", got=type(probes).__name__, do="pass a pair"
        ) from None
    return inputs, labels


def _named(update: Update | Mapping[str, Update]) -> dict[str, Update]:
    if not isinstance(update, Mapping):
        check_update(update)
    named = {update.name: update} if isinstance(update, Update) else dict(update)
    texts = all(isinstance(name, str) and name for name in named)
    if not named or not texts or not all(isinstance(step, Update) for step in named.values()):
        raise InputError(
            expected="an update, or a dict name -> update",
            got=in_words(update),
            do="for example le.SGD(lr=0.01) or {'probe': le.Adam(lr=1e-4)}",
        )
    return named


def _checked_definitions(definitions: Sequence[str]) -> list[str]:
    names = check_names("definitions", definitions, distinct=True)
    for name in names:
        get_definition(name)
    return list(names)


def _checked_resume(resume: Any) -> bool | int:
    if isinstance(resume, bool | np.bool_):
        return bool(resume)
    if is_whole(resume) and resume >= 0:
        return int(resume)
    raise InputError(
        expected="resume: True, False, or the step to continue from",
        got=in_words(resume),
        do="write resume=True to continue from the last snapshot",
    )


def _checked_limits(limits: Sequence[str], updates: Mapping[str, Update]) -> tuple[str, ...]:
    limits = check_names("limits", limits, least=0, distinct=True)
    for name in limits:
        if name not in updates:
            raise InputError(expected="limits that name updates", got=repr(name), do=nearest(name, updates))
    return limits


def _class_names(probes: Any, labels: Tensor, given: Sequence[str] | None) -> tuple[str, ...]:
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise InputError(
            expected="one class label of an integer dtype for each probe",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
            do="class tables need classes; use le.measure for other targets",
        )
    if int(labels.min()) < 0:
        raise InputError(
            expected="probes that have a class each, from 0",
            got=f"label {int(labels.min())} at probe {int(labels.argmin())}",
            do="leave out the probes that the loss ignores, and number the classes from 0",
        )
    names = given if given is not None else getattr(probes, "class_names", None)
    if names is None:
        return tuple(str(label) for label in range(int(labels.max()) + 1))
    names = check_class_names("class_names", names)
    if int(labels.max()) >= len(names):
        raise InputError(
            expected=f"labels in 0..{len(names) - 1}, one name each",
            got=f"labels from {int(labels.min())} to {int(labels.max())}",
            do="relabel the probes, or pass all class_names",
        )
    return tuple(str(name) for name in names)


def _bytes(x: Tensor) -> bytes:
    """The bits of a tensor of any dtype."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _array(x: Tensor) -> np.ndarray:
    x = x.detach().cpu()
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()


def _accuracy(outputs: Tensor, labels: Tensor, kind: str) -> float:
    if kind == "values":
        return math.nan
    if outputs.shape[1] == 1:
        said = (outputs[:, 0] > (0.5 if kind == "probabilities" else 0.0)).long()
    else:
        said = outputs.argmax(dim=1)
    return float((said == labels.to(said.device)).double().mean())


def _whole(epoch: float | None) -> int | None:
    return None if epoch is None else math.floor(epoch)


def _check_scalar_names(names: Iterable[str]) -> None:
    """Refuse names that no array of a run can have: each is a folder's name."""
    for name in names:
        is_taken = not name or name.startswith(".") or name == "zarr.json"
        if is_taken or "/" in name or "\0" in name or len(name) > MOST_LETTERS:
            raise InputError(
                expected=f"names of at most {MOST_LETTERS} letters without '/' for the numbers of a step",
                got=repr(name) if len(name) <= MOST_LETTERS else f"{name[:20]!r}… of {len(name)}",
                do=f"rename this number, for example {name.strip('./')[:20].replace('/', '_') or 'loss'}",
            )


def _number(name: str, value: Scalar) -> float:
    try:
        given = value() if callable(value) else value
        if isinstance(given, str):
            raise TypeError
        return float(given)
    except Exception as error:  # also whatever a function of the user's raises
        raise InputError(
            expected=f"a number for {name!r}, or a function without arguments that gives one",
            got=in_words(value),
            do="pass loss=loss.item() and the like",
        ) from error
