"""What README.md and docs/ say is what the project holds, and what the source cites is there."""

from __future__ import annotations

import functools
import html
import importlib
import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from support.runs import composed
from torch.distributed.run import get_args_parser

from ubp_fast import __version__, cli
from ubp_fast.pipeline.settings import read_settings
from ubp_fast.profiles import Profiles

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CITING = ("src", "csrc", "tests", "benchmarks", "cmake")
SUFFIXES = {".py", ".pyi", ".yaml", ".cpp", ".h", ".cmake", ".sh", ".md"}
# A document in docs/, and the sections that follow: "4.1", "3.3/3.4", "3, 4 and 6".
CITATION = re.compile(r"\bdocs/([\w-]+\.md)((?:(?: |, | and |/)\d+(?:\.\d+)*\b)*)")

per_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that makes the tables; benchmarks are no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("bars")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def examples(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(path), re.S)


@per_document
def test_tables_are_made_from_committed_results(bars: Any, path: Path) -> None:
    assert bars.rewrite(text_of(path), ROOT) == text_of(path), "run `python benchmarks/bars.py`"


def test_every_kind_of_table_is_in_use(bars: Any) -> None:
    assert bars.documents(ROOT) == DOCUMENTS
    text = "".join(map(text_of, DOCUMENTS))
    assert all(f"<!-- {kind}:" in text for kind in ("headline", "benchmarks", "breakdown"))


def test_a_table_of_shards_says_what_was_not_compared(bars: Any) -> None:
    measured = {"seconds": 2.0, "cpu_seconds": 1.0, "peak_anonymous_mb": 1200, "peak_resident_mb": 1300}
    found = {
        "64 shards": {"shards": 25, "compared": False, **measured},
        "8 shards on Ray": {"shards": 8, **measured, "peak_of_all_mb": 4000},
    }
    table = bars.shards_markdown({"run": found}).splitlines()
    assert table[2] == "| 64 shards, 25 made, bytes not compared | 2.0 s | 1.0 s | 1,200 MB | 1,300 MB |"
    assert table[3] == "| 8 shards on Ray | 2.0 s | 1.0 s | 1,200 MB, of all 4,000 MB | 1,300 MB |"


def test_a_table_of_lengths_says_how_far_the_first_is_ahead(bars: Any) -> None:
    def groups(clients: int, *areas: float | None) -> list[dict[str, Any]]:
        ends = ((1.0, 1.0), (2.0, 4.0), (100.0, 3_000.0))
        return [
            {"from": low, "to": high, "clients": clients, "labels": 1, "auroc": area, "error": area and 0.01}
            for (low, high), area in zip(ends, areas, strict=True)
        ]

    found = {
        "profile": {"churn": groups(20, None, 0.7, 0.8)[1:], "propensity_sku": groups(1_030, None, 0.6, 0.9)},
        "without": {"churn": groups(20, None, 0.65, 0.81)[1:], "propensity_sku": groups(1_030, None, 0.6, 0.85)},
    }
    for tasks in found.values():
        tasks["conversion"] = tasks["churn"]
    assert bars.lengths_markdown({"lengths": found}).splitlines() == [
        "| events before | clients | reads | churn | sku |",
        "|---|---|---|---|---|",
        "| 1 | 1,030 | no label that enough have | | |",
        "| 2-4 | 1,030 | profile | 0.7000 ± 0.0100 | 0.6000 ± 0.0100 |",
        "| 2-4 | 1,030 | without | 0.6500 (+0.0500) | 0.6000 (+0.0000) |",
        "| 100-3,000 | 1,030 | profile | 0.8000 ± 0.0100 | 0.9000 ± 0.0100 |",
        "| 100-3,000 | 1,030 | without | 0.8100 (-0.0100) | 0.8500 (+0.0500) |",
    ]


def test_the_breakdown_of_a_step(bars: Any, tmp_path: Path) -> None:
    parts = {"ubp_fast": {"linear layers": 30.0, "ours only": 10.0}, "rival": {"linear layers": 100.0}}
    cases = {"one": {"figure": "a step", "facts": {"cpu_ms_by_part": parts}}, "other": {"figure": "without parts"}}
    document = "before <!-- breakdown: results.json -->\n\nold\n\n<!-- end --> after"
    for stored, expected in (
        (cases, ["| linear layers | 30.0 ms | 75% | 100.0 ms | 100% |", "| ours only | 10.0 ms | 25% |  |  |"]),
        ({"other": cases["other"]}, ["(not measured yet)"]),
    ):
        (tmp_path / "results.json").write_text(json.dumps({"cases": stored}), encoding="utf-8")
        text = bars.rewrite(document, tmp_path)
        assert all(line in text for line in expected)
        assert text.startswith("before <!-- breakdown") and text.endswith("<!-- end --> after") and "old" not in text


