"""Sets of texts, questions, edits and choices."""
