"""The configuration of a trial: everything, beside the seed and the data, that the trunk of a run is a function of.

In: a flat JSON object (from a YAML space, a ledger row or a checkpoint). Out: a checked, frozen TrainConfig.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bfm.errors import UserError
from bfm.files import canonical_json, sha256_bytes
from bfm.training.schedule import rule_learning_rate
from bfm.training.words import SETTINGS
from bfm.units import parse_count, parse_number

if TYPE_CHECKING:
    from bfm.model.sizing import Shape


Metadata = Mapping[str, Any]
"""Of a field: how its value is checked, `check(value, key)`, and how that reads as a JSON schema (`schema`)."""


def _number(low: float, high: float = math.inf, *, low_open: bool = False, high_open: bool = False) -> Metadata:
    def check(value: object, key: str) -> float:
        number = parse_number(value, key=key)
        too_low = number <= low if low_open else number < low
        too_high = number >= high if high_open else number > high
        if too_low or too_high:
            left = f"{'>' if low_open else '>='} {low:g}"
            right = "" if math.isinf(high) else f" and {'<' if high_open else '<='} {high:g}"
            raise UserError(f"{value!r} is out of range", key=key, fix=f"must be {left}{right}")
        return number

    bounds = {"exclusiveMinimum" if low_open else "minimum": low}
    bounds |= {} if math.isinf(high) else {"exclusiveMaximum" if high_open else "maximum": high}
    return {"check": check, "schema": {"type": ["number", "string"], **bounds}}


def _count(low: int, high: int, *, even: bool = False) -> Metadata:
    def check(value: object, key: str) -> int:
        number = parse_count(value, key=key)
        if not low <= number <= high:
            raise UserError(f"{value!r} is out of range", key=key, fix=f"must be from {low} to {high}")
        if even and number % 2:
            raise UserError(f"{value!r} is odd", key=key, fix="take an even number: 32, 64, 128, ...")
        return number

    return {"check": check, "schema": {"type": ["integer", "string"], "minimum": low, "maximum": high}}


def _choice(*allowed: str) -> Metadata:
    def check(value: object, key: str) -> str:
        if value not in allowed:
            raise UserError(f"{value!r} is no choice", key=key, fix=f"write {' or '.join(allowed)}")
        return str(value)

    return {"check": check, "schema": {"enum": list(allowed)}}


def _flag(value: object, key: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"expected true or false, got {value!r}", key=key, fix="write true or false")
    return value


@dataclass(frozen=True)
class TrainConfig:
    """One point of the search space. Rates and shares are plain numbers, FLOPs absolute, events training targets."""

    params: float = field(metadata=_number(1, 1e12))
    """N asked for: dense weights of embedder + contextualizer."""
    embedder_share: float = field(default=0.02, metadata=_number(0, 0.5))
    """s asked for: embedder / N."""
    learning_rate: float = field(default=0.0, metadata=_number(0, 10))
    """Peak (and constant) rate of the dense weights; 0 takes the rule in (N, B) and is replaced by its value."""
    groups_per_step: int = field(default=1, metadata=_count(1, 1 << 20))
    """B: negative groups per optimizer step, over all workers."""
    copy: str = field(default="pointer", metadata=_choice("pointer", "none"))
    """`pointer`: items of the user's own events in the window are copied, too; `none`: the softmax alone. On logs whose
    lists leave out seen items `none` is the default (log_defaults)."""
    counts: str = field(default="none", metadata=_choice("neighbours", "none"))
    """`neighbours`: what stood near the last items in training histories is mixed in, too; `none`: it is not."""
    counts_share: float = field(default=0.0, metadata=_number(0, 1, high_open=True))
    """Share of `counts` in the mixture of a network that is trained without them; 0: a gate learned with it."""
    targets: str = field(default="next_basket", metadata=_choice("next_basket", "next_event"))
    """`next_basket`: items are predicted from the last event at an earlier time, as headline queries are scored;
    `next_event`: from the event before, every event of weight 1."""
    basket_power: float = field(default=0.35, metadata=_number(0, 1))
    """Weight of a next basket of n items in the loss: n to this power. 0 favours NLL, 1 the MRR of large baskets."""
    window: int = field(default=256, metadata=_count(2, 1 << 16))
    """L: events per training window."""
    group_windows: int = field(default=4, metadata=_count(1, 1 << 20))
    """G: windows per negative group."""
    d_item: int = field(default=64, metadata=_count(2, 1 << 14, even=True))
    """Retrieval width."""
    table_width: int = field(default=16, metadata=_count(1, 1 << 14))
    """Width of vocabulary and hash tables."""
    aspect: float = field(default=32.0, metadata=_number(0, low_open=True))
    """Width per layer that sizing aims at where `depth` is free."""
    depth: int | None = field(default=None, metadata=_count(1, 1024))
    """Layers of the contextualizer; None: from `aspect`."""
    embedder_depth: int | None = field(default=None, metadata=_count(0, 1024))
    """Layers of the embedder; 0: an MLP on the pooled fields; None: sizing chooses."""
    weight_decay: float = field(default=0.1, metadata=_number(0, 100))
    """Decoupled decay of the dense matrices."""
    table_weight_decay: float = field(default=1.0, metadata=_number(0, 1000))
    """Decoupled decay of vocabulary and hash tables for every epoch beyond the first: as events repeat, it pulls what
    few of them support towards the other fields, where it would be memorised."""
    table_learning_rate_ratio: float = field(default=1.0, metadata=_number(0, 1e4))
    """Rate of the tables over the rate of the dense weights."""
    clip_norm: float = field(default=1.0, metadata=_number(0, low_open=True))
    """Global gradient norm is clipped to this."""
    beta1: float = field(default=0.9, metadata=_number(0, 1, high_open=True))
    beta2: float = field(default=0.98, metadata=_number(0, 1, high_open=True))
    warmup_events: float | None = field(default=None, metadata=_number(0))
    """Length of the linear warmup; None: as many events as the model has params."""
    cooldown_fraction: float = field(default=0.2, metadata=_number(0, 1, high_open=True))
    """Share of a rung's C that its cooldown branch gets."""
    initial_scale: float = field(default=20.0, metadata=_number(0, 100, low_open=True, high_open=True))
    """Where the learned factor of the cosines (the inverse temperature) starts."""
    dropout: float = field(default=0.0, metadata=_number(0, 1, high_open=True))
    """Share of channels dropped in training, at the input and the outputs of the contextualizer's layers."""
    live_negatives: int = field(default=0, metadata=_count(0, 1 << 31))
    """Negatives drawn per group in stage 1, beside the group's own targets; embedded like them."""
    live_exponent: float = field(default=0.0, metadata=_number(0, 2))
    """Draws of stage 1 are proportional to popularity to this power."""
    freeze_at_flops: float | None = field(default=None, metadata=_number(0, low_open=True))
    """path_flops at which stage 2 begins; None: stage 1 only."""
    negatives: int = field(default=0, metadata=_count(0, 1 << 31))
    """K: negatives drawn per group in stage 2, beside the group's own targets."""
    negatives_exponent: float = field(default=0.5, metadata=_number(0, 2))
    """Draws are proportional to popularity to this power."""
    averaging: bool = field(default=False, metadata={"check": _flag, "schema": {"type": "boolean"}})
    """Keep a running average of the trunk's weights (probes need it)."""

    def __post_init__(self) -> None:
        for name in _NAMES:
            object.__setattr__(self, name, check_value(name, getattr(self, name), name))
        if self.learning_rate == 0.0:
            positions = self.groups_per_step * self.group_windows * self.window
            object.__setattr__(self, "learning_rate", rule_learning_rate(self.params, positions))
        freezes = self.freeze_at_flops is not None
        if self.group_windows == 1:
            for drawn in ("live_negatives", "negatives") if freezes else ("live_negatives",):
                if getattr(self, drawn) == 0:
                    raise UserError(
                        "a group of one window has no other window to take negatives from",
                        key="group_windows",
                        fix=f"use 2 or more, or set `{drawn}`",
                    )
        if self.counts_share and self.counts == "none":
            raise UserError(
                "a share of counts, but nothing is counted", key="counts_share", fix="set `counts: neighbours`"
            )
        if self.negatives and not freezes:
            raise UserError(
                "sampled negatives are of stage 2, which this configuration never enters",
                key="negatives",
                fix="set `freeze_at_flops`, or leave `negatives` out",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, file: str | None = None) -> TrainConfig:
        """Strict: raises UserError that names file and key for unknown or missing keys, wrong types and ranges."""
        for key in values:
            if key not in _NAMES:
                close = difflib.get_close_matches(str(key), _NAMES, n=1)
                fix = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(_NAMES)}"
                fix = SETTINGS.get(str(key).lower(), fix)
                raise UserError("unknown key", file=file, key=str(key), fix=fix)
        if "params" not in values:
            raise UserError("missing", file=file, key="params", fix="give the number of dense weights, e.g. 1e5")
        try:
            return cls(**values)
        except UserError as error:
            raise type(error)(error.what, file=file, key=error.key, fix=error.fix) from None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` inverts it."""
        return {name: getattr(self, name) for name in _NAMES}

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical form: equal exactly for equal configurations."""
        return sha256_bytes(canonical_json(self.as_dict()))

    def shape(self) -> Shape:
        """Widths and depths; raises InfeasibleError where (N, s) cannot be built."""
        # Imported late: the border code that only checks configurations need not load the model room.
        from bfm.model.sizing import size_model

        return size_model(
            self.params,
            self.embedder_share,
            d_item=self.d_item,
            aspect=self.aspect,
            depth=self.depth,
            embedder_depth=self.embedder_depth,
            pointer=self.copy == "pointer",
            neighbours=self.counts == "neighbours",
            counts_share=self.counts_share,
        )


def log_defaults(named: Collection[str], filter_seen: bool, history_length: float) -> dict[str, Any]:
    """Values that a log decides for the settings that its user does not name.

    Nothing is copied where lists leave out seen items. A window is as long as the history that an event of the log
    stands in on average, as a power of two from 64 to 512; a group of them has 1,024 positions.
    """
    window = 2 ** min(9, max(6, round(math.log2(history_length))))
    decided: dict[str, Any] = {"window": window, "group_windows": 1024 // window}
    if "window" in named:
        decided = {}
    if filter_seen:
        decided["copy"] = "none"
    return {name: value for name, value in decided.items() if name not in named}


def check_value(name: str, value: object, key: str) -> Any:
    """One setting of a TrainConfig by itself, as it will stand there; raises UserError that names `key`."""
    option = _OPTIONS[name]
    return None if value is None and option.default is None else option.metadata["check"](value, key)


_OPTIONS = {option.name: option for option in dataclasses.fields(TrainConfig)}
_NAMES = tuple(_OPTIONS)
