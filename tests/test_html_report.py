"""The HTML report: it says what it was given and nothing else, whatever that is, and a browser shows it."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pictures
import pytest
import skimage.color
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_export.errors import OutputError
from clip_export.html_report import (
    Check,
    CheckGroup,
    Figure,
    IndexSafety,
    Item,
    MeasuredRow,
    RankFlip,
    ReportContents,
    Retrieval,
    Similarities,
    Verdict,
    numbers,
    page,
    write_report,
)
from clip_export.html_report.histogram import Axis, histogram
from clip_export.html_report.markup import readable
from clip_export.html_report.matrices import matrices
from clip_export.html_report.thumbnails import thumbnail

PICTURE = pictures.picture("RGB", 40, 30)
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src='http://example.invalid/x.png' onerror=alert(1)>",
    "</style></title><style>*{display:none}",
    "\u202egnirts siht\u202c and \u2067more",
    "שלום עולם, مرحبا بالعالم",
    "one\r\ntwo\tthree \x00\x07\x1b[31m",
    "猫" * 5000,
    "x" * 5000,
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "\ud800 alone",
    "&amp; &#60; &lt;",
    "",
    "   ",
)

# What HTML may not hold, and what turns the order of the text that follows.
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def row(tower: str, *, precision: str, error: float, required: float, seed: int, samples: int = 400) -> MeasuredRow:
    """A row whose 1 - cosine is spread over two powers of ten around `error`."""
    cosines = 1 - error * 10 ** np.random.default_rng(seed).normal(0, 0.4, samples)
    return MeasuredRow(
        tower=tower,
        output="embedding",
        precision=precision,
        engine="simulation of fp16, cpu" if precision == "fp16" else "onnxruntime, cpu",
        samples=samples,
        min_cosine=float(cosines.min()),
        p1_cosine=float(np.quantile(cosines, 0.01)),
        mean_cosine=float(cosines.mean()),
        max_abs=float(np.sqrt(2 * error)),
        required_cosine=required,
        passed=bool(cosines.min() >= required),
        cosines=cosines,
    )


def similarities(n_images: int, n_texts: int, *, noise: float = 0.0004) -> Similarities:
    random = np.random.default_rng(0)
    reference = random.normal(0.2, 0.03, (n_images, n_texts)) + 0.15 * np.eye(n_images, n_texts)
    photographs = list(pictures.PHOTOGRAPHS.items())
    chosen = [photographs[i % len(photographs)] for i in range(n_images)]
    return Similarities(
        engine="fp16, simulation, cpu",
        images=[Item(text=name, image=path) for name, path in chosen],
        texts=[f"a photo of {photographs[i % len(photographs)][0]}" for i in range(n_texts)],
        reference=reference,
        found=reference + random.normal(0, noise, reference.shape),
    )


def report(*, passed: bool = True, shown: int = 8) -> ReportContents:
    """A report that has everything in it."""
    factor = 1 if passed else 300
    rows = (
        row("text", precision="fp32", error=3e-9, required=0.99999, seed=1),
        row("image", precision="fp32", error=8e-9, required=0.99999, seed=2),
        row("text", precision="fp16", error=2e-7, required=0.9999, seed=3),
        row("image", precision="fp16", error=6e-7 * factor, required=0.9999, seed=4),
    )
    flip = RankFlip(
        query=Item(text="a cat that looks at the camera"),
        right=Item(text="chelsea.png", image=pictures.PHOTOGRAPHS["chelsea"]),
        reference_rank=1,
        found_rank=1204,
        reference_first=Item(text="chelsea.png", image=pictures.PHOTOGRAPHS["chelsea"]),
        found_first=Item(text="coffee.png", image=pictures.PHOTOGRAPHS["coffee"]),
    )
    other = RankFlip(
        query=Item(text="rocket.jpg", image=pictures.PHOTOGRAPHS["rocket"]),
        right=Item(text="a rocket on its pad, seen from below, early in the morning"),
        reference_rank=3,
        found_rank=1,
        reference_first=Item(text="a lighthouse"),
        found_first=Item(text="a rocket on its pad, seen from below, early in the morning"),
    )
    retrieval = Retrieval(
        engine="fp16, simulation, cpu",
        pairs=5000,
        figures=(
            Figure(name="R@1 image to text", reference=0.5812, found=0.5808 if passed else 0.4123, passed=passed),
            Figure(name="R@5 image to text", reference=0.8102, found=0.8102),
            Figure(name="R@1 text to image", reference=0.4103, found=0.4101 if passed else 0.3999),
            Figure(name="zero-shot accuracy", reference=0.6312, found=0.6312),
            Figure(name="top-1 agreement", reference=None, found=0.9991 if passed else 0.7214),
            Figure(name="contrastive loss", reference=0.81234, found=0.81239, share=False),
        ),
        flips=(flip, other),
    )
    hostile = (
        Check(name="empty string", passed=True, detail="min cosine 0.9999998"),
        Check(name="77 tokens and more", passed=True),
        Check(name="batch of 64, last row", passed=passed, detail="differs from the row alone by 3.1e-2"),
        Check(name="eight threads at once", passed=None, detail="one context only"),
    )
    return ReportContents(
        name="clip-vit-base-patch32",
        verdict="passed" if passed else "failed",
        sentences=(
            ("All 4 outputs keep the contract of their precision, and retrieval finds what it found before.",)
            if passed
            else (
                "fp16 image embedding is below its contract: min cosine 0.9981204, required 0.9999.",
                "R@1 image to text falls by 16.89 points on 5,000 pairs.",
            )
        ),
        rows=rows,
        checks=(CheckGroup(title="Hostile inputs", checks=hostile),),
        similarities=(similarities(shown, shown, noise=0.0004 * factor),),
        retrievals=(retrieval,),
        indexes=(
            IndexSafety(
                engine="fp16, simulation, cpu",
                verdict="passed" if passed else "failed",
                sentence="New vectors can be mixed with those of the index."
                if passed
                else "Rebuild the index: a tenth of the neighbours change.",
                figures=(
                    Figure(name="neighbour overlap at 10", reference=None, found=0.9993 if passed else 0.9012),
                    Figure(name="score shift, mean", reference=None, found=1e-5, share=False),
                ),
            ),
        ),
        unmeasured=("bf16 was not measured: no GPU here; run on a machine that has one",),
        environment=(
            ("clip-export", "0.5.0"),
            ("onnxruntime", "1.23.2"),
            ("machine", "x86_64, 2 cores, Linux"),
            ("time", "2026-11-24 03:00 UTC"),
        ),
        command="clip-export verify engines/demo \\\n    --pairs demo --report report",
    )


# What a parser makes of it


class Outline(HTMLParser):
    """Elements with attributes, text, and whether each that is opened is closed in turn."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] != "style":
            self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def skeleton(self) -> list[str]:
        return [tag for tag, _ in self.elements]


