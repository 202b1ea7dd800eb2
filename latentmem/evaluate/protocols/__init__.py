"""One protocol a file: what is written, what is asked, which rows stand beside it."""
