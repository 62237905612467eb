"""``python -m refinelib fetch`` from a server in this process: whole, broken off, refused, damaged."""

import hashlib
import io
import json
import re
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from refinelib.__main__ import main
from refinelib.config import resolve
from refinelib.data import make_source
from refinelib.workflows import fetch
from refinelib.workflows.fetch import FetchError, FileError


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path, with or without ``Range``; breaks off after so many bytes of an answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges, self.breaks, self.status = True, [], {}
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):  # noqa: N802
        server, wanted = self.server, self.headers.get("Range", "")
        server.asked.append((self.path, wanted))
        content = server.files.get(self.path)
        status = server.status.get(self.path, 200 if content is not None else 404)
        if status != 200:
            return self.send_error(status)
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start >= len(content) > 0 and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + server.breaks.pop(0) if server.breaks else len(content)
        self.wfile.write(content[start:end])
        if end < len(content):
            self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    with Server() as serving:
        threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
        yield serving
        serving.shutdown()


NOISE = np.random.default_rng(0).bytes(100_000)


def download(url, file, check=lambda part: "" if part.read_bytes() == NOISE else "it is another file"):
    fetch.download(url, file, check=check)


# -- one file --------------------------------------------------------------------------------------
def test_a_file_that_breaks_off_is_continued_where_it_was(server, tmp_path):
    server.files["/a.bin"] = NOISE
    server.breaks = [30_000, 20_000]
    download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == NOISE and len([*tmp_path.iterdir()]) == 1
    assert [wanted for _, wanted in server.asked] == ["", "bytes=30000-", "bytes=50000-"]
    download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert len(server.asked) == 3  # it is there


def test_a_later_call_continues_and_a_server_without_ranges_begins_again(server, tmp_path):
    server.files["/a.bin"], part = NOISE, tmp_path / ".a.bin.part"
    part.write_bytes(NOISE[:40_000])
    download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert server.asked == [("/a.bin", "bytes=40000-")]
    part.write_bytes(b"x" * 40_000)
    server.ranges = False
    download(f"{server.url}/a.bin", tmp_path / "b" / "a.bin")
    part.rename(tmp_path / "b" / ".c.bin.part")
    download(f"{server.url}/a.bin", tmp_path / "b" / "c.bin")
    assert {file.read_bytes() for file in tmp_path.rglob("*.bin")} == {NOISE}


def test_a_part_that_is_whole_and_one_that_is_too_long(server, tmp_path):
    server.files["/a.bin"] = NOISE
    (tmp_path / ".a.bin.part").write_bytes(NOISE)
    download(f"{server.url}/a.bin", tmp_path / "a.bin")
    (tmp_path / ".b.bin.part").write_bytes(NOISE + b"more")
    with pytest.raises(FileError, match="a.bin came damaged, it is another file: it was deleted"):
        download(f"{server.url}/a.bin", tmp_path / "b.bin")
    download(f"{server.url}/a.bin", tmp_path / "b.bin")
    assert {file.read_bytes() for file in tmp_path.iterdir()} == {NOISE}


