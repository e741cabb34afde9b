"""Paths of the LE-SDE: exact at any save points, the discrete recursion, Euler–Maruyama, and the authors' recursion.

Within a class, deviations from the class mean are integrated noise and independent of it; so class means and clouds
are drawn apart, each from its exact law (or from the exact law of the recursion that was asked for).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from local_elasticity.base.checks import check_choice, check_flag, check_real, check_whole, in_words, is_whole
from local_elasticity.base.errors import InputError
from local_elasticity.base.progress import Progress
from local_elasticity.base.tensors import check_callable, check_device
from local_elasticity.lesde import exact
from local_elasticity.lesde.arrays import Array, Like, to_numpy
from local_elasticity.lesde.noise import root

if TYPE_CHECKING:
    from local_elasticity.lesde.equation import Equation

Method = Literal["exact", "discrete", "euler-maruyama", "published"]
Keep = Literal["clouds", "means", "statistics"]
Times = Float[np.ndarray, " times"]
Velocity = Callable[[float, Tensor], Tensor]

_CHUNK = 1 << 18  # numbers of a chunk of clouds: it stays in the cache


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is kept of clouds that are not.

    Attributes:
        t: save points.
        class_means: means of the samples, (paths, T, K, p).
        within_covariance: covariance of the samples about them (divided by n), (paths, T, K, p, p).
        n_per_class: n.
    """

    t: Array
    class_means: Array
    within_covariance: Array
    n_per_class: int

    @property
    def within_variance(self) -> Array:
        """Its diagonal, (paths, T, K, p)."""
        return self.within_covariance.diagonal(0, -2, -1)


@dataclass(frozen=True)
class _Request:
    """What a sampler needs to know."""

    t: Times
    n: int
    paths: int
    keep: Keep
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)


def sample(
    sde: Equation,
    t: Any,
    n_per_class: int,
    n_paths: int,
    seed: int | torch.Generator | np.random.Generator,
    *,
    method: Method = "exact",
    keep: Keep | None = None,
    step: float | None = None,
    velocity: Velocity | None = None,
    starts: Any = None,
    dtype: str | None = None,
    device: Any = None,
    out: Any = None,
    progress: bool = False,
) -> Any:
    """Draw paths; see `LESDE.sample`."""
    times, like = _increasing(sde, t)
    check_whole("n_per_class", n_per_class)
    check_whole("n_paths", n_paths)
    check_choice("method", method, Method)
    check_choice("keep", keep, Keep, or_none=True)
    check_real("step", step, 0.0, above=True, or_none=True)
    check_flag("progress", progress)
    if velocity is not None:
        check_callable("velocity", velocity, 2, "lambda t, means: 0 * means")
    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    check_choice("dtype", like.dtype if dtype is None else dtype, ("float32", "float64"))
    chosen = check_device("device", device)
    like = Like(dtype or like.dtype, like.device if chosen is None else chosen)
    on = torch.device("cpu") if like.device is None else like.device
    generator = as_generator(seed, on)
    keep = keep or ("means" if method == "published" else "clouds")
    request = _Request(times, int(n_per_class), int(n_paths), keep, getattr(torch, like.dtype), on, generator)
    if method == "published":
        result = published(sde, request, starts, out)
        return result if out is not None else _as(like, result)
    if starts is not None or out is not None:
        raise InputError(expected=f"neither starts nor out with method {method!r}", got="one", do='use "published"')
    makers: dict[str, Callable[[], Iterator[Any]]] = {
        "exact": lambda: _exact(sde, request),
        "discrete": lambda: _discrete(sde, request, 1.0 if step is None else step),
        "euler-maruyama": lambda: _euler(sde, request, step, velocity),
    }
    return _collect(sde, request, like, makers[method](), method, progress)


def _increasing(sde: Equation, t: Any) -> tuple[Times, Like]:
    times, like = sde._times(t)
    if (np.diff(times) <= 0).any():
        raise InputError(expected="save points that increase", got="some that do not", do="sort them, each once")
    return times, like


