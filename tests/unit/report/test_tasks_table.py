from megamask.report.tasks_table import tasks_table

EXPECTED = """\
| method       |  piqa | piqa norm |  race | wiki word_perplexity |  mean |
| ------------ | ----: | --------: | ----: | -------------------: | ----: |
| dense        | 70.00 |     71.25 | 40.00 |                11.25 | 55.00 |
| learned mask | 65.00 |         – | 35.50 |                    – | 50.25 |

Accuracies in percent; norm: log-likelihoods divided by the characters of the answer.

Protocol: harness 0.4.13, documents piqa 1,838"""


def test_rows_and_columns_are_in_the_order_of_the_results() -> None:
    results = {
        "tasks": {
            "dense": {
                "piqa": {"acc": 0.7, "acc_norm": 0.7125},
                "race": {"acc": 0.4},
                "wiki": {"word_perplexity": 11.25},
            },
            "learned": {"piqa": {"acc": 0.65}, "race": {"acc": 0.355}, "wiki": {}},
        },
        "protocol": {"harness": "0.4.13", "documents": {"piqa": 1838}},
    }
    assert tasks_table(results) == EXPECTED
    both = {"learned": "4:8", "wanda": "2:4"}
    lines = tasks_table({**results, "pattern": both}).splitlines()
    assert [lines[line].split("|")[2].strip() for line in (0, 2, 3)] == ["pattern", "–", "4:8"]


def test_the_mean_counts_the_tasks_of_a_group_once() -> None:
    accuracies = {"all": 0.3, "part": 0.15, "a": 0.1, "b": 0.2, "c": 0.6, "alone": 0.9}
    results = {
        "tasks": {"dense": {task: {"acc": value} for task, value in accuracies.items()}},
        "groups": {"all": ["part", "c"], "part": ["a", "b"]},
    }
    row = tasks_table(results).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["dense", "30.00", "15.00", "10.00", "20.00", "60.00", "90.00", "45.00"]
