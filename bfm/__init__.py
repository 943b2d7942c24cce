"""bfm: scaling laws of behavioral foundation models, from event log to recipe (arXiv 2606.05257 and beyond)."""

__version__ = "0.1.0"
