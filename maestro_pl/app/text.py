"""Texts of people and models as HTML that does nothing: Markdown with mathematics, or letter by letter.

What a model writes is shown and never run: no HTML of its own, no image (a request), no link that can be clicked.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from markupsafe import Markup, escape

from maestro_pl.errors import escaped

LONGEST_FORMULA = 2000  # letters; longer ones are shown as they are written
#: What a formula may be made of (MathML Core, and what latex2mathml wraps around it); others are shown as written.
_MATHML = frozenset({
    "math", "semantics", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub",
    "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts", "mprescripts", "none", "mtable", "mtr",
    "mtd", "mstyle", "mpadded", "mphantom", "menclose", "merror",
})  # fmt: skip
_ATTRIBUTES = frozenset({
    "display", "displaystyle", "mathvariant", "mathsize", "stretchy", "fence", "form", "separator", "lspace",
    "rspace", "width", "height", "depth", "voffset", "linethickness", "accent", "accentunder", "movablelimits",
    "largeop", "minsize", "maxsize", "columnalign", "columnspacing", "rowspacing", "rowlines", "columnlines",
    "scriptlevel", "symmetric", "notation",
})  # fmt: skip


def plain(text: object) -> Markup:
    """The text letter by letter, control characters and what reorders letters made visible; line breaks stay."""
    return escape(escaped(str(text)))


@lru_cache(maxsize=512)
def markdown(text: str) -> Markup:
    r"""Markdown as HTML: emphasis, lists, tables, code, mathematics between dollars or ``\(...\)``.

    HTML is shown as text, an image as its description, and a link as its text with the address beside it.
    """
    return Markup(_parser().render(escaped(text)))  # the parser escapes whatever is no Markdown


def mathematics(latex: str, block: bool = False) -> Markup:
    """A formula as MathML; what cannot be converted is shown as it is written."""
    shown = _mathml(latex.strip(), block) if len(latex) <= LONGEST_FORMULA else None
    if shown is not None:
        return shown
    return Markup('<code class="formula">{}</code>').format(latex)


def _mathml(latex: str, block: bool) -> Markup | None:
    from latex2mathml.converter import convert

    try:
        tree = ET.fromstring(convert(latex, display="block" if block else "inline"))
    except Exception:  # whatever a model writes between dollars: the converter raises a dozen kinds
        return None
    for element in tree.iter():
        tag = element.tag.rpartition("}")[2]
        if tag not in _MATHML:  # a link (\href), an image: nothing that a formula needs
            return None
        element.tag = tag
        element.attrib = {name: value for name, value in element.attrib.items() if name in _ATTRIBUTES}
    return Markup(ET.tostring(tree, encoding="unicode"))  # elements and attributes of the lists above


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin
    from mdit_py_plugins.texmath import texmath_plugin

    parser = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True}).enable(
        ["table", "strikethrough"]
    )
    parser.use(texmath_plugin, delimiters="brackets")
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    inline = ("math_inline", "math_single")
    block = ("math_block", "math_block_eqno", "math_block_label", "math_inline_double")
    for name in (*inline, *block):
        parser.add_render_rule(name, _formula(name in block))
    for name, rule in (("image", _image), ("link_open", _link_open), ("link_close", _link_close)):
        parser.add_render_rule(name, rule)
    return parser


def _formula(block: bool) -> Any:
    def render(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        return str(mathematics(tokens[index].content, block))

    return render


def _image(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
    text = renderer.renderInlineAsText(tokens[index].children, options, env)
    return str(Markup('<span class="dead-link">[image: {}]</span>').format(text))


def _link_open(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
    return '<span class="dead-link">'


def _link_close(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
    opened = next(t for t in reversed(tokens[:index]) if t.type == "link_open")
    return str(Markup(" <small>({})</small></span>").format(opened.attrGet("href") or ""))
