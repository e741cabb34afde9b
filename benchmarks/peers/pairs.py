"""One peer's Gram matrix of per-sample gradients, run by ``benchmarks/pairs.py`` in a Python of the peers' own.

``peers/pairs.py PEER NETWORK FOLDER SOURCE THREADS`` reads weights and samples from FOLDER/problem.pt, takes the
networks' file from SOURCE, and prints {"seconds": processor seconds, "error": the largest relative difference from
plain per-sample gradients of the first samples} as JSON. Each peer is used as its documentation shows, once to warm up
on a few samples and once timed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

BATCH = 64


def load_networks(source: str) -> types.ModuleType:
    """The networks' file alone: the rest of the library needs packages that the peers' Python lacks."""
    for name, path in (("local_elasticity.base.errors", "errors.py"), ("local_elasticity.networks", "networks.py")):
        sys.modules.setdefault("local_elasticity", types.ModuleType("local_elasticity"))
        if "jaxtyping" not in sys.modules and importlib.util.find_spec("jaxtyping") is None:
            stand_in = types.ModuleType("jaxtyping")
            stand_in.Float = type("Float", (), {"__class_getitem__": classmethod(lambda cls, key: cls)})  # type: ignore[attr-defined]
            sys.modules["jaxtyping"] = stand_in
        spec = importlib.util.spec_from_file_location(name, Path(source) / "local_elasticity" / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules["local_elasticity.networks"]


def captum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """TracIn on one checkpoint with learning rate 1: the dot products of the gradients."""
    from captum.influence import TracInCP

    tracin = TracInCP(
        model,
        TensorDataset(x, y),
        checkpoints=["here"],
        checkpoints_load_func=lambda model, path: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=BATCH,
        sample_wise_grads_per_batch=True,
    )
    return tracin.influence((x, y))


def dattri(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """TracIn without normalisation or projection, weight 1."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(parameters: object, data: tuple[Tensor, Tensor]) -> Tensor:
        image, label = data
        output = torch.func.functional_call(model, parameters, (image.unsqueeze(0),))  # type: ignore[arg-type]
        return cross_entropy(output, label.unsqueeze(0))

    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    attributor = TracInAttributor(task=task, weight_list=torch.ones(1), normalized_grad=False, device="cpu")
    attributor.projector_kwargs = None  # by default it projects the gradients to 512 random directions
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=False)
    with torch.no_grad():
        return attributor.attribute(loader, loader)


def kronfluence(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Pairwise scores with the identity in the place of the Hessian."""
    import tempfile

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    task, data = Classification(), TensorDataset(x, y)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("gram", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors("identity", data, factor_args=FactorArguments(strategy="identity"))
        analyzer.compute_pairwise_scores(
            "scores",
            "identity",
            query_dataset=data,
            train_dataset=data,
            per_device_query_batch_size=BATCH,
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for sample, label in zip(x.split(1), y.split(1), strict=True):
        got = torch.autograd.grad(cross_entropy(model(sample), label), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in got]))
    flat = torch.stack(rows).double()  # a sum over millions of squares loses three digits in single precision
    return flat @ flat.T


def main(peer: str, network: str, folder: str, source: str, threads: int) -> None:
    torch.set_num_threads(threads)
    networks = load_networks(source)
    builds = {
        "MLP": lambda: networks.MLP(3072, 10, depth=2, width=512),
        "SimpleConv": lambda: networks.SimpleConv(10),
        "ResNet-18 plain": lambda: networks.resnet18_plain(10),
    }
    problem = torch.load(Path(folder) / "problem.pt", weights_only=True)
    model = builds[network]().eval()
    model.load_state_dict(problem["state"])
    x, y = problem["x"], problem["y"]
    few = plain(model, x[:4], y[:4])
    work = {"captum": captum, "dattri": dattri, "kronfluence": kronfluence}[peer]
    import copy

    work(copy.deepcopy(model), x[:4], y[:4])
    fresh = copy.deepcopy(model)
    started = time.process_time()
    found = work(fresh, x, y)
    seconds = time.process_time() - started
    error = float((found[:4, :4] - few).abs().max() / few.abs().max())
    print(json.dumps({"seconds": seconds, "error": error}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
