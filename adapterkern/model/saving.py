"""How the adapters of a model are saved and loaded: our folder, AdapterHub's, the hub, Trainer's checkpoints.

``Saved`` is the half of ``LlamaAdapter`` that deals with files.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from adapterkern import checks
from adapterkern.files import check_pair
from adapterkern.model.adapter import Adapter, plain
from adapterkern.model.config import AdapterConfig
from adapterkern.model.decoder import decoder_layers, text_decoder
from adapterkern.model.digest import Digest, weights_digest
from adapterkern.model.extra import Extra, covered
from adapterkern.model.files.adapterhub import read_adapterhub, write_adapterhub
from adapterkern.model.files.below import files_below, read_below, remove_others, write_below
from adapterkern.model.files.card import CARD_NAME, push_folder
from adapterkern.model.files.folder import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from adapterkern.model.files.owner import OURS, check_folder, check_no_run
from adapterkern.model.files.peft import read_peft, write_peft
from adapterkern.model.files.trainer import take_described, write_trainer

# Arguments that Trainer, TRL and accelerate pass to save_pretrained. Only state_dict matters for an adapter.
_FROM_TRAINER = frozenset(
    ("state_dict", "safe_serialization", "save_function", "max_shard_size", "push_to_hub", "variant", "token")
)


logger = logging.getLogger(__name__)


M = TypeVar("M", bound="Saved")
Read = tuple[AdapterConfig, dict[str, Tensor]]  # what ``read_adapter`` returns
Below = Sequence[tuple[str, Read]]  # what ``read_below`` returns


@contextlib.contextmanager
def unloaded_on_error(model: M) -> Iterator[M]:
    """Yield ``model``, a backbone that is being given what a file holds; an error leaves the backbone as it was."""
    try:
        yield model
    except BaseException:
        model.unload()
        raise


class Saved(Extra):
    """A wrapped decoder with named adapters that can be saved and loaded."""

    if TYPE_CHECKING:  # LlamaAdapter's

        def __init__(
            self,
            llama: PreTrainedModel,
            config: AdapterConfig | None = ...,
            *,
            fused: bool = True,
            liger: bool = False,
        ) -> None: ...

        def add_adapter(self, name: str, config: AdapterConfig) -> None: ...  # type: ignore[override]

        _saved_on: dict[str, tuple[str, ...]]

        def set_adapter(self, name: str | Sequence[str]) -> None: ...

        def adapters_below(self, name: str | None = None) -> list[str]: ...

        def delete_adapter(self, name: str) -> None: ...  # type: ignore[override]

        def _stack_of(self, argument: str, name: str | Sequence[str]) -> tuple[str, ...]: ...

        def unload(self) -> PreTrainedModel: ...

        def check_attached(self) -> None: ...

        def _check_name(self, name: str | None) -> str: ...

    @checks.other_names(save_directory="directory", adapter_name="name", selected_adapters="name, one at a time,")
    def save_pretrained(  # type: ignore[override]
        self,
        directory: str | os.PathLike[str],
        name: str | None = None,
        *,
        is_main_process: bool = True,
        **from_trainer: Any,
    ) -> None:
        """Write ``adapterkern.safetensors``, ``adapterkern.json`` and a model card, never the backbone.

        The first two are written by ``write_pair``: the new adapter is complete, or the old one
        is still there.

        transformers' Trainer calls this as for every model, with ``is_main_process`` and with ``state_dict``, which is
        None or gathered from several processes. ``model.safetensors`` is then written too, from which a Trainer
        resumes: the same tensors by their names within this model, and the configuration.

        What is below the adapter in a stack is saved with it, in ``below``: see files/below.py. Of the active adapter
        that is what it runs on, of another what it was loaded with.

        Args:
            directory: created if it does not exist.
            name: the adapter, default the active one.

        Raises:
            OSError: a file cannot be written.
            ValueError: there is no such adapter, ``state_dict`` does not have all of its tensors, a parameter of the
                backbone requires a gradient and is not among the adapter's ``modules_to_save``, or the folder holds a
                model (the backbone's own, for example), another library's adapter, or a training run.
                Existing files stay as they are.
        """
        if unknown := sorted(from_trainer.keys() - _FROM_TRAINER):
            raise TypeError(f"save_pretrained: unexpected argument {unknown[0]!r}")
        for argument, instead in (
            ("push_to_hub", "call push_to_hub(repo_id)"),
            ("variant", "save into another folder"),
        ):
            if from_trainer.get(argument):
                raise ValueError(f"{argument}: expected none, got {from_trainer[argument]!r}; {instead}")
        if not is_main_process:
            return
        asked, name = name, self._check_name(name)
        stack = [*self.adapters_below(name), name]
        for one in stack:
            self._check_as_configured(one)
        self.check_saved(name)
        others = [one for one in self.adapters if one not in stack]
        if asked is None and others and "state_dict" not in from_trainer:
            logger.warning(
                "save_pretrained: saves %r, the active adapter, and not %s", name, ", ".join(map(repr, others))
            )
        if not os.fspath(directory):
            raise ValueError("directory: expected the name of a folder, got ''")
        directory = Path(directory)
        check_no_run(directory)
        state = from_trainer.get("state_dict") or self.state_dict()
        tensors = {
            one: {
                key.removeprefix(prefix): plain(t.detach()).to("cpu").contiguous()
                for key, t in state.items()
                if key.startswith(prefix)
            }
            for one, prefix in ((one, f"{OURS}{one}.") for one in stack)
        }
        check_folder(directory)
        check_pair(directory / WEIGHTS_NAME, directory / CONFIG_NAME)
        entries = [
            write_below(
                directory, number, one, self.base, self.adapter_config(one), tensors[one], self.backbone_digest(one)
            )
            for number, one in enumerate(stack[:-1])
        ]
        write_adapter(
            directory, self.base, self.adapter_config(name), tensors[name], self.backbone_digest(name), entries
        )
        remove_others(directory, entries)
        if "state_dict" in from_trainer:
            folders = {entry["name"]: directory / entry["folder"] for entry in entries}
            write_trainer(directory, folders | {name: directory}, tensors)

    def _check_as_configured(self, name: str) -> None:
        """Raise ``ValueError`` if a module of an adapter is not as its configuration says."""
        config = self.adapter_config(name)
        for path, module in self.adapters[name].named_modules():
            if isinstance(module, Adapter):
                module.check_modules()
                if not isinstance(module.scale, Tensor) and module.scale != config.scale:
                    raise ValueError(
                        f"scale: expected {config.scale} in all adapters of {name!r}, as it is saved, got "
                        f"{module.scale} at {path}; set_scale sets it in all and in the configuration"
                    )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As every module's, which ``load_state_dict`` calls, and of what a Trainer resumes from: see files/trainer.py.

        Before anything is copied into the model.
        """
        take_described(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    @checks.other_names(
        model="llama", model_id="directory", adapter_name="no name: it is 'default'; load_adapter gives another"
    )
    def from_pretrained(  # type: ignore[override]
        cls,
        llama: PreTrainedModel,
        directory: str | os.PathLike[str] | None = None,
        *,
        fused: bool = True,
        liger: bool = False,
        fuse_norm: bool = False,
        strict: bool = False,
        resize_token_embeddings: bool = False,
    ) -> Self:
        """``llama`` with the adapter that is saved in ``directory`` as ``"default"``; see ``load_adapter``.

        In eval mode, without dropout, as transformers' ``from_pretrained``.
        """
        if directory is None or isinstance(llama, (str, os.PathLike)):
            shown = repr(llama) if isinstance(llama, (str, os.PathLike)) else type(llama).__name__
            raise TypeError(
                "from_pretrained: expected the backbone, a transformers model, and the folder of an adapter, got "
                f"{shown} and {directory!r:.80}; load the backbone first: AutoModelForCausalLM.from_pretrained(...)"
            )
        resize = llama.resize_token_embeddings if resize_token_embeddings else None
        read = read_adapter(llama, Path(directory), strict=strict, resize=resize)
        below = read_below(llama, Path(directory), strict=strict)
        return cls._from_read(llama, read, below, fused=fused, liger=liger, fuse_norm=fuse_norm)

    @checks.other_names(adapter_name="name", peft_model_id="directory", model_id="directory")
    def load_adapter(  # type: ignore[override]
        self,
        directory: str | os.PathLike[str],
        name: str,
        *,
        strict: bool = False,
        resize_token_embeddings: bool = False,
    ) -> None:
        """Add the adapter saved in ``directory`` under ``name``, with the copies of modules that it was saved with.

        Adapters below it in a stack are added too, by their own names, or as ``"domain-below-NAME"`` where the name is
        in use. Wherever an adapter is named, ``name`` then stands for all of the stack.

        Args:
            resize_token_embeddings: if the adapter was saved for another number of tokens, resize the backbone.
                Otherwise an adapter with embeddings of its own is refused, and a line in the log warns of another.
            strict: refuse a backbone whose weights are not those that the adapter was trained on; by default a line in
                the log warns of it. Not compared: folders of 0.1.0, and fp16 weights with those of another dtype. Of
                quantized weights with others, norms and embeddings are compared.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, has another format version, or was saved for a backbone of another shape; the
                message names the file, and the field or both shapes.
        """
        resize = self.resize_token_embeddings if resize_token_embeddings else None
        read = read_adapter(self.base, Path(directory), strict=strict, resize=resize)
        self._add_read(name, read, read_below(self.base, Path(directory), strict=strict))

    def backbone_digest(self, name: str | None = None) -> Digest:
        """``weights_digest`` of the backbone; of the time before it was spread over processes, if it is by now.

        With ``name``, without the modules of which this adapter has copies.
        """
        without = covered(self.base, () if name is None else self.adapter_config(name).modules_to_save or ())
        found, key = weights_digest(self.base, without), frozenset(without)
        known = self.__dict__.setdefault("_digests_before", {})
        if found["exact"] is None:
            return known.get(key, found)
        known[key] = found
        return found

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:  # type: ignore[override]
        """What ``save_pretrained`` leaves out, so that Trainer does not report it as missing from its checkpoints."""
        name = self.active_adapter
        saved = () if name is None else tuple(f"{OURS}{one}." for one in (*self.adapters_below(name), name))
        return {key for key in self.state_dict() if not key.startswith(saved)}

    def push_to_hub(self, repo_id: str, name: str | None = None, **options: Any) -> str:  # type: ignore[override]
        """Upload what ``save_pretrained`` writes to the Hugging Face hub, and return the repository's URL.

        ``options`` are ``private``, ``token``, ``revision`` and ``commit_message``, as in huggingface_hub.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, name)
            files = WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, *files_below(directory)
            return push_folder(directory, repo_id, files, **options)

    def _alone(self, name: str | None, format: str) -> str:
        """The name of an adapter to save in a format that has no stacks. Raises ``ValueError`` for an active stack."""
        if name is None and (below := self.adapters_below()):
            raise ValueError(
                f"name: expected the name of one adapter of the stack {' → '.join((*below, self._check_name(None)))}, "
                f"got None: {format}'s files hold one"
            )
        return self._check_name(name)

    def save_adapterhub(
        self, directory: str | os.PathLike[str], name: str | None = None, *, safetensors: bool = False
    ) -> None:
        """Write adapter ``name`` (default: the active one) so that AdapterHub's ``adapters`` loads it by that name.

        Options and errors are those of ``write_adapterhub``. Of a stack, whose files AdapterHub does not have, each
        adapter is saved by its name.
        """
        name = self._alone(name, "AdapterHub")
        tensors = self.adapters[name].state_dict()
        write_adapterhub(directory, name, self.adapter_config(name), tensors, self.base, safetensors=safetensors)

    @classmethod
    def from_adapterhub(
        cls, llama: PreTrainedModel, directory: str | os.PathLike[str], *, fused: bool = True, liger: bool = False
    ) -> Self:
        """``llama`` with the adapter that AdapterHub's ``adapters`` saved in ``directory``, as ``"default"``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or the adapter computes something else than ours; the message names file and
                field.
        """
        size = text_decoder(llama).config.hidden_size, len(decoder_layers(llama))
        return cls._from_read(llama, read_adapterhub(directory, *size), fused=fused, liger=liger)

    def load_adapterhub(self, directory: str | os.PathLike[str], name: str) -> None:
        """Add the adapter that ``adapters`` saved in ``directory`` as ``name``. Raises as ``from_adapterhub``."""
        self._add_read(name, read_adapterhub(directory, self.decoder.config.hidden_size, len(self.layers)))

    def save_peft(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        """Write gated prompts ``name`` (default: the active ones) so that PEFT loads them as ``AdaptionPrompt``.

        Errors are those of ``write_peft``.
        """
        name = self._alone(name, "PEFT")
        write_peft(directory, self.adapter_config(name), self.adapters[name].state_dict(), self.base)

    @classmethod
    def from_peft(
        cls, llama: PreTrainedModel, directory: str | os.PathLike[str], *, fused: bool = True, liger: bool = False
    ) -> Self:
        """``llama`` with the gated prompts that PEFT's ``AdaptionPrompt`` saved in ``directory``, as ``"default"``.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or of another kind of adapter; the message names file and field.
        """
        size = text_decoder(llama).config.hidden_size, len(decoder_layers(llama))
        return cls._from_read(llama, read_peft(directory, *size), fused=fused, liger=liger)

    def load_peft(self, directory: str | os.PathLike[str], name: str) -> None:
        """Add the gated prompts that PEFT saved in ``directory`` as ``name``. Raises as ``from_peft``."""
        self._add_read(name, read_peft(directory, self.decoder.config.hidden_size, len(self.layers)))

    @classmethod
    def _from_read(cls, llama: PreTrainedModel, read: Read, below: Below = (), **flags: bool) -> Self:
        with unloaded_on_error(cls(llama, None, **flags)) as model:
            model._add_read("default", read, below)
            model.set_adapter("default")
        return model.eval()

    def _add_read(self, name: str, read: Read, below: Below = ()) -> None:
        """Add what was read as ``name``, and as what it runs on the adapters ``below``; all of them or none."""
        self._add_one(name, read)
        stack: list[str] = []
        try:
            for saved, of_saved in below:
                free = f"{saved}-below-{name}" if saved in self.adapters else saved
                self._add_one(free, of_saved)
                stack.append(free)
            if stack:
                self._stack_of("name", [*stack, name])
        except BaseException:
            for one in (name, *stack):
                self.delete_adapter(one)
            raise
        if stack:
            self._saved_on[name] = tuple(stack)

    def _add_one(self, name: str, read: Read) -> None:
        self.add_adapter(name, read[0])
        missing, _ = self.adapters[name].load_state_dict(read[1], strict=False)  # the reader has checked all others
        if missing:  # copies of a head that only this backbone's class has
            modules = ", ".join(self.adapter_config(name).modules_to_save or ())
            logger.warning("%s: not saved with the adapter; %s starts as the backbone's own", modules, missing[0])
