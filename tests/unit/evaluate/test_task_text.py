"""The digest of a task changes with everything that the task asks."""

from __future__ import annotations

from types import SimpleNamespace

from megamask.evaluate.task_text import digest_of


class Task(SimpleNamespace):
    """A task as the harness has it; tests/unit/evaluate/test_harness.py has the harness's own."""

    def doc_to_target(self, document: dict[str, str]) -> int:
        return 0

    def build_all_requests(self, limit: int | None) -> None:
        self.instances = [
            SimpleNamespace(doc_id=number, arguments=(self.prompt + document["goal"], choice))
            for number, document in enumerate(self.eval_docs[:limit])
            for choice in self.choices
        ]


def task(goals: str, prompt: str = "Q: ", choices: str = "xy") -> Task:
    return Task(eval_docs=[{"goal": goal} for goal in goals], prompt=prompt, choices=choices)


def test_the_digest_is_of_documents_prompts_and_answers() -> None:
    same = digest_of(task("abc"), None)
    assert digest_of(task("abc"), 3) == digest_of(task("abcd"), 3) == same
    others = [digest_of(task("abe"), None), digest_of(task("acb"), None), digest_of(task("ab"), 3)]
    others += [digest_of(task("abc", "A: "), None), digest_of(task("abc", choices="xz"), None)]
    assert len({same, *others}) == 6
