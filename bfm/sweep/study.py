"""Studies: sweeps of a folder that are read together, those of one axis as one.

Enters: the folder or URI of a study, whose study.yaml lists its `sweeps` (folders relative to it). Leaves: that list,
its sweeps by axis, and their rows together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from bfm.errors import UserError
from bfm.files import Store
from bfm.laws.frontier import Row
from bfm.yaml import parse_yaml

STUDY_FILE = "study.yaml"


class OfStudy(Protocol):
    """A sweep, however much of it was read."""

    @property
    def folder(self) -> str:
        """Where it stands."""
        ...

    @property
    def axis(self) -> str | None:
        """What it was run to find; None: no single thing, or not known yet."""
        ...


Sweep = TypeVar("Sweep", bound=OfStudy)


def is_study(location: str) -> bool:
    """Whether a study.yaml stands there."""
    return Store(location).exists(STUDY_FILE)


def study_folders(store: Store, folder: str) -> list[str]:
    """The folders that a study's file names, relative to it. Raises UserError where it names none."""
    file = f"{folder.rstrip('/')}/{STUDY_FILE}"
    places = parse_yaml(store.get(STUDY_FILE).decode(), file=file).get("sweeps")
    if not isinstance(places, list) or not places or not all(isinstance(place, str) for place in places):
        raise UserError("is no list of folders", file=file, key="sweeps", fix="write sweeps: [allocation, batch]")
    return places


def by_axis(sweeps: Iterable[Sweep]) -> dict[str, list[Sweep]]:
    """Axis -> its sweeps, in the order in which the first of them stands; a sweep without one is by its folder."""
    groups: dict[str, list[Sweep]] = {}
    for sweep in sweeps:
        groups.setdefault(sweep.axis or sweep.folder, []).append(sweep)
    return groups


def joined(sweeps: Sequence[tuple[str, Sequence[Row]]]) -> list[Row]:
    """The rows of all (folder, rows).

    Every sweep counts its trials from t00000, so those of several are named by their folder too.
    """
    if len(sweeps) == 1:
        return list(sweeps[0][1])
    return [{**row, "trial": f"{folder}/{row['trial']}"} for folder, rows in sweeps for row in rows]
