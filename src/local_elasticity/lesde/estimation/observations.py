"""What is observed of the class means in training: checked, with its missing cells, and open to resampling.

Three forms are read: one path of class means (T, K, p); one path a trial (trials, T, K, p), where a NaN cell was not
seen; and the log of single-sample training, in which each trial shows the logits of one sample of one class a step
(spec lesde 3.1, 3.2): the class mean is then the mean over the trials whose sample had that label.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int

from local_elasticity.base.checks import in_words, plain_array
from local_elasticity.base.errors import InputError

Missing = Literal["raise", "interpolate"]
OfCells = Callable[[np.ndarray], np.ndarray]
OfSamples = Callable[[np.ndarray, np.ndarray], np.ndarray]
ABSENT = -1  # label of a step at which a trial logged nothing


@dataclass(frozen=True, eq=False)
class Observations:
    """Class means through training, and the trials they came from.

    Attributes:
        t: times.
        class_means: mean over the trials; empty cells filled in time.
        filled: the (step, class) cells that were empty.
        trials: class means of each trial, NaN where it saw none; None when the trials are logs, or unknown.
        logits: the logs, None when they are unknown.
        labels: their labels.
    """

    t: Float[np.ndarray, " T"]
    class_means: Float[np.ndarray, "T K p"]
    filled: Int[np.ndarray, "cells 2"]
    trials: Float[np.ndarray, "trials T K p"] | None = None
    logits: Float[np.ndarray, "trials T K"] | None = None
    labels: Int[np.ndarray, "trials T"] | None = None

    @property
    def n_classes(self) -> int:
        """K."""
        return self.class_means.shape[1]

    @property
    def n_trials(self) -> int:
        """How many trials are known; 0 for one path."""
        if self.trials is not None:
            return len(self.trials)
        return 0 if self.labels is None else len(self.labels)

    def contributions(
        self, of_cells: OfCells, of_samples: OfSamples, start: int, stop: int
    ) -> tuple[Float[np.ndarray, "trials n K F"], Float32[np.ndarray, "trials n K"] | None]:
        """Features of each trial's cells from step start to stop, 0 where it saw none, and where it saw some.

        Args:
            of_cells: features (..., K, F), linear in class means (..., K, p).
            of_samples: the same of single outputs (..., p) of the classes (...).
            start: first step.
            stop: one after the last.
        """
        if self.trials is not None:
            cells = self.trials[:, start:stop]
            seen = ~np.isnan(cells[..., 0])
            features = of_cells(cells)
            if seen.all():
                return features, None
            return np.where(seen[..., None], features, 0.0), seen.astype(np.float32)
        assert self.logits is not None
        assert self.labels is not None
        labels = self.labels[:, start:stop]
        features = of_samples(self.logits[:, start:stop], labels.clip(min=0))
        seen = (labels[..., None] == np.arange(self.n_classes)).astype(np.float32)
        return seen[..., None] * features[:, :, None, :], seen

    def subset(self, chosen: Int[np.ndarray, " n"]) -> Observations:
        """The observations of these trials only; cells that they leave empty are filled in time."""
        trials = None if self.trials is None else self.trials[chosen]
        logits = None if self.logits is None else self.logits[chosen]
        labels = None if self.labels is None else self.labels[chosen]
        means, filled = _filled(_means(trials, logits, labels, self.class_means.shape), self.t)
        return replace(self, class_means=means, filled=filled, trials=trials, logits=logits, labels=labels)

    def within_variance(self) -> Float[np.ndarray, "T K"]:
        """Variance, per coordinate, of single samples about the mean of their class; NaN unless they were logged."""
        if self.logits is None or self.labels is None:
            return np.full(self.class_means.shape[:2], np.nan)
        return self._sample_variance.mean(axis=2)

    def standard_error(self) -> Float[np.ndarray, "T K p"]:
        """Standard error of the class means over the trials; NaN with fewer than two of them in a cell."""
        if self.trials is not None:
            seen = ~np.isnan(self.trials[..., :1])
            count = seen.sum(axis=0)
            squares = (np.where(seen, self.trials - self.class_means, 0.0) ** 2).sum(axis=0)
            return np.sqrt(np.where(count > 1, squares / np.maximum(count * (count - 1), 1), np.nan))
        if self.labels is None:
            return np.full(self.class_means.shape, np.nan)
        count = _Cells(self.labels, self.n_classes).count[..., None]
        return np.sqrt(self._sample_variance / np.maximum(count, 1))

    @cached_property
    def _sample_variance(self) -> Float[np.ndarray, "T K p"]:
        assert self.logits is not None
        assert self.labels is not None
        cells = _Cells(self.labels, self.n_classes)
        steps = np.arange(len(self.t))
        squares = cells.sums((self.logits - self.class_means[steps, self.labels.clip(min=0)]) ** 2)
        count = cells.count[..., None]
        return np.where(count > 1, squares / np.maximum(count - 1, 1), np.nan)


class _Cells:
    """Sums over the trials that showed a class at a step."""

    def __init__(self, labels: Int[np.ndarray, "trials T"], n_classes: int) -> None:
        logged = labels != ABSENT
        self.logged = np.flatnonzero(logged) if not logged.all() else slice(None)
        self.shape = (labels.shape[1], n_classes)
        self.cell = (np.arange(labels.shape[1]) * n_classes + labels).ravel()[self.logged]
        self.count = np.bincount(self.cell, minlength=self.shape[0] * n_classes).reshape(self.shape)

    def sums(self, values: Float[np.ndarray, "trials T p"]) -> Float[np.ndarray, "T K p"]:
        """Sum of each coordinate over every cell."""
        size = self.shape[0] * self.shape[1]
        rows = [np.bincount(self.cell, values[..., j].ravel()[self.logged], size) for j in range(values.shape[2])]
        return np.stack(rows, axis=-1).reshape(*self.shape, -1)


def observe(
    class_means: Any = None,
    t: Any = None,
    *,
    logits: Any = None,
    labels: Any = None,
    trial: Any = None,
    missing: Missing = "raise",
) -> Observations:
    """Check what was observed and take its class means.

    Args:
        class_means: (T, K, p) or (trials, T, K, p).
        t: times (T,), increasing; 0, 1, 2, … unless given. With ``trial`` the time of each row.
        logits: (T, trials, K) of the sample that each trial trained on; with ``trial`` the rows (N, K) of a log.
        labels: (T, trials), or (N,).
        trial: (N,) trial of each row.
        missing: "raise" or "interpolate" (in time) when a class was seen in no trial at a step.

    Raises:
        InputError: for anything that is not such a record, and for empty cells unless they are to be interpolated.
    """
    if missing not in ("raise", "interpolate"):
        raise InputError(expected="missing='raise' or 'interpolate'", got=repr(missing), do="choose one of them")
    if (class_means is None) == (logits is None and labels is None):
        raise InputError(
            expected="class_means, or logits with labels",
            got="both" if class_means is not None else "neither",
            do="pass one form of the data",
        )
    trials = None
    if class_means is not None:
        trials = _class_means(class_means)
        times = _times(t, trials.shape[1])
        log = label = None
    else:
        if logits is None or labels is None:
            raise InputError(
                expected="logits with labels", got="one of them without the other", do="pass logits= and labels="
            )
        if trial is not None:
            log, label, times = _pivoted(logits, labels, trial, t)
        else:
            log, label = _logs(logits, labels)
            times = _times(t, len(log))
        log, label = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (log, label))  # trials first, as resampled
    shape = trials.shape[1:] if trials is not None else (log.shape[1], log.shape[2], log.shape[2])  # pyright: ignore
    if shape[1] < 2:
        raise InputError(
            expected="at least 2 classes", got=f"K = {shape[1]}", do="local elasticity compares classes: pass more"
        )
    means = _means(trials, log, label, shape)
    filled_means, filled = _filled(means, times)
    if len(filled):
        _check_empty(means, filled, missing, times, 0 if label is None else len(label))
    path = trials is not None and len(trials) == 1
    return Observations(times, filled_means, filled, None if path else trials, log, label)


def array(x: Any) -> np.ndarray:
    """An array of a tensor, on any device, or of anything array-like.

    Raises:
        InputError: for what is none: ragged lists, sets, dicts, generators.
    """
    found = plain_array(x)
    if found is None:
        raise InputError(expected="an array", got=in_words(x), do="pass an array, a tensor, or lists of equal length")
    return found


def _numbers(x: Any, name: str) -> np.ndarray:
    x = array(x)
    if x.dtype.kind not in "fiu":
        raise InputError(expected=f"{name}: real numbers", got=f"dtype {x.dtype}", do="pass an array of floats")
    return x.astype(np.float64, copy=False)


def _class_means(x: Any) -> Float[np.ndarray, "trials T K p"]:
    x = _numbers(x, "class_means")
    if x.ndim == 3:
        x = x[None]
    if x.ndim != 4 or 0 in x.shape:
        raise InputError(
            expected="class_means of shape (T, K, p) or (trials, T, K, p)",
            got=f"shape {x.shape}",
            do="put time before classes before coordinates, and trials first",
        )
    if np.isfinite(x).all():
        return x
    empty = np.isnan(x)
    bad = np.isinf(x) | (empty & ~empty.all(-1, keepdims=True))
    if bad.any():
        trial, step, k, j = np.argwhere(bad)[0]
        raise InputError(
            expected="finite class means (a cell that was not seen is NaN in all its coordinates)",
            got=f"{x[trial, step, k, j]} at step {step}, class {k}, coordinate {j}"
            + (f", trial {trial}" if len(x) > 1 else ""),
            do="drop the steps from where training diverged, or correct the log",
        )
    return x


def _logs(logits: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    z, y = _numbers(logits, "logits"), array(labels)
    if z.ndim != 3 or 0 in z.shape or y.shape != z.shape[:2]:
        raise InputError(
            expected="logits of shape (T, trials, K) and labels of shape (T, trials)",
            got=f"{z.shape} and {y.shape}",
            do="log one sample a step in each trial; rows of a table go with trial=",
        )
    return z, _checked(z, y, lambda at: f"step {at[0]}, trial {at[1]}")


def _checked(z: np.ndarray, y: np.ndarray, where: Callable[[np.ndarray], str]) -> np.ndarray:
    """The labels as integers, after a look at every number."""
    if not np.isfinite(z).all():
        at = np.argwhere(~np.isfinite(z).all(-1))[0]
        raise InputError(
            expected="finite logits",
            got=f"{z[tuple(at)]} at {where(at)}",
            do="drop the steps from where training diverged, or leave this trial out",
        )
    if y.dtype.kind not in "iu":
        raise InputError(expected="integer labels", got=f"dtype {y.dtype}", do="pass class indices")
    outside = (y < 0) | (y >= z.shape[-1])
    if outside.any():
        at = np.argwhere(outside)[0]
        raise InputError(
            expected=f"labels in 0..{z.shape[-1] - 1}, one for each logit",
            got=f"{y[tuple(at)]} at {where(at)}",
            do="relabel the classes, or log all the logits",
        )
    return y.astype(np.int64)


def _pivoted(logits: Any, labels: Any, trial: Any, t: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A table with one row a trial and step, as (T, trials, …); steps that a trial lacks are marked absent."""
    z, y, who = _numbers(logits, "logits"), array(labels), array(trial)
    if t is None:
        raise InputError(expected="t: the time of each row", got="none", do="pass t= beside trial=")
    when = _numbers(t, "t")
    if z.ndim != 2 or any(x.shape != (len(z),) for x in (y, who, when)) or not len(z):
        raise InputError(
            expected="logits (N, K) and labels, trial, t of shape (N,)",
            got=", ".join(str(x.shape) for x in (z, y, who, when)),
            do="give one row for each trial and step",
        )
    y = _checked(z, y, lambda at: f"row {at[0]}")
    times, step = np.unique(when, return_inverse=True)
    names, column = np.unique(who, return_inverse=True)
    cell = step * len(names) + column
    if len(np.unique(cell)) < len(cell):
        twice = np.flatnonzero(np.bincount(cell) > 1)[0]
        raise InputError(
            expected="one row for each trial and step",
            got=f"several for trial {names[twice % len(names)]} at t = {times[twice // len(names)]:g}",
            do="average the samples of a batch class by class, and pass class_means",
        )
    out = np.zeros((len(times), len(names), z.shape[1]))
    label = np.full(out.shape[:2], ABSENT)
    out[step, column], label[step, column] = z, y
    return out, label, _times(times, len(times))


