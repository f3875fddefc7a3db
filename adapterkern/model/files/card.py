"""The model card of a saved adapter, ``README.md``, and the upload of a folder to the Hugging Face hub.

The card describes the base model, the adapter, its training data and metrics, and the versions used, and shows how to
load the adapter. Its front matter is the YAML that the hub reads.
"""

import dataclasses
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, HfApi, ModelCardData

from adapterkern import __version__
from adapterkern.files import replacing, write_text
from adapterkern.model.config import PROMPT, AdapterConfig, adapter_num_params, prompt_num_params
from adapterkern.model.decoder import text_decoder
from adapterkern.model.inside import needs_inside, num_params_beside
from adapterkern.model.linears import inside_of

CARD_NAME = "README.md"
MARK = "<!-- Written by adapterkern, and written anew when it saves here again: remove this line to keep changes. -->"
_PIPELINES = {  # what the hub calls the task
    "classification": "text-classification",
    "multi-label": "text-classification",
    "regression": "text-classification",
    "causal-lm": "text-generation",
}
_TITLES = {"bottleneck": "Bottleneck adapter", "prompt": "Gated prompts"}  # by the kind of adapter
_TAGS = {"bottleneck": "bottleneck-adapter", "prompt": "llama-adapter"}
NOT_SCORES = ("seconds", "tokens_per_second", "targets")  # metrics that say nothing about quality
_DRIFT = "drift"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclasses.dataclass(frozen=True)
class Training:
    """What a card says about a training run."""

    task: str  # of ``TrainConfig``, or another kind of training
    data: str  # the source of the rows
    examples: int
    steps: int
    settings: Mapping[str, Any]
    eval_data: str | None = None
    eval_examples: int = 0
    drift_data: str | None = None  # the texts that drift is measured on
    drift_examples: int = 0
    metrics: Mapping[str, float] | None = None  # of the last evaluation
    metrics_step: int = 0
    labels: Sequence[str] = ()
    saved: str = ""  # which step is saved, if not the last


def write_card(
    directory: str | os.PathLike[str],
    llama: Any,
    config: AdapterConfig | None,
    training: Training | None = None,
    below: Sequence[str] = (),
) -> None:
    """Write ``README.md``, atomically. A card without ``MARK``, which somebody wrote or edited, is kept.

    Args:
        directory: the folder of the saved adapter or head.
        llama: the backbone.
        config: the saved adapter's, resolved; None if only a head is saved.
        training: what to say about its training; None leaves those sections out.
        below: the names of the adapters below it in a stack, the lowest first.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(directory) / CARD_NAME
    if path.exists() and MARK.encode() not in path.read_bytes():
        return
    on_hub = hub_name(llama)
    shown = base_name(llama) or llama.config.model_type
    what = "Classification head" if config is None else _TITLES[config.kind]
    sections = [
        f"---\n{_front_matter(on_hub, llama, config, training)}\n---",
        f"{MARK}\n\n# {what} for {_text(shown)}",
        _base_section(shown, llama),
    ]
    if config is not None:
        sections.append(_adapter_section(config, text_decoder(llama)))
    if below:
        sections.append(
            f"## Stack\n\nIt was trained on top of others, which are in `below` and are loaded with it: "
            f"x → {' → '.join(map(_text, below))} → this adapter."
        )
    if training is not None:
        sections += _training_sections(training)
    sections += [_loading_section(on_hub, config, training), _versions_section()]
    with replacing(path) as temporary:
        write_text(temporary, "\n\n".join(sections) + "\n")


def hub_name(llama: Any) -> str | None:
    """The backbone's name on the hub; None if it was loaded from a folder."""
    name = llama.config.name_or_path
    return name if _HUB_NAME.fullmatch(name) and not os.path.exists(name) else None


def base_name(llama: Any) -> str:
    """The backbone's name on the hub, or the last component of its folder's path, never the full local path; or ""."""
    return hub_name(llama) or Path(llama.config.name_or_path).name


def push_folder(
    directory: str | Path,
    repo_id: str,
    files: Sequence[str],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
) -> str:
    """Upload ``files`` of ``directory``, and no other file of it, to a model repository, and return its URL.

    The repository is created if it does not exist. ``token``, ``private`` and ``revision`` are as in huggingface_hub,
    whose errors are raised if the upload fails.

    Raises:
        FileNotFoundError: one of ``files`` does not exist.
    """
    for name in files:
        if not (Path(directory) / name).is_file():
            raise FileNotFoundError(f"push_to_hub: no file {Path(directory) / name}")
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=url.repo_id,
        folder_path=directory,
        allow_patterns=list(files),
        revision=revision,
        commit_message=commit_message,
    )
    return str(url)


