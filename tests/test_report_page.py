"""forge-report: the page shows the steps that count, escapes what runs say, and loads nothing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sampler.cli import report
from sampler.curves import MAX_BINS

REFERENCE = {"model": "/models/gpt2", "num_parameters": 124_439_808, "num_tokens": 8192}
REFERENCE |= {"context_length": 32, "loss": 3.25, "bits_per_byte": 1.1, "split": "val"}


def row(kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "tokens": 512 * step, "seconds": step / 2, **values}


def step(number: int, loss: float | None = 4.0) -> dict[str, Any]:
    kind = "skip" if loss is None else "step"
    figures = {"lr": 1e-3, "norm": 0.5, "tokens_per_second": 1024.0, "mfu": None}
    return row(kind, number, loss=loss, **figures)


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A run that was copied without anything but its log."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


def forge_report(*arguments: object) -> Result:
    return CliRunner().invoke(report, [str(each) for each in arguments])


def page_of(tmp_path: Path, *arguments: object) -> str:
    out = tmp_path / "page.html"
    done = forge_report(*arguments, "--out", out)
    assert done.exit_code == 0, done.output
    return out.read_text("utf-8")


def data_in(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    content: dict[str, Any] = json.loads(found[1])
    return content


class Elements(HTMLParser):
    """Every element and attribute, as a browser would see them, and the text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text += data


def test_a_real_run_shows_its_curves_samples_config_and_data(run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, run)
    (shown,) = data_in(page)["runs"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [each for each in logged if each["kind"] == "step"]
    assert shown["steps"]["step"] == list(range(1, 9))
    assert shown["steps"]["tokens"] == [each["tokens"] for each in steps]
    assert shown["steps"]["loss"]["mean"] == pytest.approx([s["loss"] for s in steps], rel=1e-4)
    assert shown["evaluations"]["step"][0] == 0
    text = Elements(page).text
    for expected in ("8 of 8", "optimizer.peak_lr", "training tokens", "CPU (", "What it wrote"):
        assert expected in text


def test_what_a_run_says_is_text_whatever_it_says(tmp_path: Path) -> None:
    hostile = (
        "</script><script>alert(1)</script><img src=x onerror=alert(2)>@DATA@ &amp; \ud800\x00"
    )
    name = '<b onclick="x">&'
    start = row("start", 0, hardware=hostile)
    rows = [start, step(1), row("evaluate", 1, loss=4.0), row("sample", 1, text=hostile)]
    run = write_run(tmp_path / name, rows)
    (run / "config.toml").write_text(f"[model]\nfamily = {json.dumps(hostile[:-2])}\n")
    (run / "data_index.json").write_text(json.dumps({"source": {"name": hostile}, "splits": 1}))
    against = tmp_path / "against.jsonl"
    against.write_text(json.dumps(REFERENCE | {"model": hostile}) + "\n")
    page = page_of(tmp_path, run, "--against", against)
    clean = page_of(tmp_path, write_run(tmp_path / "clean", [start, step(1), rows[2], rows[3]]))
    seen = Elements(page)
    assert "img" not in seen.tags
    assert seen.tags.count("script") == Elements(clean).tags.count("script") == 2
    assert not [key for key, _ in seen.attributes if key.startswith("on")]
    assert "<img src=x onerror=alert(2)>@DATA@ &amp;" in seen.text  # to be read, as it was written
    assert data_in(page)["runs"][0]["label"] == name
    assert "<b onclick" not in page  # nor in the data, where it could end the script


def test_the_page_loads_nothing(run: Path, tmp_path: Path) -> None:
    page = page_of(tmp_path, run).replace("http://www.w3.org/2000/svg", "")  # a name
    attributes = [key for key, _ in Elements(page).attributes]
    assert not {"src", "href", "srcset", "action", "poster"} & set(attributes)
    for way_out in ("http://", "https://", "url(", "@import", "fetch(", "import(", "XMLHttp"):
        assert way_out not in page
    assert "default-src 'none'" in page


def test_a_damaged_log_shows_what_can_be_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row("start", 0), *(step(n) for n in range(1, 6))])
    log = run / "metrics.jsonl"
    with log.open("ab") as file:
        file.write(b"\x00\xff\xfe garbage\n{}\n[1]\nnull\n")
        file.write(json.dumps(row("step", 6, loss="four", norm=None, lr=True)).encode() + b"\n")
        file.write(b'{"kind": "step", "step": 7, "tokens": 3584, "seconds": NaN, "loss": 4}\n')
        file.write(json.dumps(step(9)).encode() + b"\n")
        file.write(b'{"kind": "step", "step": 10, "tok')
    page = page_of(tmp_path, run)
    steps = data_in(page)["runs"][0]["steps"]
    assert steps["step"] == [1, 2, 3, 4, 5, 6, 9]
    assert steps["loss"]["mean"] == [4.0] * 5 + [None, 4.0]  # None: the line is broken there
    assert "damaged lines left out5" in Elements(page).text


