"""``adapterkern budget``."""

import argparse
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

from adapterkern import checks
from adapterkern.cli.options import adapter_fields, add_options, from_options, integer
from adapterkern.cli.scale import add_scale_options, clusters, gigabytes, show_scale
from adapterkern.model import attention
from adapterkern.model.config import (
    MAX_DEPTH,
    PROMPT,
    AdapterConfig,
    adapter_num_params,
    largest_adapter_dim,
    largest_prompt_length,
    prompt_num_params,
)
from adapterkern.model.inside import needs_inside, num_params_beside
from adapterkern.model.memory import CHOICES, WIDTHS, Choice, Shape, Training
from adapterkern.training.config import TrainConfig

# As their makers have published them
SHAPES = {
    "llama-7b": Shape(4096, 32, 11008, 32, 32, 128, 32000),
    "llama-13b": Shape(5120, 40, 13824, 40, 40, 128, 32000),
    "llama-33b": Shape(6656, 60, 17920, 52, 52, 128, 32000),
    "llama-65b": Shape(8192, 80, 22016, 64, 64, 128, 32000),
    "llama-2-7b": Shape(4096, 32, 11008, 32, 32, 128, 32000),
    "llama-2-13b": Shape(5120, 40, 13824, 40, 40, 128, 32000),
    "llama-2-70b": Shape(8192, 80, 28672, 64, 8, 128, 32000),
    "llama-3-8b": Shape(4096, 32, 14336, 32, 8, 128, 128256),
    "llama-3-70b": Shape(8192, 80, 28672, 64, 8, 128, 128256),
    "llama-3.1-405b": Shape(16384, 126, 53248, 128, 8, 128, 128256),
    "llama-3.2-1b": Shape(2048, 16, 8192, 32, 8, 64, 128256, tied=True),
    "llama-3.2-3b": Shape(3072, 28, 8192, 24, 8, 128, 128256, tied=True),
    "mistral-7b": Shape(4096, 32, 14336, 32, 8, 128, 32000),
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 64, 49152, tied=True),
    "smollm2-1.7b": Shape(2048, 24, 8192, 32, 32, 64, 49152, tied=True),
}
logger = logging.getLogger(__name__)

_OF_MEMORY = ("task", "batch_size", "max_length")
_OF_ADAPTER = ("adapter_dim", "prompt_length", "position", "every", "layers")
# What an adapter has, with --max-params and with --memory
_OF_BOTH = ("kind", "layer_norm", "learned_scale", "prompt_gate", "bias_scale")


NAME, SUMMARY = "budget", "which adapters fit a number of parameters, and which settings the memory"
HELP = """\
List (every, adapter_dim) that fit a budget of trainable parameters, with --kind prompt (every, prompt_length); or what
a training step takes of a memory, and which options make it fit; or, of several GPUs, also what they exchange.

  adapterkern budget --model-config llama-7b --max-params 8e6
  adapterkern budget --model-config llama-2-7b --memory 24GB --task causal-lm --batch-size 4 --max-length 1024
  adapterkern budget --model-config llama-2-70b --memory 80GB --gpus 8,64 --task causal-lm --max-length 1024
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-config",
        required=True,
        metavar="NAME",
        help=f"a transformers config.json or its folder, or one of: {', '.join(SHAPES)}",
    )
    parser.add_argument("--max-params", type=integer, metavar="N", help="such as 8000000 or 8e6")
    parser.add_argument("--memory", type=size, metavar="SIZE", help="of the device, such as 24GB or 80GiB")
    parser.add_argument(
        "--depth", type=integer, default=1, metavar="N", help="adapters in sequence at a site; default 1"
    )
    add_options(parser, AdapterConfig, without={*adapter_fields(), "eps"} - {*_OF_BOTH})
    group = parser.add_argument_group("with --memory", "defaults in brackets")
    group.add_argument("--dtype", choices=tuple(WIDTHS), default="bf16", help="of the backbone's weights [%(default)s]")
    group.add_argument("--attn", choices=attention.CHOICES, default="sdpa", help="of the backbone [%(default)s]")
    add_options(group, TrainConfig, without={f.name for f in dataclasses.fields(TrainConfig)} - {*_OF_MEMORY})
    add_options(group, AdapterConfig, without={*adapter_fields(), "eps"} - {*_OF_ADAPTER})
    add_scale_options(group)


def size(text: str) -> int:
    """Bytes: ``"24GB"`` is 24·10⁹, ``"24GiB"`` 24·2³⁰."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB or 80GiB, got {text!r}")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024**power if found[3] else 1000**power))


