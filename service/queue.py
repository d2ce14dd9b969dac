"""The queue of a service: jobs in SQLite, with one state machine.

    queued -> running -> done | failed | cancelled
    queued -> cancelled
    running -> queued                               when its worker or the service has died

Each change is one UPDATE that names the states it may leave, in a transaction that is on the disk when it returns: of
two that race one changes nothing, and what was accepted outlives any process. A worker owns a running job by its slot;
only who knows that the slot's process is dead may `release` it.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..wanvideo.errors import InputError

__all__ = ["ENDED", "PRIORITIES", "STATES", "Progress", "Queue", "Record"]

STATES = ("queued", "running", "done", "failed", "cancelled")
ENDED = ("done", "failed", "cancelled")
PRIORITIES = range(-10, 11)

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    client TEXT NOT NULL,
    request TEXT NOT NULL,
    priority INTEGER NOT NULL,
    time_limit REAL,
    state TEXT NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    slot INTEGER UNIQUE CHECK ((slot IS NOT NULL) = (state = 'running')),
    crashes INTEGER NOT NULL DEFAULT 0,
    cancelling INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    progress TEXT NOT NULL DEFAULT '{}',
    result TEXT NOT NULL DEFAULT '{}'
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (state, priority DESC, number);
CREATE INDEX IF NOT EXISTS of_client ON jobs (client, number);
"""


@dataclass(frozen=True)
class Progress:
    """How far a running job is: what it does, windows in the file of all, steps of the window that is being made."""

    stage: str = ""
    windows_done: int = 0
    windows: int = 0
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Record:
    """A job as the queue knows it.

    Attributes:
        number: in order of acceptance, from 1 on.
        request: what to make, as the client asked for it.
        priority: one of `PRIORITIES`; the higher, the sooner.
        time_limit: seconds that an attempt may take; None: no limit.
        created, started, ended: seconds since 1970; `started` of the latest attempt.
        slot: number of the worker that runs it.
        crashes: workers that died while they ran it.
        cancelling: whether it is to be cancelled as soon as its worker can.
        error: why it failed, one sentence.
        result: what `make_video` said of it.
    """

    number: int
    id: str
    client: str
    request: Mapping[str, Any]
    priority: int
    time_limit: float | None
    state: str
    created: float
    started: float | None
    ended: float | None
    slot: int | None
    crashes: int
    cancelling: bool
    error: str | None
    progress: Progress
    result: Mapping[str, Any]

    @property
    def late(self) -> bool:
        """Whether the attempt that runs has used up its time."""
        return self.time_limit is not None and self.started is not None and time.time() - self.started > self.time_limit


COLUMNS = ", ".join(entry.name for entry in fields(Record))


