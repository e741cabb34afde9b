"""Two-layer nets f(x) = a.s(W x + b) + c: tangent kernel K, and S_rel = |K(x, x')| / K(x, x) (spec srel 2.7)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from local_elasticity.base.checks import check_choice
from local_elasticity.base.errors import InputError
from local_elasticity.flows.base import Array, Flow, Movements, checked_array, checked_times, integrate

Activation = Literal["relu", "linear"]


class TwoLayerNTK(Flow):
    """The neural tangent kernel of a two-layer net, at its weights or along its gradient flow.

    With h = W x (+ bias), s the activation, without biases

        linear:  K(x, x') = x^T (W^T W + |a|^2 I) x'
        ReLU:    K(x, x') = s(h).s(h') + x.x' sum_j a_j^2 1[h_j > 0] 1[h'_j > 0]

    and with biases in both layers 1 is added to each inner product. S_rel = |K(x, x')| / K(x, x) in the limit of small
    steps, whatever the loss of the scalar output. The weights of the linear net along the flow of
    L = 1/(2n) sum (f(x_i) - y_i)^2 have no closed form: they are integrated to 1e-9 if X and y are given, and stay as
    they are if not. A ReLU net takes no X and y: on finitely many samples its flow can slide along a kink, where an
    ordinary differential equation has no solution; train it, and measure.
    Source: spec srel 2.7; our derivation.

    Args:
        hidden: (..., m, p) W.
        output: (..., m) a.
        bias: (..., m) the hidden biases; None for a net without biases.
        output_bias: (...) c; 0 by default, used with ``bias`` only.
        activation: "relu" or "linear".
        X: (n, p) training inputs of a linear net; none for one moment.
        y: (n,) their labels.
    """

    def __init__(
        self,
        hidden: Any,
        output: Any,
        bias: Any = None,
        output_bias: Any = 0.0,
        activation: Activation = "relu",
        X: Any = None,
        y: Any = None,
    ) -> None:
        self.activation: Activation = check_choice("activation", activation, Activation)
        w = checked_array("hidden", hidden)
        if w.ndim < 2:
            raise InputError(expected="hidden of shape (..., m, p)", got=f"shape {w.shape}", do="pass the matrix W")
        self.width, self.dim = w.shape[-2:]
        self.biased = bias is not None
        a = checked_array("output", output, self.width)
        b = checked_array("bias", bias if self.biased else np.zeros(self.width), self.width)
        c = checked_array("output_bias", output_bias)
        starts = np.broadcast_shapes(w.shape[:-2], a.shape[:-1], b.shape[:-1], c.shape)
        w = np.broadcast_to(w, (*starts, self.width, self.dim)).reshape(*starts, -1)
        a, b = (np.broadcast_to(v, (*starts, self.width)) for v in (a, b))
        self.start = np.concatenate([w, a, b, np.broadcast_to(c, starts)[..., None]], axis=-1)
        if (X is None) != (y is None):
            raise InputError(expected="X and y, or neither", got="one of them", do="pass both to train the net")
        if X is not None and activation != "linear":
            raise InputError(
                expected="activation 'linear' where X and y are given",
                got=repr(activation),
                do="train the ReLU net with torch and use le.measure; its flow has kinks that no integrator passes",
            )
        self.inputs = None if X is None else checked_array("X", X, self.dim, ndim=2)
        self.labels = None if y is None else checked_array("y", y, ndim=1)
        if self.inputs is not None and self.labels is not None and len(self.inputs) != len(self.labels):
            raise InputError(
                expected=f"{len(self.inputs)} labels", got=f"{len(self.labels)}", do="one for each row of X"
            )

    def parts(self, weights: Array) -> tuple[Array, Array, Array, Array]:
        """W (..., m, p), a (..., m), b (..., m) and c (...) of the weights in a row."""
        m, p = self.width, self.dim
        w, a, b, c = np.split(weights, np.cumsum([m * p, m, m]), axis=-1)
        return w.reshape(*w.shape[:-1], m, p), a, b, c[..., 0]

    def weights(self, t: Any) -> Array:
        """W, a, b and c in a row at times t: (T, ..., m p + 2 m + 1); ``parts`` takes them apart."""
        times = checked_times(t)
        if self.inputs is None:
            return self._timed(t, np.broadcast_to(self.start, (len(times), *self.start.shape)).copy())
        return self._timed(
            t, integrate(lambda w: self._rate(w.reshape(self.start.shape)).reshape(-1), self.start, times)
        )

    def loss(self, t: Any) -> Array:
        """1/(2n) sum (f(x_i) - y_i)^2: (T, ...).

        Raises:
            InputError: when there are no training inputs.
        """
        if self.inputs is None:
            raise InputError(expected="training inputs and labels", got="none", do="pass X= and y= to have a loss")
        return 0.5 * ((self.predict(self.weights(t), self.inputs) - self.labels) ** 2).mean(-1)

    def predict(self, weights: Array, x: Array) -> Array:
        """F at x (n, p) for weights in a row: (..., n)."""
        w, a, b, c = self.parts(weights)
        hidden = w @ x.T + b[..., None]
        return (a[..., None] * self._active(hidden)).sum(-2) + c[..., None]

    def kernel(self, x: Any, x_prime: Any, t: Any = 0.0) -> Array:
        """K(x, x') at times t, pairs as in ``s_rel``."""
        times = checked_times(t)
        x, x_prime = (checked_array(name, v, self.dim) for name, v in (("x", x), ("x_prime", x_prime)))
        x, x_prime = np.broadcast_arrays(x, x_prime)
        values = self._kernel(self.weights(times), *(v.reshape(-1, self.dim) for v in (x, x_prime)))
        return self._timed(t, values.reshape(len(times), *self._starts, *x.shape[:-1]))

    def movements(self, t: np.ndarray, x: Array, x_prime: Array, label: Array | None, lr: float | None) -> Movements:
        """K(x, x') and K(x, x)."""
        if lr is not None:
            raise InputError(
                expected="lr=None: the kernel is the limit of small steps",
                got=repr(lr),
                do="measure the finite step with le.measure, engine 'replay'",
            )
        w = self.weights(t).reshape(len(t), -1, self.start.shape[-1])
        return Movements(self._kernel(w, x, x_prime), self._kernel(w, x, x))

    def _kernel(self, weights: Array, x: Array, x_prime: Array) -> Array:
        w, a, b, _ = self.parts(weights)
        h, h_prime = (w @ v.T + b[..., None] for v in (x, x_prime))  # (..., m, n)
        one = 1.0 if self.biased else 0.0
        inner = (x * x_prime).sum(-1) + one
        gains = ((a**2)[..., None] * self._slope(h) * self._slope(h_prime)).sum(-2)
        return (self._active(h) * self._active(h_prime)).sum(-2) + one + inner * gains

    def _rate(self, weights: Array) -> Array:
        """Minus the gradient of the training loss."""
        x, y = self.inputs, self.labels
        assert x is not None
        assert y is not None
        w, a, b, c = self.parts(weights)
        h = w @ x.T + b[..., None]
        active = self._active(h)
        pull = ((y - (a[..., None] * active).sum(-2) - c[..., None]) / len(x))[..., None, :]  # (..., 1, n)
        back = pull * a[..., None] * self._slope(h)  # (..., m, n)
        on_bias = float(self.biased)
        parts = [
            (back @ x).reshape(*weights.shape[:-1], -1),
            (active * pull).sum(-1),
            on_bias * back.sum(-1),
            on_bias * pull.sum(-1),
        ]
        return np.concatenate(parts, axis=-1)

    def _active(self, h: Array) -> Array:
        return np.maximum(h, 0.0) if self.activation == "relu" else h

    def _slope(self, h: Array) -> Array:
        return (h > 0).astype(np.float64) if self.activation == "relu" else np.ones_like(h)
