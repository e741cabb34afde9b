"""The image studies' answer: claims, tables and figures of one condition (arXiv 2111.01166, figures 10 to 15)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import local_elasticity as le
from local_elasticity.base.progress import duration
from local_elasticity.report import write_page
from local_elasticity.report.curves import Line, Panel, panels
from local_elasticity.report.figures import save
from local_elasticity.report.separation import separation
from local_elasticity.studies.dan2023.claims import (
    MIXED,
    NEW,
    ORIGINAL,
    PSEUDO,
    STEPS,
    Judging,
    check_claims,
    how_often,
    permuted_curves,
    sharper,
    sharpness,
    table_rows,
)
from local_elasticity.studies.dan2023.images import DEFINITIONS, LIMIT, LIVE, PROBE, PROBES, ImageStudy, Scale, words_of
from local_elasticity.studies.dan2023.tables import Series, intra_inter
from local_elasticity.studies.engine.claims import print_claims, status, write_claims

if TYPE_CHECKING:
    import xarray as xr

ROWS = {
    PSEUDO: "pseudo-KL (published)",
    MIXED: "mixed norms (published)",
    "kl": "KL(after ‖ before)",
    "kl_reverse": "KL(before ‖ after)",
    "l1": "L1 of probabilities",
    "l2": "L2 of probabilities",
    "he_su": "L2 of raw outputs",
}
COLUMNS = {PROBE: "Adam 1e-4", "sgd:0.01": "SGD 1e-2", "sgd:0.0001": "SGD 1e-4", LIVE: "live", LIMIT: "limit"}


def report(study: ImageStudy, found: Sequence[Series], size: Scale, scale: str, out: Path, waiting: float) -> int:
    """Judge and draw the one condition of the study.

    Args:
        study: what was run.
        found: its condition's runs.
        size: how large.
        scale: name of the scale.
        out: the study's folder.
        waiting: seconds that the runs took to be made.

    Returns:
        1 when a claim fails.
    """
    (series,) = found
    title = f"{study.title}, {words_of(study, size, scale)}"
    ended = all("test_accuracy" in r and r["test_images"] for r in series.records)
    judging = Judging(series, whole=size.epochs >= study.sizes["paper"].epochs and scale == "paper" and ended)
    claims = check_claims(judging)
    notes = [*protocol_notes(study, series, size), *result_notes(series), *time_notes(series, waiting)]
    path = write_claims(claims, out, title, notes)
    write_rows(out / "separation.csv", table_rows(series))
    figures = [
        save(separation_figure(series, title), out / "figures", "separation")[0],
        save(curves_figure(series, title), out / "figures", "curves")[0],
        save(training_figure(series, title), out / "figures", "training")[0],
    ]
    print_claims(claims, title)
    for note in notes:
        print(f"- {note}")
    print(f"claims: {path}\nfigure: {figures[0]}\npage:   {write_run_page(series, out / 'report.html')}")
    return status(claims)


def protocol_notes(study: ImageStudy, series: Series, size: Scale) -> list[str]:
    """What was done."""
    c, settings = series.condition, le.open_run(series.folders[0]).configuration
    looks = len(series.epochs)
    return [
        f"data: {settings['data_origin']}; {size.per_class} training images a class "
        f"({', '.join(series.classes)}), cropped and flipped once",
        f"{c.network}, {c.optimizer}, lr {c.lr:g}, weight decay {c.weight_decay:g}; batch {size.batch_size}, "
        f"{size.epochs} epochs = {series.records[0]['updates']} updates, {looks} looks",
        f"{len(series.datasets)} run(s), seeds {', '.join(str(r['seed']) for r in series.records)}; "
        f"{size.probes_per_class} probes a class: {size.probes_per_class**2} pairs in each of "
        f"{len(series.classes) ** 2} class pairs, the same in all runs",
        "probe steps: "
        + "; ".join(f"{k} = {v}" for k, v in STEPS.items())
        + "; engine replay, the limit by engine linear",
        f"claims use the published average: mean of ratios, self pairs in, probe {PROBE}; all others in separation.csv",
        "intervals: 95 %, 200 resamples of sources, targets and runs; ranks: 1000 resamples of sources",
        f"train metrics: running means over the epoch; test metrics: true test split, {settings['test_data']} at the "
        f"looks, {series.records[0]['test_images']} images at the end (the published “test” was drawn from the "
        "training split)",
    ]


def result_notes(series: Series) -> list[str]:
    """What the claims do not say."""
    records, noise = series.records, series.below_noise()
    end = {k: np.mean([r[k] for r in records]) for k in ("train_accuracy", "test_accuracy", "train_loss", "test_loss")}
    notes = [
        f"at the end: train accuracy {end['train_accuracy']:.3f}, true test accuracy {end['test_accuracy']:.3f}; "
        f"train loss {end['train_loss']:.3f}, true test loss {end['test_loss']:.3f}",
        "pairs whose movement is lost in float32 rounding: "
        + ", ".join(f"{COLUMNS[u]} {share:.1%}" for u, share in noise.items() if u != LIMIT),
    ]
    eps = series.below_eps(NEW)
    notes.append(
        "sources whose KL is below the definition's eps of 1e-8, which then decides their S_rel: "
        + ", ".join(f"{COLUMNS[u]} {share:.0%}" for u, share in eps.items() if u != LIMIT)
    )
    for definition in DEFINITIONS:
        often = {s: how_often(series, PROBE, definition, s) for s in ("mean", "median", "ratio_of_means")}
        alone = how_often(series, PROBE, definition, "mean", "out")
        intra, inter = (x[-1] for x in intra_inter(series.curves(PROBE, definition).mean(0)))
        notes.append(
            f"{definition}, {PROBE}: intra above both inter at {often['mean']:.0%} (mean), {often['median']:.0%} "
            f"(median), {often['ratio_of_means']:.0%} (ratio of means), {alone:.0%} (mean, self pairs out); own class "
            f"ranked higher {sharpness(series, PROBE, definition):.3f}; at the end intra {intra:.4g}, inter {inter:.4g}"
        )
    for definition in (NEW, ORIGINAL):
        flipped = permuted_curves(series, definition)
        if len(flipped):
            intra, inter = (x[-1] for x in intra_inter(flipped))
            notes.append(f"next class's label, {definition}: at the end intra {intra:.4g}, inter {inter:.4g}")
    difference, ends = sharper(series, PROBE, PSEUDO, "he_su")
    notes.append(
        f"pseudo-KL against L2 of raw outputs, {PROBE}: rank difference {difference:+.3f} "
        f"[{ends[0]:.3f}, {ends[1]:.3f}]"
    )
    return notes


def time_notes(series: Series, waiting: float) -> list[str]:
    """What the time went to."""
    spent: dict[str, float] = {}
    for record in series.records:
        for name, seconds in record["seconds"].items():
            spent[name] = spent.get(name, 0.0) + seconds
    total = sum(spent.values())
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in spent.items())
    return [f"time of the runs: {duration(total)} together ({shares}); waited for them {duration(waiting)} this time"]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())


def separation_figure(series: Series, title: str) -> Any:
    """Definitions by probe steps."""

    def matrix(value: Any) -> np.ndarray:
        return np.array([[value(update, definition) for update in PROBES] for definition in ROWS])

    chance = 1 / len(series.classes)
    panels = {
        "mean of ratios: intra above both inter, % of looks": (
            matrix(lambda u, d: how_often(series, u, d, "mean")),
            chance,
        ),
        "median of ratios: the same": (matrix(lambda u, d: how_often(series, u, d, "median")), chance),
        "own-class target moved more than another, % of target pairs": (
            matrix(lambda u, d: sharpness(series, u, d)),
            0.5,
        ),
    }
    return separation(
        panels,
        list(ROWS.values()),
        list(COLUMNS.values()),
        answer(series) + "\n" + title,
        groups=(2,),
        caption=f"white is chance ({chance:.0%}, {chance:.0%} and 50 %); columns: the step taken at x; self pairs in "
        "(ranks: out)",
    )


def answer(series: Series) -> str:
    """The figure's one line."""
    often = {d: how_often(series, PROBE, d) for d in (PSEUDO, MIXED, NEW, ORIGINAL)}
    difference, ends = sharper(series, PROBE, NEW, ORIGINAL)
    verdict = "sharper than" if ends[0] > 0 else "less sharp than" if ends[1] < 0 else "no sharper than"
    return (
        f"Own class above both others: pseudo-KL {often[PSEUDO]:.0%} of looks, mixed norms {often[MIXED]:.0%}, "
        f"true KL {often[NEW]:.0%}, L1 {often[ORIGINAL]:.0%}; by ranks, true KL is {verdict} L1 ({difference:+.3f})"
    )


