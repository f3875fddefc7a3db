"""One call of ``generate`` for a batch of requests: an adapter per row, and each row's text as it comes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from adapterkern.inference.generate import padded
from adapterkern.inference.server.batching import Piece, Request, Sampling
from adapterkern.inference.server.text import Text
from adapterkern.model.llama import LlamaAdapter


def generate(model: LlamaAdapter, tokenizer: Any, requests: Sequence[Request]) -> None:
    """Answer requests that have the same sampling, each by its own adapter, and give them their pieces.

    Rows are padded on the left. A row ends by its own ``ends``, ``stop`` and ``max_tokens``, or when it is cancelled;
    the call ends with the last of them.
    """
    inputs = padded([request.prompt for request in requests], 0, model.device)
    rows = _Rows([_Row(request, tokenizer) for request in requests])
    sampling = requests[0].sampling
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=sampling.seed is not None):  # a seed is for its own request
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        model.generate(
            **inputs,
            adapter_names=[request.adapter for request in requests],
            max_new_tokens=max(request.max_tokens for request in requests),
            stopping_criteria=StoppingCriteriaList([rows]),
            **_options(sampling),
        )


def _options(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


class _Row:
    """A request's answer under way."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self.request, self.count = request, 0
        self._text = Text(tokenizer, request.after, request.stop)

    def push(self, token: int) -> bool:
        """Take the row's next token; whether the row has ended."""
        request = self.request
        if request.finished or request.cancelled:
            return True
        self.count += 1
        ended = token in request.ends
        text = "" if ended else self._text.push(token)
        if ended or (self.count == request.max_tokens and not self._text.stopped):
            text += self._text.flush()
        finish = "stop" if ended or self._text.stopped else "length" if self.count == request.max_tokens else None
        if text or finish:
            request.give(Piece(text, self.count, finish))
        return finish is not None


class _Rows(StoppingCriteria):
    """Sees every row's new token; rows end one by one."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        ended = [row.push(token) for row, token in zip(self.rows, tokens, strict=True)]
        return torch.tensor(ended, device=input_ids.device)
