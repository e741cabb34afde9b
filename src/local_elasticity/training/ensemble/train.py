"""Many replicas of a network, trained in lock step on shared data: own initial weights, own sample order, one log.

What is logged is what the second paper's code logs (arXiv:2110.05960, utils.train; spec lesde 3.1): at every step, for
every replica, its sample, its label, its outputs before the update and its loss.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from local_elasticity.base.checks import (
    check_choice,
    check_flag,
    check_mapping,
    check_names,
    check_place,
    check_seed,
    check_whole,
    check_whole_list,
    in_words,
    is_whole,
)
from local_elasticity.base.errors import InputError
from local_elasticity.base.progress import Progress
from local_elasticity.base.streams import random_state, set_random_state
from local_elasticity.base.tensors import (
    check_callable,
    check_device,
    check_dtype,
    check_module,
    try_loss,
    try_model,
)
from local_elasticity.collapse import GEOMETRY, layer_outputs, metrics_of_many
from local_elasticity.impact.plan import told_of_memory
from local_elasticity.impact.problem import widened
from local_elasticity.impact.subject import preserved
from local_elasticity.training.ensemble.store import BLOCK, EnsembleStore
from local_elasticity.training.lockstep import ROUTES, Route, RouteName, choose_route, try_replica
from local_elasticity.training.lockstep.losses import LossFunction, is_cross_entropy, is_squared_error
from local_elasticity.training.lockstep.optimizers import Rule
from local_elasticity.training.lockstep.routes import Loop, Problem, Stack, copied
from local_elasticity.training.schedule import Schedule, check_schedule, every

if TYPE_CHECKING:
    from local_elasticity.training.tracker import Tracker
from local_elasticity.training.ensemble.log import Ensemble, Plan, _rows, load_weights, output_of
from local_elasticity.training.ensemble.looks import Looks, cast, check_looks, checked_pair, digest, due, is_class
from local_elasticity.training.ensemble.order import STREAM, WEIGHTS, Order, stream_seed

TrackerMaker = Callable[[nn.Module, "bool | int"], "Tracker"]
_CHUNK_BYTES = 6 * 2**20
_ACCELERATOR_BYTES = 2**31
_CHECKPOINT_SECONDS = 30.0
_PILOT = 20  # steps before the estimate of the rest


@told_of_memory()
def train_ensemble(
    make_model: Callable[[], nn.Module],
    data: Any,
    loss_fn: LossFunction,
    *,
    lr: float,
    steps: int,
    replicas: int | Sequence[int] = 100,
    seed: int = 0,
    batch_size: int = 1,
    optimizer: Literal["sgd", "adam"] = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    replacement: bool = True,
    log: bool | None = None,
    validation: Any = None,
    validate: Schedule | None = None,
    probes: Any = None,
    probe: Schedule | None = None,
    collapse_layers: Sequence[str] = (),
    callback: Callable[[int, Ensemble], None] | None = None,
    call: Schedule | None = None,
    trackers: Mapping[int, TrackerMaker] | None = None,
    store: str | Path | None = None,
    resume: bool = False,
    stop_at: int | None = None,
    configuration: Mapping[str, Any] | None = None,
    route: RouteName | None = None,
    chunk_size: int | None = None,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Ensemble:
    """Train many replicas of a network at once.

    Every replica has its own initial weights and its own samples, drawn with replacement unless told otherwise, both
    from streams seeded (seed, replica): what a replica does depends neither on how many others there are, nor on how
    they are chunked. The caller's random streams stay as they are. A replica whose loss stops being finite is marked
    in ``diverged``; the others go on.

    Schedules count updates from 0 as in ``Tracker``; besides what they ask for, there is a look before the first
    update and one after the last.

    Args:
        make_model: makes one network; takes nothing, and is called once a replica.
        data: (X, Y), shared by all.
        loss_fn: ``loss_fn(outputs, labels)``, a mean over the batch.
        lr: learning rate.
        steps: updates.
        replicas: how many (0 ... R - 1), or their numbers: a shard of a larger ensemble.
        seed: of all replicas.
        batch_size: samples in an update.
        optimizer: "sgd" or "adam".
        momentum: of "sgd".
        weight_decay: as in ``torch.optim``.
        betas: of "adam".
        eps: of "adam".
        replacement: whether samples are drawn with replacement; else every epoch is a permutation, its rest dropped.
        log: whether to log every step (yes by default).
        validation: (X, Y) for ``validation_loss`` and, with classes, ``validation_accuracy``.
        validate: when; 20 times by default.
        probes: (X, Y) with classes, for class means and within-class variance (n - 1, per coordinate) of the outputs
            of every replica.
        probe: when; 100 times by default.
        collapse_layers: layers whose neural collapse is logged with the probes, besides the outputs'.
        callback: called with (updates made, ensemble) on the schedule ``call``; must not change the weights.
        call: when to call it; every update by default.
        trackers: replica position -> function of (model, resume) that makes its ``Tracker``, whose schedule decides
            when it looks; ``resume`` is False at the start, and the step to resume from later.
        store: folder of a run on disk; in memory without.
        resume: continue what is in ``store``.
        stop_at: stop after this many updates; ``resume`` continues to the same numbers.
        configuration: anything that describes the run; stored with it, and compared on resuming.
        route: "kernels" (own kernels for chains of known layers), "vmap" or "loop"; by default the first that works.
        chunk_size: replicas in one batched step.
        threads: chunks that advance at the same time; PyTorch's number of threads by default.
        dtype: of weights and inputs; the networks' own by default.
        device: of all; the networks' own by default.
        progress: show a bar, with an estimate first.

    Returns:
        The ensemble.

    Raises:
        InputError: for data, settings or networks that cannot be trained, or a store of another configuration.
    """
    rule = Rule(optimizer, lr, momentum, weight_decay, betas, eps)
    numbers = _numbers(replicas)
    check_whole("steps", steps)
    check_whole("batch_size", batch_size)
    check_seed("seed", seed)
    check_whole("stop_at", stop_at, 0, steps, or_none=True)
    check_choice("route", route, ROUTES, or_none=True)
    check_whole("chunk_size", chunk_size, or_none=True)
    check_whole("threads", threads, or_none=True)
    for name, flag in (("replacement", replacement), ("resume", resume), ("progress", progress)):
        check_flag(name, flag)
    if log is not None:
        check_flag("log", log)
    check_callable("make_model", make_model, 0, "lambda: le.networks.MLP(8, 3)")
    check_callable("loss_fn", loss_fn, 2, "torch.nn.functional.cross_entropy")
    if callback is not None:
        check_callable("callback", callback, 2, "lambda step, ensemble: print(step)")
    for name, schedule in (("validate", validate), ("probe", probe), ("call", call)):
        check_schedule(name, schedule, or_none=True)
    if call is not None and callback is None:
        raise InputError(
            expected="a callback with its schedule call", got="none", do="pass callback=, or leave call out"
        )
    configuration = check_mapping("configuration", configuration, or_none=True)
    store, device = check_place("store", store, or_none=True), check_device("device", device)
    collapse_layers = check_names("collapse_layers", collapse_layers, least=0, distinct=True)
    trackers = _checked_trackers(trackers, len(numbers))
    check_dtype("dtype", dtype)
    last = steps if stop_at is None else stop_at
    x, y = checked_pair(data, "data")
    if batch_size > len(x):
        raise InputError(
            expected=f"batch_size of at most the {len(x)} samples", got=str(batch_size), do="use smaller batches"
        )
    stack = Stack.of(_make(make_model, numbers, seed))
    device = device if device is not None else next(iter(stack.weights.values())).device
    dtype = dtype or next(iter(stack.weights.values())).dtype
    stack = _placed(stack, dtype, device)
    problem = Problem(cast(x, dtype, device), cast(y, dtype, device), loss_fn, rule, batch_size)
    outputs = _check_outputs(stack, problem)
    trial = try_replica(stack, problem)
    stack.idle = trial.idle
    if trial.hidden and store is not None:
        raise InputError(
            expected="networks whose state is weights and buffers, for a store",
            got=f"a forward pass that changes {trial.hidden}",
            do="register_buffer() what is kept, or leave store= out",
        )
    checking = Looks.of(validation, validate, steps, 20, "validation", dtype, device)
    probing = Looks.of(probes, probe, steps, 100, "probes", dtype, device)
    check_looks(checking, probing, outputs, collapse_layers, stack.template)
    calls = frozenset(due(call or every(1), steps)) if callback else frozenset()
    with _one_thread() as available:
        chosen = choose_route(stack, problem, trial, route)
        if chosen != "loop":
            stack.models = ()
        chunk = min(chunk_size or default_chunk(stack, chosen), len(numbers))
        bounds = [(i, min(i + chunk, len(numbers))) for i in range(0, len(numbers), chunk)]
        workers = 1 if chosen == "loop" or device.type != "cpu" else max(1, min(threads or available, len(bounds)))
        settings = {
            "rule": {**asdict(rule), "betas": list(betas)},
            "steps": steps,
            "replicas": list(numbers),
            "seed": seed,
            "batch_size": batch_size,
            "replacement": replacement,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "route": chosen,
            "chunk_size": chunk,
            "log": log is not False,
            "loss": getattr(loss_fn, "__name__", type(loss_fn).__name__),
            "parameters": {name: list(w.shape[1:]) for name, w in stack.weights.items()},
            "data": digest(problem.inputs, problem.labels),
            "validation": checking.describe(),
            "probes": probing.describe(),
            "collapse_layers": list(collapse_layers),
            "configuration": configuration,
        }
        routes = [ROUTES[chosen](stack.rows(a, b), problem) for a, b in bounds]
        for one, (a, b) in zip(routes, bounds, strict=True):
            if isinstance(one, Loop):
                one.seed([stream_seed(seed, STREAM, number) for number in numbers[a:b]])
        layers = ("outputs", *collapse_layers)
        ensemble = Ensemble(
            step=0,
            steps=steps,
            replicas=numbers,
            weights=stack.weights,
            buffers=stack.buffers,
            diverged=np.full(len(numbers), -1, dtype=np.int64),
            log=_empty_log(steps, len(numbers), problem, outputs, log is not False, checking, probing, layers),
            times={"validation": checking.times, "probe": probing.times},
            layers=layers,
            plan=Plan(chosen, chunk, workers),
            _template=stack.template,
            _routes=routes,
        )
        recording = EnsembleStore.open(store, resume, settings, ensemble, routes)
        with nullcontext() if recording is None else closing(recording):
            session = _Session(ensemble, routes, bounds, recording, checking, probing, replacement, seed, loss_fn)
            session.callback, session.calls = callback, calls
            session.add_trackers(trackers, recording is not None and recording.resumed)
            session.run(last, workers, progress)
    return ensemble


# --- the loop ------------------------------------------------------------------------------------------------------


class _Session:
    """Advances the chunks from look to look."""

    def __init__(
        self,
        ensemble: Ensemble,
        routes: Sequence[Route],
        bounds: Sequence[tuple[int, int]],
        recording: EnsembleStore | None,
        checking: Looks,
        probing: Looks,
        replacement: bool,
        seed: int,
        loss_fn: LossFunction,
    ) -> None:
        self.ensemble, self.routes, self.bounds, self.recording = ensemble, routes, bounds, recording
        self.checking, self.probing, self.loss_fn = checking, probing, loss_fn
        self.problem = routes[0].problem
        self.order = Order(len(self.problem.inputs), self.problem.batch_size, replacement, seed, ensemble.replicas)
        self.callback: Callable[[int, Ensemble], None] | None = None
        self.calls: frozenset[int] = frozenset()
        self.trackers: dict[int, tuple[nn.Module, Tracker, frozenset[int]]] = {}
        self.training = self.looking = 0.0

    def add_trackers(self, makers: Mapping[int, TrackerMaker], resumed: bool) -> None:
        for position, maker in makers.items():
            model = self.ensemble._live(position) or self.ensemble.model(position)
            tracker = maker(model, self.ensemble.step if resumed else False)
            looks = due(tracker.schedule, self.ensemble.steps, first=False, last=False)
            self.trackers[position] = (model, tracker, frozenset(looks))

    def run(self, last: int, workers: int, progress: bool) -> None:
        ensemble = self.ensemble
        stops = self._stops(last)
        saved = time.perf_counter()
        left = last - ensemble.step
        pool: Any = ThreadPoolExecutor(workers, initializer=_single) if workers > 1 else nullcontext()
        with Progress(progress, left, "training") as bar, pool as executor:
            if executor is not None:
                ensemble._map = executor.map
            if ensemble.step == 0:
                self._look()
            began, told = ensemble.step, not progress
            for stop in (s for s in stops if s > began):
                started, before = time.perf_counter(), ensemble.step
                self._advance(stop)
                self.training += time.perf_counter() - started
                self._look()
                bar.advance(stop - before)
                if not told and stop >= min(began + _PILOT, last):
                    told = True
                    bar.estimate(self._left(began, last))
                if self.recording is not None and (stop == last or time.perf_counter() - saved > _CHECKPOINT_SECONDS):
                    self.recording.save(ensemble, self.routes)
                    saved = time.perf_counter()
        if self.recording is not None and self.recording.written < ensemble.step:
            self.recording.save(ensemble, self.routes)
        plan, ensemble._map = ensemble.plan, map
        ensemble.plan = Plan(plan.route, plan.chunk_size, plan.threads, self.training, self.looking)
        if ensemble.step == ensemble.steps:
            ensemble.runs = {position: tracker.finish() for position, (_, tracker, _) in self.trackers.items()}

    def _left(self, began: int, last: int) -> float:
        """Seconds to the end, by what steps and looks took so far."""
        step = self.ensemble.step
        looks = np.concatenate([self.checking.times, self.probing.times, np.array(sorted(self.calls), dtype=int)])
        done = int(((looks > began) & (looks <= step)).sum()) + (began == 0) * int((looks == 0).sum())
        left = int(((looks > step) & (looks <= last)).sum())
        return self.training / (step - began) * (last - step) + self.looking / max(done, 1) * left

    def _stops(self, last: int) -> list[int]:
        looks = {*self.checking.times.tolist(), *self.probing.times.tolist(), *self.calls}
        for _, _, due_here in self.trackers.values():
            looks |= due_here
        start = self.ensemble.step
        looks |= set(range(start - start % BLOCK + BLOCK, last, BLOCK)) | {min(start + _PILOT, last), last}
        return sorted(stop for stop in looks if start <= stop <= last)

    def _advance(self, stop: int) -> None:
        ensemble, start = self.ensemble, self.ensemble.step
        index = self.order.between(start, stop)
        tensor = torch.from_numpy(index).to(self.problem.inputs.device)
        jobs = list(zip(self.routes, self.bounds, strict=True))
        blocks = list(ensemble._map(lambda job: _block(job[0], tensor[:, job[1][0] : job[1][1]]), jobs))
        logits = np.concatenate([block[0] for block in blocks], axis=1)
        losses = np.concatenate([block[1] for block in blocks], axis=1)
        bad = ~np.isfinite(losses)
        fresh = bad.any(axis=0) & (ensemble.diverged < 0)
        ensemble.diverged[fresh] = start + bad[:, fresh].argmax(axis=0)
        if "logits" in ensemble.log:
            rows, single = slice(start, stop), self.problem.batch_size == 1
            ensemble.log["logits"][rows] = logits[:, :, 0] if single else logits
            ensemble.log["losses"][rows] = losses
            ensemble.log["samples"][rows] = index[:, :, 0] if single else index
            labels = self.problem.labels.cpu().numpy()[index]
            ensemble.log["labels"][rows] = labels[:, :, 0] if single else labels
        ensemble.step = stop

    def _look(self) -> None:
        started, step = time.perf_counter(), self.ensemble.step
        if step in self.checking:
            self._validate(self.checking.position(step))
        if step in self.probing:
            self._probe(self.probing.position(step))
        for position, (model, tracker, looks) in self.trackers.items():
            if step in looks:
                if self.ensemble._live(position) is None:
                    load_weights(model, self.ensemble.weights, self.ensemble.buffers, position)
                tracker.updates_made = step
                tracker.snapshot()
        if self.callback is not None and step in self.calls:
            self.callback(step, self.ensemble)
        self.looking += time.perf_counter() - started

    def _validate(self, row: int) -> None:
        x, y = self.checking.pair
        outputs = self.ensemble.outputs(x)
        losses = [float(self.loss_fn(_unrows(out, y), y)) for out in outputs]
        self.ensemble.log["validation_loss"][row] = losses
        if "validation_accuracy" in self.ensemble.log:
            right = (outputs.argmax(dim=2) == y).double().mean(dim=1)
            self.ensemble.log["validation_accuracy"][row] = right.cpu().numpy()

    def _probe(self, row: int) -> None:
        x, y = self.probing.pair
        features, log = self._features(x), self.ensemble.log
        outputs = features["outputs"].double()
        for label in range(log["probe_mean"].shape[2]):
            own = widened(outputs[:, y == label])
            log["probe_mean"][row, :, label] = own.mean(dim=1).cpu().numpy()
            if own.shape[1] > 1:
                log["probe_variance"][row, :, label] = own.var(dim=1).cpu().numpy()
        self._collapse(row, y, features)

    def _features(self, x: Tensor) -> dict[str, Float[Tensor, "replicas samples features"]]:
        """What every replica's outputs and the layers asked for say of the samples, in one forward pass."""
        ensemble = self.ensemble
        names = ensemble.layers[1:]
        if not names:
            return {"outputs": ensemble.outputs(x)}
        seen = []
        for position in range(len(ensemble.replicas)):
            model = ensemble._live(position)
            if model is None:
                model = ensemble._template
                load_weights(model, ensemble.weights, ensemble.buffers, position)
            with preserved(model, "eval", restore_streams=True), output_of(model) as out:
                layers = layer_outputs(model, x.clone(), names)
            seen.append({"outputs": _rows(out[0]), **layers})
        return {name: torch.stack([one[name] for one in seen]) for name in ensemble.layers}

    def _collapse(self, row: int, y: Tensor, features: Mapping[str, Tensor]) -> None:
        ensemble, y = self.ensemble, y.cpu()  # many small numbers
        n_classes = int(y.max()) + 1
        for place, name in enumerate(ensemble.layers):
            for position, found in enumerate(metrics_of_many(list(features[name].cpu()), y, n_classes=n_classes)):
                for key, value in found.items():
                    ensemble.log[key][row, position, place] = value


