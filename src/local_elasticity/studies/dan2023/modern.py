"""Study dan2023-modern: the first paper's image protocol on modern networks and optimisers (not in the paper).

ResNet-18 with batch, with group and without normalisation, and a small vision transformer; SGD with momentum and AdamW;
three classes of Fashion-MNIST and of CIFAR-10. The small scale narrows the networks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from local_elasticity.report.figures import save
from local_elasticity.report.separation import separation
from local_elasticity.studies.dan2023.claims import (
    FLIPPED,
    MIXED,
    NEW,
    ORIGINAL,
    PSEUDO,
    how_often,
    no_step_error,
    permuted_curves,
    sharper,
    sharpness,
    table_rows,
    words,
)
from local_elasticity.studies.dan2023.images import LIMIT, PROBE, Condition, ImageStudy, Scale, words_of
from local_elasticity.studies.dan2023.report import ROWS, time_notes, write_rows
from local_elasticity.studies.dan2023.tables import Series, intra_inter
from local_elasticity.studies.engine.claims import Claim, judged, print_claims, status, write_claims

DATA = {"fashion-mnist": ("T-shirt/top", "Trouser", "Bag"), "cifar10": ("airplane", "automobile", "ship")}
NETWORKS = {
    "resnet18-batchnorm": ":width=16",
    "resnet18-groupnorm": ":groups=8,width=16",
    "resnet18-plain": ":width=16",
    "vit-small": ":depth=2",
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 1e-2},
}
SHORT = {"resnet18-batchnorm": "BatchNorm", "resnet18-groupnorm": "GroupNorm", "resnet18-plain": "no norm"}
FIGURE = "figures/separation.png"


def _conditions(narrow: bool) -> tuple[Condition, ...]:
    return tuple(
        Condition(data, DATA[data], network + (NETWORKS[network] if narrow else ""), optimizer, **OPTIMIZERS[optimizer])
        for data, network, optimizer in itertools.product(DATA, NETWORKS, OPTIMIZERS)
    )


def report(study: ImageStudy, found: Sequence[Series], size: Scale, scale: str, out: Path, waiting: float) -> int:
    """Judge every combination, and whether the conclusion depends on it."""
    title = f"{study.title}, {words_of(study, size, scale)}"
    claims = check_claims(found)
    notes = [
        f"{size.per_class} training images a class, batch {size.batch_size}, {size.epochs} epochs = "
        f"{found[0].records[0]['updates']} updates, {len(found[0].epochs)} looks, {size.runs} run(s) of each; "
        f"{size.probes_per_class} probes a class, probe {PROBE}, mean of ratios, self pairs in; networks in eval mode",
        *(f"{o}: " + ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in s.items()) for o, s in OPTIMIZERS.items()),
        *(f"{name(one.condition)}: {ends(one)}" for one in found),
        *time_notes_of(found, waiting),
    ]
    path = write_claims(claims, out, title, notes)
    write_rows(
        out / "separation.csv", [{"combination": one.condition.name, **r} for one in found for r in table_rows(one)]
    )
    figure = save(combinations_figure(found, title), out / "figures", "separation")[0]
    print_claims(claims, title)
    for note in notes:
        print(f"- {note}")
    print(f"claims: {path}\nfigure: {figure}")
    return status(claims)


def check_claims(found: Sequence[Series]) -> list[Claim]:
    """C1 and C4 for every combination, whether they agree, and the controls over all."""
    separates, sharp = [_separates(one) for one in found], [_sharper(one) for one in found]
    holding = [sum(claim.verdict == "holds" for claim in some) for some in (separates, sharp)]
    errors = [no_step_error(one) for one in found]
    flips = [np.subtract(*intra_inter(permuted_curves(one))) < 0 for one in found]
    flipped = float(np.concatenate(flips).mean())
    return [
        Claim(
            "as published: the pseudo-KL separates whatever the network and optimiser",
            "own class above the others on average over the looks, in every combination",
            f"in {holding[0]} of {len(found)} combinations",
            "counted",
            judged(holding[0] == len(found)),
            "as published",
            "C1",
            FIGURE,
        ),
        Claim(
            "as defined: whether KL is sharper than L1 does not depend on network and optimiser",
            "the same verdict in every combination",
            f"sharper in {holding[1]} of {len(found)} combinations",
            "counted",
            judged(holding[1] in (0, len(found))),
            "as defined",
            "C4",
            FIGURE,
        ),
        *separates,
        *sharp,
        Claim(
            "control: without any step the pseudo-KL is the ratio of H(p) + |p|^2",
            "equal to 1e-12 of itself in every combination",
            f"largest relative difference {max(errors):.1e}",
            "all pairs, after the last epoch",
            judged(max(errors) <= 1e-12),
            "control",
            "C5",
            FIGURE,
        ),
        Claim(
            "control: with the next class's label the order of the pseudo-KL flips",
            f"intra below inter at {FLIPPED:.0%} of all control looks or more",
            f"at {flipped:.0%} of {sum(map(len, flips))}",
            "counted",
            judged(flipped >= FLIPPED),
            "control",
            "C5",
            FIGURE,
        ),
    ]


def _separates(series: Series) -> Claim:
    intra, inter = intra_inter(series.curves(PROBE, PSEUDO).mean(0))
    differences = (intra - inter)[len(intra) // 2 :]
    return Claim(
        f"as published: {name(series.condition)}: the pseudo-KL separates",
        "intra above inter in the second half of training on average",
        f"{differences.mean():+.4f} (at the end intra {intra[-1]:.4f}, inter {inter[-1]:.4f})",
        f"over looks {words((differences.min(), differences.max()), 4)}",
        judged(bool(differences.mean() > 0)),
        "as published",
        "C1",
        FIGURE,
    )


def _sharper(series: Series) -> Claim:
    difference, ends = sharper(series, PROBE, NEW, ORIGINAL)
    often = [how_often(series, PROBE, definition) for definition in (NEW, ORIGINAL)]
    return Claim(
        f"as defined: {name(series.condition)}: KL sharper than L1",
        "intra above both inter means at more looks, and own-class targets ranked higher (interval above 0)",
        f"mean {often[0]:.0%} against {often[1]:.0%}; ranks {sharpness(series, PROBE, NEW):.3f} against "
        f"{sharpness(series, PROBE, ORIGINAL):.3f}",
        f"rank difference {difference:+.4f} {words(ends, 4)}",
        judged(bool(often[0] > often[1] and ends[0] > 0)),
        "as defined",
        "C4",
        FIGURE,
    )


def name(condition: Condition) -> str:
    """Short, for tables and figures."""
    network = condition.network.partition(":")[0]
    optimizer = {"sgd": "SGD", "adamw": "AdamW"}[condition.optimizer]
    data = {"fashion-mnist": "Fashion", "cifar10": "CIFAR-10"}[condition.data]
    return f"{data}, {SHORT.get(network, 'ViT')}, {optimizer}"


def ends(series: Series) -> str:
    """Where training ended."""
    means = {k: np.mean([r[k] for r in series.records]) for k in ("train_accuracy", "test_accuracy")}
    return (
        f"train accuracy {means['train_accuracy']:.3f}, true test accuracy {means['test_accuracy']:.3f}; "
        f"{series.condition.network}"
    )


def time_notes_of(found: Sequence[Series], waiting: float) -> list[str]:
    """What the time of all runs went to."""
    whole = Series(found[0].condition, [], [], [r for one in found for r in one.records], found[0].seed)
    return time_notes(whole, waiting)


def combinations_figure(found: Sequence[Series], title: str) -> Any:
    """Combinations by definitions: how often, and how clearly, by the published step and in the limit."""

    def matrix(value: Any) -> np.ndarray:
        return np.array([[value(one, definition) for definition in ROWS] for one in found])

    columns = ["pseudo-KL", "mixed norms", "KL(a ‖ b)", "KL(b ‖ a)", "L1", "L2", "raw outputs"]
    panels = {
        "Adam 1e-4, mean: intra above both inter, % of looks": (matrix(lambda s, d: how_often(s, PROBE, d)), 1 / 3),
        "Adam 1e-4: own class ranked higher, %": (matrix(lambda s, d: sharpness(s, PROBE, d)), 0.5),
        "small-step limit: own class ranked higher, %": (matrix(lambda s, d: sharpness(s, LIMIT, d)), 0.5),
    }
    pseudo, mixed, new = (np.mean([how_often(s, PROBE, d) for s in found]) for d in (PSEUDO, MIXED, NEW))
    sharp = sum(sharper(s, PROBE, NEW, ORIGINAL)[1][0] > 0 for s in found)
    return separation(
        panels,
        [name(one.condition) for one in found],
        columns,
        f"Own class above both others: pseudo-KL {pseudo:.0%} of looks, mixed norms {mixed:.0%}, true KL {new:.0%}; "
        f"true KL ranks the own class higher than L1 does in {sharp} of {len(found)} combinations\n{title}",
        groups=range(2, len(found), 2),
        caption="white is chance (33 %, 50 %, 50 %); a, b: after and before the step; self pairs in (ranks: out)",
    )


MODERN = ImageStudy(
    name="dan2023-modern",
    title="dan2023-modern: the image protocol on modern networks and optimisers",
    conditions={"small": _conditions(narrow=True), "paper": _conditions(narrow=False)},
    sizes={
        "small": Scale(200, 25, 3, 1, probes_per_class=4, every=12, test_per_class=100),
        "paper": Scale(5000, 256, 7, 3),
    },
    cost={"small": "4 min on 1 core", "paper": "2 days on 1 core"},
    report=report,
    paper="not in the papers",
    figure="none",
    claim="whether what the definitions of S_rel show depends on architecture and optimiser",
)
