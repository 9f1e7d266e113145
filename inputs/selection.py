"""--where: which rows of a table an evaluation is about, as one expression over its columns.

    side == 'RIGHT'        side == RIGHT        density in (3, 4) and not (view == MLO)        40 <= age < 60

The text is parsed by Python's own grammar and never run: comparisons of a column with a value, `in`, `and`, `or` and
`not` are understood, and everything else is refused.
"""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inputs.conventions import empty
from inputs.metadata import column_name

Row = dict[str, str]
Test = Callable[[Row], bool]
_ORDER: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_TURNED = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}
UNDERSTOOD = "a column and a value with ==, !=, <, <=, >, >= or in (...), joined by and, or, not"
MOST_SHOWN = 20  # values of a column in a message


@dataclass(frozen=True)
class Selection:
    """An expression; "" selects every row."""

    text: str = ""
    given_by: str = "--where"  # for messages: the flag, or the catalog's key

    def __post_init__(self) -> None:
        if self.text.strip():
            self._parsed()

    def __bool__(self) -> bool:
        return bool(self.text.strip())

    def of(self, rows: Sequence[Row], where: str) -> list[bool]:
        """Whether each row of a table is selected.

        Args:
            rows: by the columns' names as metadata.read_table spells them.
            where: the table, for messages.

        Raises:
            ValueError: a column that the table lacks, a value that its column never has, a cell that is no number
                where numbers are compared; with the valid choices.
        """
        if not self:
            return [True] * len(rows)
        test = _Reading(self, rows, where).test(self._parsed())
        return [test(row) for row in rows]

    def _parsed(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            hint = "; == compares" if "=" in self.text.replace("==", "") else ""
            raise ValueError(
                f"{self.given_by} {self.text!r} is no expression{hint}; a value or column that is no plain word has to "
                f"be in quotation marks: {UNDERSTOOD}"
            ) from error

    def refused(self, why: str) -> ValueError:
        """The error about this expression."""
        return ValueError(f"{self.given_by} {self.text!r}: {why}")


@dataclass(frozen=True)
class _Reading:
    """An expression against the rows of one table."""

    selection: Selection
    rows: Sequence[Row]
    where: str

    def test(self, node: ast.expr) -> Test:
        """What a part of the expression asks of a row."""
        if isinstance(node, ast.BoolOp):
            tests, every = [self.test(value) for value in node.values], isinstance(node.op, ast.And)
            return lambda row: (all if every else any)(test(row) for test in tests)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.test(node.operand)
            return lambda row: not inner(row)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            tests = [self.compared(a, op, b) for a, op, b in zip(sides, node.ops, sides[1:], strict=False)]
            return lambda row: all(test(row) for test in tests)
        raise self.selection.refused(f"{ast.unparse(node)} is not understood; it takes {UNDERSTOOD}")

    def compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Test:
        """One comparison, the column on either side of it."""
        if self.column(left) is None and self.column(right) is not None and not isinstance(op, (ast.In, ast.NotIn)):
            left, right, op = right, left, _TURNED.get(type(op), type(op))()
        if (column := self.column(left)) is None:
            raise self.selection.refused(
                f"{self.where} has no column {self.word(left)}; choose from {', '.join(self.columns())}"
            )
        if isinstance(op, (ast.Eq, ast.NotEq)):
            wanted = {self.known(column, right)}
            return lambda row: (plain(row[column]) in wanted) == isinstance(op, ast.Eq)
        if isinstance(op, (ast.In, ast.NotIn)):
            several = right.elts if isinstance(right, (ast.Tuple, ast.List, ast.Set)) else [right]
            wanted = {self.known(column, value) for value in several}
            return lambda row: (plain(row[column]) in wanted) == isinstance(op, ast.In)
        if (compare := _ORDER.get(type(op))) is None:
            raise self.selection.refused(f"it takes {UNDERSTOOD}")
        limit = number(self.word(right))
        if limit is None:
            raise self.selection.refused(f"{self.word(right)!r} is no number to compare {column} with")
        numbers = {cell: number(cell) for cell in {row[column] for row in self.rows}}
        if bad := sorted(cell for cell, value in numbers.items() if value is None and not empty(cell)):
            raise self.selection.refused(
                f"{self.where}: {column} is not a number everywhere, it is {bad[0]!r} in a row"
            )
        return lambda row: (value := numbers[row[column]]) is not None and compare(value, limit)

    def columns(self) -> list[str]:
        """The table's own."""
        return [name for name in (self.rows[0] if self.rows else {}) if name]

    def column(self, node: ast.expr) -> str | None:
        """The column that a side of a comparison names; None for none."""
        if not isinstance(node, ast.Name) and not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            return None
        name = column_name(self.word(node))
        return name if name in self.columns() else None

    def word(self, node: ast.expr) -> str:
        """A side of a comparison as text: a name, quoted or not, or a number."""
        sign = ""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            sign, node = "-", node.operand
        if isinstance(node, ast.Name):
            return sign + node.id
        if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, int, float))):
            return sign + str(node.value)
        raise self.selection.refused(f"{ast.unparse(node)} is no column and no value; quote what is no plain word")

    def known(self, column: str, node: ast.expr) -> str:
        """A value that the column has in some row."""
        value = plain(self.word(node))
        there = Counter(plain(row[column]) for row in self.rows)
        if value not in there:
            shown = ", ".join(repr(cell) for cell, _ in there.most_common(MOST_SHOWN))
            more = f" and {len(there) - MOST_SHOWN} more" if len(there) > MOST_SHOWN else ""
            raise self.selection.refused(
                f"no row of {self.where} has {column} {self.word(node)!r}; its values: {shown}{more}"
            )
        return value


def plain(cell: str) -> str:
    """A cell as it is compared: 3, 3.0 and 03.00 are not told apart, other text is as it stands."""
    value = number(cell)
    return cell if value is None else repr(value)


def number(cell: str) -> float | None:
    """A cell's number; None where it is none (NaN and infinities are words)."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if value - value == 0 else None


def selected(
    selection: Selection, rows: Sequence[Row], where: str, cells: Sequence[tuple[str, str]], gone: bool
) -> tuple[list[bool], list[str]]:
    """Whether each row of a table is selected, and the lines to be logged.

    Args:
        rows: as `Selection.of` takes them, with their (split, class) in `cells`.
        gone: whether a class may be left out of all splits, and then is no class.

    Raises:
        ValueError: as `Selection.of`; a split without rows, or without those of a class that it had.
    """
    kept = selection.of(rows, where)
    if not selection:
        return kept, []
    left = [cell for cell, keep in zip(cells, kept, strict=True) if keep]
    before, after = Counter(cells), Counter(left)
    splits, classes = {split for split, _ in left}, {name for _, name in left}
    for split in dict.fromkeys(split for split, _ in cells):
        if split not in splits:
            raise selection.refused(f"no row of the split {split!r} is left")
    for (split, name), n in before.items():
        if not after[split, name] and (name in classes or not gone):
            raise selection.refused(f"none of the {n} rows of class {name} in the split {split!r} is left")
    lines = [f"--where {selection.text}: {sum(kept):,} of {len(kept):,} rows are left"]
    lost = sorted({name for _, name in cells} - classes)
    return kept, lines + [f"--where {selection.text}: no row of class {name} is left, it is no class" for name in lost]
