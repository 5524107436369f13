"""Checkpoints and exported detectors that are damaged."""

from __future__ import annotations

import io
import json
import random
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
from attacks import attack, both_shares, damaged

from retina_jax.export.loader import FORMAT, load
from retina_jax.training.checkpoints import Checkpoints


@both_shares
def test_attacked_checkpoints_are_replaced_by_the_one_before_or_refused(tmp_path: Path, share: float) -> None:
    folder, intact = tmp_path / "checkpoints", tmp_path / "intact"
    states = {k: jax.device_put({f"a{i}": np.full((50, 50), k, np.float32) for i in range(3)}) for k in (1, 2)}
    with Checkpoints(intact, keep=None) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    files = sorted(path.relative_to(intact) for path in (intact / "2").rglob("*") if path.is_file())

    def case(rng: random.Random) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(intact, folder)
        for file in rng.sample(files, rng.randint(1, 2)):
            content = (folder / file).read_bytes()
            if not content or rng.random() < 0.1:
                (folder / file).unlink()
            else:
                (folder / file).write_bytes(damaged(content, rng))
        with Checkpoints(folder, keep=None, read_only=True) as checkpoints:
            found = checkpoints.restore(states[1])
        (step,) = {int(value) for array in found.values() for value in np.unique(array)}
        return "read as written" if step == 2 else "replaced by the one before"

    ended = attack("checkpoints, the newest damaged", int(400 * share), case)
    assert ended["replaced by the one before"] > 0.9 * ended.total() and not ended["refused in one line"]


@both_shares
def test_attacked_detectors_are_read_or_refused_in_one_line(tmp_path: Path, share: float) -> None:
    about = {"format": FORMAT, "class_names": ["a"], "category_ids": [1], "short_side": 64, "long_side": 96}
    about |= {"size_rounding": "floor", "canvases": [[64, 96]]}
    parameters, programs = [np.arange(300, dtype=np.float32), np.ones((3, 4))], {"detect_64x96": bytes(range(256)) * 20}
    stored, file, path = io.BytesIO(), io.BytesIO(), tmp_path / "detector.zip"
    np.savez(stored, *parameters)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.json", json.dumps(about))
        archive.writestr("parameters.npz", stored.getvalue(), zipfile.ZIP_STORED)
        for name, program in programs.items():
            archive.writestr(f"programs/{name}", program)

    def case(rng: random.Random) -> str:
        path.write_bytes(damaged(file.getvalue(), rng))
        found = load(str(path))
        assert found.about == about and all(map(np.array_equal, found._parameters, parameters))
        assert list(found._programs.values()) == list(programs.values())
        return "read as written"

    path.write_bytes(file.getvalue())
    assert load(str(path)).about == about
    assert attack("exported detectors, damaged", int(2000 * share), case)["refused in one line"] > 0
