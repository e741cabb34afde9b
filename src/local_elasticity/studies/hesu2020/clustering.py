"""Study hesu2020-clustering: local elasticity tells two kinds apart that it was not told (arXiv:1910.06943; srel 6)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

import local_elasticity as le
from local_elasticity.base.parallel import Task, Workers, perform
from local_elasticity.base.progress import told_aside
from local_elasticity.report.figures import save
from local_elasticity.report.similarity import clustering_accuracy
from local_elasticity.runs.folders import prepare_folder
from local_elasticity.similarity.kernels import Loss, loss_function, relative, s_ker_of, sigmoid_slope, symmetrised
from local_elasticity.studies.engine.claims import Claim, judged, print_claims, status, write_claims
from local_elasticity.studies.engine.study import Option, Study
from local_elasticity.studies.hesu2020.training import network, train

WIDTH = 40960
LOSSES: tuple[Loss, ...] = ("mse", "bce")
KINDS = ("network", "linear")
SIMILARITIES = ("relative", "kernelised")
METHODS = tuple(f"{loss} {similarity} {kind}" for kind in KINDS for loss in LOSSES for similarity in SIMILARITIES)
BASELINES = ("K-means", "PCA + K-means")
CHOSEN = "bce kernelised network"  # the one method that the claims go by, settled before any run
CHECK_SAMPLES = 100  # of the first pair, for the finite step as published against its limit


@dataclass(frozen=True)
class Pair:
    """Two primary classes to be told apart, and the auxiliary classes that the network tells them from.

    Attributes:
        primary: label 1, the first images of each.
        auxiliary: label 0, the first images of all of them together, in the order of the file.
        batch_size: published.
        kmeans: accuracies of K-means, lowest and highest, verified on the real images; none for unverified pairs.
        pca: accuracy of K-means on 100 principal components, verified; none for unverified pairs.
        recalled: accuracies of the published table by method, recalled and unverified.
    """

    primary: tuple[str, str]
    auxiliary: tuple[str, ...]
    batch_size: int = 50
    kmeans: tuple[float, float] | None = None
    pca: float | None = None
    recalled: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For example "5 v 8"."""
        return " v ".join(self.primary)


def _mnist(primary: str, auxiliary: str, kmeans: tuple[float, float], pca: float, recalled: Sequence[float]) -> Pair:
    names = [f"{loss} {similarity} linear" for loss in LOSSES for similarity in SIMILARITIES]
    batch = 500 if primary == "35" else 50
    return Pair((primary[0], primary[1]), tuple(auxiliary), batch, kmeans, pca, dict(zip(names, recalled, strict=True)))


def _cifar(first: str, second: str, *auxiliary: str, recalled: tuple[float, float]) -> Pair:
    return Pair((first, second), auxiliary, 500, recalled={"K-means": recalled[0], CHOSEN: recalled[1]})


