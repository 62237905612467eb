"""What this machine has for training, a line each: whether it will do, or what to fix.

Every part is imported where it is looked at: a part that is missing is a finding.
"""

import platform
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from refinelib.files import reason, shipped

#: Free bytes under which a disk is called full: a store of COCO's people takes five times as much.
LEAST_FREE = 1 << 30
#: Installed with the package for a user; what its developers need is left out.
DEVELOPERS = ("test",)
Given = dict[str, Any]  # settings by name


class Found(NamedTuple):
    """One finding; ``fix`` says what to do, where something must be done."""

    what: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        """One line."""
        found = f"{self.what}: {self.text}"
        return f"FIX {found}: {self.fix}" if self.fix else f"ok  {found}"


def examine(overrides: dict[str, Any] | None = None) -> Iterator[Found]:
    """Look at everything, one after the other.

    Args:
        overrides: settings that are to be used, such as ``data`` and ``data_dir``.

    Example:
        >>> python = next(examine())
        >>> python.what, python.fix
        ('Python', '')
    """
    yield Found("Python", f"{platform.python_version()}, {sys.executable}")
    for look in (_packages, _torch, _device, _kernel, _outputs, _recipes, _data):
        try:
            yield from look(overrides or {})
        except Exception as error:  # whatever is broken is what is looked for
            fix = "give other settings with -p" if isinstance(error, ValueError) else "mend this first"
            if isinstance(error, ModuleNotFoundError):
                fix = f"run {sys.executable} -m pip install {error.name}"
            yield Found(look.__name__[1:], reason(error, 400), fix)


def _packages(_: Given) -> Iterator[Found]:
    """Every package that ``pyproject.toml`` names, against its range; those of extras may lack."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in metadata.requires("refinelib") or ()]
    except metadata.PackageNotFoundError:
        yield Found("packages", "refinelib is not installed in this Python", "run pip install -e . in it")
        return
    found, wrong = defaultdict[str, list[str]](list), list[str]()
    for one in needed:
        extra = "".join(re.findall(r"extra == .([\w-]+)", str(one.marker)))
        if one.marker and not one.marker.evaluate({"extra": extra}):
            continue  # for another system
        try:
            version = metadata.version(one.name)
            fits = one.specifier.contains(version, prereleases=True)
        except metadata.PackageNotFoundError:
            version, fits = "missing", False
        found[extra].append(f"{one.name} {version}")
        wrong += [f"{one.name} {version}, not {one.specifier}"] if not (fits or extra) else []
    text = "; ".join(wrong) or f"all {len(found[''])} are there"
    yield Found("packages", text, "run pip install -e . again" if wrong else "")
    for extra, names in found.items():
        if extra not in ("", *DEVELOPERS):
            yield Found(f"optional packages, {extra}", ", ".join(names))


def _torch(_: Given) -> Iterator[Found]:
    import torch

    built = torch.version.cuda or torch.version.hip or ""
    yield Found("torch", f"{torch.__version__}, {f'for CUDA {built}' if built else 'without CUDA'}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and (shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()):
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


def _device(given: Given) -> Iterator[Found]:
    """The device that is asked for, where one is."""
    from refinelib.build import build_device
    from refinelib.config import Settings

    if "device" in given:
        yield Found("device", f"training takes {build_device(Settings(device=given['device']))}")


def _kernel(_: Given) -> Iterator[Found]:
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


def _outputs(given: Given) -> Iterator[Found]:
    from refinelib.config import absolute

    folder = absolute(given.get("output_dir", "outputs"))
    place = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        yield Found("outputs", f"{place} cannot be written to ({reason(error)})", "give another output_dir")
        return
    free = shutil.disk_usage(place).free
    fix = "make room, or give an output_dir on a larger disk" if free < LEAST_FREE else ""
    yield Found("outputs", f"{folder} can be written to, {free / 2**30:.1f} GiB are free", fix)


def _recipes(_: Given) -> Iterator[Found]:
    from refinelib.config import SettingsError, recipe_files, resolve

    files = recipe_files()
    yield Found("recipes", f"{len(files)} in {shipped() / 'params'}")
    for name, file in files.items():
        try:
            resolve(name)
        except SettingsError as error:
            yield Found("recipes", f"{file}: {reason(error)}", "mend that file")


def _data(given: Given) -> Iterator[Found]:
    from refinelib.config import resolve
    from refinelib.data import make_source

    settings, place = resolve("original", **given), given.get("data_dir") or "the places given"
    if settings.data == "synthetic":
        hint = "give -p data NAME -p data_dir DIR to look at a data set"
        yield Found("data", f"synthetic needs none; {hint}")
        return
    for split in ("train", "val"):
        make_source(settings, split)
    yield Found("data", f"{settings.data}: train and val are in {place}; check-data reads them whole")
