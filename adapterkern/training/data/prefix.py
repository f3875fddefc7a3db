"""The frozen-prefix cache: activations below the first adapter, computed once per text and reused from then on.

Layers below the first adapter give the same residual stream in every epoch and every evaluation. The cache holds that
stream, (n, d) for a text of n tokens without padding, in memory up to a limit, and beyond it in a memory-mapped
temporary file. The file is unlinked as soon as it is mapped, so nothing is left on disk however the process ends.

The key of a text is a digest of its token ids and of everything that its activations depend on: the prefix's weights
and number of layers, the backbone's configuration, the precision, and the shape and padding of batches. Activations are
therefore never reused for another model or tokenizer, and one cache can serve many runs on one backbone.

The numbers are those of a run without the cache: bit-identical if all batches have one shape (full batches with
``padding="max_length"``), otherwise equal up to rounding, since matrix products may sum in another order for another
shape. For the same reason the cache computes in few shapes: full batches of rows whose lengths round up to the same
multiple of 16. The activations of a text then do not depend on other texts, and a resumed run gets the same ones.
Padding is not stored and is returned as zeros: it is masked, and nothing depends on it.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapterkern.model.llama import LlamaAdapter
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import collate, count_tokens, to_device
from adapterkern.training.data.examples import Example
from adapterkern.training.processes import is_sharded

_LENGTH_STEP = 16  # computed lengths are multiples of it

Context = Callable[[], contextlib.AbstractContextManager[object]]


class Slot(NamedTuple):
    """Where the activations of a text are: rows ``start`` to ``start + length`` of a slab."""

    slab: int
    start: int
    length: int


class PrefixCache:
    """Activations of texts after a frozen prefix.

    Args:
        memory_bytes: size in memory; the rest goes to a temporary file.
        directory: the folder of that file; by default the system's temporary folder (``TMPDIR``).
    """

    def __init__(self, memory_bytes: int = 2 << 30, directory: str | os.PathLike[str] | None = None) -> None:
        self.memory_bytes = memory_bytes
        self.directory = directory
        self._slabs: list[Tensor] = []  # (tokens, d)
        self._mapped: set[int] = set()  # indices of the slabs that are files
        self._slots: dict[bytes, Slot] = {}
        self._lengths: set[int] = set()  # of the prefixes held, in layers

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def bytes_in_memory(self) -> int:
        return sum(slab.nbytes for number, slab in enumerate(self._slabs) if number not in self._mapped)

    @property
    def bytes_on_disk(self) -> int:
        return sum(self._slabs[number].nbytes for number in self._mapped)

    def fill(
        self,
        model: LlamaAdapter,
        examples: Sequence[Example],
        config: TrainConfig,
        autocast: Context = contextlib.nullcontext,
        on_batch: Callable[[int], bool] | None = None,
    ) -> list[Slot] | None:
        """Compute the activations that the cache does not hold yet.

        Args:
            autocast: makes the context that the prefix runs in.
            on_batch: called with the number of texts after each batch; if it returns False, the fill is abandoned.

        Returns:
            the slot of each example, in order; None if the fill was abandoned, which leaves the cache as it was.

        Raises:
            OSError: the temporary file does not fit on its disk.
        """
        keys = _keys(examples, prefix_fingerprint(model, config, model.prefix_length))
        new = list({k: e for k, e in zip(keys, examples, strict=True) if k not in self._slots}.items())
        start, known = self._longest_known(model, new, config)
        before = len(self._slabs)
        complete = False
        try:
            slots: dict[bytes, Slot] = {}
            for length, chunk in _batches(new, config):
                filled = chunk + [chunk[-1]] * (config.batch_size - len(chunk))
                batch = to_device(collate([example for _, example in filled], config, length), model.device)
                below = None
                if start:
                    below = self.gather([known[k] for k, _ in filled], length, config).to(model.device)
                with torch.no_grad(), autocast():
                    hidden = model.run_prefix(batch["input_ids"], batch["attention_mask"], below, start).to("cpu")
                if not slots:
                    slots = self._allocate(new, hidden.shape[-1], hidden.dtype)
                for (k, example), states in zip(chunk, hidden, strict=False):
                    n = len(example.input_ids)
                    offset = 0 if config.padding_side == "right" else length - n
                    self._view(slots[k]).copy_(states[offset : offset + n])
                if on_batch is not None and not on_batch(len(chunk)):
                    return None
            complete = True
        finally:
            if not complete:
                del self._slabs[before:]
                self._mapped -= set(range(before, before + 2))
        self._slots |= slots
        self._lengths.add(model.prefix_length)
        return [self._slots[k] for k in keys]

    def _longest_known(
        self, model: LlamaAdapter, new: Sequence[tuple[bytes, Example]], config: TrainConfig
    ) -> tuple[int, dict[bytes, Slot]]:
        """The longest shorter prefix that is cached for all ``new`` texts, and their slots; 0 if there is none."""
        for length in sorted((n for n in self._lengths if n < model.prefix_length), reverse=True):
            keys = _keys([example for _, example in new], prefix_fingerprint(model, config, length))
            if all(k in self._slots for k in keys):
                return length, {key: self._slots[k] for (key, _), k in zip(new, keys, strict=True)}
        return 0, {}

    def gather(
        self, slots: Sequence[Slot], length: int, config: TrainConfig, starts: Sequence[int] | None = None
    ) -> Tensor:
        """Activations (B, length, d) of a batch, on the CPU, zero-padded on ``config.padding_side``.

        Args:
            starts: where the texts begin, flat indices into (B·length), if rows hold several; by default one row each.
        """
        if starts is None:
            right = config.padding_side == "right"
            starts = [row * length + (0 if right else length - slot.length) for row, slot in enumerate(slots)]
        first = self._slabs[slots[0].slab]
        hidden = first.new_zeros((1 + max(starts) // length) * length, first.shape[1])
        for start, slot in zip(starts, slots, strict=True):
            hidden[start : start + slot.length] = self._view(slot)
        return hidden.unflatten(0, (-1, length))

    def _view(self, slot: Slot) -> Tensor:
        return self._slabs[slot.slab][slot.start : slot.start + slot.length]

    def _allocate(self, new: list[tuple[bytes, Example]], width: int, dtype: torch.dtype) -> dict[bytes, Slot]:
        """A slab in memory for as many of the new texts as fit there, and one on disk for the rest."""
        row_bytes = width * dtype.itemsize
        room = (self.memory_bytes - self.bytes_in_memory) // row_bytes
        used = [0, 0]  # tokens in memory, on disk
        placed = []
        for key, example in new:
            n = len(example.input_ids)
            kind = 0 if used[0] + n <= room else 1
            placed.append((key, kind, used[kind], n))
            used[kind] += n
        numbers = {}
        if used[0]:
            numbers[0] = len(self._slabs)
            self._slabs.append(torch.empty(used[0], width, dtype=dtype))
        if used[1]:
            numbers[1] = len(self._slabs)
            self._slabs.append(self._map_file((used[1], width), dtype))
            self._mapped.add(numbers[1])
        return {key: Slot(numbers[kind], start, n) for key, kind, start, n in placed}

    def _map_file(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        size = shape[0] * shape[1] * dtype.itemsize
        handle, name = tempfile.mkstemp(prefix="adapterkern-prefix-", dir=self.directory)
        try:
            # Real blocks, not a sparse file: a full disk is an OSError here, but a SIGBUS on a later write.
            allocate = getattr(os, "posix_fallocate", None)
            if allocate is not None:
                allocate(handle, 0, size)
            else:
                os.truncate(handle, size)
            return torch.from_file(name, shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)
        except OSError as error:
            raise OSError(
                f"prefix_cache: {size / 2**20:.0f} MiB of activations do not fit in {os.path.dirname(name)} "
                f"({error.strerror}): set TMPDIR to a larger disk, raise prefix_cache_bytes, or set prefix_cache=False"
            ) from error
        finally:
            os.close(handle)
            os.unlink(name)


def _keys(examples: Sequence[Example], key: bytes) -> list[bytes]:
    return [hashlib.blake2b(e.input_ids.tobytes(), key=key, digest_size=20).digest() for e in examples]


def _batches(
    new: list[tuple[bytes, Example]], config: TrainConfig
) -> Iterator[tuple[int, list[tuple[bytes, Example]]]]:
    """Texts to compute together, with the length to pad them to. The longest, which need most memory, come first."""
    by_length: dict[int, list[tuple[bytes, Example]]] = {}
    for item in new:
        by_length.setdefault(_length(item[1], config), []).append(item)
    for length in sorted(by_length, reverse=True):
        items = by_length[length]
        for start in range(0, len(items), config.batch_size):
            yield length, items[start : start + config.batch_size]


def _length(example: Example, config: TrainConfig) -> int:
    """The length that the cache pads an example to."""
    steps = -(-len(example.input_ids) // _LENGTH_STEP)
    return config.max_length if config.padding == "max_length" else min(steps * _LENGTH_STEP, config.max_length)


def prefix_fingerprint(model: LlamaAdapter, config: TrainConfig, length: int) -> bytes:
    """32 bytes that depend on everything, except token ids, that determines activations after ``length`` layers."""
    decoder = model.decoder
    digest = hashlib.sha256()
    shapes = (config.batch_size, config.padding, config.padding_side, config.max_length)
    described = (model.config.to_json_string(), model.config._attn_implementation, length, config.precision, shapes)
    digest.update(repr(described).encode())
    for module in (*_below(decoder), *decoder.layers[:length]):
        add_tensors(digest, (*module.named_parameters(), *module.named_buffers()))
    return digest.digest()


def add_tensors(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add tensors, with their names, to a digest of hashlib's."""
    for name, tensor in tensors:
        # A 64-bit hash per row on the tensor's own device, then SHA-256 over the hashes: fast at 7B parameters too.
        rows = torch.hash_tensor(tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1), dim=-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(rows.view(torch.int64).cpu().numpy().astype(np.int64).tobytes())


