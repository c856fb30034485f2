"""lm-evaluation-harness (the package lm-eval) on models of this package. Nothing else imports it.

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.13.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from megamask.config.tasks_tree import TasksSection
from megamask.data.tokenizer import TextTokenizer
from megamask.errors import ConfigError
from megamask.evaluate.loglikelihood import Scorer
from megamask.evaluate.task_text import digest_of

NAMES, INCLUDE = "tasks.names", "tasks.include"
SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
Metrics = dict[str, dict[str, float]]


class HarnessModel(TemplateLM):
    """A model as the harness calls it. Every rank is asked the same and answers the same.

    Args:
        scorer: the log-likelihoods.
        tokenizer: text to ids.
        begin: the ids that a text begins with: the BOS, or nothing.
    """

    def __init__(self, scorer: Scorer, tokenizer: TextTokenizer, begin: list[int]) -> None:
        super().__init__()
        self.scorer, self.text_tokenizer, self.begin = scorer, tokenizer, begin

    @property
    def eot_token_id(self) -> int:
        """The token before a text that has no context, as in the harness: the BOS, or else the EOS
        of the tokenizer; or else the end of a document.
        """
        known = self.text_tokenizer
        return next((one for one in (known.bos, known.eos, known.eod) if one is not None), 0)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The ids of a text, with a BOS unless ``add_special_tokens`` is False.

        Raises:
            ArtifactError: the model does not know an id.
        """
        begin = [] if add_special_tokens is False else self.begin
        ids = [*begin, *self.text_tokenizer.encode(string)]
        self.text_tokenizer.check_ids(max(ids, default=0), self.text_tokenizer.name)
        return ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """As the harness describes it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        # A context of white space alone has no ids from the base class where no BOS is added.
        return self.scorer([(known or [self.prefix_token_id], ids) for _, known, ids in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's length, each target with as
        much context as there is. The token before the text is context and never a target.
        """
        texts = [
            [
                utils.make_disjoint_window(pair)
                for pair in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.scorer.longest,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self.scorer([pair for windows in texts for pair in windows]))
        return [sum(next(found)[0] for _ in windows) for windows in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Refused: ``load_tasks`` lets no task through that generates text."""
        raise ConfigError(NAMES, "generate_until", "tasks that score given answers", "Remove it.")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data.

    Attributes:
        found: as ``TaskManager.load`` returns them.
        limit: documents of each task; None = all.
    """

    found: dict[str, dict[str, Any]]
    limit: int | None

    def run(self, model: HarnessModel) -> Metrics:
        """Task -> metric -> value, equal on all ranks. Call it on all ranks. Every model is asked
        the same.
        """
        self._draw_same_examples()
        results: Any = evaluate(
            lm=model, task_dict=self.found, limit=self.limit, bootstrap_iters=0, log_samples=False
        )
        return {
            task: {
                name.partition(",")[0]: float(value)
                for name, value in values.items()
                if isinstance(value, float) and "stderr" not in name
            }
            for task, values in results["results"].items()
        }

    def facts(self) -> dict[str, Any]:
        """Version, examples in the prompt, documents of each task and the digest of all that is
        asked: a task file and its data may change under the same name.
        """
        tasks = self.found["tasks"].items()
        sizes = {name: len(task.eval_docs) for name, task in tasks}
        return {
            "versions": {name: task.VERSION for name, task in tasks},
            "shots": {name: task.config.num_fewshot for name, task in tasks},
            "documents": {
                name: size if self.limit is None else min(size, self.limit)
                for name, size in sizes.items()
            },
            "documents_sha256": self._digests,
        }

    @cached_property
    def _digests(self) -> dict[str, str]:
        self._draw_same_examples()
        return {name: digest_of(task, self.limit) for name, task in self.found["tasks"].items()}

    def _draw_same_examples(self) -> None:
        """Let each task draw its examples from the beginning. The harness goes on drawing where the
        evaluation before ended, so the next model would get others.
        """
        for task in self.found["tasks"].values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def load_tasks(section: TasksSection) -> LoadedTasks:
    """The tasks that the settings name, with their data.

    Raises:
        ConfigError: a task is unknown, generates text, or has no data that can be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(section)
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in section.names:
        for kind, loaded in _load(manager, name).items():
            found[kind] |= loaded
    for name, task in found["tasks"].items():
        if task.OUTPUT_TYPE not in SCORED:
            allowed = "tasks that score given answers (multiple choice, log-likelihoods); "
            raise ConfigError(
                NAMES, name, f"{allowed}this task generates text ({task.OUTPUT_TYPE})", "Remove it."
            )
        shots = task.config.num_fewshot if section.shots is None else section.shots
        task.set_config(key="num_fewshot", value=shots or 0)
    return LoadedTasks(found, section.limit)


def _manager(section: TasksSection) -> Any:
    """The index of tasks: of the folder alone where it has all of them, because reading the
    harness's own thousands takes half a minute.
    """
    folder = section.include
    if folder is not None:
        if not Path(folder).is_dir():
            allowed = "a folder with task files (*.yaml) of lm-evaluation-harness"
            raise ConfigError(INCLUDE, folder, allowed, "Check the path.")
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(section.names) <= set(own.all_tasks):
            return own
    whole = TaskManager(include_path=folder)
    for name in section.names:
        if name not in whole.all_tasks:
            near = difflib.get_close_matches(name, whole.all_tasks, n=3)
            allowed = "tasks of lm-evaluation-harness, or of the folder tasks.include"
            did = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(NAMES, name, allowed + did, "Correct the name.")
    return whole


def _load(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    try:
        loaded: dict[str, dict[str, Any]] = manager.load([name])
    # The harness and datasets raise errors of many types: offline, no such file, a broken task.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(
            NAMES,
            name,
            f"a task whose data can be read ({reason})",
            f"Check the network, or name a task file with local data ({INCLUDE}).",
        ) from error
    return loaded
