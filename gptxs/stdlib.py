"""The embedded corpus: text that every Python has, so that a first run needs no network."""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from pathlib import Path
from typing import Any


@functools.cache
def stdlib_documents() -> list[str]:
    """The manual pages of `pydoc_data` and nearly every docstring of the standard library."""
    from pydoc_data.topics import topics

    name_of = {text: topic for topic, text in topics.items()}  # keyed by text: no duplicates

    def add(node: Any, name: str) -> None:
        text = ast.get_docstring(node)
        if text:
            name_of.setdefault(text, name)
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                add(child, f"{name}.{child.name}")

    # The modules are parsed and not imported, since importing some of them has effects.
    root = Path(sysconfig.get_path("stdlib"))
    # What users installed is not Python's, and some installations come without the tests.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        source = path.read_bytes()
        if left_out.isdisjoint(parts) and b'"""' in source:
            add(ast.parse(source), ".".join(parts).removesuffix(".__init__"))
    documents = [f"{name}\n{text}" for text, name in name_of.items()]
    # In the order of a hash, so that every shard is the same mixture of pages and docstrings.
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
