"""Thin adapters from the rooms of bfm to Ray, Ray Train and Ray Tune."""