def test_readers_are_compared_over_tasks_that_differ(bars: Any, tmp_path: Path) -> None:
    def row(*means: float) -> dict[str, Any]:
        tasks = dict(zip(("churn", "conversion", "propensity_sku"), means, strict=True))
        return {task: {"mean": mean, "standard_error": None, "samples": [mean]} for task, mean in tasks.items()}

    rows = {"profile": row(0.8, 0.8, 0.7), "features": row(0.7, 0.7, 0.79)}
    report = {"data": "a shop", "readers": {"linear": rows, "network": {"profile": rows["profile"]}}}
    (tmp_path / "r.json").write_text(json.dumps(report), encoding="utf-8")
    table = bars.rewrite("<!-- benchmarks: r.json -->\n\nold\n\n<!-- end -->", tmp_path)
    assert "| linear | profile | 0.8000 | 0.7000 | 0.7500 |  |" in table
    assert "| linear | features | 0.7000 | 0.7900 | 0.7450 | +0.0050 |" in table
    figures = bars.headline("r.json: linear of profile over features", tmp_path)
    wanted = "| AUROC, a shop, linear, mean of tasks: profile | 0.7500 | features | 0.7450 | +0.0050 |"
    assert wanted in figures
    with pytest.raises(ValueError, match="must hold 'linear of profile over nothing'"):
        bars.headline("r.json: linear of profile over nothing", tmp_path)


