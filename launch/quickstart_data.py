"""Data of the quickstart: questions about Python's functions, answered by their docstrings.

Read from the source of the standard library without importing or running any of it.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

EXCLUDED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "ensurepip",
    "pydoc_data",
    "antigravity",
    "this",
}
HELD_OUT_EVERY = 10
MIN_WORDS, MAX_CHARACTERS = 5, 700

Pair = dict[str, str]


def pairs() -> tuple[list[Pair], list[Pair]]:
    """Return (training, held-out) pairs of prompt and response; each module is in one of them."""
    training: list[Pair] = []
    held_out: list[Pair] = []
    seen: set[str] = set()
    for number, (module, path) in enumerate(modules()):
        target = held_out if number % HELD_OUT_EVERY == 0 else training
        for pair in pairs_of(module, path):
            if pair["response"] not in seen:
                seen.add(pair["response"])
                target.append(pair)
    return training, held_out


def modules() -> list[tuple[str, Path]]:
    """Return (dotted name, file) of the standard library's Python modules, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        private = any(part.startswith("_") and part != "__init__" for part in parts)
        if not private and not EXCLUDED.intersection(parts):
            found.append((".".join(part for part in parts if part != "__init__"), path))
    return found


def pairs_of(module: str, path: Path) -> Iterator[Pair]:
    """Yield a pair for each documented public function and class of a source file."""
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for owner, node in documented(tree):
        name = f"{module}.{owner}{node.name}"
        answer = first_paragraphs(ast.get_docstring(node) or "")
        if len(answer.split()) < MIN_WORDS:
            continue
        if isinstance(node, ast.ClassDef):
            yield {"prompt": f"What is the Python class `{name}` for?", "response": answer}
        else:
            yield {
                "prompt": f"What does the Python function `{name}({arguments(node)})` do?",
                "response": answer,
            }


def documented(
    tree: ast.Module,
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield (prefix of the name, node) of public functions, classes and their public methods."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield "", node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, kinds[1:]) and not inner.name.startswith("_"):
                        yield f"{node.name}.", inner


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the names of a function's arguments as they are written in a call."""
    given = node.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [arg.arg for arg in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return ", ".join(names)


def first_paragraphs(docstring: str) -> str:
    """Return whole paragraphs of a docstring up to MAX_CHARACTERS, at least the first."""
    text = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if text and (len(text) + len(paragraph) > MAX_CHARACTERS or ">>>" in paragraph):
            break
        text = f"{text}\n\n{paragraph}".strip()
    return text
