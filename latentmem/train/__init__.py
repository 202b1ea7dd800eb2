"""Training: teach a model to write and read its memory (letters: `latentmem.core`).

config.py      what is trained, on what, how: YAML -> dataclasses
data.py        documents and questions from folders, JSON lines and hub sets, in an order that a seed decides
episodes.py    documents -> what is written, what is asked afterwards: one function per objective
learner.py     an episode -> a loss: writes with gradient, a memory of the right age, reads
loop.py        steps, checkpoints, logs: one process or many
probe.py       the live retention curve
"""
