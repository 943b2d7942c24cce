"""A Ray Train worker group that stays: its ranks take one order after the other, for as long as there are orders.

Enters: a function that a rank calls with every order; orders, one at a time. Leaves: the answer of rank 0, once every
rank has carried the order out. Imports and process groups are paid for once, so that an order begins at once.
Every rank holds a connection to the coordinator, JSON lines both ways. Whoever ends, however it ends, ends the
connection: nobody asks a storage whether there is news, and no rank outlives its coordinator.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, cast

import ray

from ray_jobs.preemption import draining_nodes

_log = logging.getLogger(__name__)
Message = dict[str, Any]
CarryOut = Callable[[Message], Message]
"""order -> answer, on every rank. What it raises is the failure of the group."""

_COLLECTIVE_TIMEOUT_S = 600
"""A rank that hangs this long in a collective fails its group."""
_LOOK_S = 0.5
"""How often an idle group looks whether it has to go."""
_WAITS_S = 3.0
_HELLO_S = 10.0
_KEEP_ALIVE_S = 60
_CLOSE_S = 20.0
RUN = "ray-"
"""Begins the names of the folders that Ray Train makes."""
_STATE_API_ADDRESS = "RAY_API_SERVER_ADDRESS"
_ENVIRONMENT = {
    # How often the controller looks at its workers: by default a finished group is noticed after up to 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # Two workers and their attendants are six processes and 16 s of CPU: far over 60 s where cores are shared.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    # A metrics exporter, for a group that lives for minutes.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Kind:
    """What a group cannot change: where its workers are, and what they were begun with."""

    workers: int
    cpus: float
    """Of each worker."""
    gpus: float
    label_selector: tuple[tuple[str, str], ...]
    """Of the nodes, in Ray's words."""
    max_failures: int
    """Restarts of the workers within an order; preemptions and crashes are counted apart."""
    carry_out: CarryOut
    """Must pickle."""


class Coordinator:
    """Gives orders to a group that stands by for their kind, or to a new one; there is one group at a time."""

    def __init__(self) -> None:
        self._group: WorkerGroup | None = None

    def order(self, kind: Kind, order: Message, notes: str, *, stays_s: float) -> Message:
        """Have every rank carry an order out; rank 0's answer.

        `notes` is a folder or URI that every node reaches, for what Ray Train notes of a group that begins; it is not
        needed once the order was carried out. For `stays_s` the group stands by for another order.

        Raises what ended Ray Train's run: a rank failed more often than allowed. The next order begins anew.
        """
        if self._group is None or not self._group.reserve(kind):
            self.close()
            self._group = WorkerGroup(kind, notes, stays_s)
        try:
            answer = self._group.order(order)
        except BaseException:
            self.close()
            raise
        if not stays_s:
            self.close()
        return answer

    def close(self) -> None:
        """End the group, if there is one."""
        if self._group is not None:
            self._group.close()
            self._group = None


@functools.cache
def coordinator() -> Coordinator:
    """That of this process."""
    return Coordinator()


