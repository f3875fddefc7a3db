"""``modules_to_save``: modules of the backbone that are trained with an adapter, each adapter having its own copy.

A classification head, or the embeddings of new tokens. The backbone's own module stays as it is, frozen; the copies
(copies.py) are part of the adapter, ``model.adapters[name]["modules_to_save"]``, so whatever saves, loads, shards or
optimizes an adapter has them too.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from adapterkern.model.config import MODULES, AdapterConfig
from adapterkern.model.copies import Replaceable, attach, detach, make_copies
from adapterkern.model.decoder import decoder_layers
from adapterkern.model.pretrained import Wrapped


def default_heads(llama: Any) -> tuple[str, ...]:
    """The heads that the backbone's class brings: what has parameters and is outside its decoder.

    None of a language model, whose heads are trained already (ModernBERT has a layer before the output embeddings).
    """
    if llama.get_output_embeddings() is not None:
        return ()
    inside = {id(p) for p in llama.model.parameters()}
    heads = [name for name, child in llama.named_children() if any(id(p) not in inside for p in child.parameters())]
    return tuple(heads)


def find_modules(llama: Any, names: Sequence[str] | None) -> tuple[str, ...]:
    """The paths of the modules that an adapter trains and saves besides itself.

    Args:
        llama: the backbone.
        names: paths, or their ends: ``"embed_tokens"``, or ``"mlp"`` for those of all layers. The class's own heads are
            added. None: these heads alone; empty: no module at all.

    Raises:
        ValueError: a name that no module has, or a module that cannot be trained.
    """
    if names is not None and not names:
        return ()
    found = {path: llama.get_submodule(path) for path in default_heads(llama)}
    for name in names or ():
        ends = {path: module for path, module in llama.named_modules() if path and f".{path}".endswith(f".{name}")}
        if not ends:
            raise ValueError(
                f"modules_to_save: expected names of modules of {type(llama).__name__}, such as "
                f"{', '.join(_examples(llama))}, got {name!r}"
            )
        found |= ends
    layers = set(decoder_layers(llama))
    chosen: list[str] = []
    owned: set[int] = set()
    found = dict(_below(llama, path, module) for path, module in found.items())
    for path, module in sorted(found.items(), key=lambda item: (item[0].count("."), item[0])):  # outer modules first
        parameters = list(module.parameters())
        if layers & set(module.modules()):
            raise ValueError(f"modules_to_save: expected modules inside or beside the layers, got {path!r}")
        if not parameters:
            raise ValueError(f"modules_to_save: expected modules with parameters, got {path!r}, which has none")
        if odd := [p for p in parameters if not p.is_floating_point() or _is_quantized(p)]:
            raise ValueError(
                f"modules_to_save: expected a module that is not quantized, got {path!r} with {odd[0].dtype}; name it "
                "among the modules that the quantization leaves out"
            )
        for key, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                raise ValueError(
                    f"modules_to_save: expected a module that saves floating point alone, got {path!r}, whose {key} "
                    f"is of {tensor.dtype}"
                )
        if all(id(p) in owned for p in parameters):  # inside another one, or tied to it
            continue
        owned |= {id(p) for p in parameters}
        chosen.append(path)
    return tuple(chosen)


def _below(llama: Any, path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The module, or one of the decoder that holds its parameters: the embeddings for an LM head tied to them."""
    ids = {id(p) for p in module.parameters()}
    for name, other in () if path.startswith("model.") or not ids else llama.model.named_modules():
        if ids <= {id(p) for p in other._parameters.values()}:
            return f"model.{name}", other
    return path, module


def _examples(llama: Any) -> list[str]:
    children = (*llama.model.named_children(), *llama.named_children())
    return [
        name for name, child in children if name not in ("layers", "model") and any(True for _ in child.parameters())
    ]


def _is_quantized(p: Tensor) -> bool:
    return hasattr(p, "quant_state") or hasattr(p, "SCB") or hasattr(p, "dequantize_") or _is_wrapper(p)


def _is_wrapper(p: Tensor) -> bool:
    return type(p) not in (Tensor, nn.Parameter) and hasattr(p, "__tensor_flatten__")


def is_covered(llama: Any, name: str, paths: Iterable[str]) -> bool:
    """Whether the backbone's parameter ``name`` has a copy, or is tied to one that has."""
    paths = tuple(paths)
    if any(name.startswith(f"{path}.") for path in paths):
        return True
    p = llama.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]]
    return any(p is q for path in paths for q in llama.get_submodule(path).parameters())