PAIRS = {
    "mnist": (
        _mnist("58", "39", (50.1, 50.1), 50.4, (51.0, 50.1, 50.1, 50.7)),
        _mnist("49", "57", (53.4, 54.7), 54.0, (54.6, 55.5, 50.0, 56.7)),
        _mnist("79", "45", (55.5, 55.7), 55.7, (51.3, 55.5, 50.2, 62.3)),
        _mnist("59", "48", (56.3, 56.3), 56.5, (58.8, 56.3, 50.6, 55.2)),
        _mnist("35", "89", (70.1, 70.8), 68.6, (58.3, 69.3, 51.4, 53.9)),
        _mnist("38", "5", (76.0, 76.6), 76.1, (58.7, 76.1, 50.1, 51.6)),
    ),
    "cifar10": (
        _cifar("automobile", "cat", "bird", recalled=(50.3, 58.4)),
        _cifar("automobile", "horse", "cat", "bird", recalled=(50.9, 59.7)),
        _cifar("bird", "cat", "automobile", recalled=(51.1, 56.6)),
        _cifar("deer", "dog", "frog", recalled=(51.6, 51.2)),
        _cifar("automobile", "bird", "cat", recalled=(51.8, 61.8)),
        _cifar("deer", "frog", "dog", recalled=(52.4, 55.5)),
    ),
}
TOLERANCE = 1.5  # points, around the verified rows of K-means


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    Attributes:
        width: hidden units; the published rates are multiplied by 40960 / width.
        epochs: passes over the images, by data set and loss.
        seeds: of weights and orders; spreads are over them.
        per_primary: images of each primary class.
        auxiliary: images of the auxiliary classes together.
        sets: data sets.
        pairs: so many pairs of each set, the first; all of them where it says nothing.
        whole: only a set that has all auxiliary images in each class will do; else what there is of them is used.
    """

    width: int
    epochs: dict[str, int]
    seeds: dict[str, int]
    per_primary: int = 500
    auxiliary: int = 1000
    sets: tuple[str, ...] = ("mnist", "cifar10")
    pairs: dict[str, int] = field(default_factory=dict)
    whole: bool = False


SCALES = {
    "small": Scale(
        512,
        {"mnist mse": 5, "mnist bce": 5, "cifar10 mse": 10, "cifar10 bce": 10},
        {"mnist": 5, "cifar10": 2},
        pairs={"cifar10": 3},
    ),
    "paper": Scale(
        WIDTH,
        {"mnist mse": 200, "mnist bce": 50, "cifar10 mse": 200, "cifar10 bce": 200},
        {"mnist": 5, "cifar10": 5},
        whole=True,
    ),
}
RATES = {"network": 3e-3, "linear mse": 3e-5, "linear bce": 3e-3}


@dataclass(frozen=True)
class Samples:
    """The images of one pair in the order of one seed.

    Attributes:
        x: all images, in [-1, 1].
        labels: 1 for primary images, 0 for auxiliary ones.
        primary: positions of the primary images.
        kind: which of the two primary classes each of those is.
    """

    x: Float[Tensor, "n ..."]
    labels: Float[Tensor, " n"]
    primary: Int[Tensor, " m"]
    kind: Int[ndarray, " m"]


def samples_of(images: Any, pair: Pair, size: Scale, seed: int) -> Samples:
    """The first images of each primary class and of the auxiliary ones, shuffled by the seed."""
    positions, kinds = [], []
    for kind, name in enumerate(pair.primary):
        found = torch.nonzero(images.labels == images.class_label(name)).squeeze(1)[: size.per_primary]
        positions.append(found)
        kinds += [kind] * len(found)
    wanted = torch.tensor([images.class_label(name) for name in pair.auxiliary])
    others = torch.nonzero(torch.isin(images.labels, wanted)).squeeze(1)[: size.auxiliary]
    kinds += [-1] * len(others)
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
    kind = torch.tensor(kinds)[order]
    x, _ = images.at(torch.cat([*positions, others])[order]).tensors(normalise=(0.5, 0.5))
    primary = torch.nonzero(kind >= 0).squeeze(1)
    return Samples(x, (kind >= 0).float(), primary, kind[primary].numpy())


def score(labels: Int[ndarray, " m"], kind: Int[ndarray, " m"]) -> float:
    """Accuracy of two clusters up to their names, in per cent: 100 (1/2 + |accuracy - 1/2|)."""
    return 100 * (0.5 + abs(float((labels == kind).mean()) - 0.5))


def baselines(samples: Samples) -> dict[str, float]:
    """K-means on the pixels, and on their first 100 principal components."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    pixels = samples.x[samples.primary].flatten(1).numpy()
    fewer = PCA(min(100, *pixels.shape), svd_solver="full").fit_transform(pixels)
    found = {}
    for name, x in zip(BASELINES, (pixels, fewer), strict=True):
        found[name] = score(KMeans(2, n_init=10, random_state=0).fit(x).labels_, samples.kind)  # pyright: ignore[reportArgumentType]
    return found


