"""The report of a purification: everything in one file, everything escaped, fit for a phone, a screen and paper."""

import fnmatch
import os
import re
import shutil
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest

from bdjax.reports import page
from bdjax.reports._html import picture, render

TEMPLATES = Path(page.__file__).parent / "templates"
EVIL = "<script>document.title='owned'</script>"
CONTROLS = "\x1b[2J\u202e\u200b"
SYNTAX = "{{ 7 * 7 }}{% include 'style.css' %}{# gone #}"
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(the page, the result it was made of), with long and hostile strings wherever strings come from outside."""
    folder = tmp_path_factory.mktemp("out")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 32, 32, 3)).astype(np.uint8)
    classes = [EVIL, "a\"b' onload=alert(1)", CONTROLS + "x" * 70, *(f"class {label}" for label in range(3, 43))]
    pictures = [
        {"file": picture(folder, f"audit-{i}", images[i]), "method": "universal", "title": f"→ {classes[i]}"}
        for i in range(3)
    ]

    def judged(poisoned):
        age = {"poisoned": poisoned, "target": 0, "score": 3.25 if poisoned else None, "seconds": 1.0, "compile": 2.0,
               "classes": [3.25, None, *np.linspace(0, 1, 41)]}  # fmt: skip
        return {"poisoned": poisoned, "target": 0, "accused_by": ["age"] if poisoned else [], "n": 50, "truth": None,
                "methods": {"age": age, "universal": {**age, "norm": 0.25}}, "pictures": pictures,
                "verdict": f"suspected of class 0 ({EVIL})" if poisoned else "no backdoor found"}  # fmt: skip

    def right(count):
        return {"right": count, "n": 50, "rate": count / 50, "low": count / 50 - 0.06, "high": count / 50 + 0.04}

    changed = [
        {"file": picture(folder, f"changed-{sort}-{place}", images[9 + place]), "sort": sort, "label": 0,
         "before": 1, "after": 2} for sort in ("broken", "mended", "other") for place in range(7)
    ]  # fmt: skip
    tensors = [[f"layer{i}.{EVIL}.{'w' * 60}", "float32", [64, 64, 3, 3]] for i in range(19)]
    tensors.append([SYNTAX + CONTROLS, "float32", []])
    source = {"format": "torch", "key": EVIL, "names": "torchvision", "tensors": tensors}
    result = {
        "input": {"kind": "file", "path": f"/home/someone/{'very_' * 20}/{EVIL}.pt", "sha256": "ab" * 32},
        "model": {"model": "resnet18", "shape": [32, 32, 3], "input": {"mean": [0.5], "resize": 0}, "source": source,
                  "directory": f"/out/{EVIL}"},
        "classes": classes, "data": {"spec": f"npz:{EVIL}.npz", "fingerprint": "cd" * 32},
        "n_defender": 50, "n_held_out": 50,
        "audit": {"before": judged(True), "after": judged(False)}, "notes": [f"A note on {EVIL}."], "seed": 3,
        "accuracy": {"before": right(45), "after": right(43)},
        "asr": {"attack": EVIL, "n": 9, "before": 1.0, "after": 0.1},
        "changed": {"broken": 9, "mended": 7, "other": 7, "all": 23, "shown": changed}, "defense": f"{EVIL}.py",
        "defense_config": {"rounds": 7, "clamp": True, "solver": EVIL, "penalty": None},
        "defaults": {"rounds": 5, "clamp": True, "solver": "cg", "penalty": 0.1},
        "seconds": {"defense": 12.3, "compile": 4.5}, "command": f"bdjax purify '{EVIL}' --out {'o' * 120}",
        "weights": {"file": "purified.pt", "format": "torch", "tensors": 20, "names": "torchvision",
                    "sha256": "ef" * 32},
        "env": {"bdjax": "0.1.0", "date": "2026-01-01", "device": "cpu", "commit": None, "jax": "0.12.0"},
    }  # fmt: skip
    return page.write(result, folder), result


class Reader(HTMLParser):
    """Elements, texts, and whether every element is closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def read(shown):
    reader = Reader()
    reader.feed(shown[0].read_text())
    assert reader.open == []
    return reader


