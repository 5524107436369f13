"""Compared live with torch: `read_weights` reads what `torch.save` writes for a torchvision network."""

from pathlib import Path

import numpy as np
import pytest

from retina_jax.weights.readers import read_weights


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torchvision_state_dict_reads_as_torch_has_it(tmp_path: Path, zipped: bool) -> None:
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    path = tmp_path / "resnet18.pth"
    torch.save({"epoch": 1, "state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    found = read_weights(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        expected = tensor.numpy()
        assert found[name].dtype == expected.dtype and np.array_equal(found[name], expected), name
