"""Class-by-class tables of a similarity, with their sampling error.

The error comes from a two-way bootstrap: the sources of each class and the targets of each class are resampled
independently, with the same weights in every cell, so that cells which share probes vary together as they should.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from local_elasticity.base.checks import (
    as_numbers,
    check_class_names,
    check_flag,
    check_fraction,
    check_labels,
    check_seed,
    check_whole,
    plain_array,
)
from local_elasticity.base.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

Cells = Float[np.ndarray, "k k"]
Counts = Int[np.ndarray, "k k"]
Interval = tuple[float, float]

_HEAVY_PAIRS = 20  # fewer pairs than these are never called heavy tailed
_WEIGHTS_AT_ONCE = 1 << 22  # of the pairs of a cell, while medians are resampled
_DRAWS_AT_ONCE = 1 << 23  # cell means of all resamples


class _Pairs(NamedTuple):
    """The pairs of a table: their values, which of them count, and the members of each class."""

    s: Float[np.ndarray, "s t"]
    used: Bool[np.ndarray, "s t"]
    rows: list[Int[np.ndarray, " n"]]
    columns: list[Int[np.ndarray, " m"]]

    def cells(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Every cell: source class, target class, values, which of them count."""
        for a, r in enumerate(self.rows):
            for b, c in enumerate(self.columns):
                yield a, b, self.s[np.ix_(r, c)], self.used[np.ix_(r, c)]


