"""Reports of small real run directories: real mask files, real metrics, pictures that are read
back.
"""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from megamask.config import Config, build_config, load_config
from megamask.errors import ArtifactError
from megamask.masks.file import load_masks, save_masks
from megamask.masks.identity import identity
from megamask.report import compose
from megamask.report.html import Picture, findings, render_report
from megamask.report.perplexity_pictures import perplexity_picture
from megamask.report.reading import RunData, mask_provenance, read_metrics
from megamask.report.result_table import ResultTable
from megamask.report.samples_pictures import samples_picture
from megamask.report.step_pictures import loss_picture
from megamask.safe_checkpoint import NOTE
from megamask.sparsity.pattern import Pattern
from megamask.verbs.report import run
from megamask.weights.model_identity import ARCHITECTURE, UNMASKED, model_facts_of
from tests.unit.report.test_result_kinds import SENSITIVITY

RESULTS: dict[str, Any] = {
    "perplexity": {
        "learned": {"english": 30.8, "code": 12.3},
        "magnitude": {"english": 2575.0, "code": 1800.0},
        "dense": {"english": 27.4, "code": 8.7},
        "sparsegpt": {"english": 113.0, "code": None},
    },
    "kl": {"learned": {"english": 0.345}},
    "agreement": {"learned": {"english": 0.777}},
    "protocol": {"window": 512, "tail": "dropped", "bos": "none", "tokens": {"english": 16384}},
    "seconds": {"learned": 620.0, "convert": 9.0},
}
AGAIN = "left out. Run the verb evaluate again."
OPTIONAL = {"updates", "samples", "differences"}  # nothing is said where they are missing
CODED = Path(__file__).parents[1] / "masks/given-weights-v3.safetensors"
PICTURES = {"methods", "perplexity", "loss", "mask", "layers", *OPTIONAL}
TASKS: dict[str, Any] = {
    "tasks": {
        "dense": {"piqa": {"acc": 0.75, "acc_norm": 0.5}},
        "learned": {"piqa": {"acc": 0.625, "acc_norm": None}},
    },
    "groups": {},
    "protocol": {"harness": "0.4.13"},
}


def config_of(folder: Path) -> Config:
    return build_config({"run_dir": str(folder)})