def covered(llama: Any, paths: Iterable[str]) -> set[str]:
    """The names of the decoder's parameters that have copies, or are tied to such."""
    paths = tuple(paths)
    return {key for key, _ in llama.model.named_parameters() if paths and is_covered(llama, f"model.{key}", paths)}


def saved_shapes(llama: Any, paths: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The names of the copies' tensors in an adapter's file, and the shapes that the backbone's modules have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        module = llama.get_submodule(path)
        sizes = {name: getattr(p, "ds_shape", p.shape) for name, p in module.named_parameters()}  # DeepSpeed's shards
        shapes |= {f"{MODULES}.{path}.{key}": tuple(sizes.get(key, t.shape)) for key, t in module.state_dict().items()}
    return shapes


class Extra(Wrapped):
    """A wrapped decoder whose adapters may have copies of its modules."""

    adapters: nn.ModuleDict

    if TYPE_CHECKING:  # LlamaAdapter's

        @property
        def _mixture(self) -> Any: ...

        @property
        def active_adapter(self) -> str | None: ...

        def active_adapters(self) -> list[str]: ...

        def disable_adapter(self) -> AbstractContextManager[None]: ...

        def adapter_config(self, name: str | None = None) -> AdapterConfig: ...

        def _norms_of_their_own(self) -> AbstractContextManager[None]: ...

    def running_copies(self) -> list[nn.Module]:
        """The copies of modules that the active adapter has, and then those of adapters below it in a stack."""
        if self._mixture is not None:
            return []
        found = [self.adapters._modules[name]._modules.get(MODULES) for name in reversed(self.active_adapters())]
        return [copies for copies in found if copies is not None]

    def trains_below(self) -> bool:
        """Whether a running adapter has copies of modules below the first layer: of the embeddings."""
        decoders = [copies._modules.get("model") for copies in self.running_copies()]
        return any(d is not None and d._modules.keys() - {"layers", "norm"} for d in decoders)

    def _with_modules(self, config: AdapterConfig) -> AdapterConfig:
        """The configuration with the paths of the modules in place of their names."""
        paths = find_modules(self.base, config.modules_to_save)
        return dataclasses.replace(config, modules_to_save=paths) if paths else config

    def _add_copies(self, sites: nn.ModuleDict, config: AdapterConfig) -> None:
        if config.modules_to_save:
            sites[MODULES] = make_copies(self.base, config.modules_to_save)
            kept = {path for other in self._configs.values() for path in other.modules_to_save or ()}
            with self._norms_of_their_own():
                try:
                    attach(self, self.base, config.modules_to_save)
                except ValueError:
                    detach(self, self.base, kept)
                    raise

    def check_saved(self, name: str | None = None) -> None:
        """Raise ``ValueError`` if the backbone has a parameter that is trained and that ``name`` would not save."""
        paths = self.adapter_config(name).modules_to_save or ()
        for key, p in self.base.named_parameters():
            if p.requires_grad and not is_covered(self.base, key, paths):
                raise ValueError(
                    f"modules_to_save: the backbone's parameter {key} requires a gradient and would not be saved: name "
                    "its module in AdapterConfig(modules_to_save=[...]), or freeze it by requires_grad_(False)"
                )

    def unused_copies(self, name: str | None = None, lm_head: bool = False) -> list[str]:
        """The modules of an adapter that the decoder, and ``lm_head``, do not run: other heads."""
        paths = self.adapter_config(name).modules_to_save or ()
        output = self.base.get_output_embeddings() if lm_head else None
        return [p for p in paths if not p.startswith("model.") and self.base.get_submodule(p) is not output]

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the backbone's own weights."""
        with self.disable_adapter():  # transformers reads them as attributes, which may be a copy's
            super().tie_weights(*args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own. Raises ``ValueError`` if an adapter has a copy of the embeddings."""
        ends = [m for m in (self.base.get_input_embeddings(), self.base.get_output_embeddings()) if m is not None]
        same = new_num_tokens in (None, self.base.get_input_embeddings().num_embeddings)
        if not same and any(isinstance(module, Replaceable) for module in ends):
            raise ValueError(
                f"resize_token_embeddings: expected no adapter that trains the embeddings, got modules_to_save with "
                f"them: resize the backbone first, then add such an adapter; got new_num_tokens={new_num_tokens}"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
