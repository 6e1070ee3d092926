from __future__ import annotations

from ubp_fast.report import RunSummary, render_report

SCORES = {
    "stacked": {"churn": (0.81, 0.002), "propensity_sku": (0.7, None)},
    "baseline <raw>": {"churn": (0.72, 0.004), "propensity_sku": (None, None)},
}


def test_report_is_one_page_with_scores_losses_and_times() -> None:
    page = render_report(
        RunSummary(
            title="demo & co",
            scores=SCORES,
            readers={"stacked": {"linear": {"churn": (0.8261, 0.003)}, "boosting": {"churn": (None, None)}}},
            losses={"contrastive": [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "loss": 1.5, "extra": 0.1}]},
            timings=[("store", 1.25), ("events", None)],
            facts={"clients": 2464},
            environment={"packages": {"torch": "2.13.0"}},
            config_text="seed: 0",
            warnings=["novelty is undefined"],
        )
    )
    assert page.count("data:image/png;base64,") == 2
    assert "0.8100 ± 0.0020" in page and "undefined" in page
    assert "<td class=best>0.8100" in page
    assert "<h3>stacked</h3>" in page and "<td>linear</td><td>0.8261 ± 0.0030</td>" in page
    assert "<td>boosting</td><td>undefined</td>" in page
    assert "from the cache" in page and "1.2 s" in page
    assert "2,464" in page and "torch 2.13.0" in page and "seed: 0" in page
    assert "baseline &lt;raw&gt;" in page and "<raw>" not in page
    assert "http" not in page, "the page must not need anything from elsewhere"


def test_report_without_scores_has_no_empty_sections() -> None:
    page = render_report(RunSummary(title="profiles only", scores={}))
    assert "<h2>" not in page
