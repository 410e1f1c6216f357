"""The leaderboard: one file that asks nothing of a network, with every row's protocol, command and records."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmark import cli, registry, report
from benchmark.cli import parser
from benchmark.page import command, page
from benchmark.results import find_runs
from tests.test_writers import by_hand_runs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    return [run for run in find_runs([ROOT / "results"]) if run["records"]]


@pytest.fixture(scope="module")
def html(runs) -> str:
    return page(runs)


@pytest.fixture(scope="module")
def data(html) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_nothing_is_fetched(html):
    markup = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.DOTALL)
    markup = markup.replace("http://www.w3.org/2000/svg", "")  # the name of a language, not an address
    assert not re.search(r"(src|href)=\"(?!#)|https?://|url\(|@import|fetch\(|XMLHttpRequest", markup)
    assert '<html lang="en">' in html and 'name="viewport"' in html


def test_rows_are_those_of_the_report_under_every_rule(runs, data):
    singles = [row for row in data["rows"] if not row["worst"]]
    beside = {run: row["effort"] for row in data["rows"] if row["worst"] for run in row["runs"]}
    for row in data["rows"]:
        budget = dict(row["protocol"])["budget"]
        assert row["effort"] == f"{budget}, {row['n']} images" or (
            budget == "custom" and row["effort"] == beside[row["runs"][0]]
        )
    assert len(singles) == len(runs)
    for rule in data["rules"]:  # all but those of which the records know nothing
        for shown, row in zip(singles, report.rows(runs, rule=rule), strict=True):
            if row["grade"]:
                assert shown["rules"][rule]["robust"] == [row["robust"], row["robust_low"], row["robust_high"]]
            else:
                assert shown["rules"][rule]["robust"] == [None, None, None], "nothing was attacked"
            assert shown["rules"][rule]["clean"][0] == row["clean"]
            assert shown["threat"] == f"{row['norm']} {row['eps']}"
    assert {row["threat"] for row in data["rows"]} >= {"Linf 16/255", "StAdv 0.05"}


def test_the_row_that_speaks_for_a_defense_isnt_its_weakest_attack(data):
    leading = [row for row in data["rows"] if row["leading"]]

    def key(row):  # one defense may have several names: its options can be spelled out or left to their defaults
        spec = registry.completed("purifiers", dict(row["protocol"])["purifier"])
        return (*(row[k] for k in ("dataset", "threat", "effort", "classifier")), spec)

    keys = [key(row) for row in leading]
    assert len(set(keys)) == len(keys)
    assert set(data["rules"]) >= {"mean", "majority", "worst", "any"}
    for row in data["rows"]:
        of = leading[keys.index(key(row))]
        if not of["worst"] and row["grade"] and "noise=verdict" not in row["view"]:
            assert of["rules"]["mean"]["robust"][0] <= row["rules"]["mean"]["robust"][0]
    names = ("fashion-mnist", "Linf 16/255", "quick, 256 images", "diffpure", "resnet")
    shown = ("dataset", "threat", "effort", "purifier", "classifier")
    (headline,) = [r for r in leading if tuple(r[k] for k in shown) == names]
    assert headline["worst"] and headline["n"] == 256 and headline["rank"] == 2


def test_grades_and_their_reasons_are_those_of_the_report(runs, data):
    singles = [row for row in data["rows"] if not row["worst"]]
    for shown, row in zip(singles, report.rows(runs), strict=True):
        assert shown["grade"] == row["grade"]
        statuses = {status for _, status, *_ in shown["checks"]}
        assert (shown["grade"] == "F") == ("fail" in statuses)
    assert {row["grade"] for row in singles} >= {"A", "C", "F"}
    assert all(row["rank"] is None for row in data["rows"] if row["grade"] == "F" or not row["leading"])


def test_a_run_is_shown_beside_all_else_that_its_defense_met(data):
    for row in data["rows"][:50]:
        beside = [data["rows"][k] for k in row["beside"]]
        assert all((b["dataset"], b["threat"], b["classifier"]) == (row["dataset"], row["threat"], row["classifier"])
                   for b in beside)  # fmt: skip
        assert set(row["runs"]) <= {run for b in beside for run in b["runs"]}


def test_the_loop_and_the_gallery_are_in_the_page(runs, data):
    run = next(run for run in runs if str(run["folder"]) in data["broken"])
    shares = data["broken"][str(run["folder"])]
    assert all(a >= b for a, b in pairwise(shares))
    assert shares[-1] == pytest.approx(np.mean([r["broken_at"] < 0 for r in run["records"]]), abs=1e-4)
    assert len(shares) > 20, "as many as the attack has iterations, whenever the last image broke"
    for folder, shown in data["galleries"].items():
        picture = Image.open(io.BytesIO(base64.b64decode(shown["png"])))
        assert picture.width > picture.height and len(shown["rows"]) == 4 and "image 0 of class" in shown["words"]
        assert Path(folder, "gallery.png").is_file()
    assert data["galleries"]


def test_commands_are_of_the_grammar_and_name_the_run(runs):
    for run in runs:
        words = shlex.split(command(run))
        assert words[:4] == ["python", "-m", "benchmark", "run"]
        arguments = parser().parse_args(words[3:])
        identity = run["identity"]
        assert arguments.eps == [identity["eps"]] and arguments.view == identity["view"]
        assert arguments.n_examples == run["n"] and arguments.seed == identity["seed"]


def test_a_command_makes_the_same_run_or_there_is_none(runs):
    run = json.loads(json.dumps(runs[0], default=str))
    run["identity"] |= {"precision": "float64", "budget": "custom", "select": 20}
    words = shlex.split(command(run))
    assert words[words.index("--precision") + 1] == "float64" and words[words.index("--budget") + 1] == "paper"
    run["identity"] |= {"purifier": "Blur", "weights": {"purifier": "0", "classifier.net": "1"}}
    assert command(run) == "# built in Python: Blur", "no shipped component of that name is run in its place"


def test_records_are_in_the_page_as_they_were_written(runs, data):
    run = runs[0]
    files = json.loads(gzip.decompress(base64.b64decode(data["records"][str(run["folder"])])))
    assert files["records.jsonl"] == (run["folder"] / "records.jsonl").read_text()
    assert json.loads(files["run.json"]) == json.loads((run["folder"] / "run.json").read_text())


def test_a_name_that_looks_like_a_tag_cannot_break_out(runs):
    run = json.loads(json.dumps(runs[0], default=str))
    run["names"]["purifier"] = "</script><script>alert(1)</script>"
    assert "</script><script>alert" not in page([run])


def test_what_the_page_is_told_is_what_it_was_told():
    """A golden file of the page's data, of runs by hand, without the compressed records."""
    made = by_hand_runs()
    told = json.loads(re.search(r'id="data">(.*?)</script>', page(made), re.DOTALL)[1])
    assert set(told.pop("records")) == {str(run["folder"]) for run in made}
    assert json.dumps(told, indent=1) + "\n" == (ROOT / "tests" / "golden" / "page.json").read_text()