def similarities(model: nn.Module, x: Tensor, loss: Loss) -> dict[str, Float[ndarray, "m m"]]:
    """Both similarities of all pairs, symmetric, from one kernel; for the cross-entropy, of the sigmoid's output."""
    values = le.kernel(model, x, form=0).double()
    slopes = None
    if loss == "bce":
        with torch.no_grad():
            slopes = sigmoid_slope(model(x).squeeze(1).double())
    kernelised = values if slopes is None else values * slopes[:, None] * slopes[None, :]
    found = {"relative": relative(values, slopes=slopes), "kernelised": kernelised}
    return {name: symmetrised(matrix).numpy() for name, matrix in found.items()}


def clustered(matrices: dict[str, Float[ndarray, "m m"]], kind: Int[ndarray, " m"]) -> dict[str, float]:
    """Scores as published: K-means on the rows of the relative one, kernel K-means (one random start) of the other."""
    from local_elasticity.similarity.clustering import cluster

    return {
        "relative": score(cluster(matrices["relative"], 2, "kmeans", random_state=0), kind),
        "kernelised": score(cluster(matrices["kernelised"], 2, "kernel_kmeans", n_init=1, random_state=0), kind),
    }


def published_agreement(model: nn.Module, samples: Samples, loss: Loss) -> dict[str, float]:
    """Correlations of the finite step as published with its limit, over 100 primary images of one network."""
    chosen = samples.primary[:CHECK_SAMPLES]
    x, labels = samples.x[chosen], samples.labels[chosen]
    emitting = nn.Sequential(model, nn.Sigmoid()) if loss == "bce" else model
    try:
        looked = le.ripple(emitting, loss_function(loss), (x, labels))
    except le.InputError:  # a probability of exactly 1 in float32: the published code divides by zero there
        return {"relative": float("nan"), "kernelised": float("nan"), "moved": 0.0}
    limit = similarities(model, x, loss)
    finite = {"relative": le.s_rel(looked, "he_su"), "kernelised": s_ker_of(looked)}
    found = {"moved": float(looked.moved.double().mean())}
    for name, matrix in finite.items():
        a, b = symmetrised(matrix.double()).numpy().ravel(), limit[name].ravel()
        defined = np.isfinite(a) & np.isfinite(b)
        varies = defined.sum() > 2 and a[defined].std() > 0 and b[defined].std() > 0
        found[name] = float(np.corrcoef(a[defined], b[defined])[0, 1]) if varies else float("nan")
    return found


def task(name: str, images: Any, pair: Pair, size: Scale, seed: int, folder: Path, check: bool) -> dict[str, Any]:
    """One pair and seed: baselines, then every network and twin, with one thread."""
    path = _record(name, pair, seed, folder)
    with _one_thread():
        started = time.perf_counter()
        samples = samples_of(images, pair, size, seed)
        result: dict[str, Any] = {"set": name, "pair": pair.name, "seed": seed, "counts": _counts(samples)}
        result["scores"], result["trained"], result["published"] = baselines(samples), {}, {}
        for loss in LOSSES:
            for kind in KINDS:
                rate = RATES["network"] if kind == "network" else RATES[f"linear {loss}"]
                shape = samples.x[0].numel()
                pair_of = [network(shape, [size.width], kind == "linear", seed) for _ in range(2)]
                checkpoint = path.with_name(f"{path.stem}-{loss}-{kind}.pt")
                epochs = size.epochs[f"{name} {loss}"]
                scaled = rate * WIDTH / size.width
                batch = min(pair.batch_size, len(samples.x))
                words = f"{name} {pair.name}, seed {seed}, {loss} {kind}" if size.width >= 4096 else ""
                model, used, last = train(
                    pair_of, samples.x, samples.labels, loss, scaled, epochs, batch, seed, checkpoint, words
                )
                with torch.no_grad():
                    above = model(samples.x).squeeze(1) > (0.5 if loss == "mse" else 0.0)
                right = float((above.float() == samples.labels).float().mean())
                result["trained"][f"{loss} {kind}"] = {**asdict(used), "loss": last, "accuracy": right}
                matrices = similarities(model, samples.x[samples.primary], loss)
                for similarity, value in clustered(matrices, samples.kind).items():
                    result["scores"][f"{loss} {similarity} {kind}"] = value
                if check:
                    result["published"][f"{loss} {kind}"] = published_agreement(model, samples, loss)
                checkpoint.unlink(missing_ok=True)
        result["seconds"] = time.perf_counter() - started
    return result


