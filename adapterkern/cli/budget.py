"""``adapterkern budget``."""

import argparse
from pathlib import Path

from adapterkern import checks
from adapterkern.cli.options import integer
from adapterkern.model.config import MAX_DEPTH, adapter_num_params, largest_adapter_dim

# (hidden size, decoder layers)
SHAPES = {
    "llama-7b": (4096, 32),
    "llama-13b": (5120, 40),
    "llama-33b": (6656, 60),
    "llama-65b": (8192, 80),
    "llama-2-7b": (4096, 32),
    "llama-2-13b": (5120, 40),
    "llama-2-70b": (8192, 80),
    "llama-3-8b": (4096, 32),
    "llama-3-70b": (8192, 80),
    "llama-3.2-1b": (2048, 16),
    "llama-3.2-3b": (3072, 28),
    "mistral-7b": (4096, 32),
    "smollm2-135m": (576, 30),
    "smollm2-1.7b": (2048, 24),
}


NAME, SUMMARY = "budget", "which adapters fit a number of parameters"
HELP = """\
List (every, adapter_dim) that fit a budget of trainable parameters.

  adapterkern budget --model-config llama-7b --max-params 8e6
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-config",
        required=True,
        metavar="NAME",
        help=f"a transformers config.json or its folder, or one of: {', '.join(SHAPES)}",
    )
    parser.add_argument("--max-params", type=integer, required=True, metavar="N", help="such as 8000000 or 8e6")
    parser.add_argument(
        "--depth", type=integer, default=1, metavar="N", help="adapters in sequence at a site; default 1"
    )


def model_shape(name: str) -> tuple[int, int]:
    """(hidden size, decoder layers) of a known model or of a transformers ``config.json``."""
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
    try:
        shape = int(config["hidden_size"]), int(config["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: expected integers hidden_size and num_hidden_layers: {error}") from error
    if min(shape) < 1:
        raise ValueError(f"{path}: expected hidden_size and num_hidden_layers >= 1, got {shape[0]} and {shape[1]}")
    return shape


def run(arguments: argparse.Namespace) -> int:
    checks.integer("--depth", arguments.depth, 1, MAX_DEPTH)
    checks.integer("--max-params", arguments.max_params, 1)
    hidden_size, num_layers = model_shape(arguments.model_config)
    print(f"{arguments.model_config}: hidden_size={hidden_size}, {num_layers} layers; budget {arguments.max_params:,}")
    print(f"{'every':>6} {'adapters':>9} {'adapter_dim':>12} {'parameters':>12} {'of budget':>10}")
    fits = False
    for every in range(1, num_layers + 1):
        sites = (num_layers // every) * arguments.depth
        if every > 1 and num_layers // every == num_layers // (every - 1):
            continue  # the same sites a layer or so lower
        dim = largest_adapter_dim(hidden_size, sites, arguments.max_params)
        if dim == 0:
            continue
        fits = True
        total = sites * adapter_num_params(hidden_size, dim)
        print(f"{every:6} {sites:9} {dim:12} {total:12,} {total / arguments.max_params:10.1%}")
    if not fits:
        smallest = arguments.depth * adapter_num_params(hidden_size, 1)
        raise ValueError(f"--max-params: expected at least {smallest:,} for one site, got {arguments.max_params:,}")
    return 0
