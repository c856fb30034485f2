from megamask.report.results_table import (
    format_bytes,
    format_protocol,
    format_table,
    methods_in_order,
)

EXPECTED = """\
| method         | code perplexity | x dense | density | mask file |  time |
| -------------- | --------------: | ------: | ------: | --------: | ----: |
| dense          |            8.70 |    1.00 |  100.0% |         – |     – |
| SparseGPT mask |           1,234 |  141.84 |   50.0% |   8.0 MiB |  61 s |
| mine           |               – |       – |       – |         – |     – |
| learned mask   |           12.30 |    1.41 |   50.0% |   8.0 MiB | 620 s |

Protocol: window 512, bos no, tokens code 16,384

Seconds: convert 9"""


def test_table_is_aligned_markdown_in_a_fixed_order() -> None:
    results = {
        "perplexity": {
            "learned": {"code": 12.3},
            "mine": {"code": None},
            "sparsegpt": {"code": 1234.0},
            "dense": {"code": 8.7},
        },
        "protocol": {"window": 512, "bos": False, "tokens": {"code": 16384}},
        "seconds": {"convert": 9.2, "learned": 620.0, "sparsegpt": 60.6},
        "density": {"dense": 1.0, "sparsegpt": 0.5, "learned": 0.5},
        "mask_bytes": {"sparsegpt": 8 * 2**20, "learned": 8 * 2**20},
    }
    assert format_table(results) == EXPECTED


def test_masks_of_several_patterns_say_which() -> None:
    rows = {"dense": {"a": 2.0}, "magnitude": {"a": 4.0}, "wanda": {"a": 3.0}}
    patterns = {"magnitude": "4:8", "wanda": "2:4"}
    results = {"perplexity": rows, "pattern": patterns}
    header, _, *lines = format_table(results).splitlines()
    assert header == "| method    | pattern | a perplexity | x dense |"
    assert [line.split("|")[2].strip() for line in lines] == ["–", "4:8", "2:4"]
    same = {**results, "pattern": dict.fromkeys(patterns, "4:8")}
    assert "pattern" not in format_table(same)


def test_only_the_perplexity_is_needed() -> None:
    assert (
        format_table({"perplexity": {"wanda": {"a": 2.0}}}).splitlines()[2]
        == "| Wanda  |         2.00 |       – |"
    )
    assert methods_in_order({}) == []


def test_bytes() -> None:
    assert [format_bytes(count) for count in (12, 2048, 8.5 * 2**20, 3 * 2**30)] == [
        "12 B",
        "2.0 KiB",
        "8.5 MiB",
        "3.0 GiB",
    ]


def test_the_distance_from_the_dense_model_stands_beside_each_perplexity() -> None:
    results = {
        "perplexity": {"dense": {"a": 8.0, "b": 4.0}, "learned": {"a": 12.0, "b": 5.0}},
        "kl": {"learned": {"a": 0.41234, "b": 0.1}},
        "agreement": {"learned": {"a": 0.7051, "b": 0.9}},
    }
    lines = format_table(results).splitlines()
    assert lines[0].count("KL") == lines[0].count("top-1") == 2
    assert lines[2].count("–") == 4  # the dense row has none
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[2:6] == ["12.00", "1.50", "0.412", "70.5%"]
    assert "Beside dense: KL, nats a token of KL(dense || masked); top-1" in lines[-1]
    del results["kl"]
    lines = format_table(results).splitlines()
    assert "KL" not in lines[0] and lines[-1].startswith("Beside dense: top-1")


def test_digests_are_shown_by_their_first_digits() -> None:
    digest = "0123456789abcdef"
    shown = format_protocol({"text_sha256": digest, "documents_sha256": {"piqa": digest}})
    assert shown == "text sha256 0123456789ab, documents sha256 piqa 0123456789ab"