def curves_figure(series: Series, title: str) -> Any:
    """S_rel by class stepped on, as in the paper's figures: published measures and the true divergence."""
    content = []
    for definition in (PSEUDO, MIXED, NEW):
        curves = series.curves(PROBE, definition)
        log = np.nanmax(curves) > 10 * np.nanmin(curves) > 0
        for source, name in enumerate(series.classes):
            order = [source, *(t for t in range(len(series.classes)) if t != source)]
            lines = []
            for target in order:
                values = curves[:, :, source, target]
                mean, spread = values.mean(0), values.std(0)
                words = f"own class ({name})" if target == source else series.classes[target]
                # A logarithmic axis has no place for what lies below zero.
                low = np.maximum(mean - spread, values.min(0)) if log else mean - spread
                band = (low, mean + spread) if len(values) > 1 else None
                lines.append(Line(words, series.epochs, mean, band))
            content.append(
                Panel(
                    f"step on {name}",
                    lines,
                    f"{ROWS[definition]}" if source == 0 else "",
                    "epoch" if definition == NEW else "",
                    "linear",
                    "log" if log else "linear",
                )
            )
    words = f"{PROBE}, mean of ratios, self pairs in" + (
        f"; band: ±1 SD over {len(series.datasets)} runs, on logarithmic axes from the lowest run up"
        if len(series.datasets) > 1
        else "; one run"
    )
    return panels(content, len(series.classes), f"{title}\n{words}", height=1.75)


