"""Docstrings in Google's form, from which the API pages are made, and the sizes of files and functions."""

import ast
import re
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).parent.parent / "bdjax"
FILES = sorted(ROOT.rglob("*.py"))
LONG: set[str] = set()  # functions that may have more than 60 lines of code, as FILE:NAME


def functions(path: Path) -> list[tuple[str, ast.FunctionDef]]:
    """Public functions, and methods of public classes that inherit no documentation, with their qualified names."""
    found = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                if {ast.unparse(base) for base in child.bases} <= {"Protocol", "NamedTuple"}:
                    visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                found.append((prefix + child.name, child))

    visit(ast.parse(path.read_text()), "")
    return found


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [n for n in names if n not in ("self", "cls")] + [a.arg for a in (given.vararg, given.kwarg) if a]


def undocumented(function: ast.FunctionDef) -> list[str]:
    """What Google's form asks of this function's docstring and it lacks."""
    names, text = parameters(function), ast.get_docstring(function) or ""
    if len(names) < 3:
        return []
    sections = re.split(r"^(Args|Returns|Yields|Raises):[ ]*$", text, flags=re.M)
    of = dict(zip(sections[1::2], sections[2::2], strict=True))
    listed = re.findall(r"^ {2,4}\*{0,2}(\w+)(?: \([^)]*\))?:", of.get("Args", ""), flags=re.M)
    missing = [name for name in names if name not in listed]
    gives = function.returns is not None and ast.unparse(function.returns) not in ("None", "NoReturn")
    return missing + (["Returns"] if gives and not {"Returns", "Yields"} & set(of) else [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_of_three_parameters_say_what_they_take_and_return(path):
    lacking = {name: missing for name, node in functions(path) if (missing := undocumented(node))}
    assert not lacking


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(function) is not None
    begin = function.body[1].lineno if documented and len(function.body) > 1 else function.body[0].lineno
    return (function.end_lineno or begin) - begin + 1


def test_sizes_of_files_and_functions():
    lengths = [len(path.read_text().splitlines()) for path in FILES]
    assert median(lengths) <= 120 and quantiles(lengths, n=10)[-1] <= 300 and max(lengths) <= 350
    sizes = {
        f"bdjax/{path.relative_to(ROOT)}:{node.name}": code_lines(node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert median(sizes.values()) <= 8
    assert {name for name, size in sizes.items() if size > 60} <= LONG
