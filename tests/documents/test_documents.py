"""Files that people have become plain sentences; of a hostile or broken one a sentence says what is wrong."""

import os
import subprocess
import sys
import zlib

import office
import pytest

from latentmem import documents
from latentmem.documents import Limits
from latentmem.errors import UnreadableError

HTML = """<!DOCTYPE html><html><head><title>The red house</title><style>p {color: red}</style>
<script>alert("<p>no</p>")</script></head><body><nav>Home <a href="/">Menu</a></nav><h1>The lease</h1>
<p>The <b>red</b> house &amp; its gar<i>den</i>, <a href="http://x.example/">signed</a> by&nbsp;Ada.<!-- no -->
<br>Yes.</p>
<ul><li>one</li><li>two<ul><li>deep</ul></ul><blockquote>quoted</blockquote><dl><dt>term<dd>meaning</dl>
<table><tr><th>name<th>age<tr><td>Ada<td>36</table><pre>a  b
  c</pre><p hidden>no</p><div style="display: none">no<p>no</div><template>no</template><noscript>no</noscript>
<svg><title>no</title><text>no</text></svg><img alt="no" src="x.png"><p>5 &lt; 6</body></html>"""
SEEN = [
    *(
        "The red house",
        "The lease",
        "The red house & its garden, signed by Ada.",
        "Yes.",
        "one",
        "two",
        "deep",
        "quoted",
    ),
    *("term", "meaning", "name, age", "Ada, 36", "a  b", "  c", "5 < 6"),
]
MARKDOWN = """---
title: Notes
---
# The **lease** #

The *red* house & [the garden](http://x.example/a_(b)), ![a plan](plan.png) `code_x * 2`, 2 * 3 * 4 and snake_case_name.
Signed by __Ada__ &amp; _Bo_ \\*really\\*. <br/> List<int> stays.<!-- no
no --><script>no()</script>

Head
----
> * [x] done
> * open

| name | age |
| --- | --: |
| **Ada** | 36 |

```python
x = "**" * 2  # y
```
[1]: http://x.example/
"""
WORDS = [
    *("title: Notes", "The lease"),
    "The red house & the garden, a plan code_x * 2, 2 * 3 * 4 and snake_case_name.",
    *("Signed by Ada & Bo *really*.  List<int> stays.", "Head", "- done", "- open", "name: Ada, age: 36"),
    'x = "**" * 2  # y',
]
SIGNS = "Smith &amp; Sons &lt;x&gt; it&#8217;s"  # as XML writes what stands in PLAIN
PLAIN = "Smith & Sons <x> it’s"


def text_of(data, name, **limits):
    return documents.from_bytes(data, name, limits=Limits(**limits)).text


def lines(data, name):
    return [line for line in text_of(data, name).split("\n") if line]


def refused(sentence, data, name="x", **limits):
    with pytest.raises(UnreadableError) as caught:
        text_of(data, name, **limits)
    message = str(caught.value)
    assert message.startswith(f"{name} ") and sentence in message and message.endswith(".") and "\n" not in message
    return message


# --- what a person sees of each kind --------------------------------------------------------------------------------


def test_html_is_what_a_browser_shows():
    assert lines(HTML.encode(), "page.html") == SEEN
    assert lines(HTML.encode(), "page") == SEEN  # the content says what it is


def test_html_that_breaks_every_rule_keeps_its_words():
    soup = b"<p>one<p>two</i></div><div>three<td>four<li>five<b>six</p>se<!-- > -->ven <script>no"
    assert "".join(text_of(soup, "x.htm").split()) == "onetwothree,fourfivesixseven"
    assert "no" not in text_of(b"<html><script>no</html>yes</script><p>that", "x.html")


def test_xml_is_its_texts():
    item = b"<item><title>Caf\xe9</title><d>&lt;p&gt;a &lt;b&gt;b&lt;/b&gt;</d></item>"
    feed = b"<?xml version='1.0' encoding='iso-8859-1'?><rss>" + item + b"</rss>"
    assert lines(feed, "feed.rss") == ["Café", "a b"]
    assert lines(b"<a><b>broken & text</a>", "x.xml") == ["broken & text"]


