"""TFRecord files, in which TFDS stores data sets by default, read by index instead of as a stream.

A record is its length (8 bytes, little-endian), 4 bytes of checksum, the data, 4 bytes of checksum. The offsets of a file's
records are found by one walk over the lengths when the file is first read. Checksums are not verified.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import tensorflow_datasets as tfds
from google.protobuf.message import DecodeError

HEADER, FOOTER = 12, 4
"""Bytes around the data of a record."""


@runtime_checkable
class Examples(Protocol):
    """Examples of a TFDS split by index, as its random access sources and TFRecordExamples give them."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]: ...


class TFRecordExamples:
    """The examples of a split; an image is given encoded, as it is stored. Threads may read at once."""

    def __init__(self, info: tfds.core.DatasetInfo, split: str) -> None:
        """`split` is a name or an instruction such as train[:10%]; ValueError if there is no such split."""
        self._features = info.features
        self._files = info.splits[split].file_instructions
        self._ends = list(accumulate(file.take for file in self._files))
        self._offsets: dict[str, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Raises OSError if the file cannot be read, ValueError if it is damaged, IndexError from `len` on."""
        if not 0 <= row < len(self):
            raise IndexError(f"example {row} of {len(self)}")
        place = bisect_right(self._ends, row)
        file = self._files[place]
        if file.filename not in self._offsets:
            self._offsets[file.filename] = record_offsets(file.filename, file.examples_in_shard)
        start, length = self._offsets[file.filename][file.skip + file.take - (self._ends[place] - row)]
        with open(file.filename, "rb") as stream:
            stream.seek(start)
            encoded = stream.read(length)
        try:
            return self._features.deserialize_example_np(encoded, decoders={"image": tfds.decode.SkipDecoding()})
        except DecodeError:
            raise ValueError(f"{file.filename}: the record at byte {start} is not an example; it is damaged") from None


def record_offsets(path: str, expected: int) -> list[tuple[int, int]]:
    """Start and length in bytes of each record's data; ValueError if there are not `expected`, or the last is cut off."""
    offsets, place, size = [], 0, os.path.getsize(path)
    with open(path, "rb") as stream:
        while place + HEADER <= size:
            stream.seek(place)
            length = int.from_bytes(stream.read(8), "little")
            offsets.append((place + HEADER, length))
            place += HEADER + length + FOOTER
    if place != size or len(offsets) != expected:
        raise ValueError(
            f"{path}: {len(offsets)} records in {size} bytes, not the {expected} of dataset_info.json; damaged"
        )
    return offsets
