"""The documentation site: docs/api.md has every public name, and docs/site_hooks.py turns the files into its pages.

.ci/run builds the site, in which a broken link or an unknown name is an error.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from types import ModuleType

import pytest

from tests.commands import ROOT

API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
STUBS = {"fastres": ROOT / "fastres/__init__.pyi", "fastres_kernels": ROOT / "kernels/__init__.pyi"}


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()


def public_names() -> dict[str, str]:
    """Return the module of every name that the stubs of fastres and fastres_kernels re-export."""
    return {
        f"{package}.{alias.asname or alias.name}": f"{package}.{node.module}.{alias.name}"
        for package, stub in STUBS.items()
        for node in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize(("name", "defined"), public_names().items(), ids=public_names())
def test_the_api_page_has_every_public_name_with_a_link_to_its_source(name: str, defined: str) -> None:
    links = {link["name"]: HOOKS.identifier(link) for link in HOOKS.PUBLIC.finditer(API)}
    assert links.get(name) == defined


def test_every_name_of_the_api_page_is_defined_where_its_link_leads() -> None:
    for link in HOOKS.PUBLIC.finditer(API):
        module = ast.parse((ROOT / f"{link['path']}.py").read_text(encoding="utf-8"))
        defined = {node.name for node in module.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert link["name"].rpartition(".")[2] in defined, link[0]


def test_the_site_adds_a_docstring_for_every_name_of_the_api_page() -> None:
    text = HOOKS.with_docstrings(API)
    directives = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert directives == [HOOKS.identifier(link) for link in HOOKS.PUBLIC.finditer(API)]
    assert "../fastres/" not in text and "[`fastres.fuse`](#fastres.models.fuse.fuse)" in text


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("index.md", "[x](docs/data.md#order)", "[x](data.md#order)"),
        ("index.md", "![x](docs/profile.png)", "![x](profile.png)"),
        ("index.md", "[x](CHANGELOG.md)", "[x](CHANGELOG.md)"),
        ("index.md", "[x](LICENSE)", "x"),
        ("index.md", "[x](fastres/train.py)", "x"),
        ("results.md", "[x](../bench/RESULTS.md)", "[x](bench/RESULTS.md)"),
        ("results.md", "[x](../README.md)", "[x](index.md)"),
        ("bench/RESULTS.md", "[x](results)", "x"),
        ("bench/RESULTS.md", "[x](../docs/data.md)", "[x](../data.md)"),
        ("models.md", "[x](#weights)", "[x](#weights)"),
        ("models.md", "[x](https://example.org/a.md)", "[x](https://example.org/a.md)"),
        ("models.md", "[x](../missing.md)", "[x](../missing.md)"),  # an error of the build
    ],
)
def test_links_of_the_checkout_become_links_of_the_site(uri: str, link: str, expected: str) -> None:
    assert HOOKS.with_links(link, uri) == expected


def test_what_belongs_to_an_item_of_a_list_is_indented_as_python_markdown_expects_it() -> None:
    given = "- a\n  b\n\n  | c |\n  |---|\n- d\n\ne\n  f"
    assert HOOKS.indented(given) == "- a\n    b\n\n    | c |\n    |---|\n\n- d\n\ne\n  f"


def test_fenced_code_stays_as_it_is() -> None:
    text = "[a](b)\n```md\n[a](b)\n```\n[a](b)"
    assert HOOKS.outside_fences(text, lambda part: part.replace("b", "c")) == "[a](c)\n```md\n[a](b)\n```\n[a](c)"


def test_a_page_without_markdown_has_a_name_of_its_search_dialog_too() -> None:
    given = '<div role="dialog"></div>'
    page = HOOKS.on_post_template(given, template_name="404.html", config=None)
    assert page == '<div role="dialog" aria-label="Search"></div>'
    assert HOOKS.on_post_template(given, template_name="sitemap.xml", config=None) == given
