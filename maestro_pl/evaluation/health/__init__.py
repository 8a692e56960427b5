"""Is the weighing healthy? Measurements on recent training batches (tensors in, numbers out) and what follows from them.

docs/health.md says what is measured, when it counts as a failure and what to do about it. ``record`` is what is judged,
``weights``, ``tasks`` and ``conflict`` measure, ``findings`` judges, ``advice`` says what to try.
"""
