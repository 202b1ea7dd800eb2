"""Importing the room of transformers silences what its newer versions say of us, and nothing else."""

import subprocess
import sys

CODE = "import warnings, latentmem.decoder; warnings.warn({!r}, FutureWarning)"


def said(sentence):
    return subprocess.run([sys.executable, "-c", CODE.format(sentence)], capture_output=True, text=True).stderr


def test_the_argument_that_transformers_renames_is_not_told_to_the_user():
    assert "FutureWarning" not in said("`past_key_values` is deprecated and will be removed in version 5.40.0.")
    assert "FutureWarning: something else" in said("something else")
