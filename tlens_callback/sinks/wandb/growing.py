"""`GrowingTables`: tables of a W&B run to which each observation adds its rows."""

from collections.abc import Callable
from typing import Any

import pandas as pd

from tlens_callback.sinks.shown import cells
from tlens_callback.sinks.wandb.rows import empty_table


class GrowingTables:
    """Keeps a table for each key, and adds the rows of an observation to it.

    W&B shows only the last of several tables that are logged under one key, so that nobody sees
    what an earlier one said; and a key for each step would fill the run page with panels. A table
    of log mode "INCREMENTAL" is the third way: each row of the run's history uploads only the new
    rows, and the run page shows those of the latest 100 increments together, to be sorted and
    filtered by their column "step".

    Columns that an observation lacks are empty, and those that the first one did not have are left
    out: W&B's tables cannot be given a column later.
    """

    def __init__(self, wandb: Any) -> None:
        self._wandb = wandb
        self._tables: dict[str, Any] = {}

    def adds(self, key: str, frame: pd.DataFrame) -> Callable[[], Any]:
        """Returns a function that adds rows and returns the table.

        It is to be called when the row of the history is logged: W&B uploads what was added since
        the table was logged the last time.
        """

        def add() -> Any:
            if key not in self._tables:
                self._tables[key] = empty_table(self._wandb, frame, log_mode="INCREMENTAL")
            table = self._tables[key]
            columns = cells(frame.reindex(columns=table.columns))
            for row in zip(*columns.values(), strict=True):
                table.add_data(*row)
            return table

        return add

    def clear(self) -> None:
        """Forgets the tables: another run begins."""
        self._tables.clear()
