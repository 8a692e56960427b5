"""The pages that a browser shows: what ``maestro-pl view`` is made of, and what further pages stand on.

Needs the extra ``app`` (FastAPI, Jinja2, htmx in ``static/``); ``import maestro_pl`` does not load it. A page's module
brings a FastAPI application from :func:`maestro_pl.app.web.web_app` and its templates:

- ``web.py``: :func:`~maestro_pl.app.web.web_app` (static files, templates, safety, errors as pages) and
  :class:`~maestro_pl.app.web.Page`, which renders a template and its fragments for htmx.
- ``safety.py``: who may ask (Host, Origin, token) and what a page may load (Content-Security-Policy).
- ``text.py``: Markdown with mathematics, and plain text, of people and models as safe HTML.
- ``serving.py``: :func:`~maestro_pl.app.serving.serve` for a command, :func:`~maestro_pl.app.serving.running` for tests
  and notebooks.
- ``notebook.py``: :func:`~maestro_pl.app.notebook.show` and :func:`~maestro_pl.app.notebook.label`, a page as a frame in a
  notebook.
- ``templates/base.html``, ``static/app.css``, ``static/app.js``: the frame of every page, its style, its keys.

Figures and the reading of a run's files are in :mod:`maestro_pl.report`, which needs no extra.
"""
