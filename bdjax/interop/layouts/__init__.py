"""Tables of the layer names of PyTorch networks, one module per family.

Each module defines `NAMINGS`, a tuple of :class:`bdjax.interop.names.Naming` with the usual one first. All modules in
this folder are used.
"""
