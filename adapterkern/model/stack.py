"""Stacks: several adapters that run one after the other, x → A_2(A_1(x)), each at its own layers and positions.

At a layer that several of a stack have, those after attention run before those after the layer. At one place they run
in the order of the stack, and one that is parallel to a module reads what the module reads. MAD-X (Pfeiffer et al.
2020, arXiv:2005.00052) trains an adapter of a task on top of a frozen one of a language.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from torch import Tensor

from adapterkern.model.config import PROMPT, AdapterConfig

Function = Callable[[Tensor], Tensor]


def in_order(functions: Sequence[Function | None]) -> Function | None:
    """The functions one after the other; None if there is none, as each that is None."""
    found = [function for function in functions if function is not None]
    return partial(_run, found) if len(found) > 1 else found[0] if found else None


def _run(functions: Sequence[Function], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


def check_stack(
    argument: str, names: object, configs: Mapping[str, AdapterConfig], known: str, heads: Collection[str]
) -> tuple[str, ...]:
    """The names of a stack, the lowest first.

    Args:
        argument: what the user gave, for messages.
        configs: of all adapters.
        known: their names, for messages.
        heads: the modules of the backbone of which several of a stack may have copies: the top one's runs.

    Raises:
        TypeError, ValueError: no list of names; an empty one, or an unknown name, or one that is there twice; two of
            gated prompts; or two that have copies of one module (``modules_to_save``).
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: expected the names of a stack, the lowest first, got {names!r:.80}")
    if unknown := [name for name in names if name not in configs]:
        raise ValueError(f"{argument}: expected some of {known}, got {unknown[0]!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{argument}: expected at least one name in a stack and none twice, got {list(names)}")
    if len(prompts := [name for name in names if configs[name].kind == PROMPT]) > 1:
        raise ValueError(f"kind: expected at most one adapter of gated prompts in a stack, got {', '.join(prompts)}")
    owners: dict[str, str] = {}
    for name in names:
        for path in configs[name].modules_to_save or ():
            both = [
                other for other in owners if f"{other}.".startswith(f"{path}.") or f"{path}.".startswith(f"{other}.")
            ]
            if both and path not in heads:
                raise ValueError(
                    f"modules_to_save: expected copies of a module in one adapter of a stack, got {path} of {name!r} "
                    f"and {both[0]} of {owners[both[0]]!r}"
                )
            owners[path] = name
    return tuple(names)
