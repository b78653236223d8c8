"""Files: atomic writes, bounded reads, and checkpoints with a hash of every file."""
