"""How an adapter gets into a decoder layer, and how a decoder is cut.

An adapted layer stays the same object; its class becomes a subclass of its own class, whose ``forward`` passes the
residual stream through the site's adapter. A subclass and not a hook: whatever wraps a layer's forward (gradient
checkpointing, sharding) then wraps the adapter too.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterkern import checks
from adapterkern.model.sites import Halves, NoSiteError, halves


class Site(Protocol):
    """The adapters of one layer."""

    def cuts(self) -> bool:
        """Whether an adapter runs amid the layer, or reads the stream there: at a position other than ``"layer"``."""

    def run(self, place: str, hidden: Tensor, x: Tensor | None = None) -> Tensor:
        """The residual stream (B, L, d) after the adapters at ``place``; ``hidden`` itself if there are none.

        Args:
            place: ``"attention"``, after its sum, or ``"layer"``.
            x: the stream before attention, or before the feed-forward network, for adapters parallel to it.
        """


class AdaptedLayer(nn.Module):
    """Precedes a decoder layer's own class in the method resolution order; ``adapt`` makes the combined class."""

    _adapter_site: Site
    _halves: Halves | NoSiteError  # of the own class's forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        site, x = self._adapter_site, None
        if site.cuts():
            before = args[0] if args else kwargs[self._halves.stream]  # type: ignore[union-attr]
            hidden_states, needed = self._frozen_attention(*args, **kwargs)
            x = site.run("attention", hidden_states, before)
            output = self._frozen_mlp(x, *needed)
        else:
            output = self._frozen_layer(*args, **kwargs)
        # In a batch that mixes adapters, some may be at one position and some at the other.
        if isinstance(output, tuple):  # some layers return more than the stream
            return (site.run("layer", output[0], x), *output[1:])
        if not isinstance(output, Tensor):
            raise TypeError(
                f"llama: expected {type(self).__name__} to return the residual stream, alone or as the first of a "
                f"tuple, got {type(output).__name__}: no adapter can run on this backbone"
            )
        return site.run("layer", output, x)

    # What runs between adapters, each a method that a training may replace by its compiled form

    def _frozen_layer(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    def _frozen_attention(self, *args: Any, **kwargs: Any) -> Any:
        return self._halves.attention(self, *args, **kwargs)  # type: ignore[union-attr]

    def _frozen_mlp(self, hidden_states: Tensor, *needed: Any) -> Any:
        return self._halves.mlp(self, hidden_states, *needed)  # type: ignore[union-attr]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol, _adapted_class, own_class(self, AdaptedLayer))


def own_class(module: nn.Module, before: type) -> Any:
    """The class of a module without ``before``: what follows it in the method resolution order, if it is there."""
    mro = type(module).__mro__
    return mro[mro.index(before) + 1] if before in mro else type(module)


def preceded(cls: Any, before: type, **members: Any) -> Any:
    """A subclass of ``cls`` in whose method resolution order ``before`` comes first, with more ``members``.

    It has the same name: lists of class names (`_no_split_modules`, auto-wrap policies) must still match.
    """
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (before, cls), named | members)


def reduced(module: nn.Module, protocol: Any, make: Any, *args: Any) -> Any:
    """What pickles ``module``, whose class was made by ``make(*args)`` and so has no name to be found by."""
    rest = object.__reduce_ex__(module, max(protocol, 2))[2:]
    return (_instance, (make, *args), *rest)


def _instance(make: Any, *args: Any) -> Any:
    cls = make(*args)
    return cls.__new__(cls)


@functools.cache
def _adapted_class(cls: Any) -> Any:
    return preceded(cls, AdaptedLayer, _halves=halves(cls))


