from __future__ import annotations

import base64
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elision.bench.compare import Comparison, compare_denoise
from elision.bench.report import render, write_report
from elision.bench.report._grid import overlap
from elision.bench.report._images import difference_uri, region_uri, sample_uri, sheet
from elision.bench.report._plot import Frame, Point, scatter, ticks
from elision.bench.subject import Subject, images_of

STEPS = 9
METHODS = ["taylorseer:interval=3", "first_block:threshold=0.3", "uniform:interval=2"]


@pytest.fixture(scope="module")
def comparison(subject: Subject) -> Comparison:
    return compare_denoise(subject, METHODS, steps=STEPS, seeds=2, keep_images=2)


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(comparison, tmp_path_factory.mktemp("report") / "deep" / "report.html")


def test_the_page_loads_nothing(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"']*)""", text)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text


def test_every_image_has_its_own_description(page: Path, comparison: Comparison) -> None:
    images = re.findall(r"<img [^>]*>", page.read_text())
    texts = [re.search(r'alt="([^"]+)"', image) for image in images]
    assert all(texts)
    assert len({t.group(1) for t in texts if t}) == len(images)
    assert len(images) == 2 * (2 * len(comparison.arms) - 1)  # no difference of the baseline from itself


def test_numbers_and_notes_are_on_the_page(page: Path, comparison: Comparison) -> None:
    text = page.read_text().replace("<wbr>", "")
    for row in comparison.rows():
        assert f">{row.label}<" in text
        if row.kind != "baseline":
            assert f"{row.psnr.mean:.1f}" in text
    assert "LPIPS is not reported" in text


def test_prompts_and_notes_are_escaped(comparison: Comparison) -> None:
    bad = Comparison(**{**vars(comparison), "prompts": ["<script>alert(1)</script>", "x", "y"]})
    text = render(bad)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_comparison_from_a_file_renders_without_images(comparison: Comparison, tmp_path: Path) -> None:
    loaded = Comparison.load(comparison.save(tmp_path / "r.jsonl"))
    text = render(loaded)
    assert "<img" not in text
    assert 'class="strip"' in text


def _half(out: object) -> torch.Tensor:
    return torch.cat([images_of(out), images_of(out).flip(-1)], -1)  # [B, 1, 32, 64]


@pytest.fixture(scope="module")
def edits(subject: Subject) -> Comparison:
    masks = torch.zeros(3, 32, 64, dtype=torch.bool)
    masks[:, :, :32] = True
    mine = replace(subject, kind="edit", read=_half, judge=None, references=torch.rand(3, 1, 32, 64), masks=masks)
    found = compare_denoise(mine, ["taylorseer:interval=3"], steps=6, seeds=1, controls=False)
    next(arm for arm in found.arms if arm.kind == "method").regions = masks[:, ::4, ::4]
    return found


def test_edits_show_what_is_edited_and_the_region_that_was_seen(edits: Comparison) -> None:
    text = render(edits)
    assert "3 edits" in re.sub("<[^>]*>", "", text)
    assert len(re.findall(r": the image to edit", text)) == 3
    told = re.findall(r"takes 64 of 128 tokens for edited, overlap with the true region 1\.00", text)
    assert len(told) == 3
    assert text.count("taken for edited") == 1
    assert "region 1.00</small>" in text
    images = re.findall(r'<img [^>]*alt="([^"]+)"', text)
    assert len(set(images)) == len(images)


def test_overlap_is_of_pixels() -> None:
    truth = torch.zeros(8, 8, dtype=torch.bool)
    truth[:4] = True
    assert overlap(truth[::4, ::4], truth) == 1
    assert overlap(~truth[::4, ::4], truth) == 0
    assert overlap(torch.tensor([[True, False], [False, False]]), truth) == 0.5
    assert overlap(torch.zeros(2, 2, dtype=torch.bool), truth & False) == 1


def test_outlines_follow_region_and_truth() -> None:
    image = torch.full((3, 32, 32), 0.5)
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[2:6, 2:6] = True
    truth = torch.zeros(32, 32, dtype=torch.bool)
    truth[:, 24:] = True
    data = base64.b64decode(region_uri(image, region, truth).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)))  # four times enlarged
    assert pixels.shape == (128, 128, 3)
    assert tuple(pixels[64, 33]) == (255, 138, 20)  # border of the region
    assert tuple(pixels[64, 64]) == (166, 131, 96)  # inside: 0.7 grey and 0.3 orange
    assert tuple(pixels[8, 8]) == (45, 45, 45)  # outside: dark
    assert tuple(pixels[64, 97]) == tuple(pixels[64, 127]) == (90, 220, 255)


@pytest.fixture(scope="module")
def videos(subject: Subject) -> Comparison:
    def frames(out: object) -> torch.Tensor:
        return torch.stack([images_of(out).roll(k, -1) for k in range(5)], 1).flatten(0, 1)

    mine = replace(subject, kind="video", read=frames, judge=None)
    return compare_denoise(mine, ["taylorseer:interval=3"], steps=6, seeds=1, controls=False, keep_images=4)


