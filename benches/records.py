"""Files of figures that several runs of a benchmark add to."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def check(path: Path | None, about: str, columns: Sequence[str]) -> None:
    """That figures may be added to a file: there is none yet, or it begins as this run would have it begin.

    Raises:
        SystemExit: It begins otherwise: it is of another machine or release, or has other columns.
    """
    if path is None or not path.exists():
        return
    with path.open(newline="") as file:
        got = [line.rstrip("\r\n") for line in (file.readline(), file.readline())]
    expected = [f"# {about}", ",".join(columns)]
    if [got[0].strip('"'), got[1]] != expected:
        raise SystemExit(f"{path} begins with {got}, this run's figures need {expected}: give another file")


def append(path: Path | None, about: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Adds rows to a file, which is made where there is none: a line of what they are about, one of columns, and the rows."""
    check(path, about, columns)
    if path is None:
        return
    start = [] if path.exists() else [f"# {about}", ",".join(columns)]
    with path.open("a", newline="") as file:
        file.writelines(f"{line}\n" for line in start)
        csv.writer(file, lineterminator="\n").writerows(rows)
