"""Experiments on defenses on models that they were not tuned for."""
