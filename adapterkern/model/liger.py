"""Liger's kernels for the frozen part of one model: RMSNorm, RoPE, SwiGLU, and a loss that never holds all logits.

    RMSNorm   one kernel, which saves x and 1/rms(x) for the backward; transformers saves an fp32 copy of x
    RoPE      one kernel rotates q and k in place
    SwiGLU    one kernel computes silu(gate) ⊙ up; it saves gate and up and recomputes the rest
    loss      computes the LM head's logits for a few tokens at a time and turns them into their gradient at once

Liger-Kernel (Hsu et al. 2024, arXiv:2410.10989) replaces functions and classes of transformers for a whole process.
Here the norms, MLPs and attentions of one model change their class, as adapted layers do, and can change it back. An
attention's new class runs its original forward with another ``apply_rotary_pos_emb`` among the globals.

The kernels are written in Triton. Where they cannot run (a CPU outside Triton's interpreter, fp64,
``ADAPTERKERN_FUSED=0``) every module runs its original forward. SwiGLU's backward overwrites what it saved, so a second
backward over the same graph (``retain_graph=True``) silently gives wrong gradients; and the loss makes the host wait
for the device twice per step.
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

from adapterkern.model.decoder import change_class, check_forward, own_class, preceded, reduced
from adapterkern.ops.choice import INTERPRETED, fused_enabled

# Their norms, MLPs, rotations and losses compute exactly what LLaMA's do; tests/model/interpreted_liger.py checks each.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
IGNORE = -100
_ROTATE = "apply_rotary_pos_emb"

logger = logging.getLogger(__name__)


def check_installed() -> None:
    """Raise ``ImportError`` if liger-kernel is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("liger: expected liger-kernel, which is not installed: pip install liger-kernel")


def use_liger(llama: Any) -> None:
    """Make the norms, MLPs and attentions of ``llama`` run Liger's kernels; ``without_liger`` undoes it.

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: the type of ``llama`` is not among ``MODEL_TYPES``, its activation is not SiLU, or a module has a
            forward of its own.
    """
    check_installed()
    kind = llama.config.model_type
    if kind not in MODEL_TYPES:
        raise ValueError(f"liger: expected a backbone of type {', '.join(MODEL_TYPES)}, got {kind!r}")
    if llama.config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"liger: expected a backbone whose hidden_act is 'silu', got {llama.config.hidden_act!r}")
    changed: list[tuple[nn.Module, Any]] = []
    for module in llama.model.modules():
        cls: Any = type(module)
        if not isinstance(module, Fused) and (new := _fused_class(cls)) is not None:
            check_forward(module)
            if "_place" in vars(module):  # see copies.py: its parameters may be a copy's, in another dtype
                raise ValueError(f"liger: expected no {cls.__name__} among the modules_to_save of an adapter, got one")
            changed.append((module, new))
    for module, new in changed:
        change_class(module, new)


def without_liger(llama: Any) -> None:
    """Undo ``use_liger``: give each module its own class back."""
    for module in llama.model.modules():
        if isinstance(module, Fused):
            change_class(module, own_class(module, Fused))


def runs(x: Tensor) -> bool:
    """Whether Liger's kernels support x, on its device and in its dtype."""
    return _runs(x.device.type, x.dtype, fused_enabled())


@functools.cache
def _runs(device_type: str, dtype: torch.dtype, enabled: bool) -> bool:
    """Cached, so that it is logged once per device type and dtype."""
    has_kernels = device_type == "cuda" or (INTERPRETED and device_type == "cpu")
    supported = enabled and has_kernels and dtype in (torch.bfloat16, torch.float16, torch.float32)
    what = "its Triton kernels" if supported else "the backbone's own modules"
    level = logging.INFO if supported else logging.WARNING  # it was asked for
    logger.log(level, "liger on %s in %s runs %s (ADAPTERKERN_FUSED=%d)", device_type, dtype, what, enabled)
    return supported


class Fused(nn.Module):
    """Precedes a module's own class in the method resolution order."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, protocol, _fused_class, own_class(self, Fused))


class _Norm(Fused):
    """RMSNorm."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not runs(hidden_states):
            return super().forward(hidden_states)
        from liger_kernel.transformers.functional import liger_rms_norm

        # in_place would overwrite dy, which autograd may also pass on to a tensor that was added to this output.
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=False)


class _MLP(Fused):
    """SwiGLU."""

    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if not runs(x):
            return super().forward(x)
        from liger_kernel.transformers.functional import liger_swiglu

        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))


class _Attention(Fused):
    """Attention of any kind with RoPE."""

    _rotating_forward: Callable[..., Any]  # the class's own forward, with Liger's rotation

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not runs(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return self._rotating_forward(hidden_states, *args, **kwargs)


@functools.cache
def _fused_class(cls: Any) -> Any:
    """The class for modules of class ``cls`` that runs Liger's kernel; None if Liger has none for it."""
    name = cls.__name__
    if name.endswith("RMSNorm"):
        return preceded(cls, _Norm)
    if name.endswith("MLP"):
        return preceded(cls, _MLP)
    own = inspect.unwrap(cls.forward)  # decorators of transformers 4 only rename arguments
    if name.endswith("Attention") and _ROTATE in own.__globals__:
        from liger_kernel.transformers.functional import liger_rope

        names = own.__globals__ | {_ROTATE: liger_rope}
        forward = types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
        forward.__kwdefaults__ = own.__kwdefaults__
        return preceded(cls, _Attention, _rotating_forward=forward)
    return None


# The loss


def reads(head: Any) -> bool:
    """Whether Liger can read the LM head's weights: they are not quantized, offloaded or sharded by DeepSpeed."""
    if type(head) is not nn.Linear or not runs(head.weight):
        return False
    return head.weight.shape == (head.out_features, head.in_features)


def has_plain_loss(llama: Any) -> bool:
    """Whether the loss of ``llama`` is transformers' loss for causal language models, the one that is fused."""
    return llama.loss_function is ForCausalLMLoss


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    reduction: str = "sum",
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the head's logits without holding all of them.

    Args:
        hidden: (N, d) states.
        head: the LM head.
        targets: (N,) int64 token ids; ``ignore_index`` is ignored.
        reduction: ``"sum"`` or ``"mean"`` over the targets.
        label_smoothing: as in torch's ``cross_entropy``.

    Returns:
        The loss in fp32, and (N,) the token with the largest logit per state; −1 where the target is ignored.

    Raises:
        ValueError: a target is not a token id. On a GPU this is checked asynchronously.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    device = head.weight.device
    # The kernel does not check that a label is in range before it reads the logit.
    fits = ((targets >= 0) & (targets < head.out_features) | (targets == ignore_index)).all()
    problem = f"labels: expected token ids from 0 to {head.out_features - 1}, or {ignore_index}"
    if targets.device.type == "cpu":
        if not fits:
            raise ValueError(f"{problem}, got {targets.min().item()} to {targets.max().item()}")
    else:  # asynchronous: the host does not wait
        torch._assert_async(fits, problem)
    result = liger_fused_linear_cross_entropy(
        hidden.to(device),
        head.weight,
        targets.to(device),
        bias=head.bias,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        return_predicted_tokens=True,
    )
    return result.loss, result.predicted_tokens


def causal_lm_output(
    llama: Any,
    *,
    labels: Tensor,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """A causal language model's forward with the fused loss, same arguments as transformers'; the logits are None."""
    states = llama.model(**(kwargs | {"return_dict": True}))
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
