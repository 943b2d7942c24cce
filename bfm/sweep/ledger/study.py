"""Sweeps as they stand in their storage, one or those of a study: sweeps of a folder that are read together.

Enters: the folder or URI of a sweep, or of a study, whose study.yaml lists its `sweeps` (folders relative to it).
Leaves: their ledgers' states, without a lease; those of one axis as one, their rows together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import yaml

from bfm.errors import UserError
from bfm.files import Store
from bfm.laws.frontier import Row
from bfm.sweep.ledger.ledger import read_state
from bfm.sweep.ledger.state import SweepState
from bfm.yaml import parse_yaml

STUDY_FILE = "study.yaml"


@dataclass(frozen=True)
class StoredSweep:
    """A sweep as far as it has come."""

    store: Store
    state: SweepState
    folder: str = ""
    """Relative to its study; empty where it was asked for alone."""

    @property
    def has_begun(self) -> bool:
        """Whether a sweep was ever started there."""
        return self.state.spec is not None

    @property
    def axis(self) -> str | None:
        """What it was run to find; None: no single thing, or not known yet."""
        return (self.state.spec or {}).get("axis")

    @cached_property
    def rows(self) -> Sequence[Row]:
        """Rung rows and probe rows."""
        return self.state.all_rows()


Sweep = TypeVar("Sweep", bound=StoredSweep)


def is_study(location: str) -> bool:
    """Whether a study.yaml stands there."""
    return Store(location).exists(STUDY_FILE)


def study_folders(store: Store) -> list[str]:
    """The folders that a study's file names, relative to it. Raises UserError where it names none."""
    file = f"{store.uri}/{STUDY_FILE}"
    places = parse_yaml(store.get(STUDY_FILE).decode(), file=file).get("sweeps")
    if not isinstance(places, list) or not places or not all(isinstance(place, str) for place in places):
        raise UserError("is no list of folders", file=file, key="sweeps", fix="write sweeps: [allocation, batch]")
    return places


def list_sweeps(store: Store, folders: Sequence[str]) -> None:
    """Add folders to a study's file; those that it names already stay. Raises as `study_folders`."""
    listed = study_folders(store) if store.exists(STUDY_FILE) else []
    places = [*listed, *(folder for folder in folders if folder not in listed)]
    store.put(STUDY_FILE, yaml.safe_dump({"sweeps": places}, sort_keys=False).encode())


def read_alone(location: str) -> StoredSweep:
    """The sweep that stands there. Raises UserError where none does, CorruptError where its ledger is damaged."""
    return _read(location, "a sweep")


def read_sweeps(location: str) -> list[StoredSweep]:
    """The sweeps of a study in its order, begun or not; elsewhere the one that stands there. Raises as those two."""
    if not is_study(location):
        return [_read(location, "a sweep or a study")]
    store = Store(location)
    places = [(folder, store.child(folder)) for folder in study_folders(store)]
    return [StoredSweep(place, read_state(place), folder) for folder, place in places]


def _read(location: str, kind: str) -> StoredSweep:
    store = Store(location)
    sweep = StoredSweep(store, read_state(store))
    if not sweep.has_begun:
        raise UserError("there is no sweep here", file=location, fix=f"name the folder <storage>/<name> of {kind}")
    return sweep


def by_axis(sweeps: Iterable[Sweep]) -> list[list[Sweep]]:
    """Those of one axis together, in the order in which the first of them stands; one without an axis stands alone."""
    groups: dict[tuple[str | None, str], list[Sweep]] = {}
    for sweep in sweeps:
        groups.setdefault((sweep.axis, "" if sweep.axis else sweep.folder), []).append(sweep)
    return list(groups.values())


def joined(sweeps: Sequence[StoredSweep]) -> Sequence[Row]:
    """The rows of all.

    Every sweep counts its trials from t00000, so those of several are named by their folder too.
    """
    if len(sweeps) == 1:
        return sweeps[0].rows
    return [row for sweep in sweeps for row in of_sweep(sweep.folder, sweep.rows)]


def of_sweep(name: str, rows: Iterable[Row]) -> list[Row]:
    """Rows whose trials are named by their sweep, too."""
    return [{**row, "trial": f"{name}/{row['trial']}"} for row in rows]
