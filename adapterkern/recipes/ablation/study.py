"""What an ablation varies: a base point, fields with their values, and seeds; also parsed from strings."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adapterkern import checks
from adapterkern.model.config import MODULES, AdapterConfig, applicable
from adapterkern.model.inside import Inside
from adapterkern.recipes.ablation.kinds import check_apart, kind_fields
from adapterkern.training.config import FREE_ON_RESUME, TrainConfig
from adapterkern.training.optimization import with_rates

_SITES = ("layers", "every")  # two ways to choose layers, so they form one axis
_SIZES = ("adapter_dim", "prompt_length")  # which a budget decides
ADAPTER_FIELDS = tuple(f.name for f in dataclasses.fields(AdapterConfig) if f.name not in ("eps", MODULES))
_TRAINING_FIELDS = tuple(
    f.name for f in dataclasses.fields(TrainConfig) if f.name not in FREE_ON_RESUME | {"task", "train_adapters", "seed"}
)
Setting = tuple[str, Any]  # a field and its value


class Variant(NamedTuple):
    """A point of a study, without the seed."""

    label: str  # how it differs from the base
    settings: tuple[Setting, ...]  # one for each axis
    changed: frozenset[int]  # the axes on which it differs from the base
    adapter: AdapterConfig  # resolved for the backbone
    training: TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What to vary, and the base point.

    Args:
        adapter, training: the base point, except for the fields in ``vary``.
        vary: field → its values, the base point's first. A field is one of ``AdapterConfig`` or ``TrainConfig`` that
            changes a run's numbers; ``layers`` and ``every`` together are one axis, ``layers`` first. The values of
            ``kind`` are those of ``KINDS``, each with its fields over the base point's.
        seeds: integers >= 0; one run per variant and seed.
        product: run all combinations; False varies one axis at a time around the base point.
        head_alone: also train the head without adapters (where there are labels).

    Raises:
        TypeError, ValueError: an argument of a wrong type, an unknown field, no value or a duplicate one; the message
            names it.
    """

    adapter: AdapterConfig
    training: TrainConfig
    vary: Mapping[str, Sequence[Any]]
    seeds: Sequence[int] = (0, 1, 2)
    product: bool = False
    head_alone: bool = True

    def __post_init__(self) -> None:
        for name, values in self.vary.items():
            _check_field(name)
            if not values or any(v in values[:i] for i, v in enumerate(values)):
                raise ValueError(f"{name}: expected at least one value and no duplicates, got {list(values)}")
        for seed in self.seeds:
            checks.integer("seeds", seed, 0)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected at least one and no duplicates, got {list(self.seeds)}")
        if self.training.task == "regression":
            raise ValueError("task: expected one with an accuracy, which a study compares, got 'regression'")
        checks.flag("product", self.product)
        checks.flag("head_alone", self.head_alone)
        own = {f.name: getattr(self.adapter, f.name) for f in dataclasses.fields(AdapterConfig)}
        given = {name: value for name, value in own.items() if value != getattr(AdapterConfig, name)}
        check_apart("vary", self.vary.get("kind", ()), given, self.vary)
        sizes = [name for name in _SIZES if name in self.vary]
        if sizes and ("max_params" in self.vary or self.adapter.max_params is not None):
            raise ValueError(f"vary: expected max_params or {sizes[0]}, not both: a budget decides the size")

    @property
    def axes(self) -> list[list[Setting]]:
        """The values of each axis as (field, value), the base point's first."""
        sites: list[Setting] = [(name, value) for name in _SITES for value in self.vary.get(name, ())]
        others = [[(name, v) for v in values] for name, values in self.vary.items() if name not in _SITES]
        return ([sites] if sites else []) + others

    def check(self) -> None:
        """Raise as ``variants`` does, for what is wrong whatever the backbone."""
        self._points()

    def _points(self) -> list[tuple[tuple[Setting, ...], frozenset[int], AdapterConfig, TrainConfig]]:
        """The settings of each point, the axes on which it differs from the base, and its configurations."""
        axes = self.axes
        base = [axis[0] for axis in axes]
        if self.product:
            points = [list(point) for point in itertools.product(*axes)]
        else:
            points = [base]
            points += [[*base[:i], s, *base[i + 1 :]] for i, axis in enumerate(axes) for s in axis[1:]]
        found = []
        for point in points:
            changed = frozenset(i for i, (setting, b) in enumerate(zip(point, base, strict=True)) if setting != b)
            configs = _apply(self.adapter, self.training, dict(point), [point[i][0] for i in changed])
            found.append((tuple(point), changed, *configs))
        return found

    def variants(self, hidden_size: int, num_layers: int, inside: Inside | None = None) -> list[Variant]:
        """All variants for a backbone of this shape, the base point first and the head alone last.

        ``inside``: of its layers, as for ``AdapterConfig.resolve``.

        Raises:
            TypeError, ValueError: a value that its field does not accept; the message names the field.
        """
        found = []
        for point, changed, adapter, training in self._points():
            adapter = adapter.resolve(hidden_size, num_layers, inside)
            training = with_rates(training, hidden_size)
            label = ", ".join(show_setting(point[i], num_layers) for i in sorted(changed)) or "base"
            found.append(Variant(label, point, changed, adapter, training))
        if self.head_alone and self.training.labeled:
            training = found[0].training
            rate = training.lr if training.head_lr is None else training.head_lr
            alone = dataclasses.replace(training, train_adapters=False, lr=rate, head_lr=None)
            found.append(found[0]._replace(label="head alone", training=alone))
        return found

    def based_on(self, settings: Mapping[str, Any]) -> "Study":
        """This study with other values of the base point in fields that are not varied.

        Raises:
            TypeError, ValueError: a field that is varied, or a value that its field does not accept, by name.
        """
        for name in settings:
            varied = _SITES if name in _SITES else (name,)
            if any(field in self.vary for field in varied):
                raise ValueError(f"set: expected a field that is not varied, got {name!r}")
        kinds = [settings["kind"]] if "kind" in settings else []
        check_apart("set", [*self.vary.get("kind", ()), *kinds], settings, self.vary)
        adapter, training = _apply(self.adapter, self.training, settings, list(settings))
        return dataclasses.replace(self, adapter=adapter, training=training)


