"""Words of other tools for the settings of a configuration, and what they are here: for error lines."""

from __future__ import annotations

_BATCH = "write `groups_per_step`: B in groups of `group_windows` windows of `window` events"
_DEPTH = "sizes follow from `params`; write `depth` for the layers, or `aspect` for width over depth"
_LENGTH = "training ends at a C: rungs of `budget.ladder_flops` in a space, --flops of `bfm train`"
_NEGATIVES = "write `live_negatives`, or from `freeze_at_flops` on `negatives`"
_RATE = "write `learning_rate`"
_SIZE = "write `params`: N, the dense weights; widths and depths follow"
_WIDTH = "sizes follow from `params`; write `aspect` for width over depth, `d_item` for the retrieval width"
_WINDOW = "write `window`: events"

SETTINGS = {
    **dict.fromkeys(("lr", "alpha", "base_lr", "max_lr", "peak_lr", "step_size"), _RATE),
    **dict.fromkeys(("batch", "batch_size", "bs", "train_batch_size", "per_device_train_batch_size"), _BATCH),
    **dict.fromkeys(("n_layers", "num_layers", "layers", "n_layer", "num_blocks", "num_hidden_layers"), _DEPTH),
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs", "max_epochs", "max_steps", "num_steps", "steps"), _LENGTH),
    **dict.fromkeys(("num_negatives", "n_negatives", "neg_samples", "num_neg", "negative_samples"), _NEGATIVES),
    **dict.fromkeys(("n_params", "num_params", "model_size", "size"), _SIZE),
    **dict.fromkeys(("hidden_size", "hidden_dim", "hidden_units", "d_model", "width", "n_embd", "dim"), _WIDTH),
    **dict.fromkeys(("max_len", "maxlen", "max_length", "seq_len", "sequence_length", "context_length"), _WINDOW),
    **dict.fromkeys(("embedding_dim", "embedding_size", "embed_dim", "item_dim"), "write `d_item` or `table_width`"),
    **dict.fromkeys(("wd", "l2", "weight_decay_rate"), "write `weight_decay`, or `table_weight_decay` for tables"),
    **dict.fromkeys(
        ("warmup", "warmup_steps", "num_warmup_steps", "warmup_ratio"), "write `warmup_events`: its length"
    ),
    **dict.fromkeys(("n_heads", "num_heads", "n_head", "heads"), "heads follow from the width, which `params` gives"),
    **dict.fromkeys(("dropout_rate", "p_dropout", "drop"), "write `dropout`"),
    **dict.fromkeys(("grad_clip", "gradient_clip", "max_grad_norm", "clip"), "write `clip_norm`"),
    **dict.fromkeys(("optimizer", "optim"), "AdamW it is; write `beta1`, `beta2`, `weight_decay`"),
    **dict.fromkeys(
        ("lr_scheduler", "lr_schedule", "scheduler"), "warmup, stable, decay it is; write `cooldown_fraction`"
    ),
    **dict.fromkeys(("temperature", "tau", "logit_scale"), "write `initial_scale`: it is learned from there"),
    "momentum": "write `beta1`",
    "ema": "write `averaging: true`",
    "seed": "a seed is none of a configuration: `seeds` of a space, --seed of `bfm train`",
    "random_state": "a seed is none of a configuration: `seeds` of a space, --seed of `bfm train`",
}
"""Name -> what to write."""