def test_markdown_is_its_words():
    assert lines(MARKDOWN.encode(), "notes.md") == WORDS
    assert text_of(MARKDOWN.encode(), "notes.txt") == MARKDOWN  # a text file stays as it is


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ('name;age\n"Brix; Ada";36\n\nBo;4\n', ["name: Brix; Ada, age: 36", "name: Bo, age: 4"]),
        ("Name,Born\nAda,1990\nBo,\n", ["Name: Ada, Born: 1990", "Name: Bo"]),
        ("city\tperson\nOslo\tAda\n", ["city: Oslo, person: Ada"]),
        ("Ada,Oslo\nBo,Bergen\n", ["Ada, Oslo", "Bo, Bergen"]),  # no head: nobody is called Ada twice
        ('Ada,"Oslo, Norway"\n', ["Ada; Oslo, Norway"]),
        ("1,2\n3,4\n", ["1, 2", "3, 4"]),
        ("sep=|\na,b|1\nc,d|2\n", ["a,b; 1", "c,d; 2"]),
        ("one line of text\n", ["one line of text"]),
    ],
)
def test_rows_of_a_csv_are_lines_that_name_their_columns(table, rows):
    assert lines(table.encode(), "x.csv") == rows
    assert lines(table.replace("\n", "\r\n").encode("utf-16"), "x.tsv") == rows


def test_a_word_document():
    run = "<w:r><w:t xml:space='preserve'>{}</w:t></w:r>".format
    body = (
        f"<w:p>{run('ins ')}<w:ins>{run('added')}</w:ins><w:del><w:r><w:delText>no</w:delText></w:r></w:del>"
        f"<w:r><w:tab/><w:t>after</w:t></w:r></w:p><w:sdt><w:sdtContent><w:p>{run('control')}</w:p></w:sdtContent></w:sdt>"
        '<w:p><w:pPr><w:tabs><w:tab w:val="left"/></w:tabs></w:pPr><w:r><mc:AlternateContent xmlns:mc="m">'
        f"<mc:Choice><w:p>{run('box')}</w:p></mc:Choice><mc:Fallback><w:p>{run('box')}</w:p></mc:Fallback>"
        "</mc:AlternateContent></w:r></w:p>"
    )
    data = office.docx("The lease.", SIGNS, body=body + office.table(("name", "age"), ("Ada", "36")))
    expected = ["The lease.", PLAIN, "ins added\tafter", "control", "box", "name: Ada, age: 36"]
    assert lines(data, "a.docx") == expected
    assert lines(office.docx("The lease.", main="word/document2.xml"), "a.docx") == ["The lease."]


def test_slides_and_their_notes_stand_in_their_order():
    data = office.pptx(["The lease", SIGNS], ["Second"], notes="say it")
    assert lines(data, "a.pptx") == ["The lease", PLAIN, "say it", "Second", "say it"]


def test_sheets_with_their_names():
    data = office.xlsx(People=[("name", "age"), (SIGNS, 36), ("Bo", 4.5)], Other=[("lone",)])
    assert lines(data, "a.xlsx") == ["People", f"name: {PLAIN}, age: 36", "name: Bo, age: 4.5", "Other", "lone"]


def test_a_book_is_its_chapters():
    data = office.epub(
        f"<h1>One</h1><p>{SIGNS} d<b>ar</b>k</p><script>no</script>", "<dl><dt>t</dt><dd>caf&#233;</dd></dl>"
    )
    assert lines(data, "a.epub") == ["One", f"{PLAIN} dark", "t", "café"]