def _apply(
    adapter: AdapterConfig, training: TrainConfig, settings: Mapping[str, Any], asked: Sequence[str]
) -> tuple[AdapterConfig, TrainConfig]:
    """The two configurations with some fields set; ``layers`` resets ``every``, and the reverse; a kind sets its own.

    Fields of the base point that do not apply to the kind of adapter, and are not ``asked`` for, have their defaults.
    """
    fields = dict(settings)
    if "kind" in fields:
        fields |= kind_fields(fields["kind"])
    if "layers" in fields:
        fields["every"] = 1
    elif "every" in fields:
        fields["layers"] = None
    of_adapter = dataclasses.asdict(adapter) | {k: v for k, v in fields.items() if k in ADAPTER_FIELDS}
    adapter = AdapterConfig(**applicable(of_adapter, asked))
    changed = {k: v for k, v in fields.items() if k in _TRAINING_FIELDS}
    return adapter, TrainConfig.from_dict(training.to_dict() | changed)


def show_setting(setting: Setting, num_layers: int) -> str:
    """``("layers", (-3, -2, -1))`` → ``"layers 5-7"`` in a decoder of 8."""
    name, value = setting
    if name == "layers" and value is not None:
        value = show_layers(sorted(layer % num_layers for layer in value))
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def show_layers(layers: Sequence[int]) -> str:
    """Ascending layer numbers as a label; three or more consecutive ones as ``first-last``."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    return " ".join(str(layer) for layer in layers)


# From strings


def parse_axis(text: str, argument: str = "vary") -> tuple[str, tuple[Any, ...]]:
    """``"depth=1,2,3"`` → ``("depth", (1, 2, 3))``; sets of layers are separated by ``/``: ``"layers=-1/-2,-1"``.

    Raises:
        ValueError: ``text`` is not of this form, or there is no such field.
    """
    name, separator, values = text.partition("=")
    if not separator or not values:
        raise ValueError(f"{argument}: expected FIELD=VALUE,VALUE,..., got {text!r}")
    name = name.strip().replace("-", "_")
    _check_field(name, argument)
    if name == "layers":
        return name, tuple(_layer_set(part) for part in values.split("/"))
    return name, tuple(_literal(part) for part in values.split(","))


def parse_setting(text: str) -> Setting:
    """``"lr=2e-3"`` → ``("lr", 0.002)``. Raises ``ValueError`` like ``parse_axis``."""
    name, values = parse_axis(text, "set")
    if len(values) != 1:
        raise ValueError(f"set: expected one value for {name}, got {text!r}")
    return name, values[0]


def _check_field(name: object, argument: str = "vary") -> None:
    checks.choice(argument, name, ADAPTER_FIELDS + _TRAINING_FIELDS)


def _layer_set(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"layers: expected integers such as -2,-1, sets separated by /, got {text!r}") from None


def _literal(text: str) -> Any:
    """A number, True, False, None, or the string itself; the configurations check whether it fits the field."""
    words = {"true": True, "false": False, "none": None}
    text = text.strip()
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
