"""A Ray session for one verb: a quiet local one of its own, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from bfm.errors import UserError

# Ray's sockets live below the temporary folder, and their paths may have 107 bytes.
_LONGEST_TEMP = 40
_ANSWER_S = 5.0


@contextmanager
def local_ray(num_cpus: int | None = None, *, dashboard: bool = False) -> Iterator[None]:
    """Ray for the duration of the block; nothing happens where it runs already.

    With RAY_ADDRESS set (as inside a submitted job) that cluster is joined and stays; otherwise a session with its own
    temporary folder is started on this machine, and ended and swept away afterwards.

    Args:
        num_cpus: of the local session; None takes all.
        dashboard: needed for job submission and for freeing the resources of stopped trials.

    Raises UserError where RAY_ADDRESS is not that of a cluster that answers.
    """
    if ray.is_initialized():
        yield
        return
    address = cluster_address()
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise _no_cluster(address, str(error).splitlines()[0]) from error
        try:
            yield
        finally:
            ray.shutdown()
        return
    folder = short_temp_folder()
    ray.init(
        address="local",
        num_cpus=num_cpus,
        _temp_dir=str(folder),
        log_to_driver=False,
        logging_level=logging.ERROR,
        include_dashboard=dashboard,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def cluster_address() -> str:
    """RAY_ADDRESS, or an empty string; asks whether somebody listens there, because Ray would try for many minutes.

    Raises UserError for an address of another kind, or one where nobody does.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise UserError(
            f"{address} is not the address of a cluster's head",
            key="RAY_ADDRESS",
            fix="submit with `ray job submit`, or unset it to run on this machine",
        )
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        except OSError as error:
            raise _no_cluster(address, str(error)) from error
    return address


def _no_cluster(address: str, why: str) -> UserError:
    fix = "start the cluster's head, correct it, or unset it to run on this machine"
    return UserError(f"no cluster answers at {address} ({why})", key="RAY_ADDRESS", fix=fix)


def short_temp_folder() -> Path:
    """A fresh temporary folder whose path leaves room for Ray's socket names."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="bfm-", dir=base if len(base) <= _LONGEST_TEMP else "/tmp"))


def quiet_ray_data() -> None:
    """No progress bars, no log lines for every execution of a dataset."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
