"""The page: everything inside of it, every figure present, the script without a fault in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ubp_fast.evaluation.leaderboard import Difference
from ubp_fast.report import RunSummary, Timing, figures, render_report

VOID = {"meta", "link", "br", "input", "circle", "rect", "path", "polyline"}
READERS = {
    "stacked": {"linear": {"churn": (0.8261, 0.003)}, "boosting": {"churn": (None, None)}},
    "baseline <raw>": {"linear": {"churn": (0.79, None)}, "boosting": {"churn": (0.7, None)}},
}


def curves(curve: Any) -> dict[str, Any]:
    return {"stacked": {"churn": curve}, "baseline <raw>": {"churn": curve}}


def groups(**more: object) -> list[dict[str, Any]]:
    value = {"labels": 1, "auroc": 0.7, "error": 0.01, **more}
    return [{"from": 1.0, "to": 108.0, **value}, {"from": 109.0, "to": 3988.0, **value, "auroc": 0.8}]


def whole_summary() -> RunSummary:
    number = 30
    return RunSummary(
        title="demo & co",
        scores={
            "stacked": {"churn": (0.81, 0.002), "propensity_sku": (0.7, None)},
            "baseline <raw>": {"churn": (0.72, 0.004), "propensity_sku": (None, None)},
        },
        readers=READERS,
        paired={"linear": {"churn": Difference(0.0361, 0.0009, (0.03, 0.04))}},
        paired_notes=["network is not paired: other row orders"],
        diagnosis={
            "clients": 100,
            "of_clients": 2464,
            "tasks": ["churn"],
            "same": {"conversion": "churn"},
            "roc": curves({"false": [0, 0.5, 1], "true": [0, 0.9, 1], "auroc": 0.8, "error": 0.01, "labels": 1}),
            "calibration": curves([[0.1, 0.12, 50], [0.8, 0.7, 50]]),
            "sizes": curves([[77, 0.7, 0.01], [154, 0.8, 0.01]]),
            "history": curves(groups(clients=50)),
            "recency": curves(groups(clients=50)),
            "age": curves(groups()),
            "blocks": {"churn": {"strong": 0.02, "near": -0.001}},
        },
        portrait={
            "clients": 2464,
            "has_near": True,
            "item": "category",
            "map": {
                "x": [33 * one for one in range(number)],
                "y": [(one * 7919) % 1000 for one in range(number)],
                "events": [one**2 for one in range(number)],
                "kinds": {"product_buy": [one**2 for one in range(number)]},
                "days": [None, *(float(one) for one in range(1, number))],
                "buys": [one % 2 for one in range(number)],
                "main": [one % 3 - 1 for one in range(number)],
                "mains": ["TEA </script>", "CHEESE"],
            },
            "neighbours": [
                {"items": ["TEA", "CHEESE"], "counts": [[3, 0], [2, 1]], "cosine": [1.0, 0.83], "events": [3, 1234]}
            ],
        },
        drift={
            "clients": {"both": 2000, "new": 17, "gone": 3},
            "cutoffs": ["2017-11-07", "2017-12-05"],
            "inputs": [{"name": "product_buy in 28 days", "psi": 0.12, "now": [1.0], "before": [1.0]}],
            "categories": [[17, 0.1, 0.2]],
            "vectors": [{"block": "strong", "cka": 0.98, "neighbours": 0.6, "explained": None}],
        },
        data={
            "rows": {"product_buy": 7},
            "weeks": [1511308800, 1511913600, 1512518400],
            "events": {"product_buy": [3, 4, 0]},
            "cutoff_s": 1512432000,
            "validation_start_s": 1513641600,
            "end_s": 1514779280,
            "notes": ["events.csv: 12 bad rows are left out"],
        },
        losses={"contrastive": [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "loss": 1.5, "extra": 0.1}]},
        timings=[Timing("store", 1.25, 1_500_000_000), Timing("events", None)],
        facts={"clients": 2464, "warnings": ["few buyers", "novelty is undefined"]},
        environment={"packages": {"torch": "2.13.0"}},
        config_text="seed: 0",
        warnings=["novelty is undefined"],
    )


class Balanced(HTMLParser):
    """Fails when an element is closed that is not open; what an attribute of any element loads is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_page_holds_every_figure_and_needs_nothing_beside_it() -> None:
    page = render_report(whole_summary())
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert all(one.startswith(("#", "data:,")) for one in parser.loads), parser.loads
    assert "http" not in page and "@import" not in page and "url(" not in page
    titles = re.findall(r"<h[23][^>]*>([^<]*)</h", page)
    assert titles == [
        *("Scores", "AUROC by reader", "stacked", "baseline &lt;raw&gt;", "Paired differences"),
        *("Scores of the challenge", "Behind the scores", "ROC", "Calibration", "Size of the training sample"),
        *("Length of history", "Recency", "Age of the profile", "Blocks", "Clients", "Map", "Nearest clients", "Drift"),
        *("Data", "What was left out, and why", "Training", "Time and memory", "Made with", "Configuration"),
    ]
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(figures) == 14
    for figure in figures:
        assert re.search(r"<figcaption>[^<]{40,}</figcaption>", figure), figure[:200]
        assert "<table" in figure, "the numbers must be reachable"
        assert 'class="baskets"' in figure or "<svg" in figure
    labelled = [panel for panel in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if "map of clients" not in panel]
    assert len(labelled) == 14 and all('class="label"' in panel for panel in labelled)


