"""The card (README.md) of a mask or of a masked model on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megamask import __version__
from megamask.config.paths import DENSE
from megamask.errors import printable
from megamask.masks.file import MaskSet
from megamask.masks.identity import RECOVERED, recovered_label, recovery_of
from megamask.publish.base_facts import BaseFacts
from megamask.publish.measured import table_of
from megamask.tables import table

MASK_FILE, SUMS = "mask.safetensors", "SHA256SUMS"


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        repo: ``OWNER/NAME`` of the repository.
        base: the base model.
        masks: the mask.
        is_model: whether the repository holds the masked model, and not the mask alone.
        results: name of a file of results -> its rows of this mask.
        provenance: how the mask was made, key -> value.
        licences: names of the licence files of the base model, which are in the repository.
    """

    repo: str
    base: BaseFacts
    masks: MaskSet
    is_model: bool
    results: Mapping[str, dict[str, Any]]
    provenance: Mapping[str, str]
    licences: Sequence[str]


def card(facts: CardFacts) -> str:
    """The text of the card."""
    masks, base = facts.masks, facts.base.shown
    what = "masked model" if facts.is_model else "mask"
    kind = f"{masks.patterns} sparsity mask ({masks.method})"
    if facts.is_model:
        first = f"{base} with a {kind}: pruned weights are exact zeros in dense tensors."
        if masks.has_own_weights:
            how = recovered_label(masks.meta) or f"updated by {masks.method}"
            first += (
                f" **The kept weights are {how}: they are not those of {base}, and no number here "
                "is a result of the frozen weights under a mask.**"
            )
    else:
        first = f"A {kind} of {base}. This repository holds no weight of the model."
    parts = [
        f"---\n{_front_matter(facts)}---",
        f"# {facts.repo.rpartition('/')[2]}",
        first,
        f"It covers {len(masks)} linears and was published with megamask {__version__}.",
        "## Use",
        _use(facts),
        "## Results",
        _results(facts),
        f"## How the {what} was made",
        "\n".join(table(["key", "value"], [[*pair] for pair in facts.provenance.items()])),
        "## Licence",
        _licence(facts),
        "## Checksums",
        f"`sha256sum -c {SUMS}` checks the files. The digest of the mask's content (pattern, "
        f"names, shapes, kept places) is `{masks.content_sha256}`, and the fingerprint of its base "
        f"model `{masks.fingerprint}`.",
    ]
    return printable("\n\n".join(parts) + "\n")


def _front_matter(facts: CardFacts) -> str:
    said: dict[str, Any] = dict(facts.base.licence)
    if facts.base.name:
        said["base_model"] = facts.base.name
    said["library_name"] = "transformers" if facts.is_model else "megamask"
    said["tags"] = ["megamask", "sparsity", "pruning"]
    said["tags"] += map(str, facts.masks.patterns.distinct)
    if recovery_of(facts.masks.meta):
        said["tags"].append(RECOVERED)
    return str(yaml.safe_dump(said, sort_keys=False, allow_unicode=True))


def _use(facts: CardFacts) -> str:
    if facts.is_model:
        load = f'model = AutoModelForCausalLM.from_pretrained("{facts.repo}")'
        return f"```python\nfrom transformers import AutoModelForCausalLM\n\n{load}\n```"
    load = facts.base.name or "path/to/the/base/model"
    return "\n".join(
        [
            "```python",
            "import megamask",
            "from huggingface_hub import hf_hub_download",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{load}")',
            f'megamask.apply_masks(model, hf_hub_download("{facts.repo}", "{MASK_FILE}"))',
            "```",
            "",
            "`apply_masks` refuses another base model by its fingerprint.",
        ]
    )


def _results(facts: CardFacts) -> str:
    if not facts.results:
        return "Nothing was measured on this mask."
    said = [f"Every row but `{DENSE}` was measured on this very mask, compared by its digest."]
    for name, content in facts.results.items():
        protocol = content.get("protocol", {}).get("name", "lm-evaluation-harness")
        said += [f"### Protocol {protocol} (`{name}`)", table_of(name, content)]
    return "\n\n".join(said)


def _licence(facts: CardFacts) -> str:
    base = facts.base
    what = "masked model" if facts.is_model else "mask"
    named = f" ({', '.join(base.licence.values())})" if base.licence else ""
    said = f"The {what} comes from {base.shown} and stands under its licence{named}."
    if facts.licences:
        said += f" Its licence files are here: {', '.join(f'`{one}`' for one in facts.licences)}."
    else:
        said += " The folder of the base model held no licence file: see the base model."
    return said
