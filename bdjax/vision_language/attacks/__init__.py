"""Attacks of dual encoders; a module of this folder is an attack, and modules that begin with `_` are helpers."""
