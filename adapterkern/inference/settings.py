"""How text is generated: transformers' ``GenerationConfig``, with the options that most want and all others by name."""

import copy
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adapterkern import checks

NEW_TOKENS = 256  # at most, by default
# What has an effect only on tokens that are drawn, and the value that has none
_OF_DRAWING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0}
_OF_DRAWING |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
# What reads the tokens before it, padding included, and the values with which it does not
_READS_PADDING: dict[str, tuple[Any, ...]] = dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1,))
_READS_PADDING |= dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), (0,))
_READS_PADDING |= dict.fromkeys(("bad_words_ids", "sequence_bias", "prompt_lookup_num_tokens", "stop_strings"), ())
_READS_PADDING |= {"guidance_scale": (1,), "token_healing": (False,), "watermarking_config": ()}
_READS_PADDING |= {"exponential_decay_length_penalty": ()}
_ONE = "one completion for each prompt"
_TEXT = "text, and no tensors"
_REFUSED = {"max_length": "max_new_tokens", "num_return_sequences": _ONE, "return_dict_in_generate": _TEXT}
_REFUSED |= dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _TEXT)
_NO_SETTINGS = ("_from_model_config", "transformers_version")  # which a saved generation_config.json has


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How text is generated. What is None is as the model's ``generation_config.json`` has it.

    Tokens are drawn if the temperature is above 0, or ``other`` says so (``do_sample``); else the likeliest is taken,
    whatever the model's configuration says.

    Args:
        other: further fields of ``GenerationConfig``.

    Raises:
        TypeError, ValueError: a value of the wrong kind or out of its range; a field that transformers does not have,
            that has no effect beside the others, or that gives anything but one text.
    """

    max_new_tokens: int | None = checks.option(None, f"most new tokens [{NEW_TOKENS}]")
    temperature: float | None = checks.option(None, "above 0: draw tokens at this temperature [0: take the likeliest]")
    top_p: float | None = checks.option(None, "draw from the likeliest tokens that have this probability together")
    top_k: int | None = checks.option(None, "draw from this many of the likeliest tokens")
    num_beams: int | None = checks.option(None, "beams of a beam search [1: none]")
    repetition_penalty: float | None = checks.option(None, "above 1: against tokens that are there already")
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        known = _fields()
        if unknown := [name for name in self.other if name not in known]:
            likely = " or ".join(checks.near(unknown[0], sorted(known)))
            hint = f" (did you mean {likely}?)" if likely else ""
            raise ValueError(
                f"generation: expected fields of transformers' GenerationConfig, got {unknown[0]!r:.80}{hint}"
            )
        for name, value in self.other.items():
            harmless = not value or (name == "num_return_sequences" and value == 1)
            if name in _REFUSED and not harmless:
                raise ValueError(f"generation: {name}: expected {_REFUSED[name]}, got {value!r:.80}")
            if getattr(self, name, None) is not None:
                raise ValueError(f"{name}: expected it once, got it as an option and in generation, too")
        asked = self._asked
        for name, low in (("max_new_tokens", 1), ("top_k", 1), ("num_beams", 1)):
            if asked.get(name) is not None:
                checks.integer(name, asked[name], low)
        for name, interval in (("temperature", "[0, inf)"), ("top_p", "(0, 1]"), ("repetition_penalty", "(0, inf)")):
            if asked.get(name) is not None:
                checks.number(name, asked[name], interval)
        if not self.draws:
            for name, neutral in _OF_DRAWING.items():
                if name != "temperature" and asked.get(name) not in (None, neutral):
                    got = "do_sample false" if asked.get("do_sample") is False else "none"
                    raise ValueError(
                        f"{name}: has no effect on the likeliest token: expected a temperature above 0, got {got}"
                    )
        self._check_by_transformers()

    @property
    def _asked(self) -> dict[str, Any]:
        """Every field that was given."""
        own = {name: getattr(self, name) for name in _OWN if getattr(self, name) is not None}
        return own | {name: value for name, value in self.other.items() if name not in _NO_SETTINGS}

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random, with torch's default generator."""
        asked = self._asked
        given = asked.get("do_sample")
        if given is not None and bool(given) != bool(asked.get("temperature", given)):
            raise ValueError(
                f"temperature: expected one {'above 0 ' if given else ''}that fits do_sample={given}, "
                f"got {asked['temperature']}"
            )
        return bool(asked.get("temperature")) if given is None else checks.flag("do_sample", given)

    @property
    def new_tokens(self) -> int:
        """The most new tokens, whichever way they were asked for."""
        return int(self._asked.get("max_new_tokens") or NEW_TOKENS)

    @property
    def streams(self) -> bool:
        """Whether the tokens are known one after the other; beams are not."""
        return (self._asked.get("num_beams") or 1) == 1

    def config(self, model: Any, tokenizer: Any, ends: Collection[int] = ()) -> Any:
        """The whole ``GenerationConfig``: the model's own, with what was asked for, and the tokens that end a text.

        Args:
            ends: tokens that end a text beside the model's and the tokenizer's.
        """
        from adapterkern.training.data.ends import end_tokens  # the command line makes options from this module

        config = copy.deepcopy(model.generation_config)
        config._from_model_config = False
        found = dict.fromkeys((*end_tokens(config, tokenizer), *ends))
        neutral = {} if self.draws else _OF_DRAWING
        pad = next((n for n in (tokenizer.pad_token_id, *found) if n is not None), 0)
        given = {"max_new_tokens": NEW_TOKENS, "max_length": None, "num_return_sequences": 1, "pad_token_id": pad}
        given |= dict.fromkeys((name for name, why in _REFUSED.items() if why is _TEXT), False)
        given |= {"eos_token_id": list(found) or None, **neutral, **self._asked, "do_sample": self.draws}
        if not self.draws:
            given["temperature"] = 1.0
        for name, value in given.items():
            setattr(config, name, value)
        return config

    def _check_by_transformers(self) -> None:
        """Raise ``ValueError`` for what transformers would refuse, or warn of."""
        from transformers import GenerationConfig

        asked = {name: value for name, value in self._asked.items() if name not in _REFUSED}
        if not self.draws:
            asked.pop("temperature", None)
        try:
            GenerationConfig(**asked | {"do_sample": self.draws}).validate(strict=True)
        except (TypeError, ValueError, AttributeError) as error:
            lines = [line.strip("- ") for line in str(error).splitlines() if line.strip().startswith("-")]
            raise ValueError(f"generation: {(lines or str(error).splitlines())[0]}") from error


_OWN = tuple(field.name for field in dataclasses.fields(GenerationSettings) if field.name != "other")


def reads_padding(config: Any) -> bool:
    """Whether a text depends on how far it is padded: something counts or punishes the tokens before it."""
    return any(getattr(config, name, None) not in (None, *values) for name, values in _READS_PADDING.items())


def _fields() -> set[str]:
    from transformers import GenerationConfig

    return set(GenerationConfig().to_dict()) | set(_NO_SETTINGS)


def read_generation(text: str) -> dict[str, Any]:
    """Fields of ``GenerationConfig`` from ``KEY=VALUE``, the value as JSON or a string, or from a file of JSON.

    Raises:
        OSError: there is no such file.
        ValueError: it holds no object.
    """
    from adapterkern.files import read_json  # which needs an extra

    name, is_field, value = text.partition("=")
    if is_field and name.isidentifier():
        try:
            return {name: json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))}
        except ValueError:
            return {name: value}
    if not Path(text).is_file():
        raise FileNotFoundError(f"generation: expected KEY=VALUE or a .json file, got {text!r}")
    return dict(read_json(Path(text)))
