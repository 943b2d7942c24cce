"""Words of W&B, Optuna and Ray Tune for what a search space says, and what they are here: for error lines."""

from __future__ import annotations

from bfm.training.words import SETTINGS

_BUDGET = "a sweep ends with its FLOPs: write `budget.total_flops`"
_COUNT = "write `budget.max_trials`; `budget.total_flops` is what ends a sweep"
_GOAL = "the goal follows from `metric: {name: ...}`"
_LADDER = "rungs are FLOPs: write `budget.ladder_flops`"
_PROMOTE = "write `scheduler: {type: frontier}`, or asha-stop: trials climb `budget.ladder_flops`"
_RESOURCES = "write `scaling: {tiers: [{workers: 1, cpus: 1, gpus: 0}]}`"
_SLOTS = "write `scaling.slots`: tasks at the same time, at most"
_STORED = "say where with `bfm sweep --storage FOLDER --name NAME`"
_TPE = "write `method: optuna` (TPE), random or grid"
_UNUSED = "leave it out: `bfm sweep` trains by itself"

KEYS = {
    **dict.fromkeys(("early_terminate", "early_stopping", "pruner", "pruning", "stop", "stopper"), _PROMOTE),
    **dict.fromkeys(("run_cap", "num_samples", "n_trials", "num_trials", "count", "trials"), _COUNT),
    **dict.fromkeys(("max_concurrent", "max_concurrent_trials", "n_jobs", "num_agents", "parallelism"), _SLOTS),
    **dict.fromkeys(("timeout", "time_budget_s", "max_runtime", "hours", "minutes"), _BUDGET),
    **dict.fromkeys(("mode", "direction", "directions"), _GOAL),
    **dict.fromkeys(("max_t", "grace_period", "min_resource", "max_resource", "min_iter", "max_iter", "s"), _LADDER),
    **dict.fromkeys(("reduction_factor", "halving_rate"), "write `scheduler.eta`"),
    **dict.fromkeys(("search_alg", "sampler", "search_algorithm", "algorithm", "strategy"), _TPE),
    **dict.fromkeys(("resources_per_trial", "resources", "num_workers", "use_gpu", "scaling_config"), _RESOURCES),
    **dict.fromkeys(("project", "entity", "study_name", "experiment", "storage_path", "local_dir"), _STORED),
    **dict.fromkeys(("program", "command", "entrypoint", "objective", "trainable"), _UNUSED),
    **dict.fromkeys(("param_space", "search_space", "space", "config", "hyperparameters"), "write `parameters`"),
    **dict.fromkeys(
        ("dataset", "data_dir", "train_data"), "write `data: {shards: FOLDER}`, made by `bfm data prepare`"
    ),
    **dict.fromkeys(("low", "lower", "minimum"), "write `min`"),
    **dict.fromkeys(("high", "upper", "maximum"), "write `max`"),
    **dict.fromkeys(("choices", "choice", "categorical", "grid_search", "options"), "write `values: [...]`"),
    **dict.fromkeys(("step", "quantum"), "write `q`, with `distribution: q_uniform`"),
    **dict.fromkeys(("mu", "sigma", "mean", "sd"), "there is no normal distribution; write `min` and `max`"),
    "log": "write `distribution: log_uniform_values`",
    "max_failures": "write `scaling.max_retries`",
    "flops": "write `budget: {ladder_flops: [...], total_flops: ...}`",
}
"""Key -> what to write, wherever in the file it stands."""

CHOICES = {
    **dict.fromkeys(("bayes", "bayesian", "tpe", "hyperopt", "bohb", "gp", "cmaes", "skopt"), _TPE),
    **dict.fromkeys(("asha", "hyperband", "median", "sha", "successive_halving"), "write asha-promote or asha-stop"),
    **dict.fromkeys(("pbt", "fifo"), "write frontier; random and grid train every trial to the end"),
    **dict.fromkeys(("loguniform", "log_uniform", "reciprocal"), "write log_uniform_values"),
    **dict.fromkeys(("qloguniform", "q_log_uniform", "qlograndint"), "write q_log_uniform_values"),
    **dict.fromkeys(("quniform", "qrandint"), "write q_uniform"),
    **dict.fromkeys(("randint", "lograndint", "int"), "write int_uniform, or q_log_uniform_values with `q: 1`"),
    **dict.fromkeys(("normal", "log_normal", "lognormal", "q_normal", "randn"), "write uniform or log_uniform_values"),
    **dict.fromkeys(("choice", "grid_search"), "write categorical, with `values: [...]`"),
    **dict.fromkeys(("loss", "val_loss", "validation_loss", "eval_loss", "cross_entropy", "perplexity"), "write nll"),
    **dict.fromkeys(("hr", "hr@10", "hit@10", "hit_rate@10", "recall", "accuracy", "acc"), "write recall@10"),
    **dict.fromkeys(("ndcg", "map", "map@10"), "write ndcg@10"),
    "mrr": "write mrr@10",
}
"""Value -> what to write."""

SPACE = {**SETTINGS, **KEYS, **CHOICES}
"""All of them, for sections that refuse a key or a value."""
