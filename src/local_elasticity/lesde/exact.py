"""The exact law of the LE-SDE: class means, covariances, transitions.

With modes (drift.py) everything is a chain of integrals along time, evaluated on panels (panels.py) in a scale that
cannot overflow: means X(t) = sum_a f_a(t) D_a X(0), and covariances C(t) = sum_ab m_ab(t) D_a S D_b^T with the second
moments m_ab of the f_a driven by one white noise. Other drifts integrate m' = M m and C' = M C + C M^T + Sigma.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from local_elasticity.base.errors import InputError
from local_elasticity.lesde.panels import Panels, cut, scan
from local_elasticity.lesde.rates import Rate

if TYPE_CHECKING:
    from local_elasticity.lesde.equation import Equation

Times = Float[np.ndarray, " times"]
_RTOL, _ATOL = 1e-11, 1e-13  # of the integrator for drifts without closed form
_LONGEST = 50.0  # bound on the growth exponent of one stretch of the integrator


@dataclass(frozen=True)
class Scaled:
    """Numbers with a common exponent a time: the truth is values · exp(log_scale)."""

    values: np.ndarray
    log_scale: Times

    def plain(self, what: str) -> np.ndarray:
        """The numbers themselves.

        Raises:
            InputError: when they exceed float64.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            factor = np.exp(self.log_scale).reshape(-1, *[1] * (self.values.ndim - 1))
            result = np.where(self.values == 0, 0.0, self.values * factor)
        if not np.isfinite(result).all():
            raise InputError(
                expected=f"{what} within float64",
                got=f"numbers of the order of e^{self.log_scale.max():.0f}",
                do="ask for log=True, or for earlier times",
            )
        return result

    def logarithmic(self) -> tuple[np.ndarray, np.ndarray]:
        """Sign and logarithm of the magnitude."""
        with np.errstate(divide="ignore"):
            log = np.log(np.abs(self.values)) + self.log_scale.reshape(-1, *[1] * (self.values.ndim - 1))
        return np.sign(self.values), log


# --- means ---------------------------------------------------------------------------------------------------------


def mean(sde: Equation, t: Times) -> Scaled:
    """Class means (T, K, p) at any times."""
    modes = sde.modes
    if modes is None:
        return _integrated_mean(sde, t)
    panels = _panels(sde, t)
    f, log_scale = _responses(sde, panels)
    values = np.zeros((t.size, *sde.means.shape))
    for a, apply in enumerate(modes.apply):
        if apply is not None:
            values += f[a, panels.at, None, None] * apply(sde.means)
    return Scaled(values, log_scale[panels.at])


def _panels(sde: Equation, t: Times) -> Panels:
    modes = sde.modes
    exponents = [] if modes is None else [*modes.exponents, *(rate for _, rate in modes.driven)]
    weights = np.array([[a, b, 0.0] for a, b in exponents]).reshape(-1, 3)
    return cut((sde.alpha, sde.beta, sde.noise.variance), weights, sde.start, t)


def exponents(sde: Equation, t: Times) -> Float[np.ndarray, "exponents times"]:
    """Integral of each mode's rate from the start to ``t``."""
    panels = _panels(sde, t)
    return panels.cumulative(_mode_rates(sde, panels))[:, panels.at]


def integral(sde: Equation, t: Times) -> Float[np.ndarray, "3 times"]:
    """Integrals of alpha, beta and the noise's variance from the start to ``t``: A, B and the spent noise."""
    panels = _panels(sde, t)
    return panels.cumulative(panels.rates)[:, panels.at]


def gap_integral(sde: Equation, t: Times) -> Times:
    """Integral of the smallest eigenvalue of E, min(alpha - beta, alpha + (K-1) beta)."""
    k = sde.n_classes

    def lowest(time: np.ndarray) -> np.ndarray:
        a, b = sde.alpha(time), sde.beta(time)
        return np.minimum(a - b, a + (k - 1) * b)

    knots = np.union1d(sde.alpha.knots, sde.beta.knots)
    begin, end = max(sde.alpha.begin, sde.beta.begin), min(sde.alpha.end, sde.beta.end)
    rate = Rate("lambda_min", lowest, knots, begin, end)
    panels = cut((rate,), np.zeros((1, 1)), sde.start, t)
    return panels.cumulative(panels.rates[0])[panels.at]


