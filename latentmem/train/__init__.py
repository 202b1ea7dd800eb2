"""Training: teach a model to write and read its memory (letters: `latentmem.core`).

config.py                      what is trained, on what, how: YAML -> dataclasses
data.py, passages.py           documents in an order that a seed decides -> pieces, questions, turns
words.py, facts.py, scenes.py  invented facts of a person, told and asked
episode.py, episodes.py        what is written, what is asked afterwards: one function per objective
learner.py, retriever.py       an episode -> a loss: writes with gradient, a memory of the right age, reads
build.py                       a config -> model, learner, pool, optimizer; and the file of the result
loop.py                        steps, on one process or many
checkpoint.py, log.py          what a run leaves on disk: state, one line per step, a picture
probe.py                       the live retention curve
calibrate.py, pieces.py        files of texts -> a coder of the model's updates; a run that is stopped goes on
calibration.py                 what a coder is made of: sums over memories, and the fit
"""
