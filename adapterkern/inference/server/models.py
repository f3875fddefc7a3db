"""The adapters of several runs on one backbone, each under the name of a model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from adapterkern.files import read_json
from adapterkern.inference.runs import SavedRun, find_run, tokens_digest
from adapterkern.model.config import BASE_NAME, BIAS_SCALE
from adapterkern.model.files.below import files_below
from adapterkern.model.files.folder import CONFIG_NAME, adapter_files
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.multitask.task import MultiTask
from adapterkern.training.data.ends import end_tokens, turn_end
from adapterkern.training.data.padding import context_length
from adapterkern.training.task import Task


@dataclass(frozen=True)
class Models:
    """What is served.

    Attributes:
        adapters: a model's name → its adapter in ``model``.
        context: tokens that prompt and answer may have together; infinity if the backbone has no bound.
        ends: tokens that end any text; ``chat_ends`` also those that end an assistant's turn in the chat template.
    """

    model: LlamaAdapter
    tokenizer: Any
    adapters: Mapping[str, str]
    context: float
    ends: frozenset[int]
    chat_ends: frozenset[int]


def find_models(sources: Sequence[str]) -> dict[str, SavedRun]:
    """The runs of ``sources`` by the names of their models; nothing is loaded.

    Args:
        sources: folders, names on the hub, or ``NAME=FOLDER``. A run of several tasks gives a model for each,
            ``NAME/TASK``. A name is by default that of the folder.

    Raises:
        FileNotFoundError, NotADirectoryError, OSError: as ``find_run``.
        ValueError: a run is not of causal-lm; two have one name; a file is damaged.
    """
    found: dict[str, SavedRun] = {}
    for source in sources:
        name, folder = _named(source)
        for model, run in _each(name, find_run(folder)):
            if model in found or model == BASE_NAME:
                raise ValueError(f"runs: expected models with names of their own, got {model!r} twice: NAME={folder}")
            found[model] = run
    for model, run in found.items():
        _check(model, run)
    return found


def _named(source: str) -> tuple[str, str]:
    name, equals, folder = source.partition("=")
    if not equals or os.path.exists(source):
        name, folder = "", source
    elif not name or not folder:
        raise ValueError(f"runs: expected FOLDER or NAME=FOLDER, got {source!r}")
    return name or Path(os.path.abspath(folder)).name, folder


def _each(name: str, run: SavedRun) -> list[tuple[str, SavedRun]]:
    if run.kind is not MultiTask:
        return [(name, run)]
    tasks = MultiTask.saved_names(run.directory)
    return [(f"{name}/{task}", find_run(MultiTask.folder(run.directory, task))) for task in tasks]


def _check(name: str, run: SavedRun) -> None:
    if run.kind is not Task or run.config.task != "causal-lm":
        kind = run.config.task if run.kind is Task else run.kind.__name__
        raise ValueError(f"{name}: expected a run of causal-lm, the only one whose answer is a text, got {kind}")
    files = adapter_files(run.directory)
    if files is None:
        raise ValueError(f"{name}: expected a run with an adapter, got none in {run.directory}")
    below = {(run.directory / name).parent / CONFIG_NAME for name in files_below(run.directory)}
    parts = [read_json(path).get("adapter") for path in (run.directory / files[1], *sorted(below)) if path.exists()]
    modules = [m for part in parts if isinstance(part, dict) for m in part.get("modules_to_save") or ()]
    if modules:  # before the backbone is read; `check_mixable` would say it at the first request
        raise ValueError(
            f"{name}: expected an adapter without modules of the backbone (modules_to_save), which all rows of a batch "
            f"share, got {', '.join(map(str, modules))}"
        )
    if any(isinstance(part, dict) and part.get(BIAS_SCALE) for part in parts):
        raise ValueError(
            f"{name}: expected an adapter without bias and scale of the backbone's linear layers (--bias-scale), which "
            "all rows of a batch share, got one with them"
        )


def load_models(
    runs: Mapping[str, SavedRun],
    *,
    model: str | os.PathLike[str] | None = None,
    num_layers: int | None = None,
    dtype: str | None = None,
    fused: bool = True,
    liger: bool = False,
    load_in: str | None = None,
    attn: str | None = None,
) -> Models:
    """The adapters of ``runs`` on the backbone of the first. The other arguments are those of ``ak.load``.

    Raises:
        FileNotFoundError: a file of a run, or the backbone, is missing.
        ValueError: a file is damaged; or a run was trained on another backbone or with other tokens.
    """
    (first, run), *others = runs.items()
    backbone: Any = {"model": model, "num_layers": num_layers, "dtype": dtype, "load_in": load_in, "attn": attn}
    task, _, tokenizer = run.open(**backbone, fused=fused, liger=liger)
    adapted = task.model
    adapters = {first: "default"}
    for number, (name, other) in enumerate(others, start=1):
        if other.sources is not None and other.sources.tokenizer not in (None, tokens_digest(tokenizer)):
            raise ValueError(f"{name}: expected a run with the tokens of {first}, got {other.directory}, with others")
        adapters[name] = f"adapter{number}"  # an adapter's name may not have what a folder's may
        adapted.load_adapter(other.directory, adapters[name], strict=True)
    adapted.eval()
    ends = frozenset(end_tokens(adapted.base.generation_config, tokenizer))
    turn = turn_end(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    # Answers depend on the requests alone: the backbone's own defaults may sample, punish repetitions, and so on.
    adapted.base.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=0)
    return Models(
        model=adapted,
        tokenizer=tokenizer,
        adapters=adapters | {BASE_NAME: BASE_NAME},
        context=context_length(adapted.config),
        ends=ends,
        chat_ends=ends if turn is None else ends | {turn},
    )
