"""The digest of a task changes with everything that the task asks."""

from __future__ import annotations

from types import SimpleNamespace

from megamask.evaluate.task_text import digest_of


def task(goals: str, prompt: str = "Q: ", choices: str = "xy") -> SimpleNamespace:
    return SimpleNamespace(
        eval_docs=[{"goal": goal} for goal in goals],
        OUTPUT_TYPE="multiple_choice",
        doc_to_text=lambda document: prompt + document["goal"],
        doc_to_target=lambda _: 0,
        doc_to_choice=lambda _: list(choices),
    )


def test_the_digest_is_of_documents_prompts_and_answers() -> None:
    same = digest_of(task("abc"), None)
    assert digest_of(task("abc"), 3) == digest_of(task("abcd"), 3) == same
    others = [digest_of(task("abe"), None), digest_of(task("acb"), None), digest_of(task("ab"), 3)]
    others += [digest_of(task("abc", "A: "), None), digest_of(task("abc", choices="xz"), None)]
    assert len({same, *others}) == 6
