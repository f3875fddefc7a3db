"""Asking a backbone how it behaves, by running it on a few tokens, instead of knowing the names of its fields."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from adapterkern.model.decoder import eval_mode, layer_device

_FULL = (torch.float32, torch.float64)


def some_tokens(llama: Any, count: int) -> Tensor:
    """Different token ids (1, count), int64, where ``llama`` embeds them; not 0, which many models treat as padding."""
    embeddings = llama.get_input_embeddings()
    return 1 + torch.arange(count, device=layer_device(embeddings))[None] % (embeddings.num_embeddings - 1)


def same_numbers(llama: Any, a: Tensor, b: Tensor) -> bool:
    """Whether two results (..., tokens, d) of ``llama`` differ by no more than its rounding explains.

    In fp32 by 1e-3 of their norm. In less, rounding alone reaches several percent, and more for single tokens, which
    go to another expert: then at least half of the tokens must differ by less than 5 %.
    """
    if a.shape != b.shape:
        return False
    low = torch.is_autocast_enabled(b.device.type) or any(p.dtype not in _FULL for p in llama.parameters())
    b = b.float()
    error = a.to(b.device).float() - b
    if low:
        return bool((error.norm(dim=-1) <= 5e-2 * b.norm(dim=-1)).float().mean() >= 0.5)
    return bool(error.norm() <= 1e-3 * b.norm())


def decoder_of(llama: Any) -> Any:
    """``llama``, a transformers model, without its head."""
    return getattr(llama, decoder_name(llama))


def decoder_name(llama: Any) -> str:
    """The name of its submodule; in a few classes ``base_model_prefix`` names what they lack."""
    return llama.base_model_prefix if llama.base_model_prefix in llama._modules else "model"


def check_runs(model: Any) -> None:
    """Raise ``ValueError`` unless a wrapped backbone runs on token ids alone, with its adapters; tried with four."""
    try:
        with torch.no_grad(), eval_mode(model.base):
            model.decoder(input_ids=some_tokens(model, 4), use_cache=False)
    except Exception as error:
        name = type(model.base).__name__
        raise ValueError(
            f"model: expected a backbone that runs on token ids alone, got {name} ({described(error)})"
        ) from error


def check_prompts(
    llama: Any,
    gates: Sequence[Tensor],
    without: Callable[[], AbstractContextManager[None]],
    within: Callable[[], AbstractContextManager[None]],
) -> None:
    """Raise ``ValueError`` unless gated prompts do in ``llama`` what their equation says; tried with four tokens.

    With their ``gates`` at 0, as they are, it computes what it does ``without`` them; with open gates, something else.
    What cannot be run on token ids alone is not asked; there the forward refuses an attention that adds no prompt.
    """
    name = type(llama).__name__

    def hidden() -> Tensor:
        return decoder_of(llama)(input_ids=some_tokens(llama, 4), use_cache=False).last_hidden_state

    with torch.no_grad(), eval_mode(llama):
        try:
            with without():
                bare = hidden()
        except Exception:  # of any kind, and not the prompts'
            return
        try:
            with within():
                closed = hidden()
                for gate in gates:
                    gate.fill_(1)
                opened = hidden()
        except Exception as error:
            raise ValueError(
                f"kind: expected a backbone that runs gated prompts for 'prompt', got {name} ({described(error)})"
            ) from error
        finally:
            for gate in gates:
                gate.zero_()
    if not same_numbers(llama, closed, bare) or torch.equal(opened, bare):
        raise ValueError(f"kind: expected a backbone whose attention adds a gated prompt for 'prompt', got {name}")


def described(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
