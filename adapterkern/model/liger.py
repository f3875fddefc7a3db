"""Liger's kernels for the frozen part of one model: RMSNorm, RoPE, SwiGLU, and the loss without the logits.

    RMSNorm   one kernel, which keeps x and 1/rms(x) for the backward; transformers keeps an fp32 copy of x
    RoPE      q and k turned in place by one kernel
    SwiGLU    silu(gate) ⊙ up by one kernel, which keeps gate and up and computes the rest again
    loss      the LM head's logits exist a few tokens at a time and are turned into their gradient there

Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989) replaces functions and classes of transformers for a whole process.
Here norms, MLPs and attentions of one model change their class, as adapted layers do, and get it back; an attention's
new class runs the forward it had, with another ``apply_rotary_pos_emb`` among its globals.

The kernels are Triton's. Where they cannot run (a CPU outside Triton's interpreter, fp64, ``ADAPTERKERN_FUSED=0``)
every module does what it did before. SwiGLU's backward writes over what it saved, so that a second one over the same
graph (``retain_graph=True``) gives wrong gradients, and says nothing; and the loss waits for the device twice a step.
"""

import functools
import importlib.util
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from adapterkern.model.decoder import change_class, check_forward
from adapterkern.ops.choice import INTERPRETED, fused_enabled

# Their norms, MLPs, rotations and losses are LLaMA's to the last operation; tests/interpreted_liger.py asks each.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
IGNORE = -100
_ROTATE = "apply_rotary_pos_emb"

_log = logging.getLogger("adapterkern")


def use_liger(llama: Any) -> None:
    """Let the norms, MLPs and attentions of ``llama`` run Liger's kernels; :func:`without_liger` undoes it.

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: ``llama`` is of a type that is not among ``MODEL_TYPES``, or has another activation than SiLU.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger: expected liger-kernel to be installed, and it is not: pip install liger-kernel")
    kind = llama.config.model_type
    if kind not in MODEL_TYPES:
        raise ValueError(f"liger: expected a backbone of type {', '.join(MODEL_TYPES)}, got {kind!r}")
    if llama.config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"liger: expected a backbone whose hidden_act is 'silu', got {llama.config.hidden_act!r}")
    changed: list[tuple[nn.Module, Any]] = []
    for module in llama.model.modules():
        cls: Any = type(module)
        if not isinstance(module, _Fused) and (new := _fused_class(cls)) is not None:
            check_forward(module)
            changed.append((module, new))
    for module, new in changed:
        change_class(module, new)


def without_liger(llama: Any) -> None:
    """Give what :func:`use_liger` changed its own class back."""
    for module in llama.model.modules():
        if isinstance(module, _Fused):
            change_class(module, type(module).__bases__[1])


def runs(x: Tensor) -> bool:
    """Whether Liger's kernels take x, where they are asked for."""
    return _runs(x.device.type, x.dtype, fused_enabled())


@functools.cache
def _runs(device_type: str, dtype: torch.dtype, enabled: bool) -> bool:
    """Logged once for each kind of x."""
    fits = dtype in (torch.bfloat16, torch.float16, torch.float32)
    good = enabled and fits and (device_type == "cuda" or (INTERPRETED and device_type == "cpu"))
    what = "its Triton kernels" if good else "the backbone's own modules"
    _log.info("liger on %s in %s runs %s (ADAPTERKERN_FUSED=%d)", device_type, dtype, what, enabled)
    return good


class _Fused(nn.Module):
    """Stands before a module's own class."""


class _Norm(_Fused):
    """RMSNorm."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not runs(hidden_states):
            return super().forward(hidden_states)
        from liger_kernel.transformers.functional import liger_rms_norm

        # Not in place: autograd may have given the same tensor to what was added to this output.
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=False)


class _MLP(_Fused):
    """SwiGLU."""

    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if not runs(x):
            return super().forward(x)
        from liger_kernel.transformers.functional import liger_swiglu

        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))


class _Attention(_Fused):
    """Attention, whatever its kind, whose queries and keys are turned by RoPE."""

    _rotating_forward: Callable[..., Any]  # the class's own, with Liger's rotation

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not runs(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return self._rotating_forward(hidden_states, *args, **kwargs)


@functools.cache
def _fused_class(cls: Any) -> Any:
    """The class that a module of this one changes to; None where Liger has nothing for it."""
    name, members = cls.__name__, {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if name.endswith("RMSNorm"):
        return type(name, (_Norm, cls), members)
    if name.endswith("MLP"):
        return type(name, (_MLP, cls), members)
    own = inspect.unwrap(cls.forward)  # decorators of transformers 4 only rename arguments
    if name.endswith("Attention") and _ROTATE in own.__globals__:
        from liger_kernel.transformers.functional import liger_rope

        names = own.__globals__ | {_ROTATE: liger_rope}
        forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        return type(name, (_Attention, cls), members | {"_rotating_forward": forward})
    return None


# The loss


def reads(head: Any) -> bool:
    """Whether Liger can read the LM head's weights: they are not quantised, offloaded, or split by DeepSpeed."""
    if type(head) is not nn.Linear or not runs(head.weight):
        return False
    return head.weight.shape == (head.out_features, head.in_features)


def has_plain_loss(llama: Any) -> bool:
    """Whether ``llama`` scores by transformers' loss of causal language models, which is the one that is fused."""
    return llama.loss_function is ForCausalLMLoss


def linear_cross_entropy(
    hidden: Tensor, head: nn.Linear, targets: Tensor, reduction: str = "sum", ignore_index: int = IGNORE
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the head's logits of (N, d) states, in fp32; and (N,) each state's best token.

    An ignored state's best token is −1.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    device = head.weight.device
    # The kernel reads the logit of any label.
    fits = ((targets >= 0) & (targets < head.out_features) | (targets == ignore_index)).all()
    problem = f"labels: expected token ids from 0 to {head.out_features - 1}, or {ignore_index}"
    if targets.device.type == "cpu":
        if not fits:
            raise ValueError(f"{problem}, got {targets.min().item()} to {targets.max().item()}")
    else:  # the device reports it, and the host does not wait
        torch._assert_async(fits, problem)
    result = liger_fused_linear_cross_entropy(
        hidden.to(device),
        head.weight,
        targets.to(device),
        bias=head.bias,
        ignore_index=ignore_index,
        reduction=reduction,
        return_predicted_tokens=True,
    )
    return result.loss, result.predicted_tokens


def causal_lm_output(
    llama: Any,
    input_ids: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_values: Any,
    inputs_embeds: Tensor | None,
    labels: Tensor,
    *,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """A causal language model's forward with its loss, arguments as transformers' own; the logits are None."""
    states = llama.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        **(kwargs | {"return_dict": True}),
    )
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, head = states.last_hidden_state.flatten(0, -2), llama.get_output_embeddings()
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss, _ = linear_cross_entropy(hidden, head, shift_labels.flatten(), reduction, ignore_index)
    if num_items_in_batch is not None:
        loss = loss / num_items_in_batch
    outputs = CausalLMOutputWithPast(
        loss=loss,
        past_key_values=states.past_key_values,
        hidden_states=states.hidden_states,
        attentions=states.attentions,
    )
    return outputs.to_tuple() if kwargs.get("return_dict") is False else outputs