def _mode_rates(sde: Equation, panels: Panels) -> Float[np.ndarray, "exponents panels nodes"]:
    assert sde.modes is not None
    return np.tensordot(np.array(sde.modes.exponents), panels.rates[:2], 1)


def _driving_rates(sde: Equation, panels: Panels) -> Float[np.ndarray, "driven panels nodes"]:
    assert sde.modes is not None
    weights = np.array([rate for _, rate in sde.modes.driven]).reshape(-1, 2)
    return np.tensordot(weights, panels.rates[:2], 1)


@dataclass(frozen=True)
class _Chain:
    """What every chain of integrals needs on its panels, relative to a running scale that never falls."""

    rates: np.ndarray  # (E, P, m) of the exponentials
    within: np.ndarray  # (E, P, m) exponent from each panel's beginning to its nodes
    rise: np.ndarray  # (E, P) over each panel
    total: np.ndarray  # (E, P + 1) from the start
    scale: np.ndarray  # (P + 1,) the running maximum of the exponents and 0
    drive: np.ndarray  # (D, P, m)


def _chain(sde: Equation, panels: Panels, scaled: bool = True) -> _Chain:
    rates = _mode_rates(sde, panels)
    rise = panels.whole(rates)
    total = np.concatenate([np.zeros((len(rates), 1)), np.cumsum(rise, axis=1)], axis=1)
    scale = np.maximum.accumulate(np.maximum(total.max(axis=0), 0.0)) if scaled else np.zeros(total.shape[1])
    return _Chain(rates, panels.partial(rates), rise, total, scale, _driving_rates(sde, panels))


def _responses(sde: Equation, panels: Panels) -> tuple[Float[np.ndarray, "functions edges"], Times]:
    """Every f_a at every edge, over exp(scale)."""
    assert sde.modes is not None
    c = _chain(sde, panels)
    exponentials = np.exp(c.total - c.scale)
    if not sde.modes.driven:
        return exponentials, c.scale
    source = [at for at, _ in sde.modes.driven]
    step = np.diff(c.scale)
    inside = np.exp((c.total[source, :-1] - c.scale[:-1])[..., None] + c.within[source])
    increment = panels.whole(c.drive * inside) * np.exp(-step)
    _, end = scan(np.broadcast_to(-step, increment.shape), increment, np.zeros(len(source)))
    driven = np.concatenate([np.zeros((len(source), 1)), end], axis=1)
    return np.concatenate([exponentials, driven]), c.scale


# --- second moments ------------------------------------------------------------------------------------------------


def covariance(sde: Equation, t: Times, n: int) -> Scaled:
    """Covariance (T, K p, K p) of the means of n samples a class."""
    if sde.modes is None:
        return _integrated_covariance(sde, t, n)
    panels = _panels(sde, t)
    f, _ = _responses(sde, panels)
    moments, log_scale = _moments(sde, panels)
    first, at = f[:, panels.at], panels.at
    dense = operators(sde)
    size = sde.means.size
    values = np.zeros((t.size, size, size))
    for a, b in itertools.product(dense, repeat=2):
        begun = dense[a] @ _block_product(sde.initial_covariance, dense[b].T)
        spread = dense[a] @ _block_product(sde.noise.shape, dense[b].T)
        values += (first[a] * first[b])[:, None, None] * begun + moments[a, b, at][:, None, None] * spread
    values = (values + values.transpose(0, 2, 1)) / (2 * n)
    return Scaled(values, 2 * log_scale[at])


def _block_product(blocks: Float[np.ndarray, "k p p"], matrix: Float[np.ndarray, "kp m"]) -> np.ndarray:
    k, p, _ = blocks.shape
    return (blocks @ matrix.reshape(k, p, -1)).reshape(matrix.shape)


