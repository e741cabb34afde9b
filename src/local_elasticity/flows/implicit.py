"""The solution a(t) >= 0 of da/dtau = -a^{d-1} (a^d - u), d >= 2: each coordinate of the diagonal flow (spec srel 2.4).

With y = a^d / |u|, sigma = |u|^{2-2/d} tau and m = 1 - 2/d, the integral int dy / (y^{2-2/d} (1 -+ y)) becomes
smooth in a logarithmic coordinate q that never stops moving, which keeps it exact near y = 1 and for large times:

    0 < y < 1, u > 0:  q = log(y / (1 - y)),   d sigma = int (1 + e^{-q})^m dq
        y > 1, u > 0:  q = -log(1 - 1/y),      d sigma = int (1 - e^{-q})^m dq
               u < 0:  q = log(1 + 1/y),       d sigma = int (e^q - 1)^m dq
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from local_elasticity.flows.base import Array

SERIES = np.arange(1, 61)  # e^{-60} is below the rounding of 1
BISECTIONS = 200
NEGLIGIBLE = 1e-14


def magnitude(depth: int, tau: Array, target: Array, start: Array) -> Array:
    """A at scaled times tau = d s^2 t, from start >= 0 towards target; all broadcast."""
    tau, target, start = np.broadcast_arrays(tau, target, start)
    if depth == 2:
        return _closed(tau, target, start)
    out = start.astype(np.float64).copy()
    moving = (start > 0) & (tau > 0)
    power = start**depth
    # A target that is nothing beside a^d even at the end acts as 0; its scaled time would underflow.
    target = np.where(np.abs(target) < NEGLIGIBLE * _to_zero(depth, tau, target, start) ** depth, 0.0, target)
    for here, solve in (
        (moving & (target == 0), _to_zero),
        (moving & (target > 0) & (power < target), _rising),
        (moving & (target > 0) & (power > target), _falling),
        (moving & (target < 0), _fading),
    ):
        if here.any():
            out[here] = solve(depth, tau[here], np.abs(target[here]), start[here])
    return out


def _closed(tau: Array, u: Array, start: Array) -> Array:
    """D = 2: v = v0 / (e^{-a} + v0 (1 - e^{-a}) / u) with a = 2 u tau, arranged so that no exponential overflows."""
    from scipy.special import exprel

    v0, a = start**2, 2 * u * tau
    shrink = np.exp(-np.abs(a))
    reach = 2 * v0 * tau * exprel(-np.abs(a))  # v0 (1 - e^{-|a|}) / |u|, also for u = 0
    return np.sqrt(np.where(u >= 0, v0 / np.maximum(shrink + reach, np.finfo(float).tiny), v0 * shrink / (1 + reach)))


def _to_zero(depth: int, tau: Array, u: Array, start: Array) -> Array:
    power = 2 * depth - 2
    return start * (1 + power * tau * start**power) ** (-1 / power)


def _rising(depth: int, tau: Array, u: Array, start: Array) -> Array:
    m, y0 = 1 - 2 / depth, start**depth / u
    q0, span = np.log(y0) - np.log1p(-y0), depth * u ** (2 - 2 / depth) * tau
    q = _solve(lambda q: _rising_integral(m, q), q0, span, q0 + span)
    return (u * _expit(q)) ** (1 / depth)


def _falling(depth: int, tau: Array, u: Array, start: Array) -> Array:
    m, y0 = 1 - 2 / depth, start**depth / u
    q0, span = -np.log1p(-1 / y0), depth * u ** (2 - 2 / depth) * tau
    q = _solve(lambda q: _falling_integral(m, q), q0, span, q0 + span / (-np.expm1(-q0)) ** m)
    return (u / -np.expm1(-q)) ** (1 / depth)


def _fading(depth: int, tau: Array, u: Array, start: Array) -> Array:
    m, y0 = 1 - 2 / depth, start**depth / u
    q0, span = np.log1p(1 / y0), depth * u ** (2 - 2 / depth) * tau
    # (e^s - 1)^m is at least its value at q0, and at least (1 - e^{-q0})^m e^{ms}
    gentle = q0 + span / np.expm1(q0) ** m
    steep = q0 + np.log1p(m * span * (-np.expm1(-q0)) ** -m * np.exp(-m * q0)) / m
    q = _solve(lambda q: _fading_integral(m, q), q0, span, np.minimum(gentle, steep))
    return (u / np.expm1(q)) ** (1 / depth)


def _solve(integral: Callable[[Array], Array], low: Array, span: Array, high: Array) -> Array:
    """Q in [low, high] at which an increasing integral is ``span`` above its value at ``low``: bisection."""
    goal, low, high = integral(low) + span, low.copy(), high.copy()
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        if ((middle <= low) | (middle >= high)).all():
            break
        above = integral(middle) > goal
        high, low = np.where(above, middle, high), np.where(above, low, middle)
    return 0.5 * (low + high)


def _rising_integral(m: float, q: Array) -> Array:
    """An antiderivative of (1 + e^{-q})^m: -(e^{-mq}/m) 2F1(-m, -m; 1-m; -e^q), by Pfaff's transformation below 1."""
    from scipy.special import hyp2f1

    def below(q: Array) -> Array:
        return -((1 + np.exp(-q)) ** m) / m * hyp2f1(-m, 1.0, 1 - m, _expit(q))

    return _joined(below, lambda q: q - _tail(m, q, 1.0), q)


def _falling_integral(m: float, q: Array) -> Array:
    """An antiderivative of (1 - e^{-q})^m: with z = 1 - e^{-q}, z^{1+m}/(1+m) 2F1(1, 1+m; 2+m; z)."""
    from scipy.special import hyp2f1

    def below(q: Array) -> Array:
        z = -np.expm1(-q)
        return z ** (1 + m) / (1 + m) * hyp2f1(1.0, 1 + m, 2 + m, z)

    return _joined(below, lambda q: q - _tail(m, q, -1.0), q)


def _fading_integral(m: float, q: Array) -> Array:
    """An antiderivative of (e^q - 1)^m: with z = e^q - 1, z^{1+m}/(1+m) 2F1(1, 1+m; 2+m; -z)."""
    from scipy.special import hyp2f1

    z = np.expm1(q)
    return z ** (1 + m) / (1 + m) * hyp2f1(1.0, 1 + m, 2 + m, -z)


def _tail(m: float, q: Array, sign: float) -> Array:
    """int_q^inf [(1 + sign e^{-s})^m - 1] ds = sum_k C(m, k) sign^k e^{-kq} / k, for q >= 1."""
    from scipy.special import binom

    coefficients = binom(m, SERIES) * sign**SERIES / SERIES
    return np.polynomial.polynomial.polyval(np.exp(-q), np.concatenate([[0.0], coefficients]))


def _joined(below: Callable[[Array], Array], above: Callable[[Array], Array], q: Array) -> Array:
    """One antiderivative from two that differ by a constant: ``below`` up to q = 1, ``above`` from there."""
    one = np.ones(1)
    offset = below(one) - above(one)
    out = np.empty_like(q)
    low = q <= 1
    out[low], out[~low] = below(q[low]), above(q[~low]) + offset
    return out


def _expit(q: Array) -> Array:
    from scipy.special import expit

    return expit(q)