def test_a_pdf_is_its_sentences_once():
    data = office.pdf(
        "The lease of the red house", "was signed by Ada Brix, a plumb\xader", "from Oslo.", "Yes & no <b>"
    )
    assert "was signed by Ada Brix" in text_of(data, "a.pdf") and text_of(data, "a.pdf").count("lease") == 1
    assert lines(office.pdf("The lease was signed by Ada,", "a plumber.", "Next"), "a.pdf") == [
        *("The lease was signed by Ada, a plumber.", "Next")
    ]


def test_an_e_mail_is_its_body_and_who_wrote_it():
    head = ["Subject: Größe", "From: Ada Brix <ada@example.org>", "To: bo@example.org"]
    data = office.eml("Hello Bö.\n", html="<p>no</p>", subject="Größe", **{"plan.bin": b"123"})
    assert (
        lines(data, "a.eml")
        == lines(data, "a")
        == [*head, "Date: Tue, 01 Dec 2026 09:00:00 +0000", "Hello Bö.", "Attached: plan.bin"]
    )
    for charset, words in (("shift_jis", "東京の家"), ("koi8-r", "Привет"), ("iso-8859-1", "Straße")):
        for transfer in ("8bit", "base64", "quoted-printable"):
            mail = office.eml(words, subject=words, charset=charset, cte=transfer)
            assert lines(mail, "a.eml")[0] == f"Subject: {words}" and lines(mail, "a.eml")[-1] == words
    box = b"".join(b"From a@b Tue Dec  1 09:00:00 2026\n" + office.eml(words) + b"\n" for words in ("one", "two"))
    assert [line for line in lines(box, "a.mbox") if ":" not in line] == ["one", "two"]
    only_html = (
        b"Received: x\nSubject: s\nContent-Type: text/html; charset=utf-8\n\n<p>Hello <b>Bo</b><script>no</script>"
    )
    assert lines(only_html, "a.eml") == ["Subject: s", "Hello Bo"]
    assert lines(b"Subject: s\n\nk\xf6nnen schl\xf6\xdfe\n", "a.eml") == ["Subject: s", "können schlöße"]


def test_opendocument():
    cell = "<table:table-cell{}><text:p>{}</text:p></table:table-cell>".format
    rows = ((cell("", "name"), cell("", "age")), (cell("", SIGNS), cell("", "36")))
    sheet = "".join(f"<table:table-row>{''.join(row)}</table:table-row>" for row in rows)
    many = ' table:number-columns-repeated="99999"'
    sheet = f"<table:table>{sheet}<table:table-row><table:table-cell{many}/></table:table-row></table:table>"
    text = (
        f"<text:h>Head</text:h>\n<text:p>{SIGNS} a<text:tab/>b<text:s/>c<text:line-break/>d <text:span>sp</text:span>an"
        "<text:note><text:note-citation>1</text:note-citation>\n<text:note-body><text:p>foot</text:p></text:note-body>"
        "</text:note></text:p>"
        "<text:list><text:list-item><text:p>item</text:p></text:list-item></text:list>"
    )
    expected = ["Head", f"{PLAIN} a\tb c", "d span (foot)", "item", f"name: {PLAIN}, age: 36"]
    assert lines(office.odf("text", f"<office:text>{text}{sheet}</office:text>"), "a.odt") == expected
    data = office.odf("spreadsheet", f"<office:spreadsheet>{sheet}</office:spreadsheet>")
    assert lines(data, "a.ods") == expected[-1:]
    pages = "".join(f"<draw:page><draw:frame><text:p>{one}</text:p></draw:frame></draw:page>" for one in ("one", "two"))
    assert lines(office.odf("presentation", f"<office:presentation>{pages}</office:presentation>"), "a.odp") == [
        "one",
        "two",
    ]


def test_rtf():
    data = rb"{\rtf1\ansi\ansicpg1252{\fonttbl{\f0 Arial;}}\f0 The {\b lease} of the stra\'dfe.\par Next \u8364? line.}"
    assert lines(data, "a.rtf") == ["The lease of the straße.", "Next € line."]


# --- text in any encoding -------------------------------------------------------------------------------------------

