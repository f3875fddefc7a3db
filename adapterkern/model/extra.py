"""``modules_to_save``: modules of the backbone that are trained with an adapter, each adapter having its own copy.

A classification head, or the embeddings of new tokens. The backbone's own module stays as it is, frozen; the copies are
part of the adapter, ``model.adapters[name]["modules_to_save"]``, so whatever saves, loads, shards or optimizes an
adapter has them too. While an adapter with a copy is active, the module's attributes are the copy's (parameters and
submodules): its own forward, and whoever else reads ``lm_head.weight``, then computes with the copy.

Copies are in fp32 at least, as adapters are: the module then computes in fp32, and its output has its usual dtype.
Parameters that are tied stay tied: another module that holds the same parameter runs with the copy as well.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from adapterkern.model.config import MODULES, AdapterConfig
from adapterkern.model.decoder import change_class, check_forward, decoder_layers
from adapterkern.model.digest import is_sharded
from adapterkern.model.liger import Fused
from adapterkern.model.pretrained import Wrapped

_NOT_COPIED = ("_hf_hook", "_old_forward", "forward", "_place")


class Copies(Protocol):
    """The model that has the copies."""

    def running_copies(self) -> nn.Module | None:
        """The copies of the adapter that runs, by their paths; None if it has none, or none runs."""


class _Folder(nn.Module):
    """A part of a path, such as ``model`` in ``model.embed_tokens``."""


class _Place:
    """Where a module of the backbone finds its copy."""

    def __init__(self, model: Copies, path: str) -> None:
        self.model, self.path = model, path.split(".")
        self.tied: dict[
            str, tuple[list[str], str]
        ] = {}  # a parameter's name here → path and name of the one that is saved

    def copy(self) -> nn.Module | None:
        return _at(self.model.running_copies(), self.path)

    def find(self, name: str) -> Any:
        """The attribute of the copy that runs; None if there is none."""
        copies = self.model.running_copies()
        if copies is None:
            return None
        if (copy := _at(copies, self.path)) is not None:
            found = copy._parameters.get(name)
            return copy._modules.get(name) if found is None else found
        if name in self.tied:
            path, other = self.tied[name]
            if (copy := _at(copies, path)) is not None:
                return copy._parameters.get(other)
        return None


class Replaceable(nn.Module):
    """Precedes a module's own class in the method resolution order; its attributes may be a copy's."""

    _place: _Place

    def __getattr__(self, name: str) -> Any:
        place = self.__dict__.get("_place")
        found = None if place is None else place.find(name)
        return super().__getattr__(name) if found is None else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run: Callable[..., Any] = super().forward
        found: Any = self._place.copy()
        if found is not None:
            run = found  # called itself, so that engines that gather a module's parameters for its forward see it
            found = next(found.parameters())
        else:
            found = next((p for name in self._place.tied if (p := self._place.find(name)) is not None), None)
        own = next(_own_parameters(self)).dtype
        if found is None or found.dtype == own:
            return run(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), own, found.dtype)
        return _cast(run(*args, **kwargs), found.dtype, own)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (_own_class(self),), self.__dict__


def _blank(cls: Any) -> nn.Module:
    made = _replaceable(cls)
    return made.__new__(made)


@functools.cache
def _replaceable(cls: Any) -> Any:
    return type(cls.__name__, (Replaceable, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _own_class(module: nn.Module) -> Any:
    return type(module).__bases__[1] if isinstance(module, Replaceable) else type(module)


# Which modules


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


# Copies


def make_copies(llama: Any, paths: Iterable[str]) -> nn.Module:
    """Trainable copies of the modules at these paths, by the same paths.

    Raises:
        ValueError: the parameters are spread over processes.
    """
    root = _Folder()
    for path in paths:
        *folders, last = path.split(".")
        at = root
        for folder in folders:
            if folder not in at._modules:
                at.add_module(folder, _Folder())
            at = at._modules[folder]  # type: ignore[assignment]
        module = llama.get_submodule(path)
        if is_sharded(module):
            raise ValueError(f"modules_to_save: expected {path!r} whole, got it spread over processes; add it before")
        at.add_module(last, _copied(module))
    return root


def _copied(module: nn.Module) -> nn.Module:
    """The module with parameters of its own, without accelerate's hooks."""
    made = _own_class(module).__new__(_own_class(module))
    fields = {key: value for key, value in module.__dict__.items() if key not in _NOT_COPIED}
    fields |= {key: type(value)() for key, value in fields.items() if "_hooks" in key}
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)

    def copied(p: Tensor | None, key: str) -> Tensor | None:
        if p is None:
            return None
        value = p if not p.is_meta else hook.weights_map[key]  # type: ignore[union-attr]  # offloaded
        kind = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
        return value.detach().to(device, kind, copy=True)

    parameters = {key: copied(p, key) for key, p in module._parameters.items()}
    fields["_parameters"] = {key: None if p is None else nn.Parameter(p) for key, p in parameters.items()}
    fields["_buffers"] = {key: copied(buffer, key) for key, buffer in module._buffers.items()}
    fields["_modules"] = {key: None if child is None else _copied(child) for key, child in module._modules.items()}
    made.__dict__ |= fields
    return made


