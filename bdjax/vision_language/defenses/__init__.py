"""Defenses of dual encoders; a module of this folder is a defense, and modules that begin with `_` are helpers."""
