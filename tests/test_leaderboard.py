"""The leaderboard: records against numbers worked out by hand, hostile names, and the page in a browser."""

import csv
import json
import os
import re
import shutil

import jax.numpy as jnp
import pytest
from commands import bdjax, refused
from synthetic_results import BADNETS, PAPERS, cell, write

from bdjax.errors import InputError
from bdjax.metrics.der import der
from bdjax.reports.leaderboard import plot, records, site
from bdjax.reports.leaderboard.rows import by_defense, group

EVIL = "\"'><script>document.title='owned'</script>\x1b[2J\u202e{{ 7*7 }}"


def row(victim="one", defense="clp", size=500, seed=0, after=(90.0, 5.0), **changes):
    """A row of experiments/foreign; before: ACC 95 %, ASR 99 %."""
    return {
        "victim": victim, "set": "dev", "defense": defense, "size": size, "seed": seed, "n_test": 2000, "n_asr": 1800,
        "before_acc": 95.0, "before_asr": 99.0, "after_acc": after[0], "after_asr": after[1], "seconds": 3.0,
        "estimate": {"rate": 0.25}, "peak_memory_bytes": 2**30, "device": "cpu", **changes,
    }  # fmt: skip


def reactivation(hash_, metric="R-ASR", asr=0.3):
    return {"kind": "reactivation", "metric": metric, "hash": hash_, "after": {"acc": 0.7, "asr": asr}}


@pytest.fixture
def results(tmp_path):
    """Two seeds of a cell, one run of another defense with re-activation attacks, and two rows of a bench."""
    folder = tmp_path / "results"
    for seed, acc, asr in ((0, 0.80, 0.10), (1, 0.90, 0.20)):
        of_cell = cell(0, "BadNets", scale="6 of 50 epochs", paper=BADNETS)
        write(folder / f"runs/{seed}", seed, acc, asr, of_cell, estimate={"rate": 0.5})
    hash_ = "feed"
    write(folder / "runs/nad", 0, 0.85, 0.40, defense="nad", config_hash=hash_, defense_config={"epochs": 1})
    (folder / "runs/nad/retuning-1a2b3c4d.json").write_text(json.dumps(reactivation(hash_)))
    (folder / "again").mkdir()
    (folder / "again/result.json").write_text(json.dumps(reactivation(hash_, asr=0.5)))
    (folder / "runs/nad/query-1.json").write_text(json.dumps(reactivation(hash_, "Q-ASR", 0.07)))
    (folder / "rows.json").write_text(json.dumps([row(), row(victim="two", defense="ibau", after=(95.4, 50.2))]))
    named = {"name": "one", "attack": "blended", "dataset": "npz:data/gtsrb.npz", "model": "cnn"}
    (folder / "victims.json").write_text(json.dumps([named]))
    (folder / "purified").mkdir()  # a model: nothing of it is read
    (folder / "purified/manifest.json").write_text("{}")
    (folder / "purified/result.json").write_text("{")
    return folder


def test_der_by_hand():
    # ASR 100 to 10 is a gain of 90; ACC 90 to 80 a loss of 10: (0.9 - 0.1 + 1) / 2. A worse ASR and a better ACC: 0.5.
    before_acc, after_acc = jnp.array([0.9, 0.9, 1.0]), jnp.array([0.8, 0.95, 0.0])
    before_asr, after_asr = jnp.array([1.0, 0.4, 0.0]), jnp.array([0.1, 0.6, 1.0])
    assert der(before_acc, after_acc, before_asr, after_asr).tolist() == pytest.approx([0.9, 0.5, 0.0])


def test_records_have_the_numbers_of_the_results(results):
    by_name = {(r.victim, r.defense, r.seed): r for r in records.read([results], PAPERS)}
    assert len(by_name) == 5
    first = by_name["", "ibau", 0]
    assert (first.acc_before, first.acc_after, first.asr_before) == pytest.approx((90, 80, 100))
    assert (first.asr_after, first.asr_after_incl_target, first.der) == pytest.approx((10, 15, 90))
    assert (first.n_defender, first.n_test, first.n_asr, first.estimate) == (5000, 5000, 4500, 50)
    assert (first.seconds, first.peak_memory_mib, first.peak_memory_of) == (10, 100, "device")
    assert (first.label, first.scale, first.device) == ("BadNets", "6 of 50 epochs", "H200 x 1")
    assert first.paper == "ibau, table 1: 83.35 / 12.30"
    nad = by_name["", "nad", 0]
    assert (nad.r_asr, nad.q_asr) == pytest.approx((40, 7)) and first.r_asr is None
    one, two = by_name["one", "clp", 0], by_name["two", "ibau", 0]
    assert (one.attack, one.dataset, one.model, two.attack) == ("blended", "gtsrb", "cnn", "")
    assert (one.set, one.der, one.estimate, one.peak_memory_mib) == ("dev", pytest.approx(94.5), 25, 1024)


