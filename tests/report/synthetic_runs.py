"""Synthetic runs shaped like the tracker's, with curves like the papers'."""

import json

import numpy as np
import xarray as xr

NAMES = ("airplane", "automobile", "ship", "cat", "deer", "dog", "frog", "horse", "bird", "truck", "plane two", "car 2")
PER_DEFINITION = {"kl": (0.35, 1.0), "kl_published": (1.0, 1.0), "he_su": (0.65, 1.0)}


def class_names(count):
    return list(NAMES[:count]) if count <= len(NAMES) else [f"class {i:03d}" for i in range(count)]


def synthetic(
    classes=3, snapshots=49, definitions=("kl_published",), updates=("adam:0.0001",), replicas=0, seed=0, **more
):
    """A run whose curves start at 1, inter falling to 0.7 and intra at 1.03."""
    names = more.pop("names", None) or class_names(classes)
    k, rng = len(names), np.random.default_rng(seed)
    steps = np.arange(snapshots) * 9 + 1
    if replicas:
        runs = [
            synthetic(snapshots=snapshots, definitions=definitions, updates=updates, seed=seed + r, names=names, **more)
            for r in range(replicas)
        ]
        return xr.concat(runs, dim="replica", combine_attrs="override", data_vars="all")
    t = np.linspace(0, 1, snapshots) if snapshots > 1 else np.ones(1)
    same = np.eye(k, dtype=bool)
    fall = 0.3 / (1 + np.exp(-9 * (t - 0.35)))[:, None, None]
    curve = np.where(same, 1 + 0.03 * np.minimum(1, 4 * t)[:, None, None], 1 - fall * rng.uniform(0.7, 1.2, (k, k)))
    shape = (snapshots, len(updates), len(definitions), k, k)
    level = np.array([PER_DEFINITION.get(d, (1.0, 1.0))[0] for d in definitions])[:, None, None]
    shift = 1 + 0.05 * np.arange(len(updates))[:, None, None, None]
    mean = curve[:, None, None] * level * shift + rng.normal(0, 0.02, shape)
    error = 0.02 * rng.uniform(0.5, 1.5, shape)
    dims = ("step", "update", "definition", "source_class", "target_class")
    data = {
        "mean": (dims, mean),
        "median": (dims, mean * 0.98),
        "ratio_of_means": (dims, mean * 1.01),
        "standard_error": (dims, error),
        "interval_low": (dims, mean - 1.96 * error),
        "interval_high": (dims, mean + 1.96 * error),
        "n_pairs": (dims, np.full(shape, 400)),
        "n_undefined": (dims, np.zeros(shape, int)),
        "heavy_tailed": (dims, np.zeros(shape, bool)),
    }
    averages = {"intra": mean[..., same].mean(-1), "inter": mean[..., ~same].mean(-1)}
    averages["ratio"] = averages["inter"] / averages["intra"]
    for name, value in averages.items():
        data |= {
            name: (dims[:3], value),
            f"{name}_low": (dims[:3], value - 0.02),
            f"{name}_high": (dims[:3], value + 0.02),
        }
    loss = 1.05 * np.exp(-1.3 * t) + 0.01 * rng.normal(size=snapshots)
    accuracy = 0.42 + 0.45 * (1 - np.exp(-2.5 * t)) + 0.005 * rng.normal(size=snapshots)
    scalars = {
        "probe_loss": loss,
        "probe_accuracy": accuracy,
        "seconds": np.full(snapshots, 1.3),
        "epoch": steps / 58,
        "train_loss": loss * 0.97,
        "train_accuracy": accuracy * 1.02,
    }
    data |= {name: ("step", value) for name, value in scalars.items()}
    configuration = {
        "data": "CIFAR-10",
        "data_origin": "files read from disk",
        "classes": names,
        "network": "resnet18_plain",
        "optimizer": "adam",
        "lr": 1e-4,
        "epochs": 7,
        "batch_size": 256,
        "probes_per_class": 20,
        "seed": 1234,
    }
    coords = {
        "step": steps,
        "update": list(updates),
        "definition": list(definitions),
        "source_class": names,
        "target_class": names,
    }
    attrs = {
        "title": more.pop("title", f"{k} classes of CIFAR-10"),
        "configuration": json.dumps(configuration),
        "versions": json.dumps({"torch": "2.13", "local-elasticity": "0.1.0"}),
        "git_revision": "0123abc",
        "route": "replay",
        "threads": 2,
        "self_pairs": "in",
    }
    return xr.Dataset(data, coords, attrs)


def heavy(dataset):
    """The same run with exploding, heavy-tailed means in the second half, as the published He-Su panels."""
    grow = np.logspace(0, 4, dataset.sizes["step"])[:, None, None, None, None] * np.ones(dataset["mean"].shape)
    grow = xr.DataArray(grow, dims=dataset["mean"].dims)
    out = dataset.copy(deep=True)
    for name in ("mean", "interval_low", "interval_high", "ratio_of_means"):
        out[name] = out[name] * grow
    out["interval_low"] = out["interval_low"] - out["mean"] * 0.99
    out["median"] = out["median"] * grow**0.3
    out["heavy_tailed"] = grow > 100
    for name in ("intra", "intra_low", "intra_high", "inter", "inter_low", "inter_high"):
        out[name] = out[name] * grow.isel(source_class=0, target_class=0, drop=True)
    return out


def with_gaps(dataset, step=2):
    """The same run with an undefined cell at one snapshot and another that is never defined."""
    out = dataset.copy(deep=True)
    for name in ("mean", "median", "ratio_of_means", "standard_error", "interval_low", "interval_high"):
        out[name][step, :, :, 0, 1] = np.nan
        out[name][:, :, :, 1, 0] = np.nan
    out["n_undefined"][step, :, :, 0, 1] = 400
    out["n_undefined"][:, :, :, 1, 0] = 400
    return out
