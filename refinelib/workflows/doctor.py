"""What this machine has for training, a line each: whether it will do, or what to fix.

Every part is imported where it is looked at: a part that is missing is a finding.
"""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from refinelib.files import reason, shipped

#: Free bytes under which a disk is called full: a store of COCO's people takes five times as much.
LEAST_FREE = 1 << 30
#: Installed with the package for a user; what its developers need is left out.
DEVELOPERS = ("test",)


class Found(NamedTuple):
    """One finding; ``fix`` says what to do, where something must be done."""

    what: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        """One line."""
        line = f"{'FIX' if self.fix else 'ok ':3} {self.what}: {self.text}"
        return f"{line}: {self.fix}" if self.fix else line


def examine(overrides: dict[str, Any] | None = None) -> Iterator[Found]:
    """Look at everything, one after the other.

    Args:
        overrides: settings that are to be used, such as ``data`` and ``data_dir``.

    Example:
        >>> python = next(examine())
        >>> python.what, python.fix
        ('Python', '')
    """
    given = overrides or {}
    parts: dict[str, Callable[[], Iterator[Found]]] = {
        "Python": _python,
        "packages": _packages,
        "torch": _torch,
        "device": lambda: _device(given),
        "kernel": _kernel,
        "outputs": lambda: _outputs(given),
        "recipes": _recipes,
        "data": lambda: _data(given),
    }
    for what, look in parts.items():
        try:
            yield from look()
        except Exception as error:  # whatever is broken is what is looked for
            yield Found(what, reason(error), "mend this first")


def _python() -> Iterator[Found]:
    version, fix = platform.python_version(), "install Python 3.11 or newer"
    yield Found("Python", f"{version}, {sys.executable}", fix if sys.version_info < (3, 11) else "")


def _packages() -> Iterator[Found]:
    """Every package that ``pyproject.toml`` names, against its range; those of extras may lack."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in metadata.requires("refinelib") or ()]
    except metadata.PackageNotFoundError:
        yield Found("packages", "refinelib is not installed in this Python", "run pip install -e . in it")
        return
    missing, optional = list[str](), dict[str, list[str]]()
    extras = metadata.metadata("refinelib").get_all("Provides-Extra") or []
    for one in needed:
        extra = next((name for name in extras if one.marker and one.marker.evaluate({"extra": name})), "")
        if one.marker and not extra and not one.marker.evaluate({"extra": ""}):
            continue  # for another system
        try:
            version = metadata.version(one.name)
            wrong = not one.specifier.contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, wrong = "missing", True
        if extra:
            optional.setdefault(extra, []).append(f"{one.name} {version}")
        elif wrong:
            missing.append(f"{one.name} {version}, not {one.specifier}")
    count = len(needed) - sum(map(len, optional.values()))
    text, fix = "; ".join(missing) or f"all {count} are there", "run pip install -e . again" * bool(missing)
    yield Found("packages", text, fix)
    for extra, names in optional.items():
        if extra not in DEVELOPERS:
            yield Found(f"optional packages, {extra}", ", ".join(names))


def _torch() -> Iterator[Found]:
    import torch

    built = torch.version.cuda or torch.version.hip or ""
    yield Found("torch", f"{torch.__version__}, {f'for CUDA {built}' if built else 'without CUDA'}")
    driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and driver:
        build = "its driver is older than this CUDA: update the driver, or install a torch for an older CUDA"
        fix = build if built else "install a torch that is built for CUDA (https://pytorch.org)"
        yield Found("CUDA", "this host has an NVIDIA GPU that PyTorch does not see", fix)
    elif not count:
        mps = torch.backends.mps.is_available()
        yield Found("CUDA", f"no device: training takes {'device mps or the CPU' if mps else 'the CPU'}")
    for number in range(count):
        name = torch.cuda.get_device_name(number)
        try:
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(number))
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            assert float((ones @ ones).sum()) == 64**3
            yield Found(f"cuda:{number}", f"{name}, {free:.1f} of {total:.1f} GiB free")
        except Exception as error:
            fix = "it cannot be used with this torch, or others use it up: see nvidia-smi"
            yield Found(f"cuda:{number}", f"{name}: {reason(error)}", fix)


def _device(given: dict[str, Any]) -> Iterator[Found]:
    """The device that is asked for, where one is."""
    from refinelib.build import build_device
    from refinelib.config import Settings

    if "device" in given:
        try:
            yield Found("device", f"training takes {build_device(Settings(device=given['device']))}")
        except ValueError as error:
            yield Found("device", reason(error), "give another device with -p")


def _kernel() -> Iterator[Found]:
    """The kernel that runs the notebooks must be of this Python."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    fix = f"run {sys.executable} -m ipykernel install --sys-prefix"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
        here, used = Path(sys.executable), Path(spec.argv[0])
        if used.name == spec.argv[0]:  # Jupyter takes its own Python where a kernel gives no folder
            used = here
        same = used.absolute().parent == here.absolute().parent
        yield Found("Jupyter kernel", f"python3 is {used}", "" if same else f"not {here}: {fix}")
    except NoSuchKernel:
        yield Found("Jupyter kernel", "there is no kernel python3", fix)


def _outputs(given: dict[str, Any]) -> Iterator[Found]:
    from refinelib.config import absolute

    folder = absolute(given.get("output_dir", "outputs"))
    place = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
        free = shutil.disk_usage(place).free
    except OSError as error:
        yield Found("outputs", f"{place} cannot be written to ({reason(error)})", "give another output_dir")
        return
    fix = "make room, or give an output_dir on a larger disk" if free < LEAST_FREE else ""
    yield Found("outputs", f"{folder} can be written to, {free / 2**30:.1f} GiB are free", fix)


def _recipes() -> Iterator[Found]:
    from refinelib.config import SettingsError, recipe_files, resolve

    files, wrong = recipe_files(), dict[str, str]()
    for name in files:
        try:
            resolve(name)
        except SettingsError as error:
            wrong[name] = reason(error)
    for name, why in wrong.items():
        yield Found("recipes", f"{files[name]}: {why}", "mend that file")
    if not wrong:
        yield Found("recipes", f"{len(files)} in {shipped() / 'params'}, all valid")


def _data(given: dict[str, Any]) -> Iterator[Found]:
    from refinelib.config import SettingsError, resolve
    from refinelib.data import DataError, make_source

    try:
        settings = resolve("original", **given)
        if settings.data == "synthetic":
            yield Found(
                "data", "synthetic needs none; give -p data NAME -p data_dir DIR to look at a data set"
            )
            return
        for split in ("train", "val"):
            make_source(settings, split)
    except (SettingsError, DataError) as error:
        yield Found("data", reason(error, 400), "give other settings with -p")
        return
    place = given.get("data_dir") or "the places given"
    yield Found("data", f"{settings.data}: train and val are in {place}; check-data reads them whole")