def _task(name: str, images: Any, pair: Pair, size: Scale, seed: int, folder: Path, check: bool) -> Task:
    arguments = (name, images, pair, size, seed, folder, check)
    return Task(f"{name} {pair.name}, seed {seed}", task, arguments, _record(name, pair, seed, folder))


def _record(name: str, pair: Pair, seed: int, folder: Path) -> Path:
    return folder / f"{name}-{pair.name.replace(' ', '')}-seed{seed}.json"


def _counts(samples: Samples) -> list[int]:
    return [int((samples.kind == 0).sum()), int((samples.kind == 1).sum()), int((samples.labels == 0).sum())]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch and for the linear algebra of NumPy and scikit-learn, in every backend."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class ClusteringStudy(Study):
    """The study at its published settings.

    Attributes:
        title: one line for lists.
        cost: time to expect at each scale.
        readers: data set -> how to read it, given the images needed of one class.
        pairs: data set -> pairs of classes.
    """

    title: str
    cost: Mapping[str, str]
    readers: dict[str, Callable[[int], Any]]
    pairs: dict[str, tuple[Pair, ...]] = field(default_factory=lambda: PAIRS)

    options: ClassVar[frozenset[Option]] = frozenset({"workers"})

    def run(self, scale: str, out: Path, overwrite: bool = False, workers: Workers | None = None) -> int:
        """Train, cluster and score every pair and seed; judge the claims, draw.

        Args:
            scale: "small" or "paper".
            out: the study's folder; an interrupted study continues there.
            overwrite: throw away what is there.
            workers: where pairs and seeds are done; one after the other in this process by default.

        Returns:
            1 when a claim fails, else 0.

        Raises:
            InputError: when no data set is at hand.
        """
        return self.run_at(SCALES[scale], scale, out, overwrite, workers)

    def run_at(
        self, size: Scale, scale: str, out: Path, overwrite: bool = False, workers: Workers | None = None
    ) -> int:
        """As ``run``, with the size given."""
        images, missing = self._read(size)
        origins = {name: one.origin for name, one in images.items()}
        settings = {"title": self.title, **asdict(size), "rates": RATES, "scale": scale, "data_origin": origins}
        prepare_folder(out, settings, overwrite)
        place = out / "tasks"
        place.mkdir(exist_ok=True)
        tasks = [
            _task(name, one, pair, size, seed, place, at == 0 and seed == 0)
            for name, one in images.items()
            for at, pair in enumerate(self.pairs[name][: size.pairs.get(name)])
            for seed in range(size.seeds[name])
        ]
        print(
            f"{self.title}, scale {scale}: about {self.cost.get(scale, 'unknown time')}; {len(tasks)} pairs and seeds, "
            f"4 networks each; data: {'; '.join(origins.values())}",
            flush=True,
        )
        with told_aside(lambda: f"{sum(one.record.exists() for one in tasks)} of {len(tasks)} done"):
            results = perform(tasks, workers)
        order = [(name, pair.name) for name in images for pair in self.pairs[name]]
        results.sort(key=lambda one: (order.index((one["set"], one["pair"])), one["seed"]))
        return self._report(results, origins, missing, scale, size, out)

    def _read(self, size: Scale) -> tuple[dict[str, Any], list[str]]:
        images, missing = {}, []
        for name in size.sets:
            try:
                images[name] = self.readers[name](size.auxiliary if size.whole else size.per_primary)
            except le.InputError as error:
                line = f"{name} is not at hand, its pairs are left out: {error}"
                missing.append(line)
                print(line, flush=True)
        if not images:
            raise le.InputError(
                expected=f"at least one of {', '.join(size.sets)}",
                got="none of them at hand",
                do=f"put their files into a folder that {le.data.ENVIRONMENT} names (see 'local-elasticity data')",
            )
        return images, missing

    def _report(
        self,
        results: list[dict[str, Any]],
        origins: dict[str, str],
        missing: list[str],
        scale: str,
        size: Scale,
        out: Path,
    ) -> int:
        table = tabulate(results)
        claims = check_claims(table, "mnist" in origins)
        notes = [f"data, {name}: {origin}" for name, origin in origins.items()] + missing
        notes += _notes(results, size)
        title = f"{self.title}, scale {scale}"
        path = write_claims(claims, out, title, notes)
        with path.open("a") as file:
            for name in origins:
                file.write(f"\n## {name}: accuracy in per cent, mean ± SD over {size.seeds[name]} seeds\n\n")
                file.write(_markdown(table[name]))
        (out / "accuracies.json").write_text(json.dumps(results, indent=2))
        print_claims(claims, title)
        for note in notes:
            print(note)
        for name in origins:
            figure = clustering_accuracy(table[name], f"{title}: {name}, width {size.width}, {size.seeds[name]} seeds")
            print(f"figure: {save(figure, out / 'figures', f'accuracy-{name}')[0]}")
        print(f"claims and tables: {path}")
        return status(claims)


