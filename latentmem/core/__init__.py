"""The paper: a memory as a value, read as a prefix, written by one forward pass, updated by random drops.

Letters, used in every file, docstring and test:

    L  layers            N  slots that a layer can hold (capacity)     n  tokens of text
    d  hidden width      M  slots that it holds now                    B  batch rows
    K  slots that one update may write per layer                       c  compression: tokens per slot

Five ways lead through the package; each begins in this room or ends in it:

    write      model.writing cuts text into pieces -> presets.py, write.py: k slots (-> coding) -> memory.py: update
    ask        read.py: [first_l ; M_l] as keys and values, once per memory -> model.generating behind that prefix
    train      train.learner: write with gradients -> loss behind the memory that was written
    evaluate   evaluate.protocols: write facts, then distractors -> ask -> score
    serve      serve.http -> serve.engine, which has the model's only thread -> store: journal first, memory after

Read `memory.py` first, then `presets.py` and `write.py`, then `read.py`; `settings.py` lists what one may choose.
"""
