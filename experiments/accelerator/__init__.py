"""One prepared run on an accelerator: what it measures, in order of worth, within a limit of time (README.md)."""
