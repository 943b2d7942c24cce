"""Doors for other people's tools: a notebook's tables, Optuna's storages, MLflow and W&B."""
