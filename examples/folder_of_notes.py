"""A folder of notes of several kinds: each file is a source, and an answer names the file that it drew on.

Text, Markdown, HTML, CSV, Word, e-mail and EPUB need nothing more; PDF and Excel need `pip install 'latentmem[files]'`.
"""

# %%
import tempfile
from pathlib import Path

import latentmem
from latentmem import documents

NOTES = {
    "house/lease.md": "# Lease\n\nThe lease of the **red house** was signed by *Ada Brix*, a plumber from Oslo.",
    "house/pump.html": "<style>p {color: red}</style><p>The water pump was repaired by Odd Brekke in May.</p>",
    "harbour.txt": "The ferry Solveig leaves at 7:40 in the morning. The captain of the ferry is Mira Okafor.",
}
folder = Path(tempfile.mkdtemp())
for name, text in NOTES.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")

# %%
llm = latentmem.load("smollm2-135m")
memory = llm.empty()
for name, path in documents.under(folder).files:
    memory = llm.write(memory, path, source=name)
    print(f"{name}: {documents.read(path)!r}")

# %%
for question in ("Who signed the lease?", "Who repaired the pump?", "When does the ferry leave?"):
    answer = llm.ask(memory, question)
    shares = llm.drawn_on(memory, question, answer).sources
    print(question, answer, {name: f"{share:.0%}" for name, share in shares.items()})