@pytest.mark.parametrize(
    ("verdict", "headline"),
    [("passed", "Passed"), ("failed", "Failed"), ("not measured", "Could not be measured")],
)
def test_the_verdict_comes_first(verdict: Verdict, headline: str) -> None:
    outline = Outline(page(dataclasses.replace(report(), name="a-bundle", verdict=verdict, sentences=["Because."])))
    assert outline.words.startswith(f"a-bundle: {headline.lower()} clip-export verify · a-bundle")
    assert outline.words.index(headline) < outline.words.index("Because.") < outline.words.index("Accuracy")


def test_what_is_empty_is_left_out() -> None:
    outline = Outline(page(ReportContents(name="a", verdict="not measured", sentences=["Nothing ran."])))
    assert not {"h2", "table", "svg", "img"} & set(outline.skeleton)


def test_all_that_was_measured_is_said() -> None:
    words = Outline(page(report(passed=False))).words
    for expected in (
        *("fp16 simulation of fp16, cpu", "✗ FAILED", "required 0.9999", "R@1", "−16.89 points", "+5.0×10⁻⁵"),
        *("Hostile inputs", "2 of 4 passed, 1 failed, 1 could not be measured.", "one context only"),
        *("rank 1 → 1,204", "a cat that looks at the camera", "Rebuild the index", "90.12 %"),
        *("bf16 was not measured", "x86_64, 2 cores, Linux", "--pairs demo --report report"),
    ):
        assert expected in words, expected


