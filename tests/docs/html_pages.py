"""What a test has to know of an HTML page: its anchors, what it refers to, and what its article consists of."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

VOID = {"br", "hr", "img", "input", "link", "meta", "source"}
# what both Markdown readers make of the same page, and a reader would miss
COUNTED = ("h1", "h2", "h3", "h4", "li", "ol", "ul", "pre", "table", "tr", "td", "th", "img", "a", "strong", "em")


class Reference(NamedTuple):
    """A link or a resource: the tag and what its href or src says."""

    tag: str
    url: str


class HtmlPage(HTMLParser):
    """A page that has been read.

    ids: anchors.  references: all links and resources.  text: words of the article.  counts: tags of the article.
    A fragment of HTML, without an <article>, is all article.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.references: list[Reference] = []
        self.text: list[str] = []
        self.counts: Counter[str] = Counter()
        # the nesting of tags inside the article, each with whether it is only there on the site
        self._open: list[tuple[str, bool]] = []
        self._whole = "<article" not in html
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what a tag says."""
        found = dict(attrs)
        self.ids.update(found[key] or "" for key in ("id", "name") if key in found)
        self.references += [Reference(tag, found[key] or "") for key in ("href", "src") if key in found]
        if not (self._whole or self._open or tag == "article"):
            return
        added = self._is_added() or found.get("class") == "headerlink" or tag in ("script", "style", "button")
        if not added and tag in COUNTED:
            self.counts[tag] += 1
        if tag not in VOID:
            self._open.append((tag, added))

    def handle_endtag(self, tag: str) -> None:
        """Leave a tag."""
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        """Collect words of the article."""
        if (self._whole or self._open) and not self._is_added():
            self.text += data.split()

    def _is_added(self) -> bool:
        return bool(self._open) and self._open[-1][1]


def target_of(page: Path, url: str, site: Path) -> tuple[Path, str]:
    """Return the file of the site, and the anchor in it, that a URL on a page of it leads to."""
    parts = urlsplit(urljoin("/" + page.relative_to(site).as_posix(), url))
    path = site / unquote(parts.path).lstrip("/")
    return (path / "index.html" if path.is_dir() else path), unquote(parts.fragment)
