"""What people ask of a sweep from outside: stop, cancel a trial, try a configuration of their own.

Only the holder of the lease writes the ledger. So a request is an immutable object beside it, `requests/<id>.json`,
that whoever drives the sweep, now or next, takes up once and answers with a ledger record: {"kind": "request", "id",
"verb", what was asked, "refused": why not, else null}. What follows is decided by the record, never by the object.
"""

from __future__ import annotations

import getpass
import json
import logging
import socket
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bfm.errors import UserError
from bfm.files import Store, canonical_json, checksum
from bfm.sweep.ledger.state import CANCEL, ENQUEUE, STOP, Record, SweepState
from bfm.sweep.policies.arena import ASKED, Arena, Proposal
from bfm.sweep.policies.policy import Start
from bfm.sweep.policies.space_arena import SpaceArena
from bfm.sweep.space.on_log import open_space
from bfm.sweep.space.spec import from_dict
from bfm.units import format_flops

FOLDER = "requests"
VERBS = (STOP, CANCEL, ENQUEUE)
ANSWER_S = 30.0
"""A running sweep looks for requests every ten seconds."""
_LOOK_S = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One, as it was written."""

    id: str
    """Of no other request; they sort by the time when they were made."""
    verb: str
    by: str
    """user@host."""
    asked: dict[str, Any] = field(default_factory=dict)
    """stop: epoch of the lease that it is for; cancel: trial; enqueue: config (a whole TrainConfig) and seed."""
    damage: str | None = None
    """Why it cannot be read."""


def put_request(store: Store, verb: str, asked: dict[str, Any]) -> Request:
    """Ask; returns once the object stands."""
    request = Request(f"{time.time_ns() // 1_000_000:013d}-{uuid.uuid4().hex[:12]}", verb, _me(), asked)
    body = canonical_json({"verb": request.verb, "by": request.by, "asked": request.asked})
    head = canonical_json(checksum(body))
    store.put_new(_name(request.id), head + b"\n" + body)
    return request


def new_requests(store: Store, answered: Collection[str]) -> list[Request]:
    """Those that no record answers, oldest first; a damaged one says so, and is refused like any other."""
    ids = (name.removeprefix(f"{FOLDER}/").removesuffix(".json") for name in store.names(FOLDER))
    return [_read(store, request_id) for request_id in ids if request_id not in answered]


def wait_for_answer(
    request: Request,
    read: Callable[[], SweepState],
    *,
    limit_s: float = ANSWER_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Record | None:
    """The record that answers a request; None where there is none after `limit_s`."""
    ends_s = clock() + limit_s
    while (answer := read().requests.get(request.id)) is None and clock() < ends_s:
        sleep(_LOOK_S)
    return answer


def answer(request: Request, state: SweepState, arena: Arena, total_flops: int, epoch: int) -> Record:
    """The record of a request, as a sweep stands.

    Args:
        request: what is asked.
        state, arena: of the sweep.
        total_flops: its cap.
        epoch: of the lease of whoever answers.
    """
    record = {"kind": "request", "id": request.id, "verb": request.verb, "by": request.by, **request.asked}
    if request.damage is not None or request.verb not in VERBS:
        return {**record, "refused": request.damage or f"nobody knows {request.verb!r}"}
    try:
        if request.verb == STOP:
            if request.asked["epoch"] != epoch:
                raise UserError("the run that it was for has ended")
        elif request.verb == CANCEL:
            check_cancel(state, request.asked["trial"])
        else:
            proposal = arena.own(request.asked["config"])
            check_enqueue(state, proposal, request.asked["seed"], arena, total_flops)
            record |= {"config": proposal.config, "params": proposal.params}
        return {**record, "refused": None}
    except UserError as error:
        return {**record, "refused": str(error)}
    except (KeyError, TypeError) as error:
        return {**record, "refused": f"it is not a whole request ({type(error).__name__}: {error})"}


def next_asked(state: SweepState, arena: Arena) -> Start | None:
    """The start of the configuration that has waited longest; None where none waits."""
    if not state.queue:
        return None
    record = next(iter(state.queue.values()))
    proposal = Proposal(record["config"], record["params"], ASKED, record["seed"])
    rung = arena.rungs(proposal.config)[0]
    return Start(proposal, rung, f"asked for by {record['by']}", rung, request=record["id"])


def request_words(record: Record) -> str:
    """One line for a person, of an answer."""
    what = {STOP: "stop", CANCEL: f"cancel {record.get('trial')}"}.get(record["verb"], record["verb"])
    if record["verb"] == ENQUEUE and "params" in record:
        what = f"enqueue N {record['params']:,}"
    words = f"{what}, asked for by {record['by']}"
    return f"{words}: refused, {record['refused']}" if record["refused"] else words


def own_request(state: SweepState, values: Mapping[str, Any], seed: int | None, shards: str | None) -> Record:
    """What an enqueue asks, of a configuration as its file has it, on the sweep's log (`shards`: where it has moved).

    Raises UserError as Arena.own and check_enqueue, and where the log cannot be opened.
    """
    spec = from_dict(state.spec or {})
    opened = open_space(spec if shards is None else replace(spec, data=replace(spec.data, shards=shards)))
    arena = SpaceArena(opened.feasible)
    proposal = arena.own(values)
    wanted = spec.seeds[0] if seed is None else seed
    check_enqueue(state, proposal, wanted, arena, spec.budget.total_flops)
    return {"config": proposal.config, "seed": wanted}


def check_cancel(state: SweepState, name: str) -> None:
    """Raises UserError where there is no such trial or request that waits, or nothing of it that could be cancelled."""
    if name in state.queue:
        return
    trial = state.trials.get(name)
    if trial is None:
        known = f"t00000 to t{state.num_proposals - 1:05d}" if state.num_proposals else "none yet"
        raise UserError(f"there is no trial {name!r}", key="TRIAL", fix=f"trials are {known}")
    if name in state.cancelled:
        raise UserError(f"{name} is cancelled already", key="TRIAL", fix="leave it")
    running = any(trial == name for trial, _ in state.attempts)
    if not running and trial.rows and trial.rows[max(trial.rows)]["status"] != "ok":
        raise UserError(f"{name} has ended ({trial.rows[max(trial.rows)]['status']})", key="TRIAL", fix="leave it")


def check_enqueue(state: SweepState, proposal: Proposal, seed: int, arena: Arena, total_flops: int) -> None:
    """Raises UserError where a configuration is there already, or the cap could not even pay for its first row."""
    for trial in state.trials.values():
        if trial.config == proposal.config and trial.seed == seed:
            raise UserError(f"it is {trial.trial} already", key="CONFIG", fix="give it another --seed, or wait for it")
    if any(other["config"] == proposal.config and other["seed"] == seed for other in state.queue.values()):
        raise UserError("it waits in the queue already", key="CONFIG", fix="give it another --seed, or wait for it")
    needed_flops = arena.reserve_flops(proposal.config, arena.rungs(proposal.config)[0], None)
    left_flops = total_flops - state.spent_flops
    if needed_flops > left_flops:
        what = f"its first row costs {format_flops(needed_flops)} FLOPs, {format_flops(left_flops)} are left"
        raise UserError(what, key="budget.total_flops", fix="raise the cap, or take a configuration of a lower rung")


def _read(store: Store, request_id: str) -> Request:
    head, _, body = store.get(_name(request_id)).partition(b"\n")
    try:
        if canonical_json(checksum(body)) != head:
            raise ValueError("its checksum does not fit")
        return Request(request_id, **json.loads(body))
    except (ValueError, TypeError) as error:
        _log.warning("%s/%s: %s", store.uri, _name(request_id), error)
        return Request(request_id, "unreadable", "nobody", damage=f"the request is damaged ({error})")


def _name(request_id: str) -> str:
    return f"{FOLDER}/{request_id}.json"


def _me() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        # A container's user may have no name.
        return socket.gethostname()
