"""What test_distributed.py has two processes do: every scenario in one pair of them, since starting a pair is slow."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

from adapterkern.training import PrefixCache, TrainResult, train
from adapterkern.training.loop import Run
from tests.support import exchanged, tiny_run

ROWS = tiny_run.rows(17)  # steps of 8, 8 and 1 rows: in the last one a process has none
EVAL_ROWS = tiny_run.rows(9, seed=1)
TEXTS = [{"text": row["text"]} for row in tiny_run.rows(5, seed=2)]  # 3 batches


def run(
    output_dir: Path | None,
    dtype: torch.dtype = torch.float32,
    cache: Any = None,
    modules: tuple[str, ...] = (),
    texts: Any = TEXTS,
    **values: Any,
) -> TrainResult:
    """7 steps over 3 epochs, clipped in every one, with evaluations and checkpoints after 3 and 6."""
    model = tiny_run.model(modules_to_save=modules)
    model.base.to(dtype)
    defaults = {"batch_size": 2, "accumulation": 4, "epochs": 3, "max_steps": 7, "max_norm": 0.3, "log_every": 1}
    often = {"eval_every": 3, "checkpoint_every": 3, "keep_checkpoints": 9}
    config = tiny_run.quiet(**(defaults | often | {"output_dir": output_dir} | values))
    data = {"eval_data": EVAL_ROWS, "drift_data": texts}
    return train(model, ROWS, config, tokenizer=tiny_run.tokenizer(), cache=cache, **data)


class FullDisk(PrefixCache):
    """Of the one process that is told 0."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def fill(self, *args: Any, **kwargs: Any) -> Any:
        if not self.room:
            raise OSError("prefix_cache: no room")
        return super().fill(*args, **kwargs)


def work(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in {
        "ddp": {},
        "shard": {"shard": True},
        "ddp packed": {"task": "causal-lm", "packing": True},
        "shard packed": {"task": "causal-lm", "packing": True, "shard": True},
        "ddp bf16": {"precision": "bf16", "dtype": torch.bfloat16},
        "shard bf16": {"precision": "bf16", "shard": True, "dtype": torch.bfloat16},
        "ddp modules": {"modules": ("embed_tokens",)},
        "shard modules": {"modules": ("embed_tokens",), "shard": True},
        "one to ddp": {"resume": True},
        "one to shard": {"resume": True, "shard": True},
    }.items():
        result = run(folder / name, **values)
        found[name] = {"metrics": result.metrics, "history": result.history, "prefix": result.prefix_layers}

    found["exchanged"] = exchanged.work()

    cache = PrefixCache()
    run(None, cache=cache, max_steps=2, prefix_cache=True, texts=None)
    found["cached"] = len(cache)

    parts: dict[str, float] = {}
    step = Run._step

    def look(self: Run[Any], examples: Any) -> None:
        local = sum(p.to_local().numel() for p in self.model.base.parameters())
        parts["backbone"] = local / sum(p.numel() for p in self.model.base.parameters())
        step(self, examples)

    Run._step = look  # type: ignore[method-assign]
    run(None, shard=True, max_steps=1, texts=None)
    found["part"] = parts["backbone"]

    def signalled(self: Run[Any], examples: Any) -> None:
        if rank == 1 and self.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, examples)

    Run._step = signalled  # type: ignore[method-assign]
    stopped = run(folder / "stopped")
    found["stopped"] = stopped.stopped, stopped.steps, stopped.checkpoint
    Run._step = step  # type: ignore[method-assign]

    # In the first process's way only, once the run has begun: a folder of the file's name, and a line that is none.
    def block(self: Run[Any], examples: Any) -> None:
        if self.output_dir == folder / "metrics" and rank == 0 and not self.state.step:
            (folder / "metrics" / "metrics.jsonl").mkdir()
        step(self, examples)

    Run._step = block  # type: ignore[method-assign]
    for name, call in {
        "folder": lambda: run(folder / "ddp"),
        "cache": lambda: run(None, shard=True, prefix_cache=True),
        "fp16": lambda: run(None, shard=True, precision="fp16"),
        "metrics": lambda: run(folder / "metrics", eval_every=1),  # a folder stands in the file's place
        "damaged": lambda: run(folder / "damaged", resume=True),
        "full": lambda: run(None, cache=FullDisk(1 - rank), prefix_cache=True),
    }.items():
        try:
            call()
        except (OSError, RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
