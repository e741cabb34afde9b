"""He and Su's similarities from the tangent kernel: kernelised, and the small-step limit of the relative one.

One SGD step on the loss at x moves a scalar output at x' by -lr K(x', x) dL/df(x) + O(lr²), so (spec srel 1.1, 1.2)

    S_rel(x, x') -> |K(x, x')| / K(x, x)            S_ker(x, x') = [f(x') - f+(x')] / (lr dL/df(x)) -> K(x, x').

Where the output is the probability p = sigmoid(f), K is the kernel of p: p(1 - p) p'(1 - p') times that of the logit f.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from local_elasticity.base.checks import check_choice, check_flag, in_words, is_whole
from local_elasticity.base.errors import InputError
from local_elasticity.impact.checks import check_output
from local_elasticity.impact.kernel import kernel, kernel_diagonal
from local_elasticity.impact.ripple import Ripple, ripple
from local_elasticity.impact.subject import Mode, preserved

Outputs = Literal["values", "logits", "probabilities"]
Loss = Literal["mse", "bce"]
Output = Literal["trace"] | int

# --- functions of a kernel alone -----------------------------------------------------------------------------------


def relative(
    kernel_values: Float[Tensor, "s t"],
    own: Float[Tensor, " s"] | None = None,
    slopes: Float[Tensor, " s"] | None = None,
    target_slopes: Float[Tensor, " t"] | None = None,
) -> Float[Tensor, "s t"]:
    """|K(x, x')| / K(x, x), the limit of S_rel for a small step; rows are the sources.

    Args:
        kernel_values: K(x, x') of a scalar output.
        own: K(x, x); the diagonal by default.
        slopes: for outputs that are a function of the kernel's own output, its derivative at each source: p(1 - p)
            where ``kernel_values`` is the kernel of logits.
        target_slopes: the same at the targets; ``slopes`` by default.

    Returns:
        The similarity; NaN in the row of a source that cannot move.
    """
    own = kernel_values.diagonal() if own is None else own
    similarity = kernel_values.abs() / own.masked_fill(own <= 0, math.nan)[:, None]
    if slopes is not None:
        at_targets = slopes if target_slopes is None else target_slopes
        similarity = similarity * (at_targets[None, :] / slopes.masked_fill(slopes == 0, math.nan)[:, None])
    return similarity


def normalised(
    similarity: Float[Tensor, "s t"],
    own: Float[Tensor, " s"] | None = None,
    target_own: Float[Tensor, " t"] | None = None,
) -> Float[Tensor, "s t"]:
    """S(x, x') / sqrt(S(x, x) S(x', x')): the cosine of two gradients where S is a kernel.

    Args:
        similarity: S(x, x').
        own: S(x, x); the diagonal by default.
        target_own: S(x', x'); ``own`` by default.

    Returns:
        The normalised similarity; NaN where a self similarity is not positive.
    """
    own = similarity.diagonal() if own is None else own
    target_own = own if target_own is None else target_own
    left, right = (x.masked_fill(x <= 0, math.nan).sqrt() for x in (own, target_own))
    return similarity / (left[:, None] * right[None, :])


def symmetrised(similarity: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """(S + S^T) / 2, as He and Su's code does before it clusters."""
    return 0.5 * (similarity + similarity.T)


def check_output_choice(output: object) -> None:
    """Refuse what is neither "trace" nor the number of an output.

    Raises:
        InputError: for anything else.
    """
    if output != "trace" and not (is_whole(output) and output >= 0):
        raise InputError(
            expected="output: 'trace', or the number of an output, from 0",
            got=in_words(output),
            do="leave it out for the trace, or write output=0 for the first",
        )


# --- of a model ----------------------------------------------------------------------------------------------------


def s_rel_limit(
    model: nn.Module,
    xs: Tensor,
    xt: Tensor | None = None,
    *,
    outputs: Outputs = "values",
    output: Output = "trace",
    chunk_size: int | None = None,
    max_memory: int | None = None,
    dtype: torch.dtype | None = None,
    mode: Mode = "eval",
    progress: bool = False,
) -> Float[Tensor, "s t"]:
    """The small-step limit of He and Su's relative similarity, |K(x, x')| / K(x, x).

    For one output the residual and the loss cancel, so no labels are needed; ``measure`` with a finite step converges
    to this. Of several outputs the trace of K takes K's place, or one output is chosen.

    Args:
        model: any module whose output is (batch, K) or (batch,).
        xs: inputs (n_s, ...), where the step is taken.
        xt: inputs (n_t, ...), where we look; ``xs`` by default.
        outputs: "values" or "probabilities": of what the model emits; "logits": of the sigmoid of its one logit.
        output: "trace", or the number of an output.
        chunk_size: as in ``kernel``.
        max_memory: as in ``kernel``.
        dtype: as in ``kernel``.
        mode: as in ``kernel``.
        progress: as in ``kernel``.

    Raises:
        InputError: as ``kernel``; for "logits" of a model with several outputs.

    Source: arXiv:1910.06943, equation 3; the limit is derived here (spec srel 1.1, 2.0, 6).
    """
    check_choice("outputs", outputs, Outputs)
    check_output_choice(output)
    values = kernel(
        model,
        xs,
        xt,
        form=output,
        chunk_size=chunk_size,
        max_memory=max_memory,
        dtype=dtype,
        mode=mode,
        progress=progress,
    )
    own = None if xt is None else kernel_diagonal(model, xs, form=output, mode=mode).to(values)
    if outputs != "logits":
        return relative(values, own)
    at_targets = None if xt is None else sigmoid_slope(_logits(model, xt, mode)).to(values)
    return relative(values, own, sigmoid_slope(_logits(model, xs, mode)).to(values), at_targets)


def s_ker(
    model: nn.Module,
    xs: Tensor,
    xt: Tensor | None = None,
    *,
    form: Literal["limit", "published"] = "limit",
    labels: Tensor | None = None,
    loss: Loss | None = None,
    outputs: Outputs = "values",
    output: Output = "trace",
    symmetrise: bool = False,
    normalise: bool = False,
    chunk_size: int | None = None,
    max_memory: int | None = None,
    dtype: torch.dtype | None = None,
    mode: Mode = "eval",
    progress: bool = False,
) -> Float[Tensor, "s t"]:
    """He and Su's kernelised similarity [f(x') - f+(x')] / (lr dL/df(x)).

    Args:
        model: any module whose output is (batch, K) or (batch,).
        xs: inputs (n_s, ...), where the step is taken.
        xt: inputs (n_t, ...), where we look; ``xs`` by default.
        form: "limit" for the limit of a small step, the tangent kernel <grad f(x), grad f(x')>, which needs neither
            labels nor loss. "published" for the finite step of the published code: the smallest visible one (see
            ``ripple``), and for "bce" the stray factor 1/2 that is in it.
        labels: (n_s,) for "published".
        loss: "mse" (squared error) or "bce" (the model emits a probability) for "published".
        outputs: as in ``s_rel_limit``; "published" needs what the code's models emit: values, or probabilities.
        output: as in ``s_rel_limit``.
        symmetrise: return (S + S^T) / 2.
        normalise: return S(x, x') / sqrt(S(x, x) S(x', x')).
        chunk_size: as in ``kernel``.
        max_memory: as in ``kernel``.
        dtype: as in ``kernel``; "published" is about the model's own dtype.
        mode: as in ``kernel``.
        progress: as in ``kernel``.

    Returns:
        The similarity; NaN in the row of a source that no rate moved ("published").

    Raises:
        InputError: as ``kernel``; when something is missing for the form.

    Source: arXiv:1910.06943, equation 4, and the published code (spec srel 1.2).
    """
    check_choice("outputs", outputs, Outputs)
    check_choice("form", form, ("limit", "published"))
    check_choice("loss", loss, Loss, or_none=True)
    check_flag("symmetrise", symmetrise)
    check_flag("normalise", normalise)
    check_output_choice(output)
    if symmetrise and xt is not None:
        raise InputError(expected="the same samples on both sides", got="symmetrise=True with xt", do="leave out xt")
    if form == "published":
        values = _published(model, xs, xt, labels, loss, outputs, dtype, mode, progress)
        own, target_own = None, None
        if normalise and xt is not None:
            raise InputError(
                expected="the same samples on both sides", got="normalise=True, form='published' and xt", do="drop xt"
            )
    else:
        values = kernel(
            model,
            xs,
            xt,
            form=output,
            chunk_size=chunk_size,
            max_memory=max_memory,
            dtype=dtype,
            mode=mode,
            progress=progress,
        )
        own = target_own = None
        if normalise and xt is not None:
            own, target_own = (kernel_diagonal(model, x, form=output, mode=mode).to(values) for x in (xs, xt))
        if outputs == "logits":
            slopes = sigmoid_slope(_logits(model, xs, mode)).to(values)
            at_targets = slopes if xt is None else sigmoid_slope(_logits(model, xt, mode)).to(values)
            values = values * slopes[:, None] * at_targets[None, :]
            if own is not None and target_own is not None:
                own, target_own = own * slopes**2, target_own * at_targets**2
    values = symmetrised(values) if symmetrise else values
    return normalised(values, own, target_own) if normalise else values


def s_ker_of(looked: Ripple, halved: bool = False) -> Float[Tensor, "s t"]:
    """The kernelised similarity of finite steps, [f(x') - f+(x')] / (lr dL/df(x)).

    Args:
        looked: what ``ripple`` returns, of a model with one output.
        halved: with the stray factor 1/2 that the published code has for the cross-entropy.

    Raises:
        InputError: for several outputs.
    """
    if looked.before.shape[1] != 1:
        raise InputError(
            expected="a model with one output", got=f"{looked.before.shape[1]} outputs", do="use form='limit'"
        )
    scale = (looked.lr * looked.slope[:, 0]).masked_fill(~looked.moved, math.nan)
    return -looked.change[:, :, 0] / scale[:, None] * (0.5 if halved else 1.0)


def sigmoid_slope(logits: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """p(1 - p) of p = sigmoid(logit), without cancellation where p is near 1."""
    return torch.sigmoid(logits) * torch.sigmoid(-logits)


def _published(
    model: nn.Module,
    xs: Tensor,
    xt: Tensor | None,
    labels: Tensor | None,
    loss: Loss | None,
    outputs: Outputs,
    dtype: torch.dtype | None,
    mode: Mode,
    progress: bool,
) -> Float[Tensor, "s t"]:
    if labels is None or loss is None:
        raise InputError(
            expected="labels= and loss= for form='published'", got="none", do="pass them, or use form='limit'"
        )
    if outputs == "logits" or dtype is not None:
        raise InputError(
            expected="the model as it is, emitting values or probabilities, for form='published'",
            got=f"outputs={outputs!r}, dtype={dtype}",
            do="append torch.nn.Sigmoid() for 'bce', and leave dtype out",
        )
    looked = ripple(model, loss_function(loss), (xs, labels), xt, outputs=outputs, mode=mode, progress=progress)
    return s_ker_of(looked, halved=loss == "bce")


def loss_function(loss: Loss) -> torch.nn.Module:
    """The loss of one sample as He and Su's code has it, for outputs of shape (1,) or (1, 1)."""
    return _Flat(F.mse_loss if loss == "mse" else F.binary_cross_entropy)


class _Flat(nn.Module):
    """A loss of outputs and labels of any shape, one number a sample."""

    def __init__(self, loss: object) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.loss(outputs.flatten(), labels.flatten().to(outputs.dtype))  # pyright: ignore[reportCallIssue]


def _logits(model: nn.Module, x: Tensor, mode: Mode) -> Float[Tensor, " n"]:
    with preserved(model, mode) as subject, torch.no_grad():
        logits = check_output(subject.find_draws(lambda: subject.call(x)), len(x))
    if logits.shape[1] != 1:
        raise InputError(
            expected="a model with one logit for outputs='logits'",
            got=f"{logits.shape[1]} outputs",
            do="use outputs='values', the kernel of what the model emits",
        )
    return logits[:, 0]
