"""Measuring memories: one file per protocol, with the rows that everything is judged against.

settings.py                what each protocol lets one choose; the command line makes its options of it
protocol.py, runner.py     what all protocols share; units of work over processes, resumed after a kill
asking.py, scoring.py      one context, many questions: hit, token accuracy and likelihood of the gold answer
stats.py                   bootstrap intervals over texts
protocols/                 what is measured: the settings, the units and the lines of each protocol
data/                      sets of texts, questions, edits and choices, by name
baselines/                 what a memory is compared with: passages, fine-tuning, rank-one edits
tables/                    what a run leaves in its folder: tables, plots, a page
"""
