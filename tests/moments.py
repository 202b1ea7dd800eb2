"""Everything that is put on a disk, counted, and a process that is dead from one moment on."""

import contextlib
from pathlib import Path

from latentmem.store.journal import Journal
from latentmem.store.objects import Disk


class Moments:
    """Counts commits, file operations and removals of files, and lets none happen from a given one on.

    Attributes:
        count: of those that happened since `begin`.
    """

    class Cut(BaseException):
        """The process is dead."""

    def __init__(self, monkeypatch):
        self.count, self._cut = 0, 0
        transaction = Journal.transaction

        @contextlib.contextmanager
        def counted(journal):
            if journal._depth == 0:
                self._one()
            with transaction(journal):
                yield

        monkeypatch.setattr(Journal, "transaction", counted)
        for owner, names in ((Disk, ("mkdir", "create", "sync", "rename", "remove")), (Path, ("unlink",))):
            for name in names:
                monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def begin(self, cut):
        """Count from 0, and let nothing happen from the moment `cut` on; 0 = never."""
        self.count, self._cut = 0, cut

    def _one(self):
        if self._cut and self.count + 1 >= self._cut:
            raise self.Cut
        self.count += 1

    def _counted(self, operation):
        def counted(*args, **kwargs):
            self._one()
            return operation(*args, **kwargs)

        return counted
