"""Weights that have a name: where they lie, what they are called, and how to tell them from a broken copy.

They are fetched once, to ~/.cache/retina_jax/weights, by plain HTTP(S); no other file is ever loaded from the network.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from retina_jax.errors import WeightsError

CACHE = Path.home() / ".cache" / "retina_jax" / "weights"
CHUNK = 1 << 20
TIMEOUT = 30.0
"""Seconds without a byte after which a download is given up."""


@dataclass(frozen=True)
class Named:
    """One file on the network."""

    url: str
    file: str
    """Its name in the cache."""
    sha256: str = ""
    """First hex digits of its hash; empty where its publisher gives none: then the tensors' names and shapes must do."""
    eps: float = 1e-5
    """What its BatchNorms add to a variance."""


_TORCHVISION = "https://download.pytorch.org/models/"
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/"
_DETECTRON = "https://dl.fbaipublicfiles.com/detectron/"
_TRAINED = "/output/train/coco_2014_train%3Acoco_2014_valminusminival/retinanet/model_final.pkl"


def _torchvision(stem: str, sha256: str, eps: float = 1e-5) -> Named:
    return Named(f"{_TORCHVISION}{stem}-{sha256}.pth", f"{stem}-{sha256}.pth", sha256, eps)


NAMED: dict[tuple[str, str], Named] = {
    ("torchvision", "retinanet_resnet50_fpn_coco"): _torchvision("retinanet_resnet50_fpn_coco", "eeacb38b", eps=0.0),
    ("torchvision", "retinanet_resnet50_fpn_v2_coco"): _torchvision("retinanet_resnet50_fpn_v2_coco", "5905b1c5"),
    ("torchvision", "resnet18"): _torchvision("resnet18", "f37072fd"),
    ("torchvision", "resnet34"): _torchvision("resnet34", "b627a593"),
    ("torchvision", "resnet50"): _torchvision("resnet50", "0676ba61"),
    ("torchvision", "resnet101"): _torchvision("resnet101", "63fe2227"),
    ("torchvision", "resnext101_32x8d"): _torchvision("resnext101_32x8d", "8ba56ff5"),
    ("detectron2", "retinanet_R_50_FPN_1x"): Named(
        _DETECTRON2 + "retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl", "d2_retinanet_R_50_FPN_1x_bfca0b.pkl"
    ),
    ("detectron2", "retinanet_R_50_FPN_3x"): Named(
        _DETECTRON2 + "retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl", "d2_retinanet_R_50_FPN_3x_5bd44e.pkl"
    ),
    ("detectron2", "retinanet_R_101_FPN_3x"): Named(
        _DETECTRON2 + "retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl", "d2_retinanet_R_101_FPN_3x_971ab9.pkl"
    ),
    ("detectron", "retinanet_R-50-FPN_1x"): Named(
        f"{_DETECTRON}36768636/12_2017_baselines/retinanet_R-50-FPN_1x.yaml.08_29_48.t4zc9clc{_TRAINED}",
        "detectron_retinanet_R-50-FPN_1x.pkl",
    ),
    ("detectron", "retinanet_R-101-FPN_1x"): Named(
        f"{_DETECTRON}36768744/12_2017_baselines/retinanet_R-101-FPN_1x.yaml.08_31_38.5poQe1ZB{_TRAINED}",
        "detectron_retinanet_R-101-FPN_1x.pkl",
    ),
    ("detectron", "retinanet_X-101-32x8d-FPN_1x"): Named(
        f"{_DETECTRON}36769563/12_2017_baselines/retinanet_X-101-32x8d-FPN_1x.yaml.08_42_05.06JTK6vJ{_TRAINED}",
        "detectron_retinanet_X-101-32x8d-FPN_1x.pkl",
    ),
    ("detectron", "R-50"): Named(f"{_DETECTRON}ImageNetPretrained/MSRA/R-50.pkl", "msra_R-50.pkl"),
    ("detectron", "R-101"): Named(f"{_DETECTRON}ImageNetPretrained/MSRA/R-101.pkl", "msra_R-101.pkl"),
    ("detectron", "X-101-32x8d"): Named(
        f"{_DETECTRON}ImageNetPretrained/20171220/X-101-32x8d.pkl", "detectron_X-101-32x8d.pkl"
    ),
}
"""(kind, name) to file."""

IMAGENET = {
    # (backbone, whether its input is RGB, normalised as torchvision does it) to the backbone it starts from
    ("resnet18", True): ("torchvision", "resnet18"),
    ("resnet34", True): ("torchvision", "resnet34"),
    ("resnet50", True): ("torchvision", "resnet50"),
    ("resnet101", True): ("torchvision", "resnet101"),
    ("resnext101_32x8d", True): ("torchvision", "resnext101_32x8d"),
    ("resnet50", False): ("detectron", "R-50"),
    ("resnet101", False): ("detectron", "R-101"),
    ("resnext101_32x8d", False): ("detectron", "X-101-32x8d"),
}