def operators(sde: Equation) -> dict[int, Float[np.ndarray, "kp kp"]]:
    """The matrices D_a of the closed form that are not 0."""
    assert sde.modes is not None
    k, p = sde.means.shape
    basis = np.eye(k * p).reshape(k * p, k, p)
    applied = {a: apply(basis) for a, apply in enumerate(sde.modes.apply) if apply is not None}
    return {a: moved.reshape(k * p, k * p).T for a, moved in applied.items()}


def _moments(
    sde: Equation, panels: Panels, resets: np.ndarray | None = None, scaled: bool = True
) -> tuple[Float[np.ndarray, "functions functions edges"], Times]:
    """Second moments of the f_a driven by one white noise of the noise's variance, over exp(2 scale), at the edges.

    They follow m_ab' = (r_a + r_b) m_ab + c_a m_{j(a) b} + c_b m_{a j(b)} + q for exponentials with rates r, and
    integrals driven by exponential j at rate c; q only where both are exponentials. With ``resets`` the noise
    begins anew before those panels, and what is returned at an edge is the moment at the end of the panel before it.
    """
    assert sde.modes is not None
    c = _chain(sde, panels, scaled)
    n_exp, n_all = len(sde.modes.exponents), len(sde.modes.exponents) + len(sde.modes.driven)
    source = {n_exp + at: j for at, (j, _) in enumerate(sde.modes.driven)}
    step, reference = np.diff(c.scale), np.exp(-2 * c.scale[:-1])
    shape = c.within.shape[1:]
    at_nodes: dict[tuple[int, int], np.ndarray] = {}
    out = np.zeros((n_all, n_all, panels.edges.size))

    def run(pairs: list[tuple[int, int]], gain: np.ndarray, nodes: bool) -> None:
        """Solve one stage: ``gain`` (pairs, P, m) is what feeds each pair, over exp(2 scale at the panel's begin)."""
        own = np.stack([_pair(c.within, pair, n_exp, shape) for pair in pairs])
        rise = np.stack([_pair(c.rise, pair, n_exp, shape[:1]) for pair in pairs])
        faded = gain * np.exp(-own)
        increment = panels.whole(faded) * np.exp(rise - 2 * step)
        begin, end = scan(rise - 2 * step, increment, np.zeros(len(pairs)), resets)
        inside = np.exp(own) * (begin[..., None] + panels.partial(faded)) if nodes else None
        for at, (a, b) in enumerate(pairs):
            out[a, b, 1:] = out[b, a, 1:] = end[at]
            if inside is not None:
                at_nodes[a, b] = at_nodes[b, a] = inside[at]

    exponentials = list(itertools.combinations_with_replacement(range(n_exp), 2))
    noise = panels.rates[2] * reference[:, None]
    run(exponentials, np.broadcast_to(noise, (len(exponentials), *shape)), bool(source))
    if source:
        mixed = list(itertools.product(range(n_exp), source))
        run(mixed, np.stack([c.drive[d - n_exp] * at_nodes[e, source[d]] for e, d in mixed]), True)
        both = list(itertools.combinations_with_replacement(source, 2))
        run(
            both,
            np.stack(
                [
                    c.drive[a - n_exp] * at_nodes[source[a], b] + c.drive[b - n_exp] * at_nodes[a, source[b]]
                    for a, b in both
                ]
            ),
            False,
        )
    return out, c.scale


def _pair(values: np.ndarray, pair: tuple[int, int], n_exp: int, shape: tuple[int, ...]) -> np.ndarray:
    return sum((values[at] for at in pair if at < n_exp), np.zeros(shape))


def spent_noise(sde: Equation, t: Times) -> Times:
    """Integral of the noise's variance from the start to ``t``."""
    panels = cut((sde.noise.variance,), np.zeros((1, 1)), sde.start, t)
    return panels.cumulative(panels.rates[0])[panels.at]