@dataclass(frozen=True, eq=False)
class ClassTable:
    """A similarity by [source class, target class].

    Attributes:
        classes: the labels, ascending.
        class_names: their names.
        values: mean of the ratios in each cell.
        median: median of the ratios.
        ratio_of_means: sum of the numerators over sum of the denominators; NaN unless denominators were given.
        standard_error: standard deviation of ``values`` over the bootstrap.
        interval_low: lower end of the bootstrap interval of ``values``.
        interval_high: its upper end.
        n_pairs: pairs that count.
        n_undefined: pairs left out because their ratio is undefined.
        heavy_tailed: the largest 1 % of the pairs carry over half of the sum of absolute values.
        intra: unweighted mean of the diagonal cells.
        inter: unweighted mean of the other cells.
        ratio: inter / intra.
        intra_interval: (low, high) of ``intra``.
        inter_interval: (low, high) of ``inter``.
        ratio_interval: (low, high) of ``ratio``.
        self_pairs: whether pairs of a sample with itself are ``"in"`` or ``"out"``.
        confidence: coverage asked of the intervals.
        seed: of the bootstrap.
        n_boot: resamples of the bootstrap.
    """

    classes: Int[np.ndarray, " k"]
    class_names: tuple[str, ...]
    values: Cells
    median: Cells
    ratio_of_means: Cells
    standard_error: Cells
    interval_low: Cells
    interval_high: Cells
    n_pairs: Counts
    n_undefined: Counts
    heavy_tailed: Bool[np.ndarray, "k k"]
    intra: float
    inter: float
    ratio: float
    intra_interval: Interval
    inter_interval: Interval
    ratio_interval: Interval
    self_pairs: Literal["in", "out"]
    confidence: float
    seed: int
    n_boot: int
    _pairs: _Pairs = field(repr=False)

    def median_interval(self) -> tuple[Cells, Cells]:
        """Lower and upper end of the bootstrap interval of ``median``, on the same resamples as the others."""
        w, v = _weights(self._pairs, self.n_boot, self.seed)
        boot = np.full((self.n_boot, *self.values.shape), np.nan)
        for a, b, values, used in self._pairs.cells():
            step = max(1, _WEIGHTS_AT_ONCE // used.size)
            for i in range(0, self.n_boot, step):
                weights = w[a][i : i + step, :, None] * v[b][i : i + step, None, :]
                boot[i : i + step, a, b] = weighted_medians(values[used], weights[:, used])
        boot[:, _single(self._pairs)] = np.nan
        low, high = _interval(boot.reshape(self.n_boot, -1), self.confidence)
        return low.reshape(self.values.shape), high.reshape(self.values.shape)

    def arrays(self) -> dict[str, Any]:
        """The numbers of the table by the names of `to_xarray`: those of cells (k, k), and the scalars."""
        cells = {"mean": self.values}
        names = ("median", "ratio_of_means", "standard_error", "interval_low", "interval_high")
        cells |= {name: getattr(self, name) for name in (*names, "n_pairs", "n_undefined", "heavy_tailed")}
        scalars = {}
        for name in ("intra", "inter", "ratio"):
            low, high = getattr(self, f"{name}_interval")
            scalars |= {name: getattr(self, name), f"{name}_low": low, f"{name}_high": high}
        return {**cells, **scalars}

    def to_xarray(self) -> xr.Dataset:
        """The table as a dataset with dimensions ``source_class`` and ``target_class``."""
        import xarray as xr

        dims = ("source_class", "target_class")
        labels = list(self.class_names)
        return xr.Dataset(
            {name: (dims, value) if np.ndim(value) else value for name, value in self.arrays().items()},
            coords={"source_class": labels, "target_class": labels},
            attrs={"self_pairs": self.self_pairs, "confidence": self.confidence, "seed": self.seed},
        )


def by_class(
    s: Any,
    ys: Any,
    yt: Any,
    *,
    class_names: Sequence[str] | None = None,
    exclude_self: bool = False,
    source_ids: Any = None,
    target_ids: Any = None,
    denominators: Any = None,
    n_boot: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> ClassTable:
    """Average a similarity over the pairs of each two classes.

    Args:
        s: (n_s, n_t) similarity of source and target; NaN where it is undefined.
        ys: (n_s,) integer class of each source.
        yt: (n_t,) integer class of each target.
        class_names: the name of every label from 0 on; the labels themselves unless given.
        exclude_self: leave out pairs of a sample with itself.
        source_ids: (n_s,) sample index of each source; without ids a square ``s`` with equal labels means the diagonal.
        target_ids: (n_t,) sample index of each target.
        denominators: (n_s,) what ``similarity.movements`` gives, for ``ratio_of_means``.
        n_boot: resamples of the bootstrap; 0 for none.
        confidence: coverage of the intervals.
        seed: of the bootstrap.

    Returns:
        The table. A cell whose source or target class has one probe has no interval.

    Raises:
        InputError: for labels that are no classes, shapes that do not fit, or settings that are none.
    """
    check_flag("exclude_self", exclude_self)
    n_boot, seed = check_whole("n_boot", n_boot, 0), check_seed("seed", seed)
    confidence = check_fraction("confidence", confidence)
    s, ys, yt = as_numbers("s", s), check_labels("ys", ys), check_labels("yt", yt)
    _check_sizes(s, ys, yt)
    classes = _classes(ys, yt)
    names = _names(class_names, classes)
    kept = ~_self_pairs(s, ys, yt, source_ids, target_ids) if exclude_self else np.ones(s.shape, bool)
    pairs = _Pairs(
        s, kept & np.isfinite(s), [np.flatnonzero(ys == c) for c in classes], [np.flatnonzero(yt == c) for c in classes]
    )
    values, median, n_pairs, heavy = _describe(pairs)
    counted = _counts(pairs, kept)
    cells, resampled = _bootstrap(pairs, n_boot, seed, confidence)
    points, ends = _aggregates(values[None]), [_interval(a[:, None], confidence) for a in resampled]
    intra, inter, ratio = (float(a[0]) for a in points)
    intervals = [(float(low[0]), float(high[0])) for low, high in ends]
    return ClassTable(
        classes=classes,
        class_names=names,
        values=values,
        median=median,
        ratio_of_means=_ratio_of_means(pairs, denominators),
        standard_error=cells[0],
        interval_low=cells[1],
        interval_high=cells[2],
        n_pairs=n_pairs,
        n_undefined=counted - n_pairs,
        heavy_tailed=heavy,
        intra=intra,
        inter=inter,
        ratio=ratio,
        intra_interval=intervals[0],
        inter_interval=intervals[1],
        ratio_interval=intervals[2],
        self_pairs="out" if exclude_self else "in",
        confidence=confidence,
        seed=seed,
        n_boot=n_boot,
        _pairs=pairs,
    )


def _cell_of(pairs: _Pairs) -> Int[np.ndarray, "s t"]:
    """The number of every pair's cell, row by row."""
    k, shape = len(pairs.rows), pairs.s.shape
    row, column = np.empty(shape[0], np.int64), np.empty(shape[1], np.int64)
    for classes, members in ((row, pairs.rows), (column, pairs.columns)):
        for number, member in enumerate(members):
            classes[member] = number
    return row[:, None] * k + column


def _blocks(
    pairs: _Pairs, counted: Bool[np.ndarray, "s t"], *of: Float[np.ndarray, "s t"]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Cells with equally many counted pairs: their numbers, and of each matrix their values (cells, pairs) in order."""
    cell = _cell_of(pairs)[counted]
    order = np.argsort(cell, kind="stable")
    values, count = [x[counted][order] for x in of], np.bincount(cell, minlength=len(pairs.rows) ** 2)
    starts = np.cumsum(count) - count
    for n in np.unique(count[count > 0]):
        cells = np.flatnonzero(count == n)
        places = starts[cells][:, None] + np.arange(n)
        yield (cells, *(x[places] for x in values))


def _counts(pairs: _Pairs, counted: Bool[np.ndarray, "s t"]) -> Counts:
    k = len(pairs.rows)
    return np.bincount(_cell_of(pairs)[counted], minlength=k * k).reshape(k, k)


def _describe(pairs: _Pairs) -> tuple[Cells, Cells, Counts, Bool[np.ndarray, "k k"]]:
    """Mean, median, count and heavy tail of every cell."""
    k = len(pairs.rows)
    mean, median, heavy = np.full(k * k, np.nan), np.full(k * k, np.nan), np.zeros(k * k, bool)
    for cells, x in _blocks(pairs, pairs.used, pairs.s):
        mean[cells], median[cells], heavy[cells] = x.mean(1), np.median(x, axis=1), _is_heavy(x)
    return mean.reshape(k, k), median.reshape(k, k), _counts(pairs, pairs.used), heavy.reshape(k, k)


def _is_heavy(x: Float[np.ndarray, "cells n"]) -> Bool[np.ndarray, " cells"]:
    """Whether the largest 1 % (rounded up) carry over half of the sum of absolute values."""
    n = x.shape[1]
    if n < _HEAVY_PAIRS:
        return np.zeros(len(x), bool)
    size, top = np.abs(x), math.ceil(n / 100)
    return np.partition(size, -top, axis=1)[:, -top:].sum(1) > 0.5 * size.sum(1)


def _cell_sums(pairs: _Pairs, x: Float[np.ndarray, "s t"]) -> Cells:
    """The sum of ``x`` over every cell."""
    k = len(pairs.rows)
    out = np.empty(k * k)
    for cells, values in _blocks(pairs, np.ones(x.shape, bool), x):
        out[cells] = values.sum(1)
    return out.reshape(k, k)


def _ratio_of_means(pairs: _Pairs, denominators: Any) -> Cells:
    """Summed numerators over summed denominators of the pairs that count."""
    k, n_s = len(pairs.rows), pairs.s.shape[0]
    if denominators is None:
        return np.full((k, k), np.nan)
    den = as_numbers("denominators", denominators)
    if den.shape != (n_s,):
        raise InputError(
            expected=f"denominators of shape ({n_s},)", got=f"shape {den.shape}", do="give one for each source"
        )
    weight = np.where(pairs.used, den[:, None], 0.0)
    return _divide(_cell_sums(pairs, weight * np.where(pairs.used, pairs.s, 0.0)), _cell_sums(pairs, weight))


@lru_cache(maxsize=4)
def _draws(
    sources: tuple[int, ...], targets: tuple[int, ...], n_boot: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """How often every resample draws each member (n_boot, n) of classes of these sizes."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        times = rng.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(float)
        times.flags.writeable = False
        return times

    return [draw(n) for n in sources], [draw(n) for n in targets]


def _weights(pairs: _Pairs, n_boot: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """How often every resample draws each source and each target, by class."""
    return _draws(tuple(r.size for r in pairs.rows), tuple(c.size for c in pairs.columns), n_boot, seed)


def _bootstrap(
    pairs: _Pairs, n_boot: int, seed: int, confidence: float
) -> tuple[Float[np.ndarray, "3 k k"], Float[np.ndarray, "3 n_boot"]]:
    """Spread, lower and upper end of every cell's mean, and intra, inter and ratio of every resample.

    The means are (k, k, n_boot), so that what is done with the resamples of a cell runs along memory; a block of source
    classes at a time.
    """
    k = len(pairs.rows)
    cells, intra, inter = np.full((3, k, k), np.nan), np.empty((k, n_boot)), np.zeros((1, n_boot))
    step = max(1, _DRAWS_AT_ONCE // max(1, k * n_boot))
    for start in range(0, k, step):
        block = range(start, min(k, start + step))
        means = _resampled_means(pairs, n_boot, seed, block)
        flat = means.reshape(len(block) * k, n_boot).T
        for out, values in zip(cells, (_spread(flat), *_interval(flat, confidence)), strict=True):
            out[block.start : block.stop] = values.reshape(-1, k)
        for row, a in zip(means, block, strict=True):
            intra[a] = row[a]
        off = ~np.eye(k, dtype=bool)[block.start : block.stop]
        inter = np.add.reduce([inter[0], *means[off]], axis=0)[None]
    scalars = [np.add.reduce(intra, axis=0) / k, inter[0] / max(1, k * k - k)]
    if k == 1:
        scalars[1] = np.full(n_boot, np.nan)
    return cells, np.array([*scalars, _divide(scalars[1], scalars[0])])


def _resampled_means(pairs: _Pairs, n_boot: int, seed: int, block: range) -> Float[np.ndarray, "block k n_boot"]:
    """The cell means of every resample for some source classes; NaN where a class has one probe."""
    w, v = _weights(pairs, n_boot, seed)
    order, drawn = np.concatenate(pairs.columns), np.concatenate(v, axis=1).T
    sizes = np.array([c.size for c in pairs.columns])
    starts = np.cumsum(sizes) - sizes

    def by_target_class(sums: Float[np.ndarray, "n_boot t"]) -> Float[np.ndarray, "k n_boot"]:
        parts = sums.T[order] * drawn
        total = parts[starts]
        for member in range(1, int(sizes.max())):
            some = np.flatnonzero(sizes > member)
            total[some] += parts[starts[some] + member]
        return total

    means = np.empty((len(block), len(sizes), n_boot))
    for out, a in zip(means, block, strict=True):
        r = pairs.rows[a]
        used = pairs.used[r]
        total = by_target_class(w[a] @ np.where(used, pairs.s[r], 0.0))
        if used.all():
            out[...] = _divide(total, np.broadcast_to((r.size * sizes)[:, None].astype(float), total.shape))
        else:
            out[...] = _divide(total, by_target_class(w[a] @ used.astype(float)))
    means[_single(pairs)[block.start : block.stop]] = np.nan
    return means


def _single(pairs: _Pairs) -> Bool[np.ndarray, "k k"]:
    """The cells whose source or target class has one probe."""
    rows, columns = (np.array([m.size == 1 for m in x]) for x in (pairs.rows, pairs.columns))
    return rows[:, None] | columns[None, :]


def _aggregates(cells: Float[np.ndarray, "b k k"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unweighted means of the diagonal and of the other cells, and their ratio."""
    k = cells.shape[-1]
    diagonal = np.eye(k, dtype=bool)
    intra = cells[:, diagonal].mean(1)
    inter = cells[:, ~diagonal].mean(1) if k > 1 else np.full(len(cells), np.nan)
    return intra, inter, _divide(inter, intra)


def _interval(boot: Float[np.ndarray, "b cells"], confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval over the first dimension; NaN where no resample has a value.

    Sorting is several times faster than ``numpy.percentile``, whose linear interpolation this is.
    """
    tail = 50 * (1 - confidence)
    low, high = np.full(boot.shape[1:], np.nan), np.full(boot.shape[1:], np.nan)
    missing = np.isnan(boot)
    whole, some = ~missing.any(0), ~missing.all(0)
    if not some.any():
        return low, high
    if whole.any():
        ranked = np.sort(boot[:, whole].T, axis=1)
        low[whole], high[whole] = (_at_rank(ranked, percent) for percent in (tail, 100 - tail))
    gaps = some & ~whole
    if gaps.any():
        low[gaps], high[gaps] = np.nanpercentile(boot[:, gaps], [tail, 100 - tail], axis=0)
    return low, high


def _at_rank(ranked: Float[np.ndarray, "cells b"], percent: float) -> Float[np.ndarray, " cells"]:
    """The percentile of rows that are in order, interpolated as ``numpy.percentile`` does."""
    place = (ranked.shape[1] - 1) * (percent / 100)
    below = math.floor(place)
    one, other = ranked[:, below], ranked[:, min(below + 1, ranked.shape[1] - 1)]
    share, gap = place - below, other - one
    return one + gap * share if share < 0.5 else other - gap * (1 - share)


def _spread(boot: Float[np.ndarray, "b cells"]) -> Float[np.ndarray, " cells"]:
    """Standard deviation over the resamples that have a value, of which two are needed."""
    out = np.full(boot.shape[1:], np.nan)
    some = (~np.isnan(boot)).sum(0) > 1
    if some.any():
        out[some] = np.nanstd(np.ascontiguousarray(boot.T[some]), axis=1, ddof=1)
    return out


def weighted_medians(x: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """The median of ``x`` with every value repeated as often as its weight says."""
    if not x.size:
        return np.full(len(weights), np.nan)
    order = np.argsort(x)
    x, reached = x[order], np.cumsum(weights[:, order], axis=1)
    half = reached[:, -1:] / 2
    lower, upper = (reached >= half).argmax(1), (reached > half).argmax(1)
    return np.where(half[:, 0] > 0, (x[lower] + x[upper]) / 2, np.nan)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Quotient, NaN where ``b`` is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


def _self_pairs(s: np.ndarray, ys: np.ndarray, yt: np.ndarray, sources: Any, targets: Any) -> Bool[np.ndarray, "s t"]:
    """Which pairs are a sample with itself."""
    if sources is not None and targets is not None:
        a, b = plain_array(sources), plain_array(targets)
        if a is None or b is None or a.shape != ys.shape or b.shape != yt.shape:
            raise InputError(
                expected=f"source_ids ({ys.size},) and target_ids ({yt.size},)",
                got=" and ".join("no array" if ids is None else str(ids.shape) for ids in (a, b)),
                do="give one sample index for each source and each target",
            )
        return a[:, None] == b[None, :]
    if sources is None and targets is None and np.array_equal(ys, yt):
        return np.eye(len(s), dtype=bool)
    raise InputError(
        expected="a way to tell which sources are also targets",
        got="different labels of sources and targets, or ids of one of them only",
        do="give both source_ids and target_ids, or leave exclude_self=False",
    )


def _check_sizes(s: np.ndarray, ys: np.ndarray, yt: np.ndarray) -> None:
    if s.shape != (ys.size, yt.size) or s.size == 0:
        raise InputError(
            expected=f"s of shape (sources, targets) = ({ys.size}, {yt.size}), none of them 0",
            got=f"shape {s.shape}",
            do="give one label for each row in ys and for each column in yt",
        )


def _classes(ys: np.ndarray, yt: np.ndarray) -> Int[np.ndarray, " k"]:
    sources, targets = np.unique(ys), np.unique(yt)
    if not np.array_equal(sources, targets):
        raise InputError(
            expected="every class among both the sources and the targets",
            got=f"empty classes: {np.setdiff1d(targets, sources).tolist()} have no source, "
            f"{np.setdiff1d(sources, targets).tolist()} have no target",
            do="add probes of these classes, or drop the others of them",
        )
    return sources


def _names(names: Sequence[str] | None, classes: np.ndarray) -> tuple[str, ...]:
    if names is None:
        return tuple(str(c) for c in classes)
    names = check_class_names("class_names", names)
    if len(names) <= classes[-1]:
        raise InputError(
            expected=f"labels below {len(names)}, the number of class_names",
            got=f"label {classes[-1]}",
            do="give a name for every label, or correct the labels",
        )
    return tuple(str(names[c]) for c in classes)
