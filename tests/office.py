"""For the tests of documents: small files of each kind, made from their parts."""

import email.message
import io
import zipfile
import zlib

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
A = "http://schemas.openxmlformats.org/drawingml/2006/main"
P = "http://schemas.openxmlformats.org/presentationml/2006/main"
S = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
OPEN = "application/vnd.openxmlformats-officedocument."


def packed(parts, stored=()):
    """A zip of name -> text or bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part, zipfile.ZIP_STORED if name in stored else zipfile.ZIP_DEFLATED)
    return file.getvalue()


def _relations(*targets):
    lines = (
        f'<Relationship Id="rId{i}" Type="{RELATION}/{kind}" Target="{target}"/>'
        for i, (kind, target) in enumerate(targets, 1)
    )
    return f'<Relationships xmlns="{RELATIONS}">{"".join(lines)}</Relationships>'


def _types(**parts):
    names = "".join(f'<Override PartName="/{name}" ContentType="{OPEN}{kind}+xml"/>' for name, kind in parts.items())
    return (
        '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Default Extension="xml" ContentType="application/xml"/>{names}</Types>'
    )


def docx(*paragraphs, body="", before="", main="word/document.xml"):
    """A Word document of paragraphs, and whatever else its body is to have."""
    lines = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    document = f'<?xml version="1.0"?>{before}<w:document xmlns:w="{W}"><w:body>{lines}{body}</w:body></w:document>'
    return packed(
        {
            "[Content_Types].xml": _types(**{main: "wordprocessingml.document.main"}),
            "_rels/.rels": _relations(("officeDocument", main)),
            main: document,
        }
    )


def table(*rows):
    """A table for a Word document's body."""
    cell = "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc>"
    lines = "".join(f"<w:tr>{''.join(map(cell.format, row))}</w:tr>" for row in rows)
    return f"<w:tbl>{lines}</w:tbl>"


def pptx(*slides, notes=""):
    """Slides of lines."""
    parts, targets, names = {}, [], {"ppt/presentation.xml": "presentationml.presentation.main"}
    for i, lines in enumerate(slides, 1):
        text = "".join(f"<a:p><a:r><a:t>{line}</a:t></a:r></a:p>" for line in lines)
        shape = (
            '<p:sp><p:nvSpPr><p:cNvPr id="2" name="Text"/><p:cNvSpPr/><p:nvPr/></p:nvSpPr><p:spPr/>'
            f"<p:txBody><a:bodyPr/>{text}</p:txBody></p:sp>"
        )
        head = '<p:nvGrpSpPr><p:cNvPr id="1" name=""/><p:cNvGrpSpPr/><p:nvPr/></p:nvGrpSpPr><p:grpSpPr/>'
        tree = f"<p:cSld><p:spTree>{head}{shape}</p:spTree></p:cSld>"
        parts[f"ppt/slides/slide{i}.xml"] = f'<p:sld xmlns:p="{P}" xmlns:a="{A}">{tree}</p:sld>'
        names[f"ppt/slides/slide{i}.xml"] = "presentationml.slide"
        targets.append(("slide", f"slides/slide{i}.xml"))
        if notes:
            said = tree.replace(text, f"<a:p><a:r><a:t>{notes}</a:t></a:r></a:p>")
            parts[f"ppt/notesSlides/notesSlide{i}.xml"] = f'<p:notes xmlns:p="{P}" xmlns:a="{A}">{said}</p:notes>'
            names[f"ppt/notesSlides/notesSlide{i}.xml"] = "presentationml.notesSlide"
            parts[f"ppt/slides/_rels/slide{i}.xml.rels"] = _relations(
                ("notesSlide", f"../notesSlides/notesSlide{i}.xml")
            )
    ids = "".join(f'<p:sldId id="{255 + i}" r:id="rId{i}"/>' for i in range(1, len(slides) + 1))
    show = f'<p:presentation xmlns:p="{P}" xmlns:r="{RELATION}"><p:sldIdLst>{ids}</p:sldIdLst></p:presentation>'
    return packed(
        {
            "[Content_Types].xml": _types(**names),
            "_rels/.rels": _relations(("officeDocument", "ppt/presentation.xml")),
            "ppt/presentation.xml": show,
            "ppt/_rels/presentation.xml.rels": _relations(*targets),
            **parts,
        }
    )