class Queue:
    """The jobs in a file, for any number of processes and threads.

    Args:
        path: the database, made where there is none.
        retries: how many workers may die while they run a job, before it fails.

    Raises InputError for a file that is no such database.
    """

    def __init__(self, path: str | Path, retries: int = 1) -> None:
        self.path, self.retries = Path(path), retries
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.executescript(SCHEMA)
            self._database.execute(f"SELECT {COLUMNS} FROM jobs LIMIT 1")
        except sqlite3.Error as error:
            raise InputError(f"{path} cannot be used as a queue ({error}): name another folder.") from error

    def close(self) -> None:
        with self._lock:
            self._database.close()

    # --- clients

    def add(
        self, id: str, client: str, request: Mapping[str, Any], priority: int = 0, time_limit: float | None = None
    ) -> Record:
        """Accept a job; on return it is on the disk."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO jobs (id, client, request, priority, time_limit, created) VALUES (?, ?, ?, ?, ?, ?)",
                (id, client, json.dumps(request), priority, time_limit, time.time()),
            )
        return self.get(id)

    def get(self, id: str) -> Record:
        """Raises KeyError where there is no such job."""
        found = self._select("WHERE id = ?", id)
        if not found:
            raise KeyError(id)
        return found[0]

    def jobs(self, client: str | None = None, state: str | None = None, last: int = 1000) -> list[Record]:
        """The latest `last` jobs, of a client, in a state; the newest first."""
        where = "WHERE (?1 IS NULL OR client = ?1) AND (?2 IS NULL OR state = ?2) ORDER BY number DESC LIMIT ?3"
        return self._select(where, client, state, last)

    def ahead(self, job: Record) -> int:
        """Queued jobs that begin before this one."""
        with self._lock:
            (count,) = self._database.execute(
                "SELECT count(*) FROM jobs WHERE state = 'queued' AND (priority > ?1 OR priority = ?1 AND number < ?2)",
                (job.priority, job.number),
            ).fetchone()
        return int(count)

    def counts(self, client: str | None = None) -> dict[str, int]:
        """State -> jobs in it."""
        with self._lock:
            rows = self._database.execute(
                "SELECT state, count(*) FROM jobs WHERE ?1 IS NULL OR client = ?1 GROUP BY state", (client,)
            ).fetchall()
        return dict.fromkeys(STATES, 0) | dict(rows)

    def cancel(self, id: str) -> Record:
        """Cancel a job that is queued at once, and ask the worker of one that runs; others stay as they are."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state = 'cancelled', ended = ? WHERE id = ? AND state = 'queued'", (time.time(), id)
            )
            database.execute("UPDATE jobs SET cancelling = 1 WHERE id = ? AND state = 'running'", (id,))
        return self.get(id)

    def delete(self, id: str) -> bool:
        """Forget a job that has ended; False for any other."""
        with self._transaction() as database:
            ended = f"({', '.join('?' * len(ENDED))})"
            changed = database.execute(f"DELETE FROM jobs WHERE id = ? AND state IN {ended}", (id, *ENDED)).rowcount
        return changed == 1

    # --- workers

    def claim(self, slot: int) -> Record | None:
        """The next job for this worker, now running; None where none waits, and while it runs another."""
        with self._transaction() as database:
            row = database.execute(
                "UPDATE jobs SET state = 'running', slot = ?, started = ?, progress = '{}' WHERE number = "
                "(SELECT number FROM jobs WHERE state = 'queued' ORDER BY priority DESC, number LIMIT 1) "
                f"AND NOT EXISTS (SELECT 1 FROM jobs WHERE slot = ?) RETURNING {COLUMNS}",
                (slot, time.time(), slot),
            ).fetchone()
        return None if row is None else _record(row)

    def report(self, id: str, slot: int, progress: Progress) -> None:
        """Note how far a running job is."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET progress = ? WHERE id = ? AND state = 'running' AND slot = ?",
                (json.dumps(vars(progress)), id, slot),
            )

    def end(
        self, id: str, slot: int, state: str, *, error: str | None = None, result: Mapping[str, Any] | None = None
    ) -> bool:
        """Bring a job that this worker runs to one of `ENDED`; False where it does not run it any more."""
        assert state in ENDED
        with self._transaction() as database:
            changed = database.execute(
                "UPDATE jobs SET state = ?, slot = NULL, cancelling = 0, ended = ?, error = ?, result = ? "
                "WHERE id = ? AND state = 'running' AND slot = ?",
                (state, time.time(), error, json.dumps(result or {}), id, slot),
            ).rowcount
        return changed == 1

    # --- who knows that a worker is dead

    def running(self) -> list[Record]:
        return self._select("WHERE state = 'running' ORDER BY number")

    def release(self, slot: int, *, crashed: bool) -> Record | None:
        """Take the running job from a worker that is dead: it is queued again, in its old place, or ends.

        Args:
            crashed: the worker died by itself, not with the service: the job may be the reason.
        """
        for job in self.running():
            if job.slot != slot:
                continue
            crashes = job.crashes + crashed
            state, error = "queued", None
            if job.cancelling:
                state = "cancelled"
            elif crashed and job.late:
                state, error = "failed", f"The time limit of {job.time_limit:g} s was over."
            elif crashes > self.retries:
                state, error = "failed", f"Its worker died {crashes} times; the log of the service says more."
            with self._transaction() as database:
                database.execute(
                    "UPDATE jobs SET state = ?, slot = NULL, cancelling = 0, crashes = ?, error = ?, ended = ? "
                    "WHERE number = ? AND state = 'running' AND slot = ?",
                    (state, crashes, error, None if state == "queued" else time.time(), job.number, slot),
                )
            return self.get(job.id)
        return None

    # --- the database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _select(self, where: str, *values: Any) -> list[Record]:
        with self._lock:
            rows = self._database.execute(f"SELECT {COLUMNS} FROM jobs {where}", values).fetchall()
        return [_record(row) for row in rows]


def _record(row: tuple[Any, ...]) -> Record:
    values = dict(zip((entry.name for entry in fields(Record)), row, strict=True))
    values["request"], values["result"] = json.loads(values["request"]), json.loads(values["result"])
    values["progress"] = Progress(**json.loads(values["progress"]))
    values["cancelling"] = bool(values["cancelling"])
    return Record(**values)
