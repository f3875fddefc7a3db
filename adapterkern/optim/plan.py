"""Which tensors a step of ClippedAdamW reads, and whether that is still true.

A plan divides the parameters that have a gradient into buckets, one per device and, for DTensors, per set of process
groups over which the squared norm is summed. Building a bucket (checks, state, table of pointers) costs far more than a
step, so a plan is kept. Each step compares the identities, addresses and layouts that the pointers rely on, and makes a
new plan only if one of them has changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from adapterkern.optim.backends import Entry, Passes, make_passes

_DTYPE = attrgetter("dtype")
_MOMENTS, _MASTER = itemgetter("step", "exp_avg", "exp_avg_sq"), itemgetter("master")

Groups = Sequence[dict[str, Any]]  # an optimizer's param_groups


@dataclass(frozen=True)
class Bucket:
    """Parameters that share a device and process groups, and what their table of pointers relies on."""

    passes: Passes
    params: list[Tensor]
    process_groups: tuple[Any, ...]  # over which the squared norm of DTensor shards is summed
    sharded: bool  # some parameter is a DTensor
    states: list[dict[str, Any]]
    masters: list[dict[str, Any]]  # the states whose master is what AdamW updates
    layouts: list[list[Any]]  # of the parameters, and so of their gradients
    state_tensors: list[Tensor]  # kept, so that no new tensor can take over an old one's identity
    state_ids: list[int]
    addresses: list[int]  # of the parameters and of their state


@dataclass(frozen=True)
class Plan:
    """The buckets of a step, and the parameters and states that they were made for."""

    buckets: list[Bucket]
    param_ids: list[list[int]]  # of the parameters that have a gradient, by group
    state_ids: list[int]  # of the state dicts of all parameters
    shares_norm: bool  # the norm is over more than one bucket or rank


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- making a plan ----


def make_plan(groups: Groups, state: Mapping[Tensor, dict[str, Any]], stochastic: bool) -> Plan:
    """A plan for the parameters that have a gradient; their state must be complete and checked.

    Args:
        groups, state: the optimizer's.
        stochastic: whether low-precision parameters are rounded stochastically instead of having an fp32 master.
    """
    found: dict[tuple[torch.device, tuple[Any, ...]], list[tuple[Tensor, Entry]]] = {}
    for index, group in enumerate(groups):
        for p in group["params"]:
            if p.grad is not None:
                entry = _entry(p, state[p], stochastic and p.dtype != torch.float32, index)
                found.setdefault((p.device, _process_groups(p)), []).append((p, entry))
    buckets = [
        _bucket(device, process_groups, [p for p, _ in members], [entry for _, entry in members], state)
        for (device, process_groups), members in found.items()
    ]
    return Plan(
        buckets,
        param_ids=_with_gradient(groups),
        state_ids=list(map(id, state.values())),
        shares_norm=len(buckets) > 1 or any(bucket.process_groups for bucket in buckets),
    )


def _entry(p: Tensor, state: dict[str, Any], stochastic: bool, group: int) -> Entry:
    param = local(p.detach())
    main = param if stochastic or p.dtype == torch.float32 else local(state["master"])
    step, exp_avg, exp_avg_sq = map(local, _MOMENTS(state))
    return Entry(param, main, exp_avg, exp_avg_sq, step, stochastic, group)


def _bucket(
    device: torch.device,
    process_groups: tuple[Any, ...],
    params: list[Tensor],
    entries: list[Entry],
    state: Mapping[Tensor, dict[str, Any]],
) -> Bucket:
    states = [state[p] for p in params]
    masters = [s for s, entry in zip(states, entries, strict=True) if entry.main is not entry.param]
    sharded = any(hasattr(p, "to_local") for p in params)
    state_tensors = _state_tensors(states, masters)
    return Bucket(
        passes=make_passes(device, entries),
        params=params,
        process_groups=process_groups,
        sharded=sharded,
        states=states,
        masters=masters,
        layouts=_layouts([entry.param for entry in entries]),
        state_tensors=state_tensors,
        state_ids=list(map(id, state_tensors)),
        addresses=_addresses([*params, *state_tensors], sharded),
    )


def _process_groups(p: Tensor) -> tuple[Any, ...]:
    """The process groups whose shards of a DTensor together make up its gradient; () for a plain tensor."""
    if not hasattr(p, "to_local"):
        return ()
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if placement.is_shard())


# ---- whether a plan is still valid ----


def is_valid(plan: Plan, groups: Groups, state: Mapping[Tensor, dict[str, Any]]) -> bool:
    """Whether the same parameters of each group have a gradient, and they and their state are where they were."""
    # Identities rather than look-ups in `state`: hashing a tensor costs more than all the rest of this check.
    return (
        plan.param_ids == _with_gradient(groups)
        and plan.state_ids == list(map(id, state.values()))
        and all(map(_bucket_is_valid, plan.buckets))
    )


def _with_gradient(groups: Groups) -> list[list[int]]:
    return [[id(p) for p in group["params"] if p.grad is not None] for group in groups]


def _bucket_is_valid(bucket: Bucket) -> bool:
    try:
        same = bucket.state_ids == list(map(id, _state_tensors(bucket.states, bucket.masters)))
    except KeyError:  # a tensor is missing from a state: making the next plan reports which
        return False
    # An assignment to .data moves a tensor that stays the same one.
    return same and bucket.addresses == _addresses([*bucket.params, *bucket.state_tensors], bucket.sharded)


def _state_tensors(states: list[dict[str, Any]], masters: list[dict[str, Any]]) -> list[Tensor]:
    return [*chain.from_iterable(map(_MOMENTS, states)), *map(_MASTER, masters)]


def _addresses(tensors: list[Tensor], sharded: bool) -> list[int]:
    return list(map(Tensor.data_ptr, map(local, tensors) if sharded else tensors))


def _layouts(tensors: list[Tensor]) -> list[list[Any]]:
    """What the kernels assume about the tensors behind their pointers: strides, number of elements, dtype, and sign."""
    # Numbers of elements rather than shapes, which take twice as long to read: 9 µs for 96 tensors.
    return [list(map(read, tensors)) for read in (Tensor.stride, Tensor.numel, _DTYPE, Tensor.is_neg)]


# ---- gradients ----


def read_gradients(bucket: Bucket, groups: Groups) -> list[Tensor] | None:
    """The bucket's gradients, each with the strides of its parameter; those with others, or negated, are copied.

    None if the ``.data`` of a parameter is now another view of its memory: its gradient has the strides of that view,
    and the plan is no longer valid.

    Raises:
        TypeError, ValueError: for a gradient that does not match its parameter, by name.
    """
    grads: list[Any] = [p.grad for p in bucket.params]
    if bucket.sharded:
        for p in bucket.params:
            check_gradient(p, groups)
        grads = list(map(local, grads))
    if _layouts(grads) == bucket.layouts:
        return grads
    for p in bucket.params:
        check_gradient(p, groups)
    if _layouts(list(map(local, bucket.params))) != bucket.layouts:
        return None
    return [
        g
        if g.stride() == strides and not g.is_neg()
        else torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
        for g, strides in zip(grads, bucket.layouts[0], strict=True)
    ]


def check_gradient(p: Tensor, groups: Groups) -> None:
    """Raise if the gradient of ``p`` differs from it in layout, dtype, shape or DTensor placements."""
    grad = p.grad
    assert grad is not None  # a plan has only parameters with a gradient
    if grad.layout != torch.strided:
        raise TypeError(f"gradient of {name_of(p, groups)}: expected a dense tensor, got layout {grad.layout}")
    if grad.dtype != p.dtype:
        raise TypeError(f"gradient of {name_of(p, groups)}: expected {p.dtype}, got {grad.dtype}")
    if grad.shape != p.shape:
        shapes = f"expected shape {tuple(p.shape)}, got {tuple(grad.shape)}"
        raise ValueError(f"gradient of {name_of(p, groups)}: {shapes}")
    expected, got = getattr(p, "placements", None), getattr(grad, "placements", None)
    if expected != got:
        raise TypeError(f"gradient of {name_of(p, groups)}: expected placements {expected}, got {got}")


def name_of(param: Tensor, groups: Groups) -> str:
    """What errors call a parameter: by its name if the groups have names, otherwise by its position."""
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            if p is param:
                names = group.get("param_names")
                return f"parameter {names[j]!r}" if names else f"parameter {j} of group {i}"
    raise KeyError("not a parameter of this optimizer")
