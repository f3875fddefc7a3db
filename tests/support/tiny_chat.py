"""Chat messages, templates written for tests, and the tokens that are learned of them, for a reader."""

from typing import Any

from transformers import PreTrainedTokenizerFast

from adapterkern.training import load_examples
from adapterkern.training.data.examples import Example
from tests.support import tiny_run

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|tools|>"]
TOOLS = "{% if tools %}{{ '<|tools|>' + tools[0].name + '\n' }}{% endif %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    TOOLS + "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}" + PROMPT
)


def marked(inside: str, outside: str) -> str:
    """ChatML that marks what is generated."""
    return (
        TOOLS + "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '" + inside + "' }}"
        "{% endgeneration %}{{ '" + outside + "' }}{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}" + PROMPT
    )


# Thinking is shown in the last turn alone, as Qwen 3's template does
FORGETS = (
    "{% for message in messages %}{% set content = message.content if loop.last else message.content.split('w9')[-1] %}"
    "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
STRIPS = CHATML.replace("message.content", "message.content | trim")
# As Mistral's: the end of the question is all that comes before the answer
BARE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '<|im_start|> ' + message.content + ' <|im_end|>' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
CLOSED = "{{ bos_token }}" + CHATML.replace(
    PROMPT, "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" + PROMPT
)
PLAIN = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CONFIG = tiny_run.quiet(task="causal-lm", max_length=64)


def tokenizer(template: str | None = CHATML, of: Any = None) -> PreTrainedTokenizerFast:
    made = of or tiny_run.tokenizer()
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = template
    return made


def said(*contents: str, system: str = "") -> list[dict[str, Any]]:
    """Messages by user and assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant") * len(contents)
    return first + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def load(row: dict[str, Any], template: str | None = CHATML, **values: Any) -> Example:
    config = tiny_run.quiet(**({"task": "causal-lm", "max_length": 64} | values))
    (example,), _ = load_examples([row], config, tokenizer(template))
    return example


def shown(example: Example) -> str:
    """The tokens, those that are learned in brackets; a role is an unknown word."""
    names = tokenizer().convert_ids_to_tokens(example.input_ids.tolist())
    learned = set((example.positions + 1).tolist())
    assert example.targets.tolist() == example.input_ids[sorted(learned)].tolist()
    plain = ["S" if n == SPECIAL[0] else "E" if n == SPECIAL[1] else "?" if n == "<unk>" else n for n in names]
    return " ".join(f"[{name}]" if place in learned else name for place, name in enumerate(plain))
