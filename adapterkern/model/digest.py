"""Which backbone an adapter was trained on: digests of a sample of its weights.

64 values of each parameter are read, so a backbone of any size takes milliseconds, and a fine-tuned one still differs:
training changes nearly every tensor. Four digests are kept, since the same backbone may be loaded in another way:

    exact         every parameter as it is in memory, quantized or not; comparable if both have the same dtypes
    vectors       norms and biases              \\
    embeddings    the input embeddings           } rounded to bf16, so fp32 and bf16 agree; None if quantized or fp16
    matrices      all others                    /

A backbone that is spread over processes has none of them; ``Saved.backbone_digest`` then gives those found before.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_SAMPLES = 64  # values of each parameter
_KINDS = ("vectors", "embeddings", "matrices")
Digest = dict[str, Any]  # of JSON values: "dtypes" and the four digests


def weights_digest(llama: Any, without: Collection[str] = ()) -> Digest:
    """The digests of the backbone's decoder (not of its head).

    Args:
        llama: the backbone.
        without: names of the decoder's parameters to leave out, such as those that are saved with an adapter.

    Returns:
        ``"dtypes"``, and the digests of the module's docstring, in hexadecimal; each is None where it is not known.
    """
    decoder = llama.model
    embedding = {id(p) for p in llama.get_input_embeddings().parameters()}
    exact = hashlib.sha256()
    rounded = {kind: hashlib.sha256() for kind in _KINDS}
    known, complete, dtypes = dict.fromkeys(_KINDS, True), True, set()
    for name, p, value in _values(decoder):
        if name in without:
            continue
        if value is None:
            complete = False
            break
        kind = "embeddings" if id(p) in embedding else "vectors" if value.dim() < 2 else "matrices"
        parts = _plain(value)
        for part in parts:
            some = _sample(part)
            exact.update(f"{tuple(part.shape)} {part.dtype}".encode())
            exact.update(some.view(torch.uint8).cpu().numpy().tobytes())
            dtypes.add(str(part.dtype).removeprefix("torch."))
        if len(parts) > 1 or not value.is_floating_point() or value.dtype is torch.float16:
            known[kind] = False
        else:
            rounded[kind].update(f"{name} {tuple(value.shape)}".encode())
            rounded[kind].update(_sample(value).bfloat16().view(torch.uint8).cpu().numpy().tobytes())
    found: Digest = {"dtypes": sorted(dtypes), "exact": exact.hexdigest() if complete else None}
    return found | {kind: rounded[kind].hexdigest() if complete and known[kind] else None for kind in _KINDS}


def differ(saved: Any, now: Mapping[str, Any]) -> bool:
    """Whether two digests are of different backbones, as far as they can be compared."""
    if not isinstance(saved, Mapping):  # of a version that saved none
        return False
    if None not in (saved.get("exact"), now["exact"]):
        if saved["exact"] == now["exact"]:
            return False
        if saved.get("dtypes") == now["dtypes"]:
            return True
    return any(None not in (saved.get(kind), now[kind]) and saved[kind] != now[kind] for kind in _KINDS)


def adapter_digest(adapter: nn.Module) -> str:
    """SHA-256 of an adapter's tensors as fp32, whatever the adapter is called."""
    found = hashlib.sha256()
    for key, tensor in sorted(adapter.state_dict().items()):
        found.update(key.encode())
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are sharded over ranks."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())  # FSDP2's, DeepSpeed's


def _values(decoder: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
    """The name of each parameter, the parameter, and its values; None where this process does not hold them."""
    sharded = is_sharded(decoder)
    owners = {
        id(p): (owner, key) for owner in decoder.modules() for key, p in owner._parameters.items() if p is not None
    }
    for name, p in decoder.named_parameters():
        if sharded or not p.is_meta:
            yield name, p, None if sharded else p.detach()
            continue
        owner, key = owners[id(p)]  # offloaded: accelerate's hook loads it from here
        loaded = getattr(getattr(owner, "_hf_hook", None), "weights_map", None)
        yield name, p, None if loaded is None else loaded[key].detach()


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].contiguous()


def _plain(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of a tensor subclass, such as torchao's quantized ones; a plain tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]