def _below(decoder: Any) -> list[Any]:
    """The modules of a decoder besides its layers and its final norm: embeddings, usually, and RoPE."""
    first = ("embed_tokens", "rotary_emb")  # in this order, so that the keys of older versions stay
    names = [*first, *(name for name, _ in decoder.named_children() if name not in (*first, "layers", "norm"))]
    return [module for name in names if (module := getattr(decoder, name, None)) is not None]


def choose_cache(
    model: LlamaAdapter, config: TrainConfig, examples: Sequence[Example], passes: int, before: bool | None = None
) -> tuple[bool, str]:
    """Whether to use a prefix cache on ``examples``, and why, for ``config.prefix_cache`` True, False or None (auto).

    Args:
        passes: how often each example is needed; 0 if there is none.
        before: what the interrupted run decided that is resumed; kept if ``config.prefix_cache`` is None.

    Raises:
        ValueError: the cache is requested but impossible, for example because the backbone has dropout.
    """
    if config.prefix_cache is False:
        return False, "it was not wanted"
    if passes == 0:
        return False, "no step reads its rows as they are"
    if obstacle := _obstacle(model, config, examples):
        if config.prefix_cache:
            raise ValueError(f"prefix_cache: expected None or False, because {obstacle}; got True")
        return False, obstacle
    # The residual stream is fp32 under autocast and with an fp32 backbone; otherwise it needs half of this.
    needed = count_tokens(examples) * model.decoder.config.hidden_size * 4
    where = f"{needed / 2**20:.0f} MiB"
    if config.prefix_cache or before:
        return True, f"{where} of activations"
    if before is False:
        return False, "the run that is resumed has none"
    if passes < 2:
        return False, "every text is needed only once"
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed - config.prefix_cache_bytes > free // 2:
        return False, f"{where} of activations would take more than half of the free disk space"
    return True, f"{where} of activations"


def _obstacle(model: LlamaAdapter, config: TrainConfig, examples: Sequence[Example]) -> str:
    """Why the activations below the first adapter cannot be reused; "" if they can."""
    if model.prefix_length == 0:
        return "the first layer is adapted, or a module below it is trained"
    if any(p.is_meta for p in model.decoder.layers[: model.prefix_length].parameters()):
        return "the prefix's weights are offloaded"
    if is_sharded(model):
        return "the backbone is sharded over processes"
    longest = max((_length(example, config) for example in examples), default=_LENGTH_STEP)
    return model.reuse_obstacle(longest, one_length=config.padding == "max_length")
