"""How the sampled softmax is computed: the names, what each needs, and where `auto` shares the frozen catalogue.

The value of the loss does not depend on the method, so it belongs to how a task is run and never to its configuration.
Methods that give candidates no gradient are of stage 2; stage 1 then takes what `auto` takes.
"""

from __future__ import annotations

import difflib
from typing import Literal, get_args

from bfm.errors import UserError

Method = Literal["auto", "reference", "one_pass", "two_pass", "triton", "sharded"]
METHODS: tuple[str, ...] = get_args(Method)
CONSTANT_ONLY = ("one_pass", "triton", "sharded")
"""Methods that need frozen candidates; for live ones they stand for `auto`."""
# Below this, looking up vectors and merging states over the network costs more than the memory is worth.
SHARE_ABOVE_BYTES = 1 << 31


def check_method(method: str, *, freezes: bool, workers: int, cuda: bool, key: str = "softmax") -> None:
    """Raise UserError, naming `key`, where no part of a run could be computed by the method.

    freezes: whether the configuration reaches stage 2; cuda: False where workers are known to have no CUDA device.
    """
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=1)
        fix = f"did you mean `{close[0]}`?" if close else f"one of {', '.join(METHODS)}"
        raise UserError(f"there is no method {method!r}", key=key, fix=fix)
    if method in CONSTANT_ONLY and not freezes:
        raise UserError(
            f"`{method}` gives candidates no gradient, and without stage 2 all of them need one",
            key=key,
            fix="set `freeze_at_flops`, or use auto, reference or two_pass",
        )
    if method == "sharded" and workers < 2:
        raise UserError("one worker has none to share the catalogue with", key=key, fix="use more workers, or auto")
    if method == "triton" and not cuda:
        raise UserError("the Triton kernel needs a CUDA device", key=key, fix="give the workers GPUs, or use auto")


def shares_catalogue(method: str, workers: int, catalogue_bytes: int) -> bool:
    """Whether stage 2 deals the frozen catalogue out over the workers; catalogue_bytes: all of it in float32.

    `auto` does so where a worker would otherwise hold more than SHARE_ABOVE_BYTES of it.
    """
    return method == "sharded" or (method == "auto" and workers > 1 and catalogue_bytes > SHARE_ABOVE_BYTES)
