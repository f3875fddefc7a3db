"""The dtype of a frozen backbone, by what the machine computes fast."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adapterkern.model import fast_dtype as module
from adapterkern.model.backbone import load_backbone, saved_dtype
from adapterkern.model.fast_dtype import fast_dtype
from tests.support import tiny_run

CPU = torch.device("cpu")


@pytest.mark.parametrize(("speed", "expected"), [(2.1, "bf16"), (1.1, "fp32"), (0.025, "fp32")])
def test_a_cpu_gets_bf16_where_that_was_clearly_faster(
    speed: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_speed", lambda low, threads: speed)
    name, why = fast_dtype(CPU)
    assert name == expected
    assert f"{speed} times" in why


@pytest.mark.parametrize(
    ("speed", "saved", "expected", "said"),
    [
        (1.0, "bf16", "bf16", "its own dtype, and this CPU multiplies it 1.0 times"),
        (0.7, "bf16", "fp32", "saved in bf16; this CPU multiplies bf16 0.7 times"),
        (1.2, "fp32", "fp32", "its own dtype, and this CPU multiplies bf16 1.2 times"),
        (1.4, "fp32", "bf16", "saved in fp32; this CPU multiplies it 1.4 times"),
        (1.4, "fp16", "bf16", "saved in fp16; this CPU multiplies it 1.4 times"),
    ],
)
def test_weights_that_were_saved_in_bf16_keep_it_unless_that_is_slower(
    speed: float, saved: str, expected: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_speed", lambda low, threads: speed)
    name, why = fast_dtype(CPU, saved)
    assert name == expected
    assert why.startswith(said)


def test_the_dtype_that_a_checkpoint_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    assert saved_dtype(tmp_path / "m.gguf") is None
    path = tmp_path / "config.json"
    for content, expected in (
        ('{"dtype": "bfloat16"}', "bf16"),
        ('{"torch_dtype": "float16"}', "fp16"),  # as transformers 4 has written it
        ('{"torch_dtype": null}', None),
        ("{", None),
    ):
        path.write_text(content)
        assert saved_dtype(tmp_path) == expected
    tiny_run.model().unload().bfloat16().save_pretrained(tmp_path)
    tiny_run.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(module, "_speed", lambda low, threads: 1.0)
    assert load_backbone(tmp_path, dtype="auto", device="cpu")[0].dtype == torch.bfloat16


def test_the_measurement_times_both_dtypes_in_turns_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    cost = {torch.float32: 0.006, torch.bfloat16: 0.002}

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert x.dtype == weight.dtype
        clock[0] += cost[x.dtype]
        return x

    monkeypatch.setattr(module, "F", SimpleNamespace(linear=linear))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    module._speed.cache_clear()
    assert module._speed(torch.bfloat16, 2) == pytest.approx(3.0)
    spent = clock[0]
    assert module._speed(torch.bfloat16, 2) == pytest.approx(3.0)
    assert clock[0] == spent
    module._speed.cache_clear()


def test_a_slow_dtype_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {torch.float16: 0.06, torch.bfloat16: 1.0}
    monkeypatch.setattr(module, "_speed", lambda low, threads: found[low])
    assert module.slow_dtype(torch.float16, CPU) == "this CPU multiplies it 0.06 times as fast as fp32"
    assert module.slow_dtype(torch.bfloat16, CPU) == module.slow_dtype(torch.float32, CPU) == ""
    assert module.slow_dtype(torch.float16, torch.device("cuda", 0)) == ""


def test_a_gpu_gets_bf16_if_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert fast_dtype(torch.device("cuda", 0))[0] == expected


def test_a_backbone_is_loaded_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run.model().unload().save_pretrained(tmp_path)
    tiny_run.tokenizer().save_pretrained(tmp_path)
    for speed, expected in ((3.0, torch.bfloat16), (1.0, torch.float32)):
        monkeypatch.setattr(module, "_speed", lambda low, threads, speed=speed: speed)
        assert load_backbone(tmp_path, dtype="auto", device="cpu")[0].dtype == expected
