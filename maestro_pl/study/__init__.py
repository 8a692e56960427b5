"""A blind comparison by people: which of two answers to the same prompt is better, and by how much one may trust it.

- ``answers.py``: what is compared: recorded answers of runs, or files of answers, to the same prompts.
- ``criteria.py``: what raters are told, task by task (YAML).
- ``plan.py``: who is shown what, on which side and when: drawn once, kept in ``study.json``.
- ``store.py``: the clicks, in one SQLite file.
- ``votes.py``: clicks as votes, without raters who do not read.
- ``statistics.py``: win rates, Bradley-Terry strengths, agreement; pure functions on arrays.
- ``report.py``, ``tables.py``: all of it as tables, a figure, and rows that ``maestro-pl compare`` reads.

The page that raters see is :mod:`maestro_pl.app.study`.
"""