@functools.cache
def argument_names(cls: Any) -> tuple[str, ...]:
    """The names of the positional arguments of the forward of ``cls``, in its order, without ``self``."""
    _, *parameters = inspect.signature(cls.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def adapt(layer: nn.Module, site: Site) -> None:
    """Make ``layer`` pass the residual stream through ``site``; ``restore`` undoes it."""
    layer.__dict__["_adapter_site"] = site  # not by setattr, which would register the model as the layer's submodule
    cls: Any = type(layer)
    change_class(layer, _adapted_class(cls))


def restore(layer: nn.Module) -> None:
    """Give an adapted layer its own class back."""
    del layer.__dict__["_adapter_site"]
    change_class(layer, own_class(layer, AdaptedLayer))


def change_class(module: nn.Module, cls: Any) -> None:
    """Change the class of ``module``, also if it has accelerate's hooks. ``check_forward`` must be called first."""
    if _is_left_behind(module):
        del module.__dict__["forward"]
    module.__class__ = cls
    if "_old_forward" in module.__dict__:  # where accelerate's device hooks keep the module's own forward
        module.__dict__["_old_forward"] = cls.forward.__get__(module)


def check_forward(module: nn.Module) -> None:
    """Raise ``ValueError`` if the instance has a ``forward`` of its own, which would hide that of a new class.

    Two such forwards are handled by ``change_class``: the one of accelerate's hooks, and the one that they leave
    behind, which is the class's own forward as an attribute of the instance.
    """
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__ and not _is_left_behind(module):
        raise ValueError(
            f"llama: expected every {type(module).__name__} to run its class's forward, got one whose instance has "
            "another (compiled or replaced), so that no adapter would run; module.compile() keeps the class's forward"
        )


def _is_left_behind(module: nn.Module) -> bool:
    """Whether the instance's forward is its class's own, which accelerate stores there when it removes a hook."""
    own = module.__dict__.get("forward")
    if own is None or "_old_forward" in module.__dict__ or getattr(own, "__self__", None) is not module:
        return False
    return any(own.__func__ is vars(cls).get("forward") for cls in type(module).__mro__)


def text_decoder(llama: Any) -> Any:
    """``llama.model``; of a model that also reads images, its ``language_model``, which embeds and runs the tokens."""
    model = getattr(llama, "model", None)
    return model if hasattr(model, "layers") else getattr(model, "language_model", model)


def decoder_layers(llama: Any) -> nn.ModuleList:
    """The ``layers`` of ``text_decoder``. Raises ``TypeError`` if the model does not have LLaMA's structure."""
    layers = getattr(text_decoder(llama), "layers", None)
    if not isinstance(llama, PreTrainedModel) or not isinstance(layers, nn.ModuleList) or not len(layers):
        raise TypeError(
            "llama: expected a transformers decoder of LLaMA's structure (LlamaForCausalLM, MistralForCausalLM, "
            "Qwen2ForCausalLM, ...: `model.layers`, or `model.language_model.layers`, is a ModuleList), "
            f"got {type(llama).__name__}"
        )
    return layers


def check_config(config: Any) -> None:
    """Raise ``TypeError`` unless ``config`` has the width of the residual stream as ``hidden_size``."""
    try:
        size = config.hidden_size
    except Exception as error:  # a field of transformers' configurations may raise anything
        size = f"{type(error).__name__}: {error}"
    if not isinstance(size, int):
        raise TypeError(f"llama: expected an integer config.hidden_size, got {size!r} from {type(config).__name__}")


def check_attention_site(layer: nn.Module, position: str = "attention") -> None:
    """Raise ``ValueError`` if ``layer`` has no place between attention and feed-forward network, see sites.py."""
    cls: Any = own_class(layer, AdaptedLayer) if isinstance(layer, AdaptedLayer) else type(layer)
    found = halves(cls)
    if isinstance(found, NoSiteError):
        raise ValueError(f"position: expected 'layer' for {type(layer).__name__}, got {position!r}, but {found}")


def layer_device(layer: nn.Module) -> torch.device:
    """The device on which the layer computes: that of its weights, or the one accelerate loads them to if offloaded.

    Raises:
        ValueError: the weights are on the meta device and nothing loads them.
    """
    device = next(layer.parameters()).device
    if device.type != "meta":
        return device
    for module in layer.modules():
        execution_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    raise ValueError("llama: expected a model with its weights loaded, got one on the meta device")


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Restores the mode, training or eval, of ``module`` and each of its submodules on exit."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Disables dropout inside the block."""
    with modes_kept(module):
        module.eval()
        yield


# Cutting


def keep_layers(decoder: Any, start: int, stop: int) -> None:
    """Keep only the layers from ``start`` to ``stop`` - 1, in place, in the decoder and in its configuration."""
    decoder.layers = decoder.layers[start:stop]
    decoder.config.num_hidden_layers = stop - start
    types = getattr(decoder.config, "layer_types", None)
    if types is not None:
        decoder.config.layer_types = types[start:stop]


def decoder_slice(decoder: Any, start: int, stop: int) -> Any:
    """The decoder with only these layers; it shares all parameters with ``decoder``, which stays as it is."""
    check_forward(decoder)
    cut = copy.copy(decoder)
    cut._modules = dict(decoder._modules)
    own = cut.__dict__.pop("forward", None)
    if "_old_forward" in cut.__dict__:  # accelerate's hook is bound to the decoder
        cut.__dict__["_old_forward"] = type(decoder).forward.__get__(cut)
        cut.__dict__["forward"] = functools.partial(own.func, cut)
    cut.config = copy.copy(decoder.config)
    keep_layers(cut, start, stop)
    return cut


def first_layers(llama: Any, num_layers: int) -> Any:
    """A model of the first ``num_layers`` layers of ``llama``, its final norm and its head, sharing all parameters.

    Its modules are new objects, so neither adapters on it nor their ``modules_to_save`` change ``llama``: a student
    that takes no memory.

    Raises:
        ValueError: ``num_layers`` is not from 1 to the number of layers.
    """
    checks.integer("num_layers", num_layers, 1, len(decoder_layers(llama)))
    if text_decoder(llama) is not llama.model:
        raise TypeError(f"llama: expected a model of text alone, got {type(llama).__name__}")
    decoder = decoder_slice(llama.model, 0, num_layers)
    student = copy.copy(llama)
    student._modules = llama._modules | {"model": decoder}
    student = _new_modules(student, {})
    student.config = decoder.config
    return student


def _new_modules(module: nn.Module, made: dict[int, Any]) -> Any:
    """``module`` and all inside it as new objects, once each, with the same parameters and buffers."""
    if id(module) in made:
        return made[id(module)]
    new: Any = copy.copy(module)
    made[id(module)] = new
    for name in ("_parameters", "_buffers"):
        new.__dict__[name] = dict(module.__dict__[name])
    new._modules = {name: child and _new_modules(child, made) for name, child in module._modules.items()}
    if _is_left_behind(module):
        del new.__dict__["forward"]
    elif "_old_forward" in new.__dict__:  # accelerate's hook is bound to the module
        new.__dict__["_old_forward"] = type(new).forward.__get__(new)
        new.__dict__["forward"] = functools.partial(new.__dict__["forward"].func, new)
    return new
