"""Units of work over processes: what is finished is a line of JSON on disk, and a run that was stopped goes on.

A folder belongs to one question: `config.json` says which, and a run that asks another one is refused.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]
Unit = tuple[Any, ...]
Progress = Callable[[int, int], None]  # (units done, units in all)


class Worker(Protocol):
    """What does the work: made once per process."""

    def units(self) -> list[Unit]: ...
    def chains(self) -> list[list[Unit]]: ...
    def run(self, unit: Unit) -> list[Record]: ...


class Folder:
    """Where a run keeps what it asked and what it found.

    Args:
        path: a folder, made if it does not exist.
        config: what is asked, as JSON; has to equal what the folder was begun with.
        run: who asks this time (command, versions, commit, date); appended to the list of runs.

    Raises:
        ValueError: the folder holds another question, or files of something else.
    """

    def __init__(self, path: Path, config: Record, run: Record) -> None:
        self.path = path
        self.records = path / "records.jsonl"
        config = json.loads(json.dumps(config))
        file = path / "config.json"
        runs: list[Record] = []
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["config"] != config:
                keys = [k for k in config if found["config"].get(k) != config[k]]
                raise ValueError(
                    f"{path} holds a run with another {', '.join(keys)}: choose another folder, or remove it to begin "
                    f"anew."
                )
            runs = found["runs"]
        elif path.exists() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no run; choose another folder.")
        path.mkdir(parents=True, exist_ok=True)
        self.config, self.runs = config, [*runs, run]
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps({"config": config, "runs": self.runs}, indent=1), encoding="utf-8")
        temporary.replace(file)

    def done(self) -> dict[Unit, list[Record]]:
        """Records by finished unit; a last line that was cut off by a kill is dropped from the file."""
        if not self.records.exists():
            return {}
        data = self.records.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self.records.open("r+b") as file:
                file.truncate(len(whole))
        lines = (json.loads(line) for line in whole.splitlines())
        return {tuple(line["unit"]): line["records"] for line in lines}

    def add(self, unit: Unit, records: list[Record]) -> None:
        """Append one finished unit, on disk before this returns."""
        with self.records.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unit": unit, "records": records}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run(
    folder: Folder, here: Worker, make: Callable[..., Worker], args: Sequence[Any], workers: int, progress: Progress
) -> None:
    """Do all units that are not done yet.

    Args:
        here: a worker in this process; it does the work if `workers` is 1.
        make, args: how another process makes its own.
        progress: called at the start and after each unit.
    """
    units, chains = here.units(), here.chains()
    everything = [*units, *(unit for chain in chains for unit in chain)]
    done = folder.done()
    progress(len(done), len(everything))

    def finish(unit: Unit, records: list[Record]) -> None:
        folder.add(unit, records)
        done[unit] = records
        progress(len(done), len(everything))

    todo = [unit for unit in units if unit not in done]
    waiting = [[unit for unit in chain if unit not in done] for chain in chains]
    if workers == 1 or len(todo) + len(waiting) < 2:
        for unit in [*(unit for chain in waiting for unit in chain), *todo]:
            finish(unit, here.run(unit))
    else:
        for unit, records in _spread(todo, waiting, make, args, workers):
            finish(unit, records)


def _spread(
    todo: list[Unit], waiting: list[list[Unit]], make: Callable[..., Worker], args: Sequence[Any], workers: int
) -> Iterator[tuple[Unit, list[Record]]]:
    """Units with their records as they are finished; of each chain one unit at a time."""
    chains = [iter(chain) for chain in waiting]
    others = set(active_children())
    threads = max(1, (os.cpu_count() or 1) // workers)
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
