"""How a causal language model's logits follow from its decoder's last hidden states, found by asking the model.

Most backbones multiply the states by their output embeddings. Others scale the logits, cap them, or cut the padding of
the vocabulary off, each under names of its own. So the model is run once on a few tokens, and its own logits are
compared with both ways to compute them: by the output embeddings alone, and by its forward without the decoder.
"""

import copy
import functools
import logging
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkern.model.asking import decoder_name, decoder_of, described, same_numbers, some_tokens
from adapterkern.model.decoder import eval_mode
from adapterkern.model.pretrained import Wrapped

logger = logging.getLogger(__name__)


class LogitsPath(NamedTuple):
    """How logits are computed from hidden states.

    Attributes:
        obstacle: why they cannot be; "" if they can.
        plain: the output embeddings are all that is needed.
        output: the class of the decoder's output.
        added: what the model's own loss adds to the cross-entropy of its logits (nats); 0 if it is only rounding.
    """

    obstacle: str
    plain: bool = False
    output: Any = None
    added: float = 0.0


@torch.no_grad()
def find_logits_path(llama: Any) -> LogitsPath:
    """Run ``llama``, a causal language model of transformers, on a few tokens in eval mode."""
    name, ids = type(llama).__name__, some_tokens(llama, 8)
    embeddings = getattr(llama, "get_output_embeddings", lambda: None)()
    if embeddings is None:
        return LogitsPath(f"{name} has no LM head")
    with eval_mode(llama):
        try:
            outputs = decoder_of(llama)(input_ids=ids, use_cache=False)
            expected = llama(input_ids=ids, use_cache=False).logits.float()
        except Exception as error:
            return LogitsPath(f"{name} cannot be run on token ids alone ({described(error)})")
        states, output, obstacle = outputs.last_hidden_state, type(outputs), ""
        compared = [(states, expected)]
        try:
            by_forward = [_by_forward(llama, output, size * states) for size in (1, 100)]
            if same_numbers(llama, by_forward[0], expected):
                compared = list(zip((states, 100 * states), by_forward, strict=True))
            else:
                obstacle = "it uses more than its decoder's last hidden states"
        except Exception as error:
            obstacle = described(error)
        # Plain logits agree to the bit: the same operation on the same numbers. At 100 times the size any cap shows.
        plain = all(_equal(embeddings, given, logits) for given, logits in compared)
        if obstacle and not plain:
            return LogitsPath(f"{name} does not compute its logits from hidden states ({obstacle})")
        return LogitsPath("", plain, output, _added_loss(llama, ids, expected))


def logits_of(llama: Any, path: LogitsPath, states: Tensor) -> Tensor:
    """The logits (N, vocabulary) that ``llama``, whose ``path`` was found, computes from states (N, d).

    Raises:
        ValueError: it does not compute them from these states.
    """
    if path.obstacle:
        raise ValueError(f"model: expected logits that follow from the last hidden states, but {path.obstacle}")
    if path.plain:
        return llama.get_output_embeddings()(states)
    return _by_forward(llama, path.output, states[None])[0]


def _by_forward(llama: Any, output: Any, states: Tensor) -> Tensor:
    """The logits (B, L, vocabulary) in fp32 of states (B, L, d), by the forward of ``llama`` without its decoder."""
    name = decoder_name(llama)
    rest = copy.copy(llama)
    rest._modules = llama._modules | {name: _Given(getattr(llama, name), output(last_hidden_state=states))}
    # The class's forward: one of the instance is accelerate's hook, bound to ``llama``, which only moves its inputs.
    return type(llama).forward(rest, inputs_embeds=states, use_cache=False).logits.float()


def _equal(embeddings: Any, states: Tensor, logits: Tensor) -> bool:
    try:
        return torch.equal(embeddings(states).float(), logits)
    except RuntimeError:  # the decoder's width is not theirs
        return False


def _added_loss(llama: Any, ids: Tensor, logits: Tensor) -> float:
    try:
        loss = llama(input_ids=ids, labels=ids, use_cache=False).loss
    except Exception:  # it takes no labels, so it has no loss to agree with
        return 0.0
    if loss is None:
        return 0.0
    alone = F.cross_entropy(logits[0, :-1], ids[0, 1:].to(logits.device)).item()
    added = loss.item() - alone
    return added if abs(added) > 2e-2 * alone else 0.0


class _Given(nn.Module):
    """Takes a decoder's place and returns what it was given. Its other attributes are the decoder's."""

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__.update(decoder=decoder, output=output)  # not as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.__dict__["output"]


class WithLogits(Wrapped):
    """A wrapped causal language model that computes logits from hidden states."""

    if TYPE_CHECKING:  # LlamaAdapter's

        def disable_adapter(self) -> AbstractContextManager[None]: ...

    @functools.cached_property
    def logits_path(self) -> LogitsPath:
        """How the backbone computes its logits. Found once, by running it on eight tokens."""
        with self.disable_adapter():
            return find_logits_path(self.base)

    def logits_of(self, states: Tensor) -> Tensor:
        """The backbone's own logits (N, vocabulary) of its decoder's last hidden states (N, d).

        Raises:
            ValueError: the backbone has no LM head, or does not compute its logits from these states.
        """
        return logits_of(self.base, self.logits_path, states)


def ask_for_logits(model: Any) -> LogitsPath:
    """Ask the backbone anew how it computes its logits."""
    model.__dict__.pop("logits_path", None)
    return model.logits_path


def check_lm_head(model: Any) -> None:
    """``ask_for_logits``; warn if the backbone's own loss adds something to their cross-entropy.

    Raises:
        ValueError: it has no LM head, or its logits do not follow from its last hidden states.
    """
    path = ask_for_logits(model)
    if path.obstacle:
        raise ValueError(f"model: expected a backbone with an LM head for causal-lm, but {path.obstacle}")
    if path.added:
        logger.warning(
            "causal-lm learns the cross-entropy of the next token; %s's own loss differs from it by %+.3g on eight "
            "tokens (the balance of its experts, for example), which is not trained",
            type(model.base).__name__,
            path.added,
        )
