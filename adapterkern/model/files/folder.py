"""The folder of a saved adapter: ``adapterkern.safetensors``, ``adapterkern.json`` and ``README.md``.

Weights and configuration are a pair of ``write_pair``: after a full disk or a killed process the
folder has the old pair or the new one, and loading checks the weights against the hash in the configuration.

0.1.0 named them ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT does. transformers acts on the
second name if peft is installed, and then does not load a model beside it. The old names are still read. The new ones
win if a folder has both, and a save removes the old pair.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from adapterkern.files import find_weights, read_json, read_tensors, read_versioned, remove_pair, write_pair
from adapterkern.model.config import MODULES, PROMPT, AdapterConfig
from adapterkern.model.decoder import decoder_layers, text_decoder
from adapterkern.model.digest import Digest, differ, weights_digest
from adapterkern.model.extra import covered, find_modules, saved_shapes
from adapterkern.model.files.card import base_name, write_card
from adapterkern.model.files.owner import OTHERS_CONFIG, check_folder, is_ours, whose
from adapterkern.model.inside import number_of_gates
from adapterkern.model.linears import bias_scale_shapes

WEIGHTS_NAME = "adapterkern.safetensors"
CONFIG_NAME = "adapterkern.json"
OLD_WEIGHTS_NAME = "adapter_model.safetensors"  # of 0.1.0
OLD_CONFIG_NAME = OTHERS_CONFIG
ADAPTER_FILES = (WEIGHTS_NAME, CONFIG_NAME, OLD_WEIGHTS_NAME, OLD_CONFIG_NAME)
FORMAT_VERSION = 1
BELOW, STACK_VERSION = "below", 2  # the field of an adapter that was saved on others, and the version that it is of
logger = logging.getLogger(__name__)
_OF_PROMPT = {"embeddings": ("P", "d"), "gate": ("g",)}
_SHAPES = {
    "norm.weight": ("d",),
    "norm.bias": ("d",),
    "down.weight": ("r", "d"),
    "down.bias": ("r",),
    "up.weight": ("d", "r"),
    "up.bias": ("d",),
}


def write_adapter(
    directory: Path,
    llama: Any,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    digest: Digest,
    below: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write an adapter of the backbone ``llama``, and its model card.

    Args:
        digest: of the backbone's weights, see ``weights_digest``.
        config: resolved, with explicit layers.
        tensors: contiguous, on the CPU; named ``{layer}.{number in the sequence}.{parameter}``, of a gated prompt
            ``{layer}.{parameter}``, of a linear layer ``bias_scale.{layer}.{its path}.{parameter}``.
        below: what ``write_below`` has written: the adapters below this one.

    Raises:
        OSError: a file cannot be written; the message names it, and an earlier adapter in the folder stays.
        ValueError: the folder holds a model or another library's adapter, or ``tensors`` are not those of ``config``.
    """
    check_folder(directory)
    extra = saved_shapes(llama, config.modules_to_save or ())
    check_tensors(directory / WEIGHTS_NAME, tensors, config, llama, extra)

    def save(path: Path) -> None:
        save_file(dict(tensors), path, metadata={"format": "pt"})

    base = _describe(llama) | {"digest": digest}
    fields: dict[str, Any] = {"format_version": FORMAT_VERSION, "adapter": config.to_dict(), "base": base}
    fields |= {"format_version": STACK_VERSION, BELOW: list(below)} if below else {}
    write_pair(directory / WEIGHTS_NAME, directory / CONFIG_NAME, save, fields)
    _remove_old(directory)
    write_card(directory, llama, config, below=[entry["name"] for entry in below])


