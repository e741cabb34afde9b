"""The trainings of the second paper's studies (arXiv:2110.05960; spec lesde 4, 5): what is trained, and its record.

Each training is an ensemble in a folder of its own, named after all that decides it, so that studies share trainings:
one that is complete in the folder of a neighbouring study is read from there.
"""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from local_elasticity.base.errors import InputError
from local_elasticity.base.progress import duration
from local_elasticity.data import cifar10, cifar10_subset, corrupt_labels, geomnist
from local_elasticity.impact import measure
from local_elasticity.impact.update import SGD
from local_elasticity.lesde.direct import impact_matrix
from local_elasticity.networks import SimpleConv
from local_elasticity.report.figures import save
from local_elasticity.runs.ensembles import NOTE, PROGRESS, is_ensemble, open_ensemble
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.studies.engine.claims import Claim, print_claims, status, write_claims
from local_elasticity.studies.engine.pieces import Arrays, kept, read_arrays
from local_elasticity.studies.engine.study import Option, Study
from local_elasticity.training.ensemble.log import Ensemble
from local_elasticity.training.ensemble.looks import due
from local_elasticity.training.ensemble.train import train_ensemble
from local_elasticity.training.schedule import Schedule, at

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

    from local_elasticity.data import TensorData

Pair = tuple[Tensor, Tensor]

# CPU seconds on one core of 2020s hardware, for the estimate that is printed before the work.
_STEP, _IMAGE, _COLLAPSE, _SOURCE = 0.37e-3, 0.14e-3, 1e-3, 10e-3
_FINAL, _DIRECT = "final.npz", "direct"


@dataclass(frozen=True)
class Training:
    """One ensemble of SimpleConv, and what is looked at on the way. Batch 1, plain SGD, float32.

    Attributes:
        data: "geomnist" or "cifar10".
        n_classes: K, the first classes.
        corruption: exact fraction of wrong training labels; validation labels are clean.
        n_train: training images a class; 0 for as many as the data at hand have.
        n_validation: validation images a class; 0 likewise.
        replicas: networks.
        steps: updates.
        lr: rate.
        seed: of data, weights and order.
        probes: validation images a class in the fixed probe set (class means, variance within, neural collapse).
        checked: validation images a class that are looked at during training; all are at the end.
        measured: replicas whose impact is measured directly.
        sources: training images a class on which a step is tried for that, drawn anew at each look.
    """

    data: Literal["geomnist", "cifar10"] = "geomnist"
    n_classes: int = 3
    corruption: float = 0.0
    n_train: int = 500
    n_validation: int = 500
    replicas: int = 100
    steps: int = 10_000
    lr: float = 0.005
    seed: int = 0
    probes: int = 12
    checked: int = 30
    measured: int = 0
    sources: int = 8

    @property
    def name(self) -> str:
        """The folder's name."""
        per_class = "all" if self.n_train == 0 else str(self.n_train)
        return (
            f"{self.data}-K{self.n_classes}-p{self.corruption:.4f}-n{per_class}-R{self.replicas}-T{self.steps}"
            f"-lr{self.lr:g}-seed{self.seed}"
        )

    def probe_schedule(self) -> Schedule:
        """Every 100 steps; on GeoMNIST, where classes have separated by then, every 300 after 4,000."""
        return _thinning(self.steps, 100, 4000 if self.data == "geomnist" else self.steps, 300)

    def validation_schedule(self) -> Schedule:
        """Every 500 steps, then every 1,000."""
        return _thinning(self.steps, 500, 4000, 1000)

    def direct_schedule(self) -> Schedule:
        """Every 250 steps, then every 600; on CIFAR-10 every 600."""
        return _thinning(self.steps, 250 if self.data == "geomnist" else 600, 4000, 600)

    def seconds(self) -> tuple[float, float, float]:
        """CPU seconds to expect: of steps, of looks, of direct measurements."""
        each = self.n_classes * self.probes * _IMAGE + _COLLAPSE
        looks = len(due(self.probe_schedule(), self.steps)) * each
        looks += len(due(self.validation_schedule(), self.steps)) * self.n_classes * self.checked * _IMAGE
        looks += self.n_classes * (self.n_validation or 100) * _IMAGE
        direct = len(due(self.direct_schedule(), self.steps)) * self.measured * self.n_classes * self.sources * _SOURCE
        return self.replicas * self.steps * _STEP, self.replicas * looks, direct


