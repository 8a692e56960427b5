"""Texts of models as HTML: shown, and nothing run."""

from __future__ import annotations

import re

import pytest

from maestro_pl.app.text import LONGEST_FORMULA, markdown, mathematics, plain
from tests.support.run_folders import NASTY

#: What an HTML text may contain: elements without any attribute that acts or loads.
TAG = re.compile(r"<(/?)([a-z0-9]+)((?:\s+[a-z-]+=\"[^\"<>]*\")*)\s*/?>")
ACTS = ("script", "img", "iframe", "a", "svg", "object", "embed", "link", "style", "form")


def assert_dead(html: str) -> None:
    """Every ``<`` begins a plain element."""
    assert len(re.findall("<", html)) == len(TAG.findall(html)), html
    for _, name, attributes in TAG.findall(html):
        assert name not in ACTS, html
        assert not re.search(r"\s(on\w+|href|src|style)=", attributes), html


@pytest.mark.parametrize("text", NASTY)
def test_nothing_that_a_model_writes_acts(text: str) -> None:
    for shown in (markdown(text), plain(text), markdown(f"- **{text}**\n\n| a |\n|---|\n| {text} |\n\n> {text}")):
        assert_dead(str(shown))
        assert "\x1b" not in shown
        assert "\u202e" not in shown


def test_plain_text_is_kept_letter_by_letter() -> None:
    assert plain("a <b> & [bold]c[/bold]\n  d") == "a &lt;b&gt; &amp; [bold]c[/bold]\n  d"
    assert plain("שלום") == "שלום"


def test_markdown_shows_what_people_write() -> None:
    assert markdown("**b** and `c`") == "<p><strong>b</strong> and <code>c</code></p>\n"
    assert markdown("[words](https://x.y)") == (
        '<p><span class="dead-link">words <small>(https://x.y)</small></span></p>\n'
    )
    assert markdown("![alt](https://x.y/z.png)") == '<p><span class="dead-link">[image: alt]</span></p>\n'
    assert "<td>1</td>" in markdown("| a |\n|---|\n| 1 |")


@pytest.mark.parametrize("text", ["$x^2$", r"\(x^2\)", "$$x^2$$", "\\[x^2\\]", "so $x^2$ it is"])
def test_mathematics_becomes_mathml(text: str) -> None:
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in markdown(text)


def test_what_is_no_formula_is_shown_as_written() -> None:
    assert markdown("it costs $5 and $6") == "<p>it costs $5 and $6</p>\n"
    assert mathematics(r"\left( x") == r'<code class="formula">\left( x</code>'
    assert "<math" not in mathematics("x" * (LONGEST_FORMULA + 1))
    assert_dead(str(mathematics(r"\text{<img src=x onerror=1>}\href{javascript:1}{y}")))
