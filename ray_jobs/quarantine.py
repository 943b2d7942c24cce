"""Nodes that spoil what is given to them: a lost mount, a broken GPU. They get no more tasks; the sweep goes on.

Enters: where tasks brought rows, were lost, or found what would end a sweep. Leaves: the nodes to keep away from. The
last node is never among them. It lasts as long as the driver: who starts it again may have mended them.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_LOSSES = 2
"""Of different trials in a row on one node, while another one brings rows."""


class Quarantine:
    """See the module."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self._losses: dict[str, set[str]] = {}
        """Node -> trials lost there since its last row."""
        self._rows_elsewhere: set[str] = set()
        """Of those nodes, the ones that were outdone by another one's row since."""
        self._faults: dict[str, str] = {}
        """What would have ended the sweep -> the node that it was found on."""

    def row(self, node: str) -> None:
        """A task brought its row."""
        self._losses.pop(node, None)
        self._rows_elsewhere.discard(node)
        self._rows_elsewhere |= self._losses.keys()

    def lost(self, node: str, trial: str, live: Collection[str]) -> bool:
        """Whether the node that lost a task is kept away from; `live` are the nodes that take tasks."""
        self._losses.setdefault(node, set()).add(trial)
        spoils = len(self._losses[node]) >= _LOSSES and node in self._rows_elsewhere
        return spoils and self._shut(node, live)

    def fatal(self, node: str, what: str, live: Collection[str]) -> bool:
        """The same for what ends a sweep, unless it is one node's alone."""
        return self._faults.setdefault(_kind(what), node) == node and self._shut(node, live)

    def _shut(self, node: str, live: Collection[str]) -> bool:
        if not set(live) - self.nodes - {node}:
            return False
        self.nodes.add(node)
        return True


def _kind(what: str) -> str:
    """A fault without what differs from one node to another: times, numbers, a storage's own words of the request."""
    return re.sub(r"[0-9.]*[0-9]", "#", what.partition("<")[0])
