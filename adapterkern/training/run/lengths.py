"""How many steps a resumed run has: as many as before, or more, or fewer, with the schedule of its new length."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.run.results import CheckpointError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from adapterkern.training.run.checkpoint import TrainingState


def check_length(path: Path, step: int, config: TrainConfig, steps_per_epoch: object) -> None:
    """Raise ``CheckpointError`` for fewer steps than are done, if the number of an epoch's steps is known."""
    if config.max_steps is None and not isinstance(steps_per_epoch, int):
        return
    total = config.max_steps or config.epochs * int(steps_per_epoch)  # type: ignore[call-overload]
    if total < step:
        setting = f"epochs={config.epochs}" if config.max_steps is None else f"max_steps={config.max_steps}"
        raise CheckpointError(f"{path}: expected at least the {step} steps that are done, got {total}, with {setting}")


def extend(state: "TrainingState", before: Mapping[str, Any]) -> None:
    """Go on with the schedule of ``state.config`` if it has another number of steps than the settings ``before``.

    Says what that means for the learning rate, in a warning if it jumps.
    """
    config, schedule = state.config, state.schedule
    was, total = (
        length["max_steps"] or length["epochs"] * state.steps_per_epoch for length in (before, config.to_dict())
    )
    if was == total:
        return
    old = schedule.get_last_lr()[0]
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, lr in zip(state.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    new = schedule.get_last_lr()[0]
    length = f"step {state.step} of {was}, {'extended' if total > was else 'shortened'} to {total} steps"
    rate = f"jumps from {old:.3g} to {new:.3g}" if new != old else f"stays {old:.3g}"
    if processes.is_rank_zero():
        level = logging.INFO if new == old else logging.WARNING
        goes_on = f"the {config.schedule} schedule goes on as that of {total}, and the learning rate {rate}"
        logger.log(level, "resumed from %s: %s", length, goes_on)
