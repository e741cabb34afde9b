"""The estimates in one table and one file: what the command line prints and writes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from local_elasticity.base.errors import InputError
from local_elasticity.lesde.estimation.tail import TailExponent

if TYPE_CHECKING:
    from rich.console import Console

    from local_elasticity.lesde.estimation.estimate import Fit

TAILS = ("dyadic", "loglog", "official")


def summarise(fit: Fit) -> dict[str, Any]:
    """Everything worth a line: A and B at the end, average rates, tails, verdict, agreement, warnings."""
    verdict = fit.verdict()
    inside = slice(fit.window // 2, len(fit.t) - fit.window // 2)  # at the ends slopes are uncertain
    peak = int(np.argmax(fit.alpha[inside])) + fit.window // 2
    found: dict[str, Any] = {
        "model": fit.model,
        "estimator": fit.estimator,
        "trials": fit.n_trials,
        "times": len(fit.t),
        "from": float(fit.t[0]),
        "to": float(fit.t[-1]),
        "confidence": fit.confidence,
        "n_boot": fit.n_boot,
        "seed": fit.seed,
        "no_interval": fit.no_interval,
        "window": fit.window,
        "baseline_window": fit.baseline_window,
        "baseline_time": fit.baseline_time,
        "signal_to_noise": fit.signal_to_noise,
        "filled_cells": len(fit.observations.filled),
        "end": {name: _at(fit, name, -1) for name in ("A", "B")},
        "average": {name: list(fit.average(name, fit.t[0], fit.t[-1])) for name in ("alpha", "beta", "gap")},
        "peak": {"t": float(fit.t[peak]), "alpha": _at(fit, "alpha", peak), "beta": _at(fit, "beta", peak)},
        "tail": {q: {m: _tail(fit.tail(m, q)) for m in TAILS} for q in ("alpha", "beta", "gap")},
        "verdict": {"word": verdict.word, "why": verdict.why},
        "warnings": list(fit.warnings),
    }
    found |= _agreement(fit)
    return found


def _at(fit: Fit, name: str, index: int) -> list[float]:
    low, high = fit.intervals[name]
    return [float(getattr(fit, name)[index]), float(low[index]), float(high[index])]


def _tail(tail: TailExponent) -> dict[str, Any]:
    return {"value": tail.value, "low": tail.low, "high": tail.high, "reason": tail.reason}


def _agreement(fit: Fit) -> dict[str, Any]:
    if np.isnan(fit.A).all() or np.isnan(fit.B).all():
        return {}
    comparison = fit.compare()
    names = ("relative_rmse", "r2", "tail_cosine", "coverage", "sign_agreement")
    parts = {"plain": comparison.plain, "rescaled_as_published": comparison.rescaled, "rescaled_best": comparison.best}
    found: dict[str, Any] = {
        "agreement": {key: {name: getattr(part, name) for name in names} for key, part in parts.items()},
        "published_scalar": comparison.scalar,
        "band": comparison.band,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            errors = fit.held_out(folds=max(2, min(5, fit.n_trials // 2)))
    except InputError as error:
        found["held_out"] = {"reason": str(error)}
    else:
        found["held_out"] = {
            model: {"relative_rmse": e.relative_rmse, "standard_error": e.standard_error, "of": e.of}
            for model, e in errors.items()
        }
    return found


def print_summary(fit: Fit, console: Console) -> dict[str, Any]:
    """Show the table; returns what it was made of."""
    from rich.table import Table

    found = summarise(fit)
    interval = f"{fit.confidence:.0%} interval"
    table = Table(title=f"Estimates, t = {fit.t[0]:g} to {fit.t[-1]:g}, {fit.n_trials or 'no'} trials")
    for heading in ("", "value", interval, "note"):
        table.add_column(heading)
    rows: list[tuple[str, Any, Any, Any, str]] = []
    for name, integral in (("A", "alpha"), ("B", "beta")):
        rows.append(
            (f"{name} at the end", *found["end"][name], f"integral of {integral} from t = {fit.baseline_time:g}")
        )
    for name in ("alpha", "beta", "gap"):
        label = "alpha - beta" if name == "gap" else name
        rows.append((f"{label}, average", *found["average"][name], "over the whole record"))
    rows.append(("alpha at its peak", *found["peak"]["alpha"], f"t = {found['peak']['t']:g}"))
    for method in TAILS:
        for quantity in ("alpha", "gap"):
            tail = found["tail"][quantity][method]
            label = "alpha - beta" if quantity == "gap" else quantity
            rows.append((f"tail of {label}, {method}", tail["value"], tail["low"], tail["high"], tail["reason"]))
    for label, value, low, high, note in rows:
        shown = "–" if np.isnan(low) else f"{low:.4g} to {high:.4g}"
        table.add_row(label, "–" if np.isnan(value) else f"{value:.4g}", shown, note)
    console.print(table)
    if "agreement" in found:
        plain, scaled = found["agreement"]["plain"], found["agreement"]["rescaled_as_published"]
        console.print(
            f"model against data: relative error {plain['relative_rmse']:.3g}, R² {plain['r2']:.3g} "
            f"(after the published one-scalar fit, x {found['published_scalar']:.3g}: {scaled['relative_rmse']:.3g})",
            markup=False,
        )
        errors = {model: e["relative_rmse"] for model, e in found["held_out"].items() if isinstance(e, dict)}
        if len(errors) > 1 or "reason" not in found["held_out"]:
            words = ", ".join(f"{model} {error:.3g}" for model, error in errors.items())
            console.print(f"held-out error: {words} ({next(iter(found['held_out'].values()))['of']})", markup=False)
    if fit.no_interval:
        console.print(fit.no_interval, markup=False)
    for note in fit.warnings:
        console.print(f"note: {note}", markup=False)
    console.print(f"verdict: {found['verdict']['word']}. {found['verdict']['why']}", markup=False)
    return found


def write_summary(fit: Fit, summary: dict[str, Any], folder: Path) -> Path:
    """Write estimate.json: the summary, and every series with its interval."""
    folder.mkdir(parents=True, exist_ok=True)
    series = {"t": fit.t} | {name: getattr(fit, name) for name in ("A", "B", "alpha", "beta", "sigma2")}
    for name, (low, high) in fit.intervals.items():
        series |= {f"{name}_low": low, f"{name}_high": high}
    content = {"summary": summary, "series": {name: values.tolist() for name, values in series.items()}}
    path = folder / "estimate.json"
    path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False))
    return path


def _plain(x: Any) -> Any:
    """Numbers that JSON knows: NaN and infinity become null."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(value) for value in x]
    return None if isinstance(x, float) and not np.isfinite(x) else x
