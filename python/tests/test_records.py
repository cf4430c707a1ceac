"""Files of figures that several runs add to: those of another machine, release or shape are refused."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "records", Path(__file__).parents[2] / "benches" / "records.py"
)
records = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(records)

COLUMNS = ("op", "subject", "us")


def test_rows_are_added_to_a_file_of_their_own_kind(tmp_path):
    path, about = tmp_path / "some.csv", "a machine, torch 2.15"
    records.check(None, about, COLUMNS)
    records.append(None, about, COLUMNS, [("decode", "gdn", 1)])
    for us in (1, 2):
        records.append(path, about, COLUMNS, [("decode", "gdn, new", us)])
    whole = '# a machine, torch 2.15\nop,subject,us\ndecode,"gdn, new",1\ndecode,"gdn, new",2\n'
    assert path.read_text() == whole
    for other in [("a machine, torch 2.16", COLUMNS), (about, COLUMNS[:2])]:
        with pytest.raises(SystemExit, match="some.csv begins with .* give another file"):
            records.append(path, *other, [("decode", "gdn", 3)])
    assert path.read_text() == whole
    (tmp_path / "empty.csv").touch()
    with pytest.raises(SystemExit, match="empty.csv begins with"):
        records.check(tmp_path / "empty.csv", about, COLUMNS)
