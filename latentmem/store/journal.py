"""The database of a store: memories, and for each the linear journal of its versions, which is their lineage too."""

from __future__ import annotations

import contextlib
import errno
import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from latentmem.errors import DamagedError, InUseError, NameTakenError, NotFoundError
from latentmem.store.schema import ACCOUNTS, SCHEMA

FORMAT = 3  # 2, and versions that were pruned, which a reader of 2 would pass over without a word
UNPRUNED = 2  # as a store begins
OLDER = "4f1b448"  # the last commit that reads format 1
KEPT = 64  # accounts of a memory
LATEST = 1e11  # seconds since 1970: the year 5138
EVENTS = ("create", "import", "write", "rollback", "fork", "pin", "unpin", "forget", "expire")
BEGINNINGS = ("create", "import")  # events that have no base
STATES = ("pending", "applied", "failed")
KINDS = ("snapshot", "delta", "none", "pruned")
BUSY, LATER = "another process uses the store", "try again later."


@dataclass(frozen=True)
class Row:
    """One version of one memory: state = event applied to the state of its base; `views.Version` shows it.

    Args:
        memory: id of the memory.
        base: id of the version that it was made from, in this memory or, for a fork, in another; None for the first.
        payload: what the event says: source, text or ids, role, sha256 and tokens of a write; the source of others.
        attempts: how often applying it was begun.
        kind: what `object` is: a "snapshot", a "delta" to the base, "none" where the event says all, or "pruned":
            it is gone.
        object: hash of that object.
        facts: as in `Version`; "ids": hash of the token ids that were written; "blocks": hash -> size of the objects
            that a snapshot refers to, "coder": which of them is a coder; "size": of a snapshot of it, about; "shares":
            such a snapshot refers to the objects of updates; "pruned": the version can not be opened any more, though
            a later one may need its object.
        time: seconds since 1970.
        seq: number of the version within the memory, from 0.
        id: unique in the store and never used again; 0 = not stored yet. A base has a smaller one.
    """

    memory: int
    event: str
    base: int | None
    payload: dict[str, Any]
    key: str | None = None
    state: str = "applied"
    error: str | None = None
    attempts: int = 0
    kind: str = "none"
    object: str | None = None
    bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    time: float = 0.0
    seq: int = 0
    id: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The objects that its snapshot refers to, name -> bytes."""
        return self.facts.get("blocks", {})

    @property
    def objects(self) -> dict[str, int]:
        """All objects that it refers to, name -> bytes."""
        return ({self.object: self.bytes} if self.object else {}) | self.parts

    @property
    def pruned(self) -> bool:
        return bool(self.facts.get("pruned"))


COLUMNS = tuple(column.name for column in fields(Row))
SELECT = f"SELECT {', '.join(COLUMNS)} FROM versions"


class Journal:
    """The SQLite file of a store; used by all threads of a process through one connection, one at a time.

    Args:
        path: the file; made if it is not there.
        timeout: seconds to wait for another process.

    Raises:
        ValueError: not a store, of another format, or damaged.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._lock = threading.RLock()
        self._path = path
        self._depth = 0
        with self._sentences():
            self._connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
                self._connection.execute(f"PRAGMA {pragma}")
        with self.transaction():
            (number,) = self._one("PRAGMA user_version")
            if number == 0:
                for statement in (*SCHEMA.split(";\n"), f"PRAGMA user_version={UNPRUNED}"):
                    self._connection.execute(statement)
            elif number not in (UNPRUNED, FORMAT):
                remedy = f"Commit {OLDER} of latentmem reads it." if number < UNPRUNED else "Update latentmem."
                raise ValueError(
                    f"{path} has the format {number}, this version reads {UNPRUNED} and {FORMAT}. {remedy}"
                )
            for statement in ACCOUNTS:
                self._connection.execute(statement)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @property
    def stamp(self) -> tuple[int, int]:
        """Another one after each change, by whomever."""
        return self._one("PRAGMA data_version")[0], self._connection.total_changes

    def transaction(self) -> AbstractContextManager[None]:
        """All or nothing, durable when it ends, alone among processes and threads.

        Raises:
            OSError: the disk is full or not writable; nothing has changed.
            ValueError: another process keeps the database busy, or it is damaged.
        """
        return self._within("BEGIN IMMEDIATE")

    def one_look(self) -> AbstractContextManager[None]:
        """What is read inside belongs together, whatever others change meanwhile; nothing is to be written in it."""
        return self._within("BEGIN")

    @contextlib.contextmanager
    def _within(self, begin: str) -> Iterator[None]:
        with self._lock, self._sentences():
            if self._depth == 0:
                self._connection.execute(begin)
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self._connection.execute("COMMIT")
            except BaseException:
                if self._depth == 1 and self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turn the library's errors into those of this package."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            if name == "SQLITE_FULL":
                raise OSError(errno.ENOSPC, "the disk is full; nothing was changed", str(self._path)) from error
            if name.startswith(("SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN")):
                raise OSError(errno.EIO, f"the database can not be used ({error})", str(self._path)) from error
            if name.startswith("SQLITE_BUSY"):
                raise InUseError(f"another process keeps {self._path} busy; {LATER}", f"{BUSY}; {LATER}") from error
            if name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
                raise DamagedError(f"{self._path} is damaged or no store ({error}). Restore it from a copy.") from error
            raise

    def _all(self, sql: str, *values: Any) -> list[tuple]:
        with self._lock, self._sentences():
            return self._connection.execute(sql, values).fetchall()

    def _one(self, sql: str, *values: Any) -> tuple:
        return (self._all(sql, *values) or [()])[0]

    def _do(self, sql: str, *values: Any) -> int:
        with self.transaction():
            return self._connection.execute(sql, values).lastrowid or 0

    # --- settings ---------------------------------------------------------------------------------------------------

    def setting(self, name: str, default: str) -> str:
        """What a setting was when the store was made; `default` makes it."""
        with self.transaction():
            self._do("INSERT OR IGNORE INTO settings VALUES (?, ?)", name, default)
            return self._one("SELECT value FROM settings WHERE name = ?", name)[0]

    def keep_setting(self, name: str, value: str) -> None:
        self._do("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, value)

    def needs_sweep(self) -> None:
        """Objects, but no rows, are about to be put down or left that no version refers to."""
        with self.transaction():
            if self.setting("sweep", "no") == "no":
                self.keep_setting("sweep", "objects")

    def swept(self, log: bool) -> None:
        """A sweep of the objects has ended, or one of the log too; a sweep of the log stays due without.

        Objects that somebody is building may have to go later.
        """
        with self.transaction():
            if log or self.setting("sweep", "no") == "objects":
                self.keep_setting("sweep", "objects" if self.building() else "no")

    # --- memories ---------------------------------------------------------------------------------------------------

    def names(self) -> dict[str, int]:
        """All memories: name -> id, by name."""
        return dict(self._all("SELECT name, id FROM memories ORDER BY name"))

    def find(self, name: str) -> int | None:
        """The id of a memory; None: there is none of this name."""
        return (self._one("SELECT id FROM memories WHERE name = ?", name) or (None,))[0]

    def id(self, name: str) -> int:
        """The id of a memory; a NotFoundError if there is none of this name."""
        memory = self.find(name)
        if memory is None:
            raise NotFoundError.memory(name, self.names())
        return memory

    def name(self, memory: int) -> str:
        return self._one("SELECT name FROM memories WHERE id = ?", memory)[0]

    def overview(self, names: Collection[str] | None) -> list[tuple[str, int, int, int, float, int]]:
        """Memories, by default all, by name: (name, id, versions, pending ones, time of the newest, bytes).

        Each object counts once. Coders do not count: a store keeps one for all memories of a model.
        """
        where = "" if names is None else f"WHERE name IN ({', '.join('?' * len(names))})"
        size = """SELECT COALESCE(SUM(size), 0) FROM (
                    SELECT object AS name, bytes AS size FROM versions WHERE memory = memories.id AND object IS NOT NULL
                    UNION SELECT json_each.key, json_each.value FROM versions, json_each(versions.facts, '$.blocks')
                    WHERE memory = memories.id AND kind = 'snapshot'
                    AND json_each.key IS NOT json_extract(versions.facts, '$.coder'))"""
        sql = f"""SELECT name, memories.id, COUNT(*), SUM(state = 'pending'), MAX(time), ({size})
                 FROM versions JOIN memories ON versions.memory = memories.id {where}
                 GROUP BY memories.id ORDER BY name"""
        return self._all(sql, *(names or ()))

    def add(self, name: str, first: Row) -> Row:
        """A new memory with its first version; a NameTakenError if there is one of this name."""
        with self.transaction():
            self.require_free(name)
            return self.append(replace(first, memory=self._do("INSERT INTO memories (name) VALUES (?)", name)))

    def require_free(self, name: str) -> None:
        if self.find(name) is not None:
            raise NameTakenError(f"there is a memory {name!r} already; choose another name, or delete it.")

    def forks(self, memory: int) -> list[str]:
        """Names of the memories that were forked from this one."""
        sql = """SELECT DISTINCT memories.name FROM versions JOIN versions AS bases ON versions.base = bases.id
                 JOIN memories ON versions.memory = memories.id WHERE bases.memory = ?1 AND versions.memory != ?1"""
        return sorted(name for (name,) in self._all(sql, memory))

    def family(self, memory: int) -> list[int]:
        """Ids of all memories that are connected with this one by forks, itself among them."""
        sql = """WITH RECURSIVE links(a, b) AS (
                   SELECT versions.memory, bases.memory FROM versions JOIN versions AS bases ON versions.base = bases.id
                   WHERE versions.event = 'fork'),
                 family(id) AS (
                   SELECT ? UNION SELECT CASE WHEN a = family.id THEN b ELSE a END
                   FROM links JOIN family ON family.id IN (a, b))
                 SELECT id FROM family ORDER BY id"""
        return [id for (id,) in self._all(sql, memory)]

    def delete(self, memory: int) -> None:
        """Remove a memory and all its versions."""
        with self.transaction():
            self._do("DELETE FROM versions WHERE memory = ?", memory)
            self._do("DELETE FROM expiries WHERE memory = ?", memory)
            self._do("DELETE FROM memories WHERE id = ?", memory)

    # --- versions ---------------------------------------------------------------------------------------------------

    def append(self, row: Row) -> Row:
        """Add a version behind the newest of its memory, and return it with number, id and time."""
        with self.transaction():
            (seq,) = self._one("SELECT COALESCE(MAX(seq), -1) + 1 FROM versions WHERE memory = ?", row.memory)
            return self.insert(replace(row, seq=seq, time=time.time()))

    def insert(self, row: Row) -> Row:
        """Add a version as it is, but for its id."""
        columns = COLUMNS[:-1]
        sql = f"INSERT INTO versions ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        with self.transaction():
            if row.pruned:
                self._do(f"PRAGMA user_version={FORMAT}")
            return replace(row, id=self._do(sql, *_values(row)[:-1]))

    def change(self, row: Row) -> None:
        """Replace what is stored of a version."""
        self._do(f"UPDATE versions SET {', '.join(f'{c} = ?' for c in COLUMNS)} WHERE id = ?", *_values(row), row.id)

    def prune(self, versions: Iterable[int], empty: Iterable[int]) -> None:
        """Mark versions as pruned, and take the objects of those from which no other is read."""
        nothing = "kind = 'pruned', object = NULL, bytes = 0, facts = json_remove(facts, '$.blocks')"
        with self.transaction():
            self._do(f"PRAGMA user_version={FORMAT}")
            for version in versions:
                self._do("UPDATE versions SET facts = json_set(facts, '$.pruned', json('true')) WHERE id = ?", version)
            for version in empty:
                self._do(f"UPDATE versions SET {nothing} WHERE id = ?", version)

    def remove(self, rows: Iterable[int]) -> None:
        """Remove versions that no other is made from, the newest first."""
        with self.transaction():
            for row in rows:
                self._do("DELETE FROM versions WHERE id = ?", row)

    def renumber(self, row: int, seq: int) -> None:
        self._do("UPDATE versions SET seq = ? WHERE id = ?", seq, row)

    def row(self, id: int) -> Row:
        """A version; a ValueError if a replay or a deletion has taken it away meanwhile."""
        rows = self._rows("WHERE id = ?", id)
        if not rows:
            raise ValueError("a version was rewritten or deleted meanwhile; try again.")
        return rows[0]

    def exists(self, id: int) -> bool:
        return bool(self._rows("WHERE id = ?", id))

    def is_head(self, row: Row) -> bool:
        """Whether a version is there, and the newest of its memory."""
        where = "WHERE id = ? AND seq = (SELECT MAX(seq) FROM versions WHERE memory = ?)"
        return bool(self._rows(where, row.id, row.memory))

    def lineage(self, row: Row) -> Iterator[Row]:
        """A version, the one that it was made from, and so on to the first."""
        yield row
        while row.base is not None:
            row = self.row(row.base)
            yield row

    def deltas(self, row: Row, most: int) -> int:
        """Deltas between a version and the snapshot before it, its own among them; so many at most."""
        sql = """WITH RECURSIVE path(base, kind, count) AS (
                   SELECT base, kind, kind = 'delta' FROM versions WHERE id = ?
                   UNION ALL SELECT versions.base, versions.kind, count + (versions.kind = 'delta')
                   FROM versions JOIN path ON versions.id = path.base WHERE path.kind != 'snapshot' AND count < ?)
                 SELECT MAX(count) FROM path"""
        return self._one(sql, row.id, most)[0]

    def version(self, name: str, seq: int | None = None) -> Row:
        """A version of a memory, by default the newest; a NotFoundError if there is no such memory or version."""
        memory = self.id(name)
        if seq is None:
            return self.head(memory)
        for row in self._rows("WHERE memory = ? AND seq = ?", memory, min(max(seq, -1), 1 << 62)):  # SQLite has 64 bits
            return row
        raise NotFoundError(f"{name!r} has no version {seq}; it has 0 to {self.head(memory).seq}.")

    def history(self, memory: int, after: int | None, limit: int | None, newest_first: bool) -> list[Row]:
        """Versions by number, from the one end or the other, behind a version."""
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        where = f"AND seq {beyond} ?" if after is not None else ""
        sql = f"WHERE memory = ? {where} ORDER BY seq {order} LIMIT ?"
        return self._rows(sql, memory, *([after] if after is not None else []), -1 if limit is None else limit)

    def head(self, memory: int) -> Row:
        """The newest version."""
        return self._rows("WHERE memory = ? ORDER BY seq DESC LIMIT 1", memory)[0]

    def keyed(self, memory: int, key: str) -> Row | None:
        """The version that was written with this idempotency key."""
        return next(iter(self._rows("WHERE memory = ? AND key = ?", memory, key)), None)

    def rows(self, memories: list[int]) -> list[Row]:
        """All versions of some memories, each behind its base."""
        return self._rows(f"WHERE memory IN ({', '.join('?' * len(memories))}) ORDER BY id", *memories)

    def outline(self, memory: int) -> list[Row]:
        """All versions of a memory by number, with nothing in their payloads; they are not to be stored."""
        return self._rows("WHERE memory = ? ORDER BY seq", memory, select=SELECT.replace("payload", "'{}'"))

    def fork_bases(self, memory: int) -> list[int]:
        """Ids of the versions of a memory that forks go on from."""
        sql = """SELECT DISTINCT bases.id FROM versions AS bases JOIN versions ON versions.base = bases.id
                 WHERE bases.memory = ?1 AND versions.memory != ?1"""
        return [id for (id,) in self._all(sql, memory)]

    def pending(self, memory: int) -> list[Row]:
        """Versions that are acknowledged and not applied, in order."""
        return self._rows("WHERE memory = ? AND state = 'pending' ORDER BY seq", memory)

    def has_children(self, row: int) -> bool:
        return bool(self._one("SELECT 1 FROM versions WHERE base = ? LIMIT 1", row))

    def _rows(self, where: str, *values: Any, select: str = SELECT) -> list[Row]:
        rows = []
        for line in self._all(f"{select} {where}", *values):
            named = dict(zip(COLUMNS, line, strict=True))
            rows.append(Row(**named | {name: json.loads(named[name]) for name in ("payload", "facts")}))
        return rows

    def account(self, version: int) -> str | None:
        """What a version holds, if that is kept."""
        return (self._one("SELECT account FROM accounts WHERE version = ?", version) or (None,))[0]

    def keep_account(self, row: Row, account: str) -> None:
        """Keep what a version holds, beside the newest ones of its memory."""
        oldest = f"SELECT version FROM accounts WHERE memory = ? ORDER BY version DESC LIMIT -1 OFFSET {KEPT}"
        with self.transaction():
            there = "SELECT ?, ?, ? WHERE EXISTS (SELECT 1 FROM versions WHERE id = ?)"  # it may have gone meanwhile
            self._do(f"INSERT OR REPLACE INTO accounts {there}", row.id, row.memory, account, row.id)
            self._do(f"DELETE FROM accounts WHERE version IN ({oldest})", row.memory)

    # --- expiries ---------------------------------------------------------------------------------------------------

    def expiries(self, memory: int) -> dict[str, float]:
        """When sources expire: source -> seconds since 1970."""
        return dict(self._all("SELECT source, at FROM expiries WHERE memory = ? ORDER BY source", memory))

    def set_expiry(self, memory: int, source: str, at: float | None) -> None:
        with self.transaction():
            self._do("DELETE FROM expiries WHERE memory = ? AND source = ?", memory, source)
            if at is not None:
                self._do("INSERT INTO expiries VALUES (?, ?, ?)", memory, source, at)

    # --- turns of chats that waited outside of the journal ----------------------------------------------------------

    def has_turns(self) -> bool:
        """Whether an earlier commit has kept turns of chats."""
        return bool(self._all("SELECT 1 FROM sqlite_master WHERE name = 'turns'"))

    def take_turns(self) -> list[tuple[int, dict[str, Any]]]:
        """What an earlier commit kept of chats, (memory, its turns) each; once."""
        with self.transaction():
            if not self.has_turns():
                return []
            kept = [(memory, json.loads(turns)) for memory, turns in self._all("SELECT memory, kept FROM turns")]
            self._do("DROP TABLE turns")
            return kept

    # --- objects ----------------------------------------------------------------------------------------------------

    def objects(self) -> set[str]:
        """Objects that a version refers to, or that a replay or pruning is about to refer to."""
        sql = """SELECT object FROM versions WHERE object IS NOT NULL UNION SELECT object FROM building
                 UNION SELECT json_each.key FROM versions, json_each(versions.facts, '$.blocks')"""
        return {name for (name,) in self._all(sql)}

    def bytes(self) -> int:
        """Bytes of all objects that a version refers to, each counted once."""
        sql = """SELECT COALESCE(SUM(size), 0) FROM (
                   SELECT object AS name, bytes AS size FROM versions WHERE object IS NOT NULL
                   UNION SELECT json_each.key, json_each.value FROM versions, json_each(versions.facts, '$.blocks'))"""
        return self._one(sql)[0]

    def build(self, memory: int, name: str) -> None:
        """Keep an object that a replay or pruning of this memory has made until the versions refer to it."""
        self._do("INSERT INTO building VALUES (?, ?)", name, memory)

    def building(self) -> list[int]:
        """Memories with objects of a replay or pruning that runs, or that was broken off."""
        return [id for (id,) in self._all("SELECT DISTINCT memory FROM building")]

    def built(self, memory: int) -> None:
        self._do("DELETE FROM building WHERE memory = ?", memory)

    def truncate(self) -> None:
        """Take deleted content out of the write-ahead log.

        Raises:
            ValueError: another process is reading the database meanwhile.
        """
        (busy, _, _) = self._one("PRAGMA wal_checkpoint(TRUNCATE)")
        if busy:
            raise InUseError(
                f"another process reads {self._path}, so its log still holds what was deleted; sweep again.",
                f"{BUSY}, so its log still holds what was deleted; {LATER}",
            )


def _values(row: Row) -> list[Any]:
    named = {name: getattr(row, name) for name in COLUMNS}
    return list((named | {name: json.dumps(named[name], sort_keys=True) for name in ("payload", "facts")}).values())