def test_a_server_that_always_breaks_off_is_given_up_and_what_came_is_kept(server, tmp_path):
    server.files["/a.bin"] = NOISE
    server.breaks = [10_000] + [0] * 20
    with pytest.raises(FetchError, match="broke off at 10000 of 100000 bytes.*10000 bytes of it are kept"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / ".a.bin.part").stat().st_size == 10_000 and not (tmp_path / "a.bin").exists()
    server.breaks = []
    download(f"{server.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == NOISE


def test_a_wrong_checksum_is_told_and_the_file_deleted(server, tmp_path, monkeypatch):
    server.files["/a.bin"] = NOISE
    monkeypatch.setattr(fetch, "COCO_MD5", hashlib.md5(NOISE[1:]).hexdigest())
    with pytest.raises(FileError, match="a.bin came damaged, its MD5 is [0-9a-f]{32} and should be"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin", fetch._wrong_md5)
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(fetch, "COCO_MD5", hashlib.md5(NOISE).hexdigest())
    download(f"{server.url}/a.bin", tmp_path / "a.bin", fetch._wrong_md5)
    assert fetch.file_digest(tmp_path / "a.bin") == hashlib.sha256(NOISE).hexdigest()


def test_what_the_server_refuses_is_not_asked_again_and_a_busy_server_is(server, tmp_path):
    server.files["/busy.bin"] = NOISE
    server.status = {"/busy.bin": 503}
    with pytest.raises(FileError, match="refuses it .*404"):
        download(f"{server.url}/none.bin", tmp_path / "none.bin")
    with pytest.raises(FetchError, match="503"):
        download(f"{server.url}/busy.bin", tmp_path / "busy.bin")
    assert [path for path, _ in server.asked] == ["/none.bin"] + ["/busy.bin"] * fetch.ATTEMPTS


# -- Penn-Fudan ------------------------------------------------------------------------------------
def zipped(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def picture(size=(60, 40), kind="PNG") -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def pennfudan_zip(count: int) -> bytes:
    mask = np.zeros((40, 60), np.uint8)
    mask[5:35, 10:40] = 1
    stored = io.BytesIO()
    Image.fromarray(mask).save(stored, "PNG")
    names = [f"FudanPed{number:05}" for number in range(1, count + 1)]
    files = {f"PennFudanPed/PNGImages/{name}.png": picture() for name in names}
    files |= {f"PennFudanPed/PedMasks/{name}_mask.png": stored.getvalue() for name in names}
    return zipped(files | {"PennFudanPed/readme.txt": b"of the authors"})


@pytest.fixture
def pennfudan(server, monkeypatch):
    monkeypatch.setattr(fetch, "PENNFUDAN_IMAGES", 6)
    server.files["/PennFudanPed.zip"] = pennfudan_zip(6)
    return server


def test_pennfudan_is_fetched_unpacked_and_can_be_trained_on(pennfudan, tmp_path, capsys):
    command = ["fetch", "pennfudan", str(tmp_path), "--mirror", pennfudan.url + "/"]
    pennfudan.breaks = [1000]
    assert main(command) == 0
    told = capsys.readouterr().out
    sha = hashlib.sha256(pennfudan.files["/PennFudanPed.zip"]).hexdigest()
    assert f"SHA-256 of PennFudanPed.zip: {sha}" in told and "6 images with masks are in" in told
    assert [file.name for file in tmp_path.iterdir()] == ["PennFudanPed"]
    settings = resolve("demo", data="pennfudan", data_dir=str(tmp_path / "PennFudanPed"))
    assert sum(make_source(settings, split).instances().images for split in ("train", "val")) == 6
    asked = len(pennfudan.asked)
    (tmp_path / "PennFudanPed" / "PNGImages" / "FudanPed00001.png").unlink()
    assert main(command) == 0 and len(pennfudan.asked) == asked + 1  # it lacks one
    assert main(command) == 0 and len(pennfudan.asked) == asked + 1  # it is whole
    assert "6 images with masks" in capsys.readouterr().out


def test_a_damaged_zip_and_another_set_are_told(pennfudan, tmp_path, capsys):
    command = ["fetch", "pennfudan", str(tmp_path), "--mirror", pennfudan.url]
    whole = pennfudan.files["/PennFudanPed.zip"]
    place = whole.index(picture()) + 200
    for wrong in (whole[:-30], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], b"<html>"):
        pennfudan.files["/PennFudanPed.zip"] = wrong
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "came damaged" in told and told.count("\n") == 1 and not [*tmp_path.iterdir()]
    pennfudan.files["/PennFudanPed.zip"] = pennfudan_zip(5)
    assert main(command) == 2
    assert "holds 5 images with masks, not 6" in capsys.readouterr().err
    assert not (tmp_path / "PennFudanPed").exists()


def test_a_server_that_is_not_there_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    assert main(["fetch", "pennfudan", str(tmp_path), "--mirror", "http://127.0.0.1:1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("fetch: http://127.0.0.1:1/PennFudanPed.zip cannot be fetched (")
    assert "refused" in told and "urlopen" not in told and told.count("\n") == 1
    assert main(["fetch", "pennfudan", str(tmp_path), "--split", "val"]) == 2
    assert "leave --split and --max-images out" in capsys.readouterr().err


# -- COCO ------------------------------------------------------------------------------------------
def coco_content(count: int) -> dict:
    """Every third image has no person, and one has a crowd alone."""
    images, annotations = [], []
    for number in range(count, 0, -1):
        name = f"{number:012}.jpg"
        entry = {"id": number, "file_name": name, "width": 60, "height": 40}
        images.append({**entry, "coco_url": f"http://images.cocodataset.org/val2017/{name}"})
        one = {"image_id": number, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": int(number == 1)}
        one |= {"id": 100 + number, "segmentation": [[5, 5, 35, 5, 35, 35, 5, 35]]}
        annotations.append({**one, "category_id": 18 if number % 3 == 0 else 1})
    kinds = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": kinds}


@pytest.fixture
def coco(server, monkeypatch):
    content = coco_content(9)
    archive = zipped({"annotations/instances_val2017.json": json.dumps(content).encode()})
    server.files["/annotations/annotations_trainval2017.zip"] = archive
    for one in content["images"]:
        server.files[f"/val2017/{one['file_name']}"] = picture(kind="JPEG")
    monkeypatch.setattr(fetch, "COCO_MD5", hashlib.md5(archive).hexdigest())
    return server


def listed(folder) -> list[int]:
    content = json.loads((folder / "annotations" / "instances_val2017_person.json").read_text())
    assert {one["image_id"] for one in content["annotations"]} == {one["id"] for one in content["images"]}
    return [one["id"] for one in content["images"]]


def test_images_with_people_are_fetched_one_by_one_and_can_be_trained_on(coco, tmp_path, capsys):
    command = ["fetch", "coco-person", str(tmp_path), "--mirror", coco.url]
    assert main([*command, "--max-images", "2"]) == 0
    assert "0 of 2 images with people are there" in capsys.readouterr().out and listed(tmp_path) == [2, 4]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "2 of 5 images with people are there" in told and f"-p data_dir {tmp_path}" in told
    assert listed(tmp_path) == [2, 4, 5, 7, 8]  # not 1, a crowd
    assert sorted(path for path, _ in coco.asked[1:]) == [f"/val2017/{n:012}.jpg" for n in (2, 4, 5, 7, 8)]
    where = dict(data="coco", data_dir=str(tmp_path))
    assert make_source(resolve("demo", **where), "val").instances().images == 5


def test_images_that_cannot_be_fetched_are_counted_and_the_next_call_gets_them(coco, tmp_path, capsys):
    command = ["fetch", "coco-person", str(tmp_path), "--mirror", coco.url]
    name, other = (f"/val2017/{number:012}.jpg" for number in (4, 7))
    right = coco.files[name]
    coco.files[name] = right[: len(right) // 2]
    coco.files[other] = picture((30, 40), "JPEG")
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "2 of 5 images could not be fetched, the first: " in told and "came damaged" in told
    assert "3 images, 3 annotations of people" in told and listed(tmp_path) == [2, 5, 8]
    del coco.files[name]
    coco.files[other] = right
    assert main(command) == 2 and "1 of 5 images could not" in capsys.readouterr().err
    coco.files[name] = right
    assert main(command) == 0 and listed(tmp_path) == [2, 4, 5, 7, 8]


def test_wrong_annotations_are_told(coco, tmp_path, capsys, monkeypatch):
    command = ["fetch", "coco-person", str(tmp_path), "--mirror", coco.url]
    assert main([*command, "--max-images", "1"]) == 0
    assert main([*command, "--split", "train"]) == 2
    assert "annotations_trainval2017.zip is damaged" in capsys.readouterr().err
    assert main([*command, "--max-images", "0"]) == 2
    assert "max_images = 0: give at least 1" in capsys.readouterr().err
    (tmp_path / "annotations_trainval2017.zip").unlink()
    monkeypatch.setattr(fetch, "COCO_MD5", "0" * 32)
    assert main(command) == 2 and "and should be 0000" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_there(coco, tmp_path, capsys, monkeypatch):
    command = ["fetch", "coco-person", str(tmp_path), "--mirror", coco.url]
    real = fetch._wrong_image

    def stop(part, size):
        if "0005" in part.name:
            raise KeyboardInterrupt
        return real(part, size)

    monkeypatch.setattr(fetch, "AT_ONCE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_wrong_image", stop)
        assert main(command) == 130
    assert "fetch: interrupted; the same command continues" in capsys.readouterr().err
    assert main(command) == 0 and listed(tmp_path) == [2, 4, 5, 7, 8]
    assert "0 of 5" not in capsys.readouterr().out


def test_a_mirror_that_is_no_address_is_refused_before_a_request(tmp_path, capsys):
    for mirror in ("nonsense", "http:/one-slash", "javascript:1"):
        assert main(["fetch", "pennfudan", str(tmp_path / "to"), "--mirror", mirror]) == 2
        assert f"--mirror {mirror} is no address" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_a_length_that_is_no_number_is_passed_over(server, tmp_path, monkeypatch):
    server.files["/noise"] = NOISE
    own = Handler.send_header
    changed = {"Content-Length": "abc"}
    monkeypatch.setattr(
        Handler, "send_header", lambda self, name, value: own(self, name, changed.get(name, value))
    )
    download(f"{server.url}/noise", tmp_path / "noise")
    assert (tmp_path / "noise").read_bytes() == NOISE
