"""A run as one HTML file to look at: the plot, the tables, what was said, and how it was made."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from latentmem.disk import replace_bytes
from latentmem.evaluate.data.sets import QuestionSet
from latentmem.evaluate.runner import Folder, Record
from latentmem.evaluate.stats import Estimate
from latentmem.evaluate.tables.summary import OURS, Line, cell_text, grid, label, part_name, sections

EXAMPLES = 12
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child, .words td, .words th { text-align: left }
td small { display: block; color: #777 } tr.ours td { background: #eef5fb } tr.thin td { color: #666 }
img { max-width: 100% } .hit { color: #00703c; font-weight: 600 } .facts td { text-align: left }
div { overflow-x: auto }
"""


def write(
    folder: Folder, title: str, questions: str, lines: Sequence[Line], records: Sequence[Record], data: QuestionSet
) -> None:
    """Write report.html, which loads nothing: plot.png is in it.

    Args:
        questions: how many questions are asked about what, in words.
    """
    picture = base64.b64encode((folder.path / "plot.png").read_bytes()).decode()
    body = [f"<h1>{escape(title)}</h1>", f'<img alt="curves" src="data:image/png;base64,{picture}">']
    for N, stream in dict.fromkeys((line.N, line.stream) for line in lines):
        body.append(f"<h2>{part_name(N, stream)}</h2>")
        for heading, chosen in sections([line for line in lines if (line.N, line.stream) == (N, stream)]):
            body.append(f"<h3>{escape(heading)}</h3>{_table(chosen)}")
    body += ["<h2>What was said</h2>", _examples(records, data)]
    body += ["<h2>How this was made</h2>", _facts(folder, questions)]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    replace_bytes(folder.path / "report.html", page)


def _table(lines: Sequence[Line]) -> str:
    steps, lines_and_cells = grid(lines)
    head = "".join(f"<th>{t}</th>" for t in steps)
    rows = [f"<tr><th>texts written since</th><th>n (texts)</th>{head}</tr>"]
    for line, sizes, cells in lines_and_cells:
        kind = "ours" if line.kind == "row" and line.row == OURS else ""
        kind = kind or ("thin" if line.kind in ("bound", "M/N", "found") else "")
        shown = "".join(map(_cell, cells))
        rows.append(f'<tr class="{kind}"><td>{escape(label(line))}</td><td>{sizes}</td>{shown}</tr>')
    return f"<div><table>{''.join(rows)}</table></div>"


def _cell(cell: Estimate | None) -> str:
    mean, _, interval = cell_text(cell).partition(" ")
    return f"<td>{mean}<small>{interval}</small></td>"


def _examples(records: Sequence[Record], data: QuestionSet) -> str:
    """The first questions with what each row said of them, at the first and the last step of the largest memory."""
    N = max((r["N"] for r in records), default=0)
    steps = sorted({r["step"] for r in records if "step" in r})
    wanted = [("floor", 0, "", 0), ("oracle", 0, "", 0)]
    wanted += [("ours", N, "full", t) for t in dict.fromkeys([*steps[:1], *steps[len(steps) // 2 :][:1], *steps[-1:]])]
    heads = ["floor", "oracle", *(f"ours, t = {t}" for *_, t in wanted[2:])]
    said = {(r["row"], r["N"], r["fill"], r.get("step", 0), r["question"]): r for r in records}
    rows = ["<tr><th>question</th><th>gold</th>" + "".join(f"<th>{h}</th>" for h in heads) + "</tr>"]
    questions = [text.questions[0] for text in data.texts][:EXAMPLES]
    for question in questions:
        cells = []
        for key in wanted:
            record = said.get((*key, question.id))
            kind = ' class="hit"' if record and record["hit"] else ""
            cells.append(f"<td{kind}>{escape(record.get('said', '')) if record else ''}</td>")
        gold = escape(" / ".join(question.answers))
        rows.append(f"<tr><td>{escape(question.question)}</td><td>{gold}</td>{''.join(cells)}</tr>")
    return f'<div><table class="words">{"".join(rows)}</table></div>'


def _facts(folder: Folder, questions: str) -> str:
    model, last = folder.config["model"], folder.runs[-1]
    facts = {
        "commands": "; ".join(dict.fromkeys(run["command"] for run in folder.runs)),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "questions": questions,
        "adapters": model["adapters"] or "none, untrained",
        "dtype": model["dtype"],
        "intervals": "95%, bootstrap over texts",
        "commits": ", ".join(dict.fromkeys(run["commit"] for run in folder.runs if run["commit"])) or "not known",
        **{key: last[key] for key in ("python", "machine")},
        **last["versions"],
    }
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    return f'<table class="facts">{rows}</table>'
