"""Make the pages of the methods from the registry: a page a method, and an index with one line on each."""

import inspect
import re

import mkdocs_gen_files

from bdjax import registry

KINDS = {
    "attacks": "Attacks",
    "defenses": "Defenses",
    "detectors": "Detectors",
    "models": "Networks",
    "datasets": "Data sets",
}


def fields(config: type) -> list[str]:
    """The fields of a Config as rows of a table: name, default, documentation."""
    documented: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if base.__module__.startswith("bdjax."):
            source = inspect.getsource(base)
            documented |= _documentation(source)
    rows = ["| field | default | |", "|---|---|---|"]
    for name, field in config.__dataclass_fields__.items():
        text = re.sub(r":(?:mod|class|func|data|meth):`", "`", " ".join(documented.get(name, "").split()))
        text = text.replace("|", "\\|")
        rows.append(f"| `{name}` | `{field.default!r}` | {text} |")
    return rows


def _documentation(source: str) -> dict[str, str]:
    """The strings under the fields of a class."""
    import ast

    body = ast.parse(source).body[0].body
    return {
        node.target.id: following.value.value
        for node, following in zip(body, body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }


index = ["# Methods", "", "`bdjax list` prints the same names."]
for kind, title in KINDS.items():
    index += ["", f"## {title}", "", "| name | |", "|---|---|"]
    for name in registry.names(kind):
        summary = registry.summary(kind, name).replace("|", "\\|")
        index.append(f"| [`{name}`]({kind}/{name}.md) | {summary} |")
        module = registry.load_module(kind, name)
        text = re.sub(r":(?:mod|class|func|data|meth):`", "`", (module.__doc__ or "").strip())
        page = [f"# {name}", "", "```text", text, "```"]
        if hasattr(module, "Config"):
            flag = {"attacks": "--attack.FIELD", "defenses": "--defense.FIELD"}.get(kind)
            page += ["", "## Settings", "", *([f"On the command line `{flag}`.", ""] if flag else [])]
            page += fields(module.Config)
        with mkdocs_gen_files.open(f"methods/{kind}/{name}.md", "w") as file:
            file.write("\n".join(page) + "\n")
with mkdocs_gen_files.open("methods/index.md", "w") as file:
    file.write("\n".join(index) + "\n")
