"""``local-elasticity estimate``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from local_elasticity.base.checks import (
    check_fraction,
    check_seed,
    check_whole,
)
from local_elasticity.base.errors import InputError
from local_elasticity.cli.app import app, console
from local_elasticity.cli.options import Whole, WholeOrNone, check_counts, check_folder


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
    check_folder("--out", out)
    check_counts(baseline_window=baseline_window, window=window)
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
