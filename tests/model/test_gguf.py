"""A backbone of a GGUF file, of which transformers may keep the weights packed."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import adapterkern as ak
from adapterkern.model.backbone import load_backbone

WIDTH, DEPTH, HEADS = 32, 2, 4
TOKENS = ["<pad>", "<s>", "</s>", "a", "b", "c", "ab"]
Q8 = gguf.GGMLQuantizationType.Q8_0


def write(path: Path) -> dict[str, np.ndarray]:
    """Write a tiny quantized LLaMA with a tokenizer; its matrices as they are read back."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(WIDTH)
    file.add_block_count(DEPTH)
    file.add_feed_forward_length(2 * WIDTH)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(WIDTH // HEADS)
    file.add_vocab_size(len(TOKENS))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(TOKENS)
    file.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 4)
    file.add_token_merges(["a b"])
    for number, add in enumerate((file.add_pad_token_id, file.add_bos_token_id, file.add_eos_token_id)):
        add(number)
    draw, matrices = np.random.default_rng(0), {}

    def matrix(name: str, rows: int = WIDTH, columns: int = WIDTH) -> None:
        packed = gguf.quants.quantize(draw.standard_normal((rows, columns)).astype(np.float32), Q8)
        matrices[name] = gguf.quants.dequantize(packed, Q8)
        file.add_tensor(f"{name}.weight", packed, raw_dtype=Q8)

    matrix("token_embd", len(TOKENS))
    for i in range(DEPTH):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{name}")
        for name in ("ffn_gate", "ffn_up"):
            matrix(f"blk.{i}.{name}", 2 * WIDTH)
        matrix(f"blk.{i}.ffn_down", columns=2 * WIDTH)
    for name in ("output_norm", *(f"blk.{i}.{kind}_norm" for i in range(DEPTH) for kind in ("attn", "ffn"))):
        file.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return matrices


def test_its_weights_are_plain_and_gradients_flow_through_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrices = write(tmp_path / "tiny.gguf")
    llama, tokenizer = load_backbone(tmp_path / "tiny.gguf", dtype="bf16", device="cpu")
    assert tokenizer("ab c")["input_ids"] == [6, 5]
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    assert not getattr(llama, "is_quantized", False)  # transformers' Trainer would refuse to train it
    assert "packed" not in caplog.text
    layer = llama.model.layers[0]
    for weight, name in (
        (layer.mlp.down_proj.weight, "blk.0.ffn_down"),
        (llama.model.embed_tokens.weight, "token_embd"),
    ):
        assert torch.equal(weight, torch.from_numpy(matrices[name]).bfloat16())
    model = ak.LlamaAdapter(llama, ak.AdapterConfig(adapter_dim=4, layers=(0,)))
    model(torch.tensor([[1, 3, 4]]), labels=torch.tensor([[1, 3, 4]])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.adapter_parameters())
