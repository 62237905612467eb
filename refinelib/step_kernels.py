"""Kernels made in a process of its own while the run trains without them.

    Stepper --> python -m refinelib.step_precompile SETTINGS --> kernels on disk (outputs/compiled)
       | trains with plain kernels meanwhile                   |
       +-- the first step after that takes them up, in seconds +

Compiling takes minutes and most of it is other processes' work; waiting for it would leave the GPU idle.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from refinelib.config import Settings, absolute, names_with_role

#: Where kernels are kept unless this variable says otherwise.
KERNELS_VARIABLE, KERNELS = "TORCHINDUCTOR_CACHE_DIR", "outputs/compiled"

#: Settings that change what is computed and no kernel of augmentation, model and loss, beside those of the roles run and inference. (The schedule's numbers are
#: part of the guard's own small kernel, which takes seconds.)
_IMMATERIAL = {
    "recipe", "seed", "epochs", "init_from", "lr", "min_lr", "warmup_epochs", "weight_decay", "max_images", "data", "add_pennfudan",
    "max_consecutive_skips", "max_rewinds", "max_incidents", "compile", "cuda_graphs", "smoke",
}  # fmt: skip

#: The line of a traceback that says what was raised.
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")


def kernels_folder() -> Path:
    """Folder of compiled kernels: one place for all runs, so that the next of the same shape starts in seconds; a temporary folder forgets."""
    return Path(os.environ.setdefault(KERNELS_VARIABLE, str(absolute(KERNELS))))


def note(settings: Settings) -> Path:
    """The file that says that kernels for these settings are kept: it belongs to this package's code, this PyTorch and this device."""
    content = {name: value for name, value in settings.model_dump(mode="json").items() if name not in _IMMATERIAL | names_with_role("run", "inference")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    key = json.dumps([_code(), torch.__version__, device, content], sort_keys=True)
    return kernels_folder() / "refinelib" / hashlib.sha256(key.encode()).hexdigest()[:24]


def keep_note(settings: Settings) -> None:
    """Say that kernels for these settings are kept. Where there is no room for that, the next run does without."""
    place = note(settings)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()


@contextlib.contextmanager
def keeping_graphs():
    """While something is compiled: what PyTorch's compiler traced is kept beside the kernels, so that the next process need not trace gradients again.

    PyTorch does so by itself, but for graphs with a change of precision or a gradient by hand in them, which are in every layer here. Both are wholly
    described by the graph that is its key; this package's code is made part of the key too.
    """
    from torch._functorch import config as tracing  # seconds to import, and not needed where nothing is compiled
    from torch._inductor import config as compiler

    changes = {f"torch.amp.autocast_mode.{name}": _code() for name in ("_enter_autocast", "_exit_autocast")}
    with contextlib.ExitStack() as stack:
        for config, name, value in (
            (compiler, "unsafe_marked_cacheable_functions", changes),
            (tracing, "autograd_cache_allow_custom_autograd_functions", True),
        ):
            if hasattr(config, name):  # PyTorch 2.6 has neither: kernels alone are kept
                stack.enter_context(config.patch({name: value}))
        yield


@functools.cache
def _code() -> str:
    """Changes with the package, but for what no step is made of."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] not in ("figures", "notebook", "quality"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Precompile:
    """Compiles in a process of its own; :meth:`poll` tells when it is done.

    Args:
        settings: of the run, settled for its device.
        store: folder of its training store.
    """

    def __init__(self, settings: Settings, *, store: Path) -> None:
        kernels_folder()
        given = {"settings": settings.model_dump(mode="json"), "store": str(store), "parent": os.getpid()}
        package = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self._said = tempfile.TemporaryFile()
        try:
            # A session of its own: Ctrl-C means the run, which ends this process itself, with all that it started.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "refinelib.step_precompile", json.dumps(given)],
                env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            self._said.close()
            raise

    def poll(self) -> str | None:
        """None while it works; "" when the kernels are there; else the last line of what went wrong."""
        code = self._process.poll()
        if not code:
            return None if code is None else ""
        if code < 0:
            return f"ended by signal {-code}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        named = [line for line in lines if _EXCEPTION.match(line)]  # what follows it can be advice of many lines, as CUDA's is
        return (named or lines or [f"ended with code {code}"])[-1]

    def close(self) -> None:
        """End it, if it still works."""
        if self._process.poll() is None:
            kill_session(self._process.pid)
            self._process.kill()
            self._process.wait()
        self._said.close()


def kill_session(leader: int) -> None:
    """End a process that leads a session and all that it started, where sessions exist."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # ended this moment
            os.killpg(leader, signal.SIGKILL)