def _front_matter(base: str | None, llama: Any, config: AdapterConfig | None, training: Training | None) -> str:
    pipeline = _PIPELINES.get(training.task) if training is not None else None
    results = []
    if training is not None and training.metrics and pipeline and training.eval_data:
        results = [
            EvalResult(pipeline, source, source, metric_type=name, metric_value=round(value, 6))
            for name, value in _scores(training.metrics).items()
            if (source := training.drift_data if name == _DRIFT else training.eval_data)
        ]
    data = ModelCardData(
        base_model=base,
        library_name="adapterkern",
        pipeline_tag=pipeline,
        tags=["adapter", "bottleneck-adapter" if config is None else _TAGS[config.kind], llama.config.model_type],
        model_name="adapter" if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _base_section(shown: str, llama: Any) -> str:
    decoder = text_decoder(llama)
    return (
        f"## Base model\n\n{_text(shown)}: {type(llama).__name__}, hidden size {decoder.config.hidden_size}, "
        f"{len(decoder.layers)} layers, vocabulary {decoder.config.vocab_size}. It is frozen and is not in this folder."
    )


_WHERE = {
    "layer": "after layers",
    "attention": "between attention and feed-forward network of layers",
    "parallel-mlp": "h, where x is the stream before the feed-forward network and h the one after it, of layers",
    "parallel-attention": "h, where x is the stream before attention and h the one after it, of layers",
}


def _adapter_section(config: AdapterConfig, decoder: Any) -> str:
    layers, hidden_size = config.layers or (), decoder.config.hidden_size
    shown = f"{', '.join(map(str, layers))} (from 0)"
    count = num_params_beside(config, layers, inside_of(decoder) if needs_inside(config) else None)
    if config.kind == PROMPT:
        count += len(layers) * prompt_num_params(hidden_size, config.prompt_length)
        equation = "out = attention(q, k, v) + g · softmax(s · q · K_pᵀ) · V_p inside the attention of layers"
        size = f"{config.prompt_length} prompt embeddings, a gate g for each {config.prompt_gate}"
    else:
        one = adapter_num_params(hidden_size, config.adapter_dim, config.layer_norm, config.learned_scale)
        count += len(layers) * config.depth * one
        inner = "LayerNorm(x)" if config.layer_norm else "x"
        branch = f"W_up · {config.activation}(W_down · {inner} + b_down) + b_up"
        if config.learned_scale:
            branch = f"s · ({branch})"
        elif config.scale != 1:
            branch = f"{config.scale:g} · ({branch})"
        stream = "h" if config.is_parallel else "x"
        equation = f"y = {stream} + {branch} on the residual stream {_WHERE[config.position]}"
        together = "side by side" if config.is_parallel else "in sequence"
        shown += f", {config.depth} {together} at each" if config.depth > 1 else ""
        size = f"dimension {config.adapter_dim}"
    if config.bias_scale:
        size += "; y = s · (W · x + b) in each linear layer of these layers (LLaMA-Adapter V2)"
    return f"## Adapter\n\n{equation} {shown}; {size}, {count:,} parameters in fp32." + (
        f"\n\nTrained with it, and saved here too: {', '.join(config.modules_to_save)}."
        if config.modules_to_save
        else ""
    )


def _training_sections(training: Training) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in training.settings.items())
    labels = f" Labels: {', '.join(map(_text, training.labels))}." if training.labels else ""
    evaluated = f" Evaluated on {_text(training.eval_data)}: {training.eval_examples:,} examples." * bool(
        training.eval_data
    )
    if training.drift_data:
        evaluated += (
            f" Drift, the mean KL divergence of the next token's distribution from that of the base model, in nats per "
            f"token, is measured on {_text(training.drift_data)}: {training.drift_examples:,} texts."
        )
    sections = [
        f"## Task\n\n{training.task}.{labels}",
        f"## Data\n\nTrained on {_text(training.data)}: {training.examples:,} examples.{evaluated}",
        f"## Training\n\n{training.steps:,} steps; {settings}." + f" Saved is {training.saved}." * bool(training.saved),
    ]
    if training.metrics:
        rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in _scores(training.metrics).items())
        sections.append(f"## Metrics\n\nEvaluation at step {training.metrics_step}.\n\n| | |\n|---|---|\n{rows}")
    return sections


def _loading_section(base: str | None, config: AdapterConfig | None, training: Training | None) -> str:
    lines = [
        'import adapterkern as ak  # pip install "adapterkern[train]"',
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = "{base or "the base model: a folder, or a name on the hub"}"',
        'folder = "this folder"  # from the hub: huggingface_hub.snapshot_download("user/name")',
        "llama = AutoModelForCausalLM.from_pretrained(base)",
    ]
    if config is not None:
        lines.append("model = ak.LlamaAdapter.from_pretrained(llama, folder)")
    else:
        lines.append("model = ak.LlamaAdapter(llama, None)  # the head was trained without an adapter")
    if training is not None and training.task in _PIPELINES:
        lines += [
            "",
            "from adapterkern.training import load_run",
            "",
            "config, head = load_run(folder)",
            'ak.evaluate(model, "rows.csv", config, tokenizer=AutoTokenizer.from_pretrained(base), head=head)',
        ]
    return "## How to load\n\n```python\n" + "\n".join(lines) + "\n```"


def _versions_section() -> str:
    versions = {"adapterkern": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"## Versions\n\n{shown}, Python {platform.python_version()}."


def _scores(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in NOT_SCORES}


def _text(value: Any) -> str:
    """A name for Markdown: on one line, and as code if it has a character that Markdown interprets."""
    shown = " ".join(str(value).split())
    return f"``{shown}``" if re.search(r"[*_`<>\[\]|#\\~&]", shown) else shown
