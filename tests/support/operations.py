"""What other code does with kernels and tables: cells of the tables in docs/kernels.md, each with a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
Operation = Callable[..., Any]
Cell = tuple[str, str]  # an operation and what it is done with


class Operations:
    """The cells of the table whose header begins with `heading`, right or refused."""

    def __init__(self, heading: str, *columns: str) -> None:
        self.heading, self.columns = heading, columns
        self.right: dict[Cell, Operation] = {}
        self.refused: dict[Cell, tuple[Operation, str]] = {}

    def is_right(self, name: str, *columns: str) -> Callable[[Operation], Operation]:
        def add(operation: Operation) -> Operation:
            self.right.update({(name, column): operation for column in columns or self.columns})
            return operation

        return add

    def is_refused(self, name: str, message: str, *columns: str) -> Callable[[Operation], Operation]:
        """With one sentence of the project's own that holds `message`."""

        def add(operation: Operation) -> Operation:
            self.refused.update({(name, column): (operation, message) for column in columns or self.columns})
            return operation

        return add

    def assert_documented(self) -> None:
        """Every cell of the document has its test, and every test its cell."""
        header, _, *rows = DOCUMENT.read_text().split(f"\n| {self.heading} |")[1].split("\n\n")[0].splitlines()
        assert tuple(name.strip(" `") for name in header.strip("| ").split(" | ")) == self.columns
        cells = {}
        for row in rows:
            name, *found = row.strip("| ").split(" | ")
            assert len(found) == len(self.columns), row
            answers = [cell.split(",")[0].split(" ")[0] for cell in found]
            cells.update({(name, column): answer for column, answer in zip(self.columns, answers, strict=True)})
        cells = {cell: answer for cell, answer in cells.items() if answer != "-"}
        assert cells == dict.fromkeys(self.right, "right") | dict.fromkeys(self.refused, "refused")
