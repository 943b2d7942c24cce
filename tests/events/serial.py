"""The stages of a preparation run one after the other in this process: the reference for what Ray does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
) -> Manifest:
    """Prepare a shard set."""
    check_free(out, SHARD_SET if overwrite else None)
    with staging(out) as folder:
        job, pieces = prepare.plan_job(str(schema), [str(log) for log in logs], folder, seed)
        for piece in pieces:
            prepare.clean_piece(job, piece)
        count = prepare.count_partitions(job)
        for index in range(count):
            prepare.sort_partition(job, count, index)
        split = prepare.choose_split(job)
        partitions = job.files("partitions")
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
