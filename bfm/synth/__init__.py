"""Synthetic logs of a world whose best predictor is known."""
