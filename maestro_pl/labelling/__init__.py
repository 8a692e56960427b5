"""Labels that people give in a browser: which questions are asked, where answers are kept, and what they teach.

- ``questions.py``: which groups and which of their responses are shown, and how a question is known again.
- ``store.py``: one SQLite file for every click, for several people and runs.
- ``exchange.py``: the same labels as CSV, JSONL, and in the formats of Argilla and Label Studio.
- ``reading.py``, ``importing.py``: such files read, and what becomes of their labels.
- ``live.py``: questions about the groups that a running run records.
- ``teaching.py``: the weights that the clicks so far give, and how well the next click is predicted.

The page is ``maestro_pl/app/label.py``, the command ``maestro-pl label``, and ``callbacks.PeopleAnchor`` trains with them.
"""
