import base64
import builtins
import csv
import json
import re
import shutil
import time

import numpy as np
import pytest
from synthetic_runs import heavy, synthetic, with_gaps

from local_elasticity.base.errors import InputError
from local_elasticity.report import heat_map, write_all, write_page
from local_elasticity.report.reading import number

pytest.importorskip("plotly", reason='the page needs plotly: pip install "local-elasticity[report]"')
from local_elasticity.report import page as page_module

pytestmark = pytest.mark.exhaustive

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NASTY = ["<script>alert(1)</script>", "\"quoted\" & 'both'", "</script><!--"]


def payload(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="run" type="application/json">(.*?)</script>', text, re.S)[1])


def ours(path):
    """The page without plotly's source."""
    return path.read_text(encoding="utf-8").replace(page_module._plotly(), "")


# ---- the file -------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_names_no_network(tmp_path):
    path = write_page(synthetic(snapshots=3), tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<link[^>]+stylesheet|<script[^>]+src|@import|url\(", ours(path))
    assert "default-src 'none'" in text
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_the_numbers_in_the_page_are_the_datasets(tmp_path):
    dataset = with_gaps(synthetic(definitions=("kl", "he_su"), updates=("a", "b"), snapshots=5))
    packed = payload(write_page(dataset, tmp_path / "page.html"))["cells"]["median"]
    assert packed["type"] == "f8"
    values = np.frombuffer(base64.b64decode(packed["base64"]), "<f8").reshape(dataset["median"].shape)
    np.testing.assert_array_equal(values, dataset["median"].values)


def test_names_cannot_leave_their_place(tmp_path):
    dataset = synthetic(names=NASTY, snapshots=2, title="</title><script>alert(2)</script>")
    path = write_page(dataset, tmp_path / "page.html")
    assert "<script>alert" not in ours(path)
    assert ours(path).count("</script>") == 3
    assert payload(path)["sources"] == NASTY


def test_a_long_run_is_thinned_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_CELLS", 9 * 10)
    dataset = synthetic(snapshots=49)
    run = payload(write_page(dataset, tmp_path / "page.html"))
    assert len(run["steps"]) == 10
    assert (run["steps"][0], run["steps"][-1]) == (1, 433)
    assert "10 of the run's 49 snapshots" in run["general"][0]


def test_figures_are_put_inside(tmp_path):
    dataset = synthetic(2, snapshots=2)
    figures = [*write_all(dataset, tmp_path / "figures"), heat_map(dataset)]
    text = ours(write_page(dataset, tmp_path / "page.html", figures=figures))
    assert text.count('src="data:image/png;base64,') == 4


def test_a_missing_figure_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.png"):
        write_page(synthetic(snapshots=1), tmp_path / "page.html", figures=[tmp_path / "none.png"])


def test_without_plotly_the_extra_is_named(tmp_path, monkeypatch):
    genuine = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("plotly"):
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"local-elasticity\[report\]"):
        write_page(synthetic(snapshots=1), tmp_path / "page.html")


# ---- in a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser tests need: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("the browser tests need Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in [*FLAGS, f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def show(browser, tmp_path):
    """Write and open the page of a dataset; afterwards nothing may have been logged or fetched."""
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)

    def opened(dataset, width=1280):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(write_page(dataset, tmp_path / "page.html").as_uri())
        assert browser.execute_script("return document.documentElement.dataset.ready") == "true"
        return browser

    yield opened
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.endswith("page.html") for url in urls)  # the log does see requests
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
    assert browser.get_log("browser") == []


def element(browser, name):
    return browser.find_element("id", name)


def cell(browser, source, target):
    script = """return [...document.querySelectorAll("#matrix td")].find(
        c => c.dataset.source === arguments[0] && c.dataset.target === arguments[1]).textContent"""
    return browser.execute_script(script, source, target)


def move_to(browser, snapshot):
    script = "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    browser.execute_script(script, snapshot)


def choose(browser, name, value):
    from selenium.webdriver.support.ui import Select

    Select(element(browser, name)).select_by_value(value)


def check_cells(browser, table):
    """Every cell of the matrix against a (source_class, target_class) array."""
    for source in table["source_class"].values:
        for target in table["target_class"].values:
            shown = cell(browser, str(source), str(target))
            assert shown == number(float(table.sel(source_class=source, target_class=target)))


def test_the_cells_are_the_datasets_at_every_choice(show):
    dataset = synthetic(definitions=("kl", "kl_published"), updates=("adam:0.0001", "sgd:0.01"), snapshots=12)
    browser = show(dataset)
    check_cells(browser, dataset["mean"].isel(step=-1, update=0, definition=0))
    move_to(browser, 4)
    check_cells(browser, dataset["mean"].isel(step=4, update=0, definition=0))
    choose(browser, "definition", "kl_published")
    check_cells(browser, dataset["mean"].isel(step=4, update=0, definition=1))
    assert "published code computed" in element(browser, "words").text
    choose(browser, "update", "sgd:0.01")
    choose(browser, "statistic", "ratio_of_means")
    check_cells(browser, dataset["ratio_of_means"].isel(step=4, update=1, definition=1))
    readout = element(browser, "readout").text
    assert f"step {int(dataset['step'][4])}" in " ".join(readout.split())
    assert number(float(dataset["train_loss"][4])) in readout
    last = dataset.isel(step=-1, update=1, definition=1)
    assert number(float(last["ratio"])) in element(browser, "answer").text


