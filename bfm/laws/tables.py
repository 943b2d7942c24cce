"""Tables of runs that others wrote: Parquet, CSV or JSON lines in, checked columns out.

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
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from bfm.errors import UserError

NUMBER = "number of the row in its file"
_READERS: dict[str, Callable[[str], pa.Table]] = {
    ".parquet": pyarrow.parquet.read_table,
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
}
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


def read_table(path: str | Path, columns: Sequence[str], where: str | None = None) -> pa.Table:
    """The rows that `where` keeps, with at least the named columns, and their NUMBER in the file.

    Raises UserError naming file and column.
    """
    place = Path(path)
    reader = _READERS.get(place.suffix)
    if reader is None:
        raise UserError(f"{place.suffix or 'no'} suffix", file=str(path), fix=f"one of {', '.join(_READERS)}")
    if not place.is_file():
        raise UserError("there is no such file", file=str(path), fix="check the path")
    try:
        table = reader(str(path))
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        fix = f"write it as {place.suffix[1:]} in UTF-8"
        raise UserError(f"cannot be read ({error})", file=str(path), fix=fix) from error
    for name in columns:
        count = table.column_names.count(name)
        if count != 1:
            what = f"there are {count} columns {name!r}" if count else f"there is no column {name!r}"
            fix = "give each a name of its own" if count else f"its columns are {', '.join(table.column_names)}"
            raise UserError(what, file=str(path), fix=fix)
    table = table.append_column(NUMBER, pa.array(range(1, table.num_rows + 1)))
    if where is not None:
        table = _filter(table, where, str(path))
    if table.num_rows == 0:
        raise UserError("no row is left", file=str(path), key="--where" if where else None, fix="keep at least one row")
    return table


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