ENGLISH = "It’s a café – the “Red House” costs £5, says Ada."
GERMAN = "Die Straße führt über die Brücke. Größe: fünf Meter."
JAPANESE = "赤い家の賃貸契約はオスロの配管工が署名した。金庫の番号は4711です。"
CHINESE = "红房子的租约由奥斯陆的水管工艾达签署。保险箱的密码是4711。"
RUSSIAN = "Договор аренды красного дома подписала Ада. Код сейфа 4711."
TEXTS = [
    *(
        (text, name)
        for text in (ENGLISH, GERMAN, JAPANESE, RUSSIAN)
        for name in ("utf-8", "utf-8-sig", "utf-16", "utf-32")
    ),
    *((GERMAN, name) for name in ("latin-1", "cp1252", "iso8859-15", "utf-16-le", "utf-16-be", "mac-roman")),
    *((JAPANESE, name) for name in ("shift_jis", "euc_jp", "iso2022_jp", "utf-16-le")),
    *((RUSSIAN, name) for name in ("koi8-r", "cp1251")),
    *((CHINESE, name) for name in ("gb18030", "gbk")),
    (ENGLISH, "cp1252"),
    ("Zażółć gęślą jaźń, a kot śpi pod łóżkiem.", "cp1250"),
    ("Příliš žluťoučký kůň úpěl ďábelské ódy.", "cp1250"),
    ("紅房子的租約由奧斯陸的水管工簽署。", "big5"),
    ("빨간 집의 임대 계약은 오슬로의 배관공이 서명했다.", "euc_kr"),
    ("Το συμβόλαιο του κόκκινου σπιτιού.", "cp1253"),
    ("חוזה השכירות של הבית האדום", "cp1255"),
    ("你好，世界", "gb18030"),
    ("Привет, мир!", "koi8-r"),
]


@pytest.mark.parametrize(("text", "encoding"), TEXTS, ids=lambda one: one[:12])
def test_text_in_any_encoding_is_read(text, encoding):
    for whole in (text, f"{text}\r\n" * 30):
        data = whole.encode(encoding)
        assert documents.from_bytes(data, "a.txt").text == whole
        assert documents.from_bytes(data, "a.txt", encoding).text == whole


def test_a_guess_is_named_and_a_named_encoding_counts():
    data = "caf\xe9 na\xefve".encode("cp1252")
    assert documents.from_bytes(data, "a.txt") == ("café naïve", "cp1252")
    assert documents.from_bytes(data, "a.txt", "cp1251") == ("cafй naпve", "")
    assert documents.from_bytes("ä".encode(), "a.txt").guess == ""
    assert documents.from_bytes("“so” 髙".encode("cp932"), "a.txt", "shift_jis").text == "“so” 髙"
    assert documents.from_bytes("“so”".encode("cp1252"), "a.txt", "latin-1").text == "“so”"
    with pytest.raises(ValueError, match=r"there is no text encoding 'klingon'.*utf-8"):
        documents.from_bytes(b"a", "a.txt", "klingon")
    with pytest.raises(ValueError, match="no text encoding 'base64'"):
        documents.from_bytes(b"a", "a.txt", "base64")
    for encoding in ("utf-8", "ascii", "shift_jis", "utf-16"):
        with pytest.raises(UnreadableError, match=r"a.txt is not text in"):
            documents.from_bytes(b"\xff\x80\xe9", "a.txt", encoding)


def test_html_in_the_encoding_that_it_declares():
    page = '<html><head><meta charset="{}"></head><body><p>Größe</p></body></html>'
    for charset in ("iso-8859-1", "utf-8", "mac-roman"):
        assert text_of(page.format(charset).encode(charset), "a.html") == "Größe"
    assert text_of(page.format("utf-8").encode("cp1252"), "a.html") == "Größe"  # a declaration that is wrong
    assert text_of(page.format("x").encode("utf-16"), "a.html") == "Größe"


# --- what is wrong, in a sentence -----------------------------------------------------------------------------------

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256))


