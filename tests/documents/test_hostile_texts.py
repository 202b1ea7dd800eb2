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