def adapter_files(directory: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The names of the weights and the configuration of the adapter saved in ``directory``; None if there is none."""
    directory = Path(directory)
    if (directory / CONFIG_NAME).exists():
        return WEIGHTS_NAME, CONFIG_NAME
    try:
        old = is_ours(read_json(directory / OLD_CONFIG_NAME))
    except FileNotFoundError:
        return None
    except ValueError:  # damaged: the reader says how
        old = True
    return (OLD_WEIGHTS_NAME, OLD_CONFIG_NAME) if old else None


def _remove_old(directory: Path) -> None:
    """Remove the pair that 0.1.0 saved here and that the new one replaces. What is not ours stays."""
    try:
        ours = is_ours(read_json(directory / OLD_CONFIG_NAME))
    except (FileNotFoundError, ValueError):
        return
    if ours:
        remove_pair(directory / OLD_WEIGHTS_NAME, directory / OLD_CONFIG_NAME)


def read_adapter(
    llama: Any, directory: Path, *, strict: bool = False, resize: Callable[[int], Any] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """An adapter's resolved configuration and its tensors, checked against each other and against the backbone.

    Args:
        strict: refuse a backbone of other weights than the adapter was saved with. Otherwise one line warns of it.
        resize: called with the number of tokens that the adapter was saved for, if the backbone has another.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, has another format version, or was saved for a backbone of another shape (with
            ``strict``: of other weights); the message names the file, and the field or both shapes.
    """
    names = adapter_files(directory)
    if names is None:
        if held := whose(directory):
            raise ValueError(f"directory: expected an adapter that this package saved, got {directory} with {held}")
        # Trainer's checkpoint-N, or a run's checkpoints/step-N; what is hidden is not whole
        inside = [p for of in ("checkpoint-*", "checkpoints/[!.]*") for p in directory.glob(f"{of}/{CONFIG_NAME}")]
        newest = max(inside, key=lambda path: path.stat().st_mtime, default=None)
        hint = f"; there is one in {newest.parent}" if newest else ""
        raise FileNotFoundError(f"directory: expected {CONFIG_NAME} in {directory}, got no such file{hint}")
    weights, path = (directory / name for name in names)
    saved, (hidden_size, num_layers) = read_described(path, llama)
    vocabulary = saved["base"].get("vocab_size")
    another = isinstance(vocabulary, int) and vocabulary != _vocabulary(llama)
    if another and resize is not None:
        resize(vocabulary)
        another = False
    try:
        config = AdapterConfig.from_dict(saved["adapter"]).resolve(hidden_size, num_layers)
        config, lost = _without_heads_of_other_classes(llama, config)
        if lost and strict:
            raise ValueError(f"modules_to_save: expected modules of {type(llama).__name__}, got {lost[0]!r}")
        extra = saved_shapes(llama, _saved_modules(llama, config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = read_tensors(find_weights(weights, path, saved["weights_sha256"]))
    for head in lost:
        found = [key for key in tensors if key.startswith(f"{MODULES}.{head}.")]
        if not found:
            raise ValueError(f"{weights}: tensors {MODULES}.{head}: expected by its configuration, got none")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in found}
        name = type(llama).__name__
        logger.warning("%s: %s, trained with the adapter, is not loaded, since %s has none", path, head, name)
    if another:
        problem = f"{path}: saved for a vocabulary of {vocabulary} tokens, and loaded on one of {_vocabulary(llama)}"
        if strict or any(tensors[key].shape[:1] == (vocabulary,) for key in extra.keys() & tensors.keys()):
            raise ValueError(f"{problem} (in Python: resize_token_embeddings=True resizes the backbone)")
        logger.warning("%s (in Python: resize_token_embeddings=True resizes the backbone)", problem)
    check_tensors(weights, tensors, config, llama, extra)
    without = covered(llama, config.modules_to_save or ())
    check_weights(path, saved["base"], llama, weights_digest(llama, without), strict=strict)
    return config, tensors


def read_described(path: Path | str, llama: Any, content: bytes | None = None) -> tuple[dict[str, Any], list[int]]:
    """What ``adapterkern.json`` says, if it was saved for a backbone of this shape; and hidden size and layers.

    ``content`` and ``ValueError`` as of ``read_versioned``.
    """
    kinds = {"adapter": dict, "base": dict, "weights_sha256": str}
    saved = read_versioned(path, FORMAT_VERSION, kinds, content, {BELOW: (STACK_VERSION, list)})
    for name in ("hidden_size", "num_hidden_layers"):
        if name not in saved["base"]:
            raise ValueError(f"{path}: field {name!r} is missing")
    shape, expected = (
        [base[name] for name in ("hidden_size", "num_hidden_layers")] for base in (_describe(llama), saved["base"])
    )
    if shape != expected:
        raise ValueError(
            f"{path}: the adapter was saved for a backbone of hidden_size={expected[0]!s:.80} and "
            f"{expected[1]!s:.80} layers, got one of hidden_size={shape[0]} and {shape[1]} layers"
        )
    return saved, shape


def check_weights(
    path: Path | str, base: Mapping[str, Any], llama: Any, digest: Digest, *, strict: bool | None
) -> None:
    """Warn, or with ``strict`` raise ``ValueError``, if the backbone's weights are not those of a save.

    Args:
        path: the configuration, for the message.
        base: what it says of the backbone; with no ``"digest"`` nothing is compared.
        digest: of ``llama``, see ``weights_digest``.
        strict: None if the caller has no such option.
    """
    if not differ(base.get("digest"), digest):
        return
    problem = (
        f"{path}: saved for the backbone {base.get('name_or_path') or 'without a name'}, "
        f"and loaded on one of other weights, {base_name(llama) or 'without a name'}"
    )
    if strict:
        raise ValueError(f"{problem}; expected the same weights (in Python: strict=True refuses others)")
    hint = "" if strict is None else " (in Python: strict=True refuses this)"
    logger.warning("%s: its results will differ%s", problem, hint)


def _without_heads_of_other_classes(llama: Any, config: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
    """The configuration without the heads that this class of model does not have; and these: paths outside ``model``.

    As ``score`` of a sequence classifier, whose adapter is loaded on a language model.
    """
    paths = config.modules_to_save or ()
    there = [f".{name}" for name, _ in llama.named_modules()]
    lost = [p for p in paths if p.partition(".")[0] != "model" and not any(name.endswith(f".{p}") for name in there)]
    kept = tuple(path for path in paths if path not in lost)
    return (dataclasses.replace(config, modules_to_save=kept or None) if lost else config), lost


def _saved_modules(llama: Any, config: AdapterConfig) -> tuple[str, ...]:
    """The paths in ``modules_to_save`` of a saved configuration. Raises ``ValueError`` for one that no save writes."""
    paths = config.modules_to_save or ()
    found = find_modules(llama, paths)
    for path in paths:
        if path not in found:
            raise ValueError(f"modules_to_save: expected paths of modules, got {path!r}")
    return tuple(paths)


def _vocabulary(llama: Any) -> int:
    """The number of tokens that the backbone has embeddings for."""
    return llama.get_input_embeddings().num_embeddings


def check_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    llama: Any,
    extra: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise ``ValueError`` unless ``tensors`` are those of ``config`` and, beside them, those of ``extra``."""
    decoder = text_decoder(llama)
    extra = {**extra, **bias_scale_shapes(decoder.layers, config)}
    parameters: dict[str, tuple[str, ...]] = {
        key: of for key, of in _SHAPES.items() if config.layer_norm or not key.startswith("norm.")
    }
    parameters |= {"scale": ("1",)} if config.learned_scale else {}
    depth = min(config.depth, len(tensors) + 1)  # in a damaged file it may be any number
    of_each, adapters = parameters, [f"{layer}.{number}" for layer in config.layers or () for number in range(depth)]
    if config.kind == PROMPT:
        of_each, adapters = _OF_PROMPT, [f"{layer}" for layer in config.layers or ()]
    names = {f"{adapter}.{parameter}": of_each[parameter] for adapter in adapters for parameter in of_each}
    if odd := sorted((names.keys() | extra.keys()) ^ tensors.keys()):
        expected = "not expected" if odd[0] in tensors else "expected"
        raise ValueError(f"{path}: tensor {odd[0]}: {expected} by its configuration")
    sizes = {"d": decoder.config.hidden_size, "r": config.adapter_dim, "P": config.prompt_length, "1": 1}
    sizes["g"] = number_of_gates(config, decoder)
    shapes = {name: tuple(sizes[letter] for letter in letters) for name, letters in names.items()}
    for name, shape in (shapes | dict(extra)).items():
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            got = f"{tuple(tensors[name].shape)} of {tensors[name].dtype}"
            raise ValueError(
                f"{path}: tensor {name}: expected {shape} of floating point by its configuration, got {got}"
            )


def _describe(llama: Any) -> dict[str, Any]:
    config = llama.config
    return {
        "model_type": config.model_type,
        "name_or_path": base_name(llama),
        "hidden_size": text_decoder(llama).config.hidden_size,
        "num_hidden_layers": len(decoder_layers(llama)),
        "vocab_size": _vocabulary(llama),
    }
