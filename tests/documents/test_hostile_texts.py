"""Texts that look like another kind, name a strange encoding, or have a broken byte are read as they are, and soon."""

import time

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