def _times(t: Any, n: int) -> Float[np.ndarray, " T"]:
    times = np.arange(n, dtype=float) if t is None else _numbers(t, "t")
    if times.shape != (n,):
        raise InputError(
            expected=f"{n} times, one for each step", got=f"t of shape {times.shape}", do="pass the times of the record"
        )
    if n < 6:
        raise InputError(
            expected="at least 6 times (windows take at most half of them)", got=f"{n}", do="look more often"
        )
    if not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        at = int(np.flatnonzero(~(np.diff(times) > 0))[0]) if n > 1 else 0
        raise InputError(
            expected="finite, increasing times",
            got=f"t[{at}] = {times[at]:g}, t[{at + 1}] = {times[at + 1]:g}",
            do="sort the record by time, and keep one row for each",
        )
    return times


def _means(
    trials: np.ndarray | None, logits: np.ndarray | None, labels: np.ndarray | None, shape: tuple[int, ...]
) -> Float[np.ndarray, "T K p"]:
    if trials is not None:
        plain = trials.mean(axis=0)
        if not np.isnan(plain).any():
            return plain
        seen = ~np.isnan(trials[..., :1])
        count = seen.sum(0)
        return np.where(count > 0, np.where(seen, trials, 0.0).sum(0) / np.maximum(count, 1), np.nan)
    assert logits is not None
    assert labels is not None
    cells = _Cells(labels, shape[1])
    count = cells.count[..., None]
    return np.where(count > 0, cells.sums(logits) / np.maximum(count, 1), np.nan)


