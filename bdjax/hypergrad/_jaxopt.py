"""Import jaxopt without its deprecation warning: it is archived but works (see pyproject.toml)."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt import implicit_diff, linear_solve

__all__ = ["implicit_diff", "linear_solve"]