def _thinning(steps: int, early: int, until: int, late: int) -> Schedule:
    """Looks every ``early`` updates up to ``until`` and every ``late`` from there; shorter runs look as often."""
    if steps < 10 * early:
        early = late = max(1, steps // 10)
    updates = {*range(early, min(until, steps) + 1, early), *range(until + late, steps + 1, late)}
    return at(update - 1 for update in updates)


def images(training: Training) -> TensorData:
    """The data of a training, labels corrupted as asked.

    Raises:
        InputError: when the data at hand are too few.
    """
    if training.data == "geomnist":
        found = geomnist(training.n_train, training.n_validation, n_classes=training.n_classes, seed=training.seed)
    else:
        whole = cifar10("train", at_least=training.n_train or None, progress=False)
        counts = [training.n_train, training.n_validation]
        if 0 in counts:
            source: Any = whole.source
            parts = (whole, cifar10("test", source=source, progress=False))
            most = [int(torch.bincount(part.labels)[: training.n_classes].min()) for part in parts]
            counts = [count or largest for count, largest in zip(counts, most, strict=True)]
        found = cifar10_subset(training.n_classes, counts[0], counts[1], seed=training.seed, source=whole.source)
    if training.corruption == 0:
        return found
    return replace(found, train=corrupt_labels(found.train, training.corruption, seed=training.seed))


def first_of_each(pair: Pair, count: int, skip: int = 0) -> Pair:
    """The same number of samples of every class, in order; fewer where a class has no more."""
    x, y = pair
    chosen = torch.cat([torch.nonzero(y == k).squeeze(1)[skip : skip + count] for k in range(int(y.max()) + 1)])
    return x[chosen], y[chosen]


def drawn_of_each(pair: Pair, count: int, rng: np.random.Generator) -> Pair:
    """The same number of samples of every class, drawn with replacement, class after class."""
    x, y = pair
    members = [torch.nonzero(y == k).squeeze(1) for k in range(int(y.max()) + 1)]
    chosen = torch.cat([m[torch.from_numpy(rng.integers(len(m), size=count))] for m in members])
    return x[chosen], y[chosen]


# --- training ------------------------------------------------------------------------------------------------------


def train(training: Training, folder: Path, progress: bool = False, device: str = "cpu") -> Record:
    """Train, or go on with what an earlier call left, or read what is complete.

    Args:
        training: what to train.
        folder: of the trainings; this one is kept in ``folder / training.name``.
        progress: show a bar.
        device: where to compute, for example "cuda".

    Raises:
        InputError: when the place holds a training of another configuration.
    """
    place = folder / training.name
    if not complete(place):
        data = images(training)
        inputs = {"train": data.train, "probes": first_of_each(data.validation, training.probes)}
        inputs["checked"] = first_of_each(data.validation, training.checked)
        callback, call = None, None
        if training.measured:
            callback, call = _measuring(training, data, place / _DIRECT), training.direct_schedule()
        ensemble = train_ensemble(
            lambda: SimpleConv(training.n_classes, data.shape[0], data.shape[-1]),
            inputs["train"],
            torch.nn.functional.cross_entropy,
            lr=training.lr,
            steps=training.steps,
            replicas=training.replicas,
            seed=training.seed,
            validation=inputs["checked"],
            validate=training.validation_schedule(),
            probes=inputs["probes"],
            probe=training.probe_schedule(),
            callback=callback,
            call=call,
            store=place,
            resume=is_ensemble(place),
            configuration={**asdict(training), "origin": data.origin},
            dtype=torch.float32,
            device=device,
            progress=progress,
        )
        kept(place / _FINAL, lambda: _final(ensemble, data.validation))
    record = Record(place)
    _same(training, record)
    return record


def complete(place: Path) -> bool:
    """Whether a training is there, whole."""
    try:
        state = json.loads((place / PROGRESS).read_text())
    except (OSError, ValueError):
        return False
    return state.get("step") == state.get("steps") and (place / _FINAL).is_file()


def _same(training: Training, record: Record) -> None:
    stored = record.configuration
    different = [key for key, value in asdict(training).items() if stored.get(key) != value]
    if different:
        raise InputError(
            expected=f"the settings of the training in {record.folder}",
            got="others for "
            + ", ".join(f"{k} ({stored.get(k)} there, {getattr(training, k)} now)" for k in different),
            do="choose another folder",
        )


def _final(ensemble: Ensemble, validation: Pair) -> Arrays:
    """Logits of every replica for the whole validation set after the last step, loss, accuracy, class means."""
    x, y = validation
    parts = [ensemble.outputs(part.float()) for part in x.split(500)]
    outputs = torch.cat(parts, dim=1).double().cpu()
    losses = torch.stack([torch.nn.functional.cross_entropy(out, y) for out in outputs])
    right = (outputs.argmax(dim=2) == y).double().mean(dim=1)
    means = torch.stack([outputs[:, y == k].mean(dim=1) for k in range(outputs.shape[2])], dim=1)
    variances = torch.stack([outputs[:, y == k].var(dim=1) for k in range(outputs.shape[2])], dim=1)
    found = {"loss": losses, "accuracy": right, "means": means, "variances": variances}
    kept_logits = {"logits": outputs.float().numpy(), "labels": np.broadcast_to(y.numpy(), outputs.shape[:2])}
    return {name: value.numpy() for name, value in found.items()} | kept_logits


def _measuring(training: Training, data: TensorData, folder: Path) -> Callable[[int, Ensemble], None]:
    """Measures the impact of real steps on the first replicas: one small file a look.

    Steps are taken on training images with their labels, one at a time and each from the same weights; movements are
    looked at on validation images, averaged class by class. Every look and replica draws its own images, so that their
    choice is part of what differs between replicas.
    """
    numbers = range(min(training.measured, training.replicas))

    def look(step: int, ensemble: Ensemble) -> None:
        device = next(iter(ensemble.weights.values())).device

        def compute() -> Arrays:
            found: dict[str, list[np.ndarray]] = {"change": [], "before": [], "isotropic": [], "logits": []}
            for number in numbers:
                rng = np.random.default_rng([training.seed, step, number])
                xs, ys = drawn_of_each(data.train, training.sources, rng)
                xt, yt = drawn_of_each(data.validation, training.probes, rng)
                impact = measure(
                    ensemble.model(number),
                    torch.nn.functional.cross_entropy,
                    (xs.to(device, torch.float32), ys.to(device)),
                    xt.to(device, torch.float32),
                    update=SGD(lr=training.lr),
                    engine="replay",
                    route="step",
                    check_pairs=0,
                )
                change = impact.change.double().cpu()
                found["change"].append(
                    torch.stack([change[:, yt == k].mean(dim=1) for k in range(training.n_classes)], dim=1).numpy()
                )
                found["before"].append(impact.source_before.double().cpu().numpy())
                for drift in ("isotropic", "logits"):
                    found[drift].append(impact_matrix(impact, ys, yt, drift, n_boot=0).values)
            labels = np.repeat(np.arange(training.n_classes), training.sources)
            return {name: np.stack(values) for name, values in found.items()} | {"labels": labels}

        kept(folder / f"{step:06d}.npz", compute)

    return look


# --- records -------------------------------------------------------------------------------------------------------


class Record:
    """What a training left, read when it is asked for.

    Args:
        folder: of the training.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, np.ndarray] = {}

    @cached_property
    def dataset(self) -> xr.Dataset:
        """The log, as `open_ensemble` gives it."""
        return open_ensemble(self.folder)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """What was trained."""
        return self._settings["configuration"]

    @property
    def device(self) -> str:
        """Where it was trained: "cpu" or "cuda"."""
        return self._settings["device"]

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return json.loads((self.folder / NOTE).read_text())["settings"]

    @property
    def n_classes(self) -> int:
        """K."""
        return int(self.configuration["n_classes"])

    @cached_property
    def sound(self) -> Int64[np.ndarray, " n"]:
        """The replicas that did not diverge."""
        return np.flatnonzero(self.dataset["diverged"].values < 0)

    @cached_property
    def final(self) -> Arrays:
        """After the last step, whole validation set, by replica: logits, labels, loss, accuracy, means, variances."""
        return {name: values[self.sound] for name, values in read_arrays(self.folder / _FINAL).items()}

    def array(self, name: str) -> np.ndarray:
        """A variable of the log, (time, sound replicas, ...)."""
        if name not in self._read:
            self._read[name] = np.asarray(self.dataset[name].values)[:, self.sound]
        return self._read[name]

    @cached_property
    def logits(self) -> Float[np.ndarray, "steps replicas K"]:
        """Logits of each step's sample before the update."""
        return self.array("logits").astype(np.float64)

    @cached_property
    def labels(self) -> Int64[np.ndarray, "steps replicas"]:
        """Their labels, as trained on."""
        return self.array("labels").astype(np.int64)

    @cached_property
    def probe_times(self) -> Float[np.ndarray, " looks"]:
        """Updates made at each look at the probes."""
        return self.dataset["probe_step"].values.astype(np.float64)

    @cached_property
    def probe_means(self) -> Float[np.ndarray, "replicas looks K p"]:
        """Class means of the probes, a replica first."""
        return np.ascontiguousarray(self.array("probe_mean").swapaxes(0, 1))

    @cached_property
    def probe_variance(self) -> Float[np.ndarray, "looks K"]:
        """Variance of a probe about its class mean in the same network, per coordinate; mean over replicas."""
        return self.array("probe_variance").mean(axis=(1, 3))

    @cached_property
    def direct(self) -> Arrays | None:
        """Direct measurements: times (L,), change (L, replicas, sources, K, p), before (…, sources, p), E by drift."""
        files = sorted((self.folder / _DIRECT).glob("[0-9]*.npz"))
        files = [file for file in files if ".partial" not in file.name]
        if not files:
            return None
        looks = [read_arrays(file) for file in files]
        found = {name: np.stack([look[name] for look in looks]) for name in looks[0] if name != "labels"}
        return found | {"labels": looks[0]["labels"], "times": np.array([float(file.stem) for file in files])}


# --- which trainings -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How large the studies are.

    Attributes:
        geomnist: the training on clean GeoMNIST.
        corrupted: replicas of each other corruption rate.
        rates: corruption rates.
        sized: replicas of each other number of images.
        sizes: images a class, training and validation.
        cifar: the training on CIFAR-10 with 3 classes.
        classes: numbers of classes of CIFAR-10.
    """

    geomnist: Training
    corrupted: int
    rates: tuple[float, ...]
    sized: int
    sizes: tuple[tuple[int, int], ...]
    cifar: Training
    classes: tuple[int, ...]


PAPER_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 2 / 3, 0.7, 0.8)
PAPER_SIZES = ((40, 10), (80, 20), (240, 60), (480, 120), (800, 200), (2400, 600), (4800, 1200))
_CIFAR = Training("cifar10", n_train=2000, replicas=100, steps=30_000, lr=0.001, measured=8)
SIZES = {
    "small": Size(
        geomnist=Training(n_validation=100, replicas=60, steps=3000, probes=8, measured=3),
        corrupted=16,
        rates=(0.0, 0.4, 0.8),
        sized=16,
        sizes=((40, 10),),
        cifar=Training("cifar10", n_train=0, n_validation=0, replicas=8, steps=8000, lr=0.001, probes=8, measured=3),
        classes=(2, 3),
    ),
    "paper": Size(
        geomnist=Training(measured=16, sources=12),
        corrupted=100,
        rates=PAPER_RATES,
        sized=100,
        sizes=PAPER_SIZES,
        cifar=_CIFAR,
        classes=(2, 3, 4, 5),
    ),
}
"""Scale -> sizes. Paper: as published; small: minutes."""


def corrupted(size: Size, rate: float) -> Training:
    """The training at a corruption rate; the clean one at 0."""
    return size.geomnist if rate == 0 else replace(size.geomnist, corruption=rate, replicas=size.corrupted, measured=0)


class EnsembleStudy(Study):
    """A study that trains ensembles first, or finds them, and then analyses their records.

    Attributes:
        title: one line for lists.
        cost: time to expect at each scale.
    """

    title: str
    cost: Mapping[str, str]
    options: ClassVar[frozenset[Option]] = frozenset({"trainings", "device"})

    @abstractmethod
    def needs(self, size: Size) -> list[Training]:
        """The trainings it is about."""

    @abstractmethod
    def report(self, records: list[Record], size: Size, scale: str, out: Path) -> int:
        """Analyse, judge, draw; 1 when a claim fails."""

    def run(
        self,
        scale: str,
        out: Path,
        overwrite: bool = False,
        trainings: Path | None = None,
        train_only: bool = False,
        only: str | None = None,
        device: str = "cpu",
    ) -> int:
        """Train what is not there yet, analyse, judge and draw.

        Args:
            scale: "small" or "paper".
            out: the study's folder; an interrupted study continues there.
            overwrite: throw away what is there, its own trainings included.
            trainings: folder where trainings are looked for, and go, instead of ``out / "training"``.
            train_only: stop after the trainings.
            only: one of the data sets, "geomnist" or "cifar10".
            device: of the trainings, for example "cuda".

        Returns:
            1 when a claim fails, else 0.
        """
        return self.run_at(SIZES[scale], scale, out, overwrite, trainings, train_only, only, device)

    def run_at(
        self,
        size: Size,
        scale: str,
        out: Path,
        overwrite: bool = False,
        trainings: Path | None = None,
        train_only: bool = False,
        only: str | None = None,
        device: str = "cpu",
    ) -> int:
        """As ``run``, with the sizes given."""
        needed = self.needs(size)
        wanted = [training for training in needed if only in (None, training.data)]
        if not wanted:
            raise InputError(
                expected=f"one of its data sets: {sorted({training.data for training in needed})}",
                got=repr(only),
                do="leave --only out",
            )
        prepare_folder(
            out, {"study": self.title, "scale": scale, "trainings": [training.name for training in wanted]}, overwrite
        )
        print(f"{self.title}, scale {scale}: about {self.cost.get(scale, 'unknown time')}", flush=True)
        records = trained(wanted, out, trainings, sys.stderr.isatty(), device)
        return 0 if train_only else self.report(records, size, scale, out)

    def finish(
        self, claims: Sequence[Claim], notes: Sequence[str], figures: Mapping[str, Figure], scale: str, out: Path
    ) -> int:
        """Write and show the table, the notes and the figures; 1 when a claim fails."""
        title = f"{self.title}, scale {scale}"
        path = write_claims(claims, out, title, notes)
        drawn = [save(figure, out / "figures", name)[0] for name, figure in figures.items()]
        print_claims(claims, title)
        for note in notes:
            print(note)
        print(f"claims: {path}\nfigures: {', '.join(map(str, drawn))}")
        return status(claims)


def sized(size: Size, n_train: int, n_validation: int) -> Training:
    """The training with other numbers of images; the clean one where they are its own."""
    if n_train == size.geomnist.n_train:
        return size.geomnist
    return replace(size.geomnist, n_train=n_train, n_validation=n_validation, replicas=size.sized, measured=0)


def classed(size: Size, n_classes: int) -> Training:
    """The training on CIFAR-10 with these classes."""
    if n_classes == size.cifar.n_classes:
        return size.cifar
    return replace(size.cifar, n_classes=n_classes, measured=0)


def announce(trainings: Sequence[Training], places: Sequence[Path | None]) -> None:
    """Print what is going to be trained, what it costs and how much of that is looking."""
    missing = [training for training, place in zip(trainings, places, strict=True) if place is None]
    for training, place in zip(trainings, places, strict=True):
        print(f"training {training.name}: {'to do' if place is None else f'complete in {place}'}", flush=True)
    if missing:
        steps, looks, direct = (sum(part) for part in zip(*(t.seconds() for t in missing), strict=True))
        print(
            f"about {duration(steps)} of steps on one core, {looks / steps:.0%} on top for looks and "
            f"{direct / steps:.0%} for direct measurements",
            flush=True,
        )


def trained(
    trainings: Iterable[Training],
    out: Path,
    folder: Path | None = None,
    progress: bool = False,
    device: str = "cpu",
) -> list[Record]:
    """The records of these trainings, trained where they are nowhere complete.

    Args:
        trainings: what is needed.
        out: the study's folder; trainings go to ``out / "training"``, and are looked for in its neighbours.
        folder: where trainings are and go instead.
        progress: show a bar for each.
        device: of those that are trained now.
    """
    wanted = list(trainings)
    home = folder or out / "training"
    around = [home] if folder else [home, *sorted(out.resolve().parent.glob("*/training"))]
    places = [next((place / t.name for place in around if complete(place / t.name)), None) for t in wanted]
    announce(wanted, places)
    records = []
    for training, place in zip(wanted, places, strict=True):
        records.append(train(training, home if place is None else place.parent, progress, device))
        print(f"trained {training.name}: {len(records[-1].sound)} of {training.replicas} replicas sound", flush=True)
    return records