def test_videos_move_and_lie_in_order(videos: Comparison) -> None:
    assert videos.frames == 5
    assert videos.samples == "3 videos"
    first = videos.arms[0].images
    assert first is not None
    assert len(first) == 2 * 5  # half as many as images, all frames of each
    text = render(videos)
    moving = re.findall(r'class="moving" src="data:image/png;base64,([^"]+)"', text)
    assert len(moving) == 2 * len(videos.arms)
    assert Image.open(io.BytesIO(base64.b64decode(moving[0]))).n_frames == 5  # type: ignore[attr-defined]
    assert text.count('class="sheet"') == 2 * (2 * len(videos.arms) - 1)  # frames of all, differences of all but one


def test_sheets_hold_frames_row_by_row() -> None:
    frames = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    found = sheet(frames, columns=3)
    assert found.shape == (3, 5, 8)  # two rows of three, a line between, an empty place at the end
    assert found[0, 0].tolist() == [0, 0, 0, 1, 1, 0, 2, 2]
    assert found[0, 4].tolist() == [3, 3, 0, 4, 4, 0, 0, 0]
    assert sheet(frames.repeat(4, 1, 1, 1), columns=4, most=8).shape == (3, 5, 11)


def test_no_plot_without_points() -> None:
    assert scatter([], Frame("x"), "name") == ""


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(1.0, 3.4) == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    for low, high in ((0.0, 1.0), (17.3, 44.0), (1.0, 1.0), (0.0, 0.0)):
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert found[0] < found[-1]


def test_labels_of_neighbouring_points_do_not_overlap() -> None:
    points = [Point(2.0 + 0.001 * i, 30.0, 29.0, 31.0, f"method-{i}", "method") for i in range(5)]
    svg = scatter(points, Frame("x"), "name")
    places = re.findall(r'class="label method" x="([\d.]+)" y="([\d.]+)"', svg)
    assert len(set(places)) == 5
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[i + 1 :]:
            assert abs(float(y) - float(other_y)) >= 13 or abs(float(x) - float(other_x)) >= 8 * 6


def test_images_keep_small_pixels_and_shrink_large_ones() -> None:
    assert sample_uri(torch.rand(1, 32, 32)).startswith("data:image/png")
    assert sample_uri(torch.rand(3, 400, 300)).startswith("data:image/jpeg")
    same = torch.rand(3, 8, 8)
    assert difference_uri(same, same) == difference_uri(torch.zeros(3, 8, 8), torch.zeros(3, 8, 8))
    assert difference_uri(same, 1 - same) != difference_uri(same, same)


# -- in a browser ----------------------------------------------------------------------------------------------------

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1600",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("chromium and chromium-driver are not installed")
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        chrome = webdriver.Chrome(options=options, service=Service(driver))
        yield chrome
        chrome.quit()


def test_the_report_in_chromium(browser, page: Path, comparison: Comparison, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    browser.get(page.as_uri())

    plots = browser.find_elements("css selector", "svg.plot")
    assert len(plots) == 2
    assert all(plot.is_displayed() and plot.size["width"] > 300 and plot.size["height"] > 150 for plot in plots)
    shown = [row for row in comparison.rows() if row.kind != "baseline" and row.psnr.mean < 100]
    assert len(shown) > 3
    assert len(plots[0].find_elements("css selector", "g.mark")) == len(shown)

    rows = browser.find_elements("css selector", ".samples tr.sample")
    assert len(rows) == len(comparison.arms)
    images = browser.find_elements("css selector", ".samples img")
    drawn = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert all(drawn)
    assert len(drawn) == len(images)
    assert images[0].is_displayed()
    assert images[0].size["width"] >= 64

    strips = browser.find_elements("css selector", ".strip")
    expected = {arm.label: arm.samples[0].states for arm in comparison.arms if arm.kind != "fewer_steps"}
    assert len(strips) == len(expected)
    for strip, states in zip(strips, expected.values(), strict=True):
        cells = strip.find_elements("css selector", ".cell")
        assert len(cells) == STEPS
        assert [cell.get_attribute("class").split()[1] for cell in cells] == states
        assert all(cell.size["width"] >= 2 for cell in cells)
    colours = {
        state: browser.execute_script(
            f"return getComputedStyle(document.querySelector('.cell.{state}')).backgroundColor"
        )
        for state in ("computed", "reused", "predicted")
    }
    assert len(set(colours.values())) == 3

    assert browser.execute_script("return document.body.scrollWidth <= window.innerWidth")
    assert browser.get_log("browser") == []
    requests = browser.execute_script("return performance.getEntriesByType('resource').map(r => r.name)")
    assert all(name.startswith("data:") for name in requests)
    assert browser.save_screenshot(str(tmp_path / "report.png"))


def test_the_report_fits_a_telephone(browser, page: Path) -> None:  # type: ignore[no-untyped-def]
    browser.set_window_size(500, 900)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.body.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("kind", ["videos", "edits"])
def test_videos_and_edits_in_chromium(browser, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:  # type: ignore[no-untyped-def]
    page = write_report(request.getfixturevalue(kind), tmp_path / "report.html")
    browser.set_window_size(1280, 1600)
    browser.get(page.as_uri())
    assert all(browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)"))
    widths = {
        role: {image.size["width"] for image in browser.find_elements("css selector", f".samples tr.{role} img")}
        for role in ("sample", "difference", "region", "reference")
    }
    if kind == "videos":
        assert widths == {"sample": {76, 153}, "difference": {153}, "region": set(), "reference": set()}
    else:
        assert widths == {role: {128} for role in widths}
    assert browser.execute_script("return document.body.scrollWidth <= window.innerWidth")
    assert browser.get_log("browser") == []