# --- drifts without closed form ------------------------------------------------------------------------------------


def matrix(sde: Equation, t: float) -> Float[np.ndarray, "kp kp"]:
    """M(t), whose block (k, l) is pi_l E_kl(t) H[k, l]."""
    own, other = sde.drift_matrices
    return sde.alpha(np.array(t)) * own + sde.beta(np.array(t)) * other


def _stretches(sde: Equation, t: Times) -> Iterator[tuple[float, float, bool]]:
    """From time to time, cut where a solution could grow beyond e^50; True where a time asked for is reached."""
    ends = np.unique(t[t > sde.start])
    panels = cut((sde.alpha, sde.beta), np.zeros((1, 2)), sde.start, ends)
    own, other = (np.linalg.norm(m, 2) for m in sde.drift_matrices)
    growth = panels.cumulative(own * np.abs(panels.rates[0]) + other * np.abs(panels.rates[1]))
    asked = np.zeros(panels.edges.size, dtype=bool)
    asked[panels.at] = True
    begin, level = 0, 0.0
    for edge in range(1, panels.edges.size):
        following = growth[min(edge + 1, panels.edges.size - 1)]
        if asked[edge] or following - level > _LONGEST:
            yield panels.edges[begin], panels.edges[edge], bool(asked[edge])
            begin, level = edge, growth[edge]


def _solve(sde: Equation, derivative, begin: float, end: float, state: np.ndarray) -> np.ndarray:
    moved = np.abs(derivative(begin, state)).max(initial=0.0) * (end - begin)
    scale = max(float(np.abs(state).max(initial=0.0)), float(moved)) or 1.0
    from scipy.integrate import solve_ivp

    solved = solve_ivp(derivative, (begin, end), state, method="DOP853", rtol=_RTOL, atol=_ATOL * scale)
    if not solved.success:
        raise InputError(
            expected="moment equations that can be integrated", got=solved.message, do="smooth alpha and beta"
        )
    return solved.y[:, -1]


def _integrated_mean(sde: Equation, t: Times) -> Scaled:
    def derivative(time: float, state: np.ndarray) -> np.ndarray:
        return matrix(sde, time) @ state

    state, level = sde.means.ravel(), 0.0
    found = {sde.start: (state, level)}
    for begin, end, _ in _stretches(sde, t):
        state = _solve(sde, derivative, begin, end, state)
        size = float(np.abs(state).max())
        if size > 0:
            state, level = state / size, level + np.log(size)
        found[end] = (state, level)
    pairs = [found[time] for time in t.tolist()]
    values = np.array([state for state, _ in pairs]).reshape(t.size, *sde.means.shape)
    return Scaled(values, np.array([level for _, level in pairs]))


def _integrated_covariance(sde: Equation, t: Times, n: int) -> Scaled:
    k, p = sde.means.shape
    size = k * p
    spread = _dense(sde.noise.shape)

    def derivative(time: float, state: np.ndarray, level: float) -> np.ndarray:
        moved = matrix(sde, time) @ state.reshape(size, size)
        return (moved + moved.T + sde.noise.variance(np.array(time)) * np.exp(-level) * spread).ravel()

    state, level = _dense(sde.initial_covariance).ravel(), 0.0
    found = {sde.start: (state, level)}
    for begin, end, _ in _stretches(sde, t):
        state = _solve(sde, lambda time, x, at=level: derivative(time, x, at), begin, end, state)
        largest = float(np.abs(state).max())
        if largest > 1:
            state, level = state / largest, level + np.log(largest)
        found[end] = (state, level)
    pairs = [found[time] for time in t.tolist()]
    values = np.array([state for state, _ in pairs]).reshape(t.size, size, size)
    return Scaled((values + values.transpose(0, 2, 1)) / (2 * n), np.array([level for _, level in pairs]))


def _dense(blocks: Float[np.ndarray, "k p p"]) -> Float[np.ndarray, "kp kp"]:
    k, p, _ = blocks.shape
    dense = np.zeros((k, p, k, p))
    dense[np.arange(k), :, np.arange(k), :] = blocks
    return dense.reshape(k * p, k * p)


