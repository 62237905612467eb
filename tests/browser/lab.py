"""JupyterLab in a headless Chromium: a server of its own, a notebook, its widgets.

It uses no settings of the user: HOME and all of Jupyter's folders are temporary.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Its names on Debian, Ubuntu and elsewhere.
CHROMIUM = (
    "/usr/bin/chromium",
    "/usr/bin/chromium-browser",
    "/usr/bin/google-chrome",
    "/usr/bin/google-chrome-stable",
)
#: Root needs ``--no-sandbox``; the rest keeps the browser off the network and off a GPU that is not there.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage")
FLAGS += ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
#: As wide as a laptop; JupyterLab's own bars take some 350 pixels of it.
WIDTH, HEIGHT = 1360, 900
#: Chromium paints no page higher than this, in pixels.
HIGHEST = 16000

# Run in the page. ``jupyterapp`` is JupyterLab itself, offered by ``expose_app_in_browser``.
STATE = """() => {
    const panel = window.jupyterapp?.shell.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
    const open = panel?.content?.model?.cells?.length && panel.context.isReady;
    return open && kernel ? kernel.status : 'not there';
}"""
CELLS = "() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells"
# Where the last cell ends, scrolled to the top.
BOTTOM = """() => {
    document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0;
    return [...document.querySelectorAll('.jp-Notebook .jp-Cell')].at(-1).getBoundingClientRect().bottom;
}"""
# Outputs that stick out of their cell, or are shown with a scroll bar.
CUT_OFF = """() => ['', ' *'].map(parts => '.jp-Notebook .jp-OutputArea-output' + parts)
    .flatMap(parts => [...document.querySelectorAll(parts)])
    .filter(part => part.checkVisibility() && part.clientWidth > 0 && part.scrollWidth > part.clientWidth + 1)
    .filter(part => getComputedStyle(part).overflowX != 'visible')
    .map(part => `${part.tagName}.${part.className}: ${part.scrollWidth} in ${part.clientWidth} pixels`)"""
# The whole picture, not only its address: a picture drawn again may be the same.
PIXELS = """async image => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
    return bytes.length + ':' + [...hash.slice(0, 8)].join(' ');
}"""


def chromium() -> str | None:
    """Where Chromium is; ``None`` where there is none."""
    return next((path for path in CHROMIUM if os.access(path, os.X_OK)), None)


class Server:
    """JupyterLab on this machine alone, on a free port and behind a token; used as a context.

    Args:
        folder: notebooks are served from ``folder/notebooks``; its settings and its log lie beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.folder = folder / "notebooks", folder
        self.token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> Server:
        self.root.mkdir(parents=True)
        places = {"HOME": "home", "IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "runtime"}
        places |= {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data"}
        places |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
        environment = {
            **os.environ,
            "REFINELIB_SMOKE": "1",
            **{name: str(self.folder / place) for name, place in places.items()},
        }
        for place in places.values():
            (self.folder / place).mkdir(mode=0o700)
        quiet = (
            self.folder
            / "settings"
            / "@jupyterlab"
            / "apputils-extension"
            / "notification.jupyterlab-settings"
        )
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--expose-app-in-browser",
        ]
        command += [
            f"--ServerApp.root_dir={self.root}",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={self.port}",
        ]
        command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}"]
        self._log = (self.folder / "server.log").open("w")
        self._process = subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=self._log, stderr=self._log
        )
        try:
            until(self._answers, 60, "JupyterLab does not answer")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()  # it ends its kernels first
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(
                "JupyterLab did not start:\n" + (self.folder / "server.log").read_text()[-2000:]
            )
        try:
            return bool(json.load(urllib.request.urlopen(self.address("api/status"), timeout=2)))
        except OSError:
            return False

    def address(self, path: str) -> str:
        """Of a page or an answer of the server, with the token in it."""
        return f"http://127.0.0.1:{self.port}/{path}?token={self.token}"


def until(happened: Callable[[], Any], seconds: float, otherwise: str, every: float = 0.1) -> Any:
    """What ``happened`` returns, once that is true.

    Raises:
        TimeoutError: ``otherwise``, and for how long.
    """
    end = time.monotonic() + seconds
    while not (found := happened()):
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise} (waited {seconds:g} s)")
        time.sleep(every)
    return found