def test_trouble_stands_before_what_passed() -> None:
    words = Outline(page(report(passed=False))).words
    places = [words.index(name) for name in ("batch of 64", "eight threads", "2 that passed", "empty string")]
    assert places == sorted(places)


# Strings of others


def everywhere(text: str) -> ReportContents:
    """A report with `text` in each place that takes one."""
    made = report(shown=2)
    item = Item(text=text)
    figure = dataclasses.replace(made.retrievals[0].figures[0], name=text)
    flip = dataclasses.replace(
        made.retrievals[0].flips[0], query=item, right=item, reference_first=item, found_first=item
    )
    return ReportContents(
        name=text,
        verdict="passed",
        sentences=[text],
        rows=[dataclasses.replace(made.rows[0], tower=text, output=text, precision=text, engine=text)],
        checks=[CheckGroup(title=text, checks=[Check(name=text, passed=False, detail=text)])],
        similarities=[
            dataclasses.replace(
                made.similarities[0], engine=text, texts=[text] * 2, images=[item, Item(text=text, image=PICTURE)]
            )
        ],
        retrievals=[Retrieval(engine=text, pairs=1, figures=[figure], flips=[flip], notes=[text])],
        indexes=[IndexSafety(engine=text, verdict="failed", sentence=text, figures=[figure])],
        unmeasured=[text],
        notes=[text],
        environment=[(text, text)],
        command=text,
    )


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=()), max_size=40).filter(str.strip))
def test_a_string_stays_a_string(text: str) -> None:
    """It adds no element and no attribute, and can be read: what a page may not hold is named by its code."""
    markup = page(everywhere(text))
    outline = Outline(markup)
    harmless = Outline(page(everywhere("harmless")))
    assert outline.skeleton == harmless.skeleton
    assert [set(found) for _, found in outline.elements] == [set(found) for _, found in harmless.elements]
    assert not FORBIDDEN.search(markup)
    assert readable(text) in "".join(outline.text)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_change_nothing_around_them(text: str) -> None:
    markup = page(everywhere(text))
    outline = Outline(markup)
    assert not FORBIDDEN.search(markup)
    assert not {"script", "a", "link", "iframe", "object", "base", "form"} & set(outline.skeleton)
    assert outline.skeleton.count("style") == 1
    assert outline.skeleton.count("meta") == 4
    for _, attributes in outline.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")


def test_a_long_text_is_cut_and_counted() -> None:
    markup = page(dataclasses.replace(report(shown=2), name="y" * 100_000))
    assert f"{'y' * 300}… (100,000 characters)" in markup
    assert len(markup) < 120_000


# Numbers and pictures


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.cosine(0.99991234), "0.9999123"),
        (numbers.cosine(float("nan")), "NaN"),
        (numbers.cosine(-0.5), "−0.5000000"),
        (numbers.scientific(0.00031), "3.1×10⁻⁴"),
        (numbers.scientific(0.0), "0"),
        (numbers.scientific(float("-inf")), "−∞"),
        (numbers.percent(0.5812), "58.12 %"),
        (numbers.percent(float("nan")), "NaN"),
        (numbers.points(-0.00401), "−0.40 points"),
        (numbers.points(0.00001), "0.00 points"),
        (numbers.plain(0.81234), "0.8123"),
        (numbers.plain(0.00005), "5.0×10⁻⁵"),
        (numbers.change(0.00005), "+5.0×10⁻⁵"),
        (numbers.change(-1.5), "−1.5000"),
        (numbers.change(0.0), "0.0000"),
    ],
)
def test_numbers_are_written_as_people_read_them(written: str, expected: str) -> None:
    assert written == expected


