"""What `make site` does to the pages, as MkDocs calls it: see `hooks` of mkdocs.yml.

The documents are written to be read in the repository, too. Here they become pages: documents
outside docs/ join them, tables inside what a reader opens are rendered, pictures follow the theme
that the reader chose, and a page that would load anything from elsewhere ends the build.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
#: Documents of the repository that are pages, too, and what they are called there.
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
_MARKER = re.compile(r"^<!-- (?:generated: \w+|end) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r'<p><img alt="([^"]*)" src="[^"]*?images/([\w.-]+\.svg)"\s*/?></p>')
_DARK = re.compile(r"@media \(prefers-color-scheme: dark\)\{((?:[^{}]*\{[^{}]*\})*)\}")
_ROLE = re.compile(r":(?:func|class|meth):<code>([\w.]+)</code>")
#: What is dark on the site, whatever the system is.
_SLATE = '[data-md-color-scheme="slate"]'
#: Links of a page to itself and to others are not followed by a browser that shows it.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|link(?![^>]*\brel=[\"']?(?:canonical|prev|next)))\b"
    r"[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take in the documents outside docs/."""
    for name, page in OUTSIDE.items():
        text = _LINK.sub(lambda match: _within(match, ""), (ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """From what a repository shows to what Python-Markdown reads."""
    text = _MARKER.sub("", markdown).replace("<details>", '<details markdown="1">')
    return _LINK.sub(lambda match: _within(match, "docs"), text)


def _within(link: re.Match[str], folder: str) -> str:
    """A link from a document of `folder`, on the site: its text alone where it leads to no page."""
    text, target, anchor = link[1], link[2], link[3] or ""
    path = posixpath.normpath(posixpath.join(folder, target))
    page = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")
    return f"[{text}]({page}{anchor})" if page else text


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the pictures into the page, where its theme reaches them."""
    return _ROLE.sub(lambda name: _named(name[1], html), _PICTURE.sub(_inline, html))


def _named(name: str, html: str) -> str:
    """What a docstring points to in Sphinx's way: a link where it is on the page."""
    full = name if name.startswith("gemma_fold") else f"gemma_fold.ops.{name}"
    code = f"<code>{full.rpartition('.')[2]}</code>"
    return f'<a href="#{full}">{code}</a>' if f'id="{full}"' in html else code


def _inline(image: re.Match[str]) -> str:
    svg = (ROOT / "docs" / "images" / image[2]).read_text()
    svg = _DARK.sub(lambda rules: rules[1].replace("[style", f"{_SLATE} [style"), svg)
    return f'<figure class="picture" role="img" aria-label="{image[1]}">{svg}</figure>'


def on_post_build(config: MkDocsConfig) -> None:
    """Nothing of the site may be somewhere else.

    Raises:
        PluginError: a page loads something by an address; both are named.
    """
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        for address in _LOADED.findall(path.read_text()):
            raise PluginError(f"{path.name} loads {unescape(address)}; keep it in docs/ instead")