def find_weights(kind: str, name_or_file: str, folder: Path | None = None) -> tuple[Path, float]:
    """The file meant, fetched where it is a name of NAMED with this kind, and what its BatchNorms add to a variance.

    A file that is there goes before a name. A file of the user's that has the name of a published one is held to its hash.
    The published file is known by its hash whatever it is called.
    """
    path = Path(name_or_file)
    if not path.is_file():
        named = NAMED.get((kind, name_or_file))
        if named is None:
            known = ", ".join(name for k, name in NAMED if k == kind)
            no_name = f", and no name; the names of {kind} are {known}" if known else ""
            raise WeightsError(f"{path}: no such file{no_name}")
        return fetch(named, folder), named.eps
    digest = sha256_of(path)
    for named in NAMED.values():
        if named.sha256 and path.name == named.file:
            check_hash(path, named, digest)
    return path, next((n.eps for n in NAMED.values() if n.sha256 and digest.startswith(n.sha256)), 1e-5)


def fetch(named: Named, folder: Path | None = None) -> Path:
    """The file in the cache `folder` (CACHE), downloaded where it is not there whole yet.

    Processes that want the same file take turns: one downloads, the others wait and find it whole. A download that breaks
    off leaves FILE.part, which the next one takes up. The hash is checked each time.

    Raises:
      WeightsError: no network, a broken download, or another hash; one line that says which file to put where.
    """
    path = (folder or CACHE) / named.file
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _turn(path, named.url) as part:
                if not path.is_file():  # whoever was first has not left it
                    download(named.url, part)
                    _keep(part, path, named)
        except WeightsError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise WeightsError(
                f"{named.url}: cannot be downloaded ({' '.join(str(reason).split()) or type(error).__name__}); "
                f"put the file at {path}, or try again to go on from where it broke off"
            ) from error
    check_hash(path, named, sha256_of(path) if named.sha256 else "")
    return path


@contextlib.contextmanager
def _turn(path: Path, url: str) -> Iterator[Path]:
    """The file to download `path` to, which is this process's alone meanwhile.

    FILE.part, under the kernel's lock on FILE.lock, which ends with its process and stays as an empty file: were it
    deleted, two could hold two locks of one name. Where the file system has no locks, a file that no other process has,
    and that none takes up.
    """
    with path.with_name(f"{path.name}.lock").open("ab") as lock:
        if _locked(lock, url):
            yield path.with_name(f"{path.name}.part")
            return
    part = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")  # other hosts have the same pids
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _locked(lock: BinaryIO, url: str) -> bool:
    """Whether the lock is held now, waited for with a line on standard error; False: there are none here."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            print(f"waiting for another process that fetches {url}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        return False
    return True


def _keep(part: Path, path: Path, named: Named) -> None:
    """The download becomes `path` where it has its hash."""
    if named.sha256 and not sha256_of(part).startswith(named.sha256):
        part.unlink()
        raise WeightsError(f"{named.url}: what came has not the hash {named.sha256}...; it was deleted, try again")
    part.replace(path)


def check_hash(path: Path, named: Named, digest: str) -> None:
    """WeightsError where the file's `digest` is not the one that its name promises."""
    if not digest.startswith(named.sha256):
        raise WeightsError(
            f"{path}: its SHA-256 is {digest[:8]}..., {named.sha256}... is meant: the file is damaged or another; "
            f"delete it, or replace it by {named.url}"
        )


def download(url: str, part: Path) -> None:
    """`url` to the file `part`, from its end on where some of it is there; progress goes to standard error.

    OSError where the file then has not as many bytes as the server says; too long a one is deleted.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "retina_jax", "Range": f"bytes={have}-"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":  # all of it is there
            return
        part.unlink()  # too long, or nobody says how long it must be
        return download(url, part)
    with response:
        resumes = response.status == 206
        have = have if resumes else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with part.open("ab" if resumes else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                _show(part.name.removesuffix(".part"), have, total)
    if total is None:
        return
    size = part.stat().st_size
    if size > total:
        part.unlink()
        raise OSError(f"{part.name} had {size} bytes where the server announced {total}, and was deleted")
    if size < total:
        raise OSError(f"broke off after {size} of {total} bytes")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _show(name: str, have: int, total: int | None) -> None:
    if sys.stderr.isatty():
        share = f" of {total / 1e6:.0f} MB ({100 * have / total:.0f} %)" if total else " MB"
        print(f"\r{name}: {have / 1e6:.0f}{share}", end="\n" if have == total else "", file=sys.stderr, flush=True)
    elif have == total:
        print(f"{name}: {have / 1e6:.0f} MB downloaded", file=sys.stderr)
