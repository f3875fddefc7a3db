"""The frozen prefix: the layers below the first adapter, run separately from the layers above.

Their output does not depend on any adapter, so it can be computed once per example and kept. ``Split`` is the half of
``LlamaAdapter`` that runs a decoder in two calls: ``Split.run_prefix``, then ``Split.run_suffix``.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapterkern.model.asking import described, same_numbers, some_tokens
from adapterkern.model.decoder import Site, decoder_slice, eval_mode, modes_kept
from adapterkern.model.pretrained import Wrapped

_BELOW = "the layers below the first adapter"


class Split(Wrapped):
    """A wrapped decoder whose first layers and whose remaining layers can be run separately."""

    if TYPE_CHECKING:  # LlamaAdapter's

        @property
        def prefix_length(self) -> int: ...

        def trains_below(self) -> bool: ...

        def disable_adapter(self) -> AbstractContextManager[None]: ...

        def _site(self, layer: int) -> Site: ...

        def check_attached(self) -> None: ...

    @property
    def split_obstacle(self) -> str:
        """Why the decoder cannot be run in two calls, cut after ``prefix_length`` layers; "" if it can."""
        return self._obstacle_at(self.prefix_length)

    def _obstacle_at(self, cut: int) -> str:
        """``split_obstacle`` for a cut after so many layers. Found once for each, by running it on four tokens.

        Two calls are correct only if the decoder does nothing but run its layers between embeddings and final norm.
        Some decoders also scale the embeddings, pass more from layer to layer, or their norm has another name.
        """
        answers = self.__dict__.setdefault("_obstacles", {})
        if cut not in answers:
            answers[cut] = self._find_obstacle(cut)
        return answers[cut]

    def _find_obstacle(self, cut: int) -> str:
        name, ids = type(self.decoder).__name__, some_tokens(self, 4)
        with torch.no_grad(), eval_mode(self.base), self.disable_adapter():
            unsplit = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            try:
                first, second = decoder_slice(self.decoder, 0, cut), decoder_slice(self.decoder, cut, len(self.layers))
                first.norm = nn.Identity()
                hidden = first(input_ids=ids, use_cache=False).last_hidden_state
                split = second(inputs_embeds=hidden, use_cache=False).last_hidden_state
            except Exception as error:  # of any kind: decoders are not written to be run so
                return f"{name} cannot be run in two calls ({described(error)})"
        if same_numbers(self, split, unsplit):
            return ""
        return f"{name} does more than run its layers between embeddings and norm"

    def _check_split(self, *cuts: int) -> None:
        self.check_attached()
        for cut in cuts:
            if obstacle := self._obstacle_at(cut):
                raise ValueError(f"model: expected a decoder that can be run in two calls, but {obstacle}")

    def reuse_obstacle(self, length: int, one_length: bool = False) -> str:
        """Why what ``run_prefix`` returns for a text cannot be used again for it in training; "" if it can.

        Found by running the prefix, in training mode too: it may draw random numbers (dropout, a router's jitter,
        skipped layers), or depend on the length of the batch (RoPE that is scaled by it).

        Args:
            length: of the longest batch.
            one_length: whether all batches have this length.
        """
        if self.split_obstacle:
            return self.split_obstacle
        with modes_kept(self.base), _random_state_kept(self.base) as state:
            try:
                if obstacle := self._random_obstacle(min(64, length), state):
                    return obstacle
                if not one_length and self._depends_on_length(length):
                    how = "RoPE scaled by length, for example"
                    return f"{_BELOW} give a text other activations in a longer batch ({how})"
                return ""
            finally:
                self._forget_length()

    def _random_obstacle(self, length: int, state: Callable[[], list[object]]) -> str:
        ids = some_tokens(self, length)
        self.base.eval()
        expected = self._run_below(ids)
        self.base.train()
        before, first, after, second = state(), self._run_below(ids), state(), self._run_below(ids)
        if before != after or not same_numbers(self, second, first):
            return f"{_BELOW} draw random numbers in training (dropout, for example), so no two passes are equal"
        if not same_numbers(self, first, expected):
            return f"{_BELOW} compute something else in training than in evaluation"
        return ""

    def _depends_on_length(self, length: int) -> bool:
        self.base.eval()
        self._forget_length()
        shorter = [self._run_below(some_tokens(self, min(n, length))) for n in (4, 16, max(16, length // 2))]
        longest = self._run_below(some_tokens(self, length))
        return not all(same_numbers(self, longest[:, : s.shape[1]], s) for s in shorter)

    def _forget_length(self) -> None:
        """Run two tokens: some decoders keep what they adjusted to a long batch until a short one comes."""
        self._run_below(some_tokens(self, 2))

    def run_prefix(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        below: Tensor | None = None,
        start: int = 0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The residual stream (B, L, d) after the first ``prefix_length`` layers, below any adapter; no gradient.

        Args:
            input_ids, attention_mask: int64, (B, L).
            below: the stream (B, L, d) after the first ``start`` layers, if it is known; then only the others run.
            position_ids: int64, (B, L); with ``attention_mask=None`` rows may hold several texts, each from 0.

        Raises:
            ValueError: the decoder cannot be run in two calls, see ``split_obstacle``; or the running adapter has
                embeddings of its own.
        """
        self._check_split(start, self.prefix_length)
        if self.trains_below():
            raise ValueError("modules_to_save: expected frozen embeddings below a frozen prefix, got trained ones")
        return self._run_below(input_ids, attention_mask, below, start, position_ids)

    def _run_below(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        below: Tensor | None = None,
        start: int = 0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        prefix = decoder_slice(self.decoder, start, self.prefix_length)
        prefix.norm = nn.Identity()
        source = {"input_ids": input_ids} if below is None else {"inputs_embeds": below}
        source |= {} if position_ids is None else {"position_ids": position_ids}
        with torch.no_grad(), self.disable_adapter():
            return prefix(**source, attention_mask=attention_mask, use_cache=False).last_hidden_state

    @contextmanager
    def prefix_recorded(self) -> Iterator[list[Tensor]]:
        """Gives what ``run_prefix`` would return, (B, n, d), of each forward inside the block, in their order.

        A forward is of n tokens, those before it in a KV cache: their streams one after the other are those of the
        whole sequence. ``prefix_length`` must be >= 1.
        """
        found: list[Tensor] = []
        layer = self.layers[self.prefix_length - 1]
        site = layer.__dict__["_adapter_site"]
        layer.__dict__["_adapter_site"] = _Recorder(site, found)
        try:
            yield found
        finally:
            layer.__dict__["_adapter_site"] = site

    def run_suffix(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        start: int | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The decoder's last hidden state (B, L, d) from the output of ``run_prefix``, as one forward computes it.

        Args:
            hidden: the residual stream (B, L, d) after ``start`` layers.
            attention_mask: int64, (B, L).
            start: default, and at most, ``prefix_length``.
            position_ids: as for ``run_prefix``.

        Raises:
            ValueError: the decoder cannot be run in two calls, see ``split_obstacle``.
        """
        start = self.prefix_length if start is None else start
        self._check_split(start)
        if start > 0:
            hidden = self._site(start - 1).run("layer", hidden)
        suffix = decoder_slice(self.decoder, start, len(self.layers))
        places = {} if position_ids is None else {"position_ids": position_ids}
        return suffix(inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False, **places).last_hidden_state


class _Recorder:
    """A site that also records the residual stream before its layer's adapter."""

    def __init__(self, site: Site, found: list[Tensor]) -> None:
        self.site, self.found = site, found

    def cuts(self) -> bool:
        return self.site.cuts()

    def run(self, place: str, hidden: Tensor, x: Tensor | None = None) -> Tensor:
        if place == "layer":
            self.found.append(hidden)
        return self.site.run(place, hidden, x)


@contextmanager
def _random_state_kept(module: nn.Module) -> Iterator[Callable[[], list[object]]]:
    """Restores the random generators on exit. Gives a function that reads their states, to compare with ``==``."""
    devices = {p.device for p in module.parameters() if p.device.type in ("cuda", "xpu")}

    def state() -> list[object]:
        return [
            random.getstate(),
            torch.get_rng_state().tolist(),
            *(torch.get_device_module(device).get_rng_state(device).tolist() for device in devices),
        ]

    pythons, torchs = random.getstate(), torch.get_rng_state()
    of_devices = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
    try:
        yield state
    finally:
        random.setstate(pythons)
        torch.set_rng_state(torchs)
        for device, kept in of_devices.items():
            torch.get_device_module(device).set_rng_state(kept, device)
