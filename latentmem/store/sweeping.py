"""Sweeping: objects that no version refers to leave the disk, and deleted rows leave the database's log.

The journal notes what is due, so that whoever opens the store next does it behind a crash: "objects", or with the log
"due". A sweep of the objects alone waits for nobody who reads the database.
"""

from __future__ import annotations

import contextlib

from latentmem.errors import InUseError
from latentmem.store.journal import Journal
from latentmem.store.locks import Locks
from latentmem.store.objects import Objects


class Sweeper:
    """Sweeps one store."""

    def __init__(self, journal: Journal, objects: Objects, locks: Locks) -> None:
        self._journal, self._objects, self._locks = journal, objects, locks

    def sweep(self, log: bool = True) -> int:
        """Delete objects that no version refers to, and deleted rows from the log; gives the number of objects."""
        for memory in self._journal.building():
            with self._locks.if_free(memory) as free:
                if free:
                    self._journal.built(memory)
        with self._locks.objects():
            used, count = self._journal.objects(), 0
            for name in list(self._objects.names()):
                if name not in used:
                    self._objects.remove(name)
                    count += 1
            self._objects.tidy()
            self._locks.tidy()
            if log:
                self._journal.truncate()
            self._journal.swept(log)
        return count

    def sweep_if_due(self) -> None:
        """What a crash, a reader or a full disk has prevented; where it can not be done now, it stays due."""
        if self._journal.setting("sweep", "no") == "due":
            with contextlib.suppress(InUseError):
                self.sweep()
        elif self._journal.setting("sweep", "no") != "no":
            with self._locks.if_free("objects") as free:
                pass
            if free:  # else somebody is putting objects down, and is not waited for
                self.sweep_objects()

    def sweep_objects(self, due: bool = False) -> None:
        """Delete objects that no version refers to, if there may be some, or leave it to the next sweep.

        Args:
            due: there may be some, though the journal does not say so.
        """
        with contextlib.suppress(Exception):  # a folder raises an OSError, a bucket anything; the journal is in order
            if due:
                self._journal.needs_sweep()
            if self._journal.setting("sweep", "no") != "no":
                self.sweep(log=False)
