"""Experiments on all attacks."""
