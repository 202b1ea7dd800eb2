"""Build the documentation site: the reference pages are made from the code, then zensical builds all pages.

    python tools/docs.py                # into build/site; any warning is an error
    python tools/docs.py --only-pages   # the generated pages of docs/reference alone

`python.md`, `cli.md`, `http.md` and `settings.md` of docs/reference are generated and not committed. No model is
loaded, and nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
SITE = ROOT / "build" / "site"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table, or nothing where there are no rows."""
    lines = [" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    rule = " | ".join("---" for _ in head)
    return "\n".join(f"| {line} |" for line in (" | ".join(head), rule, *lines)) + "\n" if lines else ""


def plain(text: str) -> str:
    """A sentence of the code as Markdown: what looks like a tag or a stress is neither."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([<>*\[\]])", r"\\\1", p) for p in parts)


# --- Python -----------------------------------------------------------------------------------------------------------


def python_page() -> str:
    """Every public name of the package, for mkdocstrings to fill in."""
    import latentmem

    names = [name for name in latentmem.__all__ if not name.startswith("__")]
    names.sort(key=lambda name: (not name[0].islower(), name != "MemoryModel", name))  # `load` first, then the model
    blocks = [f"::: latentmem.{name}\n" for name in names]
    blocks.append("::: latentmem.documents.read\n")
    if importlib.util.find_spec("latentmem.errors"):
        blocks.append("::: latentmem.errors\n")
    intro = (
        "These names are public: `import latentmem` gives those without a module. All others may change without notice."
    )
    return "\n".join(["# Python", "", intro, "", *blocks])


# --- the command line -------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every command with its arguments and options, in the order and the panels of `latentmem --help`."""
    from typer.main import get_command

    from latentmem.cli import app

    root: Any = get_command(app)
    panels: dict[str, list[str]] = {}
    for name, command in root.commands.items():
        panels.setdefault(command.rich_help_panel, []).extend(command_lines(("latentmem", name), command))
    sections = (line for panel, lines in panels.items() for line in (f"## {panel}\n", *lines))
    return "\n".join(["# Command line", "", plain(root.help), "", *sections])


def command_lines(path: tuple[str, ...], command: Any) -> Iterator[str]:
    """One command, or a group with its commands."""
    yield f"### `{' '.join(path)}` {{ #{'-'.join(path[1:])} }}\n"
    yield plain(re.sub(r"\s+", " ", command.help or "").strip()) + "\n"
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from command_lines((*path, name), inner)
        return
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = (f"{p.name.upper()}{'...' if p.nargs == -1 else ''}" for p in arguments)
    usage = (u if p.required else f"[{u}]" for p, u in zip(arguments, usage, strict=True))
    yield f"```\n{' '.join([*path, *usage])}\n```\n"
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    yield table(("argument", "meaning"), ((f"`{p.name.upper()}`", plain(p.help or "")) for p in arguments))
    yield table(("option", "meaning", "default"), (option_row(p) for p in options))


def option_row(option: Any) -> tuple[str, str, str]:
    annotation = option.type_descriptor.annotation
    inner = getattr(annotation, "__args__", None) or (annotation,)
    kind = "|".join(inner) if isinstance(inner[0], str) else inner[0].__name__.lower()
    value = "" if option.is_flag else f" <{kind}>"
    names = f"`{', '.join((*option.opts, *option.secondary_opts))}{value}`"
    default = option.show_default if isinstance(option.show_default, str) else option.default
    shown = "" if default in (None, False, "") or callable(default) else f"`{default}`"
    return names, plain(option.help or ""), "required" if option.required else shown


# --- HTTP -------------------------------------------------------------------------------------------------------------


def http_page() -> str:
    """Every address and every object of the server's OpenAPI document."""
    from latentmem.serve.http.app import create_app

    service: Any = SimpleNamespace(llm=SimpleNamespace(name="smollm2-135m"))
    document = create_app(service).openapi()
    operations = [(m, p, o) for p, methods in document["paths"].items() for m, o in methods.items()]
    refusals: dict[str, str] = {}
    for _, _, operation in operations:
        for status, answer in operation["responses"].items():
            if kinds(answer) == ["[Error](#object-Error)"]:
                refusals[status] = answer["description"]
    text = ["# HTTP", "", "`latentmem serve` answers these addresses; its `/openapi.json` is the same document.", ""]
    text += ["An error has one of these statuses, and the body [Error](#object-Error):", ""]
    text.append(table(("status", "meaning"), sorted(refusals.items())))
    tag = None
    for method, path, operation in operations:
        if operation["tags"][0] != tag:
            tag = operation["tags"][0]
            text.append(f"## {'OpenAI' if tag == 'openai' else tag.capitalize()}\n")
        text += operation_lines(method, path, operation)
    text.append("## Objects\n")
    for name, schema in sorted(document["components"]["schemas"].items()):
        text += [f"### {name} {{ #object-{name} }}\n", plain(schema.get("description", "")) + "\n"]
        wanted = schema.get("required", [])
        fields = schema.get("properties", {}).items()
        rows = ((f"`{field}`", kind(s), "required" if field in wanted else default(s)) for field, s in fields)
        text.append(table(("field", "type", "default"), rows))
    return "\n".join(text)


def operation_lines(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### `{method.upper()} {path}` {{ #{operation['operationId']} }}\n"
    yield plain(operation["description"]) + "\n"
    parameters = operation.get("parameters", [])
    rows = (
        (f"`{p['name']}`", p["in"], kind(p["schema"]), "required" if p["required"] else default(p["schema"]))
        for p in parameters
    )
    yield table(("parameter", "in", "type", "default"), rows)
    if "requestBody" in operation:
        yield f"Body: {' or '.join(kinds(operation['requestBody']))}.\n"
    answers = [(status, answer) for status, answer in operation["responses"].items() if status < "400"]
    yield "; ".join(f"Answer {status}: {' or '.join(kinds(a)) or 'no body'}" for status, a in answers) + ".\n"


def kinds(body: dict[str, Any]) -> list[str]:
    """What a body may be: an object of ours, or a media type."""
    forms = body.get("content", {}).items()
    return [kind(form["schema"]) if media == "application/json" else f"`{media}`" for media, form in forms]


def default(schema: dict[str, Any]) -> str:
    value = schema.get("default")
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def kind(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#object-{name})"
    if "anyOf" in schema:
        return " or ".join(kind(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f'`"{value}"`' for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    if isinstance(inner := schema.get("additionalProperties"), dict):
        return f"object of {kind(inner)}"
    return schema.get("type", "any value") + bounds(schema)


def bounds(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    low = low if low is not None and low > -(1 << 31) else None
    high = high if high is not None and high < 1 << 31 else None
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    return f", at least {low:g}" if low is not None else f", at most {high:g}" if high is not None else ""


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting of a memory and of its long-term part."""
    from latentmem.core.settings import LongTermSettings, MemorySettings

    page = (ROOT / "tools" / "settings.md").read_text(encoding="utf-8")
    page = page.replace("MEMORY_TABLE", settings_table(MemorySettings().complete()))
    return page.replace("LONGTERM_TABLE", settings_table(LongTermSettings(R=0)))


def settings_table(defaults: Any) -> str:
    return table(("setting", "meaning", "default"), settings_rows(defaults))


def settings_rows(defaults: Any) -> Iterator[tuple[str, str, str]]:
    from latentmem.core.settings import settings_of

    for one in settings_of(type(defaults)):
        value = None if one.default is dataclasses.MISSING else getattr(defaults, one.name)
        choices = f" ({', '.join(f'`{choice}`' for choice in one.choices)})" if one.choices else ""
        yield f"`{one.name}`", plain(one.help) + choices, "none" if value is None else f"`{value}`"


# --- the site ---------------------------------------------------------------------------------------------------------


def build() -> int:
    """Run zensical; a warning of zensical, or of the reader of docstrings, is an error."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = re.sub(r"\x1b\[[0-9;]*m", "", run.stdout + run.stderr)
    warnings = [line for line in output.splitlines() if line.startswith("griffe:")]
    if run.returncode or warnings:
        print(output.split("Traceback")[0].strip(), file=sys.stderr)
        return 1
    print(f"{SITE.relative_to(ROOT)}/index.html")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only-pages", action="store_true", help="write the generated pages, and build nothing")
    only_pages = parser.parse_args().only_pages
    for name, page in (("python", python_page), ("cli", cli_page), ("http", http_page), ("settings", settings_page)):
        (PAGES / f"{name}.md").write_text(re.sub(r"\n{3,}", "\n\n", page()).strip() + "\n", encoding="utf-8")
    return 0 if only_pages else build()


if __name__ == "__main__":
    sys.exit(main())
