"""Texts that look like another kind, name a strange encoding, or have a broken byte are read as they are, and soon."""

import os
import subprocess
import sys
import tracemalloc
from email.message import EmailMessage
from pathlib import Path

import pytest

from latentmem import documents
from latentmem.documents import decoding
from latentmem.errors import UnreadableError


def text_of(data, name="a.txt"):
    return documents.from_bytes(data, name).text


def test_comments_before_a_text_do_not_hang_the_reader():
    read = "import sys; from latentmem import documents as d; print(d.from_bytes(sys.stdin.buffer.read(), 'a').text)"
    for comment in ("<!---->", "<!-- markdownlint-disable MD013 -->\n", "<!-- > -- -->  \n"):
        data = (comment * (8192 // len(comment)) + "x").encode()
        done = subprocess.run([sys.executable, "-c", read], input=data, capture_output=True, check=True, timeout=300)
        assert done.stdout.replace(b"\r", b"") == data + b"\n"
    assert text_of(b"<!-- a --> <!-- b -->\n<!doctype html><p>Hi", "x") == "Hi"


@pytest.mark.parametrize("codec", ["punycode", "idna", "unicode_escape", "raw-unicode-escape", "UTF-7"])
def test_a_codec_that_is_no_encoding_of_texts_is_refused(codec):
    data = b"<meta charset=" + codec.encode() + b">" + b"\xe9t\xe9 a-b " * 40_000
    with pytest.raises(ValueError, match=f"there is no text encoding '{codec}'"):
        documents.from_bytes(data, "a.txt", codec)
    assert documents.from_bytes(data, "a.txt").guess == "cp1252"


@pytest.mark.parametrize("suffix", ["yaml", "txt", "md", "log", ""])
@pytest.mark.parametrize(
    "text",
    [
        "order: 17\nreceived: 2026-05-03\ncustomer: Ada Brix\n\nThe lease is paid.",
        "Received: 3 boxes from Ada Brix.\nPaid: 40 crowns.",
        "Date: 2026-05-03\nTo: Ada Brix\nReceived: from Bo, 3 boxes\n\nPaid.",
        "From: Ada\nSubject: rent\nMessage-ID: 17\nPlace: Oslo\n\nPaid.",
        "From Oslo at 9:00 by train.\nReceived: 3 boxes\n\nPaid.",
        "From: Ada\nTo: Bo\nMIME-Version: 1.0\nis what a mail says.\n\nPaid.",
    ],
)
def test_a_list_with_colons_is_no_mail(text, suffix):
    assert text_of(text.encode(), f"note.{suffix}") == text


def test_a_mail_needs_no_suffix():
    head = b"Return-Path: <ada@example.org>\r\nSubject: rent\r\nFrom: Ada\r\n <ada@example.org>\r\nX-Place: no\r\n\r\n"
    for name in ("mail", "mail.txt", "mail.eml"):
        assert text_of(head + b"Paid.", name) == "Subject: rent\nFrom: Ada <ada@example.org>\n\nPaid."
    box = b"From ada@example.org Tue Dec  1 09:00:00 2026\nFrom: Ada\nTo: Bo\n\n"
    assert text_of(box + b"Paid.", "Inbox") == "From: Ada\nTo: Bo\n\nPaid."


def test_control_characters_are_not_gathered():
    data = "\ufffe".encode() * 3_000_000
    tracemalloc.start()
    assert decoding._tried(data, "utf-8") is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data)


def test_every_text_and_every_name_in_a_mail_is_read():
    inner = [EmailMessage() for _ in range(2)]
    for number, one in enumerate(inner):
        one["Subject"] = f"inner {number}"
        one.set_content(f"forwarded {number}")
        one.add_attachment(b"x", maintype="image", subtype="png", filename=f"in{number}.png")
    mail = EmailMessage()
    mail["Subject"] = "outer"
    mail.set_content("first")
    mail.add_alternative("<p>no</p>", subtype="html")
    mail.make_mixed()
    for one in inner:
        mail.add_attachment(one)
    mail.add_attachment("second", disposition="inline")
    mail.add_attachment("<p>third</p>", subtype="html", disposition="inline")
    mail.add_attachment("in a file", filename="a.txt")
    mail.add_attachment(b"x", maintype="application", subtype="pdf", filename="plan.pdf")
    assert [line for line in text_of(bytes(mail), "a.eml").split("\n") if line] == [
        *("Subject: outer", "first", "Subject: inner 0", "forwarded 0", "Attached: in0.png"),
        *("Subject: inner 1", "forwarded 1", "Attached: in1.png", "second", "third", "Attached: a.txt"),
        "Attached: plan.pdf",
    ]


def test_a_size_that_is_just_too_large_is_told_apart():
    with pytest.raises(UnreadableError, match=r"has 1\.1 MB, and 1 MB are the most"):
        documents.from_bytes(b"x" * 1_100_000, "a", limits=documents.Limits(bytes=1_000_000))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's end")
def test_a_reader_ends_with_the_process_that_waits_for_it():
    reader = (
        "import sys, time; from latentmem.documents import worker; worker.end_with_parent(); print(1, flush=True); "
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {reader + 'time.sleep(60); print(2)'!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"1\n"
        process.terminate()
        assert process.stdout.read() == b""  # the pipe ends with its last holder, which has not printed again


LOG = b"INFO the boiler is warm\n" * 1000


@pytest.mark.parametrize(
    "data",
    [
        "Die Straße führt über die Brücke. ".encode() * 40 + b"\xe2\x82",
        LOG + "Müller zahlt für März.".encode() + b"\xe2\n",
        "Die Straße führt über die Brücke. ".encode() * 40 + b"\xff" + "Größe".encode(),
    ],
)
def test_a_broken_byte_does_not_spoil_a_text(data):
    assert documents.from_bytes(data, "a.txt") == (data.decode("utf-8", "replace"), "utf-8")


@pytest.mark.parametrize("encoding", ["koi8_r", "cp1251"])
def test_a_line_after_many_of_ascii_is_guessed_by_its_own_letters(encoding):
    text = LOG.decode() + "Договор аренды красного дома подписала Ада."
    assert documents.from_bytes(text.encode(encoding), "a.txt") == (text, encoding)


SLOW = """
import sys; from latentmem.documents import process
output = process._output
def slow(command, data, folder, limits):
    print(folder, flush=True)
    return output([sys.executable, "-c", "import time; time.sleep(60)"], data, folder, limits)
process._output = slow
process.convert(b"x", "pdf", None, process.LIMITS)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without a signal")
def test_a_program_that_is_ended_while_it_reads_leaves_no_folder():
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        process.terminate()
    assert process.returncode == 143 and not folder.exists()


def test_folders_of_killed_readers_are_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed, running, other = (tmp_path / name for name in ("latentmem-document-a", "latentmem-document-b", "other"))
    for folder in (killed, running, other):
        folder.mkdir()
        (folder / "library").write_text("x")
    for folder in (killed, other):
        os.utime(folder, (1e9, 1e9))
    assert documents.from_bytes(b"# Title", "a.md").text == "Title"
    assert sorted(tmp_path.iterdir()) == [running, other]
