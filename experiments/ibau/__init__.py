"""Experiments on I-BAU (Zeng et al., ICLR 2022)."""
