"""Which adapters run: a model's setting, and what a thread has asked for instead.

``set_adapter`` and ``disable_adapters`` are settings of the model. ``disable_adapter``, ``mixing`` and
``adapter_names`` hold for a block of code, and only for the thread that runs it: threads that serve different users of
one model each get their own adapter. Gradient checkpointing recomputes a layer in one of autograd's threads, as its
forward ran.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkern import checks
from adapterkern.model.config import BASE_NAME, AdapterConfig, prefix_length
from adapterkern.model.deferred import Decide, DeferredMixture
from adapterkern.model.extra import default_heads
from adapterkern.model.mixing import Mixture
from adapterkern.model.next_norm import FusesNorms
from adapterkern.model.pretrained import Wrapped
from adapterkern.model.prompt import PromptedAttention
from adapterkern.model.running_site import RunningSite
from adapterkern.model.stack import check_stack


class State(NamedTuple):
    """What runs."""

    active: str | None
    enabled: bool
    mixture: Mixture | DeferredMixture | None
    skip: int | None = None  # of each adapter's first sites; None as the model is set
    images: Tensor | None = None  # (B, L, 1): the tokens of the batch that an adapter for text alone leaves out
    fixed: bool = False  # as a forward was; otherwise the model's settings hold for ``active``, and besides ``enabled``
    below: tuple[str, ...] = ()  # what runs before ``active``, in a stack


_UNCHANGED = State(None, True, None)


class _Blocks(threading.local):
    """What the open blocks of one model ask for in this thread.

    Not a context variable, which torch.compile cannot read; it guards what it compiles by this attribute. It needs one
    in every thread, so ``__init__``, which ``threading.local`` calls in each, sets it.
    """

    def __init__(self, state: State | None = None) -> None:
        self.state = state
        self.images: Tensor | None = None  # of the forward that runs

    def __reduce__(self) -> Any:
        return _Blocks, ()  # a copied or unpickled model is in no block

    @contextmanager
    def within(self, **changes: Any) -> Iterator[None]:
        """A block in which ``changes`` hold, with the rest of the block around it."""
        before = self.state
        self.state = state = (before or _UNCHANGED)._replace(**changes)
        try:
            yield
        finally:
            overlaps, self.state = self.state is not state, before
            if overlaps:
                raise RuntimeError(
                    "disable_adapter, mixing: expected a block to end in the thread that began it, and before those "
                    "around it; an asyncio task or a generator must end its block before it awaits or yields"
                )


class UnloadedError(RuntimeError, AttributeError):
    """The backbone is no longer the model's, nor are the backbone's attributes."""


class Running(FusesNorms, Wrapped):
    """A wrapped decoder with named adapters, of which one, none or a mixture runs."""

    adapters: nn.ModuleDict
    _configs: dict[str, AdapterConfig]
    _unloaded: Any  # the backbone that ``unload`` returned, which this model no longer has

    if TYPE_CHECKING:  # LlamaAdapter's
        fused: bool

        def _check_name(self, name: str | None) -> str: ...

    def _start(self) -> None:
        """No adapter is active, and none is disabled."""
        self._stack: tuple[str, ...] = ()  # what runs, in its order; at once, for all threads
        self._saved_on: dict[str, tuple[str, ...]] = {}  # what an adapter that was loaded has been saved on
        self._on = True
        self._skip = 0
        self._blocks = _Blocks()

    def __getattr__(self, name: str) -> Any:
        """As ``Wrapped``'s. After ``unload``, what was the backbone's is missing for this reason."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_unloaded" in self.__dict__ and not name.startswith("__"):
                self.check_attached()
            raise

    def check_attached(self) -> None:
        """Raise ``UnloadedError`` after ``unload``: from then on the backbone runs no adapter of this model."""
        if "_unloaded" in self.__dict__:
            raise UnloadedError(
                "model: expected adapters that the backbone runs, but unload() has taken them off; wrap the backbone "
                "that it returned in a new LlamaAdapter"
            )

    @property
    def _state(self) -> State:
        state = self._blocks.state or _UNCHANGED
        if state.fixed:
            return state
        skip, stack = self._skip if state.skip is None else state.skip, self._stack
        top, on, images = stack[-1] if stack else None, state.enabled and self._on, self._blocks.images
        return State(top, on, state.mixture, skip, images, below=stack[:-1])

    @property
    def _active(self) -> str | None:
        """The active adapter by the model's own setting, of a stack the top one."""
        return self._stack[-1] if self._stack else None

    @property
    def _enabled(self) -> bool:
        return self._state.enabled

    @property
    def _mixture(self) -> Mixture | DeferredMixture | None:
        return self._state.mixture

    @property
    def is_mixing(self) -> bool:
        """Whether the sequences of a batch, or the tokens, run adapters of their own: inside ``mixing``."""
        return self._mixture is not None

    @property
    def active_adapter(self) -> str | None:
        """The adapter that runs outside ``mixing``, of a stack the top; None if none is set, or they are disabled."""
        state = self._state
        return state.active if state.enabled else None

    def active_adapters(self) -> list[str]:
        """The adapters that run outside ``mixing``, in their order: one, or a stack's; empty if none runs."""
        state = self._state
        return [*state.below, state.active] if state.enabled and state.active is not None else []

    def adapters_below(self, name: str | None = None) -> list[str]:
        """What runs before ``name`` (default: the active adapter), lowest first: in the active stack, or as saved."""
        name = self._check_name(name)
        return list(self._stack[:-1] if name == self._active else self._saved_on.get(name, ()))

    def get_adapter_state_dict(self, adapter_name: str | None = None, state_dict: Any = None) -> dict[str, Tensor]:
        """The tensors of an adapter (default: the active one) by their names in it; of ``state_dict``, if given."""
        prefix = f"adapters.{self._check_name(adapter_name)}."
        state = self.state_dict() if state_dict is None else state_dict
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    @checks.other_names(adapter_name="name")
    def set_adapter(self, name: str | Sequence[str]) -> None:
        """Make ``name`` the active adapter, the one that runs. The others are not used and get no gradient.

        A list is a stack, whose adapters run one after the other, the first one first: x → A_2(A_1(x)), where several
        have the same site. The last one is the active adapter: what ``adapter_parameters`` and all else mean by it.
        An adapter that was loaded with those that it was saved on stands for this stack; in a list it runs alone.

        A setting of the model, in all threads; ``adapter_names`` chooses for one call.

        Raises:
            TypeError, ValueError: an unknown name, an empty list, a name twice; or two of a stack have copies of one
                module (``modules_to_save``), other than the backbone's own head, of which the last one's runs.
        """
        self._stack = self._stack_of("name", name if isinstance(name, (list, tuple)) else self._check_name(name))  # type: ignore[arg-type]

    def disable_adapters(self) -> None:
        """Disable all adapters of the model, in all threads, until ``enable_adapters``."""
        self.check_attached()
        self._on = False

    def enable_adapters(self) -> None:
        """Undo ``disable_adapters``."""
        self.check_attached()
        self._on = True

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Disables all adapters inside the block: the model computes what the backbone does.

        Only in the thread that enters the block. A thread that is started inside is not in it: give its ``generate``
        ``adapter_names``, or call ``disable_adapters``.
        """
        self.check_attached()
        return self._blocks.within(enabled=False)

    def skip_sites(self, sites: int) -> None:
        """Let the first ``sites`` sites of each adapter do nothing, as in ``skipping``, in all threads; 0 undoes it."""
        self.check_attached()
        self._skip = checks.integer("sites", sites, 0)

    def skipping(self, sites: int) -> AbstractContextManager[None]:
        """Inside the block the first ``sites`` sites of each adapter do nothing: y = x there.

        AdapterDrop (Rücklé et al. 2021, arXiv:2010.11918): the lowest adapters cost time and add least, if a training
        with ``TrainConfig(adapter_drop=...)`` has prepared the others to do without them. A site is a layer that has
        an adapter, with all of its ``depth``. Only in the thread that enters the block.

        Raises:
            TypeError, ValueError: ``sites`` is not an integer >= 0.
        """
        self.check_attached()
        return self._blocks.within(skip=checks.integer("sites", sites, 0))

    def _only(self, name: str) -> AbstractContextManager[None]:
        """Inside the block this adapter runs, whatever is set."""
        return self._blocks.within(**State(name, True, None, fixed=True)._asdict())

    def mixing(
        self, names: Sequence[str | Sequence[str]], index: Tensor | Decide, weight: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Inside the block each sequence of a batch, or each token, runs its own adapters instead of the active one.

        y = x + Σ_k weight_k · (A_k(x) − x), summed over the choices that have an adapter at the site, computed by
        grouped calls of the fused operator. Layers, dimensions and positions may differ between names. Gradients reach
        ``weight`` and the parameters of all ``names`` (zeros for those that nothing chose). Inside ``disable_adapter``
        no adapter runs. Only in the thread that enters the block.

        Args:
            names: the adapters to choose from, without duplicates; a list among them is a stack, see ``set_adapter``.
            index: int64, (B,) or (B, K): which of ``names`` each sequence runs; −1 is none. (B, L, K): each token, in a
                forward, with K = 1 for one choice. Or a function that returns index and weight for the residual stream
                (B, L, d) below the first of the adapters. It is called once, in a forward or on the prompts of a
                ``generate``, and its result is kept until the block ends; one of (B, L, K) holds for its forward, and
                the function is called in each, in ``generate`` for the prompts and then for each new token.
            weight: floating point, same shape as ``index``; default 1.

        Raises:
            ValueError, TypeError: an unknown name, a number out of range, a wrong shape or dtype; in the forward, a
                batch of another size. On a GPU, the numbers are checked asynchronously.
        """
        stacks = self._check_names("names", names)
        if len(set(stacks)) < len(stacks):
            raise ValueError(f"names: expected none twice, got {list(names)}")
        if isinstance(index, Tensor) or not callable(index):
            return self._mixing(Mixture(*self._of(stacks), index, weight, stacks=stacks))
        if weight is not None:
            raise ValueError("weight: expected None if index is a function, which returns both, got a tensor")
        return self._mixing(DeferredMixture(*self._of(stacks), index, stacks))

    def _of(self, stacks: Sequence[tuple[str, ...]]) -> tuple[dict[str, Any], dict[str, AdapterConfig]]:
        """The adapters in the stacks, and their configurations."""
        names = dict.fromkeys(name for stack in stacks for name in stack)
        return {name: self.adapters[name] for name in names}, {name: self._configs[name] for name in names}

    def _mixing(self, mixture: Mixture | DeferredMixture) -> AbstractContextManager[None]:
        return self._blocks.within(mixture=mixture)

    def _mixing_by_name(self, adapter_names: Sequence[str | Sequence[str]] | None) -> AbstractContextManager[None]:
        if adapter_names is None:
            return nullcontext()
        given = self._check_names("adapter_names", adapter_names, BASE_NAME)
        stacks = list(dict.fromkeys(stack for stack in given if stack != (BASE_NAME,)))
        numbers = {stack: number for number, stack in enumerate(stacks)} | {(BASE_NAME,): -1}
        index = torch.tensor([numbers[stack] for stack in given], dtype=torch.int64, device=self.device)
        return self._mixing(Mixture(*self._of(stacks), index, argument="adapter_names", stacks=stacks))

    def _check_names(self, argument: str, names: object, *more: str) -> list[tuple[str, ...]]:
        """What each entry stands for: one adapter, or a stack."""
        self.check_attached()
        kinds = (str, list, tuple)
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, kinds) for n in names):
            raise TypeError(f"{argument}: expected a list of names, one per {_ONE_PER[argument]}, got {names!r}")
        plain = [name for name in names if isinstance(name, str)]
        if unknown := [name for name in plain if name not in self.adapters and name not in more]:
            raise ValueError(f"{argument}: expected some of {', '.join((self._names(), *more))}, got {unknown[0]!r}")
        return [(name,) if name in more else self._stack_of(argument, name) for name in names]

    def _stack_of(self, argument: str, name: str | Sequence[str]) -> tuple[str, ...]:
        """The adapters that a known name, or a list, stands for."""
        if isinstance(name, str):
            return (*self._saved_on.get(name, ()), name)
        self.check_attached()
        return check_stack(argument, name, self._configs, self._names(), default_heads(self.base))

    def _names(self) -> str:
        return ", ".join(self.adapters) or "the model's adapters (it has none)"

    def _replicate_for_data_parallel(self) -> Any:
        """``nn.DataParallel`` runs a replica per GPU in a thread of its own, which is in the blocks of this one."""
        replica = super()._replicate_for_data_parallel()
        replica._blocks = _Blocks(self._blocks.state)
        return replica

    def _own_sites(self) -> None:
        """Make the layers of a replica run the replica's adapters."""
        if any("_place" in module.__dict__ for module in self.base.modules()):
            raise NotImplementedError(
                "modules_to_save: expected none under nn.DataParallel, got an adapter that has some; use one process "
                "per GPU (torchrun), or make one GPU visible"
            )
        if any(config.bias_scale for config in self._configs.values()):
            raise NotImplementedError(
                "bias_scale: expected False under nn.DataParallel, got an adapter with True; use one process per GPU "
                "(torchrun), or make one GPU visible"
            )
        self._fuse_norm, self._next_norms = False, {}  # which are the original's
        for index, layer in enumerate(self.layers):
            layer.__dict__["_adapter_site"] = site = self._site(index)
            if isinstance(attention := getattr(layer, "self_attn", None), PromptedAttention):
                attention.__dict__["_prompt_site"] = site

    # Gradient checkpointing

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What ran in the forward runs in its recomputation, whatever is active by then, in whichever thread."""
        state = self._state._replace(fixed=True)
        if not isinstance(state.mixture, DeferredMixture):
            return nullcontext(), self._as_it_was(state, self.fused)
        ran: list[Mixture | DeferredMixture] = []
        return _noting(state.mixture, ran), self._as_it_was(state, self.fused, ran)

    @contextmanager
    def _as_it_was(
        self, state: State, fused: bool, ran: Sequence[Mixture | DeferredMixture] | None = None
    ) -> Iterator[None]:
        before = self.fused
        state = state._replace(mixture=ran[0]) if ran else state
        with self._blocks.within(**state._asdict()), contextlib.ExitStack() as stack:
            if fused != before:  # otherwise keep the flags that were set on single adapters
                self.fused = fused
                stack.callback(setattr, self, "fused", before)
            yield

    # The frozen prefix

    @property
    def prefix_length(self) -> int:
        """Number of leading layers whose output does not depend on the running adapters; all layers if none runs."""
        mixture = self._mixture
        if mixture is not None and self._enabled:
            return mixture.prefix_length(len(self.layers))
        running = (prefix_length(self._configs[name]) for name in self.active_adapters())
        return min(running, default=len(self.layers))

    def _site(self, layer: int) -> RunningSite:
        return RunningSite(self, layer)


@contextmanager
def _noting(mixture: DeferredMixture, ran: list[Mixture | DeferredMixture]) -> Iterator[None]:
    """Appends what the layer inside the block has run, which the layer itself may decide."""
    yield
    ran.append(mixture.decided)


_ONE_PER = {"names": "adapter", "adapter_names": "sequence of the batch"}
