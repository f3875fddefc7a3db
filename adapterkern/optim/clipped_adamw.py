"""ClippedAdamW: clip_grad_norm_ and AdamW in two passes over the parameters, without a host synchronization.

    norm = √(Σ g²)                 over all parameters, in two fp32 terms per tile and fp64, in a fixed order
    ĝ    = g · min(1, max_norm / (norm + 1e-6))
    m   += (1 − β₁)(ĝ − m)         v = β₂·v + (1 − β₂)·ĝ²
    p   −= lr · (weight_decay·p + m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + eps))

Equivalent to

    torch.nn.utils.clip_grad_norm_(params, max_norm)
    torch.optim.AdamW(params, lr, betas, eps, weight_decay).step()

except that a step with a gradient that is not finite changes nothing, where clipping by an infinite norm would write
NaN into every parameter. ``skipped`` is then 1, and ``grad_norm`` is not finite.

The clipped gradients are never written: a step moves 28 bytes per parameter (p, g, m, v read; p, m, v written) plus the
norm's read of g, where the two calls above move 40. Norm, multiplier and skip flag stay on the device, and so does the
step count of each parameter, which a skipped step leaves as it is. No result depends on the number of threads or
blocks.
"""

import math
import warnings
from collections.abc import Callable
from itertools import chain
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from adapterkern.checks import choice, flag, integer, number, other_names
from adapterkern.optim.backends import StepOptions, to_device
from adapterkern.optim.plan import Plan, check_gradient, is_valid, local, make_plan, name_of, read_gradients