class Notebook:
    """A notebook in a page of the browser.

    Args:
        page: Playwright's page.
        server: that has the notebook.
        name: of its file, without the suffix.
    """

    def __init__(self, page: Any, server: Server, name: str) -> None:
        self.page, self.name = page, name
        self.complaints: list[str] = []
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(server.address(f"lab/workspaces/{name}/tree/{name}.ipynb"))
        until(lambda: self.state() == "idle", 90, f"{name}.ipynb does not open")

    def state(self) -> str:
        """Of its kernel: ``idle``, ``busy`` and so on."""
        return self.page.evaluate(STATE)

    def cells(self) -> list[dict[str, Any]]:
        """As nbformat has them, with all that JupyterLab holds now, saved or not."""
        return self.page.evaluate(CELLS)

    def cell(self, number: int) -> Any:
        """Playwright's handle of a cell of the notebook."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number)

    def run_all(self, seconds: float, watch: Callable[[], None] = lambda: None) -> None:
        """*Run All Cells* from the menu; returns when all cells have run or one has failed."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

        def ended() -> bool:
            watch()
            if self.state() != "idle":
                return False
            code = [cell for cell in self.cells() if cell["cell_type"] == "code" and cell["source"]]
            return all(cell["execution_count"] for cell in code) or bool(self.errors())

        until(ended, seconds, f"{self.name}.ipynb still runs", every=0.25)

    def errors(self) -> list[str]:
        """``cell: error`` of every cell that raised."""
        outputs = [(cell["id"], item) for cell in self.cells() for item in cell.get("outputs", [])]
        return [
            f"{cell}: {item['ename']}: {item['evalue']}"
            for cell, item in outputs
            if item["output_type"] == "error"
        ]

    def widgets(self) -> Iterator[Widgets]:
        """Outputs that hold controls, in order."""
        for number, cell in enumerate(self.cells()):
            for item in cell.get("outputs", []):
                if "application/vnd.jupyter.widget-view+json" in item.get("data", {}):
                    yield Widgets(self, cell["id"], self.cell(number))

    def screenshot(self, file: Path) -> list[str]:
        """The whole notebook as one picture, in a window high enough for it; returns what is cut off."""
        self.page.get_by_role("menuitem", name="View", exact=True).focus()  # no cell is being edited
        height = HEIGHT
        for _ in range(8):  # a cell that was never on the screen has a guessed height
            self.page.set_viewport_size({"width": WIDTH, "height": height})
            self.page.wait_for_timeout(300)
            needed = min(round(self.page.evaluate(BOTTOM)) + 40, HIGHEST)
            if abs(needed - height) < 2:
                break
            height = needed
        self.page.screenshot(path=file)
        found = self.page.evaluate(CUT_OFF)
        self.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        return found


class Widgets:
    """Controls of one output and the picture that they decide on."""

    def __init__(self, notebook: Notebook, name: str, cell: Any) -> None:
        self.page, self.name = notebook.page, name
        cell.scroll_into_view_if_needed()
        self.output = cell.locator(".widget-vbox, .refinelib-boxes").first
        self.image = self.output.locator("img")
        self.image.wait_for(timeout=15000)

    def picture(self) -> str:
        """What tells one picture from another."""
        return self.image.evaluate(PIXELS)

    def labels(self) -> list[str]:
        """What the controls are called, sliders and lists first."""
        named = self.output.locator(".widget-inline-hbox > .widget-label").all_text_contents()
        pressed = self.output.locator("button").all_text_contents()
        return [
            label for label in (text.strip() for text in (*named, *pressed)) if label
        ]  # text that stands by itself has none

    def control(self, label: str) -> Any:
        return self.output.locator(".widget-inline-hbox", has=self.page.get_by_text(label, exact=True))

    def drag(self, label: str, share: float) -> None:
        """Drag the handle of a slider with the mouse to ``share`` (0 to 1) of the slider's length."""
        control = self.control(label)
        knob, track = control.locator(".noUi-touch-area"), control.locator(".noUi-base")
        knob.scroll_into_view_if_needed()
        start, whole = (
            self._at_rest(knob),
            self._at_rest(track),
        )  # a picture above that is still loading would move it from under the mouse
        middle = start["y"] + start["height"] / 2
        self.page.mouse.move(start["x"] + start["width"] / 2, middle)
        self.page.mouse.down()
        self.page.mouse.move(whole["x"] + whole["width"] * share, middle, steps=6)
        self.page.mouse.up()

    def _at_rest(self, place: Any) -> dict[str, float]:
        """Where something is on the page, once it has stayed there for a moment."""
        seen = [place.bounding_box()]

        def stays() -> bool:
            self.page.wait_for_timeout(100)
            seen.append(place.bounding_box())
            return seen[-1] == seen[-2]

        until(stays, 15, f"{self.name}: the page does not come to rest")
        return seen[-1]

    def options(self, label: str) -> list[str]:
        return self.control(label).locator("option").all_inner_texts()

    def pick(self, label: str, option: str) -> None:
        self.control(label).locator("select").select_option(option)

    def draw_box(self, top: float) -> int:
        """Drag the mouse over the right, from ``top`` (0 to 1) on; returns how many boxes there are."""
        self.image.scroll_into_view_if_needed()
        place = self._at_rest(self.image)
        x, y, width, height = (place[key] for key in ("x", "y", "width", "height"))
        assert height < HEIGHT - 150, f"{self.name}: the picture is {height} pixels high"
        self.page.mouse.move(x + 0.55 * width, y + top * height)
        self.page.mouse.down()
        self.page.mouse.move(x + 0.95 * width, y + (top + 0.2) * height, steps=6)
        self.page.mouse.up()
        return self.output.locator("svg > g").count()

    def answers(self, action: Callable[..., None], *arguments: Any) -> None:
        """The picture changes after the action.

        Raises:
            TimeoutError: it does not.
        """
        before = self.picture()
        action(*arguments)
        said = f"{self.name}: nothing changes after {action.__name__}{arguments}"
        until(lambda: self.picture() != before, 15, said)


if __name__ == "__main__":  # asked by the Makefile
    print(
        chromium()
        or sys.exit(
            "There is no Chromium: apt install chromium (Debian), or Chrome from google.com/chrome, then "
            "make browser again."
        )
    )