def attach(model: Copies, llama: Any, paths: Iterable[str]) -> None:
    """Make the modules at ``paths``, and those tied to them, find the copies of ``model``; ``detach`` undoes it."""
    for path in paths:
        holders = {
            id(p): ([*path.split("."), *inner.split(".")[:-1]], inner.rpartition(".")[2])
            for inner, p in llama.get_submodule(path).named_parameters()
        }
        for other, module in list(llama.named_modules()):
            tied = {key: holders[id(p)] for key, p in module._parameters.items() if p is not None and id(p) in holders}
            inside = other == path or other.startswith(f"{path}.")
            if other == path or (tied and not inside):
                place = _make_replaceable(model, other, module)
                place.tied |= {} if inside else tied


def _make_replaceable(model: Copies, path: str, module: nn.Module) -> _Place:
    if not isinstance(module, Replaceable):
        check_forward(module)
        if isinstance(module, Fused):
            raise ValueError(f"modules_to_save: expected none that Liger's kernels run (liger=True), got {path!r}")
        module.__dict__["_place"] = _Place(model, path)  # not by setattr, which would register the model
        cls: Any = type(module)
        change_class(module, _replaceable(cls))
    return module.__dict__["_place"]


def has_tied_copies(module: nn.Module) -> bool:
    """Whether a module of the backbone runs with a parameter of another module's copy: tied embeddings."""
    return any(isinstance(child, Replaceable) and child._place.tied for child in module.modules())


def detach(model: Copies, llama: Any) -> None:
    """Give the modules of ``attach`` their own classes back."""
    for module in list(llama.modules()):
        if isinstance(module, Replaceable) and module._place.model is model:
            del module.__dict__["_place"]
            change_class(module, _own_class(module))


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


def _at(copies: nn.Module | None, path: list[str]) -> nn.Module | None:
    at: Any = copies
    for part in path:
        if at is None:
            return None
        at = at._modules.get(part)
    return None if isinstance(at, _Folder) else at


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The backbone's parameters, not a copy's."""
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        yield from () if child is None else _own_parameters(child)


def _cast(values: Any, own: torch.dtype, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == own else t, values)


class Extra(Wrapped):
    """A wrapped decoder whose adapters may have copies of its modules."""

    adapters: nn.ModuleDict

    if TYPE_CHECKING:  # LlamaAdapter's

        @property
        def _mixture(self) -> Any: ...

        @property
        def active_adapter(self) -> str | None: ...

        def disable_adapter(self) -> AbstractContextManager[None]: ...

        def adapter_config(self, name: str | None = None) -> AdapterConfig: ...

    def running_copies(self) -> nn.Module | None:
        """The copies of modules that the active adapter has; None if it has none, or none runs."""
        name = self.active_adapter
        return None if name is None or self._mixture is not None else self.adapters._modules[name]._modules.get(MODULES)

    def trains_below(self) -> bool:
        """Whether the running adapter has copies of modules below the first layer: of the embeddings."""
        copies = self.running_copies()
        decoder = None if copies is None else copies._modules.get("model")
        return decoder is not None and bool(decoder._modules.keys() - {"layers", "norm"})

    def _with_modules(self, config: AdapterConfig) -> AdapterConfig:
        """The configuration with the paths of the modules in place of their names."""
        paths = find_modules(self.base, config.modules_to_save)
        return dataclasses.replace(config, modules_to_save=paths) if paths else config

    def _add_copies(self, sites: nn.ModuleDict, config: AdapterConfig) -> None:
        if config.modules_to_save:
            sites[MODULES] = make_copies(self.base, config.modules_to_save)
            attach(self, self.base, config.modules_to_save)

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
