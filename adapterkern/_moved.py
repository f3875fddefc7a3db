"""Old module names, from before 0.2: importing one warns and gives the module that has its contents now.

A module that was split gives one with the names of all its parts.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_NOW: dict[str, str | tuple[str, ...]] = {
    "doctor": "cli.doctor",
    "adapterhub": "model.files.adapterhub",
    "card": "model.files.card",
    "composition": "ops.closed_form",
    "decoder": "model.decoder",
    "folder": "model.files.folder",
    "kernels": "ops.kernels",
    "kernels.backward": "ops.kernels.backward",
    "kernels.cache": "ops.kernels.cache",
    "kernels.forward": "ops.kernels.forward",
    "kernels.hidden": "ops.kernels.hidden",
    "kernels.launch": "ops.kernels.launch",
    "kernels.primitives": "ops.kernels.primitives",
    "kernels.slice": "ops.kernels.slice",
    "kernels.tiles": "ops.kernels.tiles",
    "kernels.weights": "ops.kernels.weights",
    "liger": "model.liger",
    "llama": "model.llama",
    "low_rank": "model.low_rank",
    "mixing": "model.mixing",
    "modules": ("model.adapter", "model.config"),
    "pretrained": "model.pretrained",
    "reference": "ops.reference",
    "saving": "model.saving",
    "training.ablation": "recipes.ablation.runs",
    "training.ablation_report": "recipes.ablation.report",
    "training.backbone": ("model.backbone", "training.saved"),
    "training.checkpoint": "training.run.checkpoint",
    "training.corpora": "recipes.demo.corpora",
    "training.demo": "recipes.demo.demo",
    "training.distillation": "recipes.distillation.task",
    "training.distributed": "training.processes",
    "training.engine": "training.parallel.engine",
    "training.evaluation": "training.api",
    "training.interrupt": "training.run.interrupt",
    "training.multitask": "recipes.multitask.task",
    "training.optimizer": "training.optimization",
    "training.outputs": ("training.saved", "training.run.folder"),
    "training.precision": "training.parallel.accelerator",
    "training.prefix": "training.data.prefix",
    "training.presets": "recipes.ablation.presets",
    "training.qa": "recipes.qa.task",
    "training.report": "training.run.report",
    "training.results": "training.run.results",
    "training.router": "recipes.routing.router",
    "training.routing": "recipes.routing.task",
    "training.rows": "training.data.rows",
    "training.schedules": "training.optimization",
    "training.soft_labels": "recipes.distillation.soft_labels",
    "training.spans": "recipes.qa.spans",
    "training.squad": "recipes.qa.squad",
    "training.stability": "recipes.ablation.stability",
    "training.study": "recipes.ablation.study",
    "training.zero": "training.parallel.deepspeed",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        known = name.startswith("adapterkern.") and name.removeprefix("adapterkern.") in _NOW
        return importlib.util.spec_from_loader(name, self) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        now = _NOW[spec.name.removeprefix("adapterkern.")]
        names = [f"adapterkern.{name}" for name in ((now,) if isinstance(now, str) else now)]
        warnings.warn(f"{spec.name} is now {' and '.join(names)}", DeprecationWarning, stacklevel=2)
        modules = [importlib.import_module(name) for name in names]
        if len(modules) == 1:
            spec.loader_state = modules[0].__spec__  # the import system replaces it by the old name's
            return modules[0]
        spec.loader_state = spec
        union = ModuleType(spec.name, f"The names of {' and '.join(names)}.")
        for module in modules:
            vars(union).update({name: value for name, value in vars(module).items() if not name.startswith("__")})
        return union

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


# First, since `adapterkern.kernels` is then a package with a path, on which its modules would be found a second time.
sys.meta_path.insert(0, _Moved())
