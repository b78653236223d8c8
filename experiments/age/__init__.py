"""Experiments on AGE (Hsieh et al., 2024)."""