def test_what_is_not_a_number_is_shown_as_such() -> None:
    made = report(shown=3)
    cosines = np.array([1, np.nan, 0.999999, np.nan])
    row_ = dataclasses.replace(
        made.rows[0], min_cosine=np.nan, mean_cosine=np.nan, max_abs=np.inf, passed=False, cosines=cosines
    )
    found = made.similarities[0].found.copy()
    found[1, 2] = np.nan
    figure = Figure(name="R@1", reference=0.5, found=float("nan"))
    outline = Outline(
        page(
            dataclasses.replace(
                made,
                rows=[row_],
                similarities=[dataclasses.replace(made.similarities[0], found=found)],
                retrievals=[Retrieval(engine="", pairs=3, figures=[figure])],
            )
        )
    )
    assert "4 cosines, 2 of them not a number" in outline.words
    assert "✗ FAILED NaN" in outline.words
    assert (
        len([found for found in outline.of("td") if found.get("class") == "nan"]) == 2
    )  # the engine's, the difference
    assert "the same for 2 of the 3 images" in outline.words
    assert "50.00 % NaN NaN" in outline.words


def test_nothing_but_nan_is_drawn() -> None:
    made = report(shown=2)
    nothing = np.full((2, 2), np.nan)
    lost = dataclasses.replace(made.rows[0], cosines=nothing[0], required_cosine=float("nan"), passed=False)
    shown = dataclasses.replace(made.similarities[0], reference=nothing, found=nothing)
    words = Outline(page(dataclasses.replace(made, rows=[lost], similarities=[shown]))).words
    assert "2 cosines, 2 of them not a number" in words


@given(
    st.lists(st.floats(-1, 1) | st.floats(0.9999, 1) | st.just(float("nan")), min_size=1, max_size=50),
    st.sampled_from([0.9, 0.99, 0.9999, 0.99999, 0.98765, 1.0]),
)
def test_bars_on_the_wrong_side_are_marked(cosines: list[float], required: float) -> None:
    values = np.array(cosines)
    drawn = dataclasses.replace(report(shown=2).rows[0], cosines=values, required_cosine=required)
    bars = Outline(histogram(drawn, Axis.of([drawn]))).of("rect")
    # Within a billionth of what is required, a bar may stand on either side.
    clearly_below = bool((values < required - 1e-9 - 1e-6 * (1 - required)).any())
    clearly_kept = not (values < required + 1e-6 * (1 - required) + 1e-11).any()
    marked = any("below" in bar["class"] for bar in bars)
    assert marked or not clearly_below
    assert not marked or not clearly_kept
    for bar in bars:
        assert 0 <= float(bar["x"]) < float(bar["x"]) + float(bar["width"]) <= 280
        assert 0 <= float(bar["y"]) < float(bar["y"]) + float(bar["height"]) <= 132


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 100))
def test_cells_say_their_values_and_can_be_read(n_images: int, n_texts: int, scale: float) -> None:
    shown = similarities(n_images, n_texts, noise=1)
    shown = dataclasses.replace(shown, reference=shown.reference * scale, images=[Item(text="a")] * n_images)
    cells = [found for found in Outline(matrices(shown)).of("td") if "style" in found]
    assert len(cells) == 3 * n_images * n_texts
    best = [place for place, found in enumerate(cells[: n_images * n_texts]) if found.get("class") == "best"]
    expected = [text * n_images + image for image, text in enumerate(shown.reference.argmax(axis=1))]
    assert sorted(best) == sorted(expected)
    for found in cells:
        assert contrast(*re.findall("#[0-9a-f]{6}", found["style"])) >= 3.5


