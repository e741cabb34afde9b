"""Stand-ins for tensors that a look may write to: nothing is copied unless it is written; every write is noticed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
_is_cow: Any = getattr(torch._C, "_is_cow_tensor", None)


def has_lazy_clones() -> bool:
    """Whether this PyTorch shares storage until it is written (a private feature of it)."""
    return _lazy_clone is not None and _is_cow is not None


def lazy_clone(x: Tensor) -> Tensor:
    """A tensor of the same values and strides that shares the storage until one of the two is written.

    Where PyTorch cannot share this storage (memory of NumPy or of several processes), it is a plain copy.
    """
    if has_lazy_clones():
        try:
            return _lazy_clone(x)
        except RuntimeError:
            pass
    return x.clone()


def private(x: Tensor) -> Tensor:
    """What a model may be given in the place of ``x``: it may write to it. A small part of a large tensor is copied."""
    if x.layout is not torch.strided or x.untyped_storage().nbytes() > 4 * x.numel() * x.element_size() + 4096:
        return x.clone()
    return lazy_clone(x)


class Shadow:
    """A tensor whose data is a stand-in meanwhile.

    Attributes:
        tensor: the tensor itself, with all who hold it.
    """

    def __init__(self, tensor: Tensor, own: Tensor, is_shareable: bool) -> None:
        self.tensor, self._own = tensor, own
        self._counts = not tensor.is_inference()
        self._first_version = self.version = tensor._version if self._counts else 0
        self._base = own if is_shareable or not has_lazy_clones() else own.clone()
        self.renew()

    def renew(self) -> None:
        """Stand in anew, with the values of the beginning."""
        self.tensor.data = lazy_clone(self._base)
        self.note_version()

    def note_version(self) -> None:
        """Count writes from here."""
        if self._counts:
            self.version = self.tensor._version

    def is_written(self) -> bool:
        """Whether its values may have been written since; memory that was unshared without need is compared."""
        if self._counts and self.tensor._version != self.version:
            return True
        if has_lazy_clones() and _is_cow(self.tensor):
            return False
        now = self.tensor.data
        return now.shape != self._own.shape or now.dtype != self._own.dtype or not _same_bits(now, self._own)

    def is_touched(self) -> bool:
        """Whether its memory is no longer shared: written, or only unshared."""
        return (self._counts and self.tensor._version != self.version) or not (
            has_lazy_clones() and _is_cow(self.tensor)
        )

    def lift(self) -> None:
        """The tensor has its own data again, and its own count of writes."""
        self.tensor.data = self._own
        if self._counts and self.tensor._version != self._first_version:
            _set_version(self.tensor, self._first_version)


class GroupedShadow(Shadow):
    """One of several tensors that share a storage: what is written to one is seen in the others."""

    def __init__(self, tensor: Tensor, own: Tensor, storage: _SharedStorage) -> None:
        self._storage = storage
        super().__init__(tensor, own, True)

    def renew(self) -> None:
        """Stand in anew, in the storage that the group shares now."""
        self.tensor.data = self._storage.part(self._own)
        self.note_version()


class _SharedStorage:
    """A stand-in for a storage that several tensors view."""

    def __init__(self, x: Tensor) -> None:
        flat = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
        shared = lazy_clone(flat)
        self._base = flat if has_lazy_clones() and _is_cow(shared) else flat.clone()
        self.renew()

    def renew(self) -> None:
        """The values of the beginning, in memory of its own."""
        self.flat = lazy_clone(self._base)

    def part(self, like: Tensor) -> Tensor:
        """A view with the place and strides of another tensor in the first storage."""
        bare = torch.empty(0, dtype=like.dtype, device=like.device)
        return bare.set_(self.flat.untyped_storage(), like.storage_offset(), like.size(), like.stride())


class Shadows:
    """The stand-ins of all tensors that a subject reached."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[Any, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            if _can_stand_in(tensor):
                groups[tensor.untyped_storage()._cdata].append(tensor)
        self.single: list[Shadow] = []
        self.groups: list[tuple[_SharedStorage, list[Shadow]]] = []
        self._of: dict[int, Shadow] = {}
        self._overlapping: set[int] = set()
        try:
            for group in groups.values():
                self._add(group)
        except BaseException:
            self.lift()
            raise

    def _add(self, group: list[Tensor]) -> None:
        owns = [tensor.data for tensor in group]
        if len(group) == 1:
            shareable = has_lazy_clones() and _is_cow(lazy_clone(owns[0]))
            self.single.append(Shadow(group[0], owns[0], shareable))
            self._of[id(group[0])] = self.single[-1]
            return
        storage = _SharedStorage(owns[0])
        members: list[Shadow] = []
        self.groups.append((storage, members))
        for tensor, own in zip(group, owns, strict=True):
            members.append(GroupedShadow(tensor, own, storage))
            self._of[id(tensor)] = members[-1]
        self._overlapping |= overlapping(group)

    def rewind(self, spared: frozenset[int] = frozenset()) -> list[Tensor]:
        """Give every tensor that was written its first values again; returns these tensors.

        Args:
            spared: ids of tensors that are to be left alone.
        """
        written = []
        for shadow in self.single:
            if shadow.is_touched() and id(shadow.tensor) not in spared:
                if shadow.is_written():
                    written.append(shadow.tensor)
                shadow.renew()
        for storage, members in self.groups:
            if any(id(shadow.tensor) in spared for shadow in members) or not any(s.is_touched() for s in members):
                continue
            written += [shadow.tensor for shadow in members if shadow.is_written()]
            storage.renew()
            for shadow in members:
                shadow.renew()
        return written

    def renew(self, tensors: Sequence[Tensor]) -> None:
        """Let the groups of these tensors stand in anew where they were written."""
        names = set(map(id, tensors))
        for storage, members in self.groups:
            if any(id(shadow.tensor) in names for shadow in members):
                storage.renew()
                for shadow in members:
                    shadow.renew()

    def aliases(self, names: Collection[int]) -> set[int]:
        """Those of these tensors (by id) whose memory is seen by another tensor that is reached."""
        return {name for name in self._overlapping if name in names}

    def written(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of these has been written since the last rewind."""
        shadows = [self._of[id(tensor)] for tensor in tensors if id(tensor) in self._of]
        return any(shadow.is_touched() and shadow.is_written() for shadow in shadows)

    def lift(self) -> None:
        """Every tensor has its own data again."""
        for shadow in [*self.single, *(shadow for _, members in self.groups for shadow in members)]:
            shadow.lift()


def overlapping(tensors: Iterable[Tensor]) -> set[int]:
    """Those of these tensors (by id) whose memory is also another's."""
    ends: dict[Any, list[tuple[int, int, int]]] = defaultdict(list)
    for tensor in tensors:
        if _can_stand_in(tensor):
            ends[tensor.untyped_storage()._cdata].append((*_extent(tensor), id(tensor)))
    found: set[int] = set()
    for (_, furthest, last), *later in map(sorted, ends.values()):
        for start, stop, name in later:  # a wide view may overlap many that do not overlap one another
            if start < furthest:
                found |= {last, name}
            if stop > furthest:
                furthest, last = stop, name
    return found


def share_memory(x: Tensor, other: Tensor) -> bool:
    """Whether some memory is both tensors'."""
    if not (_can_stand_in(x) and _can_stand_in(other)):
        return False
    if x.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    (start, stop), (first, last) = _extent(x), _extent(other)
    return start < last and first < stop


def same_part(x: Tensor, whole: Tensor, other: Tensor) -> Tensor | None:
    """The part of ``other`` that ``x`` is of ``whole``; None where it is no part, or the two are laid out otherwise."""
    (start, stop), (first, last) = _extent(x), _extent(whole)
    if start < first or stop > last or x.dtype != whole.dtype or other.stride() != whole.stride():
        return None
    return other.detach().as_strided(x.size(), x.stride(), x.storage_offset() - whole.storage_offset())


def _can_stand_in(x: Tensor) -> bool:
    if x.layout is not torch.strided or x.device.type == "meta" or x.is_quantized or x.is_nested:
        return False
    if type(x) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        dispatch: Any = getattr(type(x), "__torch_dispatch__", None)
        return dispatch is torch._C._disabled_torch_dispatch_impl
    try:
        return x.untyped_storage().nbytes() > 0
    except (RuntimeError, NotImplementedError):
        return False


def _extent(x: Tensor) -> tuple[int, int]:
    """First and last byte of a tensor in its storage."""
    last: Any = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    start: Any = x.storage_offset() * x.element_size()
    return start, start + (last + 1) * x.element_size()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    if one.is_floating_point():
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        one, other = one.view(kinds[one.element_size()]), other.view(kinds[other.element_size()])
    return torch.equal(one, other)


def _set_version(x: Tensor, version: int) -> None:
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 (private)
    setter = autograd._unsafe_set_version_counter
    try:
        setter((x,), (version,))
    except TypeError:  # the older signature
        setter(x, version)  # pyright: ignore[reportArgumentType]
