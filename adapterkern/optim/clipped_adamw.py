"""ClippedAdamW: clip_grad_norm_ and AdamW in two passes over the parameters and no word from the device to the host.

    norm = √(Σ g²)                 over all parameters, in fp64, in a fixed order
    ĝ    = g · min(1, max_norm / (norm + 1e-6))
    m   += (1 − β₁)(ĝ − m)         v = β₂·v + (1 − β₂)·ĝ²
    p   −= lr · (weight_decay·p + m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + eps))

Equivalent to

    torch.nn.utils.clip_grad_norm_(params, max_norm)
    torch.optim.AdamW(params, lr, betas, eps, weight_decay).step()

except that a step whose gradients are not all finite changes nothing, where clipping by an infinite norm would write
NaN into every parameter. `skipped` tells, and `grad_norm` shows why.

The clipped gradients are never written: a step moves 28 bytes a parameter (p, g, m, v read; p, m, v written) plus the
norm's read of g, where the two calls above move 40. Norm, multiplier and skip flag stay on the device, and so does each
parameter's step count, which a skipped step leaves alone. Nothing depends on the number of threads or blocks.
"""

import math
from collections.abc import Callable
from itertools import chain
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from adapterkern.optim.backends import Entry, Planned, Request, backend, layouts, local, make_part, moved