def test_nothing_is_loaded_and_nothing_runs(shown, read):
    text = shown[0].read_text()
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in read.tags}
    links = [value for _, attributes in read.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(links) > 20 and all(link.startswith("data:") for link in links)
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|https?://", text)


def test_what_came_from_outside_is_text(shown, read):
    text, result = shown[0].read_text(), shown[1]
    assert EVIL not in text
    said = "".join(read.texts)
    for part in (
        result["input"]["path"],
        result["data"]["spec"],
        result["command"],
        result["defense"],
        result["notes"][0],
    ):
        assert part in said
    assert said.count(EVIL) > 20


def test_control_characters_are_visible_in_text_and_in_attributes(shown, read):
    assert not set(CONTROLS) - set("[2J") & set(shown[0].read_text())
    escaped = "\\x1b[2J\\u202e\\u200b"
    assert "".join(read.texts).count(escaped) > 10
    assert any(escaped in attributes.get("alt", "") for _, attributes in read.tags)


def test_template_syntax_in_a_name_is_text(read):
    assert SYNTAX in "".join(read.texts)


def test_no_template_switches_the_escaping_off():
    for path in TEMPLATES.glob("*.html"):
        assert not re.search(r"\bsafe\b|autoescape|Markup", path.read_text()), path.name


def test_a_value_that_a_template_needs_and_lacks_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'summary' is undefined"):
        render("purification.html", {"title": "a model"})


def test_the_templates_are_installed_with_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["bdjax.reports"]
    files = [f"templates/{path.name}" for path in TEMPLATES.iterdir()]
    assert len(files) >= 4 and all(any(fnmatch.fnmatch(file, pattern) for pattern in patterns) for file in files)


def test_numbers_settings_and_the_way_back_are_in_it(shown, read):
    said = " ".join("".join(read.texts).split())
    for part in ("90.0 %", "86.0 %", "84.0 to 94.0 %", "45 of 50", "23 of 50", "default 5", "default 0.1", "yes",
                 "none", "0.12.0", "ab" * 32, "sha256sum --check", "bdjax export", "the first 7 of 9",
                 "100.0 % → 10.0 %", "3.25", "–"):  # fmt: skip
        assert part in said, part
    assert "commit" not in said


def test_headings_go_down_one_by_one_and_pictures_say_what_they_show(read):
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(two <= one + 1 for one, two in zip(levels, levels[1:], strict=False))
    images = [attributes for tag, attributes in read.tags if tag == "img"]
    assert len(images) == 27 and all(len(image["alt"]) > 10 for image in images)
    svgs = [attributes for tag, attributes in read.tags if tag == "svg"]
    assert all(svg["role"] == "img" and "%" in svg["aria-label"] for svg in svgs) and len(svgs) == 2
    assert ("html", {"lang": "en"}) in read.tags
    assert [attributes for tag, attributes in read.tags if tag == "th" and "scope" not in attributes] == []


def test_large_pictures_are_made_smaller_and_grey_ones_stay_grey(tmp_path):
    from PIL import Image

    picture(tmp_path, "large", np.zeros((500, 1000, 3), np.float32))
    picture(tmp_path, "grey", np.full((8, 8, 1), 1.7, np.float32))
    with (
        Image.open(tmp_path / "pictures" / "large.png") as large,
        Image.open(tmp_path / "pictures" / "grey.png") as grey,
    ):
        assert large.size == (224, 112) and grey.mode == "L" and grey.getpixel((0, 0)) == 255


def contrast(one, two):
    """WCAG's contrast ratio of two colours #rgb or #rrggbb."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_stands_out_in_light_and_in_dark():
    for block in re.findall(r":root \{(.*?)\}", (TEMPLATES / "style.css").read_text(), re.S):
        colours = dict(re.findall(r"--(\w+): (#\w+)", block))
        for ink in ("ink", "faint", "bad"):
            assert all(contrast(colours[ink], colours[paper]) >= 4.5 for paper in ("paper", "soft")), ink
    assert contrast("#000", "#fff") == pytest.approx(21)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium by playwright: BROWSER, or one on the PATH."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("BDJAX_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_in_a_browser_it_fits_loads_nothing_and_says_nothing(width, scheme, shown, browser, tmp_path):
    told, asked = [], []
    view = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    view.on("console", lambda message: told.append(message.text))
    view.on("pageerror", lambda error: told.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(shown[0].as_uri())
    view.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    size = view.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    wide = view.evaluate("""[...document.querySelectorAll('body *')].filter(one =>
        one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll'))
        .map(one => one.outerHTML.slice(0, 80))""")
    assert size[0] <= size[1] == width and wide == []
    assert told == [] and {url for url in asked if not url.startswith("data:")} == {shown[0].as_uri()}
    assert view.title() != "owned" and view.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
    view.close()


def test_it_prints(shown, browser, tmp_path):
    view = browser.new_page()
    view.goto(shown[0].as_uri())
    paper = view.pdf(format="A4", prefer_css_page_size=True)
    assert paper[:5] == b"%PDF-" and len(paper) > 10_000
    view.emulate_media(media="print")
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert view.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    view.close()
