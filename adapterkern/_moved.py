"""Modules by the names that they had before 0.2: importing one warns, and gives the module that it is now."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_NOW = {
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
    "modules": "model.adapter",
    "pretrained": "model.pretrained",
    "reference": "ops.reference",
    "saving": "model.saving",
    "training.ablation": "recipes.ablation.runs",
    "training.ablation_report": "recipes.ablation.report",
    "training.backbone": "model.backbone",
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
    "training.outputs": "training.saved",
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
        now = "adapterkern." + _NOW[spec.name.removeprefix("adapterkern.")]
        warnings.warn(f"{spec.name} is now {now}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(now)
        self._own = module.__spec__  # the import system puts the old name's in its place
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


# First, since `adapterkern.kernels` is then a package with a path, on which its modules would be found a second time.
sys.meta_path.insert(0, _Moved())
