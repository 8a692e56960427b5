"""What a person looks at after a run: its files read, figures as SVG, and ``report.html``.

Core dependencies only; the pages of :mod:`maestro_pl.app` show the same in a browser.
"""
