"""Rows that are spread over files by the hash of their user and gathered again, whole users at a time.

Each file is ordered by the hash, SPREAD (uint64), and lies in bins by its first bits. A partition is one of 2^n
equal ranges of hashes: a few whole bins of every file, or a part of one. So a log of any size is gathered in the
memory of a partition.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

SPREAD = "spread"
_BITS = 8
_HASHES = 1 << 64


def num_partitions(rows: int, partition_rows: int) -> int:
    """Partitions of so many rows, each of `partition_rows` to twice as many: a power of two, so of whole bins."""
    return 1 << max((rows // partition_rows).bit_length() - 1, 0)


def write_spread(path: Path, rows: pa.Table) -> None:
    """Write rows with their hashes in the column SPREAD, rising."""
    batch = pa.RecordBatch.from_struct_array(rows.to_struct_array().combine_chunks())
    bounds = np.array([number << (64 - _BITS) for number in range(1 << _BITS)], np.uint64)
    starts = np.searchsorted(rows[SPREAD].to_numpy(), bounds).tolist()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        for start, stop in itertools.pairwise([*starts, len(batch)]):
            writer.write_batch(batch.slice(start, stop - start))


def gather(paths: Sequence[Path], partitions: int, index: int) -> pa.Table:
    """All rows of a partition, file by file."""
    low, high = (number * _HASHES // partitions for number in (index, index + 1))
    ranges = []
    for path in paths:
        # Read, not mapped: of a log larger than memory a partition is a few whole bins of every file.
        with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
            for number in range(low >> (64 - _BITS), ((high - 1) >> (64 - _BITS)) + 1):
                rows = reader.get_batch(number)
                hashed = rows[SPREAD].to_numpy()
                start = np.searchsorted(hashed, np.uint64(low))
                ranges.append(rows.slice(start, np.searchsorted(hashed, np.uint64(high - 1), side="right") - start))
    return pa.Table.from_batches(ranges)