def _block(route: Route, index: Int64[Tensor, "steps replicas batch"]) -> tuple[np.ndarray, np.ndarray]:
    """Some steps of one chunk: outputs (steps, replicas, batch, outputs), losses (steps, replicas)."""
    looked = [route.step(one) for one in index.unbind(0)]
    return (
        widened(torch.stack([logits for logits, _ in looked])).cpu().numpy(),
        widened(torch.stack([losses for _, losses in looked])).cpu().numpy(),
    )


def default_chunk(stack: Stack, route: RouteName) -> int:
    """Replicas in one step: as many as keep their weights in a processor's cache, in an even number of chunks.

    An accelerator takes more of them in the same time: two GiB at most.

    It depends on the replicas and the kind of device alone, never on the machine, since the last bits of a number
    depend on it.
    """
    if route == "loop":
        return len(stack)
    size = sum(w.numel() * w.element_size() for w in stack.weights.values())
    limit = _CHUNK_BYTES if next(iter(stack.weights.values())).device.type == "cpu" else _ACCELERATOR_BYTES
    chunks = 1 if size <= limit // 2 else 2 * math.ceil(size / limit / 2)
    return max(8, math.ceil(len(stack) / chunks))


# --- checks and small parts ----------------------------------------------------------------------------------------


def _numbers(replicas: int | Sequence[int]) -> tuple[int, ...]:
    if is_whole(replicas):
        return tuple(range(check_whole("replicas", replicas)))
    if not isinstance(replicas, Iterable):
        raise InputError(
            expected="replicas: a whole number >= 1, or a list of different ones >= 0",
            got=in_words(replicas),
            do="write for example replicas=100, or replicas=range(100, 200)",
        )
    numbers = check_whole_list("replicas", replicas, at_least=1)
    if len(set(numbers)) < len(numbers):
        raise InputError(expected="replicas: different numbers", got="some twice", do="name each once")
    return numbers