def as_generator(seed: Any, device: torch.device) -> torch.Generator:
    """A torch generator from a seed, a NumPy generator (one draw is taken), or itself."""
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, np.random.Generator):
        seed = int(seed.integers(2**62))
    if not is_whole(seed) or not 0 <= seed < 2**63:
        raise InputError(
            expected="seed: a whole number >= 0, a torch generator or a NumPy generator",
            got=in_words(seed),
            do="write for example seed=0",
        )
    return torch.Generator(device).manual_seed(int(seed))


def _as(like: Like, tensor: Tensor) -> Array:
    return tensor.cpu().numpy() if like.device is None else tensor


# --- collecting --------------------------------------------------------------------------------------------------


def _collect(sde: Equation, request: _Request, like: Like, pieces: Iterator[Any], method: str, progress: bool) -> Any:
    """Put pieces (which paths, save point, class means, deviations or covariance) together."""
    k, p = sde.means.shape
    shape = (request.paths, request.t.size, k)
    means = torch.empty((*shape, p), dtype=request.dtype, device=request.device)
    more = {"clouds": (request.n, p), "statistics": (p, p)}.get(request.keep)
    rest = None if more is None else torch.empty((*shape, *more), dtype=request.dtype, device=request.device)
    total, begun, told = request.paths * request.t.size, time.perf_counter(), 0
    with Progress(progress, total, f"{request.paths} paths, {method}") as bar:
        for which, at, mean, cloud in pieces:
            size = mean.shape[0]
            means[which, at] = mean
            if rest is not None:
                rest[which, at] = mean[:, :, None] + cloud if request.keep == "clouds" else cloud
            told += size
            bar.advance(size)
            if told == size or (told - size) * 50 < total <= told * 50:
                bar.estimate((time.perf_counter() - begun) * total / told)
    if request.keep == "statistics":
        assert rest is not None
        return Statistics(like(request.t), _as(like, means), _as(like, rest), request.n)
    return _as(like, means if rest is None else rest)


def _kept(keep: Keep, z: Tensor) -> Tensor | None:
    """What is kept of deviations z (paths, K, p, n) whose mean counts for nothing."""
    if keep == "means":
        return None
    mean = z.mean(dim=3)
    if keep == "clouds":
        return (z - mean[..., None]).transpose(2, 3)
    flat = z.flatten(0, 1)
    second = torch.bmm(flat, flat.transpose(1, 2)).unflatten(0, z.shape[:2]) / z.shape[3]
    return second - mean[..., :, None] * mean[..., None, :]


