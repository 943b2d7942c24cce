"""A Ray session for one verb: a quiet local one of its own, or the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from bfm.errors import PausedError, UserError

_SOCKET = "/bfm-abcdefgh/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
_LONGEST_TEMP = 107 - len(_SOCKET)
"""Of a temporary folder below which Ray's sockets have paths that the system takes."""
_ANSWER_S = 5.0
_LOOK_S = 5.0
_HEAD_LIMIT_S = 40.0
"""A minute is what Ray's core waits."""
_OWN_LIMIT_S = 10.0
"""A head on this machine that does not answer is none that comes back."""


@contextmanager
def local_ray(num_cpus: int | None = None, *, dashboard: bool = False) -> Iterator[None]:
    """Ray for the duration of the block; nothing happens where it runs already.

    With RAY_ADDRESS set (as inside a submitted job) that cluster is joined and stays; otherwise a session with its own
    temporary folder is started on this machine, and ended and swept away afterwards.

    Args:
        num_cpus: of the local session; None takes all.
        dashboard: needed for job submission and for freeing the resources of stopped trials.

    Raises UserError where RAY_ADDRESS is not that of a cluster that answers, or of one of other versions, PausedError
    where Ray does not start here.
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
        except RuntimeError as error:
            # Ray has no error of its own for it.
            if not str(error).startswith("Version mismatch"):
                raise
            raise UserError(
                " ".join(str(error).split()), key="RAY_ADDRESS", fix="use the versions of the cluster"
            ) from error
        fix = "start it again, or another one, and the same command goes on"
        try:
            with _head_watched(_HEAD_LIMIT_S, lambda why: f"the cluster's head at {address} is gone ({why}); {fix}"):
                yield
        finally:
            ray.shutdown()
        return
    folder = short_temp_folder()
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            _temp_dir=str(folder),
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=dashboard,
        )
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        # A machine that is crowded beyond what Ray waits for; it has no error of its own for it.
        words = " ".join(str(error).split())
        raise PausedError(f"Ray did not start on this machine ({words}); run the same command again") from error

    def gone(why: OSError) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        return f"Ray's processes on this machine were ended ({why}); run the same command again"

    try:
        # Other errors may be those of this machine's network, or of this process.
        with _head_watched(_OWN_LIMIT_S, gone, only=ConnectionRefusedError):
            yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def cluster_address() -> str:
    """RAY_ADDRESS, or an empty string; asks whether somebody listens there, because Ray would try for many minutes.

    Raises UserError for an address of another kind, or one where nobody does.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local":
        return ""
    if address in ("", "auto"):
        return address
    _, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        raise UserError(
            f"{address} is not the address of a cluster's head",
            key="RAY_ADDRESS",
            fix="write HOST:PORT, submit with `ray job submit`, or unset it to run on this machine",
        )
    try:
        knock(address)
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error
    return address


def knock(address: str, limit_s: float = _ANSWER_S) -> None:
    """Raises OSError where nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=limit_s).close()


@contextmanager
def _head_watched(limit_s: float, gone: Callable[[OSError], str], *, only: type[OSError] = OSError) -> Iterator[None]:
    """Ends the process with one line, told by `gone`, when the head has been away for longer than it ever is: when
    `only` such errors came for so long.

    Ray's core would do so a little later, with words that help nobody, and nothing that waits for Ray can be unwound.
    """
    address, left = ray.get_runtime_context().gcs_address, threading.Event()

    def watch() -> None:
        seen_s = time.monotonic()
        while not left.wait(_LOOK_S):
            try:
                knock(address)
                seen_s = time.monotonic()
            except OSError as error:
                if not isinstance(error, only):
                    seen_s = time.monotonic()
                elif time.monotonic() - seen_s > limit_s and not left.is_set():
                    print(f"bfm: {gone(error)}", file=sys.stderr, flush=True)
                    os._exit(1)

    threading.Thread(target=watch, name="head", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _no_cluster(address: str, why: str) -> UserError:
    fix = "start the cluster's head, correct it, or unset it to run on this machine"
    return UserError(f"no cluster answers at {address} ({why})", key="RAY_ADDRESS", fix=fix)


def short_temp_folder() -> Path:
    """A fresh temporary folder whose path Ray can write, with room for its socket names."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="bfm-", dir=base if base.isascii() and len(base) <= _LONGEST_TEMP else "/tmp"))


def quiet_ray_data() -> None:
    """No progress bars, no log lines for every execution of a dataset."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
