"""What a run leaves in its folder: summary.json, table.md, plot.png and report.html, beside config and records."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from latentmem.evaluate.data.sets import QuestionSet
from latentmem.evaluate.runner import Folder, Record
from latentmem.evaluate.tables import plots, report, summary
from latentmem.files.container import replace_bytes

PACKAGES = ("latentmem", "torch", "transformers", "tokenizers", "peft", "bm25s", "numpy")


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


def save(folder: Folder, title: str, about: str, table: str, more: Record) -> None:
    """Write table.md and summary.json.

    Args:
        about: stands between the commands and the table.
        more: of summary.json, beside the title, what was asked, and the runs.
    """
    summary = {"title": title, **folder.config, "runs": folder.runs, **more}
    replace_bytes(folder.path / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    commands = "\n".join(dict.fromkeys(run["command"] for run in folder.runs))
    replace_bytes(folder.path / "table.md", f"# {title}\n\n```\n{commands}\n```\n\n{about}\n\n{table}")


def write(folder: Folder, data: QuestionSet, *, unfinished: bool = False) -> list[summary.Line]:
    """Compute the summary of all records that are finished and write it in four forms.

    Args:
        unfinished: the run was stopped; said in all of them.

    Returns:
        The lines of all tables; none, and nothing is written, before two texts are finished.
    """
    records = [record for unit in folder.done().values() for record in unit]
    lines = summary.lines(records)
    if not lines:
        return []
    config, last = folder.config, folder.runs[-1]
    shown = {"squad": "SQuAD", "nq": "Natural Questions", "synthetic": "synthetic facts"}.get(data.name, data.name)
    title = f"Knowledge retention: {config['model']['name']}, {shown}{', stopped before its end' * unfinished}"
    questions = sum(len(text.questions) for text in data.texts)
    facts = {
        "commands": "; ".join(dict.fromkeys(run["command"] for run in folder.runs)),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "questions": f"{questions} questions about {len(data.texts)} texts; {data.source}",
        "adapters": config["model"]["adapters"] or "none, untrained",
        "dtype": config["model"]["dtype"],
        "intervals": "95%, bootstrap over texts",
        "commits": ", ".join(dict.fromkeys(run["commit"] for run in folder.runs if run["commit"])) or "not known",
        **{key: last[key] for key in ("python", "machine")},
        **last["versions"],
    }
    samples = [[text.id, [q.id for q in text.questions]] for text in data.texts]
    about = f"{facts['finished'][:10]}. {facts['questions']}. "
    about += f"Adapters: {facts['adapters']}; {facts['dtype']}; intervals: {facts['intervals']}."
    more = {"facts": facts, "samples": samples, "lines": summary.as_json(lines)}
    save(folder, title, about, summary.markdown(lines), more)
    plots.draw(lines, title, folder.path / "plot.png")
    report.write(folder.path / "report.html", title, facts, lines, records, data, folder.path / "plot.png")
    return lines


def one_page(folder: Path, names: Sequence[str]) -> Path | None:
    """Put the tables of several runs, which lie in folders of these names, on one page; None if there are no tables."""
    tables = {name: folder / name / "table.md" for name in names}
    parts = [f"<!-- {name} -->\n\n{path.read_text(encoding='utf-8')}" for name, path in tables.items() if path.exists()]
    if not parts:
        return None
    replace_bytes(folder / "results.md", "\n".join(parts))
    return folder / "results.md"
