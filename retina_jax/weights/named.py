"""Published weights by name: where they are downloaded from, and how a damaged copy is recognised.

They are downloaded once, to ~/.cache/retina_jax/weights. No other file is ever loaded from the network. If a publisher gives
no hash, that of the first download is kept in FILE.sha256, and another file is refused.
"""

import contextlib
import difflib
import errno
import hashlib
import http.client
import re
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from retina_jax.console import cache_folder
from retina_jax.data.reading import read_file, without_links
from retina_jax.errors import WeightsError, reason, shortened
from retina_jax.model.resnet import ARCHITECTURES

CACHE = cache_folder() / "weights"
TIMEOUT = 30.0  # seconds without a byte after which a download fails
NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True)
class Named:
    """A published file."""

    url: str
    file: str  # its name in the cache
    sha256: str = ""  # first hex digits of its hash; empty if its publisher gives none
    eps: float = 1e-5  # epsilon of its BatchNorms


_FACEBOOK = "https://dl.fbaipublicfiles.com"
_TRAINED = "output/train/coco_2014_train%3Acoco_2014_valminusminival/retinanet/model_final.pkl"


def _torchvision(name: str, sha256: str, eps: float = 1e-5) -> Named:
    file = f"{name}-{sha256}.pth"
    return Named(f"https://download.pytorch.org/models/{file}", file, sha256, eps)


def _detectron2(name: str, run: int, tag: str) -> Named:
    return Named(f"{_FACEBOOK}/detectron2/COCO-Detection/{name}/{run}/model_final_{tag}.pkl", f"d2_{name}_{tag}.pkl")


def _detectron(name: str, run: int, started: str) -> Named:
    url = f"{_FACEBOOK}/detectron/{run}/12_2017_baselines/{name}.yaml.{started}/{_TRAINED}"
    return Named(url, f"detectron_{name}.pkl")


def _imagenet(folder: str, name: str, system: str) -> Named:
    return Named(f"{_FACEBOOK}/detectron/ImageNetPretrained/{folder}/{name}.pkl", f"{system}_{name}.pkl")


NAMED: dict[tuple[str, str], Named] = {
    ("torchvision", "retinanet_resnet50_fpn_coco"): _torchvision("retinanet_resnet50_fpn_coco", "eeacb38b", eps=0.0),
    ("torchvision", "retinanet_resnet50_fpn_v2_coco"): _torchvision("retinanet_resnet50_fpn_v2_coco", "5905b1c5"),
    **{
        ("torchvision", name): _torchvision(name, sha256)
        for name, sha256 in (
            ("resnet18", "f37072fd"),
            ("resnet34", "b627a593"),
            ("resnet50", "0676ba61"),
            ("resnet101", "63fe2227"),
            ("resnext50_32x4d", "7cdf4587"),
            ("resnext101_32x8d", "8ba56ff5"),
            ("resnext101_64x4d", "173b62eb"),
        )
    },
    ("detectron2", "retinanet_R_50_FPN_1x"): _detectron2("retinanet_R_50_FPN_1x", 190397773, "bfca0b"),
    ("detectron2", "retinanet_R_50_FPN_3x"): _detectron2("retinanet_R_50_FPN_3x", 190397829, "5bd44e"),
    ("detectron2", "retinanet_R_101_FPN_3x"): _detectron2("retinanet_R_101_FPN_3x", 190397697, "971ab9"),
    **{
        ("detectron", f"retinanet_{name}-FPN_1x"): _detectron(f"retinanet_{name}-FPN_1x", run, started)
        for name, run, started in (
            ("R-50", 36768636, "08_29_48.t4zc9clc"),
            ("R-101", 36768744, "08_31_38.5poQe1ZB"),
            ("X-101-32x8d", 36769563, "08_42_05.06JTK6vJ"),
        )
    },
    ("detectron", "R-50"): _imagenet("MSRA", "R-50", "msra"),
    ("detectron", "R-101"): _imagenet("MSRA", "R-101", "msra"),
    ("detectron", "X-101-32x8d"): _imagenet("20171220", "X-101-32x8d", "detectron"),
}
"""(kind, name) to file."""

IMAGENET = {(name, True): (kind, name) for kind, name in NAMED if kind == "torchvision" and name in ARCHITECTURES} | {
    ("resnet50", False): ("detectron", "R-50"),
    ("resnet101", False): ("detectron", "R-101"),
    ("resnext101_32x8d", False): ("detectron", "X-101-32x8d"),
}
"""(backbone, whether model.input_normalisation is "imagenet") to (kind, name)."""