Table = dict[str, dict[str, list[float]]]


def tabulate(results: Sequence[dict[str, Any]]) -> dict[str, Table]:
    """Set -> pair -> method -> accuracies over seeds."""
    tables: dict[str, Table] = {}
    for result in results:
        row = tables.setdefault(result["set"], {}).setdefault(result["pair"], {})
        for method, value in result["scores"].items():
            row.setdefault(method, []).append(value)
    return tables


def check_claims(tables: dict[str, Table], have_mnist: bool) -> list[Claim]:
    """C9 of spec srel 5 for clustering, the verified rows of K-means, and the recalled rows, which are not judged."""
    claims: list[Claim] = []
    if have_mnist:
        mnist = tables["mnist"]
        claims += [_baseline_claim(mnist, method) for method in BASELINES]
        claims += [_beats(mnist, CHOSEN, "the larger of both K-means", 3, judge=True)]
        claims += [_beats(mnist, CHOSEN, CHOSEN.replace("network", "linear"), 3, judge=True)]
        others = [m for m in METHODS if m.endswith("network") and m != CHOSEN]
        claims += [_beats(mnist, method, "the larger of both K-means", 3, judge=False) for method in others]
    for name, table in tables.items():
        claims += _recalled(name, table)
        if name != "mnist":
            for method in (m for m in METHODS if m.endswith("network")):
                claims.append(_beats(table, method, "the larger of both K-means", 3, judge=False, where=name))
    return claims


def _baseline_claim(table: Table, method: str) -> Claim:
    expected, seen, inside = [], [], []
    for pair in PAIRS["mnist"]:
        if pair.name not in table or pair.kmeans is None or pair.pca is None:
            continue
        low, high = pair.kmeans if method == BASELINES[0] else (pair.pca, pair.pca)
        mean = float(np.mean(table[pair.name][method]))
        expected.append(f"{low:g}" if low == high else f"{low:g}-{high:g}")
        seen.append(f"{mean:.1f}")
        inside.append(low - TOLERANCE <= mean <= high + TOLERANCE)
    spread = max(float(np.ptp(row[method])) for row in table.values())
    return Claim(
        f"mnist: {method} on the images, pair by pair",
        f"{' '.join(expected)}, each within {TOLERANCE:g} points (verified)",
        " ".join(seen),
        f"largest range over orderings {spread:.1f} points",
        judged(all(inside)),
    )