def test_the_largest_difference_has_the_strongest_color() -> None:
    shown = similarities(4, 4)
    cells = [found for found in Outline(matrices(shown)).of("td") if "style" in found][32:]
    strength = [max(rgb) - min(rgb) for rgb in (color(found["style"][11:18]) for found in cells)]
    difference = np.abs(shown.found - shown.reference).T.ravel()
    assert int(np.argmax(strength)) == int(np.argmax(difference))


def test_only_the_first_of_many_are_shown_and_the_report_says_so() -> None:
    shown = dataclasses.replace(similarities(100, 30), images=[Item(text=str(i)) for i in range(100)])
    outline = Outline(matrices(shown))
    assert "the first 24 of 100 images and 24 of 30 texts" in outline.words
    assert len([found for found in outline.of("td") if "style" in found]) == 3 * 24 * 24


@pytest.mark.parametrize("name", ["reference", "found"])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2,)])
def test_similarities_of_another_shape(shape: tuple[int, ...], name: str) -> None:
    arrays = {"reference": np.zeros((2, 2)), "found": np.zeros((2, 2)), name: np.zeros(shape)}
    shown = dataclasses.replace(similarities(2, 2), reference=arrays["reference"], found=arrays["found"])
    with pytest.raises(ValueError, match=r"expected \[2, 2\]"):
        page(dataclasses.replace(report(), similarities=[shown]))


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK", "I;16", "F", "RGB transparent"])
def test_thumbnails_of_any_mode(mode: str) -> None:
    picture = opened(thumbnail(pictures.picture(mode, 400, 30), 96))
    assert (picture.size, picture.mode, picture.format) == ((96, 96), "RGB", "JPEG")


def test_thumbnails_show_transparency_over_white_and_tell_nothing_else() -> None:
    clear = Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    assert np.asarray(opened(thumbnail(clear, 32))).min() > 250
    signed = Image.new("RGB", (30, 30))
    signed.info["comment"] = b"made by a person at a place " * 2000
    assert len(thumbnail(signed, 32)) < 2000


# The page as a whole


def test_equal_contents_give_equal_pages() -> None:
    assert page(report(passed=False)) == page(report(passed=False))


def test_the_page_stays_small() -> None:
    rows = [dataclasses.replace(report(shown=2).rows[0], cosines=np.linspace(0.99, 1, 1_000_000))] * 20
    contents = dataclasses.replace(report(shown=24), rows=rows)
    flips = contents.retrievals[0].flips * 500
    contents = dataclasses.replace(contents, retrievals=[dataclasses.replace(contents.retrievals[0], flips=flips)])
    assert len(page(contents).encode()) < 1_000_000


