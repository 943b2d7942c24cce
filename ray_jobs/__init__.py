"""Thin adapters from the rooms of bfm to Ray Data, Ray Train and Ray Tune."""
