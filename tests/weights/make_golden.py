"""Writes the files of golden/; needs torch: `.venv/bin/python tests/weights/make_golden.py`.

`expected.npz` has the arrays of every `.pth` next to it, bfloat16 as float32.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def weights() -> OrderedDict[str, torch.Tensor]:
    """Returns one tensor of each kind that a reader might read wrongly."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    tensors = OrderedDict(
        {
            "conv.weight": torch.randn(3, 2, 3, 3, generator=generator),
            "conv.channels_last": torch.randn(2, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last),
            "parameter": torch.nn.Parameter(torch.randn(5, generator=generator)),
            "norm.num_batches_tracked": torch.tensor(1234567890123),
            "shared.whole": base,
            "shared.rows": base[1:3],
            "shared.transposed": base.t(),
            "shared.every_second": base[:, ::2],
            "half": torch.randn(3, generator=generator).half(),
            "bfloat16": torch.randn(2, 3, generator=generator).bfloat16(),
            "double": torch.randn(2, generator=generator, dtype=torch.float64),
            "int32": torch.tensor([-1, 2**31 - 1], dtype=torch.int32),
            "uint8": torch.tensor([0, 255], dtype=torch.uint8),
            "bool": torch.tensor([True, False, True]),
            "empty": torch.empty(0, 3),
        }
    )
    tensors._metadata = OrderedDict({"": {"version": 1}})  # an attribute, as `Module.state_dict` sets it
    return tensors


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    state = weights()
    np.savez_compressed(GOLDEN / "expected.npz", **{name: as_numpy(tensor) for name, tensor in state.items()})
    torch.save(state, GOLDEN / "zip.pth")
    torch.save(state, GOLDEN / "legacy.pth", _use_new_zipfile_serialization=False)

    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {"state_dict": state},
        "optimizer": optimizer.state_dict(),
        "epoch": 12,
        "size": torch.Size([3, 4]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "best": np.float64(0.5),
    }
    torch.save(checkpoint, GOLDEN / "checkpoint.pth")
    torch.save(checkpoint, GOLDEN / "checkpoint_legacy.pth", _use_new_zipfile_serialization=False)

    torch.save(
        torch.nn.Sequential(torch.nn.Linear(2, 3)), GOLDEN / "whole_module.pth"
    )  # refused, as it refers to classes


if __name__ == "__main__":
    main()
