"""Make a notebook beside each example: the same cells, without outputs.

python tools/notebooks.py            write examples/*.ipynb
python tools/notebooks.py --check    say which notebook is not what its example is; exit code 1
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
HEAD = re.compile(r'\A"""(.*?)"""\n', re.DOTALL)


def notebook(code: str) -> str:
    """An example as a notebook: its docstring is a text, `# %%` begins a cell, and words behind it are a text, too."""
    words = HEAD.match(code)
    if words is None:
        raise ValueError("an example begins with a docstring.")
    cells = [cell("markdown", words[1])]
    for part in re.split(r"^# %%", code[words.end() :], flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        cells += [cell("markdown", title)] if title.strip() else []
        cells.append({**cell("code", body), "execution_count": None, "outputs": []})
    for i, one in enumerate(cells):
        one["id"] = f"cell-{i}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def cell(kind: str, text: str) -> dict[str, object]:
    return {"cell_type": kind, "metadata": {}, "source": text.strip().splitlines(keepends=True)}


def main() -> int:
    wrong = 0
    for path in sorted(EXAMPLES.glob("*.py")):
        target, text = path.with_suffix(".ipynb"), notebook(path.read_text(encoding="utf-8"))
        if "--check" not in sys.argv[1:]:
            target.write_text(text, encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != text:
            print(f"{target.name} is not what {path.name} is: run python tools/notebooks.py.")
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
