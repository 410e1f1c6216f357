"""The leaderboard: one file that asks nothing of a network, with every row's protocol, command and records."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from benchmark import cli, registry, report
from benchmark.cli import parser
from benchmark.page import command, page
from benchmark.results import find_runs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    return find_runs([ROOT / "results"])


@pytest.fixture(scope="module")
def html(runs) -> str:
    return page(runs)


@pytest.fixture(scope="module")
def data(html) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_nothing_is_fetched(html):
    markup = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.DOTALL)
    assert not re.search(r"(src|href)=\"(?!#)|https?://|url\(|@import|fetch\(|XMLHttpRequest", markup)
    assert '<html lang="en">' in html and 'name="viewport"' in html


def test_rows_are_those_of_the_report_under_every_rule(runs, data):
    singles = [row for row in data["rows"] if not row["worst"]]
    assert len(singles) == len(runs)
    for rule in report.RULES:
        for shown, row in zip(singles, report.rows(runs, rule=rule), strict=True):
            assert shown["rules"][rule]["robust"] == [row["robust"], row["robust_low"], row["robust_high"]]
            assert shown["rules"][rule]["clean"][0] == row["clean"]
            assert shown["threat"] == f"{row['norm']} {row['eps']}"
    assert {row["threat"] for row in data["rows"]} >= {"Linf 16/255", "StAdv 0.05"}


def test_the_row_that_speaks_for_a_defense_isnt_its_weakest_attack(data):
    leading = [row for row in data["rows"] if row["leading"]]

    def key(row):  # one defense may have several names: its options can be spelled out or left to their defaults
        spec = registry.completed("purifiers", dict(row["protocol"])["purifier"])
        return (*(row[k] for k in ("dataset", "threat", "classifier")), spec)

    keys = [key(row) for row in leading]
    assert len(set(keys)) == len(keys)
    for row in data["rows"]:
        of = leading[keys.index(key(row))]
        assert of["n"] >= row["n"]
        if of["n"] == row["n"] and not of["worst"]:
            assert of["rules"]["mean"]["robust"][0] <= row["rules"]["mean"]["robust"][0]
    names = ("fashion-mnist", "Linf 16/255", "diffpure", "resnet")
    (headline,) = [r for r in leading if (r["dataset"], r["threat"], r["purifier"], r["classifier"]) == names]
    assert headline["worst"] and headline["n"] == 256


def test_commands_are_of_the_grammar_and_name_the_run(runs):
    for run in runs:
        words = shlex.split(command(run))
        assert words[:4] == ["python", "-m", "benchmark", "run"]
        arguments = parser().parse_args(words[3:])
        identity = run["identity"]
        assert arguments.eps == [identity["eps"]] and arguments.view == identity["view"]
        assert arguments.n_examples == run["n"] and arguments.seed == identity["seed"]


def test_records_are_in_the_page_as_they_were_written(runs, data):
    run = runs[0]
    lines = data["records"][str(run["folder"])].splitlines()
    assert [json.loads(line) for line in lines] == run["records"]


def test_a_name_that_looks_like_a_tag_cannot_break_out(runs):
    run = json.loads(json.dumps(runs[0], default=str))
    run["names"]["purifier"] = "</script><script>alert(1)</script>"
    assert "</script><script>alert" not in page([run])


def test_the_command_writes_one_file(tmp_path, capsys):
    eight = str(ROOT / "results" / "eight")
    assert cli.main(["report", eight, "--format", "html", "--out", str(tmp_path / "site")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "site" / "index.html")
    assert [p.name for p in (tmp_path / "site").iterdir()] == ["index.html"]


@pytest.mark.slow
@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_in_a_real_browser_it_sorts_filters_and_unfolds(width, height, html, data, tmp_path):
    """Headless Chromium, from a file:// address: no error, no request, no sideways scrolling; by keyboard, too."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium isn't installed: apt install chromium")
    (tmp_path / "index.html").write_text(html)
    address = (tmp_path / "index.html").as_uri()
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": height})
        errors, asked = [], []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        rows = tab.locator("tr.row")
        expected = [r for r in data["rows"] if r["leading"] and r["dataset"] == data["rows"][0]["dataset"]]
        tab.select_option("#dataset", data["rows"][0]["dataset"])
        threat = tab.locator("#threat").input_value()
        assert rows.count() == len([r for r in expected if r["threat"] == threat])
        tab.select_option("#threat", "StAdv 0.05")
        assert rows.count() == len([r for r in expected if r["threat"] == "StAdv 0.05"]) == 2
        tab.select_option("#threat", threat)
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
        before = tab.locator('td[data-label="Robust %"]').all_inner_texts()
        tab.select_option("#rule", "worst")
        assert tab.locator('td[data-label="Robust %"]').all_inner_texts() != before
        tab.locator("button.fold").first.focus()
        tab.keyboard.press("Enter")
        assert tab.locator("tr.details pre").inner_text().startswith("python -m benchmark run --dataset")
        assert tab.locator('button.fold[aria-expanded="true"]').count() == 1
        with tab.expect_download() as download:
            tab.locator("tr.details a").first.click()
        lines = Path(download.value.path()).read_text().splitlines()
        assert "adv" in json.loads(lines[0])
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert errors == [] and all(url.startswith(("file:", "blob:")) for url in asked)
        browser.close()