def _checked_trackers(trackers: Any, replicas: int) -> Mapping[int, TrackerMaker]:
    if trackers is None:
        return {}
    example = "{0: lambda model, resume: le.Tracker(model, ..., resume=resume)}"
    if not isinstance(trackers, Mapping):
        raise InputError(
            expected="trackers: a dict of functions", got=in_words(trackers), do=f"write trackers={example}"
        )
    for position, maker in trackers.items():
        check_whole("each key of trackers", position, 0, replicas - 1)
        check_callable("each of trackers", maker, 2, example)
    return trackers


def _make(make_model: Callable[[], nn.Module], numbers: Iterable[int], seed: int) -> list[nn.Module]:
    """Call ``make_model`` once a replica, each time in random streams of its own."""
    streams, models = random_state(), []
    try:
        for number in numbers:
            own = stream_seed(seed, WEIGHTS, number)
            torch.manual_seed(own)
            np.random.seed(own % 2**32)  # noqa: NPY002 (make_model may draw from the global stream)
            random.seed(own)
            models.append(_one_made(make_model))
    finally:
        set_random_state(streams)
    if len({id(p) for model in models for p in model.parameters()}) < sum(len(list(m.parameters())) for m in models):
        raise InputError(
            expected="make_model() to make a new network at each call",
            got="networks that share their weights",
            do="build it inside of the function",
        )
    return [copied(model) for model in models]  # the caller may hold them


