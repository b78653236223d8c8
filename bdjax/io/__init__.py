"""Files: written whole or not at all, read within bounds, and checkpoints with a hash of every file."""
