"""Study dan2023: S_rel through the training of ResNet-18 on three image classes (arXiv 2111.01166; spec srel 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import local_elasticity as le
from local_elasticity.impact.progress import duration
from local_elasticity.runs import prepare_folder
from local_elasticity.studies.claims import Claim, judged, print_claims, status, write_claims
from local_elasticity.training.loop import Session, Training

DEFINITIONS = ("kl_published", "suhe_published", "kl", "kl_reverse", "l1", "l2", "he_su")
PROBE = "adam:0.0001"
MEASURE = "kl_published"


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        per_class: training images a class.
        batch_size: images in one update; smaller rests are dropped.
        epochs: passes over the data.
        runs: repetitions with other initial weights and another order of the data.
    """

    per_class: int
    batch_size: int
    epochs: int
    runs: int


SCALES = {"small": Scale(200, 25, 3, 1), "paper": Scale(5000, 256, 7, 3)}


@dataclass(frozen=True)
class ImageStudy:
    """The protocol of spec srel 3.1 on three classes of one data set.

    Attributes:
        title: one line for lists.
        classes: the three classes, in the paper's order.
        cost: time to expect at each scale.
        probes_per_class: fixed sources and targets a class.
        every: look when the batch's number in its epoch is a multiple of this.
        lr: of training and of the probe, both Adam; training has weight decay of the same size.
        seed: of data, probes and the first run.
        network: what is trained.
    """

    title: str
    classes: tuple[str, ...]
    cost: dict[str, str]
    probes_per_class: int = 20
    every: int = 9
    lr: float = 1e-4
    seed: int = 1234
    network: str = "resnet18-plain"

    def run(self, scale: str, out: Path, overwrite: bool = False) -> int:
        """Train and track every run of this scale, judge the claims, draw.

        Args:
            scale: "small" or "paper".
            out: the study's folder; an interrupted study continues there.
            overwrite: throw away what is there.

        Returns:
            1 when a claim fails, else 0.
        """
        return self.run_at(SCALES[scale], scale, out, overwrite)

    def run_at(self, size: Scale, scale: str, out: Path, overwrite: bool = False) -> int:
        """As ``run``, with the size given."""
        images = le.data.cifar10(at_least=size.per_class, classes=self.classes).subset(self.classes)
        images = images.take(size.per_class, self.seed)
        source: Any = images.source
        test = le.data.cifar10("test", source=source).subset(self.classes)
        mine = {name: value for name, value in asdict(self).items() if name not in ("title", "cost")}
        settings = {**mine, **asdict(size), "scale": scale, "data_origin": images.origin}
        settings["test_data"] = f"{len(test)} images of the true test split, {test.origin}"
        prepare_folder(out, settings, overwrite)
        print(f"{self.title}, scale {scale}: about {self.cost.get(scale, 'unknown time')}; data: {images.origin}")
        datasets = [self._one(size, settings, images, test, index, out / f"run-{index}") for index in range(size.runs)]
        return self._report(datasets, settings, scale, out)

    def _one(
        self, size: Scale, settings: dict[str, Any], images: Any, test: Any, index: int, folder: Path
    ) -> xr.Dataset:
        tensors = images.tensors(augment=self.seed)
        probes = le.data.probes(images, per_class=self.probes_per_class, seed=self.seed, tensors=tensors)
        seed = self.seed + index
        torch.manual_seed(seed)
        model = le.networks.build(self.network, len(self.classes), images.shape)
        training = Training(
            size.epochs, size.batch_size, "adam", self.lr, weight_decay=self.lr, drop_last=True, seed=seed
        )
        loss_fn = torch.nn.functional.cross_entropy
        session = Session(model, loss_fn, tensors, training, test.tensors(), folder / "checkpoint")
        configuration = {**settings, "run": index, "run_seed": seed, "probe": f"fresh Adam, lr {self.lr:g}"}
        resume = prepare_folder(folder, configuration, overwrite=False)
        tracker = le.Tracker(
            model,
            loss_fn,
            probes,
            update={PROBE: le.Adam(lr=self.lr)},
            definitions=DEFINITIONS,
            schedule=le.every(self.every, per="epoch"),
            store=folder / "run.zarr",
            resume=resume,
            route="step",  # fixed, so that no timing decides numbers
            configuration=configuration,
            seed=self.seed,
            before_commit=session.save,
        )
        if resume and tracker.resume_step:
            session.load(tracker.resume_step)
        _follow(session, tracker, index)
        return tracker.finish().dataset

    def _report(self, datasets: Sequence[xr.Dataset], settings: dict[str, Any], scale: str, out: Path) -> int:
        from local_elasticity.report import write_all, write_page

        together = datasets[0] if len(datasets) == 1 else _joined(datasets)
        claims = check_claims(datasets, paper_scale=scale == "paper")
        notes = [
            f"data: {settings['data_origin']}",
            f"{settings['runs']} run(s), seed {settings['seed']}; {settings['per_class']} images a class; "
            f"{self.probes_per_class} probes a class, 9 ordered class pairs of {self.probes_per_class**2} pairs, self "
            "pairs in, mean of ratios",
            f"probe: one step of a fresh Adam, lr {self.lr:g}, engine replay; measure {MEASURE} "
            "(as published: not a KL divergence)",
            "intervals: 95 % bootstrap over sources and targets of a run; with several runs, their range",
        ]
        notes += _other_definitions(datasets)
        path = write_claims(claims, out, f"{self.title}, scale {scale}", notes)
        figures = write_all(together, out / "figures")
        try:
            page: Path | str = write_page(together, out / "report.html")
        except le.InputError as error:
            page = f"none: {error}"
        print_claims(claims, f"{self.title}, scale {scale}; {settings['data_origin']}")
        for note in notes[4:]:
            print(note)
        print(f"claims: {path}\nfigure: {figures[0]}\npage:   {page}")
        return status(claims)


