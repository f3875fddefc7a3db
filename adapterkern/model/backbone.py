"""Load a backbone, or its first layers, from a transformers folder, a hub name or a GGUF file."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from adapterkern import checks
from adapterkern.files import read_json
from adapterkern.model.attention import check_attn
from adapterkern.model.decoder import decoder_layers, keep_layers, text_decoder
from adapterkern.model.fast_dtype import fast_dtype
from adapterkern.model.files.folder import ADAPTER_FILES
from adapterkern.model.quantized import PACKED, check_load_in, check_plain, quantization

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EXPECTED = "expected a .gguf file, a transformers folder or a name on the hub"

_PAUSE = 1.0  # seconds, after which the hub is asked once more

logger = logging.getLogger(__name__)


# As transformers' from_pretrained has them
OTHER_NAMES = {
    "torch_dtype": "dtype",
    "attn_implementation": "attn",
    "load_in_4bit": 'load_in="4bit"',
    "load_in_8bit": 'load_in="8bit"',
    "quantization_config": "load_in",
    "device_map": "device",
}


@checks.other_names(**OTHER_NAMES)
def load_backbone(
    source: str | os.PathLike[str],
    *,
    num_layers: int | None = None,
    dtype: str = "fp32",
    device: torch.device | str | None = None,
    load_in: str | None = None,
    attn: str | None = None,
) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        source: a ``.gguf`` file, a folder that transformers saved, or a name on the hub.
        num_layers: the number of decoder layers to keep, counted from the first; default all.
        dtype: of the weights, ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: see ``fast_dtype``.
        device: default the first CUDA device if there is one, else the CPU; in a process started by torchrun or
            accelerate, the CUDA device of its local rank.
        load_in: ``"8bit"`` or ``"4bit"`` quantizes the layers' matrices (quantized.py); default, or ``"none"``, not.
        attn: the implementation of attention, as transformers' ``attn_implementation``; default its own choice.

    Raises:
        ImportError: ``load_in`` without bitsandbytes, or ``attn`` without its package.
        OSError: there is no such file, folder or model, or the hub cannot be asked.
        ValueError: it has no tokenizer, its files are damaged or lack weights, ``num_layers`` is not from 1 to the
            number of layers; the dtype, ``load_in`` or ``attn`` is unknown, or not possible here.
    """
    checks.choice("dtype", dtype, (*DTYPES, "auto"))
    device = torch.device(default_device() if device is None else device)
    check_source(source)
    check_load_in(load_in, source, device)
    check_attn(attn, device)
    path = Path(source)
    name = os.fspath(source)
    kwargs: dict[str, Any] = {"local_files_only": True} if check_hub(source) else {}
    if dtype == "auto":
        dtype, _ = fast_dtype(device, saved_dtype(source))
    if path.suffix == ".gguf":
        name, kwargs = os.fspath(path.parent), {"gguf_file": path.name}
    tokenizer = _read("tokenizer", source, AutoTokenizer.from_pretrained, name, **kwargs)
    if num_layers is not None or load_in in PACKED:
        # Before the weights are read; a GGUF file says it with them.
        gguf = "gguf_file" in kwargs
        config = None if gguf else _read("config.json", source, AutoConfig.from_pretrained, name, **kwargs)
        if num_layers is not None:
            checks.integer("num_layers", num_layers, 1, getattr(config, "num_hidden_layers", None))
        check_plain(source, load_in, getattr(config, "quantization_config", None))
    llama: Any
    llama, found = _read(
        "weights",
        source,
        AutoModelForCausalLM.from_pretrained,
        name,
        dtype=DTYPES[dtype],
        output_loading_info=True,
        **kwargs,
        **_plain_weights(kwargs),
        **({} if attn is None else {"attn_implementation": attn}),
        **quantization(load_in, DTYPES[dtype], device),
    )
    _check_whole(source, llama, sorted(found["missing_keys"]))
    if num_layers is not None:
        checks.integer("num_layers", num_layers, 1, len(decoder_layers(llama)))
        keep_layers(text_decoder(llama), 0, num_layers)
    if load_in not in PACKED:  # which are where they belong
        llama = llama.to(device)
    return llama.eval(), tokenizer


def saved_dtype(source: str | os.PathLike[str]) -> str | None:
    """The dtype that a backbone's ``config.json`` says its weights have; None where none is said, as for a .gguf file.

    Raises:
        OSError: it is a name that the hub does not know, or cannot be asked for.
    """
    try:
        found: Any = Path(source, "config.json")
        if not Path(source).exists():
            found = cached_file(os.fspath(source), "config.json", local_files_only=check_hub(source))
        config = read_json(found, ours=False) if found is not None and Path(found).is_file() else {}
    except ValueError:  # damaged: the loader says how
        return None
    name = config.get("dtype", config.get("torch_dtype"))
    return next((ours for ours, dtype in DTYPES.items() if str(dtype) == f"torch.{name}"), None)


