"""Negative sampling and the sampled softmax."""
