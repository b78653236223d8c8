"""Experiments on BI-BAU."""
