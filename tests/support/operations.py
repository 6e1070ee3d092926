"""What other code does with a kernel or a table: right or refused, as docs/kernels.md lists it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
Operation = Callable[..., Any]


class Operations:
    """The cells of one documented table: `heading` is that of its first column."""

    def __init__(self, heading: str) -> None:
        self.heading = heading
        self.right: dict[str, Operation] = {}
        self.refused: dict[str, tuple[Operation, str]] = {}

    def is_right(self, name: str) -> Callable[[Operation], Operation]:
        def add(operation: Operation) -> Operation:
            self.right[name] = operation
            return operation

        return add

    def is_refused(self, name: str, message: str) -> Callable[[Operation], Operation]:
        """With a sentence of the project's own that holds `message`."""

        def add(operation: Operation) -> Operation:
            self.refused[name] = operation, message
            return operation

        return add

    def documented(self) -> tuple[set[str], set[str]]:
        """The names that the document calls right, and those that it calls refused."""
        table = DOCUMENT.read_text().split(f"| {self.heading} |")[1].split("\n\n")[0]
        rows = re.findall(r"^\| (.+?) \| (right|refused)\b", table, re.M)
        return {name for name, cell in rows if cell == "right"}, {name for name, cell in rows if cell == "refused"}
