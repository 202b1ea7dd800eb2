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