def test_a_log_without_a_readable_line_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    out = tmp_path / "page.html"
    for log in ("", '{"kind": "sta'):
        (run / "metrics.jsonl").write_text(log)
        done = forge_report(run, "--out", out)
        assert done.exit_code == 1
        assert "no readable line" in done.output
    done = forge_report(tmp_path, "--out", out)
    assert done.exit_code == 1
    assert "no run of forge-train" in done.output
    assert not out.exists()


def test_a_resumed_run_is_marked_where_it_was_resumed(tmp_path: Path) -> None:
    rows = [row("start", 0), row("evaluate", 0, loss=9.0), *(step(n) for n in range(1, 4))]
    rows += [row("checkpoint", 3), row("start", 3), step(4), row("evaluate", 4, loss=8.5)]
    (shown,) = data_in(page_of(tmp_path, write_run(tmp_path / "run", rows)))["runs"]
    assert shown["steps"]["step"] == [1, 2, 3, 4]
    assert shown["evaluations"]["loss"]["mean"] == [9.0, 8.5]
    assert [(mark["kind"], mark["step"]) for mark in shown["marks"]] == [("resumed", 3)]


def test_skipped_steps_are_marked_and_break_the_line(tmp_path: Path) -> None:
    rows = [row("start", 0), step(1), step(2, None), step(3, None), step(4)]
    (shown,) = data_in(page_of(tmp_path, write_run(tmp_path / "run", rows)))["runs"]
    assert shown["steps"]["loss"]["mean"] == [4.0, None, None, 4.0]
    assert [(mark["kind"], mark["step"]) for mark in shown["marks"]] == [
        ("skipped", 2),
        ("skipped", 3),
    ]


def test_a_long_run_keeps_its_spikes_and_its_page_stays_small(tmp_path: Path) -> None:
    rows = [step(n, 3.0 + n % 7 / 100) for n in range(1, 30_001)]
    rows[12_345] = step(12_346, 9.75)
    page = page_of(tmp_path, write_run(tmp_path / "run", rows))
    loss = data_in(page)["runs"][0]["steps"]["loss"]
    assert len(loss["mean"]) <= MAX_BINS
    assert max(loss["high"]) == 9.75
    assert max(loss["mean"]) < 4
    assert len(page) < 250_000  # 1,000 points of each curve


def test_runs_side_by_side_show_where_their_configs_differ(run, modern_run, tmp_path: Path) -> None:
    copy = tmp_path / "other" / run.name
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    page = page_of(tmp_path, run, modern_run, copy, run)
    assert len(data_in(page)["runs"]) == 3  # a run that is named twice is shown once
    differing = page.split("Where the configs differ")[1].split("<h2>")[0]
    assert "optimizer.name" in differing
    assert "muon" in differing
    assert "batch.tokens_per_step" not in differing
    assert f"{run.parent.name}/{run.name}" in page  # the folders' names alone would be the same
    assert f"other/{run.name}" in page


def test_against_draws_the_losses_of_other_models(run: Path, tmp_path: Path) -> None:
    against = tmp_path / "against.jsonl"
    questions = {"model": "gpt2", "acc": 0.3, "acc_norm": 0.31, "num_questions": 100}
    against.write_text(f"{json.dumps(REFERENCE)}\n{json.dumps(questions)}\n")
    page = page_of(tmp_path, run, "--against", against)
    (reference,) = data_in(page)["references"]
    assert (reference["name"], reference["loss"]) == ("gpt2", 3.25)
    text = Elements(page).text
    assert "on 8,192 tokens in windows of 32" in text
    losses = data_in(page)["runs"][0]["evaluations"]["loss"]["mean"]
    found = re.search(r"validation loss, less gpt2's([+-][\d.]+)", text)
    assert found
    assert float(found[1]) == pytest.approx(losses[-1] - 3.25, abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Measuring gpt2\n", "line 1"),
        (json.dumps(REFERENCE | {"loss": float("nan")}), "line 1"),
        (json.dumps({"model": "gpt2", "acc": 0.3}), "no row with a loss"),
        ("", "has no row"),
    ],
)
def test_against_refuses_what_forge_eval_did_not_print(
    run: Path, tmp_path: Path, content: str, message: str
) -> None:
    against, out = tmp_path / "against.jsonl", tmp_path / "page.html"
    against.write_text(content)
    done = forge_report(run, "--against", against, "--out", out)
    assert done.exit_code == 1
    assert message in done.output
    assert not out.exists()


def test_the_page_is_in_the_first_run_unless_it_is_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [step(1, 4.0)]) for name in ("first", "second")]
    assert forge_report(*runs).exit_code == 0
    assert [path.parent.name for path in tmp_path.rglob("report.html")] == ["first"]


def test_only_a_file_named_as_a_page_is_replaced(run: Path, tmp_path: Path) -> None:
    page_of(tmp_path, run)
    page_of(tmp_path, run)
    log = tmp_path / "metrics.jsonl"
    shutil.copy(run / "metrics.jsonl", log)
    done = forge_report(run, "--out", log)
    assert done.exit_code == 1
    assert "ends with .html" in done.output
    assert log.read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_a_page_that_cannot_be_written_is_one_message(run: Path, tmp_path: Path) -> None:
    done = forge_report(run, "--out", tmp_path / "missing" / "page.html")
    assert done.exit_code == 1
    assert "cannot write the page" in done.output