def _follow(session: Session, tracker: le.Tracker, index: int) -> None:
    import time

    started, first = time.perf_counter(), session.updates
    for progress in session.run(tracker):
        if progress.look is None:
            continue
        table = progress.look.tables[PROBE, MEASURE]
        left = (time.perf_counter() - started) / (progress.update - first) * (progress.total - progress.update)
        print(
            f"run {index}, update {progress.update} of {progress.total}: {MEASURE} intra {table.intra:.4f} "
            f"inter {table.inter:.4f}; {progress.look.seconds:.1f} s for the snapshot, about {duration(left)} left",
            flush=True,
        )


def _joined(datasets: Sequence[xr.Dataset]) -> xr.Dataset:
    """Runs side by side along ``replica``; the large outputs stay in the runs."""
    small = [data.drop_vars([n for n in ("before", "after", "source_before", "source_after")]) for data in datasets]
    return xr.concat(small, dim="replica", data_vars="all", coords="minimal", combine_attrs="override", join="override")


def check_claims(datasets: Sequence[xr.Dataset], paper_scale: bool) -> list[Claim]:
    """The claims on the published measure: C1 and C3 of spec srel 5, with the bounds set for small runs."""
    curves = [data.sel(update=PROBE, definition=MEASURE) for data in datasets]
    intra = np.mean([curve["intra"].values for curve in curves], axis=0)
    inter = np.mean([curve["inter"].values for curve in curves], axis=0)
    below = inter < intra
    fall = inter[-1] - inter[0]
    fallen = _interval(curves, "inter", -1)
    falls = judged(fallen[1] < inter[0]) if paper_scale else "not judged"
    return [
        Claim(
            "both curves start near 1",
            "intra and inter within 0.02 of 1 at the first look",
            f"intra {intra[0]:.4f}, inter {inter[0]:.4f}",
            f"intra {_words(_interval(curves, 'intra', 0))}, inter {_words(_interval(curves, 'inter', 0))}",
            judged(abs(intra[0] - 1) <= 0.02 and abs(inter[0] - 1) <= 0.02),
        ),
        Claim(
            "intra never falls",
            "intra >= 0.98 at every look",
            f"lowest {intra.min():.4f} of {len(intra)} looks",
            _words(_interval(curves, "intra", int(intra.argmin()))),
            judged(bool((intra >= 0.98).all())),
        ),
        Claim(
            "inter lies below intra",
            "at 80 % of the looks or more",
            f"at {below.mean():.0%} of {len(below)} looks",
            "counted",
            judged(float(below.mean()) >= 0.8),
        ),
        Claim(
            "inter lies below intra at the end",
            "inter < intra at the last look",
            f"inter {inter[-1]:.4f}, intra {intra[-1]:.4f}",
            f"inter/intra {_words(_interval(curves, 'ratio', -1))}",
            judged(bool(below[-1])),
        ),
        Claim(
            "inter falls with training",
            "inter at the end below its start (judged at paper scale)",
            f"from {inter[0]:.4f} to {inter[-1]:.4f} ({fall:+.4f})",
            f"at the end {_words(fallen)}",
            falls,
        ),
    ]


def _interval(curves: Sequence[xr.Dataset], name: str, index: int) -> tuple[float, float]:
    """Bootstrap interval of one run, or the range over runs."""
    if len(curves) == 1:
        at = curves[0].isel(step=index)
        return float(at[f"{name}_low"]), float(at[f"{name}_high"])
    values = [float(curve[name].isel(step=index)) for curve in curves]
    return min(values), max(values)


def _words(interval: tuple[float, float]) -> str:
    return f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def _other_definitions(datasets: Sequence[xr.Dataset]) -> list[str]:
    """The other definitions on the same steps, reported and not judged."""
    lines = []
    for definition in DEFINITIONS:
        chosen = [data.sel(update=PROBE, definition=definition) for data in datasets]
        below = np.mean([(one["inter"] < one["intra"]).values.mean() for one in chosen])
        last = [one.isel(step=-1) for one in chosen]
        intra, inter = (np.mean([float(one[name]) for one in last]) for name in ("intra", "inter"))
        heavy = any(bool(one["heavy_tailed"].any()) for one in chosen)
        lines.append(
            f"{definition}: at the end intra {intra:.4g}, inter {inter:.4g}; inter below intra at {below:.0%} of the "
            f"looks{'; heavy-tailed: read the medians' if heavy else ''}"
        )
    return lines


CIFAR10 = ImageStudy(
    title="dan2023-cifar10: S_rel of ResNet-18 on CIFAR-10 plane, car, ship",
    classes=("airplane", "automobile", "ship"),
    cost={"small": "2 min on 2 cores", "paper": "1 to 2 hours on 2 cores"},
)


def smaller(study: ImageStudy, **changes: Any) -> ImageStudy:
    """The same study with other settings, for tests."""
    return replace(study, **changes)
