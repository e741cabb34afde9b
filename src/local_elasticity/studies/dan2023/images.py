"""The image studies of the first paper: one protocol on any classes and network (arXiv 2111.01166; spec srel 3.1).

Every run keeps the outputs before and after each probe step, so that all definitions are evaluated on the same
trajectory afterwards: `tables` does that, `claims` judges.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import local_elasticity as le
from local_elasticity.base.files import write_whole
from local_elasticity.base.parallel import Task, Workers, perform, read_record
from local_elasticity.base.progress import Pace, duration, told_aside
from local_elasticity.data.images import LabelledImages
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.studies.dan2023.settings import DEFINITIONS, LIMIT, LIVE, MEASURE, PROBE, PROBES, Condition, Scale
from local_elasticity.studies.dan2023.tables import record_so_far, tables_of
from local_elasticity.studies.engine.pieces import kept
from local_elasticity.studies.engine.study import Option, Study
from local_elasticity.training.loop import Session, Training, evaluate


@dataclass(frozen=True)
class Job:
    """One run: everything that a worker needs.

    Attributes:
        condition: what is trained on what.
        size: of the study.
        probe_lr: of the published probe, a fresh Adam.
        index: number of the run.
        seed: of data, probes and the first run.
        images: to train on.
        test: of the true test split.
        settings: of the study, kept with the run.
        folder: of the run.
        aloud: print a line with every snapshot.
        probes: the probe steps, names of ``PROBES``.
        device: where to compute.
    """

    condition: Condition
    size: Scale
    probe_lr: float
    index: int
    seed: int
    images: LabelledImages
    test: LabelledImages
    settings: Mapping[str, Any]
    folder: Path
    aloud: bool
    probes: tuple[str, ...] = PROBES
    device: str = "cpu"


def load(condition: Condition, size: Scale, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Training images, so many a class, and all test images of the same source."""
    options: dict[str, Any] = {"labels": condition.labels} if condition.data == "cifar100" else {}
    if condition.data.startswith("cifar"):
        wanted = {"at_least": size.per_class, "classes": condition.classes}
        images = le.data.load(condition.data, "train", **options, **wanted)
        test = le.data.load(condition.data, "test", **options, source=images.source, classes=condition.classes)
    else:
        images, test = (le.data.load(condition.data, split).subset(condition.classes) for split in ("train", "test"))
    return images.take(size.per_class, seed), test


