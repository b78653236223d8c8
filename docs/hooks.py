"""Show Sphinx roles in docstrings, such as :func:`name`, as plain code."""

import re
from typing import Any

ROLE = re.compile(r":(?:mod|class|func|data|meth):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Remove the names of the roles from a page's HTML."""
    return ROLE.sub("", html)
