"""The names of PyTorch's networks, one module for each family of ours; its `NAMINGS` are tables, the usual one first.

A module is found by being here: see :class:`bdjax.interop.names.Naming` for what a table says.
"""
