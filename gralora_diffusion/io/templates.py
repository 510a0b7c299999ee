"""Pages, cards and code from the package's own templates, with every value escaped.

A template is ``NAME.KIND.jinja`` in the folder ``templates`` of a package. Its kind says how a
value is escaped unless a filter says otherwise, so that text of files and users cannot get around
it. Text is only ever a value: it is never read as a template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from .safe_text import (
    for_code_block,
    for_code_span,
    for_markdown,
    for_markdown_item,
    for_python,
    for_terminal,
)


def for_html(text: object) -> Markup:
    """Return text for HTML and its attributes; control characters are visible escapes."""
    return text if isinstance(text, Markup) else escape(for_terminal(text))


def as_yaml(value: Any) -> str:
    """Return YAML that reads back the same and holds no control character but newlines."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    if for_terminal(text) != text:
        text = yaml.safe_dump(value, sort_keys=False)
    return text


def _front_matter(value: Mapping[str, Any]) -> str:
    return f"---\n{as_yaml(value)}---"


#: Kind of template -> how a value is written into it.
_ESCAPES: Mapping[str, Callable[[object], str]] = {
    "html": for_html,
    "md": for_markdown,
    "py": for_python,
}
#: The other ways to write a value into Markdown, by the names of their filters.
_MARKDOWN: Mapping[str, Callable[..., str]] = {
    "item": for_markdown_item,
    "code_span": for_code_span,
    "code_block": for_code_block,
    "front_matter": _front_matter,
    "html": for_html,
}


def render(package: str, name: str, /, **values: object) -> str:
    """Fill in a template.

    Args:
        package: the package that has the template, such as a module's ``__package__``.
        values: what the template may name. A name that is not among them is an error.

    Raises:
        jinja2.TemplateError: no such template, or it names what is not there.
    """
    environment = _environment(package, name.split(".")[-2])
    return environment.get_template(name).render(values)


class _Missing(StrictUndefined):
    """A name that was not given; ``repr`` is refused too, for that is how Python is written."""

    __repr__ = StrictUndefined.__str__


@cache
def _environment(package: str, kind: str) -> Environment:
    escaped = _ESCAPES[kind]
    environment = Environment(
        loader=PackageLoader(package),
        # With autoescape, what a macro or a block gives is Markup and stays as it is.
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(value)),
        undefined=_Missing,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = as_yaml
    if kind == "md":
        environment.filters |= {name: _marked(write) for name, write in _MARKDOWN.items()}
    return environment


def _marked(write: Callable[..., str]) -> Callable[..., Markup]:
    return lambda *arguments: Markup(write(*arguments))