def training_figure(series: Series, title: str) -> Any:
    """Accuracy and loss on the training data and on the true test split."""
    content = []
    for name in ("accuracy", "loss"):
        lines = []
        for kind, words in (("train", "train (running mean over the epoch)"), ("test", "true test split")):
            values = np.stack([data[f"{kind}_{name}"].values for data in series.datasets])
            band = (values.min(0), values.max(0)) if len(values) > 1 else None
            lines.append(Line(words, series.epochs, values.mean(0), band))
        content.append(Panel(name, lines, name, "epoch", "linear", "linear"))
    return panels(content, 2, title, height=2.2)


def write_run_page(series: Series, path: Path) -> Path | str:
    """The page of the runs, any definition and step to be chosen; or why there is none."""
    data = series.datasets
    together = data[0] if len(data) == 1 else joined(data)
    try:
        return write_page(together, path)
    except le.InputError as error:
        return f"none: {error}"


def joined(datasets: Sequence[xr.Dataset]) -> xr.Dataset:
    """Runs side by side along ``replica``; the large outputs stay in the runs."""
    import xarray as xr

    small = [data.drop_vars([n for n in ("before", "after", "source_before", "source_after")]) for data in datasets]
    return xr.concat(small, dim="replica", data_vars="all", coords="minimal", combine_attrs="override", join="override")
