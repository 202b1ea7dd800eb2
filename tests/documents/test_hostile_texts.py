"""Texts that look like another kind, name a strange encoding, or have a broken byte are read as they are, and soon."""

import time

import pytest

from latentmem import documents


def text_of(data, name="a.txt"):
    return documents.from_bytes(data, name).text


def seconds(data, name="a.txt"):
    start = time.monotonic()
    assert text_of(data, name) == data.decode()
    return time.monotonic() - start


def test_comments_before_a_text_take_no_time():
    for comment in ("<!---->", "<!-- markdownlint-disable MD013 -->\n", "<!-- > -- -->  \n"):
        assert seconds((comment * (8192 // len(comment)) + "x").encode()) < 1
    assert text_of(b"<!-- a --> <!-- b -->\n<!doctype html><p>Hi", "x") == "Hi"


@pytest.mark.parametrize("codec", ["punycode", "idna", "unicode_escape", "raw-unicode-escape", "UTF-7"])
def test_a_codec_that_is_no_encoding_of_texts_is_refused(codec):
    data = b"<meta charset=" + codec.encode() + b">" + b"\xe9t\xe9 a-b " * 40_000
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"there is no text encoding '{codec}'"):
        documents.from_bytes(data, "a.txt", codec)
    assert documents.from_bytes(data, "a.txt").guess == "cp1252" and time.monotonic() - start < 5


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
