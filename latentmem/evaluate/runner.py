"""Units of work over processes: what is finished is a line of JSON on disk, and a run that was stopped goes on.

A folder belongs to one question: `config.json` says which, and a run that asks another one is refused.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from latentmem.disk import DISK, replace_bytes

Record = dict[str, Any]
Unit = tuple[Any, ...]
LOCK = ".lock"  # held in a run's folder by the one process that works on it
Progress = Callable[[int, int], None]  # (units done, units in all)


class Worker(Protocol):
    """What does the work: made once per process."""

    def units(self) -> list[Unit]: ...
    def chains(self) -> list[list[Unit]]: ...
    def run(self, unit: Unit) -> list[Record]: ...


PACKAGES = ("latentmem", "torch", "transformers", "tokenizers", "peft", "bm25s", "numpy")


class Folder:
    """Where a run keeps what it asked and what it found.

    Args:
        path: a folder, made if it does not exist.
        config: what is asked, as JSON; has to equal what the folder was begun with.

    Raises:
        ValueError: the folder holds another question, or files of something else.
    """

    def __init__(self, path: Path, config: Record) -> None:
        self.path, self.records = path, path / "records.jsonl"
        self.config: Record = json.loads(json.dumps(config))
        self.runs: list[Record] = []
        self._read()
        path.mkdir(parents=True, exist_ok=True)

    def _read(self) -> None:
        """What the folder was begun with and who worked on it, compared with what is asked now."""
        file = self.path / "config.json"
        if not file.exists():
            if self.path.exists() and any(not _is_own(file.name) for file in self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no run; choose another folder.")
            return
        try:
            begun = json.loads(file.read_text(encoding="utf-8"))
            config, self.runs = begun["config"], begun["runs"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} was not written by a run; choose another folder.") from None
        differences = list(_differences("", config, self.config))
        if differences:
            raise ValueError(
                f"{self.path} holds another run: {'; '.join(differences)}. Choose another folder, or remove it to "
                f"begin anew."
            )

    @contextmanager
    def working(self, run: Record) -> Iterator[None]:
        """Keep other processes out meanwhile, and say in the folder who works (command, versions, commit, date).

        Raises:
            ValueError: another process works in it.
        """
        try:
            lock = FileLock(self.path / LOCK).acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"another process is measuring into {self.path}: wait for it, or choose another folder."
            ) from None
        with lock:
            self._begin(run)
            yield

    def _begin(self, run: Record) -> None:
        self._read()  # another process may have worked on it since
        self.runs = [*self.runs, run]
        config = {"config": self.config, "runs": self.runs}
        replace_bytes(self.path / "config.json", json.dumps(config, indent=1))

    def done(self) -> dict[Unit, list[Record]]:
        """Records by finished unit; a last line that was cut off by a kill is dropped from the file.

        Raises:
            ValueError: another line can not be read.
        """
        if not self.records.exists():
            return {}
        data = self.records.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self.records.open("r+b") as file:
                file.truncate(len(whole))
        records = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                parsed = json.loads(line)
                records[tuple(parsed["unit"])] = parsed["records"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"line {number} of {self.records} is damaged; remove it, and the run does its unit again."
                ) from None
        return records

    def all_records(self) -> list[Record]:
        """Records of all finished units."""
        return [record for records in self.done().values() for record in records]

    def add(self, unit: Unit, records: list[Record]) -> None:
        """Append one finished unit, on disk before this returns."""
        with self.records.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unit": unit, "records": records}, ensure_ascii=False) + "\n")
        DISK.sync(self.records)


def this_run(command: str) -> Record:
    """When, with which versions and at which commit something is run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    started = datetime.now(UTC).isoformat(timespec="seconds")
    machine = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    return {"started": started, "command": command, "commit": _commit(), "versions": versions, **machine}


def _commit() -> str:
    """The commit of this source tree, marked where files differ from it; "" for an installed package."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name], cwd=here, capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip() if tracked.returncode == 0 else ""


def _is_own(name: str) -> bool:
    """Whether a run that was stopped at its start can have left a file of this name."""
    return name == LOCK or name.startswith(".config.json.")


def _differences(name: str, there: Any, here: Any) -> Iterator[str]:
    """Where two JSON values differ, leaf by leaf."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *(key for key in there if key not in here)]:
            yield from _differences(f"{name}.{key}".lstrip("."), there.get(key), here.get(key))
    elif there != here:
        yield f"{name} is {json.dumps(there)} there and {json.dumps(here)} here"


def run(
    folder: Folder, here: Worker, make: Callable[..., Worker], args: Sequence[Any], workers: int, progress: Progress
) -> None:
    """Do all units that are not done yet.

    Args:
        here: a worker in this process; it does the work if `workers` is 1.
        make, args: how another process makes its own.
        progress: called at the start and after each unit.

    Raises:
        ValueError: a process ended in the middle of its work.
    """
    units, chains = here.units(), here.chains()
    everything = [*units, *(unit for chain in chains for unit in chain)]
    done = set(everything) & set(folder.done())
    progress(len(done), len(everything))

    def finish(unit: Unit, records: list[Record]) -> None:
        folder.add(unit, records)
        done.add(unit)
        progress(len(done), len(everything))

    todo = [unit for unit in units if unit not in done]
    waiting = [[unit for unit in chain if unit not in done] for chain in chains]
    if workers == 1 or len(todo) + len(waiting) < 2:
        for unit in [*(unit for chain in waiting for unit in chain), *todo]:
            finish(unit, here.run(unit))
    else:
        for unit, records in _spread(todo, waiting, make, args, workers):
            finish(unit, records)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spread(
    todo: list[Unit], waiting: list[list[Unit]], make: Callable[..., Worker], args: Sequence[Any], workers: int
) -> Iterator[tuple[Unit, list[Record]]]:
    """Units with their records as they are finished; of each chain one unit at a time."""
    chains = [iter(chain) for chain in waiting]
    others = set(active_children())
    threads = max(1, cores() // workers)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (make, args, threads))
    try:
        running: dict[Future[list[Record]], tuple[Unit, Iterator[Unit]]] = {}
        ready = [*chains, *([iter(todo)] * (2 * workers))]  # a few of `todo` at once, so that none waits for another
        while True:
            for source in ready:
                unit = next(source, None)
                if unit is not None:
                    running[pool.submit(_work, unit)] = (unit, source)
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            ready = []
            for future in finished:
                unit, source = running.pop(future)
                ready.append(source)
                yield unit, future.result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker was killed, most likely because memory ran out. What is finished is kept: give the same command "
            "with fewer --workers."
        ) from None
    except BaseException:  # also Ctrl-C: what runs now is lost, what is finished is on disk
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_worker: Worker | None = None


def _begin(make: Callable[..., Worker], args: Sequence[Any], threads: int) -> None:
    global _worker
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _worker = make(*args)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(unit: Unit) -> list[Record]:
    assert _worker is not None
    return _worker.run(unit)
