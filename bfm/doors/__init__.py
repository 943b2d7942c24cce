"""Doors for other people's tools: TensorBoard, a notebook's tables, Optuna's storages, MLflow and W&B."""
