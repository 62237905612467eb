"""refinelib: boundary-refined person masks with NaN-safe training.

From ``refinelib`` itself, each imported when it is first used:

- ``resolve(recipe, **settings)`` gives the ``Settings`` of a run, ``describe(settings)`` a table of them;
  ``recipe_names()`` lists the recipes. ``from_notebook(globals())`` reads a notebook's parameters.
- ``train(settings)`` trains and gives a ``Run``, the folder of all records; ``train(settings, data=...)``
  trains on arrays or on a PyTorch data set.
- ``load(run)`` gives a ``Predictor``: an image and boxes in, masks out. ``evaluate(run, ...)`` gives metrics.
- ``replay(incident)`` replays a step that went wrong, and names the module, the loss and the sample.

Errors: ``SettingsError``, ``DataError``, ``CheckpointError``, ``RunError``, ``IncidentError``, and
``DivergedError`` for a run that skipping and rewinding did not save.

Modules for more:

- ``refinelib.data``: data sets and the store of crops: ``ArrayPeople``, ``CocoPeople``, ``open_store``,
  ``Store``.
- ``refinelib.build``: ``build_model(settings)`` gives the model, ``build_loss(settings)`` its losses, and
  ``build_step`` all parts of a training step.
- ``refinelib.modeling``: the parts as tensor code, without settings: ``unet.HierarchicalUNet``,
  ``losses.MaskLoss`` and each loss by itself, ``refinements``, ``geometry``, ``roi``.
- ``refinelib.guard``: ``Guard``, ``Rewinder`` and ``diagnose``, safe steps for any model, optimizer and loop.
- ``refinelib.registry``: ``LOSSES``, ``REFINEMENTS``, ``DATASETS``, ``METRICS``, to add one of your own.
- ``refinelib.metrics``: ``evaluate.measure`` scores a run, person by person;
  ``segmentation.SegmentationMetrics`` scores masks.
- ``refinelib.export``: ``export`` writes a model as one file for another runtime, ``opened`` reads it.
- ``refinelib.checkpoints`` reads and writes weights; ``refinelib.runs`` finds runs.

Example:
    >>> import refinelib
    >>> settings = refinelib.resolve("demo", width=0.0625, device="cpu")
    >>> model = refinelib.build.build_model(settings)
    >>> sum(p.numel() for p in model.parameters()) > 10_000
    True
"""

import importlib
from typing import Any

_HOME = {
    "config": ("Settings", "SettingsError", "resolve", "from_notebook", "describe", "recipe_names"),
    "trainer": ("train",),
    "guard.rewind": ("DivergedError",),
    "incidents": ("replay", "IncidentError"),
    "runs": ("Run", "RunError"),
    "checkpoints": ("CheckpointError",),
    "data": ("DataError",),
    "metrics.predict": ("load", "Predictor"),
    "metrics.evaluate": ("evaluate",),
}
_MODULES = {"build", "checkpoints", "data", "export", "guard", "metrics", "modeling", "registry", "runs"}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted({*_MODULE_OF, *_MODULES})
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'refinelib' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
