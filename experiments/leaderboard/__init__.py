"""All defenses under one protocol."""