__all__ = ["ClippedAdamW", "backend"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STATE = ("step", "exp_avg", "exp_avg_sq", "master")
# What holds for all groups: in one of them it would be kept, and never looked at.
_FOR_ALL = ("max_norm", "low_precision", "seed", "clear_grads", "error_if_nonfinite")


class ClippedAdamW(Optimizer):
    """AdamW with global-norm clipping, in two kernel launches and without a host synchronisation.

    Args:
        params: parameters or groups, as for any torch optimizer; float32, bfloat16 or float16, dense, real.
            A group may set its own lr, betas, eps, weight_decay and maximize; the other arguments hold for all.
        lr, weight_decay: a float, or a float32 tensor of one element, read on the device: a captured graph follows it.
        betas, eps: floats, as in torch.optim.AdamW.
        max_norm: largest global gradient norm, over all groups; None or infinity: no clipping. May be a tensor as lr.
        maximize: ascend instead.
        low_precision: how bfloat16 and float16 parameters keep small updates. "master": fp32 master weights in the
            state, of which the parameter is a rounded copy. "stochastic" (bfloat16 only): no copy; each update rounds
            up or down at random, in proportion, by a counter-based generator: a run repeats to the bit.
        seed: of stochastic rounding, from 0 to 2³² − 1.
        clear_grads: set gradients to zero in the same pass, also on a skipped step.
        error_if_nonfinite: raise RuntimeError on a non-finite norm (this waits for the device), after a step that
            changed nothing. Under a GradScaler, which expects overflow, it has no effect.

    Under torch.amp.GradScaler a step unscales, clips and skips on the device; the host reads nothing.
    The moments are fp32 whatever the parameter is. `state_dict()` and torch.optim.AdamW's load into each other.

    Raises:
        ValueError, TypeError: for an argument, a parameter or a gradient it cannot take, by name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.01,
        max_norm: float | Tensor | None = 1.0,
        *,
        maximize: bool = False,
        low_precision: Literal["master", "stochastic"] = "master",
        seed: int = 0,
        clear_grads: bool = False,
        error_if_nonfinite: bool = False,
    ) -> None:
        if low_precision not in ("master", "stochastic"):
            raise ValueError(f"low_precision: expected 'master' or 'stochastic', got {low_precision!r}")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed: expected an integer from 0 to 2**32 - 1, got {seed}")
        _check_not_negative("max_norm", math.inf if max_norm is None else max_norm)
        self.max_norm = max_norm
        self.low_precision = low_precision
        self.seed = seed
        self.clear_grads = clear_grads
        self.error_if_nonfinite = error_if_nonfinite
        self._plan: list[Planned] | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # grad_norm and skipped, where the last step left them
        self._known: tuple[list[int], list[int]] = ([], [])  # whom the plan is for: parameters and their states
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        )

    # ---- what a loop reads ----

    @property
    def grad_norm(self) -> Tensor:
        """The last step's global gradient norm before clipping (after unscaling): a float32 scalar on the device."""
        return self._of_last_step()[0].clone()  # the kernels overwrite theirs in the next step

    @property
    def skipped(self) -> Tensor:
        """1.0 if the last step was skipped for a non-finite gradient or found_inf, else 0.0: a scalar on the device."""
        return self._of_last_step()[1].clone()

    def _of_last_step(self) -> tuple[Tensor, Tensor]:
        if self._last is None:
            raise RuntimeError("ClippedAdamW has made no step yet, so it has no grad_norm and no skipped flag")
        return self._last

    # ---- the step ----

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler hands over grad_scale and found_inf instead of waiting for the device. accelerate learns that a
        # step was skipped, and holds its scheduler back, from step() not being called: there the scaler must decide.
        return getattr(self.__dict__.get("step"), "__module__", None) != "accelerate.optimizer"

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on the gradients at hand; parameters without one are left out. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._valid_plan()
        gradients: list[Any] = [self._gradients(planned) for planned in plan]
        if None in gradients:
            plan = self._plan = self._make_plan()
            gradients = [self._gradients(planned) for planned in plan]
        request = Request(
            groups=self.param_groups,
            max_norm=math.inf if self.max_norm is None else self.max_norm,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            clear_grads=self.clear_grads,
            seed=self.seed,
        )
        for planned, grads in zip(plan, gradients, strict=True):
            planned.part.sum_squares(grads, request)
        if len(plan) > 1 or any(planned.reduce_over for planned in plan):
            _share_norm(plan, request)
        for planned, grads in zip(plan, gradients, strict=True):
            planned.part.update(grads, request)
            # The kernels write behind autograd's back, which must refuse a backward through what is no longer there.
            torch.autograd.graph.increment_version(planned.params)
            if self.clear_grads:
                torch.autograd.graph.increment_version(grads)
                for p, used in zip(planned.params, grads, strict=True):
                    if (grad := local(_grad(p))) is not used:
                        grad.zero_()
        self._last = (plan[0].part.norm, plan[0].part.skipped) if plan else (torch.zeros(()), torch.zeros(()))
        scaled = request.grad_scale is not None or request.found_inf is not None
        if self.error_if_nonfinite and not scaled and self.skipped.item():
            raise RuntimeError(
                f"the gradients' total norm is {self.grad_norm.item()}, so it cannot be clipped: nothing was updated. "
                "Set error_if_nonfinite=False to skip such steps without an error"
            )
        return loss

    def _valid_plan(self) -> list[Planned]:
        """The parts for the parameters that have a gradient; made anew only where a pointer or the set has changed."""
        live = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        plan = self._plan
        # Identities rather than look-ups in self.state: hashing a tensor costs more than all the rest of this check.
        known = (list(map(id, live)), list(map(id, self.state.values())))
        if plan is None or known != self._known or not all(map(Planned.still_valid, plan)):
            self._plan = plan = self._make_plan()
            self._known = (known[0], list(map(id, self.state.values())))
        return plan

    def _gradients(self, planned: Planned) -> list[Tensor] | None:
        """The part's gradients, each with its parameter's strides; one that differs is copied.

        None if a parameter's `.data` has become another view of its memory: autograd then lays its gradient out so.
        """
        grads: list[Any] = [p.grad for p in planned.params]
        if planned.sharded:
            for p in planned.params:
                self._check_gradient(p)
            grads = list(map(local, grads))
        if layouts(grads) == planned.layouts:
            return grads
        for p in planned.params:
            self._check_gradient(p)
        if layouts(list(map(local, planned.params))) != planned.layouts:
            return None
        return [
            g
            if g.stride() == strides
            else torch.empty_strided(g.shape, strides, dtype=g.dtype, device=g.device).copy_(g)
            for g, strides in zip(grads, planned.layouts[0], strict=True)
        ]

    def _make_plan(self) -> list[Planned]:
        found: dict[tuple[torch.device, tuple[Any, ...]], list[tuple[Tensor, Entry]]] = {}
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    self._check_gradient(p)
                    found.setdefault((p.device, _shard_groups(p)), []).append((p, self._entry(p, index)))
        return [
            Planned(
                part=make_part(device, [entry for _, entry in members]),
                params=[p for p, _ in members],
                reduce_over=reduce_over,
                states=[self.state[p] for p, _ in members],
            )
            for (device, reduce_over), members in found.items()
        ]

    def _entry(self, p: Tensor, group: int) -> Entry:
        """Parameter `p` with its state, which is made on its first step, as torch.optim.AdamW does."""
        self._check_dtype(p)  # model.double() changes it after the constructor has looked
        state = self.state[p]
        stochastic = p.dtype != torch.float32 and self.low_precision == "stochastic"
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if p.dtype == torch.float32:
            state.pop("master", None)  # of a run in low precision
        elif not stochastic and "master" not in state:
            state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
        param = local(p.detach())
        if torch.empty_like(param, device="meta").stride() != param.stride():
            raise ValueError(f"{self._name(p)}: expected memory without gaps or overlaps, got strides {param.stride()}")
        found: dict[str, Tensor] = {}
        for key in _STATE[: 4 if "master" in state else 3]:
            value, shape = local(state.get(key)), () if key == "step" else param.shape
            if not isinstance(value, Tensor) or (value.device, value.dtype, value.shape) != (
                param.device,
                torch.float32,
                shape,
            ):
                got = f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else value
                raise ValueError(
                    f"state {key!r} of {self._name(p)}: expected float32 {tuple(shape)} on {param.device}, got {got}"
                )
            if key != "step" and value.stride() != param.stride():  # loaded from a run with another memory layout
                value = state[key] = torch.empty_like(param, dtype=torch.float32).copy_(value)
            found[key] = value
        main = param if stochastic else found.get("master", param)
        return Entry(param, main, found["exp_avg"], found["exp_avg_sq"], found["step"], stochastic, group)

    # ---- checks ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for key in _FOR_ALL:
            if isinstance(param_group, dict) and key in param_group:
                raise ValueError(f"{key}: expected it as an argument, for all groups, got it in one of them")
        super().add_param_group(param_group)
        self._plan = None
        self._check_group(self.param_groups[-1])

    def _check_group(self, group: dict[str, Any]) -> None:
        for key in ("lr", "eps", "weight_decay"):
            _check_not_negative(key, group[key])
        betas = group["betas"]
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not pair or not all(isinstance(beta, Real) and 0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"betas: expected two floats in [0, 1), got {betas}")
        if group.get("amsgrad"):
            raise ValueError("amsgrad: expected False (ClippedAdamW has no amsgrad), got True")
        for p in group["params"]:
            self._check_dtype(p)

    def _check_dtype(self, p: Tensor) -> None:
        if p.dtype not in _DTYPES:
            raise TypeError(f"{self._name(p)}: expected float32, bfloat16 or float16, got {p.dtype}")
        if p.dtype == torch.float16 and self.low_precision == "stochastic":
            raise TypeError(f"{self._name(p)}: low_precision='stochastic' is for bfloat16, got {p.dtype}")

    def _check_gradient(self, p: Tensor) -> None:
        grad = _grad(p)
        if grad.layout != torch.strided:
            raise TypeError(f"gradient of {self._name(p)}: expected a dense tensor, got layout {grad.layout}")
        if grad.dtype != p.dtype:
            raise TypeError(f"gradient of {self._name(p)}: expected {p.dtype}, got {grad.dtype}")
        if grad.shape != p.shape:
            raise ValueError(f"gradient of {self._name(p)}: expected shape {tuple(p.shape)}, got {tuple(grad.shape)}")
        expected, got = getattr(p, "placements", None), getattr(grad, "placements", None)
        if expected != got:
            raise TypeError(f"gradient of {self._name(p)}: expected placements {expected}, got {got}")

    def _name(self, param: Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p is param:
                    return (
                        f"parameter {group['param_names'][j]!r}"
                        if "param_names" in group
                        else f"parameter {j} of group {i}"
                    )
        raise KeyError("not a parameter of this optimizer")

    # ---- saving, loading, copying ----

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads this optimizer's state dict or torch.optim.AdamW's. Moments and masters are copied, and stay fp32."""
        final: dict[str, Any] = {}
        last_hook = self.register_load_state_dict_pre_hook(lambda _, loaded: final.update(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()
        # torch casts state to the parameter's dtype and shares what needs no cast: take both from the source instead.
        saved = chain.from_iterable(group["params"] for group in final["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, own, strict=True):
            for name, value in final["state"].get(key, {}).items():
                if name in _STATE:
                    self.state[p][name] = torch.as_tensor(value).to(p.device, torch.float32, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_norm", "low_precision", "seed", "clear_grads", "error_if_nonfinite")
        return super().__getstate__() | {name: self.__dict__[name] for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            group.setdefault("maximize", False)
            self._check_group(group)


def _check_not_negative(name: str, value: float | Tensor) -> None:
    if not isinstance(value, (Tensor, Real)):
        raise TypeError(f"{name}: expected a number from 0 on, got {value!r}")
    if not isinstance(value, Tensor) and not value >= 0:
        raise ValueError(f"{name}: expected a number from 0 on, got {value}")


def _grad(p: Tensor) -> Tensor:
    grad = p.grad
    assert grad is not None  # a plan holds only parameters that have one
    return grad


def _shard_groups(p: Tensor) -> tuple[Any, ...]:
    """The process groups over which the shards of a DTensor's gradient make up the whole; () for a plain tensor."""
    if not hasattr(p, "to_local"):
        return ()
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if placement.is_shard())


def _share_norm(plan: list[Planned], request: Request) -> None:
    """Makes the norm global where one part is not all: shards add up over their ranks, parts over devices."""
    totals = []
    for planned in plan:
        total = planned.part.total.double()
        for group in planned.reduce_over:
            torch.distributed.all_reduce(total, group=group)
        totals.append(total)
    for planned in plan:
        planned.part.total.copy_(torch.stack([moved(t, planned.part.device) for t in totals]).sum())
        planned.part.finish(request)