def _one_made(make_model: Callable[[], nn.Module]) -> nn.Module:
    try:
        model = make_model()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            expected="make_model() to return a torch.nn.Module",
            got=f"{type(error).__name__} when it was called without arguments",
            do="let it take no arguments, for example lambda: MyNet(width=64), and make it work by itself first",
        ) from error
    return check_module("what make_model() returns", model)


def _placed(stack: Stack, dtype: torch.dtype, device: torch.device) -> Stack:
    """Weights in one dtype on one device."""

    def place(x: Tensor) -> Tensor:
        return x.to(device, dtype).contiguous() if x.is_floating_point() else x.to(device)

    placed = Stack(
        stack.template.to(device, dtype),
        {name: place(w) for name, w in stack.weights.items()},
        {name: place(b) for name, b in stack.buffers.items()},
        [model.to(device, dtype) for model in stack.models],
    )
    placed.settle()
    return placed


def _check_outputs(stack: Stack, problem: Problem) -> int:
    """The number of outputs, after one forward pass and one loss of the first replica."""
    model = copied(stack.template)
    load_weights(model, stack.weights, stack.buffers, 0)
    n = problem.batch_size
    with torch.no_grad(), preserved(model, "as_is", restore_streams=True):
        out = try_model(model, problem.inputs[:n].clone(), "inputs of data")
        if not isinstance(out, Tensor) or out.dim() not in (1, 2) or len(out) != n:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(
                expected=f"outputs of shape ({n}, K) or ({n},)", got=str(shape), do="let the network return its logits"
            )
        k, y = (out.shape[1] if out.dim() == 2 else 1), problem.labels
        if is_class(y) and is_cross_entropy(problem.loss_fn) and not 0 <= int(y.min()) <= int(y.max()) < k:
            raise InputError(
                expected=f"labels in 0 ... {k - 1}, for the {k} outputs of the network",
                got=f"labels from {int(y.min())} to {int(y.max())}",
                do="give the network one output a class, or relabel",
            )
        if is_squared_error(problem.loss_fn) and out.shape != y[:n].shape:
            raise InputError(
                expected=f"targets of the outputs' shape {tuple(out.shape[1:])}",
                got=f"{tuple(y.shape[1:])}",
                do="reshape the targets, or the network's last layer",
            )
        with torch.enable_grad():
            loss = try_loss(problem.loss_fn, out.detach().requires_grad_(), y[:n], scalar=True)
        if not loss.requires_grad:
            raise InputError(
                expected="a loss that depends on the outputs",
                got="a loss without gradient",
                do="return loss_fn(outputs, labels) without detaching",
            )
        return k