@pytest.mark.parametrize(
    ("sentence", "data", "name"),
    [
        ("is empty", b"", "a.pdf"),
        ("is empty", b" \n\t", "a.txt"),
        ("is empty", b"\xef\xbb\xbf", "a.txt"),
        ("is empty", "\ufeff \n".encode("utf-16"), "a.txt"),
        ("is not text", PNG, "a.txt"),
        ("is not text", PNG, "a.docx"),
        ("is not text", bytes(range(256)) * 20, "a.pdf"),
        ("is not text", b"words \0 with \x01\x02 signs", "a.txt"),
        ("is broken", office.pdf("x")[:150], "a.pdf"),
        ("is broken", b"%PDF-1.7\n" + bytes(range(256)) * 9, "a.pdf"),
        ("is broken", office.docx("x" * 99)[:-60], "a.docx"),
        ("is broken", b"PK\x03\x04", "a.xlsx"),
        ("is broken", office.packed({"[Content_Types].xml": "", "word/document.xml": "<w"}), "a.docx"),
        ("is broken", office.packed({"[Content_Types].xml": "", "xl/workbook.xml": "<w"}), "a.xlsx"),
        ("is broken", office.packed({"META-INF/container.xml": "<w"}), "a.epub"),
        ("is encrypted", office.pdf("x", trailer=office.ENCRYPTED), "a.pdf"),
        (
            "is encrypted",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500) + "EncryptedPackage".encode("utf-16-le"),
            "a.docx",
        ),
        ("is a file of a kind", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "a.doc"),
        ("probably scanned", office.pdf(), "a.pdf"),
        ("is an archive", office.packed({"a.txt": "text"}), "a.zip"),
        ("is an archive", office.packed({"a.txt": "text"}), "a.docx"),
        ("export it as PDF", office.packed({"Index/Document.iwa": "x"}), "a.pages"),
        ("is an archive", office.packed({}), "a.docx"),
        ("holds no text", office.docx(), "a.docx"),
        ("holds no text", office.xlsx(Empty=[]), "a.xlsx"),
        ("holds no text", b"<html><script>x</script></html>", "a.html"),
    ],
)
def test_what_holds_no_text_is_told_in_a_sentence(sentence, data, name):
    refused(sentence, data, name)


def test_the_content_counts_and_not_the_name():
    assert lines(office.pdf("The lease."), "notes.txt") == ["The lease."]
    assert lines(office.docx("The lease."), "x.zip") == lines(office.docx("The lease."), "x.pdf") == ["The lease."]
    assert text_of(b"a text", "a.pdf") == text_of(b"a text", "a.docx") == text_of(b"a text", "a.eml") == "a text"
    assert lines(b"<!doctype html><p>Hi", "x.doc") == ["Hi"]
    assert text_of(b"b'%PDF-1.4' is how a PDF begins", "a.py") == "b'%PDF-1.4' is how a PDF begins"
    assert text_of(b"Dear: Bo\n\nHi", "a.txt") == "Dear: Bo\n\nHi"


def encrypted(data):
    """A zip whose parts say that they are encrypted."""
    return data.replace(b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\1\0").replace(
        b"\x14\x03\x14\0\0\0", b"\x14\x03\x14\0\1\0"
    )


def test_encrypted_archives():
    refused("is encrypted", encrypted(office.docx("x")), "a.docx")
    refused("is encrypted", encrypted(office.xlsx(A=[("x",)])), "a.xlsx")


def test_a_zip_bomb_is_refused_before_it_bursts():
    zeros = bytes(210_000_000)
    bomb = office.packed({"[Content_Types].xml": "", "word/document.xml": zeros, "xl/a.xml": ""})
    refused("unpacks to more than 200 MB", bomb, "a.docx")
    size = len(zeros).to_bytes(4, "little")
    lie = bomb.replace(size, (99).to_bytes(4, "little"))  # both of its heads say 99 bytes
    assert lie != bomb
    refused("is broken", lie, "a.docx")


