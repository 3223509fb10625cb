"""The site that `make docs` builds: all links lead somewhere, it says what the pages say, and a browser shows it."""

import importlib
import os
import posixpath
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError
from playwright.sync_api import sync_playwright

from docs.html_pages import HtmlPage, target_of
from docs.pages import PAGES, ROOT, tokens_of

FAMILIES = ("elementwise", "factored", "multinorm", "projection", "whitening", "lowrank", "testing")
PUBLIC = ("lowmem_optim", "lowmem_kernels", *(f"lowmem_kernels.{family}" for family in FAMILIES))
WRITTEN = [page for page in PAGES if not page.startswith("docs/api/")]
# one page of each kind; a browser opens those with pictures too
KINDS = (
    "README.md",
    "docs/planning.md",
    "docs/optimizers/apollo.md",
    "docs/api/lowmem_optim.md",
    "lowmem_kernels/factored/README.md",
)
# of one step of the browser, on a machine that others use too
TIMEOUT_MS = 120_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A site that has just been built: its folder, and how the build ended."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return folder, subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(built):
    """The folder of the site, which is there in spite of warnings."""
    return built[0]


@pytest.fixture(scope="module")
def html(site):
    """{path: page} of all HTML pages of the site."""
    return {path: HtmlPage(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def html_path(site, page):
    name = posixpath.join(posixpath.dirname(page), "index.md") if page.endswith("README.md") else page
    return site / name.replace(".md", ".html")


def test_build_has_no_warnings(built):
    """Dead links and anchors, and pages that the navigation has not."""
    assert built[1].returncode == 0, built[1].stderr


def test_links_lead_somewhere(site, html):
    dead = []
    for path, page in html.items():
        for tag, url in page.references:
            if urlsplit(url).scheme:
                continue
            target, anchor = target_of(path, url, site)
            if not target.is_file() or (anchor and target in html and anchor not in html[target].ids):
                dead.append(f"{path.relative_to(site)}: <{tag}> {url}")
    assert not dead, "\n".join(dead)


def test_nothing_is_loaded_from_elsewhere(site, html):
    """Links may lead out of the site, but without a network it looks and works the same."""
    for path, page in html.items():
        loaded = [ref for ref in page.references if ref.tag != "a" and urlsplit(ref.url).scheme not in ("", "data")]
        assert not loaded, f"{path.relative_to(site)} loads {loaded}"


@pytest.mark.parametrize("page", WRITTEN)
def test_site_says_what_the_page_says(page, site, html):
    """MkDocs' Markdown is not that of code hosts: lists, tables and code blocks have to come out the same in both."""
    tokens = tokens_of(page)
    expected = HtmlPage(MarkdownIt().renderer.render(tokens, MarkdownIt().options, {}))
    built = html[html_path(site, page)]
    text = "".join(built.text)
    if not expected.counts["h1"]:  # the title of the navigation is put above it
        assert built.counts.pop("h1") == 1
        text = text[-len("".join(expected.text)) :]
    assert built.counts == expected.counts
    assert text == "".join(expected.text)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_api_reference(module, site, html):
    anchors = set().union(*(page.ids for path, page in html.items() if path.parent == site / "docs" / "api"))
    missing = {f"{module}.{name}" for name in importlib.import_module(module).__all__} - anchors
    assert not missing, f"without a docstring, or on no page of docs/api: {sorted(missing)}"


def test_index_has_every_page(site, html):
    """docs/README.md is for readers of the repository what the navigation is for those of the site."""
    index = site / "docs" / "index.html"
    article = HtmlPage(MarkdownIt().enable("table").render((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    linked = {posixpath.normpath(posixpath.join("docs", ref.url.partition("#")[0])) for ref in article.references}
    assert index in html
    assert set(PAGES) - linked == {"docs/README.md"}


@pytest.fixture
def served(site):
    """The address of the site on this machine."""
    handler = partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """A server of files that prints nothing."""

    def log_message(self, *args):
        """Print nothing."""


def watch(page, served):
    """Return a list that fills with what goes wrong in a tab of a browser."""
    problems = []

    def said(message):
        if message.type in ("error", "warning"):
            problems.append(f"{page.url}: {message.text}")

    def asked(request):
        if not request.url.startswith(served):
            problems.append(f"{page.url} asks for {request.url}")

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # what was still under way when the next page was opened
            problems.append(f"{request.url}: {request.failure}")

    def answered(response):
        if response.status >= 400:
            problems.append(f"{response.url}: {response.status}")

    page.on("console", said)
    page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
    page.on("request", asked)
    page.on("requestfailed", failed)
    page.on("response", answered)
    return problems


def finds(page, word):
    """Whether the search has a result soon; it does not see what is typed before its index is loaded."""
    page.fill("input[name=query]", "")
    page.fill("input[name=query]", word)
    try:
        page.wait_for_selector(".md-search-result__link", timeout=5000)
    except PlaywrightTimeoutError:
        return False
    return True


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium); HTML was checked")
def test_browser_shows_pages(site, html, served):
    """Nothing fails to load, the console has no error, pictures have pixels, links are served, and search finds."""
    links = set()
    paths = {html_path(site, page) for page in KINDS} | {path for path, page in html.items() if page.counts["img"]}
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as browser:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        problems = watch(page, served)
        for path in sorted(paths):
            page.goto(served + path.relative_to(site).as_posix())
            links.update(page.eval_on_selector_all("a[href]", "links => links.map(link => link.href.split('#')[0])"))
            blank = page.eval_on_selector_all("img", "imgs => imgs.filter(i => !i.naturalWidth).map(i => i.src)")
            problems += [f"{page.url}: {source} has no pixels" for source in blank]
        for link in links:
            if link.startswith(served) and not (response := page.request.head(link)).ok:
                problems.append(f"{link}: {response.status}")
        page.goto(served)
        assert any(finds(page, "stochastic") for _ in range(10))
    assert len(links) > len(html)  # the navigation alone has all pages
    assert not problems, "\n".join(problems)