@pytest.mark.parametrize("passed", [True, False])
def test_the_page_asks_for_nothing(passed: bool) -> None:
    markup = page(report(passed=passed))
    outline = Outline(markup)
    assert "http" not in markup.replace("http-equiv", "")
    style = markup[markup.index("<style>") : markup.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face|&|<(?!style)", style)
    assert not {"script", "link", "iframe", "object", "video", "a"} & set(outline.skeleton)
    policy = next(found["content"] for found in outline.of("meta") if "http-equiv" in found)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert all(found["src"].startswith("data:image/") for found in outline.of("img"))


def test_who_cannot_see_the_page_is_told_the_same() -> None:
    outline = Outline(page(report(passed=False)))
    assert all(found["scope"] in ("row", "col", "rowgroup") for found in outline.of("th"))
    assert all(found["alt"] for found in outline.of("img"))
    assert all(found["role"] == "img" and "largest" in found["aria-label"] for found in outline.of("svg"))
    assert outline.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag in outline.skeleton if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


# The file


def test_the_file_is_written_and_replaced(tmp_path: Path) -> None:
    for passed in (False, True):
        path = write_report(tmp_path / "a" / "report", report(passed=passed))
    assert path == tmp_path / "a" / "report" / "index.html"
    assert path.read_text(encoding="utf-8") == page(report())
    assert [found.name for found in path.parent.iterdir()] == ["index.html"]


def test_a_place_where_no_report_goes(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(OutputError, match="report cannot be written"):
        write_report(tmp_path / "report", report(shown=2))
    assert (tmp_path / "report").read_text() == "mine"


# In a browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    program = browser.find()
    if program is None:
        pytest.skip(f"needs Chromium: $CHROMIUM names none, and none of {', '.join(browser.NAMES)} is here")
    with browser.started(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


REPORTS = {
    "passing": report,
    "failing": lambda: report(passed=False, shown=24),
    "hostile": lambda: everywhere("".join(HOSTILE[:6]) + HOSTILE[7]),
}

# The contrast of WCAG 2 of every text that is shown, against the first background behind it that is not transparent.
LEAST_CONTRAST = """
(() => {
  const levels = text => text.match(/[\\d.]+/g).map(Number);
  const linear = level => level <= 0.04045 * 255 ? level / 255 / 12.92 : ((level / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = element => {
    const found = levels(getComputedStyle(element).backgroundColor);
    return found.length < 4 || found[3] > 0 ? found : behind(element.parentElement);
  };
  let least = [21, ""];
  for (const element of document.body.querySelectorAll("*:not(.matrix td)")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own) continue;
    const style = getComputedStyle(element);
    const pair = [levels(element.closest("svg") ? style.fill : style.color), behind(element)].map(luminance);
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < least[0]) least = [contrast, element.textContent];
  }
  return least;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", REPORTS)
def test_a_browser_shows_it(tab: browser.Browser, tmp_path: Path, name: str, width: int, dark: bool) -> None:
    path = write_report(tmp_path, REPORTS[name]())
    visit = tab.open(path, width=width, dark=dark)
    assert visit.complaints == []
    assert {address for address in visit.requests if not address.startswith("data:")} == {path.as_uri()}
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page moves sideways"
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    least, text = tab.evaluate(LEAST_CONTRAST)
    assert least >= 4.5, f"{least:.2f}: {text[:80]!r}"
    with Image.open(io.BytesIO(tab.screenshot())) as picture:
        shown = np.asarray(picture.convert("L"))
    assert shown.shape[1] == width
    assert (np.median(shown) < 64) == dark
    assert shown.std(axis=1).astype(bool).mean() > 0.5  # most lines of the picture have something on them


def test_a_browser_would_have_said_what_is_wrong(tab: browser.Browser, tmp_path: Path) -> None:
    """The checks above can fail: a page that asks and complains is seen to."""
    path = tmp_path / "index.html"
    path.write_text(
        "<!doctype html><style>body{color:#999;background:#fff}</style>pale<img src='http://example.invalid/x.png'>"
        "<div style='width:3000px'>wide</div><script>console.error('a complaint')</script>"
    )
    visit = tab.open(path, width=400)
    assert "http://example.invalid/x.png" in visit.requests
    assert any("a complaint" in complaint for complaint in visit.complaints)
    assert tab.evaluate("document.documentElement.scrollWidth") > 400
    assert tab.evaluate(LEAST_CONTRAST)[0] < 4.5


def test_the_policy_stops_what_a_report_never_asks_for(tab: browser.Browser, tmp_path: Path) -> None:
    path = write_report(tmp_path, report(shown=2))
    path.write_text(path.read_text().replace("</main>", "<script>document.title = 'ran'</script></main>"))
    visit = tab.open(path, width=1280)
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)
    assert tab.evaluate("document.title") != "ran"


def test_it_can_be_printed(tab: browser.Browser, tmp_path: Path) -> None:
    tab.open(write_report(tmp_path, report()), width=1280)
    assert tab.pdf().startswith(b"%PDF")


def color(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text.removeprefix("#")))


def contrast(first: str, second: str) -> float:
    """By WCAG 2; scikit-image's XYZ has the luminance as Y."""
    levels = [float(skimage.color.rgb2xyz(np.array(color(text)) / 255)[1]) for text in (first, second)]
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def opened(uri: str) -> Image.Image:
    """The picture in a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
