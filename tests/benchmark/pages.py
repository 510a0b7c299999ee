"""A page as its tags and texts; refuses what is not well formed."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """tags: (name, attributes) in order; texts: what is shown; numbers: values of ``data``;
    tables: caption -> rows of cells' texts, the head first."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.numbers: list[float] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self._caption, self._rows = "", [[""]]
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.numbers.append(float(dict(attrs)["value"]))
        if tag == "table":
            self._caption, self._rows = "", []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag, f"</{tag}> out of order"
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        if not self.open or self.open[-1] == "style":
            return
        self.texts.append(data)
        if "caption" in self.open:
            self._caption += data
        if self.open and {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(self.texts)
