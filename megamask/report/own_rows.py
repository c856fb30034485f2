"""Which rows of the results of a run belong to the masks that the run has now. Results stay in the
folder when masks are made anew, and a row of another mask is shown nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megamask.config.paths import DENSE
from megamask.errors import printable
from megamask.masks.file import MaskSet
from megamask.masks.identity import outdated, recovery_of, why_no_row_of
from megamask.report.results_table import base_method
from megamask.weights.model_identity import FINGERPRINT, MODEL, is_model_of

# What results have by row.
BY_ROW = (
    *("perplexity", "kl", "agreement", "tasks"),
    *("density", "mask_bytes", "masks", "seconds", "pattern"),
)


def only_rows(results: Mapping[str, Any], is_kept: Callable[[str], bool]) -> dict[str, Any]:
    """The parts of a file of results that have a value for each row, cut to the rows to keep."""
    return {
        key: {row: value for row, value in results[key].items() if is_kept(row)}
        for key in BY_ROW
        if isinstance(results.get(key), dict)
    }


@dataclass(frozen=True)
class OwnMasks:
    """The masks of a run.

    Attributes:
        masks: name of a row -> mask, of those that can be read.
        model: fingerprint and digest of the converted model, as far as its note has them.
    """

    masks: Mapping[str, MaskSet] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)

    def strange_rows(self, results: Mapping[str, Any], table: str) -> dict[str, str]:
        """The rows of a table that do not belong to the run -> why.

        A row with the name of a mask of the run was measured on this very mask, or is strange, also
        where it does not say on which; so is the row of a method whose file holds a mask that was
        made in another way since, polished for example. The row of the dense model, and
        others that name their mask, are strange where the results are of another model.

        Args:
            results: the content of a file of results.
            table: the key of its rows.
        """
        rows = results.get(table, {})
        strange = {
            row: why_no_row_of(mask, results, row, self.model) or self._outdated(mask)
            for row in rows
            if (mask := self.masks.get(row)) is not None
        }
        is_other = self._is_of_another_model(results)
        methods = {base_method(row) for row in self.masks}
        made = results.get("masks")
        about = made if isinstance(made, Mapping) else {}
        for row in rows:
            if row in self.masks:
                continue
            if base_method(row) in methods:
                strange[row] = "was measured on another mask"
            elif is_other and (row == DENSE or row in about):
                strange[row] = "was measured on another model"
        return {row: why for row, why in strange.items() if why}

    def _is_of_another_model(self, results: Mapping[str, Any]) -> bool:
        """By the digest of the model where both have it, for a mask may name a copy of the model in
        another dtype; else by the fingerprints that all rows name.
        """
        if MODEL in results and MODEL in self.model:
            return not is_model_of(results, self.model)
        made = results.get("masks")
        about = made.values() if isinstance(made, Mapping) else ()
        named = (one.get(FINGERPRINT) for one in about if isinstance(one, Mapping))
        measured = {one for one in named if isinstance(one, str)}
        models = {one.fingerprint for one in self.masks.values()}
        known = {self.model[FINGERPRINT]} if FINGERPRINT in self.model else models
        return bool(measured and known) and measured.isdisjoint(known)

    def _outdated(self, mask: MaskSet) -> str:
        return outdated(mask.meta, self.masks.get(str(recovery_of(mask.meta).get("mask"))))

    def rows_of(
        self, file: str, verb: str, results: Mapping[str, Any], table: str
    ) -> tuple[dict[str, Any], list[str]]:
        """The results without strange rows, {} where no row is left; and a sentence for the rows of
        each reason.

        Args:
            file: name of the file, for the sentences.
            verb: writes the file.
            results: the content of the file.
            table: the key of its rows.
        """
        strange, said = self.strange_rows(results, table), []
        for why in dict.fromkeys(strange.values()):
            rows = ", ".join(row for row, other in strange.items() if other == why)
            sentence = f"{rows} of {file} {why}: left out. Run the verb {verb} again."
            said.append(printable(sentence, kept=""))
        kept = only_rows(results, lambda row: row not in strange)
        kept.pop("masks", None)  # stays whole, because it tells the model that was measured
        return ({**results, **kept} if kept.get(table) else {}), said


NO_MASKS = OwnMasks()
