"""The frozen prefix: the layers below the first adapter, run separately from the layers above.

Their output does not depend on any adapter, so it can be computed once per example and kept. ``Split`` is the half of
``LlamaAdapter`` that runs a decoder in two calls: ``Split.run_prefix``, then ``Split.run_suffix``.
"""

import functools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapterkern.model.decoder import Site, decoder_slice, eval_mode
from adapterkern.model.pretrained import Wrapped


class Split(Wrapped):
    """A wrapped decoder whose first layers and whose remaining layers can be run separately."""

    if TYPE_CHECKING:  # LlamaAdapter's

        @property
        def prefix_length(self) -> int: ...

        def trains_below(self) -> bool: ...

        def disable_adapter(self) -> AbstractContextManager[None]: ...

        def _site(self, layer: int) -> Site: ...

    @functools.cached_property
    def split_obstacle(self) -> str:
        """Why the decoder cannot be run in two calls; "" if it can. Found once, by running it on four tokens.

        Two calls are correct only if the decoder does nothing but run its layers between embeddings and final norm.
        Some decoders also scale the embeddings, or their norm has another name.
        """
        ids = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        middle, end = len(self.layers) // 2, len(self.layers)
        with torch.no_grad(), eval_mode(self.base), self.disable_adapter():
            try:
                first, second = decoder_slice(self.decoder, 0, middle), decoder_slice(self.decoder, middle, end)
            except ValueError as error:
                return str(error)
            first.norm = nn.Identity()
            hidden = first(input_ids=ids, use_cache=False).last_hidden_state
            split = second(inputs_embeds=hidden, use_cache=False).last_hidden_state
            unsplit = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        if (split - unsplit).norm() <= 1e-2 * unsplit.norm():
            return ""
        return f"{type(self.decoder).__name__} does more than run its layers between embeddings and norm"

    def _check_split(self) -> None:
        if self.split_obstacle:
            raise ValueError(f"model: expected a decoder that can be run in two calls, but {self.split_obstacle}")

    def run_prefix(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, below: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """The residual stream (B, L, d) after the first ``prefix_length`` layers, below any adapter; no gradient.

        Args:
            input_ids, attention_mask: int64, (B, L).
            below: the stream (B, L, d) after the first ``start`` layers, if it is known; then only the others run.

        Raises:
            ValueError: the decoder cannot be run in two calls, see ``split_obstacle``; or the running adapter has
                embeddings of its own.
        """
        self._check_split()
        if self.trains_below():
            raise ValueError("modules_to_save: expected frozen embeddings below a frozen prefix, got trained ones")
        prefix = decoder_slice(self.decoder, start, self.prefix_length)
        prefix.norm = nn.Identity()
        source = {"input_ids": input_ids} if below is None else {"inputs_embeds": below}
        with torch.no_grad(), self.disable_adapter():
            return prefix(**source, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def run_suffix(self, hidden: Tensor, attention_mask: Tensor | None = None, start: int | None = None) -> Tensor:
        """The decoder's last hidden state (B, L, d) from the output of ``run_prefix``, as one forward computes it.

        Args:
            hidden: the residual stream (B, L, d) after ``start`` layers.
            attention_mask: int64, (B, L).
            start: default, and at most, ``prefix_length``.

        Raises:
            ValueError: the decoder cannot be run in two calls, see ``split_obstacle``.
        """
        self._check_split()
        start = self.prefix_length if start is None else start
        if start > 0:
            hidden = self._site(start - 1).run("layer", hidden)
        suffix = decoder_slice(self.decoder, start, len(self.layers))
        return suffix(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False).last_hidden_state