def test_page_says_the_numbers_it_was_given() -> None:
    page = render_report(whole_summary())
    assert "0.8100 ± 0.0020" in page and "undefined" in page
    assert "<td class=best>0.8100" in page
    assert "<td>linear</td><td>0.8261 ± 0.0030</td>" in page and "<td>boosting</td><td>undefined</td>" in page
    assert "<td>+0.0361</td><td>0.0009</td>" in page and "network is not paired" in page
    assert "from the cache" in page and "<td>1.2 s</td><td>1.50 GB</td>" in page
    assert "2,464" in page and "torch 2.13.0" in page and "seed: 0" in page and "12 bad rows are left out" in page
    assert "1,234 events, cos 0.83" in page and "conversion asks the same as churn" in page
    assert page.count("<li>novelty is undefined</li>") == 1 and "<li>few buyers</li>" in page
    assert "baseline &lt;raw&gt;" in page and "<raw>" not in page
    data = re.search(r'<script type="application/json" id="client-map-data">(.*?)</script>', page)
    assert data is not None and json.loads(data[1])["mains"] == ["TEA </script>", "CHEESE"]


def test_report_without_scores_has_no_empty_sections() -> None:
    page = render_report(RunSummary(title="profiles only"))
    assert "<h2" not in page and "<script" not in page


def test_a_whisker_is_as_long_as_its_error() -> None:
    tall, small = (
        render_report(RunSummary(title="", readers={"stacked": {"linear": {"churn": (0.8, error), "x": (0.6, None)}}}))
        for error in (0.04, 0.02)
    )
    lengths = []
    for page in (tall, small):
        ((low, high),) = re.findall(r'<path class="line c0" d="M[\d.]+ ([\d.]+)V([\d.]+)"/>', page)
        (one, other) = (float(y) for y in re.findall(r'<circle class="dot c0" cx="[\d.]+" cy="([\d.]+)"', page))
        lengths.append((float(low) - float(high)) / (other - one))  # in differences of .2
    assert lengths == pytest.approx([0.4, 0.2], abs=0.01)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Sends a command to a page in Chromium."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or chromium is None:
        pytest.skip("no chromium and chromedriver here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def call(path: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    arguments += ["--disable-component-update", "--disable-sync"]
    arguments.append(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options = {"binary": chromium, "args": arguments}
    wanted = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": options}
    try:
        for _ in range(200):
            try:
                call("/status")
                break
            except OSError:
                time.sleep(0.05)
        session = f"/session/{call('/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        yield lambda path, body=None: call(session + path, body)
        call(session, method="DELETE")
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_works_in_a_browser(browser: Callable[..., Any], tmp_path: Path, width: int, scheme: str) -> None:
    def devtools(command: str, **parameters: Any) -> None:
        browser("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def script(text: str) -> Any:
        return browser("/execute/sync", {"script": text, "args": []})

    page = tmp_path / "report.html"
    page.write_text(render_report(whole_summary()), encoding="utf-8")
    devtools("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser("/url", {"url": page.as_uri()})
    assert script("return document.documentElement.scrollWidth") <= width, "nothing may stick out of the screen"
    ground = script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    told = script(
        "const figure = document.getElementById('client-map'); figure.scrollIntoView();"
        "const svg = figure.querySelector('svg'), mark = svg.querySelectorAll('circle')[7];"
        "const box = mark.getBoundingClientRect(), at = {clientX: box.x + box.width / 2, bubbles: true};"
        "svg.dispatchEvent(new PointerEvent('pointerdown', {...at, clientY: box.y + box.height / 2}));"
        "return figure.querySelector('.tip').innerText"
    )
    assert told.split("\n") == [
        *("49 product_buy", "newest event 7 days before the cutoff"),
        *("mostly TEA </script>", "buys behind the cutoff"),
    ]
    colours = script(
        "const figure = document.getElementById('client-map');"
        "const of = () => new Set([...figure.querySelectorAll('circle')]"
        ".map((mark) => getComputedStyle(mark).fill)).size; const found = [of()];"
        "for (const by of ['main', 'buys']) { figure.querySelector(`input[value=${by}]`).click(); found.push(of()) }"
        "return found"
    )
    assert colours == [5, 3, 2]
    assert browser("/se/log", {"type": "browser"}) == []


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: figures.roc_figure({"profile": {"churn": []}}),
        lambda: figures.calibration_figure({"profile": {"churn": []}}),
        lambda: figures.size_figure({"profile": {"churn": []}}),
        lambda: figures.group_figure({"profile": {"churn": []}}, "events", "Who."),
        lambda: figures.block_figure({"churn": {}}),
    ],
)
def test_a_task_with_nothing_to_show_is_no_error(drawn: Callable[[], str]) -> None:
    assert "<figure" in drawn()