def track_run(job: Job) -> dict[str, Any]:
    """Train and track one run, or continue it; returns its record.

    The outputs before and after every probe step go to ``run.zarr`` in the run's folder, the controls (a step on a
    permuted label, and no step at all) to one file a look, at the last look of each epoch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", le.NoiseWarning)  # the fraction of such pairs is in the tables
        return _Run(job).follow()


class _Clock:
    """Seconds by what they were spent on; kept on disk, so that they add up over interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_record(path) if path.exists() else {}

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, time.perf_counter() - started)

    def add(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def save(self) -> None:
        write_whole(self.path, json.dumps(self.seconds))


class _TimedSession(Session):
    """A session that says what its seconds were spent on."""

    clock: _Clock

    def _update(self, positions: Tensor) -> float:
        with self.clock("training"):
            return super()._update(positions)

    def _scalars(self) -> dict[str, Any]:
        def timed(look: Callable[..., Any]) -> Callable[[], Any]:
            def number() -> Any:
                with self.clock("testing"):
                    return look()

            return number

        scalars: dict[str, Any] = super()._scalars()
        return {name: timed(x) if callable(x) else x for name, x in scalars.items()}

    def save(self, step: int) -> str | None:
        """As the session's, timed."""
        with self.clock("saving"):
            digest = super().save(step)
        self.clock.save()
        return digest


class _Run:
    """One run from its first update, or its last snapshot, to its record."""

    def __init__(self, job: Job) -> None:
        condition, size, folder = job.condition, job.size, job.folder
        self.job = job
        self.seed = job.seed + job.index
        inputs, labels = job.images.tensors(augment=job.seed)
        tensors = inputs.to(job.device), labels.to(job.device)
        self.probes = le.data.probes(job.images, per_class=size.probes_per_class, seed=job.seed, tensors=tensors)
        held = job.test.take(min(size.test_per_class, int(job.test.counts.min())), job.seed)
        torch.manual_seed(self.seed)
        self.model = le.networks.build(condition.network, len(condition.classes), job.images.shape).to(job.device)
        training = Training(
            size.epochs,
            size.batch_size,
            condition.optimizer,
            condition.lr,
            condition.weight_decay,
            condition.momentum,
            drop_last=True,
            seed=self.seed,
        )
        self.loss_fn = torch.nn.functional.cross_entropy
        kept_out = self._placed(held)
        self.session = _TimedSession(self.model, self.loss_fn, tensors, training, kept_out, folder / "checkpoint")
        configuration = {**job.settings, **asdict(condition), "run": job.index, "run_seed": self.seed}
        configuration["test_data"] = f"{len(held)} images of the true test split, {job.test.origin}"
        resume = prepare_folder(folder, configuration, overwrite=False)
        self.session.clock = self.clock = _Clock(folder / "clock.json")
        updates: dict[str, le.Update] = {
            PROBE: le.Adam(lr=job.probe_lr),
            "sgd:0.01": le.SGD(lr=1e-2),
            "sgd:0.0001": le.SGD(lr=1e-4),
            LIMIT: le.SGD(lr=1.0),
            LIVE: le.from_optimizer(self.session.optimizer),
        }
        self.tracker = le.Tracker(
            self.model,
            self.loss_fn,
            self.probes,
            update={name: update for name, update in updates.items() if name in job.probes},
            limits=[LIMIT] if LIMIT in job.probes else [],
            definitions=DEFINITIONS,
            schedule=le.every(size.every, per="epoch"),
            store=folder / "run.zarr",
            resume=resume,
            keep="outputs",
            route="step",  # fixed, so that no timing decides numbers
            check_pairs=0,  # the limit is among the probes
            configuration=configuration,
            seed=job.seed,
            before_commit=self.session.save,
        )
        if resume and self.tracker.resume_step:
            self.session.load(self.tracker.resume_step, self.tracker.checkpoint)
            self._control(self.tracker.resume_step)

    def follow(self) -> dict[str, Any]:
        """Train to the end."""
        spent, started, pace = self.clock.seconds, time.perf_counter(), Pace()
        for progress in self.session.run(self.tracker):
            pace.add(time.perf_counter() - started, 0.0 if progress.look is None else progress.look.seconds)
            if progress.look is None:
                continue
            self._control(progress.update)
            self._tell(progress, pace.left(progress.total - progress.update, self._looks_due()))
        run = self.tracker.finish()
        self.clock.add("looks", float(run.dataset["seconds"].sum()) - self.clock.seconds.get("looks", 0.0))
        loss, accuracy = self._whole_test()
        last = run.dataset.isel(step=-1)
        return {
            "condition": self.job.condition.name,
            "run": self.job.index,
            "seed": self.seed,
            "updates": self.session.total,
            "looks": int(run.dataset.sizes["step"]),
            "train_accuracy": float(last["train_accuracy"]),
            "train_loss": float(last["train_loss"]),
            "test_accuracy": accuracy,
            "test_loss": loss,
            "test_images": len(self.job.test),
            "seconds": self._shares(spent),
        }

    def _looks_due(self) -> int:
        per_epoch, every = self.session.per_epoch, self.job.size.every
        ahead = range(self.session.updates, self.session.total)
        return sum(position % per_epoch % every == 0 for position in ahead)

    def _shares(self, spent: dict[str, float]) -> dict[str, float]:
        """Seconds by what they went to; tracking is what the snapshots took beyond testing and saving."""
        other = sum(spent.get(name, 0.0) for name in ("testing", "saving"))
        shares = {name: spent.get(name, 0.0) for name in ("training", "testing", "saving", "controls")}
        return {**shares, "tracking": max(0.0, spent.get("looks", 0.0) - other)}

    def _whole_test(self) -> tuple[float, float]:
        return evaluate(self.model, self.loss_fn, *self._placed(self.job.test))

    def _placed(self, images: LabelledImages) -> tuple[Tensor, Tensor]:
        inputs, labels = images.tensors()
        return inputs.to(self.job.device), labels.to(self.job.device)

    def _tell(self, progress: Any, left: float | None) -> None:
        note = {"update": progress.update, "total": progress.total, "left": left}
        write_whole(self.job.folder / "progress.json", json.dumps(note))
        if self.job.aloud:
            table = progress.look.tables[PROBE, MEASURE]
            rest = "" if left is None else f", about {duration(left)} left"
            print(
                f"{self.job.condition.name}, run {self.job.index}, update {progress.update} of {progress.total}: "
                f"{MEASURE} intra {table.intra:.4f} inter {table.inter:.4f}; {progress.look.seconds:.1f} s for the "
                f"snapshot{rest}",
                flush=True,
            )

    def _control(self, step: int) -> None:
        """The controls of claim C5, at the last look of each epoch."""
        per_epoch, every = self.session.per_epoch, self.job.size.every
        if (step - 1) % per_epoch != (per_epoch - 1) // every * every:
            return
        with self.clock("controls"):
            kept(self.job.folder / f"control-{step:06d}.npz", lambda: self._measure_controls(step == self._last))
        self.clock.save()

    @property
    def _last(self) -> int:
        per_epoch, every = self.session.per_epoch, self.job.size.every
        return self.session.total - per_epoch + (per_epoch - 1) // every * every + 1

    def _measure_controls(self, last: bool) -> dict[str, Any]:
        xs, ys = self.probes
        adam, none = le.Adam(lr=self.job.probe_lr), le.SGD(lr=0.0)
        permuted = (ys + 1) % len(self.job.condition.classes)  # every label becomes the next class's
        looks = {"permuted": (permuted, adam), **({"none": (ys, none)} if last else {})}
        arrays = {}
        for name, (labels, update) in looks.items():
            impact = le.measure(
                self.model,
                self.loss_fn,
                (xs, labels),
                xs,
                update=update,
                engine="replay",
                route="step",
                check_pairs=0,
            )
            for part in ("before", "after", "source_before", "source_after"):
                arrays[f"{name}_{part}"] = getattr(impact, part).cpu().numpy()
        return arrays


@dataclass(frozen=True)
class ImageStudy(Study):
    """The protocol of spec srel 3.1.

    Attributes:
        name: of the study.
        title: one line for lists.
        conditions: what is trained on what, by scale.
        sizes: how large, by scale.
        cost: time to expect at each scale.
        paper: which paper.
        figure: of that paper.
        claim: what it claims.
        report: judges and draws: called with the study, its runs, the size, the scale's name and the folder.
        probe_lr: of the published probe.
        seed: of data, probes and the first run.
        probes: the probe steps; the report needs all of them.
    """

    name: str
    title: str
    conditions: Mapping[str, tuple[Condition, ...]]
    sizes: Mapping[str, Scale]
    cost: Mapping[str, str]
    report: Callable[..., int]
    paper: str = "Dan, Mukherjee, Das, Gampa 2021 (arXiv:2111.01166)"
    figure: str = ""
    claim: str = ""
    probe_lr: float = 1e-4
    seed: int = 1234
    probes: tuple[str, ...] = PROBES
    options: ClassVar[frozenset[Option]] = frozenset({"workers", "device", "so_far"})

    def run(
        self, scale: str, out: Path, overwrite: bool = False, workers: Workers | None = None, device: str = "cpu"
    ) -> int:
        """Train and track every run of this scale, judge the claims, draw.

        Args:
            scale: "small" or "paper".
            out: the study's folder; an interrupted study continues there.
            overwrite: throw away what is there.
            workers: where the runs are made; one after the other in this process by default.
            device: of every run, for example "cuda".

        Returns:
            1 when a claim fails, else 0.
        """
        return self.run_at(self.sizes[scale], scale, out, overwrite, workers, device)

    def estimated_bytes(self, scale: str, size: Scale | None, jobs: int) -> int:
        """Disk that the study takes: outputs and tables of every run, checkpoints of those at work."""
        size = size or self.sizes[scale]
        classes = len(self.conditions[scale][0].classes)
        looks = size.epochs * -(-(size.per_class * classes // size.batch_size) // size.every)
        outputs = looks * len(PROBES) * (classes * size.probes_per_class) ** 2 * classes * 4
        checkpoint = 3 * 4 * 11_200_000  # weights and two moments of the largest network
        runs = size.runs * len(self.conditions[scale])
        return runs * (outputs + 5 * 2**20) + 3 * checkpoint * min(jobs, runs) + 50 * 2**20

    def run_at(
        self,
        size: Scale,
        scale: str,
        out: Path,
        overwrite: bool = False,
        workers: Workers | None = None,
        device: str = "cpu",
    ) -> int:
        """As ``run``, with the size given; ``scale`` says which conditions."""
        workers = workers or Workers()
        loaded: dict[Condition, tuple[LabelledImages, LabelledImages]] = {}
        for condition in self.conditions[scale]:
            loaded[condition] = load(condition, size, self.seed)
        origins = {condition.name: images.origin for condition, (images, _) in loaded.items()}
        # Without the number of runs: more of them may be added to a folder later.
        settings = {
            "study": self.name,
            "scale": scale,
            "seed": self.seed,
            "probe_lr": self.probe_lr,
            **{name: value for name, value in asdict(size).items() if name != "runs"},
            "conditions": [asdict(condition) for condition in loaded],
            "data_origin": origins,
            **({} if device == "cpu" else {"device": device}),
        }
        prepare_folder(out, settings, overwrite)
        print(
            f"{self.title}, {words_of(self, size, scale)}: {scale} costs about {self.cost.get(scale, 'unknown time')}; "
            f"{workers.words}{'' if device == 'cpu' else f', on {device}'}"
        )
        for name, origin in origins.items():
            print(f"{name}: {origin}", flush=True)
        names = ("study", "scale", "seed", "probe_lr", "device")
        common = {name: settings[name] for name in names if name in settings} | asdict(size)
        del common["runs"]
        aloud, tasks = workers.backend == "serial", []
        for condition, (images, test) in loaded.items():
            mine = {**common, "data_origin": images.origin}
            for index, folder in self.folders(condition, size, scale, out):
                what = (condition, size, self.probe_lr, index, self.seed, images, test, mine, folder, aloud)
                job = Job(*what, self.probes, device)
                tasks.append(Task(f"{condition.name}, run {index}", track_run, (job,), folder / "record.json"))
        started = time.perf_counter()
        folders = [task.record.parent for task in tasks]
        alone = workers.backend == "serial"  # runs in this process tell it themselves
        with nullcontext() if alone else told_aside(lambda: how_far(folders)):
            records = perform(tasks, workers)
        waiting = time.perf_counter() - started
        for task in tasks:
            shutil.rmtree(task.record.parent / "checkpoint", ignore_errors=True)
        runs = tables_of([(task.arguments[0].condition, task.record.parent) for task in tasks], records, self.seed)
        return self.report(self, runs, size, scale, out, waiting)

    def folders(self, condition: Condition, size: Scale, scale: str, out: Path) -> list[tuple[int, Path]]:
        """Number and folder of every run of a condition."""
        alone = len(self.conditions[scale]) == 1
        return [(k, out / (f"run-{k}" if alone else f"{condition.name}-{k}")) for k in range(size.runs)]

    def so_far(self, size: Scale | None, scale: str, out: Path) -> int:
        """Judge and draw what an unfinished study has; claims on the end of training are not judged.

        Raises:
            InputError: when there is no run with a snapshot.
        """
        size = size or self.sizes[scale]
        places, records = [], []
        for condition in self.conditions[scale]:
            for index, folder in self.folders(condition, size, scale, out):
                record = record_so_far(condition, index, self.seed + index, folder)
                if record is not None:
                    places.append((condition, folder))
                    records.append(record)
        if not places:
            raise le.InputError(
                expected="a run of this study with a snapshot",
                got=f"none in {out}",
                do="run it first, without --so-far",
            )
        finished = all((folder / "record.json").exists() for _, folder in places)
        words = self if finished else replace(self, title=f"{self.title} (unfinished)")
        return self.report(words, tables_of(places, records, self.seed), size, scale, out, 0.0)


def words_of(study: ImageStudy, size: Scale, scale: str) -> str:
    """The scale, and what of it is not as its name says."""
    named = study.sizes[scale]
    changed = {name: value for name, value in asdict(size).items() if value != getattr(named, name)}
    return f"scale {scale}" + ("" if not changed else f" with {', '.join(f'{k} {v}' for k, v in changed.items())}")


def how_far(folders: Sequence[Path]) -> str:
    """How far the runs are, from the notes that they leave in their folders."""
    notes = []
    for folder in folders:
        try:
            notes.append(json.loads((folder / "progress.json").read_text()))
        except (OSError, ValueError):
            continue
    share = sum(note["update"] / note["total"] for note in notes) / len(folders)
    finished = sum((folder / "record.json").exists() for folder in folders)
    return f"{finished} of {len(folders)} runs finished; {share:.0%} of all updates made"


def smaller(study: ImageStudy, **changes: Any) -> ImageStudy:
    """The same study with other settings, for tests."""
    return replace(study, **changes)
