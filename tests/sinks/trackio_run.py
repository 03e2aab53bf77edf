"""Runs of trackio in a directory of the tests' own, read back from its SQLite file."""

import atexit
import json
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

DIR = Path(tempfile.mkdtemp(prefix="tlens-trackio-"))
# trackio reads it when it is imported, and TRL imports trackio.
os.environ["TRACKIO_DIR"] = str(DIR)
atexit.register(shutil.rmtree, DIR, ignore_errors=True)


def rows(project):
    """[(run, step, metrics)] in the order in which they were logged."""
    return [
        (run, step, json.loads(metrics))
        for run, step, metrics in _asked(project, "run_name, step, metrics from metrics")
    ]


def alerts(project):
    """[(step, level, title, text)]"""
    return _asked(project, "step, level, title, text from alerts")


def traces(project):
    """[(step, key, number among those of its key, messages, metadata)]"""
    wanted = "step, key, trace_index, messages, metadata from traces"
    return [
        (*before, json.loads(messages), json.loads(metadata))
        for *before, messages, metadata in _asked(project, wanted, order="step, trace_index")
    ]


def media(entry):
    """The file of a picture or page in a row."""
    return DIR / "media" / entry["file_path"]


def _asked(project, what, order="id"):
    with closing(sqlite3.connect(DIR / f"{project}.db")) as database:
        return database.execute(f"select {what} order by {order}").fetchall()