def _chunks(sde: Equation, request: _Request) -> Iterator[slice]:
    """Groups of paths whose clouds fit the cache; the draws depend on this, hence not on the machine."""
    k, p = sde.means.shape
    each = k * p * (request.n if request.keep != "means" else 1)
    most = max(1, _CHUNK // each) if request.device.type == "cpu" else max(1, (64 * _CHUNK) // each)
    for begin in range(0, request.paths, most):
        yield slice(begin, min(begin + most, request.paths))


class _Clouds:
    """Deviations from the class means of a chunk of paths: integrated noise."""

    def __init__(self, sde: Equation, request: _Request, paths: int) -> None:
        self.request = request
        k, p = sde.means.shape
        self.kept = request.keep != "means"
        self.plain = sde.noise.common
        self.root = request.tensor(sde.noise.root)
        shape = (paths, k, p, request.n)  # products over the samples are fastest with these last
        self.z = self.noise = request.tensor(np.zeros(1))
        if self.kept:
            self.noise = torch.empty(shape, dtype=request.dtype, device=request.device)
            self.noise.normal_(generator=request.generator)
            self.z = request.tensor(root(sde.initial_covariance)) @ self.noise

    def grow(self, variance: float) -> None:
        """Add noise of this variance."""
        if self.kept and variance > 0 and self.request.n > 1:
            self.noise.normal_(generator=self.request.generator)
            noise = self.noise if self.plain else self.root @ self.noise
            self.z.add_(noise, alpha=variance**0.5)

    def look(self) -> Tensor | None:
        """What is kept of them."""
        return _kept(self.request.keep, self.z)


def _start(sde: Equation, request: _Request, paths: int, n: int) -> Tensor:
    """Means of n samples a class at the start, (paths, K p)."""
    k, p = sde.means.shape
    spread = request.tensor(root(sde.initial_covariance) / np.sqrt(n))
    return (request.tensor(sde.means) + torch.einsum("kab,xkb->xka", spread, request.normal(paths, k, p))).flatten(1)


# --- exact -------------------------------------------------------------------------------------------------------


def _exact(sde: Equation, request: _Request) -> Iterator[Any]:
    steps = exact.transitions(sde, request.t)
    roots = root(steps.spread)
    own = sde.acts_on == "own"
    carry, spread = request.tensor(steps.carry), request.tensor(roots / (1 if own else np.sqrt(request.n)))
    k, p = sde.means.shape
    for which in _chunks(sde, request):
        paths = which.stop - which.start
        if own:
            yield from _own(sde, request, which, lambda at, x: x @ carry[at].T, lambda at: spread[at])
            continue
        x, clouds = _start(sde, request, paths, request.n), _Clouds(sde, request, paths)
        for at, variance in enumerate(steps.noise.tolist()):
            x = x @ carry[at].T
            if variance > 0:
                x = x + request.normal(paths, k * p) @ spread[at].T
            clouds.grow(variance)
            yield which, at, x.view(paths, k, p), clouds.look()


def _own(
    sde: Equation,
    request: _Request,
    which: slice,
    move: Callable[[int, Tensor], Tensor],
    spread: Callable[[int], Tensor] | None,
) -> Iterator[Any]:
    """Every sample's own vector, the i-th samples of all classes stacked."""
    k, p = sde.means.shape
    paths = which.stop - which.start
    x = _start(sde, request, paths * request.n, 1)
    for at in range(request.t.size):
        x = move(at, x)
        if spread is not None:
            x = x + request.normal(paths * request.n, k * p) @ spread(at).T
        cloud = x.view(paths, request.n, k, p).transpose(1, 2)
        mean = cloud.mean(dim=2)
        yield which, at, mean, _kept(request.keep, cloud.transpose(2, 3).contiguous())


# --- the discrete recursion --------------------------------------------------------------------------------------


def _discrete(sde: Equation, request: _Request, step: float) -> Iterator[Any]:
    """X_i^k += h E_{k,L} H_{k,L} X_J^L + sqrt(h) zeta_i^k, with class L and sample J drawn at each step.

    All samples of a class move alike apart from their own noise; a sample's noise is drawn when it is looked at, with
    the variance that has gathered since, so a step costs the same for any n.
    """
    if sde.acts_on == "own":
        raise InputError(expected="the class-mean drift", got='acts_on="own"', do="the discrete recursion has no other")
    counts = (request.t - sde.start) / step
    if step <= 0 or np.abs(counts - np.round(counts)).max() > 1e-6:
        raise InputError(
            expected=f"save points at whole steps of {step:g} from {sde.start:g}", got="others", do="change t or step"
        )
    saves = np.round(counts).astype(int)
    times = sde.start + step * np.arange(1, saves[-1] + 1)
    alpha, beta = sde.alpha(times), sde.beta(times)
    spent = np.append(0.0, np.cumsum(step * sde.noise.variance(times)))
    k, p = sde.means.shape
    blocks = request.tensor(sde.drift.blocks)
    alike = bool((sde.drift.blocks == sde.drift.blocks[:1]).all())
    weights = request.tensor(sde.weights)
    roots, same = request.tensor(sde.noise.root), request.tensor(np.eye(k))
    for which in _chunks(sde, replace(request, keep="clouds")):
        paths = which.stop - which.start
        rows = torch.arange(paths, device=request.device)
        start = request.tensor(root(sde.initial_covariance))
        y = request.tensor(sde.means)[:, None] + request.normal(paths, k, request.n, p) @ start.transpose(1, 2)
        seen = torch.zeros((paths, k, request.n), dtype=request.dtype, device=request.device)
        moved = torch.zeros((paths, k, p), dtype=request.dtype, device=request.device)
        at = 0
        for m in range(saves[-1] + 1):
            if m:
                label = torch.multinomial(weights, paths, replacement=True, generator=request.generator)
                index = torch.randint(request.n, (paths,), generator=request.generator, device=request.device)
                if spent[m - 1] > 0:
                    due = (spent[m - 1] - seen[rows, label, index]).clamp_(min=0).sqrt_()
                    fresh = torch.einsum("xab,xb->xa", roots[label], request.normal(paths, p))
                    y[rows, label, index] += due[:, None] * fresh
                    seen[rows, label, index] = spent[m - 1]
                source = y[rows, label, index] + moved[rows, label]
                if alike:
                    push = torch.einsum("xab,xb->xa", blocks[0][label], source)[:, None]
                else:
                    push = torch.einsum("kxab,xb->xka", blocks[:, label], source)
                strength = beta[m - 1] + (alpha[m - 1] - beta[m - 1]) * same[label]
                moved += step * strength[:, :, None] * push
            if m == saves[at]:
                due = (spent[m] - seen).clamp_(min=0).sqrt_()
                if spent[m] > 0:
                    y += due[..., None] * (request.normal(paths, k, request.n, p) @ roots.transpose(1, 2))
                    seen[:] = spent[m]
                mean = y.mean(dim=2)
                yield which, at, mean + moved, _kept(request.keep, y.transpose(2, 3))
                at += 1


# --- Euler–Maruyama ----------------------------------------------------------------------------------------------


def _velocity_at(velocity: Velocity, t: float, means: Tensor) -> Tensor:
    try:
        move = velocity(t, means)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            expected="velocity(t, means) that can be called",
            got=f"{type(error).__name__} at t = {t:g} for means {tuple(means.shape)}",
            do="make it work by itself for a float and a tensor (paths, K, p)",
        ) from error
    if not isinstance(move, Tensor) or move.shape != means.shape:
        raise InputError(
            expected=f"velocity(t, means) that returns a tensor of shape {tuple(means.shape)}, like the means",
            got=in_words(move),
            do="return the drift of every class mean",
        )
    return move


