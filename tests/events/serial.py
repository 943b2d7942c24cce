"""The stages of a preparation run one after the other in this process: the reference for what Ray Data does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bfm.events import build, prepare
from bfm.events.manifest import SHARD_SET, Manifest
from bfm.sealed import check_free, publish, staging

PROJECT = Path(__file__).parents[2]


def prepare_serially(
    schema: str | Path,
    logs: Sequence[str | Path],
    out: Path,
    *,
    seed: int | None = None,
    overwrite: bool = False,
    reorder: Callable[[pa.Table], pa.Table] = lambda table: table,
) -> Manifest:
    """Prepare a shard set; `reorder` shuffles the cleaned rows before they are partitioned."""
    check_free(out, SHARD_SET if overwrite else None)
    with staging(out) as folder:
        job, pieces = prepare.plan_job(str(schema), [str(log) for log in logs], folder, seed)
        tables = [table for piece in pieces for table in prepare.clean_piece(job, piece)]
        count = prepare.num_partitions(prepare.rows_read(job))
        rows = prepare.assign_partitions(job, reorder(pa.concat_tables(tables)), count)
        for index in range(count):
            part = rows.filter(pc.equal(rows[prepare.PARTITION], index))
            if part.num_rows:
                prepare.sort_partition(job, index, part)
        split = prepare.choose_split(job)
        partitions = prepare.sorted_partitions(job)
        for index, partition in enumerate(partitions):
            build.measure_partition(job, split, index, partition)
        build.fit_all(job, split)
        for index, partition in enumerate(partitions):
            build.write_partition(job, split, index, partition)
        for index, name in enumerate(build.event_files(job)):
            build.join_events(job, index, name)
        manifest = build.finish_set(job)
        publish(job.shard_set, out)
    return manifest


def shared_data(name: str) -> Path | None:
    """A log of the data folder beside the checkout, where there is one."""
    for folder in (PROJECT / "shared", PROJECT.parent / "shared"):
        if (folder / "data" / name).exists():
            return folder / "data" / name
    return None


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a shard set but the caches."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if ".cache" not in p.parts}