def _beats(table: Table, method: str, rival: str, least: int, judge: bool, where: str = "mnist") -> Claim:
    """On how many pairs the mean accuracy is higher, and on how many by more than two standard errors."""
    higher, clearly, total = 0, 0, 0
    for row in table.values():
        mine = np.array(row[method])
        others = [np.array(row[b]) for b in BASELINES] if rival not in row else [np.array(row[rival])]
        other = max(others, key=np.mean)
        gain, n = mine - other, len(mine)
        error = float(gain.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
        total += 1
        higher += bool(gain.mean() > 0)
        clearly += bool(gain.mean() > 2 * error)
    several = judge and total == len(PAIRS["mnist"])
    return Claim(
        f"{where}: {method} beats {rival}",
        f"higher mean accuracy on several pairs ({least} or more of 6)",
        f"on {higher} of {total} pairs",
        f"by more than 2 standard errors over seeds on {clearly}",
        judged(higher >= least) if several else "not judged",
    )


def _recalled(name: str, table: Table) -> list[Claim]:
    """The rows of the published table that nobody could verify: soft anchors."""
    pairs = [pair for pair in PAIRS.get(name, ()) if pair.name in table]
    claims = []
    for method in dict.fromkeys(m for pair in pairs for m in pair.recalled):
        seen = [f"{np.mean(table[pair.name][method]):.1f}" for pair in pairs]
        spread = max(float(np.std(table[pair.name][method])) for pair in pairs)
        expected = " ".join(f"{pair.recalled[method]:g}" for pair in pairs)
        claims.append(
            Claim(
                f"{name}: {method}, pair by pair",
                f"{expected} (recalled, unverified)",
                " ".join(seen),
                f"largest SD over seeds {spread:.1f} points",
                "not judged",
            )
        )
    return claims


def _notes(results: Sequence[dict[str, Any]], size: Scale) -> list[str]:
    notes = [
        f"width {size.width} (published 40960, and its rates times 40960 / width), batch 50 (3 v 5 and cifar10: 500); "
        f"passes {', '.join(f'{k} {v}' for k, v in size.epochs.items())}; seeds 0 ... of weights and order",
        "small-step limit of both similarities from one tangent kernel of the primary images; for the cross-entropy "
        "that of the sigmoid's output; symmetrised; K-means on rows (10 starts), kernel K-means (one random start)",
        f"accuracy is 1/2 + |accuracy - 1/2|; the claims go by '{CHOSEN}', chosen before any run",
        "images a task (first kind, second kind, auxiliary): "
        + ", ".join(sorted({f"{r['set']} {'+'.join(map(str, r['counts']))}" for r in results})),
    ]
    for what in sorted({(r["set"], key) for r in results for key in r["trained"]}):
        some = [r["trained"][what[1]] for r in results if r["set"] == what[0]]
        diverged = [one for one in some if one["diverged"]]
        rates = f"{min(o['lr'] for o in some):.3g} to {max(o['lr'] for o in some):.3g}"
        bounds = f"{min(o['bound'] for o in some):.3g} to {max(o['bound'] for o in some):.3g}"
        notes.append(
            f"{what[0]}, {what[1]}: published rate {some[0]['published']:.3g} (stable below {bounds}) diverged in "
            f"{len(diverged)} of {len(some)}"
            + (", then one over the top eigenvalue of the loss's curvature" if diverged else "")
            + f"; rates used {rates}; training accuracy {np.mean([o['accuracy'] for o in some]):.1%}"
        )
    for result in results:
        for key, found in result["published"].items():
            notes.append(
                f"as published, {result['set']} {result['pair']}, {key}: over {CHECK_SAMPLES} images, finite step from "
                f"1e-6 in float32 against its limit: correlation {found['relative']:.3f} (relative), "
                f"{found['kernelised']:.3f} (kernelised); a step was visible at {found['moved']:.0%} of them"
            )
    return notes


def _markdown(table: Table) -> str:
    pairs = list(table)
    lines = ["| method | " + " | ".join(pairs) + " |", "|---" * (len(pairs) + 1) + "|"]
    for method in (*BASELINES, *METHODS):
        cells = [f"{np.mean(table[pair][method]):.1f} ± {np.std(table[pair][method]):.1f}" for pair in pairs]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


CLUSTERING = ClusteringStudy(
    title="hesu2020-clustering: two kinds of images told apart by local elasticity, on MNIST and CIFAR-10",
    cost={"small": "3 min on 2 cores", "paper": "6 days on 2 cores, by operation counts"},
    readers={
        "mnist": lambda least: le.data.mnist(),
        "cifar10": lambda least: le.data.cifar10(at_least=least),
    },
)
