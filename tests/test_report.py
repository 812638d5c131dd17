"""The HTML report of `fastres plot RUN... --html`: its content, its escaping, and that it loads nothing."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fastres import plot
from fastres.runs.pictures import style
from fastres.runs.pictures.facts import Classes, read_classes
from tests.fixtures import rejected
from tests.test_plot import a_run

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "--></svg><b>", "$x_{", "&amp;"]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its text; it asserts that elements are closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def whole_run(folder: Path, seed: int = 0, model: str = "resnet20", classes: list[str] | None = None) -> Path:
    """Write everything of a finished run that a report shows."""
    a_run(folder, 1 + 0.1 * seed, 2.0, 0.75 + 0.01 * seed)
    summary = json.loads((folder / "summary.json").read_text()) | {"seed": seed, "model": model, "device": "a device"}
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {"model": {"name": model}, "run": {"seed": seed, "dir": str(folder)}, "data": {"mirror": HOSTILE[0]}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "env.json").write_text(json.dumps({"torch": "2.14", "command": ["train", HOSTILE[1]]}))
    names = classes or ["cat", "dog"]
    with (folder / "confusion.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class \\ predicted", *names])
        writer.writerows([name, *(9 if i == j else j % 2 for j in range(len(names)))] for i, name in enumerate(names))
    return folder


@pytest.fixture
def compared(tmp_path: Path) -> Path:
    """Return the report of two seeds and a hostile run."""
    runs = [whole_run(tmp_path / f"wide-{seed}", seed) for seed in (0, 1)]
    hostile = whole_run(tmp_path / "_<b>'\"&--><img src=x>", 0, "</title><script>", HOSTILE)
    plot.main([*map(str, runs), str(hostile), "--output", str(tmp_path / "all.png"), "--html"])
    return tmp_path / "all.html"


def test_a_run_gets_a_report_beside_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole_run(tmp_path / "run")
    plot.main([str(run), "--html"])
    assert f"report: {run / 'history.html'}" in capsys.readouterr().out
    page = Page(run / "history.html")
    for text in ("0.7500", "269,722", "resnet20 on cifar10", "a device", "taken for", "train.batch_size", "2.14"):
        assert text in page.text
    assert "Settings that differ" not in page.text
    assert len(page.named("svg")) == 5  # four curves and a confusion matrix


def test_a_comparison_has_seeds_settings_and_curves(compared: Path) -> None:
    page = Page(compared)
    for text in ("wide, 2 seeds", "standard deviation", "0.7550", "0.0071", "Settings that differ", "model.name"):
        assert text in page.text
    assert "the band" in page.text and "run.dir" not in page.text
    labels = [svg["aria-label"] or "" for svg in page.named("svg")]
    assert sum(label.startswith("Curve of ") for label in labels) == 4
    assert sum(label.startswith("Confusion matrix of ") for label in labels) == 3


def test_no_text_of_a_run_becomes_markup(compared: Path) -> None:
    page = Page(compared)
    assert not page.named("script", "img", "b", "iframe", "object", "link")
    handlers = [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not handlers
    for text in (*HOSTILE[:2], "</title><script>: ", "_<b>'\"&--><img src=x>", "$x_{", "&amp;"):
        assert text.removesuffix(": ") in page.text


def test_a_report_loads_nothing(compared: Path) -> None:
    page = Page(compared)
    (policy,) = (meta["content"] for meta in page.named("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                assert value and value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    page_source = compared.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)", page_source)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    used = [v[1:] for _, a in page.elements for n, v in a.items() if n.endswith("href") and v and v.startswith("#")]
    used += re.findall(r"url\(#([^)]+)\)", page_source)
    assert used and set(used) <= set(ids)


def test_only_the_tags_of_a_picture_are_adapted_to_the_page(tmp_path: Path) -> None:
    text = f' id="a" "#b" url(#c) font: 9px bold; {style.INK} <!-- d --> <style>e</style>'
    figure = style.new_figure(4, 1)
    figure.text(0, 0.5, text, color=style.INK, parse_math=False)
    (tmp_path / "a.html").write_text(style.inline_svg(figure, "one", f"the words {text}"), encoding="utf-8")
    page = Page(tmp_path / "a.html")
    (picture,) = page.named("svg")
    assert text.strip() in page.text and picture["aria-label"] == f"the words {text}"
    styles = " ".join(attributes.get("style") or "" for attributes in page.named("text"))
    assert "currentColor" in styles and "10px" in styles and "system-ui" in styles and "DejaVu" not in styles


def test_a_report_is_accessible(compared: Path) -> None:
    page = Page(compared)
    assert page.named("html") == [{"lang": "en"}] and len(page.named("title")) == 1
    assert all(header.get("scope") in ("col", "row") for header in page.named("th"))
    assert len(page.named("caption")) == len(page.named("table")) > 5
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.named("svg"))
    assert len(page.named("h1")) == 1


def test_runs_without_summary_configuration_and_classes_have_a_report(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 1.0, 1.0, None)
    for name, content in (("config.yaml", "[1"), ("env.json", "[]"), ("confusion.csv", "class,a\na,x\n")):
        (run / name).write_text(content)
    plot.main([str(run), "--html", str(tmp_path / "a.html"), "--output", str(tmp_path / "a.png")])
    page = Page(tmp_path / "a.html")
    assert "unfinished, step 400" in page.text and "No run has an env.json" in page.text
    assert "Classes" not in page.text


def test_the_flag_cannot_overwrite_a_runs_files(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    for value in (run, run / "summary.json"):
        with rejected("--html", value, "does not end in .html", "name the runs first"):
            plot.main(["--html", str(value), str(run)])
    with rejected("--html", "nowhere", "cannot be written"):
        plot.main([str(run), "--html", str(tmp_path / "nowhere" / "a.html")])


def test_the_confusion_matrix_is_read_as_rows_and_mistakes(tmp_path: Path) -> None:
    classes = Classes(["a", "b", "c"], [[6, 0, 2], [1, 9, 0], [0, 0, 0]])
    assert classes.rows() == [("a", 8, 6, 0.75, "c"), ("b", 10, 9, 0.9, "a"), ("c", 0, 0, None, "")]
    assert classes.mistakes(5) == [("a", "c", 2, 0.25), ("b", "a", 1, 0.1)] and classes.accuracy == 15 / 18
    for damaged in ("", "x,a\n", "x,a,b\na,1,2\n", "x,a\na,-1\n", "x,a\na,1.5\n"):
        (tmp_path / "confusion.csv").write_text(damaged)
        assert read_classes(tmp_path) is None


# ---- in a browser --------------------------------------------------------------------------------------------


def browse(page: Path, *flags: str) -> str:
    """Open a page in Chromium without a network and return what it prints."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome, which is not installed")
    base = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--host-rules=MAP * ~NOTFOUND",
    ]
    done = subprocess.run(
        [browser, *base, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


@pytest.mark.slow
def test_a_browser_shows_it_at_the_width_of_a_telephone_and_in_the_dark(compared: Path, tmp_path: Path) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe id=page width=390 height=3000 src={compared.name}></iframe><script>onload = () => {{"
        "const root = page.contentDocument.documentElement; "
        "document.title = root.scrollWidth + ' of ' + root.clientWidth + ' px'}</script>"
    )
    found = re.search(r"<title>(\d+) of (\d+) px", browse(frame, "--dump-dom"))
    assert found is not None and int(found[1]) <= int(found[2]) <= 390
    corners = []
    for scheme in (0, 1):  # dark, light
        picture = tmp_path / f"{scheme}.png"
        browse(compared, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}",
               "--window-size=1280,1600")  # fmt: skip
        with Image.open(picture) as shot:
            corners.append(sum(shot.convert("RGB").getpixel((2, 2))))
            colors = shot.convert("RGB").getcolors(maxcolors=2**24)
        assert colors is not None and len(colors) > 50
    assert corners[0] < 150 and corners[1] == 3 * 255
