"""``text_only``: in models that also read images, adapters on the tokens of the text alone.

Such a model puts parts of images in the place of certain tokens. Which tokens these are is said by the ids of a batch,
which the layers do not get: hooks around ``llama.model``, which gets them, keep them for the time of its forward.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapterkern.model.decoder import text_decoder

_KINDS = ("image", "video", "audio")


def image_tokens(llama: Any) -> list[int]:
    """The ids of the tokens that stand for parts of images, or of sounds; none in a model of text alone."""
    if text_decoder(llama) is getattr(llama, "model", None):
        return []
    found = {getattr(llama.config, f"{kind}_token_{what}", None) for kind in _KINDS for what in ("id", "index")}
    return sorted(token for token in found if isinstance(token, int))


def watch(model: Any) -> list[Any]:
    """Let ``model`` know the image tokens of each batch of its backbone. Returns the hooks' handles."""
    if not image_tokens(model.base):
        return []
    reader = model.base.model
    return [
        reader.register_forward_pre_hook(functools.partial(_keep, model), with_kwargs=True),
        reader.register_forward_hook(functools.partial(_forget, model), always_call=True),
    ]


def _keep(model: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not any(model._configs[name].text_only for name in model.active_adapters()):
        return
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ValueError("text_only: expected input_ids, got inputs_embeds, which do not say what is part of an image")
    tokens = torch.tensor(image_tokens(model.base), device=ids.device)
    model._blocks.images = torch.isin(ids, tokens)[..., None]


def _forget(model: Any, *_: Any) -> None:
    model._blocks.images = None


def on_text(run: Callable[[Tensor], Tensor], images: Tensor, hidden: Tensor) -> Tensor:
    """``run(hidden)``, but ``hidden`` (B, L, d) itself where ``images`` (B, L, 1) says so."""
    return torch.where(images.to(hidden.device), hidden, run(hidden))
