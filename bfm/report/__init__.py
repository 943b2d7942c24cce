"""Figures, the report page and TensorBoard."""