# --- transitions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transitions:
    """From one save point to the next: X ← carry X + noise with covariance ``spread`` (for one sample a class).

    Attributes:
        carry: (T, K p, K p), the first from the start.
        spread: (T, K p, K p).
        noise: (T,) integral of the noise's variance over each stretch.
    """

    carry: Float[np.ndarray, "times kp kp"]
    spread: Float[np.ndarray, "times kp kp"]
    noise: Times


def transitions(sde: Equation, t: Times) -> Transitions:
    """Transitions between increasing times.

    Raises:
        InputError: when a transition exceeds float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = _integrated_transitions(sde, t) if sde.modes is None else _closed_transitions(sde, t)
    if not (np.isfinite(found.carry).all() and np.isfinite(found.spread).all()):
        raise InputError(
            expected="paths within float64",
            got="growth beyond e^700 between two save points",
            do="ask for earlier times, or for mean(t, log=True)",
        )
    return found


def _closed_transitions(sde: Equation, t: Times) -> Transitions:
    assert sde.modes is not None
    panels = _panels(sde, t)
    size = sde.means.size
    if panels.edges.size == 1:  # only the start is asked for
        return Transitions(np.eye(size)[None], np.zeros((1, size, size)), np.zeros(1))
    spent = panels.cumulative(panels.rates[2])
    begins = np.append(0, panels.at[:-1])
    noise = spent[panels.at] - spent[begins]
    first = np.unique(begins[begins < panels.edges.size - 1])
    c = _chain(sde, panels, scaled=False)
    f = [np.exp(c.total[:, panels.at] - c.total[:, begins])]
    if sde.modes.driven:
        source = [at for at, _ in sde.modes.driven]
        origin = np.repeat(first, np.diff(np.append(first, panels.edges.size - 1)))
        inside = np.exp((c.total[source, :-1] - c.total[source][:, origin])[..., None] + c.within[source])
        integrals = panels.whole(c.drive * inside)
        _, end = scan(np.zeros_like(integrals), integrals, np.zeros(len(source)), first)
        f.append(np.where(panels.at > begins, end[:, panels.at - 1], 0.0))
    responses = np.concatenate(f)
    moments = np.where(panels.at > begins, _moments(sde, panels, first, scaled=False)[0][:, :, panels.at], 0.0)
    dense = operators(sde)
    used = list(dense)
    carry = np.tensordot(responses[used], np.stack([dense[a] for a in used]), (0, 0))
    pairs = list(itertools.product(used, repeat=2))
    products = np.stack([dense[a] @ _block_product(sde.noise.shape, dense[b].T) for a, b in pairs])
    spread = np.tensordot(np.stack([moments[a, b] for a, b in pairs]), products, (0, 0)).reshape(-1, size, size)
    return Transitions(carry, (spread + spread.transpose(0, 2, 1)) / 2, noise)


def _integrated_transitions(sde: Equation, t: Times) -> Transitions:
    size = sde.means.size
    spread = _dense(sde.noise.shape)

    def derivative(time: float, state: np.ndarray) -> np.ndarray:
        carry, moment = state.reshape(2, size, size)
        m = matrix(sde, time)
        moved = m @ moment
        return np.stack([m @ carry, moved + moved.T + sde.noise.variance(np.array(time)) * spread]).ravel()

    carries, spreads = [], []
    begins = np.append(sde.start, t[:-1])
    for begin, end in zip(begins, t, strict=True):
        state = np.stack([np.eye(size), np.zeros((size, size))]).ravel()
        state = _solve(sde, derivative, begin, end, state) if end > begin else state
        carry, moment = state.reshape(2, size, size)
        carries.append(carry)
        spreads.append((moment + moment.T) / 2)
    spent = spent_noise(sde, np.append(sde.start, t))
    return Transitions(np.array(carries), np.array(spreads), np.diff(spent))