def find_weights(kind: str, name_or_file: str, detector: bool = False) -> tuple[Path, float]:
    """Returns a weight file and the epsilon of its BatchNorms; downloads the file if it is a name of this kind. With
    `detector`, only names of detectors are accepted.

    An existing file takes precedence over a name. Published files are recognised by their hash; one with the name of a
    published file must have its hash.
    """
    path = Path(name_or_file)
    if not path.is_file():
        known = [name for k, name in NAMED if k == kind and (name.startswith("retinanet_") or not detector)]
        if name_or_file not in known and (kind, name_or_file) in NAMED:
            how = f"train a detector from it with --model.backbone-weights {kind}:{name_or_file}"
            raise WeightsError(f"{name_or_file}: a backbone without heads; {how}")
        if (path / "config.json").is_file():
            how = "import-weights makes a run from all of it, for the same or other classes"
            raise WeightsError(f"{shortened(path)}: is a run's folder, not a file of weights; {how}")
        if name_or_file not in known:
            near = difflib.get_close_matches(name_or_file, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            of = f"a published {'detector' if detector else 'file'}{meant or ';'} published for {kind}: {', '.join(known)}"
            raise WeightsError(f"{path}: no such file{f', and not the name of {of}' if known else ''}")
        named = NAMED[kind, name_or_file]
        return fetch(named), named.eps
    digest = sha256_of(path)
    for named in NAMED.values():
        if path.name == named.file:
            check_hash(path, named, digest)
    return path, next((n.eps for n in NAMED.values() if n.sha256 and digest.startswith(n.sha256)), 1e-5)


def fetch(named: Named, folder: Path | None = None) -> Path:
    """Returns the file in the cache `folder` (CACHE), downloaded if it is not there. Its hash, the published or the first
    one, is checked each time.

    One process at a time downloads a file; others wait. An interrupted download leaves FILE.part, to be resumed. Without a
    network and for a wrong hash, WeightsError says where to put the file.
    """
    path = (folder or CACHE) / named.file
    first = path.with_name(f"{named.file}.sha256")
    known = named.sha256 or _recorded(first)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path, named.url) as part:
                if not path.is_file():
                    download(named.url, part)
                    if not (digest := sha256_of(part)).startswith(known):
                        part.unlink()
                        again = "try again" if named.sha256 else f"if it was replaced there, delete {first}"
                        wrong = f"SHA-256 is not {known[:8]}... but {digest[:8]}...; the download was deleted; {again}"
                        raise WeightsError(f"{named.url}: {wrong}")
                    part.replace(path)
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or reason(error)
            how = f"put the file at {path}, or try again to resume the download"
            raise WeightsError(f"{named.url}: cannot be downloaded ({cause}); {how}") from error
    another = "" if named.sha256 else f"; if this file is the right one, delete {first}"
    check_hash(path, replace(named, sha256=known), digest := sha256_of(path), another)
    if not known:
        # On a full disk the next start records it.
        with contextlib.suppress(OSError), open(first, "w", opener=without_links) as file:
            file.write(f"{digest}\n")
    return path


def _recorded(file: Path) -> str:
    """Returns the hash in FILE.sha256; "" if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", text := read_file(file, 100).decode().strip()):
            return text
    return ""


@contextlib.contextmanager
def _locked(path: Path, url: str) -> Iterator[Path]:
    """Yields the file to download to: FILE.part, protected by FILE.lock; without locks, a temporary file."""
    lock, part = FileLock(f"{path}.lock"), path.with_name(f"{path.name}.part")
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"waiting for another process that downloads {url}", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
    finally:
        if lock.is_locked:
            lock.release()
        else:
            part.unlink(missing_ok=True)


def check_hash(path: Path, named: Named, digest: str, advice: str = "") -> None:
    """Raises WeightsError, which ends with `advice`, if `digest` does not begin with the hash in `named`."""
    if not digest.startswith(named.sha256):
        found = f"SHA-256 is {digest[:8]}..., expected {named.sha256[:8]}...: damaged or a different file"
        raise WeightsError(f"{path}: {found}; delete it, or replace it by {named.url}{advice}")


def download(url: str, part: Path) -> None:
    """Downloads `url` to the file `part`, or the rest of it if `part` exists. Raises OSError if the download ends early, if
    its end cannot be recognised, or if the server sends another part of the file."""
    have = part.stat().st_size if part.exists() and not part.is_symlink() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "retina_jax", "Range": f"bytes={have}-"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()  # the file is no longer than the part: start again
        return download(url, part)
    with response:
        resumes = response.status == 206
        have = have if resumes else 0
        total = None if response.length is None else have + response.length
        sent = response.headers.get("Content-Range", "")
        if resumes and not re.fullmatch(rf"bytes {have}-\d+/(\*|{total or '.*'})", sent):
            part.unlink(missing_ok=True)
            raise OSError(
                f"the server sent {shortened(sent) or 'an unknown range'} instead of the bytes from {have}; try again"
            )
        if total is None and not response.chunked:
            raise OSError("the server does not report the length of the file")
        with open(part, "ab" if resumes else "wb", opener=without_links) as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                have += len(chunk)
                _show_progress(part.name.removesuffix(".part"), have, total)
    if total is not None and have != total:
        raise OSError(f"interrupted after {have} of {total} bytes")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _show_progress(name: str, have: int, total: int | None) -> None:
    if sys.stderr.isatty():
        share = f" of {total / 1e6:.0f} MB ({100 * have / total:.0f} %)" if total else " MB"
        print(f"\r{name}: {have / 1e6:.0f}{share}", end="\n" if have == total else "", file=sys.stderr, flush=True)
    elif have == total:
        print(f"{name}: {have / 1e6:.0f} MB downloaded", file=sys.stderr)