def test_the_command_writes_one_file(tmp_path, capsys):
    eight = str(ROOT / "results" / "eight")
    assert cli.main(["report", eight, "--format", "html", "--out", str(tmp_path / "site")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "site" / "index.html")
    assert [p.name for p in (tmp_path / "site").iterdir()] == ["index.html"]


CONTRAST = """() => {
  const light = text => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    const l = [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return { l: .2126 * l[0] + .7152 * l[1] + .0722 * l[2], a };
  };
  const behind = one => {
    for (let e = one; e; e = e.parentElement) {
      const c = light(getComputedStyle(e).backgroundColor);
      if (c.a > 0) return c.l;
    }
    return 1;
  };
  const texts = "p, td, th, dt, dd, label, button, figcaption, pre, li, summary, span.interval, span.withheld";
  return [...document.querySelectorAll(texts)].filter(e => e.checkVisibility() && e.innerText.trim()).map(e => {
    const f = light(getComputedStyle(e).color).l, b = behind(e);
    return { text: e.innerText.slice(0, 40), ratio: (Math.max(f, b) + .05) / (Math.min(f, b) + .05) };
  });
}"""
"""The contrast of every text with what lies behind it, as WCAG 2 has it: 4.5 and more can be read."""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_in_a_real_browser_it_sorts_filters_and_unfolds(width, height, scheme, html, data, tmp_path):
    """Headless Chromium, from a file:// address: no error, no request, no sideways scrolling; by keyboard, too."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium isn't installed: apt install chromium")
    (tmp_path / "index.html").write_text(html)
    address = (tmp_path / "index.html").as_uri()
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        errors, asked = [], []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        rows = tab.locator("tr.row")
        tab.select_option("#dataset", "fashion-mnist")
        tab.select_option("#effort", "quick, 64 images")
        chosen = {key: tab.locator(f"#{key}").input_value() for key in ("dataset", "threat", "effort")}
        leading = [r for r in data["rows"] if r["leading"]]
        assert rows.count() == len([r for r in leading if all(r[k] == v for k, v in chosen.items())]) > 100
        tab.select_option("#threat", "StAdv 0.05")
        assert rows.count() == len([r for r in leading if r["threat"] == "StAdv 0.05"]) == 2
        tab.select_option("#threat", "Linf 16/255")
        tab.select_option("#effort", "quick, 256 images")
        assert rows.count() == 6 and tab.locator("#overview circle").count() == 6
        tab.select_option("#effort", "quick, 64 images")
        tab.uncheck("#leading")
        everything = rows.count()
        tab.fill("#search", "vae square")
        assert 0 < rows.count() < everything
        tab.fill("#search", "no such thing")
        assert rows.count() == 0 and tab.locator("#none").is_visible()
        tab.fill("#search", "")
        if width > 800:  # on a phone the head is for screen readers only
            tab.locator("th button", has_text="Robust").click()
            shown = [float(t.split()[0]) for t in tab.locator('td[data-label="Robust %"]').all_inner_texts()]
            assert shown == sorted(shown) and tab.locator('th[aria-sort="ascending"]').count() == 1
        else:
            tab.select_option("#sort", "purifier")
            shown = tab.locator("button.fold").all_inner_texts()
            assert shown == sorted(shown, key=str.lower)
        before = tab.locator('td[data-label="Robust %"]').all_inner_texts()
        tab.select_option("#rule", "worst")
        assert tab.locator('td[data-label="Robust %"]').all_inner_texts() != before
        tab.select_option("#rule", "mean")
        assert tab.locator("span.withheld").count() == tab.locator('td[data-label="Grade"]', has_text="F").count() > 0
        tab.check("#leading")
        tab.select_option("#effort", "quick, 256 images")
        tab.locator("button.fold").first.focus()
        tab.keyboard.press("Enter")
        assert tab.locator("tr.details pre").inner_text().startswith("python -m benchmark run --dataset")
        assert tab.locator('button.fold[aria-expanded="true"]').count() == 1
        assert tab.locator("tr.details svg rect").count() >= 2
        assert all(tab.locator("svg[role=img]").nth(k).get_attribute("aria-label") for k in range(2))
        assert "image 0 of class" in tab.locator("tr.details img.gallery").first.get_attribute("alt")
        assert tab.evaluate("document.querySelector('img.gallery').naturalWidth") > 100
        with tab.expect_download() as download:
            tab.locator("tr.details button.download").first.click()
        lines = Path(download.value.path()).read_text().splitlines()
        assert len(lines) == 256 and "adv" in json.loads(lines[0])
        for pair in tab.evaluate(CONTRAST):
            assert pair["ratio"] >= 4.5, pair
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert errors == [] and all(url.startswith(("file:", "blob:", "data:")) for url in asked)
        browser.close()
