"""The votes on disk: `FOLDER/votes/NAME.sqlite`, to which events are appended and in which nothing is ever changed.

A vote is acknowledged when `append` returns: SQLite's log is then written and synced (WAL, synchronous=FULL), so neither a
killed server nor a power cut takes it back. Reading has its own connection and waits for no writer.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import sqlite3
import threading
from contextlib import closing
from dataclasses import astuple, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dedpo_diffusion.core.console import UserError
from dedpo_diffusion.voting.queue import Event

SCHEMA = 1
TABLES = """
BEGIN;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE events (
    number INTEGER PRIMARY KEY,
    rater TEXT NOT NULL,
    pair_id TEXT NOT NULL,
    again INTEGER NOT NULL CHECK (again IN (0, 1)),
    kind TEXT NOT NULL CHECK (kind IN ('vote', 'undo')),
    answer TEXT CHECK (answer IN ('left', 'right', 'tie', 'skip')),
    swapped INTEGER CHECK (swapped IN (0, 1)),
    seconds REAL,
    time TEXT NOT NULL,
    undoes INTEGER UNIQUE REFERENCES events (number),
    CHECK ((kind = 'undo') = (answer IS NULL) AND (kind = 'undo') = (undoes IS NOT NULL))
);
CREATE TRIGGER no_change BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are only ever appended'); END;
CREATE TRIGGER no_removal BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are only ever appended'); END;
"""
RANKED = TABLES.replace("answer TEXT CHECK (answer IN ('left', 'right', 'tie', 'skip'))", "answer TEXT")  # rankings.py writes them
COLUMNS = [column.name for column in fields(Event)]


def store_path(folder: Path, name: str) -> Path:
    """Where the votes of this name are kept."""
    return Path(folder) / "votes" / f"{name}.sqlite"


def read_store(path: Path) -> tuple[dict[str, Any], list[Event]]:
    """The meta and the events of a store that another process may have open, or had open when it was killed; nothing is written.

    Raises:
        UserError: the file is no store.
    """
    logged = path.with_name(f"{path.name}-wal").exists()  # without a log nobody writes, and SQLite need not write beside the file
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{'' if logged else '&immutable=1'}", uri=True)) as reader:
            if not reader.execute("SELECT name FROM sqlite_master WHERE name = 'meta'").fetchone():
                return {}, []
            return {key: json.loads(value) for key, value in reader.execute("SELECT key, value FROM meta")}, _events(reader)
    except sqlite3.Error as error:
        raise UserError(f"{path} cannot be read as votes ({error}); restore it, or remove it") from error


def _events(reader: sqlite3.Connection) -> list[Event]:
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in reader.execute(f"SELECT {', '.join(COLUMNS)} FROM events ORDER BY number")]
    for row in rows:
        row["again"] = bool(row["again"])
        row["swapped"] = None if row["swapped"] is None else bool(row["swapped"])
    return [Event(**row) for row in rows]


class Store:
    """The events of one voting; one process at a time has it open.

    Args:
        folder: the pair dataset, or the sample folder of the arm.
        name: name of the voting, and of the file it makes.
        design: what must not change while votes are collected: seed, repeats, overlap; of a pair dataset also dataset (a fingerprint),
            order, judges (their label files' digests), floor; of sample folders images (a fingerprint). JSON-ready.

    Raises:
        UserError: another process has it open, it holds votes of another design, or the file is no store.
    """

    def __init__(self, folder: Path, name: str, design: dict[str, Any]) -> None:
        self.path = store_path(folder, name)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._guard = open(self.path.with_suffix(".lock"), "w")  # noqa: SIM115 - held open; the system lets go of it if we are killed
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); votes are kept in the dataset's own folder") from error
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._guard.close()
            raise UserError(f"{self.path} is open in another `dedpo vote`; stop that one first, or give another --name") from error
        try:
            self._open(design)
        except BaseException:
            self._guard.close()
            raise

    def _open(self, design: dict[str, Any]) -> None:
        try:
            self._writer = sqlite3.connect(self.path, check_same_thread=False)
            if self._writer.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
                raise UserError(f"{self.path} cannot be kept safely on this file system; put the dataset on a local disk")
            self._writer.execute("PRAGMA synchronous=FULL")
            if not self._writer.execute("SELECT name FROM sqlite_master WHERE name = 'meta'").fetchone():
                self._begin(design)
            meta = {key: json.loads(value) for key, value in self._writer.execute("SELECT key, value FROM meta")}
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path} cannot be read as votes ({error}); restore it, or give another --name") from error
        if meta.get("schema") != SCHEMA:
            raise UserError(
                f"{self.path} is of version {meta.get('schema')}, not {SCHEMA}; use the program that began it, or another --name"
            )
        self._check_design(meta, json.loads(json.dumps(design)))
        self.session, self.secret = str(meta["session"]), bytes.fromhex(meta["secret"])

    def _begin(self, design: dict[str, Any]) -> None:
        """Tables and meta in one transaction: a killed process leaves all of it or nothing."""
        self._writer.executescript(RANKED if design.get("rank") else TABLES)
        meta = {"schema": SCHEMA, "session": secrets.token_hex(8), "secret": secrets.token_hex(32), **design}
        self._writer.executemany("INSERT INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in meta.items()])
        self._writer.commit()

    def _check_design(self, meta: dict[str, Any], design: dict[str, Any]) -> None:
        changed = []
        for key, now in design.items():
            then = meta.get(key, False)  # votings that are older than --rank do not say
            if then == now:
                continue
            if key == "dataset":
                changed.append("other pairs than the dataset holds now")
            elif key == "images":
                changed.append("other images than the two folders hold now")
            elif key == "judges" and sorted(meta[key]) == sorted(now):
                changed.append("; ".join(f"labels/{name}.parquet as it was then" for name in now if meta[key][name] != now[name]))
            elif key == "judges":
                changed.append(f"judges {' '.join(sorted(meta[key])) or 'none'} (now {' '.join(sorted(now)) or 'none'})")
            else:
                changed.append(f"{key} {then} (now {now})")
        if changed and "rank" in design and meta.get("rank", False) != design["rank"]:  # the tables differ
            raise UserError(f"{self.path} was begun with {', '.join(changed)}; continue with the same, or give another --name")
        if changed and not self._writer.execute("SELECT 1 FROM events LIMIT 1").fetchone():  # nothing hangs on the old one yet
            with self._writer:
                self._writer.executemany("REPLACE INTO meta VALUES (?, ?)", [(key, json.dumps(value)) for key, value in design.items()])
        elif changed:
            raise UserError(f"{self.path} was begun with {', '.join(changed)}; continue with the same, or give another --name")

    def append(self, **values: Any) -> Event:
        """Store one event, on disk when this returns; its number and time are added to the values given."""
        row = {"answer": None, "swapped": None, "seconds": None, "undoes": None} | values
        row["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock, self._writer:
            row["number"] = self._writer.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM events").fetchone()[0]
            event = Event(**row)
            self._writer.execute(f"INSERT INTO events ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})", astuple(event))
        return event

    def events(self) -> list[Event]:
        """Every event in the order it was stored."""
        with closing(sqlite3.connect(self.path)) as reader:
            return _events(reader)

    def close(self) -> None:
        """Wait for a vote being written, then let the file go."""
        with self._lock:
            self._writer.close()
            self._guard.close()
