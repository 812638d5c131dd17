"""Hooks of mkdocs.yml: the site shows the same Markdown files as a code host, although the two read them differently.

- README.md, CONTRIBUTING.md, CHANGELOG.md and bench/RESULTS.md lie outside docs/. They are pages of the site too.
- Links are relative to the checkout. A link to a page of the site leads there, and a link to another file of the
  checkout becomes plain text.
- In docs/api.md, a table has the public names with links to their source. The site adds each name's docstring.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {  # path in the checkout -> path in the site, of what lies outside docs/
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "bench/RESULTS.md": "bench/RESULTS.md",
} | {path: path for path in (p.relative_to(ROOT).as_posix() for p in ROOT.glob("bench/results/plots/*.png"))}
IN_CHECKOUT = {site: path for path, site in OUTSIDE.items()}
API = "api.md"

FENCE = re.compile(r"^\s*```.*?^\s*```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^)\s]+)\)")
PUBLIC = re.compile(r"\[`(?P<name>fastres[\w.]+)`\]\(\.\./(?P<path>[\w/]+)\.py\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that lie outside docs/."""
    from mkdocs.structure.files import File

    for path, site in OUTSIDE.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page's text as the site needs it."""
    uri = page.file.src_uri
    if uri == OUTSIDE["README.md"]:
        page.meta["hide"] = ["toc"]  # for wider lines of code
    text = with_docstrings(markdown) if uri == API else markdown
    return outside_fences(text, lambda part: indented(with_links(part, uri)))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Return the page as a screen reader needs it."""
    return readable(output)


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """Return a page that is made from no Markdown, such as 404.html, as a screen reader needs it too."""
    return readable(output) if template_name.endswith(".html") else output


def readable(html: str) -> str:
    """Return the page with a name of the search dialog and without empty headings."""
    return html.replace('role="dialog"', 'role="dialog" aria-label="Search"').replace("<th></th>", "<td></td>")


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Apply `change` to the parts of the text that are not fenced code."""
    parts, start = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[start : fence.start()]), fence[0]]
        start = fence.end()
    return "".join([*parts, change(text[start:])])


def with_links(text: str, uri: str) -> str:
    """Return the text with links of the site instead of links of the checkout.

    Args:
        text: Markdown of a page.
        uri: path of the page in the site.
    """
    folder = posixpath.dirname(IN_CHECKOUT.get(uri, f"docs/{uri}"))

    def replace(link: re.Match[str]) -> str:
        path, hash_, anchor = link["target"].partition("#")
        if not path or ":" in path:
            return link[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        site = OUTSIDE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if site is not None:
            relative = posixpath.relpath(site, posixpath.dirname(uri) or ".")
            return f"{link['image']}[{link['text']}]({relative}{hash_}{anchor})"
        return link["text"] if (ROOT / target).exists() else link[0]

    return LINK.sub(replace, text)


def indented(text: str) -> str:
    """Return the text with lists as Python-Markdown expects them.

    What belongs to an item is indented by four columns instead of two or three, and an item that follows several blocks
    of another begins after an empty line.
    """
    lines: list[str] = []
    in_item = has_blocks = False
    for line in text.split("\n"):
        if re.match(r"(-|\d+\.) ", line):
            if in_item and has_blocks and lines[-1]:
                lines.append("")
            in_item, has_blocks = True, False
        elif line and not line.startswith(" "):
            in_item = False
        elif in_item and not line:
            has_blocks = True
        elif in_item and (found := re.match(r" {2,3}(?! )", line)):
            line = "    " + line[found.end() :]
        lines.append(line)
    return "\n".join(lines)


def with_docstrings(text: str) -> str:
    """Return docs/api.md with the docstrings of each section's names at the section's end.

    A link [`PUBLIC.NAME`](../PATH.py) names the object, and leads to its docstring in the site.
    """
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return "".join(PUBLIC.sub(_to_docstring, section) + _directives(section) for section in sections)


def identifier(link: re.Match[str]) -> str:
    """Return the full name of the object that a link of docs/api.md names, such as fastres.models.fuse.fuse."""
    module = re.sub(r"^kernels/", "fastres_kernels/", link["path"]).replace("/", ".")
    return f"{module}.{link['name'].rpartition('.')[2]}"


def _to_docstring(link: re.Match[str]) -> str:
    return f"[`{link['name']}`](#{identifier(link)})"


def _directives(section: str) -> str:
    directives = [
        f'::: {identifier(link)}\n    options:\n      heading: "{link["name"]}"\n      toc_label: "{link["name"]}"\n\n'
        for link in PUBLIC.finditer(section)
    ]
    return "\n" + "".join(directives)
