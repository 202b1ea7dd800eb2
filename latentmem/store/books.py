"""What the journal alone says of versions, so that whoever looks at a memory or pins a source opens none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

from latentmem.errors import NotFoundError
from latentmem.store.account import Account
from latentmem.store.journal import Journal, Row

OF_A_TEXT = ("ids", "lost", "blocks", "coder", "pruned")  # facts that a version without a text does not take over
SAME = ("rollback", "fork")  # events behind which a memory is as at their base


def of_source(rows: list[Row], source: str) -> set[int]:
    """Ids of the versions of a source; a ValueError if none of them wrote it."""
    ids = {row.id for row in rows if row.payload.get("source") == source}
    if not any(row.event == "write" for row in rows if row.id in ids):
        raise ValueError(f"the journal has no write of the source {source!r}.")
    return ids


class Books:
    """The books of one store.

    Args:
        compute: opens the memory at a version and gives its account, where the journal has none.
    """

    def __init__(self, journal: Journal, compute: Callable[[Row], Account]) -> None:
        self._journal, self._compute = journal, compute

    # --- what waits -------------------------------------------------------------------------------------------------

    def waits(self, row: Row) -> bool:
        """Whether a version is pending, or made from one that is."""
        if row.state != "pending" and not self._journal.pending(row.memory):
            return False
        for here in self._journal.lineage(row):
            if here.state == "pending" or here.kind == "snapshot":
                return here.state == "pending"
        return False

    def ready(self, row: Row) -> Row:
        """The row of a version; a ValueError if it waits, a NotFoundError if it was pruned."""
        if row.pruned:
            raise self.was_pruned(row)
        if self.waits(row):
            name = self._journal.name(row.memory)
            raise ValueError(
                f"version {row.seq} of {name!r} waits for writes that are acknowledged and not applied yet; `apply` "
                f"does it, or give the model to `open`."
            )
        return row

    def was_pruned(self, row: Row) -> NotFoundError:
        """The error of who wants a version that was pruned."""
        name = self._journal.name(row.memory)
        return NotFoundError(
            f"version {row.seq} of {name!r} was pruned: its text is in the history, its slots are gone. The history "
            f"says which versions are left."
        )

    def expired(self, memory: int) -> list[str]:
        """Sources of the newest version whose time is over; while that waits, all sources whose time is over."""
        while over := [source for source, at in self._journal.expiries(memory).items() if at <= time.time()]:
            head = self._journal.head(memory)
            if self.waits(head):
                return over
            try:
                held = self.account(head).names
            except ValueError:  # somebody may have written a newer one and pruned this one
                if self._journal.is_head(head):
                    raise
            else:
                return [source for source in over if source in held]
        return []

    # --- what a version holds -----------------------------------------------------------------------------------------

    def account(self, row: Row) -> Account:
        """What a version holds that waits for nothing; computed from the memory where the journal does not have it.

        Raises:
            ValueError: an object is missing or damaged, or the version is gone.
        """
        known = self._known(row)
        if known is None:
            known = self._compute(row)
            with contextlib.suppress(OSError, ValueError):  # the disk is full, or somebody has the database
                self._journal.keep_account(row, known.to_json())
        return known

    def _known(self, row: Row) -> Account | None:
        """The account of a version by the journal, if it has it."""
        pins: list[Row] = []
        with self._journal.one_look():
            for here in self._journal.lineage(row):
                line = self._journal.account(here.id)
                if line is not None:
                    with contextlib.suppress(KeyError, TypeError, ValueError):  # of another version of the package
                        account = Account.from_json(line)
                        for pin in reversed(pins):
                            account = account.with_pin(pin.payload["source"], pin.event == "pin")
                        return account
                    return None
                if here.event in ("pin", "unpin"):
                    pins.append(here)
                elif here.event not in SAME and here.state != "failed":
                    return None
        return None

    # --- changes ----------------------------------------------------------------------------------------------------

    def pin(self, memory: int, source: str, pinned: bool) -> Row:
        """Add a version in which a source is pinned, or is not any more; errors as `latentmem.core.sources.pin`."""
        head = self.ready(self._journal.head(memory))
        self.account(head).with_pin(source, pinned)
        return self.append(Row(memory, "pin" if pinned else "unpin", head.id, {"source": source}), self._facts(head))

    def append(self, row: Row, facts: dict[str, object]) -> Row:
        """Add a version without a text on top of the newest, if that is still its base."""
        with self._journal.transaction():
            if self._journal.head(row.memory).id != row.base:
                name = self._journal.name(row.memory)
                raise ValueError(f"a write into {name!r} was acknowledged meanwhile; `apply` it and try again.")
            return self._journal.append(replace(row, facts=facts))

    def _facts(self, row: Row) -> dict[str, object]:
        """The facts of a version that holds the same slots."""
        facts = next((one.facts for one in self._journal.lineage(row) if "M" in one.facts), {})
        return {name: fact for name, fact in facts.items() if name not in OF_A_TEXT}