def test_a_pdf_that_takes_too_much_is_given_up():
    stream = zlib.compress(b"BT /F1 12 Tf (x) Tj ET " * 4_000_000)
    refused("can not be read", office.pdf(stream=stream), "a.pdf", memory=400 << 20)
    refused("takes more than 0.01 s", office.pdf("x"), "a.pdf", seconds=0.01)


def test_entities_neither_burst_nor_read_files(tmp_path):
    (tmp_path / "secret").write_text("secret")
    nested = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "ha"}">' for i in range(10))
    for entities, name in ((nested, "a9"), (f'<!ENTITY x SYSTEM "file://{tmp_path}/secret">', "x")):
        before = f"<!DOCTYPE d [{entities}]>"
        refused("is broken", office.docx(f"&{name};", before=before), "a.docx")
        xml = f"<?xml version='1.0'?>{before}<d>text &{name};</d>".encode()
        assert "secret" not in text_of(xml, "a.xml") and len(text_of(xml, "a.xml")) < 1000


def test_deep_nesting_is_no_crash():
    assert text_of(b"<div>" * 100_000 + b"deep", "a.html") == "deep"
    deep = office.docx(body="<w:p>" * 50_000 + "</w:p>" * 50_000)
    refused("is broken", deep, "a.docx")


def test_files_that_are_too_large_are_refused_unread(tmp_path):
    path = tmp_path / "huge.pdf"
    with path.open("wb") as file:
        file.truncate(500_000_000)
    with pytest.raises(UnreadableError, match=r"huge.pdf has 500 MB, and 100 MB are the most; split it"):
        documents.read(path)
    refused("has 11 bytes, and 10 bytes are the most", b"x" * 11, bytes=10)
    refused("holds 11 characters, and 10 are the most", b"x" * 11, characters=10)
    refused("holds 11 characters, and 10 are the most", office.docx("x" * 11), characters=10)
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UnreadableError, match="is no regular file"):
            documents.read(place)


def test_without_the_extra_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "kreuzberg.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    refused("is a PDF: run `pip install 'latentmem[files]'`", office.pdf("x"), "a.pdf")
    refused("is an Excel sheet: run `pip install 'latentmem[files]'`", office.xlsx(A=[("x",)]), "a.xlsx")
    assert lines(office.docx("The lease."), "a.docx") == ["The lease."]  # needs none


def test_reading_leaves_no_file_and_no_library_behind(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert lines(office.pdf("The lease."), "a.pdf") == ["The lease."]
    assert not list(tmp_path.rglob("*"))  # kreuzberg would unpack a library, and keep the text
    code = "import sys, latentmem, latentmem.cli, latentmem.documents; assert 'kreuzberg' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- folders and patterns -------------------------------------------------------------------------------------------


def test_a_folder_is_all_its_files_but_the_hidden_ones(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", ".git/config", "a/.hidden", "a b/ü.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    listing = documents.under(tmp_path)
    names = ["a/b/c.txt", "a/z.md", "a b/ü.txt", "b.txt", "link.txt"]
    assert listing.files == [(name, tmp_path / name) for name in names]
    assert dict(listing.skipped) == {
        ".git/": "hidden",
        "a/.hidden": "hidden",
        "loop/": "a link to a folder",
        "nowhere": "no regular file",
        "pipe": "no regular file",
    }


def test_a_pattern_names_files_under_its_fixed_folder(tmp_path, monkeypatch):
    for name in ("n/a.txt", "n/b.md", "n/s/c.txt", "n/.d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)

    def names(pattern):
        return [name for name, _ in documents.matching(pattern).files]

    assert names("n/*.txt") == names(f"{tmp_path}/n/*.txt") == ["a.txt"]
    assert names("n/**/*.txt") == ["a.txt", "s/c.txt"]
    assert names("n/*") == ["a.txt", "b.md", "s/c.txt"]
    assert names("*/b.md") == ["n/b.md"] and names("n/[x-z]*") == []