def test_the_slider_and_the_matrix_obey_the_keyboard(show):
    from selenium.webdriver.common.keys import Keys

    dataset = synthetic(snapshots=6)
    browser = show(dataset)
    element(browser, "step").send_keys(Keys.ARROW_LEFT)
    check_cells(browser, dataset["mean"].isel(step=4, update=0, definition=0))
    browser.find_element("css selector", '#matrix td[tabindex="0"]').send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    described = element(browser, "cell").text
    one = dataset.isel(step=4, update=0, definition=0, source_class=0, target_class=1)
    assert described.startswith("A step on airplane moved automobile")
    for name in ("mean", "interval_low", "interval_high"):
        assert number(float(one[name])) in described
    assert "400 pairs" in described


def test_the_curves_are_the_datasets_and_the_line_follows_the_slider(show):
    dataset = synthetic(snapshots=8)
    browser = show(dataset)

    def curves():
        script = "return document.getElementById('curves').data.map(t => [t.name, t.x, t.y, t.fill || ''])"
        return {name: (x, y) for name, x, y, fill in browser.execute_script(script) if not fill}

    one = dataset.isel(update=0, definition=0)
    np.testing.assert_allclose(curves()["own class (intra)"][1], one["intra"])
    np.testing.assert_allclose(curves()["own class (intra)"][0], dataset["epoch"])
    np.testing.assert_allclose(curves()["probe_loss"][1], dataset["probe_loss"])
    choose(browser, "axis", "step")
    np.testing.assert_array_equal(curves()["probe_loss"][0], dataset["step"])
    choose(browser, "view", "1")
    np.testing.assert_allclose(curves()["ship"][1], one["mean"][:, 1, 2])
    choose(browser, "view", "averages")
    browser.find_element("css selector", '#matrix td[data-source="ship"][data-target="airplane"]').click()
    np.testing.assert_allclose(curves()["picked: ship → airplane"][1], one["mean"][:, 2, 0])
    move_to(browser, 3)
    time.sleep(0.3)
    assert browser.execute_script("return document.getElementById('curves').layout.shapes[0].x0") == dataset["step"][3]


def test_playing_ends_at_the_last_snapshot(show):
    dataset = synthetic(snapshots=4)
    browser = show(dataset)
    element(browser, "play").click()
    time.sleep(2.2)
    assert element(browser, "step").get_attribute("value") == "3"
    assert element(browser, "play").text == "Play"


def test_undefined_cells_and_heavy_tails_are_marked(show):
    browser = show(heavy(with_gaps(synthetic(snapshots=8))))
    assert cell(browser, "automobile", "airplane") == "–"
    assert "undefined" in browser.find_element(
        "css selector", '#matrix td[data-source="automobile"][data-target="airplane"]'
    ).get_attribute("class")
    assert "Heavy tails" in element(browser, "warnings").text
    names = browser.execute_script("return document.getElementById('curves').data.map(t => t.name)")
    assert "median, own class" in names
    assert browser.execute_script("return document.getElementById('curves').layout.yaxis.type") == "log"


def test_user_strings_stay_text(show):
    dataset = synthetic(names=NASTY, snapshots=3, title="<img src=x onerror=alert(3)>")
    browser = show(dataset)
    check_cells(browser, dataset["mean"].isel(step=-1, update=0, definition=0))
    choose(browser, "view", "0")
    assert browser.find_element("tag name", "h1").text == "<img src=x onerror=alert(3)>"


def test_one_snapshot(show):
    dataset = synthetic(snapshots=1).drop_vars(["epoch", "train_loss"])
    browser = show(dataset)
    check_cells(browser, dataset["mean"].isel(step=0, update=0, definition=0))
    assert element(browser, "step").get_attribute("disabled")


def test_a_hundred_classes(show):
    dataset = synthetic(100, snapshots=2)
    browser = show(dataset)
    z = browser.execute_script("return document.getElementById('matrix').data[0].z[7][9]")
    assert z == pytest.approx(float(dataset["mean"][-1, 0, 0, 7, 9]))
    assert "cannot be read" in element(browser, "warnings").text
    assert len(browser.find_elements("css selector", "#numbers tbody tr")) == 100


def test_a_phone_scrolls_down_only(show):
    browser = show(synthetic(10, snapshots=5), width=400)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400


def test_the_csv_holds_every_number(show, tmp_path):
    dataset = synthetic(2, names=['a,"b"', "c"], snapshots=3)
    browser = show(dataset)
    folder = tmp_path / "downloads"
    folder.mkdir()
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    element(browser, "csv").click()
    file = folder / "local-elasticity.csv"
    for _ in range(50):
        if file.exists():
            break
        time.sleep(0.1)
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["mean"]) for row in rows] == dataset["mean"].values.ravel().tolist()
    assert rows[0]["source_class"] == 'a,"b"'
