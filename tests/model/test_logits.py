"""Logits that are scaled, capped or cut are found by asking the backbone, and computed as it does."""

import logging
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

import adapterkern as ak
from adapterkern.model.logits import find_logits_path
from tests.support import tiny_run
from tests.support.tiny_llama import IDS, adapted, tiny

ROWS = [{"input_ids": row[:n].tolist()} for row, n in zip(IDS, (10, 7, 4), strict=True)]
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8}
# name, fields, whether the output embeddings are all that is needed
BACKBONES = [
    ("Llama", {}, True),
    ("Granite", {"logits_scaling": 1.0}, True),
    ("Granite", {"logits_scaling": 8.0}, False),
    ("Cohere", {"logit_scale": 0.25}, False),
    ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}, False),
    ("Gemma2", {"final_logit_softcapping": 1e4, "head_dim": 8}, False),  # too high for eight tokens to reach
    ("FalconH1", MAMBA | {"lm_head_multiplier": 0.5}, False),
]


def scores(model: Any, row: dict[str, Any]) -> Tensor:
    return model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float()


@pytest.mark.parametrize(
    ("family", "fields", "plain", "liger"), [*((*backbone, False) for backbone in BACKBONES), ("Llama", {}, True, True)]
)
def test_the_loss_is_that_of_the_backbone_s_own_logits(
    family: str, fields: dict[str, Any], plain: bool, liger: bool
) -> None:
    model = adapted(tiny(family, **fields))
    model.liger = liger
    assert model.logits_path.plain == plain
    result = ak.train(model, ROWS, tiny_run.quiet(task="causal-lm", lr=1e-12, max_steps=1, log_every=1))
    with torch.no_grad():
        losses = [
            F.cross_entropy(scores(model, row)[:-1], torch.tensor(row["input_ids"][1:]), reduction="none")
            for row in ROWS
        ]
    torch.testing.assert_close(result.history[0]["loss"], torch.cat(losses).mean().item(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "fields", "plain"), BACKBONES)
def test_rounding_does_not_change_the_answer(
    family: str, fields: dict[str, Any], plain: bool, dtype: torch.dtype
) -> None:
    path = find_logits_path(tiny(family, **fields).to(dtype))
    assert (path.obstacle, path.plain, path.added) == ("", plain, 0)


def test_logits_of_a_dispatched_backbone() -> None:
    model = adapted(tiny("Cohere", logit_scale=0.25))
    expected = model(IDS).logits
    states = model.decoder(IDS).last_hidden_state.flatten(0, 1)
    accelerate.dispatch_model(model.base, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(model.logits_of(states).view_as(expected), expected)


def test_the_model_stays_as_it_was() -> None:
    llama = tiny("Cohere", logit_scale=0.25).train()
    llama.model.eval()
    modes = [module.training for module in llama.modules()]
    decoder, state = llama.model, torch.get_rng_state()
    find_logits_path(llama)
    assert llama.model is decoder
    assert [module.training for module in llama.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class FromEmbeddings(LlamaForCausalLM):
    """Its logits are not a function of its decoder's last hidden states."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if input_ids is not None:
            out.logits = out.logits + self.lm_head(self.model.embed_tokens(input_ids))
        return out


def test_logits_of_something_else_are_refused() -> None:
    model = ak.LlamaAdapter(FromEmbeddings(tiny().config), ak.AdapterConfig(adapter_dim=4, layers=[3]))
    with pytest.raises(ValueError, match=r"model: expected a backbone with an LM head for causal-lm, but FromEmb"):
        ak.train(model, ROWS, tiny_run.quiet(task="causal-lm"))
    with pytest.raises(ValueError, match="uses more than its decoder's last hidden states"):
        model.logits_of(torch.zeros(1, 32))


def test_what_the_backbone_s_own_loss_adds_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The balance of the experts: Mixtral adds it if its configuration asks for the router's logits."""
    for added in (False, True):
        llama = tiny("Mixtral", output_router_logits=added, num_local_experts=4, router_aux_loss_coef=0.5)
        model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=4, layers=[3]))
        with caplog.at_level(logging.WARNING):
            ak.train(model, ROWS, tiny_run.quiet(task="causal-lm", max_steps=1))
        assert ("MixtralForCausalLM's own loss differs from it by +" in caplog.text) == added
        ids = IDS[:1]
        own = llama(input_ids=ids, labels=ids).loss
        plain = F.cross_entropy(llama(input_ids=ids).logits[0, :-1], ids[0, 1:])
        assert (abs(own - plain) > 0.1) == added


class Smoothed(LlamaForCausalLM):
    """Its loss is another one."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        out = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            out.loss = out.loss + out.logits.square().mean()
        return out


def test_liger_s_loss_is_not_used_for_another_one() -> None:
    for cls, fused in ((LlamaForCausalLM, True), (Smoothed, False)):
        model = ak.LlamaAdapter(
            cls(tiny(initializer_range=0.2).config), ak.AdapterConfig(adapter_dim=4, layers=[3]), liger=True
        ).train()
        assert (model.logits_path.plain and not model.logits_path.added) == fused


def test_a_backbone_without_a_head() -> None:
    llama = tiny()
    llama.get_output_embeddings = lambda: None
    assert find_logits_path(llama).obstacle == "LlamaForCausalLM has no LM head"