def test_a_published_number_is_found_by_its_names_where_it_is_the_only_one(tmp_path):
    write(tmp_path / "a", dataset="cifar10", model="resnet18", attack="badnets", defense="clp", defense_config={})
    (record,) = records.read([tmp_path], PAPERS)
    with open(PAPERS / "bibau.csv", newline="") as file:
        clp = {
            row["metric"]: row["value"]
            for row in csv.DictReader(file)
            if (row["table"], row["attack"], row["defense"]) == ("1", "BadNets", "CLP")
        }
    assert f"~ bibau, table 1: {clp['ACC']} / {clp['ASR']}" in record.paper.split("; ")


def test_rows_pool_seeds_and_defenses_are_ranked(results):
    rows = group(records.read([results], PAPERS))
    assert [len(row.records) for row in rows] == [2, 1, 1, 1]
    pooled = rows[0]
    assert pooled.mean("acc_after") == pytest.approx(85) and pooled.deviation("asr_after") == pytest.approx(50**0.5)
    assert pooled.mean("der") == pytest.approx((90 + 90) / 2) and pooled.acc_change == pytest.approx(-5)
    ranked = by_defense(rows)
    assert [(row.number, row.defense, row.n_rows) for row in ranked] == [(1, "clp", 1), (2, "ibau", 2), (3, "nad", 1)]
    assert ranked[1].der == pytest.approx((90 + 74.4) / 2) and ranked[1].seconds == pytest.approx((10.5 + 3) / 2)


def test_the_front_has_the_defenses_that_no_other_one_beats():
    assert plot._front([(1.0, 10.0), (2.0, 20.0), (3.0, 5.0), (0.0, 30.0)]) == "M0.0 30.0H1.0V10.0H3.0V5.0"
    axis = plot.Axis("", 0.1, 100.0, 0.0, 300.0, log=True)
    assert [axis.at(v) for v in (0.1, 1.0, 10.0, 1e9, 0.0)] == [0, 100, 200, 300, 0]
    assert [text for _, text in plot.Axis("", -7.0, 2.0, 0.0, 9.0).ticks] == ["-6", "-4", "-2", "0", "2"]


