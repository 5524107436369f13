"""Weights by name, downloaded from a server on this machine."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import processes
import pytest

from retina_jax.config_io import load_config
from retina_jax.errors import WeightsError
from retina_jax.model.resnet import ARCHITECTURES
from retina_jax.sweeps.points import expand, load_sweeps
from retina_jax.weights import named
from retina_jax.weights.named import IMAGENET, NAMED, Named, fetch, find_weights

ROOT = Path(__file__).parents[2]
CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT with ranges; closes one connection after `breaks_after` bytes, and calls `pause` halfway."""

    breaks_after: int | None = None
    content = CONTENT
    shift = 0  # the sent range starts so many bytes after the wanted one
    length = True  # whether the length is reported
    ranges = True
    pause: Callable[[], object] | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requested: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requested.append(wanted)
        if self.path != "/weights.pth":
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, start = self.server.content, start + self.server.shift
        body = content[start:]
        self.send_response(206 if wanted and self.server.ranges else 200)
        if wanted and self.server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        stop, self.server.breaks_after = self.server.breaks_after, None
        half = len(body) // 2 if self.server.pause else 0
        self.wfile.write(body[:half])
        if self.server.pause:
            self.server.pause()
        self.wfile.write(body[half:stop])

    def log_message(self, *_: object) -> None:
        pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Named(server.url, "w.pth", SHA256[:8])
    path = fetch(weights, tmp_path / "cache")
    assert path.read_bytes() == CONTENT and path == tmp_path / "cache" / "w.pth"
    assert "w.pth: 0 MB downloaded" in capsys.readouterr().err
    assert fetch(weights, tmp_path / "cache") == path
    assert len(server.requested) == 1
    assert names(path.parent) == ["w.pth", "w.pth.lock"]  # its hash is published


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_resumed(server: Server, tmp_path: Path, ranges: bool) -> None:
    weights = Named(server.url, "w.pth", SHA256[:8])
    server.breaks_after, server.ranges = 100_000, ranges
    with pytest.raises(WeightsError, match=r"cannot be downloaded \(.*\); put the file at .*w\.pth, or try again"):
        fetch(weights, tmp_path)
    assert (tmp_path / "w.pth.part").stat().st_size == 100_000 and not (tmp_path / "w.pth").exists()
    assert fetch(weights, tmp_path).read_bytes() == CONTENT
    assert server.requested == ["bytes=0-", "bytes=100000-"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_part_that_is_too_long_to_resume_is_downloaded_again(server: Server, tmp_path: Path, times: int) -> None:
    (tmp_path / "w.pth.part").write_bytes(CONTENT * times)
    assert fetch(Named(server.url, "w.pth"), tmp_path).read_bytes() == CONTENT
    assert server.requested == [f"bytes={300000 * times}-", "bytes=0-"]


FETCH = """
import sys
from pathlib import Path
from retina_jax.weights.named import Named, fetch
fetch(Named(sys.argv[1], "w.pth"), Path(sys.argv[2]))
"""


@pytest.mark.timeout(120)
def test_of_two_processes_one_downloads_and_the_other_waits(server: Server, tmp_path: Path) -> None:
    goes_on, cache = threading.Event(), tmp_path / "cache"
    server.pause = lambda: goes_on.wait(60)
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    script = tmp_path / "fetches.py"
    script.write_text(FETCH)
    with logs[0].open("w") as one, logs[1].open("w") as two:
        both = [processes.start(script, server.url, cache, stdout=log) for log in (one, two)]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (cache / "w.pth.part").exists() and any("waiting" in log.read_text() for log in logs):
            break
        time.sleep(0.05)
    found = names(cache)
    goes_on.set()
    assert [process.wait(60) for process in both] == [0, 0]
    assert found == ["w.pth.lock", "w.pth.part"]
    assert (cache / "w.pth").read_bytes() == CONTENT and names(cache) == ["w.pth", "w.pth.lock", "w.pth.sha256"]
    assert server.requested == ["bytes=0-"]
    assert sorted(log.read_text() for log in logs) == [
        "w.pth: 0 MB downloaded\n",
        f"waiting for another process that downloads {server.url}\n",
    ]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK])