class WorkerGroup:
    """One run of Ray Train; closes itself when it has stood by for long, or when somebody waits for its room."""

    def __init__(self, kind: Kind, notes: str, stays_s: float) -> None:
        """Begin to start the workers for an order that follows at once."""
        self.kind, self._stays_s = kind, stays_s
        self._lock = threading.RLock()
        self._is_reserved, self._is_closed = True, False
        self._waiting_since_s: dict[str, float] = {}
        """By placement group."""
        self._idle_since_s = time.monotonic()
        self._server = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=kind.workers)
        self._token = uuid.uuid4().hex
        self._lines: dict[int, _Line] = {}
        """By rank."""
        self._failure: BaseException | None = None
        self._end, self._ended = socket.socketpair()
        # Made here, so that a request that is wrong is raised to who makes it.
        self._run = threading.Thread(target=self._fit, args=[self._trainer(notes)], name="worker-group", daemon=True)
        self._run.start()
        threading.Thread(target=self._stand_by, name="stand-by", daemon=True).start()

    def reserve(self, kind: Kind) -> bool:
        """Whether it stands by for an order of this kind; if so, that order must follow."""
        with self._lock:
            self._is_reserved = kind == self.kind and not self._is_closed and not self._must_end()
            return self._is_reserved

    def order(self, order: Message) -> Message:
        """See Coordinator; the group is reserved."""
        while True:
            self._wait_for_ranks()
            try:
                answer = self._ask(order)
                break
            except OSError:
                # A rank is gone: Ray Train ends the others and begins again, or gives up.
                self._hang_up()
        self._idle_since_s, self._is_reserved = time.monotonic(), False
        return answer

    def close(self) -> None:
        """End the ranks and wait until what they hold is free; who is in the middle of an order is not waited for."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._server.close()
                self._hang_up()
                self._run.join(0.0 if self._is_reserved else _CLOSE_S)

    def _hang_up(self) -> None:
        for line in self._lines.values():
            line.close()
        self._lines.clear()

    def _wait_for_ranks(self) -> None:
        while len(self._lines) < self.kind.workers:
            if self._ended in wait([self._server, self._ended]):
                raise self._failure or RuntimeError("the worker group ended before its order was carried out")
            line = _Line(self._server.accept()[0])
            # Whoever else finds the port is not waited for.
            with suppress(OSError, ValueError, LookupError, TypeError):
                hello = line.receive(_HELLO_S)
                if hello["token"] == self._token:
                    line.node, self._lines[hello["rank"]] = hello["node"], line

    def _ask(self, order: Message) -> Message:
        for line in self._lines.values():
            line.send(order)
        answers: dict[int, Message] = {}
        while len(answers) < self.kind.workers:
            waiting = {line.fileno(): rank for rank, line in self._lines.items() if rank not in answers}
            for rank in (waiting[cast(int, ready)] for ready in wait(waiting)):
                answers[rank] = self._lines[rank].receive()
        return answers[0]

    def _stand_by(self) -> None:
        """Close when it is time to."""
        while not self._is_closed:
            time.sleep(_LOOK_S)
            with self._lock:
                # Under one lock: an order that came between the two would lose its ranks.
                if not self._is_reserved and not self._is_closed and self._gives_way():
                    self.close()

    def _gives_way(self) -> bool:
        try:
            is_late = time.monotonic() - self._idle_since_s > self._stays_s
            return is_late or self._is_wanted() or self._must_end()
        except Exception as error:
            _log.warning("a group of workers that stands by cannot see who waits, and ends: %s", error)
            return True

    def _is_wanted(self) -> bool:
        """Whether somebody has waited for room for longer than it takes to be given what is free."""
        now_s, table = time.monotonic(), ray.util.placement_group_table()
        waiting = [name for name, group in table.items() if group["state"] == "PENDING"]
        self._waiting_since_s = {name: self._waiting_since_s.get(name, now_s) for name in waiting}
        return any(now_s - since_s > _WAITS_S for since_s in self._waiting_since_s.values())

    def _must_end(self) -> bool:
        """Whether a rank is gone, or its node is to go."""
        # Between orders no rank speaks: what can be read is an end.
        if wait([self._ended, *(line.fileno() for line in self._lines.values())], 0):
            return True
        return not {line.node for line in self._lines.values()}.isdisjoint(draining_nodes())

    def _fit(self, trainer: Any) -> None:
        try:
            with _group_environment():
                trainer.fit()
        except BaseException as error:
            self._failure = error
        finally:
            self._end.close()

    def _trainer(self, notes: str) -> Any:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        kind = self.kind
        use_gpu = kind.gpus > 0
        place = {"address": self._server.getsockname(), "token": self._token, "carry_out": kind.carry_out}
        return TorchTrainer(
            _rank_main,
            train_loop_config=place,
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
            scaling_config=ray.train.ScalingConfig(
                num_workers=kind.workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": kind.cpus} | ({"GPU": kind.gpus} if use_gpu else {}),
                label_selector=dict(kind.label_selector) or None,
            ),
            run_config=ray.train.RunConfig(
                name=f"{RUN}{self._token[:12]}",
                storage_path=notes,
                failure_config=ray.train.FailureConfig(
                    max_failures=kind.max_failures, max_preemption_failures=kind.max_failures
                ),
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )


@contextmanager
def _group_environment() -> Iterator[None]:
    """Environment from which `fit` takes what its controller and workers get; what the user has set wins."""
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    # The only node cannot be preempted and leave anybody to notice: one process less to start.
    watch_preemption = len(ray.nodes()) > 1
    values = {**_ENVIRONMENT, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(watch_preemption))}
    # Ray Train's cleaner asks the cluster that it *finds* whether the controller lives. On a machine with a second
    # cluster it asks that one, hears of no such actor, and removes the placement group of a healthy run.
    values[_STATE_API_ADDRESS] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(_STATE_API_ADDRESS)
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _rank_main(begun: dict[str, Any]) -> None:
    """What Ray Train runs on every rank: orders, until there are no more."""
    import ray.train

    hello = {"token": begun["token"], "rank": ray.train.get_context().get_world_rank()}
    with closing(_Line(socket.create_connection(begun["address"]))) as line:
        line.send({**hello, "node": ray.get_runtime_context().get_node_id()})
        while True:
            try:
                order = line.receive()
            except OSError:
                return
            line.send(begun["carry_out"](order))


class _Line:
    """One end of a connection. What it raises where the other end is gone is an OSError."""

    def __init__(self, connection: socket.socket) -> None:
        # Networks forget connections that say nothing for as long as a task takes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_S)
        self._connection, self._file = connection, connection.makefile("rb")
        self.node = ""
        """Id of the other end's."""

    def fileno(self) -> int:
        """For `wait`."""
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        """One line."""
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next line."""
        self._connection.settimeout(timeout_s)
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the other end is gone")
        return json.loads(line)

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._connection.close()
