"""Statements of the hot paths: compiled once per dialect, then run by the driver itself.

Fetching one row of 45 columns takes SQLAlchemy 67 µs although it has the statement in its cache, and the driver 12.
What a create or an exec runs is prepared; for everything else `Connection.execute` is shorter to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import sqlalchemy as sa

Statement = sa.Select[Any] | sa.Insert | sa.Update | sa.Delete


class Prepared:
    """A statement whose values are `bindparam`s; an `sa.insert(table)` takes a value for each column.

    Methods raise what `Connection.execute` raises.
    """

    def __init__(self, statement: Statement) -> None:
        self._statement = statement
        self._compiled: dict[str, _Compiled] = {}

    def first(self, connection: sa.Connection, **values: Any) -> tuple[Any, ...] | None:
        """The first row."""
        compiled = self._for(connection)
        row = compiled.execute(connection, values).fetchone()
        return None if row is None else compiled.converted(row)

    def rows(self, connection: sa.Connection, **values: Any) -> list[tuple[Any, ...]]:
        """All rows."""
        compiled = self._for(connection)
        return [compiled.converted(row) for row in compiled.execute(connection, values).fetchall()]

    def run(self, connection: sa.Connection, **values: Any) -> int:
        """How many rows it changed."""
        return int(self._for(connection).execute(connection, values).rowcount)

    def _for(self, connection: sa.Connection) -> _Compiled:
        dialect = connection.dialect
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = self._compiled[dialect.name] = _Compiled(self._statement, dialect)
        return compiled


class _Compiled:
    """The text of a statement, and how values and columns are converted."""

    def __init__(self, statement: Statement, dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        if compiled.positiontup is None:
            raise TypeError(f"the driver for {dialect.name} does not number its parameters")
        self._text = str(compiled)
        self._dialect = dialect
        binds = [compiled.binds[name] for name in compiled.positiontup]
        self._constants = {bind.key: bind.effective_value for bind in binds if not bind.required}
        self._given = [(bind.key, bind.type.dialect_impl(dialect).bind_processor(dialect)) for bind in binds]
        columns = statement.selected_columns if isinstance(statement, sa.Select) else ()
        found = (column.type.dialect_impl(dialect).result_processor(dialect, None) for column in columns)
        self._found = [(index, convert) for index, convert in enumerate(found) if convert is not None]

    def execute(self, connection: sa.Connection, values: dict[str, Any]) -> Any:
        """The driver's cursor."""
        values = self._constants | values
        parameters = [values[name] if convert is None else convert(values[name]) for name, convert in self._given]
        driver: Any = connection.connection.driver_connection
        try:
            return driver.execute(self._text, parameters)
        except self._dialect.loaded_dbapi.Error as error:
            self._fail(error, parameters)

    def converted(self, row: Sequence[Any]) -> tuple[Any, ...]:
        """A row of the driver's with the values of the statement's types."""
        if not self._found:
            return tuple(row)
        values = list(row)
        for index, convert in self._found:
            values[index] = convert(values[index])
        return tuple(values)

    def _fail(self, error: Exception, parameters: list[Any]) -> NoReturn:
        dbapi_error = self._dialect.loaded_dbapi.Error
        raise sa.exc.DBAPIError.instance(self._text, parameters, error, dbapi_error, dialect=self._dialect) from error
