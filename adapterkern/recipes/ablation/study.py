"""What an ablation varies: a base point, fields with their values, seeds; and how a command line says so."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adapterkern.model.config import AdapterConfig
from adapterkern.training.config import FREE_ON_RESUME, TrainConfig

_SITES = ("layers", "every")  # two ways to say where, hence one axis
ADAPTER_FIELDS = tuple(f.name for f in dataclasses.fields(AdapterConfig) if f.name not in ("eps", "max_params"))
_TRAINING_FIELDS = tuple(
    f.name for f in dataclasses.fields(TrainConfig) if f.name not in FREE_ON_RESUME | {"task", "train_adapters", "seed"}
)
Setting = tuple[str, Any]  # a field and its value


class Variant(NamedTuple):
    """A point of a study, without its seed."""

    label: str  # how it differs from the base
    settings: tuple[Setting, ...]  # one for each axis
    changed: frozenset[int]  # the axes on which it differs from the base
    adapter: AdapterConfig  # resolved for the backbone
    training: TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What to vary, and around what.

    Args:
        adapter, training: the base point, but for the fields in ``vary``.
        vary: field → its values, the first being the base point's. Any field of ``AdapterConfig`` or ``TrainConfig``
            that changes a run's numbers; ``layers`` and ``every`` are one axis together, ``layers`` first.
        seeds: one run of each variant for each.
        product: all combinations; False varies one axis at a time around the base point.
        head_alone: also train the head without adapters (classification only).

    Raises:
        ValueError: naming the field; nothing to vary, or a value that stands twice.
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
                raise ValueError(f"{name}: expected at least one value and none twice, got {list(values)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected at least one and none twice, got {list(self.seeds)}")

    @property
    def axes(self) -> list[list[Setting]]:
        """The values of each axis as (field, value); the first is the base point's."""
        sites: list[Setting] = [(name, value) for name in _SITES for value in self.vary.get(name, ())]
        others = [[(name, v) for v in values] for name, values in self.vary.items() if name not in _SITES]
        return ([sites] if sites else []) + others

    def variants(self, hidden_size: int, num_layers: int) -> list[Variant]:
        """All variants for a backbone of this shape, the base point first and the head alone last.

        Raises:
            ValueError, TypeError: a value that its field does not take; the message names it.
        """
        axes = self.axes
        base = [axis[0] for axis in axes]
        if self.product:
            points = [list(point) for point in itertools.product(*axes)]
        else:
            points = [base]
            points += [[*base[:i], s, *base[i + 1 :]] for i, axis in enumerate(axes) for s in axis[1:]]
        found = []
        for point in points:
            adapter, training = _apply(self.adapter, self.training, dict(point))
            adapter = adapter.resolve(hidden_size, num_layers)
            changed = frozenset(i for i, (setting, b) in enumerate(zip(point, base, strict=True)) if setting != b)
            label = ", ".join(show_setting(point[i], num_layers) for i in sorted(changed)) or "base"
            found.append(Variant(label, tuple(point), changed, adapter, training))
        if self.head_alone and self.training.task == "classification":
            alone = dataclasses.replace(found[0].training, train_adapters=False)
            found.append(found[0]._replace(label="head alone", training=alone))
        return found

    def based_on(self, settings: Mapping[str, Any]) -> "Study":
        """This study around a base point that has other values in fields that it does not vary.

        Raises:
            ValueError, TypeError: a field that is varied, or a value that its field does not take, by name.
        """
        for name in settings:
            varied = _SITES if name in _SITES else (name,)
            if any(field in self.vary for field in varied):
                raise ValueError(f"set: expected a field that is not varied, got {name!r}")
        adapter, training = _apply(self.adapter, self.training, settings)
        return dataclasses.replace(self, adapter=adapter, training=training)


def _apply(
    adapter: AdapterConfig, training: TrainConfig, settings: Mapping[str, Any]
) -> tuple[AdapterConfig, TrainConfig]:
    """The two configurations with some fields set; ``layers`` takes ``every`` back, and the other way round."""
    fields = dict(settings)
    if "layers" in fields:
        fields["every"] = 1
    elif "every" in fields:
        fields["layers"] = None
    adapter = dataclasses.replace(adapter, **{k: v for k, v in fields.items() if k in ADAPTER_FIELDS})
    changed = {k: v for k, v in fields.items() if k in _TRAINING_FIELDS}
    return adapter, TrainConfig.from_dict(training.to_dict() | changed)


def show_setting(setting: Setting, num_layers: int) -> str:
    """``("layers", (-3, -2, -1))`` → ``"layers 5-7"`` in a decoder of 8."""
    name, value = setting
    if name == "layers" and value is not None:
        value = show_layers(sorted(layer % num_layers for layer in value))
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def show_layers(layers: Sequence[int]) -> str:
    """Ascending numbers; three or more in a row as ``first-last``."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    return " ".join(str(layer) for layer in layers)


# From text


def parse_axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """``"depth=1,2,3"`` → ``("depth", (1, 2, 3))``; sets of layers are separated by ``/``: ``"layers=-1/-2,-1"``.

    Raises:
        ValueError: not of this form, or no field of this name.
    """
    name, separator, values = text.partition("=")
    if not separator or not values:
        raise ValueError(f"vary: expected FIELD=VALUE,VALUE,..., got {text!r}")
    name = name.strip().replace("-", "_")
    _check_field(name)
    if name == "layers":
        return name, tuple(_layer_set(part) for part in values.split("/"))
    return name, tuple(_literal(part) for part in values.split(","))


def parse_setting(text: str) -> Setting:
    """``"lr=2e-3"`` → ``("lr", 0.002)``. Raises ``ValueError`` as :func:`parse_axis` does."""
    name, values = parse_axis(text)
    if len(values) != 1:
        raise ValueError(f"set: expected one value for {name}, got {text!r}")
    return name, values[0]


def _check_field(name: str) -> None:
    if name not in ADAPTER_FIELDS + _TRAINING_FIELDS:
        raise ValueError(f"vary: expected one of {', '.join(ADAPTER_FIELDS + _TRAINING_FIELDS)}, got {name!r}")


def _layer_set(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"layers: expected whole numbers such as -2,-1, sets parted by /, got {text!r}") from None


def _literal(text: str) -> Any:
    """A number, true, false, none, or the text itself; the configurations check whether it fits the field."""
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