__all__ = ["ClippedAdamW"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STATE = ("step", "exp_avg", "exp_avg_sq", "master")
# Arguments for all groups. torch would keep one of them that is set in a group, where nothing reads it.
_FOR_ALL = ("max_norm", "low_precision", "seed", "clear_grads", "error_if_nonfinite")


@other_names(
    max_grad_norm="max_norm",
    clip_grad_norm="max_norm",
    learning_rate="lr",
    beta1="betas",
    beta2="betas",
    adam_epsilon="eps",
    amsgrad="no such argument: AMSGrad is not implemented",
    **dict.fromkeys(("fused", "foreach", "capturable", "differentiable"), "no such argument"),
)
class ClippedAdamW(Optimizer):
    """AdamW with global-norm clipping, in two kernel launches and without a host synchronization.

    Args:
        params: parameters or groups, as for any torch optimizer; float32, bfloat16 or float16, dense, real.
            A group may set its own lr, betas, eps, weight_decay and maximize; the other arguments hold for all.
        lr, weight_decay: a float, or a float32 tensor of one element, read on the device: a captured graph follows it.
        betas, eps: floats, as in torch.optim.AdamW.
        max_norm: largest global gradient norm, over all groups; None or infinity: no clipping (0 leaves
            nothing of any gradient, as in torch). May be a tensor, as lr.
        maximize: ascend instead.
        low_precision: how bfloat16 and float16 parameters keep small updates. "master": fp32 master weights in the
            state, of which the parameter is a rounded copy. "stochastic" (bfloat16 only): no master; each update is
            rounded up or down at random, in proportion, by a counter-based generator: runs agree to the bit.
        seed: of stochastic rounding, an integer from 0 to 2³² − 1.
        clear_grads: set gradients to zero in the same pass, also in a skipped step.
        error_if_nonfinite: raise RuntimeError on a non-finite norm (this waits for the device), after a step that
            changed nothing. No effect under a GradScaler, which expects overflow.

    The moments are always fp32. ``state_dict()`` and torch.optim.AdamW's load into each other.
    Under torch.amp.GradScaler a step unscales, clips and skips on the device; the host reads nothing.

    Raises:
        ValueError, TypeError: for an unsupported argument, parameter or gradient, by name.
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
        if isinstance(params, nn.Module):
            name = type(params).__name__
            raise TypeError(f"params: expected tensors or groups, such as model.adapter_parameters(), got a {name}")
        _check_not_negative("max_norm", math.inf if max_norm is None else max_norm)
        if not isinstance(max_norm, torch.Tensor) and max_norm == 0:
            warnings.warn("max_norm: 0 leaves nothing of any gradient; None does not clip", stacklevel=2)
        self.max_norm = max_norm
        self.low_precision = choice("low_precision", low_precision, ("master", "stochastic"))
        self.seed = integer("seed", seed, 0, 2**32 - 1)
        self.clear_grads = flag("clear_grads", clear_grads)
        self.error_if_nonfinite = flag("error_if_nonfinite", error_if_nonfinite)
        self._plan: Plan | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # the last step's norm and skip flag, in the kernels' memory
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        )

    # ---- what a training loop reads ----

    @property
    def grad_norm(self) -> Tensor:
        """The last step's global gradient norm before clipping (after unscaling): a float32 scalar on the device."""
        return self._of_last_step()[0].clone()  # the next step overwrites the kernels' own

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
        # True: GradScaler passes grad_scale and found_inf on instead of waiting for the device. accelerate, however,
        # sees that a step was skipped (and holds its scheduler back) only if step() is not called: False under it.
        return getattr(self.__dict__.get("step"), "__module__", None) != "accelerate.optimizer"

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on the current gradients; parameters without one are left out. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, plan = self.param_groups, self._plan
        if plan is None or not is_valid(plan, groups, self.state):
            plan = self._make_plan()
        gradients: list[Any] = [read_gradients(bucket, groups) for bucket in plan.buckets]
        if None in gradients:
            plan = self._make_plan()
            gradients = [read_gradients(bucket, groups) for bucket in plan.buckets]
        options = StepOptions(
            groups=groups,
            max_norm=math.inf if self.max_norm is None else self.max_norm,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            clear_grads=self.clear_grads,
            seed=self.seed,
        )
        for bucket, grads in zip(plan.buckets, gradients, strict=True):
            bucket.passes.sum_squares(grads, options)
        if plan.shares_norm:
            _share_norm(plan, options)
        for bucket, grads in zip(plan.buckets, gradients, strict=True):
            bucket.passes.update(grads, options)
            # The kernels write without autograd, which must refuse a backward through what they have overwritten.
            torch.autograd.graph.increment_version(bucket.params)
            if self.clear_grads:
                torch.autograd.graph.increment_version(grads)
                for p, read in zip(bucket.params, grads, strict=True):
                    assert p.grad is not None
                    if (grad := local(p.grad)) is not read:  # the pass has cleared a copy with other strides
                        grad.zero_()
        passes = plan.buckets[0].passes if plan.buckets else None
        self._last = (passes.norm, passes.skipped) if passes else (torch.zeros(()), torch.zeros(()))
        scaled = options.grad_scale is not None or options.found_inf is not None
        if self.error_if_nonfinite and not scaled and self.skipped.item():
            raise RuntimeError(
                f"the gradients' total norm is {self.grad_norm.item()}, so it cannot be clipped: nothing was updated. "
                "Set error_if_nonfinite=False to skip such steps without an error"
            )
        return loss

    def _make_plan(self) -> Plan:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    check_gradient(p, self.param_groups)
                    self._complete_state(p)
        self._plan = make_plan(self.param_groups, self.state, self.low_precision == "stochastic")
        return self._plan

    # ---- state ----

    def _complete_state(self, p: Tensor) -> None:
        """Make the state of ``p`` on its first step, as torch.optim.AdamW does; check it on every call."""
        self._check_dtype(p)  # the constructor's check is not enough: model.double() changes the dtype later
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if p.dtype == torch.float32:
            state.pop("master", None)  # loaded from a run in low precision
        elif self.low_precision == "master" and "master" not in state:
            state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
        param = local(p.detach())
        if torch.empty_like(param, device="meta").stride() != param.stride():
            raise ValueError(f"{self._name(p)}: expected memory without gaps or overlaps, got strides {param.stride()}")
        if param.is_neg():
            raise ValueError(f"{self._name(p)}: expected a tensor of its own values, got a view of their negatives")
        for key in _STATE[: 4 if "master" in state else 3]:
            value, shape = local(state.get(key)), () if key == "step" else param.shape
            expected = (param.device, torch.float32, shape)
            if not isinstance(value, Tensor) or (value.device, value.dtype, value.shape) != expected:
                got = f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else value
                raise ValueError(
                    f"state {key!r} of {self._name(p)}: expected float32 {tuple(shape)} on {param.device}, got {got}"
                )
            if key != "step" and value.stride() != param.stride():  # loaded from a run with another memory layout
                state[key] = torch.empty_like(param, dtype=torch.float32).copy_(value)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch.optim.AdamW. Moments and masters are copied, and stay fp32.

        Raises ``TypeError`` or ``ValueError``, before anything is changed, if it does not fit these parameters.
        """
        final: dict[str, Any] = {}
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:  # after all other hooks, which may change it
            self._check_loaded(loaded)
            final.update(loaded)

        last_hook = self.register_load_state_dict_pre_hook(check)
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

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        for key, kind in (("state", dict), ("param_groups", list)):
            if not isinstance(loaded.get(key), kind):
                got = repr(loaded[key])[:80] if key in loaded else "none"
                raise ValueError(f"state_dict: {key}: expected a {kind.__name__}, got {got}")
        if len(loaded["param_groups"]) != len(self.param_groups):
            counts = len(self.param_groups), len(loaded["param_groups"])
            raise ValueError(f"state_dict: expected {counts[0]} parameter groups, got {counts[1]}")
        owners: dict[Any, Tensor] = {}
        for index, (group, own) in enumerate(zip(loaded["param_groups"], self.param_groups, strict=True)):
            where = f"state_dict: group {index}"
            keys = group.get("params") if isinstance(group, dict) else None
            if not isinstance(keys, list) or not all(isinstance(key, int | str) for key in keys):
                raise ValueError(f"{where}: expected a dict with a list 'params', got {group!r:.80}")
            if len(keys) != len(own["params"]) or len({*keys, *owners}) != len(keys) + len(owners):
                raise ValueError(f"{where}: expected {len(own['params'])} parameters, each once, got {keys!r:.80}")
            owners |= zip(keys, own["params"], strict=True)
            try:
                self._check_group(group | {"params": []})
            except KeyError as error:
                raise ValueError(f"{where}: expected a value of {error}, got none") from None
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
        for key, state in loaded["state"].items():
            if key not in owners or not isinstance(state, dict):
                raise ValueError(
                    f"state_dict: state: {key!r:.80}: expected a dict for one of the parameters, got {state!r:.80}"
                )
            if state and not state.keys() >= {*_STATE[:3]}:
                raise ValueError(
                    f"state_dict: state of {key!r}: expected {', '.join(_STATE[:3])}, got {[*state]!r:.80}"
                )
            for name in state.keys() & {*_STATE}:
                _check_state(f"state_dict: {name} of {key!r}", name, state[name], owners[key])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: self.__dict__[name] for name in _FOR_ALL}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        self.__dict__.setdefault("_last", None)  # a copy or an unpickled optimizer has made no step
        for group in self.param_groups:
            group.setdefault("maximize", False)
            self._check_group(group)

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
        if not pair or not all(
            isinstance(beta, Real) and 0 <= (beta if isinstance(beta, int) else float(beta)) < 1 for beta in betas
        ):
            raise ValueError(f"betas: expected two floats in [0, 1), got {betas!s:.80}")
        if group.get("amsgrad"):
            raise ValueError("amsgrad: expected False (ClippedAdamW has no amsgrad), got True")
        flag("maximize", group.get("maximize", False))
        for p in group["params"]:
            self._check_dtype(p)

    def _check_dtype(self, p: Tensor) -> None:
        if p.dtype not in _DTYPES:
            raise TypeError(f"{self._name(p)}: expected float32, bfloat16 or float16, got {p.dtype}")
        if p.dtype == torch.float16 and self.low_precision == "stochastic":
            raise TypeError(f"{self._name(p)}: expected bfloat16 for low_precision='stochastic', got {p.dtype}")

    def _name(self, p: Tensor) -> str:
        return name_of(p, self.param_groups)


def _check_not_negative(name: str, value: object) -> None:
    if isinstance(value, Real) and not isinstance(value, int | float):  # NumPy's
        value = float(value)
    if not isinstance(value, Tensor):
        number(name, value, "[0, inf]")


def _check_state(what: str, name: str, value: object, p: Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` can be the state ``name`` of the parameter ``p``."""
    shape = () if name == "step" else tuple(p.shape)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    values = torch.tensor(value, dtype=torch.float64) if plain and abs(value) < 2**53 else value  # type: ignore[arg-type]
    if not isinstance(values, Tensor) or values.layout != torch.strided or values.is_meta:
        raise ValueError(f"{what}: expected a dense tensor, got {value!r:.80}")
    counts = name == "step" and values.dtype == torch.int64  # as a step that was a plain integer may be saved
    if tuple(values.shape) != shape or not (values.is_floating_point() or counts):
        got = f"{tuple(values.shape)} of {values.dtype}"
        raise ValueError(f"{what}: expected {shape} of floating point, got {got}")
    found = local(values).float()
    # A square may have overflowed: its parameter then stands still.
    if not bool((found >= 0 if name in ("step", "exp_avg_sq") else found.isfinite()).all()):
        expected = "numbers >= 0" if name in ("step", "exp_avg_sq") else "finite numbers"
        raise ValueError(f"{what}: expected {expected}, got others")


def _share_norm(plan: Plan, options: StepOptions) -> None:
    """Make the norm global: sum shards over their ranks, and buckets over devices."""
    totals = []
    for bucket in plan.buckets:
        total = bucket.passes.squared_norm.double()
        for group in bucket.process_groups:
            torch.distributed.all_reduce(total, group=group)
        totals.append(total)
    for bucket in plan.buckets:
        passes = bucket.passes
        passes.squared_norm.copy_(torch.stack([to_device(t, passes.device) for t in totals]).sum())
        passes.finish(options)
