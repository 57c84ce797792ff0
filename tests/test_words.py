"""Every public name of the product and of the simulator says in a plain first sentence what it is or does."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers import ROOT

RIDDLE = re.compile(r"(What|Who|Whose|Which|Whether|Where|When|Why|How|That|As|By)\b")
"""The first word of a sentence that leaves its noun to be guessed."""

NO_VERB = re.compile(
    r"(A|All|An|Another|Any|At|Both|Each|Every|For|From|If|In|It|Its|No|Nobody|Nothing|Of|On|Once|One|Some|The|Their"
    r"|These|This|Those|To|Unless|Until|With|Without|[^A-Z].*|.*[^s]s)\b"
)
"""The first word of a sentence that does not begin with a verb in the imperative."""

LONGEST = 120  # characters of a first sentence

FILES = sorted([*ROOT.glob("mooncache/**/*.py"), *ROOT.glob("sim/**/*.py")])


def decorators(node: ast.AST) -> set[str]:
    """The last words of a definition's decorators."""
    return {ast.unparse(one).rpartition(".")[2] for one in getattr(node, "decorator_list", ())}


def public(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """A module, and the public classes, functions and methods in it, but setters and overloads."""
    if {"setter", "overload"} & decorators(node):
        return
    yield name, node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from public(child, f"{name}.{child.name}")


def is_called(node: ast.AST) -> bool:
    """Whether a name is a function that somebody calls, and not a property."""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return is_function and not {"property", "cached_property"} & decorators(node)


def wrong(text: str | None, called: bool) -> str | None:
    """What is wrong with a docstring, if anything is."""
    if text is None:
        return "has no docstring"
    paragraph = " ".join(text.split("\n\n")[0].split())
    first = re.match(r".*?[.?:](?= |$)", paragraph)
    if paragraph[-1] not in ".?:":
        return f"does not end its first paragraph: {paragraph!r}"
    if first is None or len(first[0]) > LONGEST:
        return f"has a first sentence of more than {LONGEST} characters: {paragraph!r}"
    if RIDDLE.match(paragraph):
        return f"begins with a riddle: {paragraph!r}"
    if called and NO_VERB.fullmatch(paragraph.split()[0].rstrip(",:.")):
        return f"does not begin with a verb in the imperative: {paragraph!r}"
    return None


def constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The docstrings that follow constants and fields, by name."""
    for node in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        for one, behind in pairwise(node.body):
            if isinstance(one, ast.Assign | ast.AnnAssign) and isinstance(behind, ast.Expr):
                text = ast.literal_eval(behind.value) if isinstance(behind.value, ast.Constant) else None
                if isinstance(text, str):
                    yield ast.unparse(one).partition("=")[0], text


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_public_name_has_a_plain_first_sentence(file: Path):
    tree = ast.parse(file.read_text())
    if not tree.body:
        return  # a package's folder
    found = [(name, wrong(ast.get_docstring(node), is_called(node))) for name, node in public(tree, file.stem)]
    found += [(name, wrong(text, False)) for name, text in constants(tree)]
    problems = [f"{name} {why}" for name, why in found if why]
    assert problems == []


@pytest.mark.parametrize(
    ("text", "called"),
    [
        (None, False), ("Return a row", True), ("What comes.", False), ("Whether it is there.", True),
        ("rows of a table.", True), ("Returns a row.", True), ("The row.", True), (f"Return {'very ' * 30}much.", True),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_found(text, called):
    assert wrong(text, called)


@pytest.mark.parametrize(
    ("text", "called"), [("Return a row. None without one.", True), ("Pass.", True), ("The row's number.", False)]
)
def test_what_is_plain_passes(text, called):
    assert wrong(text, called) is None
