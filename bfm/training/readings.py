"""Figures of a device that nobody waits for: they travel while the next step is computed.

Enters: tensors on a device. Leaves: their numbers, once they have arrived.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Readings:
    """Float tensors on their way to the host, as one message."""

    def __init__(self, *figures: Tensor) -> None:
        sent = torch.cat([figure.detach().flatten().float() for figure in figures])
        self._sizes = [figure.numel() for figure in figures]
        self._here = torch.empty(len(sent), pin_memory=sent.is_cuda)
        self._here.copy_(sent, non_blocking=True)
        self._arrival = torch.cuda.current_stream(sent.device).record_event() if sent.is_cuda else None

    def read(self) -> list[list[float]]:
        """The numbers of each tensor; waits for what is still on its way."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return [part.tolist() for part in self._here.split(self._sizes)]
