"""Whatever a value holds, a template shows it as text of its own language."""

import ast
import re
from html.parser import HTMLParser

import pytest
import yaml
from jinja2 import TemplateNotFound, UndefinedError
from markdown_it import MarkdownIt
from markupsafe import Markup

from gralora_diffusion.io.templates import render
from tests import ROOT

HOSTILE = (
    "<script>alert('x')</script>",
    "</style></title>\" onerror='y' <img src=x>",
    "`` a ` b ```",
    "{{ 7 * 7 }} {% raw %} {# a #} {{ value.__class__ }}",
    "| a | [b](c) ![d](e) *f* _g_ ~~h~~ # i \\",
    "&lt;b&gt; &amp; \\x1b",
    "猫 👩‍🚀 Grüße",
)
CONTROLS = "a\x00\x1b[31m\x9b\u202eb\udc9b"
SHOWN = "a\\x00\\x1b[31m\\x9b\\u202eb\\udc9b"
TEXTS = [(text, text) for text in HOSTILE] + [(CONTROLS, SHOWN)]


class Seen(HTMLParser):
    """Tags, values of attributes, and text, as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.values, self.text = [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [value for _, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Render a template of a package of its own."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path.parent)

    def write(kind, template, **values):
        path = tmp_path / f"templates/some.{kind}.jinja"
        path.write_text(template, encoding="utf-8")
        return render(tmp_path.name, path.name, **values)

    return write


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_html_shows_a_value_as_text(written, text, shown):
    macro = "{% macro m(x) %}<b title='{{ x }}'>{{ x }}</b>{% endmacro %}{{ m(value) }}"
    seen = Seen(written("html", macro, value=text))
    assert (seen.tags, seen.values, seen.text) == (["b"], [shown], shown)


@pytest.mark.parametrize(("text", "shown"), TEXTS)
def test_markdown_shows_a_value_as_text(written, text, shown):
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    template = (
        "# {{ value }}\n\n{{ value | item }}\n\n- {{ value | item }}\n\n"
        "{{ value | code_span }}\n\n"
        "| {{ value }} | b |\n|---|---|\n| {{ value }} | b |\n"
    )
    seen = Seen(reader.render(written("md", template, value=text)))
    cells = ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert [t for t in seen.tags if t != "code"] == ["h1", "p", "ul", "li", "p", *cells]
    assert seen.text.count(shown) == 6
    block = written("md", "{{ value | code_block('yaml') }}\n", value=text)
    seen = Seen(reader.render(block))
    assert (seen.tags, seen.text.rstrip()) == (["pre", "code"], shown)


@pytest.mark.parametrize("text", [*HOSTILE, CONTROLS, "--- '\"", "a\n---\nb: c"])
def test_front_matter_and_python_read_back_the_same(written, text):
    front = written("md", "{{ value | front_matter }}\n\nx", value={"a": text, "b": [text]})
    head, rest = front.removeprefix("---\n").split("\n---\n")
    assert rest == "\nx"
    assert all(letter.isprintable() or letter in "\n\u200d" for letter in head)
    if "\udc9b" not in text:  # which YAML has no way to write
        assert yaml.safe_load(head) == {"a": text, "b": [text]}
    code = written("py", "f({{ value }}, n={{ n }})", value=text, n=2)
    (call,) = ast.parse(code).body
    assert ast.literal_eval(call.value.args[0]) == text
    assert call.value.keywords[0].value.value == 2


def test_python_takes_double_quotes_where_it_can(written):
    assert written("py", "f({{ a }}, {{ b }})", a="it's", b='say "x"') == 'f("it\'s", \'say "x"\')'


def test_what_is_markup_is_not_escaped_again(written):
    assert written("html", "{{ value }}", value=Markup("<b>1</b>")) == "<b>1</b>"


@pytest.mark.parametrize(
    "path", (ROOT / "gralora_diffusion").rglob("*.jinja"), ids=lambda path: path.name
)
def test_no_template_turns_escaping_off(path):
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["html", "md", "py"])
@pytest.mark.parametrize("use", ["{{ gone }}", "{{ value.gone }}", "{% if gone %}{% endif %}"])
def test_a_name_that_was_not_given_is_an_error(written, kind, use):
    with pytest.raises(UndefinedError):
        written(kind, use, value="x")


@pytest.mark.parametrize("name", ["../secret.md.jinja", "/etc/secret.md.jinja", "no.md.jinja"])
def test_only_templates_of_the_package_are_read(written, tmp_path, name):
    (tmp_path / "secret.md.jinja").write_text("secret")
    written("md", "")
    with pytest.raises(TemplateNotFound):
        render(tmp_path.name, name)
    with pytest.raises(TemplateNotFound):
        written("md", "{% include name %}", name=name)
