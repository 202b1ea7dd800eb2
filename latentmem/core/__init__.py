"""The algorithm: a memory as a value, read as a prefix, written by one forward pass, updated by random drops.

Letters, used in every file, docstring and test:

    L  layers            N  slots that a layer can hold (capacity)     n  tokens of text
    d  hidden width      M  slots that it holds now                    B  batch rows
    K  slots that one update may write per layer                       c  compression: tokens per slot

    read      layer l attends over [first_l ; M_l ; h_l], and only the text h_l asks
    write     one forward pass over the text gives each layer k <= K new slots
    update    drop as many random old slots as do not fit, keep the order of the rest, append the new ones

Read `memory.py` first, then `prefix.py`, then `write.py`.
"""