def xlsx(**sheets):
    """Sheets of rows of cells: texts and numbers."""
    names, targets, parts = {"xl/workbook.xml": "spreadsheetml.sheet.main"}, [], {}
    for i, rows in enumerate(sheets.values(), 1):
        lines = "".join(
            f'<row r="{y}">{"".join(_cell(x, y, c) for x, c in enumerate(row))}</row>' for y, row in enumerate(rows, 1)
        )
        parts[f"xl/worksheets/sheet{i}.xml"] = f'<worksheet xmlns="{S}"><sheetData>{lines}</sheetData></worksheet>'
        names[f"xl/worksheets/sheet{i}.xml"] = "spreadsheetml.worksheet"
        targets.append(("worksheet", f"worksheets/sheet{i}.xml"))
    ids = "".join(f'<sheet name="{name}" sheetId="{i}" r:id="rId{i}"/>' for i, name in enumerate(sheets, 1))
    return packed(
        {
            "[Content_Types].xml": _types(**names),
            "_rels/.rels": _relations(("officeDocument", "xl/workbook.xml")),
            "xl/workbook.xml": f'<workbook xmlns="{S}" xmlns:r="{RELATION}"><sheets>{ids}</sheets></workbook>',
            "xl/_rels/workbook.xml.rels": _relations(*targets),
            **parts,
        }
    )


def _cell(x, y, content):
    at = f'r="{chr(65 + x)}{y}"'
    if isinstance(content, str):
        return f'<c {at} t="inlineStr"><is><t>{content}</t></is></c>'
    return f"<c {at}><v>{content}</v></c>"


def odf(kind, body):
    """An OpenDocument file: "text", "spreadsheet" or "presentation"."""
    names = "".join(
        f' xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{full}:1.0"'
        for name, full in (("office", "office"), ("text", "text"), ("table", "table"), ("draw", "drawing"))
    )
    content = f"<office:document-content{names}><office:body>{body}</office:body></office:document-content>"
    media_type = f"application/vnd.oasis.opendocument.{kind}"
    return packed({"mimetype": media_type, "content.xml": content}, stored=("mimetype",))


def epub(*chapters):
    """A book of chapters of HTML."""
    items = "".join(
        f'<item id="c{i}" href="c{i}.xhtml" media-type="application/xhtml+xml"/>' for i in range(len(chapters))
    )
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(chapters)))
    about = '<dc:title xmlns:dc="http://purl.org/dc/elements/1.1/">A book</dc:title>'
    return packed(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
            '<rootfiles><rootfile full-path="o/book.opf"/></rootfiles></container>',
            "o/book.opf": f'<package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata>{about}</metadata>'
            f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
            **{
                f"o/c{i}.xhtml": f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>t</title>'
                f"<style>p {{color: red}}</style></head><body>{chapter}</body></html>"
                for i, chapter in enumerate(chapters)
            },
        },
        stored=("mimetype",),
    )


def pdf(*lines, stream=None, trailer=""):
    """One page of lines, or of a stream; `trailer` adds to the trailer."""
    if stream is None:
        text = b" T* ".join(b"(" + line.encode("cp1252") + b") Tj" for line in lines)
        stream = zlib.compress(b"BT /F1 12 Tf 72 720 Td 14 TL " + text + b" ET")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d /Filter /FlateDecode >> stream\n" % len(stream) + stream + b"\nendstream",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    file, places = b"%PDF-1.4\n", []
    for i, one in enumerate(objects, 1):
        places.append(len(file))
        file += b"%d 0 obj\n" % i + one + b"\nendobj\n"
    table_ = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (trailer.encode(), len(file))
    return file + b"xref\n0 6\n0000000000 65535 f \n" + table_ + end


ENCRYPTED = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{'41' * 32}> /U <{'42' * 32}> /P -4 >> /ID [<01> <01>]"


def eml(text, html=None, subject="The lease", charset="utf-8", cte=None, **attached):
    """An e-mail."""
    mail = email.message.EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = subject, "Ada Brix <ada@example.org>", "bo@example.org"
    mail["Date"] = "Tue, 01 Dec 2026 09:00:00 +0000"
    mail["Message-ID"], mail["X-Mailer"] = "<1@example.org>", "robot"
    mail.set_content(text, charset=charset, cte=cte)
    if html:
        mail.add_alternative(html, subtype="html")
    for name, data in attached.items():
        mail.add_attachment(data, maintype="application", subtype="octet-stream", filename=name)
    return bytes(mail)