def _empty_log(
    steps: int,
    replicas: int,
    problem: Problem,
    outputs: int,
    wanted: bool,
    checking: Looks,
    probing: Looks,
    layers: Sequence[str],
) -> dict[str, np.ndarray]:
    kind = torch.empty(0, dtype=problem.inputs.dtype)
    number = kind.numpy().dtype if kind.dtype != torch.bfloat16 else np.dtype(np.float32)
    log: dict[str, np.ndarray] = {}
    if wanted:
        batch = () if problem.batch_size == 1 else (problem.batch_size,)
        log["logits"] = np.full((steps, replicas, *batch, outputs), np.nan, dtype=number)
        log["losses"] = np.full((steps, replicas), np.nan, dtype=number)
        log["samples"] = np.full((steps, replicas, *batch), -1, dtype=np.int32)
        y = problem.labels
        shape = (steps, replicas, *batch, *y.shape[1:])
        log["labels"] = np.full(shape, -1, np.int16) if is_class(y) else np.full(shape, np.nan, number)
    if checking.pair is not None:
        looks = len(checking.times)
        log["validation_loss"] = np.full((looks, replicas), np.nan)
        if checking.classes and outputs > 1:
            log["validation_accuracy"] = np.full((looks, replicas), np.nan)
    if probing.pair is not None:
        looks = len(probing.times)
        for name in ("probe_mean", "probe_variance"):
            log[name] = np.full((looks, replicas, probing.classes, outputs), np.nan)
        for name in GEOMETRY:
            log[name] = np.full((looks, replicas, len(layers)), np.nan)
    return log


def _unrows(outputs: Tensor, y: Tensor) -> Tensor:
    """Give (samples, 1) back as (samples,) where the targets are numbers of that shape."""
    return outputs.squeeze(1) if outputs.shape[1] == 1 and y.dim() == 1 and y.is_floating_point() else outputs


@contextmanager
def _one_thread() -> Any:
    """One intra-op thread inside: chunks go to threads of their own, and numbers do not depend on how many."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield threads
    finally:
        torch.set_num_threads(threads)


def _single() -> None:
    torch.set_num_threads(1)