def _euler(sde: Equation, request: _Request, step: float | None, velocity: Velocity | None) -> Iterator[Any]:
    """X += h M(t) Xbar + sqrt(h) Sigma^(1/2) xi, with steps of at most ``step`` that hit the save points."""
    begins = np.append(sde.start, request.t[:-1])
    step = float(request.t[-1] - sde.start) / 1000 if step is None else float(step)
    if step <= 0:
        raise InputError(expected="a step above 0", got=f"{step}", do="pass step=...")
    counts = np.ceil((request.t - begins) / step - 1e-9).clip(min=0).astype(int)
    lengths = (request.t - begins) / counts.clip(min=1)
    times = np.concatenate([b + h * np.arange(c) for b, h, c in zip(begins, lengths, counts, strict=True)] or [[]])
    alpha, beta, variance = (rate(times) for rate in (sde.alpha, sde.beta, sde.noise.variance))
    own_part, other_part = (request.tensor(m) for m in sde.drift_matrices)
    k, p = sde.means.shape
    n = 1 if sde.acts_on == "own" else request.n
    spread = torch.block_diag(*request.tensor(sde.noise.root)) / n**0.5

    def run(x: Tensor, at: int) -> Tensor:
        first = int(counts[:at].sum())
        for j in range(first, first + int(counts[at])):
            if velocity is None:
                move = x @ (alpha[j] * own_part + beta[j] * other_part).T
            else:
                move = _velocity_at(velocity, float(times[j]), x.view(-1, k, p)).flatten(1)
            x = x + lengths[at] * move
            if variance[j] > 0:
                x = x + request.normal(x.shape[0], k * p) @ spread.T * float(np.sqrt(lengths[at] * variance[j]))
        return x

    for which in _chunks(sde, request):
        paths = which.stop - which.start
        if sde.acts_on == "own":
            yield from _own(sde, request, which, lambda at, x: run(x, at), None)
            continue
        x, clouds, begin = _start(sde, request, paths, request.n), _Clouds(sde, request, paths), 0
        for at, count in enumerate(counts.tolist()):
            x = run(x, at)
            clouds.grow(float(variance[begin : begin + count].sum() * lengths[at]))
            begin += count
            yield which, at, x.view(paths, k, p), clouds.look()


# --- the authors' recursion --------------------------------------------------------------------------------------


