"""Measuring memories: one file per protocol, with the rows that everything is judged against.

questions.py   sets of texts with questions, by name, and `synthetic.py`, which invents them
asking.py      one context, many questions: hit, token accuracy and likelihood of the gold answer
retention.py   the protocol: what is still known after other texts were written, beside its baselines
runner.py      units of work over processes, kept as JSON lines, resumed after a kill
stats.py       bootstrap intervals over texts; summary.py, plots.py, report.py: tables, a plot, a page
results.py     what a run leaves in its folder
"""
