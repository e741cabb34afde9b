"""Neural collapse in one pass over batches: the sums that are kept, and how they merge."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from local_elasticity.base.checks import check_instance, check_whole
from local_elasticity.base.errors import InputError
from local_elasticity.base.tensors import check_class_labels, check_device, check_tensor
from local_elasticity.collapse.features import Positions, to_features
from local_elasticity.collapse.geometry import (
    FORMS,
    GEOMETRY,
    Form,
    Weighting,
    alignment,
    centre,
    check_counts,
    check_weighting,
    check_word,
    classifier,
    disagreeing,
    geometry,
    metrics,
    pinv_trace,
    svd_trace,
    to_double,
)

Keep = Literal["sums", "features"]
SUMS = ("counts", "sums", "squares", "scatter")
MOST_SUMS = 16_384  # features of which a D x D matrix is kept: 2 GB


class NeuralCollapse:
    """Neural collapse in one pass over batches of features.

    With ``keep="sums"`` the state is, per class, the count and the sums of x - s and ||x - s||^2, and the sum over all
    samples of (x - s)(x - s)^T, all in float64; s is a point of each class (``shift``), the mean of its first batch.
    Sums about such points keep their digits however large a common offset is, and however closely a class has
    collapsed. Shards ``merge`` exactly whatever their points; after `recentre` to the same points their `state` is
    reduced by a plain sum over processes. ``compute`` may be called at any time.

    NC4 needs the final class means, so sums cannot tell it in one pass: show the features again to `update_nc4`, or use
    ``keep="features"``, which keeps all features (samples x D) instead, suits any D, and knows everything.

    Args:
        n_classes: K.
        dim: D, numbers in a feature.
        weighting: how Sigma_B weighs classes: "classes" (all the same, about the mean of class means) or "samples" (by
            their counts, about the mean of all samples).
        keep: "sums" (D x D numbers) or "features".
        positions: what to do with convolution outputs (samples, channels, ...): average over positions, or flatten.
        device: of the state; the first batch's by default.

    Raises:
        InputError: for fewer than 2 classes, no features, or too many for sums.
    """

    geometry: ClassVar[tuple[str, ...]] = GEOMETRY

    def __init__(
        self,
        n_classes: int,
        dim: int,
        *,
        weighting: Weighting = "classes",
        keep: Keep = "sums",
        positions: Positions = "mean",
        device: str | torch.device | None = None,
    ) -> None:
        n_classes, dim = check_whole("n_classes", n_classes, 2), check_whole("dim", dim)
        check_weighting(weighting)
        check_word("keep", keep, ("sums", "features"))
        check_word("positions", positions, ("mean", "flatten"))
        if keep == "sums" and dim > MOST_SUMS:
            raise InputError(
                expected=f"at most {MOST_SUMS} features for keep='sums' (a D x D matrix)",
                got=f"{dim}, which would take {dim * dim * 8 / 2**30:.0f} GiB",
                do="average over positions, or keep='features'",
            )
        self.n_classes, self.dim = n_classes, dim
        self.weighting: Weighting = weighting
        self.keep: Keep = keep
        self.positions: Positions = positions
        self.device = check_device("device", device)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": self.device or "cpu"}
        k, d = self.n_classes, self.dim if self.keep == "sums" else 0
        self.counts = torch.zeros(k, **options)
        self.sums = torch.zeros(k, d, **options)
        self.squares = torch.zeros(k, **options)
        self.scatter = torch.zeros(d, d, **options)
        self.shift = torch.zeros(k, d, **options)
        self.nc4_seen = torch.zeros(2, **options)  # samples of the second pass, and those that disagree
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []

    @property
    def state(self) -> dict[str, Tensor]:
        """What is summed over samples, as it is (not a copy); with ``keep="features"`` all features and labels."""
        if self.keep == "features":
            return {"features": torch.cat(self.features), "labels": torch.cat(self.labels)} if self.features else {}
        return {name: getattr(self, name) for name in SUMS}

    def update(
        self, features: Float[Tensor, "samples dim"] | Float[Tensor, "samples channels ..."], labels: Int[Tensor, " n"]
    ) -> None:
        """Take in a batch.

        Raises:
            InputError: for shapes, labels or numbers that do not fit.
        """
        features, labels = self._checked(features, labels)
        if self.keep == "features":
            self.features.append(features.clone())
            self.labels.append(labels)
            self.counts = self.counts.to(labels.device) + torch.bincount(labels, minlength=self.n_classes)
            return
        x = to_double(features).to(self._place(features))
        labels = labels.to(x.device)
        self._choose_shift(x, labels)
        rest = x - self.shift[labels]
        self.counts += torch.bincount(labels, minlength=self.n_classes)
        self.sums.index_add_(0, labels, rest)
        self.squares.index_add_(0, labels, rest.square().sum(dim=1))
        self.scatter.addmm_(rest.T, rest)
        self.nc4_seen.zero_()  # it was of other means

    def update_nc4(
        self,
        features: Float[Tensor, "samples dim"],
        weight: Float[Tensor, "classes dim"],
        bias: Float[Tensor, " classes"] | None = None,
    ) -> None:
        """Second pass, after the last `update` and `merge`: count samples that W h + b and the means tell differently.

        Raises:
            InputError: for shapes that do not fit, an empty class, or where all features are kept anyway.
        """
        if self.keep == "features":
            raise InputError(
                expected="keep='sums'", got="keep='features'", do="call compute(weight, bias): it knows nc4 already"
            )
        features = self._shaped(features)
        means = self.means()
        x = to_double(features).to(means.device)
        w, b = classifier(weight, bias, self.n_classes, self.dim, means.device)
        self.nc4_seen += torch.stack([means.new_tensor(float(len(x))), disagreeing(x, means, w, b)])

    def merge(self, other: NeuralCollapse) -> Self:
        """Add what another shard saw, by its `update`; a second pass comes after merging.

        Raises:
            InputError: when it counts other classes or features.
        """
        check_instance("other", other, NeuralCollapse, "another NeuralCollapse of the same layer")
        mine = (self.n_classes, self.dim, self.weighting, self.keep)
        theirs = (other.n_classes, other.dim, other.weighting, other.keep)
        if mine != theirs:
            raise InputError(
                expected="a shard with (n_classes, dim, weighting, keep) = " + str(mine),
                got=str(theirs),
                do="merge shards of the same layer",
            )
        if self.keep == "features":
            self.features += other.features
            self.labels += other.labels
            self.counts = self.counts + other.counts.to(self.counts)
            return self
        fresh = ((self.counts == 0) & (other.counts.to(self.counts) > 0)).nonzero().flatten()
        self.shift[fresh] = other.shift.to(self.shift)[fresh]
        for name, value in other._about(self.shift).items():
            getattr(self, name).add_(value)
        self.nc4_seen.zero_()
        return self

    merge_state = merge  # what torchmetrics calls it

    def recentre(self, shift: Float[Tensor, "classes dim"]) -> Self:
        """Express the sums about other points; the metrics stay. Shards about the same points add up plainly."""
        shift = to_double(check_tensor("shift", shift)).to(self.shift)
        if shift.shape != self.shift.shape:
            raise InputError(
                expected=f"points ({self.n_classes}, {self.dim})", got=str(tuple(shift.shape)), do="one a class"
            )
        for name, value in self._about(shift).items():
            setattr(self, name, value)
        self.shift = shift.clone()
        return self

    def means(self) -> Float64[Tensor, "classes dim"]:
        """The class means.

        Raises:
            InputError: when a class has no samples.
        """
        check_counts(self.counts)
        if self.keep == "features":
            x, y = to_double(torch.cat(self.features)), torch.cat(self.labels)
            return x.new_zeros(self.n_classes, self.dim).index_add_(0, y, x) / self.counts[:, None]
        return self.shift + self.sums / self.counts[:, None]

    def within(self) -> Float64[Tensor, "dim dim"]:
        """Sigma_W: the pooled within-class covariance over all samples."""
        if self.keep == "features":
            rest = to_double(torch.cat(self.features)) - self.means()[torch.cat(self.labels)]
            return rest.T @ rest / len(rest)
        check_counts(self.counts)
        return (self.scatter - (self.sums / self.counts[:, None]).T @ self.sums) / self.counts.sum()

    def compute(
        self,
        weight: Float[Tensor, "classes dim"] | None = None,
        bias: Float[Tensor, " classes"] | None = None,
        form: Form = "span",
    ) -> dict[str, float]:
        """The metrics of what was seen so far.

        Args:
            weight: of the classifier, for the metrics that need it.
            bias: of the classifier; only NC4 depends on it.
            form: how ``nc1`` is computed: "span" (the K x K matrices of the class means), "svd" (their thin SVD) or
                "pinv" (the D x D pseudo-inverse, slow); the same number.

        Returns:
            name -> value; NaN where a metric is not defined, and for ``nc4`` before the second pass.

        Raises:
            InputError: when a class has no samples, or the weight does not fit.
        """
        check_word("form", form, FORMS)
        check_counts(self.counts)
        if weight is not None:
            weight, bias = classifier(weight, bias, self.n_classes, self.dim, self.counts.device)
        if self.keep == "features":
            x, y = torch.cat(self.features), torch.cat(self.labels)
            found = metrics(x, y, weight, bias, n_classes=self.n_classes, weighting=self.weighting)
            return found if form == "span" else found | {"nc1": self._other_form(form)}
        means, n, rest = self.means(), self.counts.sum(), self.sums / self.counts[:, None]
        # Rounding may take a variance of zero below it.
        variances = (self.squares / self.counts - rest.square().sum(dim=1)).clamp_min(0)
        (centred,), shares = centre(means, self.counts, variances[:, None], self.weighting, [self.dim])
        along = centred @ rest.T  # M Sigma_W M^T without forming Sigma_W
        projected = (centred @ self.scatter @ centred.T - (along * self.counts) @ along.T) / n
        (found,) = geometry([centred], shares, variances[:, None], self.counts / n, projected[None])
        if form != "span":
            found["nc1"] = self._other_form(form)
        if weight is not None:
            seen, different = self.nc4_seen.tolist()
            found |= alignment(weight, centred) | {"nc4": different / seen if seen else math.nan}
        return found

    def _other_form(self, form: Form) -> float:
        within = self.within()
        # Of all classes together: only the size of rounding is taken from it.
        variances = within.diagonal().sum()[None].clamp_min(0)
        (centred,), shares = centre(self.means(), self.counts, variances[:, None], self.weighting, [self.dim])
        trace = svd_trace if form == "svd" else pinv_trace
        return trace(within, centred, shares) / self.n_classes

    def _about(self, shift: Tensor) -> dict[str, Tensor]:
        """The sums about other points s': with d = s - s', sum (x - s') = sum (x - s) + n d, and so on."""
        mine = {name: getattr(self, name).to(shift) for name in SUMS}
        counts, sums = mine["counts"], mine["sums"]
        moved = torch.where(counts[:, None] > 0, self.shift.to(shift) - shift, 0.0)
        if not bool(moved.any()):
            return {name: value.clone() for name, value in mine.items()}
        cross = sums.T @ moved
        return {
            "counts": counts.clone(),
            "sums": sums + counts[:, None] * moved,
            "squares": mine["squares"] + 2 * (sums * moved).sum(dim=1) + counts * moved.square().sum(dim=1),
            "scatter": mine["scatter"] + cross + cross.T + (counts[:, None] * moved).T @ moved,
        }

    def _choose_shift(self, x: Tensor, labels: Tensor) -> None:
        """A class that is seen for the first time gets its mean in this batch as its point."""
        counts = torch.bincount(labels, minlength=self.n_classes)
        fresh = (self.counts == 0) & (counts > 0)
        if bool(fresh.any()):
            means = torch.zeros_like(self.shift).index_add_(0, labels, x) / counts.clamp_min(1)[:, None]
            self.shift = torch.where(fresh[:, None], means, self.shift)

    def _place(self, features: Tensor) -> torch.device:
        """Where the state is; it moves to the first batch."""
        if self.device is None:
            self.device = torch.device("cpu") if features.device.type == "mps" else features.device
            for name in (*SUMS, "shift", "nc4_seen"):
                setattr(self, name, getattr(self, name).to(self.device))
        return self.device

    def _shaped(self, features: Tensor) -> Tensor:
        check_tensor("features", features, finite=False)
        features = to_features(features, self.positions) if features.dim() > 2 else features.detach()
        if features.dim() != 2 or features.shape[1] != self.dim:
            raise InputError(
                expected=f"features (samples, {self.dim})",
                got=f"shape {tuple(features.shape)}",
                do="give dim as many features as a sample has",
            )
        return features

    def _checked(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        features, labels = self._shaped(features), check_class_labels("labels", labels, self.n_classes)
        if labels.shape != features.shape[:1]:
            raise InputError(
                expected=f"{len(features)} labels, one a sample", got=f"shape {tuple(labels.shape)}", do="pass them all"
            )
        if not bool(torch.isfinite(features).all()):
            raise InputError(
                expected="finite features", got="infinite ones or NaN", do="look at the training: it diverged"
            )
        return features, labels.to(features.device)