def model_shape(name: str, whole: bool = False) -> Shape:
    """The sizes of a known model or of a ``config.json``, of which unless ``whole`` hidden size and layers are read."""
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    from adapterkern.files import read_json  # needs the train extra, a name from the table above does not

    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"--model-config: expected a config.json, its folder, or one of {', '.join(SHAPES)}; got {name}"
        )
    config = read_json(path, ours=False)
    d, layers = _integers(path, config, "hidden_size", "num_hidden_layers")
    if not whole:
        return Shape(d, layers, 0, 0, 0, 0, 0)
    if experts := next((key for key in config if "expert" in key and config[key]), None):
        raise ValueError(f"--memory: expected a decoder without experts, got {experts}={config[experts]} in {path}")
    f, heads, vocabulary = _integers(path, config, "intermediate_size", "num_attention_heads", "vocab_size")
    if config.get("quantization_config"):
        raise ValueError(f"--model-config: expected weights that are not quantized, got quantization_config in {path}")
    name, made, params = _made(path, config)
    others = {"num_key_value_heads": heads, "head_dim": d // heads}
    given = {key: getattr(made, key, None) for key in others}
    kv_heads, head_dim = _integers(path, others | {key: value for key, value in given.items() if value}, *others)
    shape = Shape(d, layers, f, heads, kv_heads, head_dim, vocabulary, bool(made.tie_word_embeddings))
    if params != shape.num_params:
        logger.warning(
            "--model-config: %s of %s has %s parameters; those of a LLaMA of its sizes are counted, %s",
            *(name, path, f"{params:,}", f"{shape.num_params:,}"),
        )
    return shape


def _made(path: Path, config: dict[str, Any]) -> tuple[str, Any, int]:
    """What transformers makes of a ``config.json``: class, configuration with its defaults, number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{"model_type": "llama"} | config))
    except Exception as error:  # transformers has many kinds of them
        problem = str(error).strip().partition("\n")[0]
        raise ValueError(f"--model-config: expected a causal language model, got {path}: {problem:.200}") from error
    return type(model).__name__, model.config, sum(p.numel() for p in model.parameters())


def _integers(path: Path, config: Any, *names: str) -> list[int]:
    *most, last = names
    listed = f"{', '.join(most)} and {last}"
    try:
        found = [int(config[name]) for name in names]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: expected integers {listed}: {error}") from error
    if min(found) < 1:
        *some, final = map(str, found)
        raise ValueError(f"{path}: expected {listed} >= 1, got {', '.join(some)} and {final}")
    return found


def run(arguments: argparse.Namespace) -> int:
    checks.integer("--depth", arguments.depth, 1, MAX_DEPTH)
    if arguments.max_params is None and arguments.memory is None:
        raise ValueError("--max-params, --memory: expected at least one of them, got none")
    if arguments.memory == 0:
        raise ValueError("--memory: expected a size > 0, got 0")
    if arguments.gpus is not None:
        clusters(arguments)  # checks them
    if arguments.max_params is not None:
        _show_sites(arguments)
    if arguments.memory is not None:
        _show_memory(arguments)
    return 0


def _show_sites(arguments: argparse.Namespace) -> None:
    checks.integer("--max-params", arguments.max_params, 1)
    adapter = AdapterConfig(**{name: getattr(arguments, name) for name in _OF_BOTH})
    shape = model_shape(arguments.model_config, whole=needs_inside(adapter))
    hidden_size, num_layers, *_ = shape
    print(f"{arguments.model_config}: hidden_size={hidden_size}, {num_layers} layers; budget {arguments.max_params:,}")
    prompts = arguments.kind == PROMPT
    size, largest, count = (
        ("prompt_length", largest_prompt_length, prompt_num_params)
        if prompts
        else ("adapter_dim", largest_adapter_dim, adapter_num_params)
    )
    print(f"{'every':>6} {'prompts' if prompts else 'adapters':>9} {size:>12} {'parameters':>12} {'of budget':>10}")
    fits, parts = False, [] if prompts else [arguments.layer_norm, arguments.learned_scale]
    for every in range(1, num_layers + 1):
        sites = (num_layers // every) * arguments.depth
        if every > 1 and num_layers // every == num_layers // (every - 1):
            continue  # the same sites a layer or so lower
        beside = num_params_beside(adapter, range(every - 1, num_layers, every), shape.inside)
        chosen = largest(hidden_size, sites, arguments.max_params - beside, *parts)
        if chosen == 0:
            continue
        fits = True
        total = sites * count(hidden_size, chosen, *parts) + beside
        print(f"{every:6} {sites:9} {chosen:12} {total:12,} {total / arguments.max_params:10.1%}")
    if not fits:
        beside = num_params_beside(adapter, [num_layers - 1], shape.inside)
        smallest = arguments.depth * count(hidden_size, 1, *parts) + beside
        raise ValueError(f"--max-params: expected at least {smallest:,} for one site, got {arguments.max_params:,}")


def _show_memory(arguments: argparse.Namespace) -> None:
    shape, memory = model_shape(arguments.model_config, whole=True), arguments.memory
    config = from_options(arguments, TrainConfig)
    of_adapter = {name: getattr(arguments, name) for name in (*_OF_ADAPTER, *_OF_BOTH)}
    adapter = AdapterConfig(depth=arguments.depth, **of_adapter)
    learned = config.max_length if config.task == "causal-lm" else 0
    adapter = adapter.resolve(shape.hidden_size, shape.num_layers, shape.inside)
    training = Training(shape, adapter, config.max_length, learned, arguments.dtype, arguments.attn)
    rows = config.batch_size
    if arguments.gpus is not None:
        show_scale(arguments, training, config.task, rows)
        return
    batch = f"--batch-size {rows}"
    print(
        f"{arguments.model_config}: {shape.num_params:,} parameters in {arguments.dtype}, {training.trained_params:,} "
        f"trained\n{config.task}, {batch}, --max-length {config.max_length}; memory {gigabytes(memory)} GB"
    )
    names = " ".join(f"{name:>7}" for name in ("weights", "trained", "kept", "work", "total", "host"))
    print(f"checkpoint, offload: --checkpoint-activations, --offload-activations\n{'GB':23}{names} fits {'rows':>4}")
    found = {choice: (training.memory(rows, choice), training.most_rows(memory, choice)) for choice in CHOICES}
    for choice, (taken, most) in found.items():
        terms = " ".join(f"{gigabytes(term):>7}" for term in (*taken[:4], taken.total, taken.host))
        print(f"{_short(choice):23}{terms} {'yes' if most >= rows else 'no':>4} {most:4}")
    fitting = [choice for choice, (_, most) in found.items() if most >= rows]
    if not fitting:
        least = min(taken.total for taken, _ in found.values())
        raise ValueError(f"--memory: expected at least {gigabytes(least)} GB for {batch}, got {gigabytes(memory)} GB")
    options, (taken, _) = _options(fitting[0]), found[fitting[0]]
    print(f"fits {'with ' + options if options else 'as it is'}: {gigabytes(taken.total)} GB of {gigabytes(memory)}")
    if options and (fewer := _divisor(rows, found[CHOICES[0]][1])):
        print(f"or, with the same steps, --batch-size {fewer} --accumulation {rows // fewer}")


def _options(choice: Choice) -> str:
    """A choice as it is typed; "" for none."""
    asked = [f"--load-in {choice.load_in}"] if choice.load_in else []
    asked += ["--checkpoint-activations"] if choice.checkpointed else []
    return " ".join([*asked, *(["--offload-activations"] if choice.offloaded else [])])


def _short(choice: Choice) -> str:
    """The options of a choice, so that the table is 80 columns wide."""
    short = _options(choice).replace("--load-in ", "").replace("-activations", "").replace("--", "")
    return short or "as it is"


def _divisor(rows: int, most: int) -> int:
    """The largest number of rows that divides ``rows`` and is at most ``most``; 0 if that is 0."""
    return next((fewer for fewer in range(min(rows, most), 0, -1) if rows % fewer == 0), 0)