def write_metrics(folder: Path, steps: int) -> None:
    lines = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "kind": "train",
                "step": step,
                "tokens": step * 64,
                "seconds": step,
                "lm_loss": 4.0 - step / steps,
                "max_prob": 0.5,
                **({} if step % 3 else {"signal_share": 0.1, "below_epsilon": 0.9}),
            }
        )
        if step % 2 == 0:
            lines.append(
                {
                    "kind": "evaluation",
                    "step": step,
                    "tokens": step * 64,
                    "seconds": step,
                    "perplexity": {"english": 90.0 / step},
                }
            )
    (folder / "learn").mkdir(parents=True)
    (folder / "learn/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_masks(folder: Path) -> None:
    pattern = Pattern(2, 4)
    index_OG = torch.zeros(4, 2, dtype=torch.int64)
    names = [f"model.layers.{layer}.mlp.{kind}_proj" for layer in (0, 1) for kind in ("up", "down")]
    prior = {name: pattern.mask_of(index_OG) for name in names}
    changed = index_OG.clone()
    changed[0, 0] = 3
    learned = prior | {names[3]: pattern.mask_of(changed)}
    del learned[names[0]]
    for method, masks in (("sparsegpt", prior), ("learned", learned)):
        save_masks(
            folder / f"masks/{method}.safetensors",
            masks,
            pattern,
            fingerprint="abc",
            method=method,
            data={"samples": {"english": 3}, "seq_length": 16}
            if method == "learned"
            else {"calibration": {"samples": 8}},
        )


def write_results(folder: Path, name: str = "results.json", **more: Any) -> None:
    """Results that were measured on the masks of the folder."""
    made = {
        path.stem: identity(load_masks(path)) for path in (folder / "masks").glob("*.safetensors")
    }
    (folder / name).write_text(json.dumps({**RESULTS, "masks": made, **more}))


class Page(HTMLParser):
    """Collects what a page refers to and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "srcset", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, 12)
    write_masks(tmp_path)
    write_results(tmp_path)
    made = json.loads((tmp_path / "results.json").read_text())["masks"]
    (tmp_path / "tasks.json").write_text(json.dumps({**TASKS, "masks": made}))
    (tmp_path / "learn/versions.json").write_text('{"torch": "9.9"}')
    run(config_of(tmp_path))
    pictures = {
        path.stem: matplotlib.image.imread(path) for path in (tmp_path / "pictures").iterdir()
    }
    assert set(pictures) == PICTURES
    assert all(
        picture.shape[0] > 200 and picture.std() > 0.01 for picture in pictures.values()
    )  # something is drawn
    page = page_of(tmp_path)
    assert len(page.links) == len(PICTURES) and all(
        link.startswith("data:image/png;base64,") for link in page.links
    )
    assert "http" not in re.sub(r'"data:[^"]*"', "", (tmp_path / "report.html").read_text())
    for text in (
        "113.00",
        "1.12",
        "0.345",
        "77.7%",
        "KL(dense || masked)",
        "window 512",
        "convert 9",
        "620 s",
        "seed = 1234",
        "torch",
        "9.9",
        "kappa",
        "data.samples.english",
        "piqa norm",
        "62.50",
        "harness 0.4.13",
        "bits a weight",
    ):
        assert text in page.text, text
    assert "not there yet" not in page.text
    printed = capsys.readouterr().out
    assert "learned mask" in printed and "report.html" in printed


def test_a_run_whose_evaluations_are_all_not_finite_has_a_report(tmp_path: Path) -> None:
    """The page that should show it ended in a traceback."""
    write_metrics(tmp_path, 4)
    path = tmp_path / "learn/metrics.jsonl"
    path.write_text(re.sub(r'"english": [0-9.]+', '"english": null', path.read_text()))
    run(config_of(tmp_path))
    assert not (tmp_path / "pictures/perplexity.png").exists()
    assert "Held-out perplexity while learning" in page_of(tmp_path).text


@pytest.mark.parametrize(
    ("window", "bos", "other"),
    [
        (512, "auto", ""),
        (2048, "auto", "window"),
        (512, "true", "BOS"),
        (2048, "window", "window and BOS"),
    ],
)
def test_levels_of_another_protocol_are_not_drawn_beside_the_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, bos: str, other: str
) -> None:
    drawn: dict[str, Any] = {}

    def perplexities(evaluations: Any, results: Any) -> Any:
        drawn["perplexity"] = results
        return perplexity_picture(evaluations, results)

    def samples(evaluations: Any, results: Any, consumed: Any) -> Any:
        drawn["samples"] = results
        return samples_picture(evaluations, results, consumed)

    monkeypatch.setattr(compose, "perplexity_picture", perplexities)
    monkeypatch.setattr(compose, "samples_picture", samples)
    write_metrics(tmp_path, 4)
    write_masks(tmp_path)
    write_results(tmp_path)
    learned = f"dtype: bf16\nevaluate: {{window: {window}, bos: {bos}}}\n"
    (tmp_path / "learn/config.yaml").write_text(learned)
    run(config_of(tmp_path))
    assert drawn.keys() == {"perplexity", "samples"}
    assert all(bool(levels) != bool(other) for levels in drawn.values())
    said = f"have another {other}, and are not drawn"
    assert page_of(tmp_path).text.count(said) == (2 if other else 0)


def test_rows_of_masks_that_were_replaced_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results stay in the folder when masks are made anew, and so do the names of their rows."""
    write_masks(tmp_path)
    write_results(tmp_path, "results-c4.json", perplexity={"learned": {"web": 7.77}})
    write_results(tmp_path)
    made = json.loads((tmp_path / "results.json").read_text())["masks"]
    made["learned"]["sha256"] = "of another"
    (tmp_path / "tasks.json").write_text(json.dumps({**TASKS, "masks": made}))
    write_results(tmp_path, masks=made)
    made_from = {**SENSITIVITY["made_from"], "method": "learned", "masks": "of another"}
    (tmp_path / "sensitivity.json").write_text(json.dumps({**SENSITIVITY, "made_from": made_from}))
    run(config_of(tmp_path))
    page, printed = page_of(tmp_path).text, capsys.readouterr().out
    said = f"learned of results.json was measured on another mask: {AGAIN}"
    assert said in page and said in printed
    for stale in ("30.80", "62.50", "learned 620", "learned mask has perplexity"):
        assert stale not in page and stale not in printed, stale
    for own in ("7.77", "113.00", "75.00", "convert 9"):
        assert own in page, own
    assert "learned of tasks.json was measured on another mask: left out." in page
    assert "Measured on another mask than the mask learned that the run has now." in page


def test_a_polished_mask_has_replaced_the_mask_of_a_sensitivity(tmp_path: Path) -> None:
    write_masks(tmp_path)
    write_results(tmp_path)
    made_from = {**SENSITIVITY["made_from"], "method": "sparsegpt", "masks": "of another"}
    (tmp_path / "sensitivity.json").write_text(json.dumps({**SENSITIVITY, "made_from": made_from}))
    file = tmp_path / "masks/sparsegpt.safetensors"
    masks = load_masks(file)
    said = "Measured on another mask than the mask sparsegpt that the run has now."
    for polish in (0, 3):
        save_masks(
            file, dict(masks), "2:4", fingerprint="abc", method="sparsegpt", data={"polish": polish}
        )
        run(config_of(tmp_path))
        assert said in page_of(tmp_path).text
    made_from["masks"] = load_masks(file).content_sha256
    (tmp_path / "sensitivity.json").write_text(json.dumps({**SENSITIVITY, "made_from": made_from}))
    run(config_of(tmp_path))
    assert said not in page_of(tmp_path).text


def test_a_dense_row_of_another_model_is_left_out(tmp_path: Path) -> None:
    """The folder has converted another model since; its dense row names no mask."""
    write_masks(tmp_path)
    (tmp_path / "weights").mkdir()
    note = tmp_path / "weights" / NOTE
    whole = {UNMASKED: "norms", ARCHITECTURE: {}}
    write_results(tmp_path, **model_facts_of({"fingerprint": "abc", **whole}))
    for made, shown in (
        ({"fingerprint": "abc"}, True),
        ({"fingerprint": "of another"}, False),
        ({"fingerprint": "abc", **whole}, True),
        ({"fingerprint": "abc", **whole, UNMASKED: "other norms"}, False),
    ):
        note.write_text(json.dumps(made))
        run(config_of(tmp_path))
        page = page_of(tmp_path).text
        assert ("27.40" in page) == shown
        said = f"dense of results.json was measured on another model: {AGAIN}"
        assert (said in page) != shown


@pytest.mark.parametrize("part", ["metrics", "masks", "results"])
def test_missing_parts_are_said(tmp_path: Path, part: str) -> None:
    if part == "metrics":
        write_metrics(tmp_path, 1)  # one step, no evaluation yet
    elif part == "masks":
        write_masks(tmp_path)
    else:
        (tmp_path / "results.json").write_text(
            json.dumps({"perplexity": {"wanda": {"english": 3.0}}})
        )
    run(config_of(tmp_path))
    expected = {
        "metrics": {"loss", "mask"},
        "masks": {"layers", "differences"},
        "results": {"methods"},
    }[part]
    assert {path.stem for path in (tmp_path / "pictures").iterdir()} == expected
    assert page_of(tmp_path).text.count("not there yet") >= len(PICTURES - expected - OPTIONAL)


def test_each_protocol_has_a_table_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers of two protocols never share a table, a finding or a picture."""
    published = {
        "perplexity": {"learned": {"wikitext2": 6.72}, "dense": {"wikitext2": 5.12}},
        "protocol": {"name": "wikitext2-4096", "tokenizer_sha256": "0123456789abcdef"},
    }
    (tmp_path / "results-wikitext2-4096.json").write_text(json.dumps(published))
    run(config_of(tmp_path))
    assert not list((tmp_path / "pictures").iterdir())
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    capsys.readouterr()
    for protocol in ("heldout", "wikitext2-4096"):
        settings = {"run_dir": str(tmp_path), "evaluate": {"protocol": protocol}}
        run(build_config(settings))
        heldout, other = capsys.readouterr().out.split("\nwikitext2-4096\n")
        assert "english perplexity" in heldout and "wikitext2" not in heldout
        assert "6.72" in other and "1.31" in other and "english" not in other
        assert "tokenizer sha256 0123456789ab\n" in other
        page = (tmp_path / "report.html").read_text()
        heldout, other = page.split("<h2>Perplexity, wikitext2-4096</h2>")
        assert "30.80" in heldout and "6.72" not in heldout
        assert "6.72" in other and "30.80" not in other
    (tmp_path / "results-wikitext2-4096.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"results-wikitext2-4096\.json"):
        run(config_of(tmp_path))


def test_nothing_to_report_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="Run the verb prune, learn or evaluate first"):
        run(config_of(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"tasks": []},
        {"tasks": {"dense": []}},
        {"tasks": {"dense": {"piqa": 0.5}}},
        {"tasks": {"dense": {"piqa": {"acc": "0.5"}}}},
        {"tasks": {"dense": {"piqa": {"acc": True}}}},
        {"tasks": {}, "protocol": []},
    ],
)
def test_broken_tasks_name_the_file(tmp_path: Path, content: Any) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "tasks.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"tasks\.json.*Run the verb tasks again"):
        run(config_of(tmp_path))
    assert not (tmp_path / "report.html").exists()


def test_tasks_alone_are_a_report(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS))
    run(config_of(tmp_path))
    assert "75.00" in page_of(tmp_path).text


def test_broken_results_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"perplexity": ')
    with pytest.raises(ArtifactError, match=r"results\.json.*Run the verb evaluate again"):
        run(config_of(tmp_path))


@pytest.mark.parametrize("name", ["a$\\frac$b", "$", "\x01", "\u540d"])
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    """Matplotlib reads a text between two $ as a formula, and fails on what is none."""
    (tmp_path / "results.json").write_text(
        json.dumps({"perplexity": {"dense": {name: 2.0}, name: {name: 3.0}}})
    )
    run(config_of(tmp_path))
    assert (tmp_path / "pictures/methods.png").exists()


def test_half_a_letter_is_no_text(tmp_path: Path) -> None:
    """JSON can escape half a letter, which no file, page or picture can hold."""
    (tmp_path / "results.json").write_text('{"perplexity": {"dense": {"\\ud800": 2.0}}}')
    with pytest.raises(ArtifactError, match=r"results\.json.*half a letter"):
        run(config_of(tmp_path))
    (tmp_path / "results.json").write_text('{"perplexity": {"dense": {"\\ud83d\\ude00": 2.0}}}')
    record = {"kind": "evaluation", "step": 1, "tokens": 1, "seconds": 1}
    (tmp_path / "learn").mkdir()
    (tmp_path / "learn/metrics.jsonl").write_text(
        json.dumps({**record, "perplexity": {"\ud800": 2.0, "code": 3.0}})
    )
    assert read_metrics(tmp_path / "learn/metrics.jsonl")[0]["perplexity"] == {"code": 3.0}
    run(config_of(tmp_path))
    assert "\U0001f600" in page_of(tmp_path).text


def test_what_the_run_says_cannot_become_markup(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(
        json.dumps({"perplexity": {"<script>x</script>": {"<b>": 3.0}}})
    )
    run(config_of(tmp_path))
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and "<b>" not in text and "&lt;script&gt;" in text


def test_metrics_of_a_killed_and_resumed_run_come_once(tmp_path: Path) -> None:
    lines = [
        '{"kind": "train", "step": 2, "tokens": 2, "seconds": 2, "x": 1}',
        '{"kind": "train", "step": 1, "tokens": 1, "seconds": 1, "x": "of another program"}',
        '{"kind": "train", "step": 2, "tokens": 2, "seconds": 3, "x": 2}',
        '{"kind": "train", "step": 3, "tokens": null, "seconds": 3}',
        '{"kind": "train", "step": 1e999, "tokens": 1, "seconds": 1}',
        '{"kind": "evaluation", "step": 1, "tokens": 1, "seconds": 1}',
        '{"kind": "tr',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path / "m.jsonl") == [
        {"kind": "train", "step": 1, "tokens": 1, "seconds": 1},
        {"kind": "train", "step": 2, "tokens": 2, "seconds": 3, "x": 2},
    ]


def test_mask_provenance_is_flat(tmp_path: Path) -> None:
    write_masks(tmp_path)
    found = mask_provenance(tmp_path / "masks/learned.safetensors")
    assert (
        found["method"] == "learned"
        and found["pattern"] == "2:4"
        and found["data.samples.english"] == "3"
        and float(found["bits per weight"]) > 0.65
    )
    assert found["linears"] == "3" and found["weights"] == "96"
    (tmp_path / "masks/learned.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="not a mask file"):
        mask_provenance(tmp_path / "masks/learned.safetensors")


def test_findings_compare_with_dense_and_the_best_oneshot_mask() -> None:
    english, code = findings(RESULTS)
    assert english == (
        "english: the learned mask has perplexity 30.80, 1.12 times the dense model's 27.40 "
        "and 73% below the best one-shot mask's 113.00 (SparseGPT mask)."
    )
    assert "magnitude" in code  # SparseGPT has no value there
    assert findings({}) == []


@pytest.mark.parametrize("kd", [False, True])
def test_distillation_has_a_panel_of_its_own_where_it_took_part(kd: bool) -> None:
    train = [
        {"tokens": step, "lm_loss": 3.0, **({"kd_loss": 0.7} if kd else {})} for step in range(3)
    ]
    titles = [axes.get_title(loc="left") for axes in loss_picture(train).axes]
    assert len(titles) == 3 + kd and any("Distillation" in title for title in titles) == kd


def test_names_of_strangers_are_text_on_the_page(tmp_path: Path) -> None:
    """Names of domains, methods and versions come from files, which anybody may have written."""
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    data = RunData(
        tables=[ResultTable(bad, [bad], [(bad, [bad])], [bad])],
        results={
            "perplexity": {bad: {bad: 2.0}, "dense": {bad: 1.0}, "learned": {bad: 1.5}},
            "protocol": {bad: bad},
            "seconds": {bad + "x": 1.0},
        },
        settings=bad,
        versions={bad: bad},
    )
    config = load_config(None, [f"run_dir={tmp_path}", f"model.hf={bad}"])
    pictures = [Picture(bad, bad, bad, bad, None)]
    page = render_report(config, data, pictures)
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;") > 10


def test_a_mask_whose_model_is_gone_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mask that is coded by the weights of its model cannot be read without them."""
    write_metrics(tmp_path, 12)
    write_masks(tmp_path)
    shutil.copyfile(CODED, tmp_path / "masks/learned.safetensors")
    run(config_of(tmp_path))
    assert "learned.safetensors" in caplog.text and "model.hf" in caplog.text
    assert not (tmp_path / "pictures/layers.png").exists()
    assert (tmp_path / "pictures/loss.png").exists()
