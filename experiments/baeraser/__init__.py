"""Experiments on BAERASER (Liu et al., INFOCOM 2022)."""