def test_a_headline_shows_the_strongest_rival(bars: Any, tmp_path: Path) -> None:
    timings = {
        name: {"rounds": 9, "median_ms": value} for name, value in (("ubp_fast", 2.0), ("slow", 8.0), ("fast", 3.0))
    }
    ratios = [{"figure": "a kernel", "rival": rival, "ratio": ratio} for rival, ratio in (("slow", 4.0), ("fast", 1.5))]
    scores = (("ours", 0.8, 0.001), ("log1p", 0.75, None))
    rows = {name: {"tasks": {"churn": {"mean": mean, "standard_error": error}}} for name, mean, error in scores}
    speed = {"cases": {"one": {"timings": timings, "ratios": ratios}}}
    (tmp_path / "speed.json").write_text(json.dumps(speed), encoding="utf-8")
    (tmp_path / "worth.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    lines = "speed.json: a kernel\nworth.json: churn of ours over log1p"
    text = bars.rewrite(f"<!-- headline:\n{lines}\n-->\n<!-- end -->", tmp_path)
    assert f"<!-- headline:\n{lines}\n-->" in text
    assert text.splitlines()[-4:-2] == [
        "| a kernel | 2.0 ms | fast | 3.0 ms | 1.50x |",
        "| AUROC, churn: ours | 0.8000 ± 0.0010 | log1p | 0.7500 | +0.050 |",
    ]
    for wrong in ("speed.json: another kernel", "worth.json: churn of ours over nobody", "worth.json: churn of ours"):
        with pytest.raises(ValueError, match="must hold"):
            bars.headline(wrong, tmp_path)


def test_variations_stand_beside_what_they_vary_seed_by_seed(bars: Any, tmp_path: Path) -> None:
    seeds = {"vectors": [0.80, 0.70], "warmer": [0.82, 0.74], "once": [0.81], "others": [0.5]}
    of = {"vectors": "vectors", "warmer": "vectors", "once": "vectors", "others": "others"}
    found = {
        name: {"of": of[name], "seeds": [{"churn": auroc, "propensity_sku": 0.6} for auroc in aurocs]}
        for name, aurocs in seeds.items()
    }
    (tmp_path / "r.json").write_text(json.dumps({"variations": found}), encoding="utf-8")
    lines = bars.rewrite("<!-- benchmarks: r.json -->\n<!-- end -->", tmp_path).splitlines()
    assert "| vectors | varied | churn | sku | mean |" in lines
    assert "| vectors |  | 0.7500 | 0.6000 | 0.6750 ± 0.0250 |" in lines
    assert "| vectors | warmer | +0.0300 | +0.0000 | +0.0150 ± 0.0050 |" in lines
    assert "| vectors | once | +0.0100 | +0.0000 | +0.0050 |" in lines


def test_rivals_stand_beside_what_they_are_added_to_seed_by_seed(bars: Any, tmp_path: Path) -> None:
    aurocs = {
        "features": [0.70, 0.72],
        "profile": [0.80, 0.80],
        "scores": [0.75],
        "a, wide": [0.60, 0.64],
        "features + a, wide": [0.71, 0.75],
        "profile + a, wide": [0.79],
    }
    rows = {
        name: [{"churn": auroc, "conversion": auroc, "propensity_sku": 0.6} for auroc in seeds]
        for name, seeds in aurocs.items()
    }
    report = {"rivals": {"linear": rows}, "cpu_minutes": {"0": {"a, wide": 1.0}, "1": {"a, wide": 2.0}}}
    (tmp_path / "r.json").write_text(json.dumps(report | {"width": {"a, wide": 64}}), encoding="utf-8")
    lines = bars.rewrite("<!-- benchmarks: r.json -->\n<!-- end -->", tmp_path).splitlines()
    assert "| linear | none |  |  |  | 0.6550 ± 0.0050 | 0.7000 ± 0.0000 |  |" in lines
    assert "| linear | scores |  |  | 0.6750 |  |  |  |" in lines
    assert "| linear | a, wide | 64 | 1.5 | 0.6100 ± 0.0100 | +0.0100 ± 0.0050 | -0.0050 |  |" in lines


def test_a_table_of_spend_says_how_far_the_vector_is_ahead(bars: Any) -> None:
    rows = {
        "vector": {"auroc": [0.8, 0.9], "lead": 0.0, "error": 0.0},
        "recency": {"auroc": [0.8, 0.82], "lead": 0.04, "error": 0.003},
        "beside": {"auroc": [0.9, 0.9], "lead": -0.05, "error": 0.001},
    }
    assert bars.spend_markdown({"spend": {"trees": rows}}).splitlines() == [
        "| reads | trees |",
        "|---|---|",
        "| vector | 0.8500 |",
        "| recency | 0.8100: +0.0400 ± 0.0030 |",
        "| beside | 0.9000: -0.0500 ± 0.0010 |",
    ]


def test_bold_is_what_the_row_orders_do_not_separate_from_the_best(bars: Any) -> None:
    draws = {
        "best": [[0.80, 0.82, 0.84]],
        "level, two seeds": [[0.79, 0.84, 0.84], [0.79, 0.82, 0.80]],  # ahead by .01, -.01 and .02 in its orders
        "always behind": [[0.799, 0.819, 0.839]],
        "one order": [[0.80]],
        "one order, behind": [[0.79]],
    }
    rows = {
        name: {
            "auroc": {"churn": seeds},
            "tasks": {"churn": {"mean": sum(map(sum, seeds)) / sum(map(len, seeds)), "standard_error": None}},
        }
        for name, seeds in draws.items()
    }
    table = bars.components_markdown({"rows": rows, "oracle": None})
    bold = {line.split("|")[1].strip() for line in table.splitlines() if "**" in line}
    assert bold == {"best", "level, two seeds", "one order"}


def test_every_path_of_the_map_exists() -> None:
    section = text_of(ROOT / "docs" / "design.md").split("## 1. ")[1].split("\n## ")[0]
    first_columns = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [path for column in first_columns for path in re.findall(r"`([^`]+)`", column)]
    packages = {f"src/ubp_fast/{path.parent.name}/" for path in (ROOT / "src" / "ubp_fast").glob("*/__init__.py")}
    assert packages <= set(named)
    for path in named:
        assert (ROOT / path).exists(), path


def test_versions_agree() -> None:
    """Of the package, its newest release in the changelog, and what a paper cites."""
    cited = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    (version, date), *_ = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", text_of(ROOT / "CHANGELOG.md"), re.M)
    assert __version__ == version == cited["version"] == metadata.version("ubp_fast")
    assert str(cited["date-released"]) == date
    assert metadata.metadata("ubp_fast")["License-Expression"] == cited["license"]


def test_the_oldest_releases_are_the_declared_ones() -> None:
    """What `make test-minimum` installs is what the metadata promises to work with."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", text_of(ROOT / "constraints-minimum.txt").replace("_", "-"), re.M))
    pinned = {name.lower(): version for name, version in pinned.items()}
    used = [
        line for line in metadata.requires("ubp_fast") or () if not re.search(r"extra == .(bench|docs|lint|rel)", line)
    ]
    assert len(used) > 20
    for line in used:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", line).groups()  # type: ignore[union-attr]
        assert f"{pinned[name.lower()]}.".startswith(f"{least}."), line


def headings(path: Path) -> list[str]:
    without_code = re.sub(r"```.*?```", "", text_of(path), flags=re.S)
    return re.findall(r"^#+ (.+)$", without_code, re.M)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"], ids=lambda path: str(path.name)
)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(path)):
        if "://" in target:
            continue
        file, _, fragment = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_relative_to(ROOT) and found.exists(), target
        assert not fragment or fragment in map(anchor, headings(found)), target


def test_the_readme_leads_to_every_document() -> None:
    """By name: a package index, which shows it, too, has no other file of ours. It is short, with one picture."""
    text = text_of(ROOT / "README.md")
    assert set(re.findall(r"`(docs/[\w-]+\.md)`", text)) == {f"docs/{path.name}" for path in DOCUMENTS[1:]}
    assert re.findall(r"(!?)\[[^\]]*\]\(", text) == ["!"] and len(text.encode()) <= 6000


def test_the_site_has_every_document() -> None:
    pages = [next(iter(page.values())) for page in yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"]]
    assert sorted(pages) == sorted(path.name for path in DOCUMENTS[1:])


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Links and anchors resolve, what the reference names is there, and no page asks another host for anything."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"""<(?:link|script|img)[^>]*(?:href|src)=["']?(https?:[^"' >]+)""", text_of(page))
        assert not loaded, (page, loaded)
        assert not dangling(page, tmp_path)
    assert "flash_attention" in text_of(tmp_path / "api" / "index.html")


def dangling(page: Path, site: Path) -> list[str]:
    """Links of a page to pages and headings of the site that are not there."""
    found = []
    for link in re.findall(r"""<a\b[^>]*\bhref=["']?([^"' >]+)""", text_of(page)):
        path, _, fragment = html.unescape(link).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = site / path.lstrip("/") if path.startswith("/") else (page.parent / path if path else page)
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file() or (fragment and unquote(fragment) not in anchors(target)):
            found.append(link)
    return found


@functools.cache
def anchors(page: Path) -> set[str]:
    return set(re.findall(r"""\b(?:id|name)=["']?([^"' >]+)""", text_of(page)))


def test_dangling_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text('<h1 id="there">', encoding="utf-8")
    page = tmp_path / "index.html"
    links = ("other/", "other/#there", "https://a.b/c", "/other/#there", "other/#gone", "gone/", "#gone")
    page.write_text("".join(f'<a class="x" href="{link}">' for link in links), encoding="utf-8")
    assert dangling(page, tmp_path) == ["other/#gone", "gone/", "#gone"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples find: events of a shop whose ids are text."""
    monkeypatch.chdir(tmp_path)
    open_shop(["ada", "bob", "cleo", "dan"])


def open_shop(clients: list[str]) -> None:
    state = np.random.default_rng(0)
    seconds = np.sort(state.integers(1_783_000_000, 1_783_000_000 + 120 * 86_400, 3_000))
    article = state.integers(0, 30, len(seconds))
    purchases = pl.DataFrame(
        {
            "customer": state.choice(clients, len(seconds)),
            "time": pl.from_epoch(pl.Series(seconds)),
            "article": [f"A{number}" for number in article],
            "price": 1.0 + article,
        }
    )
    purchases.write_parquet("events.parquet")


@pytest.mark.usefixtures("shop")
@per_document
def test_the_python_examples_run(path: Path) -> None:
    """In order, each knowing what the ones before it in the document defined."""
    names: dict[str, Any] = {}
    if path.name == "data.md":
        vectors = np.zeros((2, 4), np.float16)
        Path("runs/shop").mkdir(parents=True)
        Profiles(np.array([2, 1]), vectors, own_ids=pl.Series(["bob", "ada"])).write_parquet(
            Path("runs/shop/profiles.parquet")
        )
    if path.name == "vectors.md":
        open_shop([f"client {number}" for number in range(300)])
    for example in examples(path, "python"):
        exec(compile(example, path.name, "exec"), names)
    if path.name == "README.md":
        assert names["context"].shape == (270, 4, 64) and names["history"].requires_grad
        assert names["today"]["client_id"].to_list() == ["ada", "bob", "cleo", "dan"]
        assert len(names["one"]) == 1
    if path.name == "data.md":
        assert names["clients"].to_list() == ["bob", "ada"]
    if path.name == "vectors.md":
        assert 0.2 < names["stays"].mean() < 0.9 and 0.3 < names["auroc"] < 0.9  # bought at random
        assert 0 < names["chance_of_one"] < 1
        assert len(names["chance_to_stay"]) == 300 and names["chance_to_stay"].std() > 0
        assert names["row"][0, 0] == 0 and names["found"]["client_id"].to_list() == names["alike"][1:].to_list()
        np.testing.assert_allclose(names["found"]["likeness"], 1 - names["distance"][0, 1:], atol=1e-5)
    if path.name == "kernels.md":
        require_same_as_torch(names["PackedAttention"])


def require_same_as_torch(packed_attention: Any) -> None:
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
    ours = packed_attention(24, 3)
    ours.load_state_dict(theirs.state_dict())
    rows = torch.randn(12, 24)
    found = ours(rows, torch.tensor([0, 5, 12]))
    for part in (slice(0, 5), slice(5, 12)):
        sequence = rows[None, part]
        torch.testing.assert_close(found[part], theirs(sequence, sequence, sequence, need_weights=False)[0][0])


def commands(path: Path) -> list[list[str]]:
    lines = "".join(examples(path, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@per_document
def test_the_commands_exist(path: Path, tmp_path: Path) -> None:
    """Settings are known and fit together; what would read files is not run."""
    submission = tmp_path / "submission"
    submission.mkdir()
    (submission / "client_ids.npy").touch()
    for words in commands(path):
        if words[:3] == ["python", "-m", "ubp_fast.run"]:
            overrides = [word.replace("evaluation.profiles=DIR", f"evaluation.profiles={submission}") for word in words]
            assert read_settings(composed(*overrides[3:], f"root={tmp_path}")).name
        elif words[:2] == ["ubp-fast", "run"]:
            assert read_settings(composed(*words[2:], f"root={tmp_path}")).name
        elif words[0] == "torchrun":
            options = get_args_parser().parse_args(words[1:])
            assert (options.module, options.training_script) == (True, "ubp_fast.run")
            assert read_settings(composed(*options.training_script_args, f"root={tmp_path}")).name
        elif words[:2] == ["pip", "install"]:
            known = metadata.metadata("ubp_fast").get_all("Provides-Extra")
            assert set(re.findall(r"[\w-]+", words[2])) <= {*known}, words
        elif words[0] == "ubp-fast":
            assert cli.parser().parse_args(words[1:]).command == words[1]
        else:
            assert words[0] == "make" and re.search(rf"^{words[1]}:", text_of(ROOT / "Makefile"), re.M), words


def test_settings_in_the_text_are_known() -> None:
    """`group.key=value ...` in backticks, wherever it stands."""
    groups = {*map(str, composed()), "experiment", "model"}
    text = re.sub(r"```.*?```", "", "".join(map(text_of, DOCUMENTS)), flags=re.S)
    spans = {span for span in re.findall(r"`([^`\n]+)`", text) if re.split(r"[.@=]", span)[0] in groups and "=" in span}
    assert len(spans) > 10
    for span in sorted(spans):
        composed(*span.replace("[i, n]", "[0,2]").split())


def citations(text: str) -> list[tuple[str, list[str]]]:
    return [(file, re.findall(r"\d+(?:\.\d+)*", sections)) for file, sections in CITATION.findall(text)]


def test_citations_are_found() -> None:
    docs = "docs/"
    text = f"{docs}winner.md 3.3/3.4). See {docs}a-b.md 4.7 and 6: x; {docs}winner.md 3, 4, 60.\n{docs}plain.md"
    expected = [("winner.md", ["3.3", "3.4"]), ("a-b.md", ["4.7", "6"]), ("winner.md", ["3", "4", "60"])]
    assert citations(text) == [*expected, ("plain.md", [])]


def test_citations_resolve() -> None:
    sections = {
        path.name: {found[1] for heading in headings(path) if (found := re.match(r"(\d+(?:\.\d+)*)", heading))}
        for path in DOCUMENTS[1:]
    }
    files = [path for folder in CITING for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    assert len(files) > 100
    missing = [
        f"{path.relative_to(ROOT)}: docs/{file} {section}"
        for path in files
        for file, numbers in citations(text_of(path))
        for section in numbers or [""]
        if file not in sections or (section and section not in sections[file])
    ]
    assert not missing
