"""jaxopt without its warning: it is archived and says so on import; it works, see pyproject.toml."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from jaxopt import implicit_diff, linear_solve

__all__ = ["implicit_diff", "linear_solve"]
