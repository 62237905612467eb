"""A trained model as one file for another runtime.

=========== ================================== =============================================
format      holds                              needs, to write and to check
=========== ================================== =============================================
onnx        weights and graph                  ``onnx``, ``onnxscript``, ``onnxruntime``
pt2         weights and graph (torch.export)   nothing more
torchscript weights and graph (torch.jit)      nothing more
safetensors weights, and settings of the model ``safetensors``
=========== ================================== =============================================

The model in a file takes what :class:`~refinelib.metrics.predict.Predictor` gives its model: ``images``,
float32 ``[batch, 3, *canvas]``, crops of the box with its context; RGB values of 0..255, rounded to whole
numbers, minus ``mean``, divided by ``std``, which is about -2.2..2.7. It gives ``probs``, float32
``[batch, 3, *mask_size]``: the probabilities of background, target and non-target over the box, as
``Predictor`` gives them. A batch may have any size.

All that ``Predictor`` does between crops and probabilities is inside: the refinements, the products of the
two branches, the flip test where the run has it, the decision weights. So the mask is where the target,
interpolated to the image's pixels, is the likeliest class. To have the model's own probabilities back, divide
each class by its decision weight and the three by their sum.

Weights are the moving average's where the run has one. They are float32 on the CPU, and so is the
computation, whatever the run was trained on and in (``Predictor`` keeps to the run's ``amp``). The layers'
formulations for GPUs are in no file.

Every file has the same metadata, a JSON text under the name :data:`METADATA`: see :func:`metadata`.
"""

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

import refinelib
from refinelib.build import build_model
from refinelib.config import Settings, names_with_role
from refinelib.data import SyntheticPeople
from refinelib.data.augment import MEAN, STD
from refinelib.files import PathLike, reason, replacing, shown
from refinelib.metrics.evaluate import checked_folder
from refinelib.metrics.predict import CropModel, Predictor, Size, load, predict_probs
from refinelib.modeling.roi import centre_window

#: Largest difference to PyTorch's probabilities with which a file is written.
TOLERANCE = 1e-4

#: Crops that a model is traced with, and of the batches that its file is checked on.
TRACED, CHECKED = 2, (1, 3)

#: Name of the metadata in a file.
METADATA = "refinelib.json"


class ExportError(RuntimeError):
    """A model was not exported, or a file cannot be opened; the message says why and what to do."""


class Exported(NamedTuple):
    """A file that was written.

    Attributes:
        path: of the file.
        difference: largest difference of its probabilities to PyTorch's, on the crops it was checked on.
    """

    path: Path
    difference: float

    @property
    def sentence(self) -> str:
        """What was written, and how exact it is."""
        size, batches = self.path.stat().st_size / 2**20, " and ".join(map(str, CHECKED))
        most = f"{self.difference:.1e} at most, in batches of {batches} (allowed: {TOLERANCE:.0e})"
        return f"wrote {self.path} ({size:.1f} MiB): its probabilities differ from PyTorch's by {most}"


