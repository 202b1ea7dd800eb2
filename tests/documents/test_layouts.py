"""What stands in a column, a block of code or a head of a page stays what it is; links lead nowhere twice."""

import office
import pytest

from latentmem import documents


def lines(data, name):
    data = data.encode() if isinstance(data, str) else data
    return [line for line in documents.from_bytes(data, name).text.split("\n") if line]


# --- columns ----------------------------------------------------------------------------------------------------------


def sheet(*rows):
    rows = "".join(f"<table:table-row>{row}</table:table-row>" for row in rows)
    table = f"<table:table>{rows}</table:table>"
    return office.odf("spreadsheet", f"<office:spreadsheet>{table}</office:spreadsheet>")


def cells(*texts, more=""):
    return "".join(f"<table:table-cell{more}><text:p>{text}</text:p></table:table-cell>" for text in texts)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            cells("Ada Brix") + '<table:table-cell table:number-columns-repeated="2"/>' + cells("4"),
            "name: Ada Brix, floor: 4",
        ),
        (
            cells("Ada", more=' table:number-columns-spanned="3"')
            + '<table:covered-table-cell table:number-columns-repeated="2"/>'
            + cells("4"),
            "name: Ada, floor: 4",
        ),
        (
            cells("Ada") + "<table:covered-table-cell><text:p>no</text:p></table:covered-table-cell>" + cells("5", "4"),
            "name: Ada, paid: 5, floor: 4",
        ),
        (
            cells("Ada", "9") + '<table:table-cell table:number-columns-repeated="16382"/>',
            "name: Ada, rent: 9",
        ),
    ],
)
def test_empty_and_covered_cells_of_a_sheet_keep_their_columns(row, line):
    head = cells("name", "rent", "paid", "floor") + '<table:table-cell table:number-columns-repeated="16380"/>'
    assert lines(sheet(head, row), "a.ods") == [line]


def test_many_columns_that_are_alike_move_no_column():
    head = cells(*(f"column {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(202)))
    row = cells("7", more=' table:number-columns-repeated="200"') + cells("4", "5")
    assert lines(sheet(head, row), "a.ods")[0].endswith("column du: 7, column dv: 7, column hs: 4, column ht: 5")


def test_wide_cells_of_a_word_table_keep_their_columns():
    def wide(text, span):
        return f'<w:tc><w:tcPr><w:gridSpan w:val="{span}"/></w:tcPr><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:tc>'

    head = "".join(wide(text, 1) for text in ("name", "rent", "floor"))
    rows = (
        head,
        wide("Ada", 2) + wide("4", 1),
        '<w:trPr><w:gridBefore w:val="1"/></w:trPr>' + wide("9", 1) + wide("5", 1),
    )
    table = "".join(f"<w:tr>{row}</w:tr>" for row in rows)
    data = office.docx(body=f"<w:tbl>{table}</w:tbl>")
    assert lines(data, "a.docx") == ["name: Ada, floor: 4", "rent: 9, floor: 5"]


# --- markdown ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markdown", "words"),
    [
        ("```pip install latentmem```\n\nThe *lease*.", ["pip install latentmem", "The lease."]),
        ("# C#\n## F# ##\nText", ["C#", "F#", "Text"]),
        ("```md\n```python\n*a*\n```\n*b*", ["```python", "*a*", "b"]),
        ("[^1]: It was signed by Ada Brix in Oslo.", ["[^1]: It was signed by Ada Brix in Oslo."]),
        ("[Ada]: I have paid the rent.", ["[Ada]: I have paid the rent."]),
        ("[Ada]: Yes.", ["[Ada]: Yes."]),
        ("[a]: http://x.example/ 'The lease'\n[b]: <notes.md>\n[c]: notes.md\n[//]: # (no)\nYes", ["Yes"]),
        ("[the house][H] and [this][], a[i][j]\n\n[h]: /h\n[THIS]: #x", ["the house and this, a[i][j]"]),
        ("`<!-- a -->` b <!-- c\nd --> e", ["<!-- a --> b  e"]),
        ("```html\n<!-- a -->\n<style>b</style>\n```\n<style>c</style>d", ["<!-- a -->", "<style>b</style>", "d"]),
        ("it's ` one\n<!-- no -->two ` <!-- three", ["it's ` one", "two ` <!-- three"]),
        ("| a | b |\n|---|---|\n||5|\n| 6 | 7 \\|", ["b: 5", "a: 6, b: 7 |"]),
    ],
)
def test_markdown_loses_signs_and_no_words(markdown, words):
    assert lines(markdown, "x.md") == words


@pytest.mark.parametrize("signs", ["<!--", "<script ", "`<!--", "``` `"])
def test_markdown_of_signs_alone_is_read(signs):
    text = "a" + signs * (800_000 // len(signs))
    assert documents.from_bytes(text.encode(), "x.md").text.startswith("a")


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        "<head><title>Lease</title><h1>Lease</h1><p>Ada Brix signed.</p></html>",
        "<head><title>Lease</title><meta charset=utf-8><style>no</style><div>Ada Brix signed.</div>",
        "<head><title>Lease</title><script>no</script>Ada Brix signed.</html>",
        "<head><title>Lease</title><body><p>Ada Brix signed.",
    ],
)
def test_a_head_that_is_left_open_ends_where_the_page_begins(page):
    assert lines(f"<!DOCTYPE html><html>{page}", "x.html") == ["Lease", "Ada Brix signed."]


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_give_no_file_twice_and_none_of_elsewhere(tmp_path):
    notes = tmp_path / "notes"
    for path in ("notes/a.md", "notes/s/b.md", "notes/s/.h/c.md", "secret.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    (notes / "loop").symlink_to(".")
    (notes / "s" / "up").symlink_to("..")
    (notes / "s" / "out.md").symlink_to(tmp_path / "secret.md")
    (notes / "s" / "in.md").symlink_to(notes / "a.md")

    def names(pattern):
        return [name for name, _ in documents.matching(f"{tmp_path}/{pattern}").files]

    below = ["s/b.md", "s/in.md"]
    assert names("notes/**/*.md") == names("notes/**") == ["a.md", *below]
    assert names("notes/*") == ["a.md", *below] and names("notes/*/*.md") == names("notes/**/s/*.md") == below
    assert names("notes/**/.h/*") == ["s/.h/c.md"]
    assert [name for name, _ in documents.under(notes).files] == ["a.md", *below]
    for listing in (documents.matching(f"{notes}/**/*.md"), documents.under(notes)):
        skipped = dict(listing.skipped)
        assert skipped["s/out.md"] == "a link to a file elsewhere" and skipped["loop/"] == "a link to a folder"


# --- XML --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markup", "words"),
    [
        ("<doc><p>Ada <b>Brix</b> sign<i>ed</i> it.</p><p>Yes.</p></doc>", ["Ada Brix signed it.", "Yes."]),
        ("<doc>Buy:<one>milk</one><one>eggs</one><p>Now</p></doc>", ["Buy:milk eggs", "Now"]),
        (
            "<svg xmlns='http://www.w3.org/2000/svg'><style>no</style><script>no</script>"
            "<text>Ada <tspan>Brix</tspan></text></svg>",
            ["Ada Brix"],
        ),
        (
            "<opml><head><title>t</title></head><body><outline text='a'><outline text='b'/></outline></body></opml>",
            ["t", "a", "b"],
        ),
        ("<beers><beer><style>Lager</style></beer></beers>", ["Lager"]),
    ],
)
def test_xml_is_its_lines(markup, words):
    assert lines(f"<?xml version='1.0'?>{markup}", "x.xml") == words