def published_responses(sde: Equation, t: Times) -> Float[np.ndarray, "times functions"]:
    """The f_a of the authors' forward Euler recursion with h = 1: cumulative products and sums, no loop."""
    k = sde.n_classes
    if sde.drift.name != "logits" or sde.modes is None:
        raise InputError(
            expected="the logits drift and classes drawn alike",
            got=f"{sde.drift.name} drift, weights {sde.weights}",
            do='the authors\' simulation knows no other; use method="euler-maruyama"',
        )
    if not np.array_equal(t, sde.start + np.arange(t.size)):
        raise InputError(
            expected=f"every step from {sde.start:g} on, t = start + arange(T)",
            got="other times",
            do="ask for every step",
        )
    a, b = sde.alpha(t), sde.beta(t)
    own, cross, second = (a - b) / k, b / k, (a + b / (k - 1)) / k
    f = np.zeros((t.size, 4))
    f[:, 0] = 1
    first_mode, second_mode = np.cumprod(1 + own[1:]), np.cumprod(1 + second[1:])
    before = np.concatenate([[1.0], second_mode[:-1]])[: t.size - 1]
    f[1:, 1] = np.cumsum(own[1:] * np.concatenate([[1.0], first_mode[:-1]])[: t.size - 1])
    f[1:, 2], f[1:, 3] = np.cumsum(own[1:] * before), np.cumsum(cross[1:] * before)
    return f


def _published_basis(sde: Equation, starts: np.ndarray) -> np.ndarray:
    assert sde.modes is not None
    _, common, _, along_own, along_all = sde.modes.apply
    assert common is not None
    assert along_own is not None
    assert along_all is not None
    return np.stack([starts, common(starts), along_own(starts), along_all(starts)], axis=-3)


def published(sde: Equation, request: _Request, starts: Any, out: Any) -> Tensor | Any:
    """Forward Euler with h = 1 and alpha(m) in the step into m, no noise but that of the starts."""
    if request.keep != "means":
        raise InputError(expected='keep="means"', got=repr(request.keep), do="the authors simulate class means only")
    k, p = sde.means.shape
    f = published_responses(sde, request.t)
    if starts is None:
        begin = _start(sde, request, request.paths, 1).view(-1, k, p).double().cpu().numpy()
    else:
        begin = to_numpy(starts, "starts").astype(np.float64)
        if begin.shape != (request.paths, k, p):
            raise InputError(
                expected=f"starts of shape {(request.paths, k, p)}", got=f"{begin.shape}", do="one start a path"
            )
    basis = request.tensor(_published_basis(sde, begin).reshape(request.paths, 4, k * p))
    shape = (request.paths, request.t.size, k, p)
    if out is None:
        result = torch.empty(shape, dtype=request.dtype, device=request.device)
    else:
        result = torch.from_numpy(out) if isinstance(out, np.ndarray) else out
        if tuple(result.shape) != shape or result.dtype != request.dtype or not result.is_contiguous():
            raise InputError(
                expected=f"out: contiguous, shape {shape}, {request.dtype}",
                got=f"{tuple(result.shape)}, {result.dtype}",
                do="allocate it so",
            )
    coefficients, rows = request.tensor(f), result.view(request.paths, request.t.size, k * p)
    if result.device.type == "cpu":  # one product a path writes each result once; batched products are slower here
        left, right, into = coefficients.numpy(), basis.numpy(), rows.numpy()
        for path in range(request.paths):
            np.matmul(left, right[path], out=into[path])
    else:
        torch.bmm(coefficients.expand(request.paths, -1, -1), basis, out=rows)
    return result if out is None else out


def published_moments(sde: Equation, t: Any) -> tuple[Array, Array]:
    """Mean and standard deviation, (T, K, K), of the authors' recursion over its random starts, without any trial."""
    times, like = _increasing(sde, t)
    f = published_responses(sde, times)
    k, p = sde.means.shape
    mean = np.tensordot(f, _published_basis(sde, sde.means), 1)
    # one unit response for each independent direction of the start
    directions = np.zeros((k * p, k, p))
    for c, r in enumerate(root(sde.initial_covariance)):
        directions[c * p : (c + 1) * p, c] = r.T
    units = _published_basis(sde, directions).reshape(k * p, 4, k * p)
    quadratic = np.einsum("dax,dbx->abx", units, units)
    variance = np.einsum("ta,tb,abx->tx", f, f, quadratic, optimize=True)
    return like(mean), like(np.sqrt(variance.clip(min=0)).reshape(times.size, k, p))