def test_the_files_have_every_record(results, tmp_path, capsys):
    printed = bdjax(capsys, "leaderboard", results, "--out", tmp_path / "out", "--papers", PAPERS, "--title", "My runs")
    assert str(tmp_path / "out" / "index.html") in printed
    read = records.read([results], PAPERS)
    with open(tmp_path / "out/records.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(read) == 5
    for line, record in zip(table, read, strict=True):
        assert float(line["acc_after"]) == record.acc_after and line["r_asr"] == (
            "" if record.r_asr is None else "40.0"
        )
        assert (tmp_path / "out" / line["source"]).samefile(record.source)
        assert json.loads(line["config"]) == record.config
    if (parquet := tmp_path / "out/records.parquet").exists():
        from pyarrow import parquet as reader

        columns = reader.read_table(parquet).to_pydict()
        assert columns["der"] == [record.der for record in read] and columns["seed"] == [r.seed for r in read]
        assert columns["defense"] == [record.defense for record in read]


def test_a_copied_site_can_be_moved(results, tmp_path):
    site.write(records.read([results], PAPERS), tmp_path / "out", copy=True)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    with open(tmp_path / "elsewhere/records.csv", newline="") as file:
        sources = {row["source"] for row in csv.DictReader(file)}
    assert len(sources) == 4 and all((tmp_path / "elsewhere" / source).is_file() for source in sources)


def test_what_cannot_be_read_is_named(results, tmp_path, capsys):
    assert "no such directory" in refused(capsys, "leaderboard", tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "there is no run of a defense below" in refused(capsys, "leaderboard", tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/result.json").write_text('{"attack": 1}')
    with pytest.raises(InputError, match=r"bad.result\.json is damaged"):
        records.read([tmp_path / "bad"])
    (tmp_path / "site").mkdir()
    (tmp_path / "site/index.html").write_text("<p>the documentation</p>")
    with pytest.raises(InputError, match=r"is not a page of bdjax leaderboard.*--out"):
        site.write(records.read([results], PAPERS), tmp_path / "site")


@pytest.fixture
def page(results, tmp_path):
    """A page with hostile names in every text; it is written twice, the second time over itself."""
    folder = results / f"o'{EVIL[:3]}&"
    write(folder, 3, 0.5, 0.9, cell(0, EVIL, scale=EVIL), attack=EVIL, defense=EVIL, dataset=EVIL, model=EVIL,
          env={"device": EVIL, "devices": 1, "bdjax": EVIL, "jax": EVIL})  # fmt: skip
    found = records.read([results], PAPERS)
    site.write(found, tmp_path / "out", title=EVIL)
    return site.write(found, tmp_path / "out", title=EVIL)[0]


def test_hostile_names_are_text(page):
    text = page.read_text()
    assert "<script>document" not in text and text.count("<script") == 1 and "\x1b" not in text and "\u202e" not in text
    assert "{{ 7*7 }}" in text and text.count("&lt;script&gt;") > 8
    assert "http:" not in text and "https:" not in text and "script-src 'sha256-" in text


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium by playwright: BDJAX_CHROMIUM, or one on the PATH."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("BDJAX_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def shown(view, column):
    """Texts of a column in the rows that are shown, in order."""
    return view.evaluate(
        """column => [...document.querySelectorAll('#rows-table tbody tr')].filter(row => !row.hidden)
        .map(row => row.querySelector(`[data-column=${column}]`).textContent.trim())""",
        column,
    )


def test_rows_are_sorted_and_filtered(page, browser):
    view = browser.new_page()
    view.goto(page.as_uri())
    view.click("#rows-table th[data-column=asr_after] button")
    ascending = [float(text.split()[0]) for text in shown(view, "asr_after")]
    assert ascending == sorted(ascending) == [5.0, 15.0, 40.0, 50.2, 90.0]
    view.click("#rows-table th[data-column=asr_after] button")
    assert [float(text.split()[0]) for text in shown(view, "asr_after")] == ascending[::-1]
    view.click("#rows-table th[data-column=r_asr] button")
    assert shown(view, "r_asr") == ["40.0", "–", "–", "–", "–"]  # what was not measured goes last
    view.click("#rows-table th[data-column=defense] button")
    assert shown(view, "defense")[1:] == ["clp", "ibau", "ibau*2", "nad"]
    view.select_option("select[data-column=n_defender]", "500")
    assert shown(view, "defense") == ["clp", "ibau"] and view.inner_text("#count") == "2 of 5 rows"
    assert view.inner_text("#by-defense tr[data-defense=ibau] [data-column=der]") == "74.4"
    assert view.evaluate("document.querySelector('#acc-asr .point[data-defense=nad]').style.display") == "none"
    view.select_option("select[data-column=defense]", "nad")
    assert (
        shown(view, "defense") == []
        and view.evaluate("document.querySelector('#acc-asr .front').getAttribute('d')") == ""
    )
    view.click("button[type=reset]")
    view.wait_for_function("document.getElementById('count').textContent === '5 of 5 rows'")
    view.select_option("select[data-column=attack]", index=1)
    assert len(shown(view, "attack")) == 1
    view.close()


def numbers_of(view, plot_name):
    """Positions of the points and of the front."""
    points = [one.get_attribute("transform") for one in view.query_selector_all(f"{plot_name} .point")]
    front = view.query_selector(f"{plot_name} .front").get_attribute("d")
    return [float(number) for number in re.findall(r"-?[\d.]+", " ".join([*points, front]))]


def test_the_script_draws_what_the_template_drew(page, browser):
    still = browser.new_context(java_script_enabled=False).new_page()
    still.goto(page.as_uri())
    running = browser.new_page()
    running.goto(page.as_uri())
    for plot_name in ("#acc-asr", "#der-seconds"):
        drawn = [numbers_of(view, plot_name) for view in (still, running)]
        assert len(drawn[0]) > 8 and drawn[0] == pytest.approx(drawn[1], abs=0.11)  # both round to a tenth
    tables = [" ".join(view.inner_text("#by-defense tbody").split()) for view in (still, running)]
    assert tables[0] == tables[1]
    still.close()
    running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_loads_nothing_and_its_links_lead_to_results(width, scheme, page, browser):
    messages, requests = [], []
    view = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(page.as_uri())
    size = view.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    wide = view.evaluate("""[...document.querySelectorAll('body *')].filter(one =>
        one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll'))
        .map(one => one.outerHTML.slice(0, 80))""")
    assert size[0] <= size[1] == width and wide == []
    assert messages == [] and {url for url in requests if not url.startswith("data:")} == {page.as_uri()}
    assert "owned" not in view.title()[:5]
    links = view.evaluate("[...document.querySelectorAll('#rows-table a')].map(one => one.href)")
    assert len(links) == 6
    for link in links:
        with view.expect_navigation():
            view.evaluate("link => { location.href = link }", link)
        assert "seconds" in view.inner_text("body")
    view.close()


def test_it_prints_without_its_filters(page, browser):
    view = browser.new_page()
    view.goto(page.as_uri())
    assert view.pdf(prefer_css_page_size=True)[:5] == b"%PDF-"
    view.emulate_media(media="print")
    assert view.evaluate("getComputedStyle(document.getElementById('filters')).display") == "none"
    view.close()
