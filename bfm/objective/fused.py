"""The state of a sampled softmax over constant candidates, computed by one fused CUDA kernel (Triton).

Enters: queries, a table, candidate ids, log inclusion probabilities. Leaves: the state (max, sum, weighted) of
bfm.objective.tiled. Gather, both products and the online softmax happen tile by tile on the chip; beside the state
itself nothing is stored. Products are taken in the table's dtype and accumulated in float32.

Few queries would leave most of the device idle, so the candidates are split over programs too (as in flash decoding)
and the partial states are merged.

Q = queries, K = candidates, R = rows of the table, D = retrieval width, S = candidate splits.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bfm.objective.tiled import State, merge

# The accumulator of a row tile is held in registers: 128 rows x 256 floats fill half of them.
MAX_WIDTH = 256
_MIN_DOT = 16
_TABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Left of a program's shared memory for ids, log pi and reductions.
_RESERVED_BYTES = 8192
# Stands for the multiprocessors of a device where the kernel is interpreted on the CPU.
_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True)
class Tile:
    """How one program works: queries (rows) and candidates (columns) of a tile, warps, pipeline stages.

    Rows and columns are powers of two, at least 16.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def shared_bytes(self, padded: int, item_bytes: int) -> int:
        """Shared memory that the queries and the gathered candidates of all stages take."""
        return padded * item_bytes * (self.rows + self.stages * self.columns)


# From most to least shared memory; the first that fits the device is taken.
_HALF_TILES = (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(16, 16, 4, 1))
# float32 products in full precision have no tensor cores, and larger tiles would spill their registers.
_FLOAT_TILES = (Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 4, 1))


