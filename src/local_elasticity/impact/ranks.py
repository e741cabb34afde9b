"""One model over several processes (``torchrun``): every rank measures its share of the sources."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from local_elasticity.base.errors import InputError
from local_elasticity.impact.checks import check_sources
from local_elasticity.impact.measurement import Impact, measure
from local_elasticity.impact.problem import LossFunction, match_rows
from local_elasticity.impact.update import Update
from local_elasticity.impact.wrappers import inner_module

_BY_SOURCE = ("after", "change", "source_before", "source_after", "source_change", "losses")


def measure_across_ranks(
    model: nn.Module,
    loss_fn: LossFunction,
    sources: tuple[Tensor, Tensor],
    targets: Tensor | None = None,
    *,
    update: Update,
    engine: Literal["replay", "linear"] = "replay",
    group: Any = None,
    **settings: Any,
) -> Impact:
    """As ``measure``, the sources shared out over the ranks of a process group; every rank gets the whole impact.

    Call it on every rank with the same arguments, after ``torch.distributed.init_process_group`` (any backend; a model
    wrapped in ``DistributedDataParallel`` is unwrapped). Without a process group it is ``measure``.

    Args:
        model: the network, with the same weights on every rank.
        loss_fn: as in ``measure``.
        sources: all sources, the same on every rank.
        targets: all targets; the sources by default.
        update: as in ``measure``.
        engine: "replay" or "linear"; not chosen by timing, so that all ranks do the same.
        group: the process group; the default one unless given.
        **settings: other arguments of ``measure``.

    Returns:
        The impact of all sources, on every rank.

    Raises:
        InputError: on every rank, when they hold different weights or samples, and for what ``measure`` refuses on any
            of them.
    """
    dist = torch.distributed
    model = inner_module(model)
    inputs, labels = check_sources(sources)
    looked_at = inputs if targets is None else targets
    if not dist.is_available() or not dist.is_initialized():
        return measure(model, loss_fn, sources, targets, update=update, engine=engine, **settings)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    _check_same_weights(model, world, group)
    _check_same_call((inputs, labels, looked_at), f"{getattr(update, 'name', update)} {engine}", world, group)
    share = torch.arange(len(inputs), device="cpu").tensor_split(world)[rank]
    mine = (
        share if len(share) else torch.tensor([0], device="cpu")
    )  # more ranks than sources: what is measured then is left out
    place = mine.to(inputs.device)

    def measured() -> Impact:
        return measure(
            model, loss_fn, (inputs[place], labels[place]), looked_at, update=update, engine=engine, **settings
        )

    impact = _on_every_rank(measured, rank, world, group)
    parts: list[Any] = [None] * world
    own = {name: getattr(impact, name)[: len(share)].cpu() for name in _BY_SOURCE}
    dist.all_gather_object(parts, own, group=group)
    whole = {name: torch.cat([part[name] for part in parts]).to(impact.before.device) for name in _BY_SOURCE}
    impact.plan.notes.append(f"{len(share)} of {len(inputs)} sources on rank {rank} of {world}")
    return replace(impact, **whole, self_index=match_rows(inputs, looked_at))


def _on_every_rank(measured: Callable[[], Impact], rank: int, world: int, group: Any) -> Impact:
    """What is measured here; when any rank fails, all of them do, because those that did not would wait for it."""
    impact, failure = None, None
    try:
        impact = measured()
    except Exception as error:
        failure = error
    failures: list[Any] = [None] * world
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    torch.distributed.all_gather_object(failures, text, group=group)
    if failure is not None:
        raise failure
    failed = [(other, words) for other, words in enumerate(failures) if words is not None]
    if failed or impact is None:
        other, words = failed[0]
        raise InputError(
            expected="a measurement on every rank",
            got=f"on rank {other}, {words}",
            do=f"mend what rank {other} says; rank {rank} had nothing to complain of",
        )
    return impact


def _check_same_call(samples: tuple[Tensor, ...], words: str, world: int, group: Any) -> None:
    """Ranks that hold different samples, as a distributed sampler deals them out, would make one table of them."""
    _check_same(
        [*samples],
        words,
        world,
        group,
        expected="the same sources, targets, update and engine on every rank",
        do="pass all sources and targets to every rank: each takes its share of the sources by itself",
    )


def _check_same_weights(model: nn.Module, world: int, group: Any) -> None:
    _check_same(
        list(model.state_dict().values()),
        "",
        world,
        group,
        expected="the same weights and buffers on every rank",
        do="broadcast them first, or train with DistributedDataParallel",
    )


def _check_same(tensors: list[Any], words: str, world: int, group: Any, *, expected: str, do: str) -> None:
    digest = hashlib.sha256(words.encode())
    for value in tensors:
        if isinstance(value, Tensor):  # a module may keep extra state of another kind
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digests: list[Any] = [None] * world
    torch.distributed.all_gather_object(digests, digest.hexdigest(), group=group)
    if len(set(digests)) > 1:
        raise InputError(expected=expected, got=f"{len(set(digests))} different ones on {world} ranks", do=do)
