"""Column types and functions that SQLite and Postgres spell differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler


class Labels(sa.types.TypeDecorator[tuple[str, ...]]):
    """Short strings without line breaks (tags, scopes), one per line with a break at both ends.

    The breaks make "has this label" one substring search that no other label can satisfy.
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Sequence[str] | None, _dialect: sa.Dialect) -> str | None:
        """Strings to text."""
        if value is None:
            return None
        return "\n" + "".join(f"{label}\n" for label in value)

    def process_result_value(self, value: str | None, _dialect: sa.Dialect) -> tuple[str, ...] | None:
        """Text to strings."""
        if value is None:
            return None
        return tuple(value[1:-1].split("\n")) if len(value) > 1 else ()


class has_label(sa.sql.functions.GenericFunction[bool]):  # noqa: N801 - named as it is used in a statement
    """Whether a `Labels` column holds one label, by case."""

    inherit_cache = True
    name = "has_label"

    def __init__(self, column: sa.ColumnElement[Any], label: str) -> None:
        super().__init__(sa.type_coerce(column, sa.Text), sa.literal(f"\n{label}\n", sa.Text))


@compiles(has_label)
def _has_label_postgres(element: has_label, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **kwargs)}) > 0"


@compiles(has_label, "sqlite")
def _has_label_sqlite(element: has_label, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"instr({compiler.process(element.clauses, **kwargs)}) > 0"