def fused_available() -> str | None:
    """Why the kernel cannot run on this machine, None where it can (with TRITON_INTERPRET=1 on the CPU, slowly)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA device is older than compute capability 8.0"
    return None


def why_not_fused(q_QD: Tensor, table_RD: Tensor) -> str | None:
    """Why the kernel cannot take this table and these queries here, None where it can."""
    if reason := fused_available():
        return reason
    if q_QD.device.type != "cuda" and not _interpreted():
        return f"the tensors are on {q_QD.device}"
    if table_RD.dtype not in _TABLE_DTYPES:
        return f"the table is {table_RD.dtype}, not bfloat16, float16 or float32"
    if table_RD.stride(1) != 1:
        return "the rows of the table are not contiguous"
    if table_RD.shape[1] > MAX_WIDTH:
        return f"vectors of {table_RD.shape[1]} are wider than {MAX_WIDTH}"
    return None


def prefers_fused(table_RD: Tensor) -> bool:
    """Whether the kernel can run and is the fastest for a constant table: on CUDA, in half precision."""
    half = table_RD.dtype in (torch.bfloat16, torch.float16)
    return half and table_RD.is_cuda and table_RD.shape[1] <= MAX_WIDTH and fused_available() is None


@torch.no_grad()
def fused_softmax_state(
    q_QD: Tensor, table_RD: Tensor, ids_K: Tensor, log_pi_K: Tensor, tile: Tile | None = None
) -> State:
    """The state (max_Q, sum_Q, weighted_QD), float32, of every query over the candidates.

    q_QD is rounded to the dtype of the table (bfloat16, float16 or float32, rows contiguous); ids_K is int64, log_pi_K
    any float, +inf for an absent candidate. `tile` overrides the choice by width, dtype and device. No gradient: the
    table is constant, and weighted / sum is the gradient in q.

    Raises ValueError where the kernel cannot run (see why_not_fused).
    """
    if reason := why_not_fused(q_QD, table_RD):
        raise ValueError(f"the fused softmax kernel cannot run: {reason}")
    num_queries, width = q_QD.shape
    if num_queries == 0 or len(ids_K) == 0:
        max_Q = q_QD.new_full((num_queries,), -torch.inf, dtype=torch.float32)
        return max_Q, torch.zeros_like(max_Q), q_QD.new_zeros((num_queries, width), dtype=torch.float32)
    padded = max(_MIN_DOT, _power_of_two(width))
    tile = tile or choose_tile(num_queries, padded, table_RD.element_size(), _shared_memory(q_QD.device))
    row_tiles = -(-num_queries // tile.rows)
    column_tiles = -(-len(ids_K) // tile.columns)
    per_split = -(-column_tiles // num_splits(row_tiles, column_tiles, _processors(q_QD.device)))
    splits = -(-column_tiles // per_split)
    max_SQ = q_QD.new_empty((splits, num_queries), dtype=torch.float32)
    sum_SQ = torch.empty_like(max_SQ)
    weighted_SQD = q_QD.new_empty((splits, num_queries, width), dtype=torch.float32)
    _launch(
        (row_tiles, splits),
        tile,
        padded,
        per_split * tile.columns,
        (q_QD, table_RD, ids_K, log_pi_K),
        (max_SQ, sum_SQ, weighted_SQD),
    )
    return _merge_splits((max_SQ, sum_SQ, weighted_SQD))


def choose_tile(num_queries: int, padded: int, item_bytes: int, shared_bytes: int) -> Tile:
    """The largest tile that fits the shared memory of a program, with no more rows than there are queries."""
    tiles = _FLOAT_TILES if item_bytes == 4 else _HALF_TILES
    room = shared_bytes - _RESERVED_BYTES
    tile = next((tile for tile in tiles if tile.shared_bytes(padded, item_bytes) <= room), tiles[-1])
    if num_queries > tile.rows // 2:
        return tile
    return replace(tile, rows=max(_MIN_DOT, _power_of_two(num_queries)), warps=4)


def num_splits(row_tiles: int, column_tiles: int, processors: int) -> int:
    """The fewest candidate splits with which row_tiles x splits programs fill their last wave to nine tenths.

    Where none up to four waves does, the split that fills best.
    """

    def filled(splits: int) -> float:
        programs = row_tiles * splits
        return programs / (-(-programs // processors) * processors)

    choices = range(1, min(column_tiles, max(1, 4 * processors // row_tiles)) + 1)
    return next((splits for splits in choices if filled(splits) >= 0.9), max(choices, key=filled))


def _launch(
    grid: tuple[int, int],
    tile: Tile,
    padded: int,
    candidates_per_split: int,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    from bfm.objective.fused_kernel import state_kernel

    q_QD, table_RD, ids_K, log_pi_K = inputs
    num_queries, width = q_QD.shape
    with torch.cuda.device_of(q_QD):
        state_kernel[grid](
            q_QD.to(table_RD.dtype).contiguous(),
            table_RD,
            ids_K.contiguous(),
            log_pi_K.float().contiguous(),
            *outputs,
            num_queries,
            len(ids_K),
            candidates_per_split,
            table_RD.stride(0),
            width,
            PADDED=padded,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            WHOLE_WIDTH=padded == width,
            # The interpreter keeps bfloat16 as its bits and would multiply those.
            WIDEN=_interpreted() and table_RD.dtype == torch.bfloat16,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _merge_splits(state_S: State) -> State:
    """The merge of the states of all splits: halves are merged until one is left."""
    while (half := len(state_S[0]) // 2) > 0:
        # Of an odd number the last waits for the next round.
        first, second, rest = zip(*(part.split((half, half, len(part) - 2 * half)) for part in state_S), strict=True)
        max_S, sum_S, weighted_S = (torch.cat(pair) for pair in zip(merge(first, second), rest, strict=True))
        state_S = max_S, sum_S, weighted_S
    max_S, sum_S, weighted_S = state_S
    return max_S[0], sum_S[0], weighted_S[0]


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _power_of_two(number: int) -> int:
    """The least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()


def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shared_memory(device: torch.device) -> int:
    if device.type == "cpu":
        return 2**17
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 * 1024)
