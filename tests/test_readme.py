"""The README: its length, its links, and its commands, each read and all of them run in their order."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import CocoFiles
from PIL import Image

from refinelib.__main__ import command_line
from refinelib.config import fields, load_recipe, project_root

ROOT = project_root()
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
#: These make an environment, or need the authors' servers.
NOT_RUN = (["make"], ["refinelib", "fetch"])


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 180 and "@@" not in README
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_understood(words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "papermill":
        names = {words[place + 1] for place, word in enumerate(words) if word == "-p"}
        for place, word in enumerate(words):
            names |= set(load_recipe(words[place + 1])) if word == "-f" else set()
        notebook = nbformat.read(ROOT / words[1], 4)
        tagged = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        assert names <= set(re.findall(r"^(\w+):", tagged[0], re.MULTILINE)) | set(fields())
    else:
        command_line().parse_args(words[words.index("refinelib") + 1 :])


@pytest.fixture
def scratch(tmp_path):
    """A copy of the project without outputs, and a home with a small data set in COCO's layout."""
    for name in ("refinelib", "notebooks", "params", "studies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "outputs").mkdir()
    Image.fromarray(np.full((300, 200, 3), 90, np.uint8)).save(tmp_path / "photo.jpg")
    coco = tmp_path / "home" / "coco"
    for split in ("train", "val"):
        files = CocoFiles(tmp_path / split)
        for _ in range(6):
            number = files.image((96, 96))
            files.person(number, (10, 10, 50, 80))
        files.source()
        shutil.copytree(files.images, coco / "images" / f"{split}2017")
        (coco / "annotations").mkdir(exist_ok=True)
        shutil.copy(files.annotations, coco / "annotations" / f"instances_{split}2017_person.json")
    return tmp_path


@pytest.mark.slow
def test_all_commands_run_in_their_order(scratch):
    own = {"HOME": str(scratch / "home"), "PYTHONPATH": str(scratch), "REFINELIB_SMOKE": "1"}
    own |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for words in COMMANDS:
        if any(words[: len(some)] == some for some in NOT_RUN):
            continue
        line = [sys.executable, "-m", *words] if words[0] == "refinelib" else words
        line = [word.replace("~", own["HOME"]) for word in line]
        done = subprocess.run(line, cwd=scratch, env=os.environ | own, capture_output=True, text=True)
        expected = (0, 1) if words[1] == "doctor" else (0,)  # it may find something to fix
        assert done.returncode in expected, " ".join(words) + done.stdout[-2000:] + done.stderr[-2000:]
    assert list((scratch / "outputs" / "masks").rglob("*.png"))