@pytest.mark.timeout(60)
def test_without_locks_each_process_downloads_a_separate_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    server.pause = threading.Barrier(2, timeout=30).wait
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetch(Named(server.url, "w.pth"), tmp_path), range(2)))
    assert paths == [tmp_path / "w.pth"] * 2 and paths[0].read_bytes() == CONTENT
    assert server.requested == ["bytes=0-"] * 2 and names(tmp_path) == ["w.pth", "w.pth.lock", "w.pth.sha256"]
    paths[0].unlink()
    server.pause, server.breaks_after = None, 100
    with pytest.raises(WeightsError, match="interrupted after 100 of 300000 bytes"):
        fetch(Named(server.url, "w.pth"), tmp_path)
    assert names(tmp_path) == ["w.pth.lock", "w.pth.sha256"]


def test_a_wrong_hash_is_refused_by_name(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=r"weights\.pth: SHA-256 is not 00000000"):
        fetch(Named(server.url, "w.pth", "00000000"), tmp_path)
    assert names(tmp_path) == ["w.pth.lock"]
    # The hash is also checked for a file in the cache, and for a user's file with a published name.
    (tmp_path / "w.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match=rf"w\.pth: SHA-256 is .*, expected {SHA256[:8]}\.\.\.: .* delete it"):
        fetch(Named(server.url, "w.pth", SHA256[:8]), tmp_path)
    monkeypatch.setitem(NAMED, ("torchvision", "w"), Named(server.url, "w.pth", SHA256[:8]))
    with pytest.raises(WeightsError, match=r"w\.pth: SHA-256 is"):
        find_weights("torchvision", str(tmp_path / "w.pth"))


def test_the_first_hash_of_a_file_without_a_published_one_is_kept(server: Server, tmp_path: Path) -> None:
    weights = Named(server.url, "w.pth")
    path = fetch(weights, tmp_path)
    assert (tmp_path / "w.pth.sha256").read_text() == f"{SHA256}\n" and fetch(weights, tmp_path) == path
    path.write_bytes(CONTENT[:-1])
    advice = r"delete it, .*; if this file is the right one, delete .*w\.pth\.sha256"
    with pytest.raises(WeightsError, match=rf"w\.pth: SHA-256 is .*, expected {SHA256[:8]}\.\.\.: .* {advice}"):
        fetch(weights, tmp_path)
    path.unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(
        WeightsError, match=rf"SHA-256 is not {SHA256[:8]}.*; if it was replaced there, delete .*\.sha256"
    ):
        fetch(weights, tmp_path)
    assert names(tmp_path) == ["w.pth.lock", "w.pth.sha256"]
    (tmp_path / "w.pth.sha256").write_bytes(b"\xff" * 64)  # damaged: recorded again
    assert fetch(weights, tmp_path).read_bytes() == CONTENT[::-1]
    assert (tmp_path / "w.pth.sha256").read_text() == hashlib.sha256(CONTENT[::-1]).hexdigest() + "\n"


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_range_that_does_not_follow_the_part_is_not_kept(server: Server, tmp_path: Path, shift: int) -> None:
    (tmp_path / "w.pth.part").write_bytes(CONTENT[:1000])
    server.shift = shift
    with pytest.raises(WeightsError, match=rf"the server sent bytes {1000 + shift}-.* instead of the bytes from 1000"):
        fetch(Named(server.url, "w.pth"), tmp_path)
    server.shift = 0
    assert fetch(Named(server.url, "w.pth"), tmp_path).read_bytes() == CONTENT


def test_a_body_of_unknown_length_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.length, server.ranges, server.breaks_after = False, False, 1000
    with pytest.raises(WeightsError, match="does not report the length"):
        fetch(Named(server.url, "w.pth"), tmp_path)
    assert names(tmp_path) == ["w.pth.lock"]


@pytest.mark.parametrize("suffix", [".part", ".lock"])
@pytest.mark.parametrize("exists", [True, False])
def test_links_are_not_followed(server: Server, tmp_path: Path, suffix: str, exists: bool) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    cache.mkdir()
    if exists:
        other.write_bytes(b"mine")
    (cache / f"w.pth{suffix}").symlink_to(other)
    with pytest.raises(WeightsError, match="symbolic links"):
        fetch(Named(server.url, "w.pth"), cache)
    assert other.read_bytes() == b"mine" if exists else not other.exists()


def test_without_network_one_line_names_the_file_and_its_path(tmp_path: Path) -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(WeightsError) as error:
        fetch(Named(url, "w.pth"), tmp_path)
    assert "\n" not in str(error.value)
    assert url in str(error.value) and f"put the file at {tmp_path / 'w.pth'}" in str(error.value)
    with pytest.raises(WeightsError, match="put the file at"):
        fetch(Named("http://127.0.0.1:1/x", "w.pth"), tmp_path)


def test_a_missing_page_is_reported(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent: cannot be downloaded \(Not Found\)"):
        fetch(Named(server.url.replace("weights.pth", "absent"), "w.pth"), tmp_path)


def test_a_published_file_is_recognised_by_its_hash_under_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NAMED, ("torchvision", "x"), Named("http://127.0.0.1:1/x", "x.pth", SHA256[:8], eps=0.0))
    (tmp_path / "mine.pth").write_bytes(CONTENT)
    (tmp_path / "other.pth").write_bytes(CONTENT[1:])
    assert find_weights("torchvision", str(tmp_path / "mine.pth")) == (tmp_path / "mine.pth", 0.0)
    assert find_weights("torchvision", str(tmp_path / "other.pth")) == (tmp_path / "other.pth", 1e-5)


def test_the_error_for_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(WeightsError, match=r"^resnet51: no such file, and not the name.*torchvision: .*resnet50"):
        find_weights("torchvision", "resnet51")


def test_the_nearest_name_is_proposed_and_only_detectors_where_one_is_needed() -> None:
    with pytest.raises(
        WeightsError, match=r"published file; did you mean resnext50_32x4d\? published for torchvision: "
    ):
        find_weights("torchvision", "resnetext50_32x4d")
    with pytest.raises(
        WeightsError, match=r"retinanet_resnet50: .* a published detector; did you mean retinanet_"
    ) as caught:
        find_weights("torchvision", "retinanet_resnet50", detector=True)
    assert "resnet18" not in str(caught.value)
    with pytest.raises(WeightsError, match=r"^resnet50: a backbone .*--model.backbone-weights torchvision:resnet50$"):
        find_weights("torchvision", "resnet50", detector=True)


def test_every_backbone_of_the_configs_has_its_imagenet_weights() -> None:
    """Also those of all sweeps over the paper's tables, and every backbone that torchvision publishes."""
    assert {name for name, normalised in IMAGENET if normalised} == {*ARCHITECTURES} - {"resnext101_32x4d"}
    configs = [load_config(path) for path in sorted((ROOT / "configs").glob("*.py"))]
    ablations = load_config(ROOT / "configs" / "paper_ablations.py")
    for path, module in load_sweeps([str(path) for path in sorted((ROOT / "configs" / "sweeps").glob("*.py"))]).items():
        configs += [point.config for point in expand(path, module, ablations, [0])]
    models = [config.model for config in configs if config.model.backbone_weights == "imagenet"]
    assert {model.backbone for model in models} >= {"resnet50", "resnet101", "resnext101_32x8d"}
    for model in models:
        assert (model.backbone, model.input_normalisation == "imagenet") in IMAGENET, model.backbone


def test_the_table_is_valid() -> None:
    files = [weights.file for weights in NAMED.values()]
    assert len(set(files)) == len(files)
    for (kind, _), weights in NAMED.items():
        assert weights.url.startswith("https://") and kind in ("torchvision", "detectron2", "detectron")
        if kind == "torchvision":
            assert re.fullmatch(r"[0-9a-f]{8}", weights.sha256) and weights.sha256 in weights.url
        assert weights.eps == (0.0 if weights.file.startswith("retinanet_resnet50_fpn_coco") else 1e-5)
    assert all(key in NAMED for key in IMAGENET.values())
    assert Path.home() / ".cache" / "retina_jax" / "weights" == named.CACHE
