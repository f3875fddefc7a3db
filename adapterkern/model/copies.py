"""Copies of modules of the backbone, and how the backbone runs them.

While an adapter with a copy is active, the module's attributes are the copy's (parameters and submodules): its own
forward, and whoever else reads ``lm_head.weight``, then computes with the copy. Copies are in fp32 at least, as
adapters are: the module then computes in fp32, and its output has its usual dtype. Another module that holds the same
parameter runs with the copy as well, so tied parameters stay tied.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from adapterkern.model.decoder import change_class, check_forward, own_class, preceded
from adapterkern.model.digest import is_sharded
from adapterkern.model.liger import Fused

_NOT_COPIED = ("_hf_hook", "_old_forward", "forward", "_place")


class Copies(Protocol):
    """The model that has the copies."""

    def running_copies(self) -> Sequence[nn.Module]:
        """The copies of each adapter that runs and has some, by their paths; of several the first one's count."""


class Folder(nn.Module):
    """A part of a path, such as ``model`` in ``model.embed_tokens``."""

    def put(self, path: str, module: nn.Module) -> None:
        """Add ``module`` at a path with dots."""
        *folders, last = path.split(".")
        at: nn.Module = self
        for folder in folders:
            if folder not in at._modules:
                at.add_module(folder, Folder())
            at = at._modules[folder]  # type: ignore[assignment]
        at.add_module(last, module)


class _Place:
    """Where a module of the backbone finds its copy."""

    def __init__(self, model: Copies, path: str) -> None:
        self.model, self.path = model, path.split(".")
        self.tied: dict[
            str, tuple[list[str], str]
        ] = {}  # a parameter's name here → path and name of the one that is saved

    def copy(self) -> nn.Module | None:
        return _found(self.model.running_copies(), self.path)

    def find(self, name: str) -> Any:
        """The attribute of the copy that runs; None if there is none."""
        copies = self.model.running_copies()
        if not copies:
            return None
        if (copy := _found(copies, self.path)) is not None:
            found = copy._parameters.get(name)
            return copy._modules.get(name) if found is None else found
        if name in self.tied:
            path, other = self.tied[name]
            if (copy := _found(copies, path)) is not None:
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
        return _blank, (own_class(self, Replaceable),), self.__dict__


def _blank(cls: Any) -> nn.Module:
    made = _replaceable(cls)
    return made.__new__(made)


@functools.cache
def _replaceable(cls: Any) -> Any:
    return preceded(cls, Replaceable)


def make_copies(llama: Any, paths: Iterable[str]) -> nn.Module:
    """Trainable copies of the modules at these paths, by the same paths.

    Raises:
        ValueError: the parameters are spread over processes.
    """
    root = Folder()
    for path in paths:
        module = llama.get_submodule(path)
        if is_sharded(module):
            raise ValueError(f"modules_to_save: expected {path!r} whole, got it spread over processes; add it before")
        root.put(path, _copied(module))
    return root


def _copied(module: nn.Module) -> nn.Module:
    """The module with parameters of its own, without accelerate's hooks."""
    made = own_class(module, Replaceable).__new__(own_class(module, Replaceable))
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
        if any("_linear_site" in child.__dict__ for child in module.modules()):
            raise ValueError(f"modules_to_save: expected no linear layer that learns bias and scale, got {path!r}")
        if "_prompt_site" in module.__dict__:
            raise ValueError(f"modules_to_save: expected no attention that runs gated prompts, got {path!r}")
        module.__dict__["_place"] = _Place(model, path)  # not by setattr, which would register the model
        cls: Any = type(module)
        change_class(module, _replaceable(cls))
    return module.__dict__["_place"]


def has_tied_copies(module: nn.Module) -> bool:
    """Whether a module of the backbone runs with a parameter of another module's copy: tied embeddings."""
    return any(isinstance(child, Replaceable) and child._place.tied for child in module.modules())


def detach(model: Copies, llama: Any, kept: Collection[str] = ()) -> None:
    """Give the modules of ``attach`` their own classes back, except those at ``kept`` paths and those tied to them."""
    for module in list(llama.modules()):
        if isinstance(module, Replaceable) and (place := module._place).model is model:
            tied = place.tied.items()
            place.tied = {key: at for key, at in tied if any(f"{'.'.join(at[0])}.".startswith(f"{p}.") for p in kept)}
            if not place.tied and ".".join(place.path) not in kept:
                del module.__dict__["_place"]
                change_class(module, own_class(module, Replaceable))


def _found(copies: Iterable[nn.Module], path: list[str]) -> nn.Module | None:
    return next((copy for one in copies if (copy := at_path(one, path)) is not None), None)


def at_path(copies: nn.Module | None, path: Iterable[str]) -> nn.Module | None:
    """The module that has been put at a path, by its parts; None if there is none."""
    at: Any = copies
    for part in path:
        if at is None:
            return None
        at = at._modules.get(part)
    return None if isinstance(at, Folder) else at


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The backbone's parameters, not a copy's."""
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        yield from () if child is None else _own_parameters(child)


def _cast(values: Any, own: torch.dtype, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == own else t, values)