class CropProbs(nn.Module):
    """The computation of a predictor from normalised crops to probabilities over the box.

    Args:
        model: returns a :class:`~refinelib.modeling.output.MaskOutput`.
        mask_size: pixels over the box, (height, width).
        flip: average over each crop and its mirror image.
        weights: decision weights, see :func:`~refinelib.metrics.predict.predict_probs`.

    Example:
        >>> settings = Settings(width=0.0625, roi_size=(16, 16), mask_size=(16, 16), context=0.5)
        >>> module = CropProbs(build_model(settings), (16, 16), flip=True, weights=(1, 1.3, 1))
        >>> module(torch.zeros(2, 3, 24, 24)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, model: nn.Module, mask_size: Size, flip: bool, weights: Sequence[float]) -> None:
        super().__init__()
        self.model, self.mask_size, self.flip, self.weights = model, mask_size, flip, weights

    def forward(self, images: Tensor) -> Tensor:
        """Float ``[B, 3, *canvas]`` to ``[B, 3, *mask_size]``."""
        probs = predict_probs(self.model, images, flip=self.flip, weights=self.weights)
        return centre_window(probs, self.mask_size)


def export(
    run: PathLike,
    format: str,
    out: PathLike | None = None,
    *,
    flip: bool | None = None,
    output_dir: str = "outputs",
) -> Exported:
    """Write a run's model as one file, opened again and compared with PyTorch.

    Args:
        run: a run's name, its folder (its best checkpoint is taken) or a checkpoint file.
        format: ``onnx``, ``pt2``, ``torchscript`` or ``safetensors``; the module's text says what each holds.
        out: file to write or to replace; none: beside the checkpoint, with its name.
        flip: flip test, at twice the time of a crop; none: as the run's own settings say.
        output_dir: where runs are looked for by name.

    Raises:
        CheckpointError: no such run, or its checkpoint is not whole.
        ExportError: no such format, a package that it needs is missing, the file cannot be written or read,
            or its probabilities differ by more than :data:`TOLERANCE`. An older file of that name stays.
        ValueError: ``out`` lies in a file.

    Example:
        >>> export("demo", "h5")
        Traceback (most recent call last):
        ...
        refinelib.export.ExportError: there is no format 'h5'; there are onnx, pt2, torchscript, safetensors
    """
    kind = _kind(format)
    predictor = load(run, device="cpu", output_dir=output_dir, flip=flip)
    target = Path(out or predictor.path.with_suffix(kind.suffix)).expanduser()
    if target.suffix != kind.suffix or target.is_dir() or target.resolve() == predictor.path.resolve():
        rule = f"give a file that ends in {kind.suffix} and is not the checkpoint"
        raise ExportError(f"{target} cannot be written as {format}: {rule}")
    size, text = predictor.settings.mask_size, json.dumps(metadata(predictor))
    module = CropProbs(predictor.model, size, predictor.flip, predictor.weights).eval()
    crops = _crops(predictor)
    folder = checked_folder(target.parent)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(target, "wb") as file, _quiet():
            kind.write(module, crops[:TRACED], text, file)
            file.flush()
            found, _ = kind.read(file.name)
            pairs = [(found(some), module(some)) for some in crops.split(CHECKED)]
            difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
            if not difference <= TOLERANCE:
                most = f"{difference:.1e}, more than {TOLERANCE:.0e}"
                raise ValueError(f"its probabilities differ from PyTorch's by {most}")
    except Exception as error:  # a runtime raises nearly anything
        raise ExportError(f"{target} was not written: {reason(error)}") from error
    return Exported(target, difference)


def opened(file: PathLike) -> tuple[CropModel, dict[str, Any]]:
    """The model in an exported file, in the file's own runtime, and its metadata.

    Args:
        file: as :func:`export` wrote it.

    Raises:
        ExportError: there is no such file, it is something else, or a package is missing that it needs.
    """
    suffixes = {kind.suffix: name for name, kind in FORMATS.items()}
    if Path(file).suffix not in suffixes:
        raise ExportError(f"{file} has none of the endings {', '.join(suffixes)}")
    kind = _kind(suffixes[Path(file).suffix])
    try:
        with _quiet():
            found, text = kind.read(str(file))
        return found, json.loads(text)
    except Exception as error:  # a runtime raises nearly anything
        raise ExportError(f"{file} is no exported model: {reason(error)}") from error


def metadata(predictor: Predictor) -> dict[str, Any]:
    """What somebody has to know who uses an exported file.

    Args:
        predictor: of the run.

    Returns:
        ``refinelib`` and ``torch``: versions; ``run``; ``checkpoint``; ``classes``: names in order;
        ``images`` and ``probs``: shapes; ``mean`` and ``std``: of the crops' RGB values in 0..255, see the
        module's text; ``region``: height and width of a crop's region relative to the box, about whose centre
        it lies, and which ``probs`` cover; ``flip_test`` and ``decision_weights``: what is inside;
        ``settings``: what :func:`~refinelib.build.build_model` makes the same network of.
    """
    settings, canvas = predictor.settings, predictor.model.canvas
    names = names_with_role("model") | {"roi_size", "mask_size", "context"}
    return {
        **{"refinelib": refinelib.__version__, "torch": torch.__version__},
        **{"run": predictor.name, "checkpoint": predictor.path.name},
        "classes": ["background", "target", "non-target"],
        **{"images": ["batch", 3, *canvas], "mean": MEAN, "std": STD},
        "region": [whole / box for whole, box in zip(canvas, settings.roi_size, strict=True)],
        "probs": ["batch", 3, *settings.mask_size],
        **{"flip_test": predictor.flip, "decision_weights": predictor.weights},
        "settings": settings.pick(*sorted(names)),
    }


# -- the formats -----------------------------------------------------------------------------------
class _Format(NamedTuple):
    suffix: str
    packages: tuple[str, ...]
    write: Callable[[CropProbs, Tensor, str, IO[bytes]], None]
    read: Callable[[str], tuple[CropModel, str]]


def _kind(name: str) -> _Format:
    """A format by name, of which all packages can be imported."""
    if name not in FORMATS:
        raise ExportError(f"there is no format {shown(name)}; there are {', '.join(FORMATS)}")
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return FORMATS[name]


def _program(module: CropProbs, images: Tensor) -> Any:
    shapes = ({0: torch.export.Dim("batch")},)
    return torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)


def _write_onnx(module: CropProbs, images: Tensor, text: str, file: IO[bytes]) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["probs"]}
    names |= {"dynamic_shapes": ({0: "batch"},)}  # the program has them; this keeps the name
    program: Any = torch.onnx.export(_program(module, images), (), dynamo=True, verbose=False, **names)
    program.model.metadata_props[METADATA] = text
    file.write(program.model_proto.SerializeToString())


def _read_onnx(file: str) -> tuple[CropModel, str]:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["probs"], {"images": images.numpy()})[0])

    return run, session.get_modelmeta().custom_metadata_map[METADATA]


def _write_pt2(module: CropProbs, images: Tensor, text: str, file: IO[bytes]) -> None:
    torch.export.save(_program(module, images), file, extra_files={METADATA: text})


def _read_pt2(file: str) -> tuple[CropModel, str]:
    extra = {METADATA: ""}
    with open(file, "rb") as content:
        return torch.export.load(content, extra_files=extra).module(), extra[METADATA]


def _write_torchscript(module: CropProbs, images: Tensor, text: str, file: IO[bytes]) -> None:
    traced: Any = torch.jit.trace(module, (images,), check_trace=False)
    torch.jit.save(traced, file, _extra_files={METADATA: text})


def _read_torchscript(file: str) -> tuple[CropModel, str]:
    extra = {METADATA: ""}
    model: Any = torch.jit.load(file, map_location="cpu", _extra_files=extra)
    return model, extra[METADATA]


def _write_safetensors(module: CropProbs, images: Tensor, text: str, file: IO[bytes]) -> None:
    weights = {name: value.contiguous() for name, value in module.model.state_dict().items()}
    file.write(importlib.import_module("safetensors.torch").save(weights, {METADATA: text}))


def _read_safetensors(file: str) -> tuple[CropModel, str]:
    with importlib.import_module("safetensors").safe_open(file, "pt") as content:
        text = content.metadata()[METADATA]
        weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no dictionary)
    found = json.loads(text)
    settings = Settings(**found["settings"])
    model = build_model(settings)
    model.load_state_dict(weights)
    module = CropProbs(model, settings.mask_size, found["flip_test"], found["decision_weights"])
    return module.eval(), text


FORMATS = {
    "onnx": _Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "pt2": _Format(".pt2", (), _write_pt2, _read_pt2),
    "torchscript": _Format(".ts", (), _write_torchscript, _read_torchscript),
    "safetensors": _Format(".safetensors", ("safetensors",), _write_safetensors, _read_safetensors),
}


# -- helpers ---------------------------------------------------------------------------------------
def _crops(predictor: Predictor) -> Tensor:
    """Crops of a picture with people: all of it, either half, and beside it, which has one colour."""
    pixels = SyntheticPeople(1, "val").scene(0).image
    height, width = pixels.shape[:2]
    places = [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (4.0, 5.0)]
    return predictor.crops(pixels, [[a * width, 0, b * width, height] for a, b in places])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what tracing warns of: sizes other than the batch's are constants, as they should be."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(before)