def _plain_weights(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A GGUF file's weights in the dtype, not in its packed blocks, through which no gradient flows."""
    config = getattr(transformers, "GgufConfig", None)  # older versions know no packed ones
    if config is None or "gguf_file" not in kwargs:
        return {}
    return {"quantization_config": config(dequantize=True)}


def default_device() -> str:
    """Where a backbone goes unless it is said: see ``load_backbone``."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def check_source(source: str | os.PathLike[str], name: str = "model") -> None:
    """Raise ``OSError`` for a path where no backbone can be; ``name`` is the argument's. The hub is not asked."""
    path, text = Path(source), os.fspath(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            run = " (it holds adapters: name the backbone that they were trained on)"
            known = run if any((path / file).exists() for file in (*ADAPTER_FILES, "task.json")) else ""
            raise FileNotFoundError(f"{name}: {_EXPECTED}, got the folder {text} without a config.json{known}")
    elif path.is_file():
        if path.suffix != ".gguf":
            raise NotADirectoryError(f"{name}: {_EXPECTED}, got the file {text}")
    elif path.suffix == ".gguf":
        raise FileNotFoundError(f"{name}: no file {path}")
    elif path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise FileNotFoundError(f"{name}: no folder {path}")


def check_hub(source: str | os.PathLike[str], name: str = "model", file: str = "config.json") -> bool:
    """Whether to load ``source`` from the hub's cache alone, since there is no network.

    The hub's own client tries six times for each file, which takes minutes where there is no network. Nothing is asked
    where ``HF_HUB_OFFLINE`` is set.

    Raises:
        OSError: it is a name that the hub does not know, or that is not in the cache and cannot be asked for.
    """
    text = os.fspath(source)
    if Path(source).exists():
        return False
    cached = _in_cache(text, file)
    try:
        for last in (cached, True):
            try:
                get_hf_file_metadata(hf_hub_url(text, file))
                break
            except Exception as error:
                if last or not not_connected(error):
                    raise
                time.sleep(_PAUSE)
    except hub.OfflineModeIsEnabled:
        pass  # which the loader reports at once
    except Exception as error:
        if cached:
            if not_connected(error):
                logger.warning("%s: the hub cannot be asked, so this is the copy in the cache", source)
            return not_connected(error)
        known = hub.GatedRepoError | hub.RepositoryNotFoundError | hub.HFValidationError
        if isinstance(error, known) or not_connected(error):
            raise OSError(f"{name}: no folder {source} here, and {why_not_from_hub(text, error)}") from error
    return False


def _in_cache(name: str, file: str) -> bool:
    try:
        return cached_file(name, file, local_files_only=True) is not None
    except (OSError, ValueError):  # not there, or no name that the hub could have
        return False


def not_connected(error: BaseException) -> bool:
    """Whether no connection was made, by the names that both of the hub's HTTP libraries have for it."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"ConnectError", "ConnectionError"}) and not isinstance(error, hub.OfflineModeIsEnabled)


def _read(what: str, source: str | os.PathLike[str], read: Any, name: str, **kwargs: Any) -> Any:
    """``read(name, **kwargs)``, with one line for what libraries raise in many kinds and paragraphs."""
    try:
        return read(name, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not Path(source).exists():
            raise OSError(f"model: no folder {source} here, and {why_not_from_hub(name, error)}") from error
        problem = _first_line(error)
        if isinstance(error, SafetensorError):
            problem = next(_damaged(Path(source)), problem)
        if what == "tokenizer":
            raise ValueError(
                f"model: expected a tokenizer beside the weights in {source}, as save_pretrained writes it; got none "
                f"that can be read ({problem})"
            ) from error
        raise ValueError(f"model: the {what} could not be read from {source}: {problem}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].rstrip(" :.")
    return text if not isinstance(error, KeyError) else f"{text} is missing"


def why_not_from_hub(name: str, error: BaseException | None) -> str:
    """The end of a message that begins with what is not here."""
    text = _first_line(error) if error is not None else ""
    while error is not None:
        if isinstance(error, hub.GatedRepoError):
            return f"the hub gives {name} only to users who have accepted its terms: log in with `hf auth login`"
        if isinstance(error, hub.RepositoryNotFoundError):
            return f"the hub has no model {name}, or it is private: `hf auth login`"
        if isinstance(error, hub.HFValidationError):
            return f"{name} cannot be a name on the hub"
        if isinstance(error, hub.LocalEntryNotFoundError) or not_connected(error):
            return f"the hub could not be asked for {name}, of which there is no copy in the cache"
        error = error.__cause__ or error.__context__
    return f"the hub gave no usable {name}: {text}"


def _damaged(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            yield f"{path.name} is damaged or cut short ({error})"


def _check_whole(source: str | os.PathLike[str], llama: Any, missing: list[str]) -> None:
    """Raise ``ValueError`` if transformers has drawn weights of the decoder at random, since the file has none."""
    head = llama.get_output_embeddings()
    heads = {name for name, module in llama.named_modules() if module is head}
    of_decoder = [name for name in missing if name.rpartition(".")[0] not in heads]
    if of_decoder:
        shown = ", ".join(of_decoder[:3]) + (", ..." if len(of_decoder) > 3 else "")
        raise ValueError(
            f"model: expected all weights of the decoder in {source}, which lacks {len(of_decoder)}: {shown}"
        )
    if missing:
        logger.warning("%s: has no LM head; causal-lm and generate would use random weights", source)
