"""Tables of runs that others wrote: files as they are (bfm/tables) in, checked columns out.

`where` is a row filter such as `dataset == 'rw' and decay != 'chinchilla'`: comparisons of columns with numbers, texts
or lists (`in`, `not in`), joined by and, or, not.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bfm.errors import UserError
from bfm.tables.values import keys, plain
from bfm.tables.whole import read_whole

NUMBER = "number of the row"
"""Among all that were read."""
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda column, values: _is_in(column, values),
    ast.NotIn: lambda column, values: ~_is_in(column, values),
}


def read_table(
    path: str | Path,
    columns: Sequence[str],
    where: str | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> pa.Table:
    """The rows that `where` keeps, with at least the named columns, and their NUMBER.

    Args:
        path: a file, a folder, a glob or a URI.
        columns: as bfm.tables.whole takes them.
        where: a row filter.
        say: is told in lines how files were understood that are not as usual.

    Raises:
        UserError: naming file and column.
    """
    found = read_whole(str(path), columns)
    for words in found.told:
        say(words)
    table = found.table.append_column(NUMBER, pa.array(range(1, found.table.num_rows + 1)))
    if where is not None:
        table = _filter(table, where, str(path))
    if table.num_rows == 0:
        raise UserError("no row is left", file=str(path), key="--where", fix="keep at least one row")
    return table


def ids_of(table: pa.Table, column: str) -> pa.Array:
    """A column as texts by the rule for ids: 7, 7.0 and `7.0` are one."""
    return keys(plain(table[column]))[0]


def _filter(table: pa.Table, where: str, path: str) -> pa.Table:
    try:
        expression = _expression(ast.parse(where, mode="eval").body, table.column_names)
        return table.filter(expression)
    except (SyntaxError, pa.ArrowException) as error:
        fix = "compare columns with values: depth >= 8 and kind == 'a'"
        raise UserError(f"{where!r} is no filter ({error})", file=path, key="--where", fix=fix) from error


def _expression(node: ast.expr, columns: Sequence[str]) -> Any:
    match node:
        case ast.BoolOp(op, values):
            parts = [_expression(value, columns) for value in values]
            joined = parts[0]
            for part in parts[1:]:
                joined = joined & part if isinstance(op, ast.And) else joined | part
            return joined
        case ast.UnaryOp(ast.Not(), operand):
            return ~_expression(operand, columns)
        case ast.Compare(ast.Name(name), [compared], [value]) if name in columns and type(compared) in _COMPARISONS:
            return _COMPARISONS[type(compared)](pc.field(name), _literal(value))
        case ast.Compare(ast.Name(name), _, _) if name not in columns:
            raise SyntaxError(f"there is no column {name}")
    raise SyntaxError(f"cannot read {ast.unparse(node)}")


def _is_in(column: pc.Expression, values: Any) -> pc.Expression:
    if not isinstance(values, (list, tuple)):
        raise SyntaxError(f"{values!r} is no list")
    return column.isin(values)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise SyntaxError(f"{ast.unparse(node)} is no value") from error
