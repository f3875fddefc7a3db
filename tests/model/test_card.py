"""The model card and the upload: what the card says, that the hub's own reader parses it, which files are uploaded."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import adapterkern as ak
from adapterkern.model.files import card
from adapterkern.training import push_to_hub, train
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS, EVAL_ROWS = tiny_run.rows(16), tiny_run.rows(6, seed=1)
PUBLISHED = {"adapterkern.safetensors", "adapterkern.json", "README.md"}


def read(directory: Path) -> Any:
    return ModelCard.load(directory / "README.md")


def test_an_adapter_says_what_it_is(tmp_path: Path) -> None:
    model = tiny_run.model(position="attention", depth=2)
    model.config.name_or_path = "someone/tiny-llama"
    model.save_pretrained(tmp_path)
    found = read(tmp_path)
    assert (found.data.base_model, found.data.library_name) == ("someone/tiny-llama", "adapterkern")
    assert "between attention and feed-forward network of layers 2, 3 (from 0), 2 in sequence" in found.text
    assert f"dimension 8, {sum(p.numel() for p in model.adapter_parameters()):,} parameters" in found.text
    assert f"adapterkern {ak.__version__}" in found.text
    assert 'base = "someone/tiny-llama"' in found.text
    assert not {"pipeline_tag", "model-index"} & found.data.to_dict().keys()


def test_a_run_says_what_it_did(tmp_path: Path) -> None:
    model = tiny_run.model()
    model.config.name_or_path = str(tmp_path)  # a local folder is not a model that others can load
    config = tiny_run.quiet(output_dir=tmp_path / "run", checkpoint_every=4)
    result = train(model, ROWS, config, tokenizer=TOKENIZER, eval_data=EVAL_ROWS)
    assert result.metrics is not None
    assert result.checkpoint is not None
    found = read(tmp_path / "run")
    assert found.data.base_model is None
    assert str(tmp_path) not in found.content
    assert found.data.pipeline_tag == "text-classification"
    scores = {r.metric_type: r.metric_value for r in found.data.eval_results}
    assert scores == pytest.approx({name: result.metrics[name] for name in ("loss", "accuracy")}, abs=1e-6)
    for text in ("Labels: no, yes.", "data: 16 examples", "data: 6 examples", "8 steps; rows per step 4", "lr 0.01"):
        assert text in found.text
    assert read(result.checkpoint).content == found.content


def test_a_head_alone(tmp_path: Path) -> None:
    config = tiny_run.quiet(output_dir=tmp_path, train_adapters=False, max_steps=1)
    train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER)
    found = read(tmp_path)
    assert "# Classification head for" in found.text
    assert "## Adapter" not in found.text
    assert "## Metrics" not in found.text


def test_what_somebody_wrote_stays(tmp_path: Path) -> None:
    model = tiny_run.model()
    model.save_pretrained(tmp_path)
    changed = (tmp_path / "README.md").read_text().replace(card.MARK, "My own words.")
    (tmp_path / "README.md").write_text(changed)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == changed


def test_names_cannot_break_the_card(tmp_path: Path) -> None:
    """Labels and file names come from data and must not break YAML or Markdown."""
    model = tiny_run.model()
    rows = [row | {"label": f"{row['label']}|\n---\n# <b>"} for row in ROWS]
    config = tiny_run.quiet(output_dir=tmp_path, max_steps=1)
    train(model, rows, config, tokenizer=TOKENIZER, eval_data=rows)
    found = read(tmp_path)
    assert found.data.library_name == "adapterkern"
    assert "``no| --- # <b>``, ``yes| --- # <b>``" in found.text


class Hub:
    """A stand-in for HfApi that records its calls."""

    def __init__(self, calls: list[dict[str, Any]], token: Any) -> None:
        self.calls, self.token = calls, token

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append({"token": self.token, "repo_id": repo_id, **options})

        class Url(str):
            repo_id = "me/full-name"

        return Url("https://hub/me/full-name")

    def upload_folder(self, *, folder_path: Any, allow_patterns: list[str], **options: Any) -> None:
        content = {name: (Path(folder_path) / name).read_bytes() for name in allow_patterns}
        self.calls.append({"files": content, **options})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(card, "HfApi", lambda token=None: Hub(calls, token))
    return calls


def test_push_a_model(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    model = tiny_run.model()
    url = model.push_to_hub("me/name", private=True, token="secret", revision="v1")
    assert url == "https://hub/me/full-name"
    created, uploaded = hub
    assert created == {"token": "secret", "repo_id": "me/name", "private": True, "exist_ok": True}
    assert uploaded["files"].keys() == PUBLISHED
    assert (uploaded["repo_id"], uploaded["revision"]) == ("me/full-name", "v1")
    for name, content in uploaded["files"].items():
        (tmp_path / name).write_bytes(content)
    loaded = ak.LlamaAdapter.from_pretrained(tiny_run.model().unload(), tmp_path)
    assert tiny_run.same_bits(tiny_run.weights(loaded), tiny_run.weights(model))


def test_push_a_run(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    config = tiny_run.quiet(output_dir=tmp_path, max_steps=2)
    train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER)
    (tmp_path / "notes.txt").write_text("private")
    push_to_hub(tmp_path, "me/name")
    files = hub[1]["files"]
    assert files.keys() == PUBLISHED | {"task.json", "head.safetensors", "head_config.json"}
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_push_a_run_of_0_1_0(hub: list[dict[str, Any]]) -> None:
    push_to_hub(Path(__file__).parents[1] / "golden" / "runs" / "causal-lm", "me/name")
    assert hub[1]["files"].keys() == {"adapter_model.safetensors", "adapter_config.json", "README.md", "task.json"}


def test_there_must_be_something_to_push(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"task\.json"):
        push_to_hub(tmp_path, "me/name")
    config = tiny_run.quiet(output_dir=tmp_path, max_steps=1)
    train(tiny_run.model(), ROWS, config, tokenizer=TOKENIZER)
    (tmp_path / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*README\.md"):
        push_to_hub(tmp_path, "me/name")
    assert not hub
