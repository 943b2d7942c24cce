"""`bfm data prepare` on Ray Data: the stages of bfm.events.prepare and build over pieces, partitions and columns.

Every node must see the log and the folder of the shard set (one machine, or a shared file system); one that does not
says so. The log may be a URI; a shard set at a URI is filled at the end from a folder below $TMPDIR, which every node
must see then.
"""

from __future__ import annotations

import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle
import ray.data

from bfm.errors import UserError
from bfm.events import build, prepare
from bfm.events.manifest import MANIFEST, SHARD_SET, Manifest
from bfm.events.prepare import Job, plan_job
from bfm.files import Store
from bfm.sealed import check_free, publish, staging
from bfm.tables.pieces import Piece
from ray_jobs.cluster_session import local_ray, quiet_ray_data

Progress = Callable[[str, float], None]
"""Called with a stage (start, read, sort, measure, fit, write, join, finish) and its share done, 0 to 1."""
Spread = Callable[[Callable[[int], bytes], int], list[bytes]]
"""What a function says of 0, 1, ..., run by all workers."""
_WATCH_S = 0.3


def prepare_shards(
    schema: str,
    logs: list[str],
    out: str,
    *,
    seed: int | None = None,
    overwrite: bool = False,
    num_cpus: int | None = None,
    progress: Progress = lambda stage, share: None,
) -> Manifest:
    """Build a shard set from a log, on the Ray at hand or one of its own for this machine.

    Args:
        schema: path of a schema, or the name of a built-in one.
        logs: files, folders, globs, URIs; empty for the log of the schema's installed package.
        out: folder (or URI) of the shard set; appears whole or not at all.
        seed: of shuffling, ties and the protocol; None takes the schema's.
        overwrite: replace a shard set that stands at `out`.
        num_cpus: cores of an own Ray; None takes all.
        progress: called with a stage and its share done.

    Raises:
        UserError: schema, log or disk are not as they should be; nothing is left behind. Schema, file names and
            columns are checked before Ray starts.
    """
    if "://" in out:
        return _prepare_remote(
            schema, logs, Store(out), seed=seed, overwrite=overwrite, num_cpus=num_cpus, progress=progress
        )
    target = Path(out).absolute()
    check_free(target, SHARD_SET if overwrite else None, fix="choose another folder, or pass --overwrite")
    with staging(target) as folder:
        job, pieces = plan_job(schema, logs, folder, seed)
        progress("start", 0.0)
        with local_ray(num_cpus):
            progress("start", 1.0)
            quiet_ray_data()
            manifest = _run(job, pieces, progress)
        publish(job.shard_set, target)
    return manifest


def _prepare_remote(schema: str, logs: list[str], store: Store, *, overwrite: bool, **settings: Any) -> Manifest:
    """Prepare in a local folder and upload, the manifest last; an old one goes first, so that no mixture has any."""
    if store.exists(MANIFEST) and not overwrite:
        raise UserError("exists already", file=store.uri, fix="choose another place, or pass --overwrite")
    with tempfile.TemporaryDirectory(prefix="bfm-prepare-") as folder:
        manifest = prepare_shards(schema, logs, f"{folder}/set", **settings)
        store.delete(MANIFEST)
        for name in [*sorted(manifest.files), MANIFEST]:
            store.put(name, Path(folder, "set", name))
    return manifest


def _run(job: Job, pieces: list[Piece], progress: Progress) -> Manifest:
    over = partial(_over, job.folder)
    with _watched(job, "read", len(pieces), progress):
        over(_blocks, partial(prepare.clean_piece, job), [(piece,) for piece in pieces])
    count = prepare.count_partitions(job)
    with _watched(job, "sort", count, progress):
        over(_blocks, partial(prepare.sort_partition, job, count), [(index,) for index in range(count)])
    job.drop("cleaned")
    split = prepare.choose_split(job)
    # Those that some row fell into: each becomes a part of the events, in their order.
    partitions = list(enumerate(job.files("partitions")))
    with _watched(job, "measure", len(partitions), progress):
        over(_tasks, partial(build.measure_partition, job, split), partitions)
    with _watched(job, "fit", 0, progress):
        build.fit_all(job, split)
    with _watched(job, "write", len(partitions), progress):
        over(_tasks, partial(build.write_partition, job, split), partitions)
    job.drop("partitions")
    files = list(enumerate(build.event_files(job)))
    with _watched(job, "join", len(files), progress):
        over(_tasks, partial(build.join_events, job), files)
    job.drop("parts")
    with _watched(job, "finish", 0, progress):
        return build.finish_set(job)


def _blocks(run: Callable[[int], bytes], count: int) -> list[bytes]:
    """As blocks of a Ray dataset: for the stages that read the log and shard it."""
    numbers = ray.data.range(count, override_num_blocks=count)
    told = numbers.map(lambda row: {"told": run(row["id"])}).take_all()
    return [row["told"] for row in told]


def _tasks(run: Callable[[int], bytes], count: int) -> list[bytes]:
    """As plain tasks: for what then measures and writes shards, where a dataset takes as long to begin as the work."""
    shared = ray.put(run)
    return ray.get([_task.remote(shared, number) for number in range(count)])


@ray.remote
def _task(run: Callable[[int], bytes], number: int) -> bytes:
    return run(number)


def _over(folder: Path, spread: Spread, stage: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Run a stage for all arguments; none begins after the first error, which is raised when none is left at work.

    An error comes back as a value: to cancel the others can end this process, and they would write into a folder that
    is swept away.
    """
    failed = folder / "failed"

    def run(number: int) -> bytes:
        if failed.exists():
            return b""
        try:
            stage(*arguments[number])
        except Exception as error:
            error.add_note(traceback.format_exc())
            with suppress(OSError):
                failed.touch()
            return ray.cloudpickle.dumps(error)
        return b""

    try:
        told = spread(run, len(arguments))
    except BaseException:
        with suppress(OSError):
            failed.touch()
        raise
    for error in filter(None, told):
        raise ray.cloudpickle.loads(error)


@contextmanager
def _watched(job: Job, stage: str, total: int, progress: Progress) -> Iterator[None]:
    """Report progress by what the stage's tasks have kept."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_S):
            progress(stage, len(job.files(stage)) / total if total else 0.0)

    progress(stage, 0.0)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    progress(stage, 1.0)
