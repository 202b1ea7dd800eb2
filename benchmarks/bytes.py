"""Bytes on disk of a store, all files counted, for each token that was written.

    python benchmarks/bytes.py --texts 20 --tokens 200 --forms exact int8 coded

Each text is one write, and so one version. Everything in the store's folder counts: the journal with its log, objects,
locks. The coder counts apart, since a store keeps one for all its memories.
"""

import argparse
import tempfile
from datetime import date
from pathlib import Path

import latentmem
from latentmem.core.memory import Memory
from latentmem.evaluate.data import questions
from latentmem.model.model import MemoryModel


def texts(llm: MemoryModel, count: int, tokens: int) -> list[str]:
    """Wikipedia paragraphs, joined and cut to so many tokens."""

    def size(text: str) -> int:
        return len(llm.tokenizer(text, add_special_tokens=False)["input_ids"])

    ids: list[int] = []
    for text in questions.load("squad", size, questions=400, per_text=1, seed=3).texts:
        ids += llm.tokenizer(text.text, add_special_tokens=False)["input_ids"]
    return [llm.tokenizer.decode(ids[i * tokens : (i + 1) * tokens]) for i in range(count)]


def written(llm: MemoryModel, folder: Path, some: list[str], form: str) -> Memory:
    store = latentmem.Store(folder)
    store.create("notes", llm.empty(longterm=0 if form == "exact" else None, form=form))
    for i, text in enumerate(some):
        store.write(llm, "notes", text, source=f"note {i}")
    memory = store.open("notes")
    store.close()
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--forms", nargs="+", default=["exact", "int8", "coded"])
    options = parser.parse_args()
    llm = latentmem.load(options.model, dtype=options.dtype)
    some = texts(llm, options.texts, options.tokens)
    print(f"{date.today()}, {llm!r}: {options.texts} texts of {options.tokens} tokens, a version each")
    print("| form | tokens | bytes on disk | a token | journal, a token | coder |")
    print("| --- | --- | --- | --- | --- | --- |")
    for form in options.forms:
        with tempfile.TemporaryDirectory() as folder:
            memory = written(llm, Path(folder), some, form)
            sizes = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
        coder = sum(size for path, size in sizes.items() if path.stem == memory.coder)
        journal = sum(size for path, size in sizes.items() if path.name.startswith("store.db"))
        whole = sum(sizes.values()) - coder
        cells = f"{whole:,} | {whole / memory.tokens:,.0f} | {journal / memory.tokens:,.0f} | {coder:,}"
        print(f"| {form} | {memory.tokens:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