def _filled(means: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class means with empty cells interpolated in time, and which cells these were."""
    empty = np.isnan(means[..., 0])
    if not empty.any():
        return means, np.empty((0, 2), dtype=np.int64)
    out = means.copy()
    for k in np.flatnonzero(empty.any(0)):
        gone = empty[:, k]
        if gone.all():
            raise InputError(
                expected="every class at some step",
                got=f"class {k} at none",
                do="leave this class out, or train on it",
            )
        for j in range(means.shape[2]):
            out[gone, k, j] = np.interp(t[gone], t[~gone], means[~gone, k, j])
    return out, np.argwhere(empty)


def _check_empty(means: np.ndarray, cells: np.ndarray, missing: Missing, t: np.ndarray, trials: int) -> None:
    if missing == "interpolate":
        return
    total, K = means.shape[0] * means.shape[1], means.shape[1]
    named = ", ".join(f"(t = {t[step]:g}, class {k})" for step, k in cells[:5])
    chance = (
        f"; with {trials} trials a step lacks one of {K} equally frequent classes with probability "
        f"{min(1.0, K * ((K - 1) / K) ** trials):.2g}"
        if trials
        else ""
    )
    raise InputError(
        expected="every class at every step",
        got=f"{len(cells)} of {total} (step, class) cells empty: {named}{', …' if len(cells) > 5 else ''}{chance}",
        do="add trials, or pass missing='interpolate' to fill them in time",
    )
