"""The tokenizer of a GGUF file's header, written as tokenizer.json and tokenizer_config.json.

Both files follow from the header alone. transformers also makes a tokenizer of a header, but each
of its releases makes another: 5.17 gives the beginning of a text as its end (EOS), and neither 5.17
nor 5.23 separates the digits of SmolLM2. llama.cpp says what a header means:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megamask.errors import ArtifactError
from megamask.machine_errors import explained
from megamask.storage import write_json
from megamask.weights.gguf_splittings import SPLITTINGS

PREFIX = "tokenizer.ggml."
FIX = "Use the Hugging Face folder of the model, or a GGUF file that says it."
# Special token of tokenizer_config.json -> name of its id in the header.
ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
    "mask_token": "mask",
}
OFTEN = ("bos_token", "eos_token", "unk_token", "pad_token")  # a class may have others of its own
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # values of token_type
SPACE = "\u2581"  # what sentencepiece writes for a space
READ = {"model", "pre", "tokens", "scores", "token_type", "merges"}
READ |= {"add_bos_token", "add_eos_token", "add_space_prefix"}
# Keys that change the ids, and the values with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "token_type_count": (0, 1),
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "precompiled_charsmap": ([],),
}
# Every part of a tokenizer shows in the ids or the words of these texts.
SAMPLE = "It's  2024:\n\n\tna\u00efve cafe\u0301, \u6771\u4eac!  12.5% of WE'LL \U0001f642 "
SAMPLES = (SAMPLE, f" {SAMPLE}")


class HeaderTokenizer:
    """The tokenizer that the fields of a GGUF header describe.

    Args:
        fields: name -> value.
        path: the file, for messages.

    Attributes:
        roles: special token of tokenizer_config.json -> id, as in the header.

    Raises:
        ArtifactError: a field is missing, malformed, or asks for what is not built.
    """

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self._path = path
        self._fields = {
            name.removeprefix(PREFIX): value
            for name, value in fields.items()
            if name.startswith(PREFIX)
        }
        self._templates = {
            name.removeprefix("tokenizer.chat_template").lstrip(".") or "default": value
            for name, value in fields.items()
            if name.startswith("tokenizer.chat_template") and isinstance(value, str)
        }
        self._refuse()
        self._tokens: list[str] = self._list("tokens", str)
        if len(set(self._tokens)) < len(self._tokens) or not self._tokens:
            raise self._refused("tokens", f"{len(self._tokens)} texts", "each must be another")
        bytewise = self._fields.get("model") == "gpt2"
        everything_normal = [NORMAL] * len(self._tokens)
        plain = bytewise and "token_type" not in self._fields
        self._kinds = everything_normal if plain else self._list("token_type", int)
        self.roles = dict(self._roles())
        self._parts = self._byte_level() if bytewise else self._sentencepiece()

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        common = {"version": "1.0", "truncation": None, "padding": None}
        return {**common, "added_tokens": self._added(), **self._parts}

    def settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        found: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        found |= dict.fromkeys(OFTEN)
        found |= {role: self._tokens[index] for role, index in self.roles.items()}
        if list(self._templates) == ["default"]:
            found["chat_template"] = self._templates["default"]
        elif self._templates:
            named = sorted(self._templates.items())
            found["chat_template"] = [{"name": name, "template": text} for name, text in named]
        return found

    def write(self, folder: Path) -> None:
        """Write both files to ``folder``, and check that the libraries read what the header says.

        Raises:
            ArtifactError: a library does not read it so.
        """
        text = json.dumps(self.tokenizer(), ensure_ascii=False)
        try:
            plain = Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            problem = f"holds a tokenizer that cannot be built ({error})"
            raise explained(error) or ArtifactError(self._path, problem, FIX) from error
        (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
        write_json(folder / "tokenizer_config.json", self.settings())
        vocabulary = plain.get_vocab(with_added_tokens=True)
        wrong = len(vocabulary) != len(self._tokens)
        wrong |= any(vocabulary.get(word) != at for at, word in enumerate(self._words()))
        if wrong:
            problem = "holds a tokenizer whose ids are not those of its header"
            raise ArtifactError(self._path, problem, FIX)
        self._check_transformers(folder, plain)

    def _check_transformers(self, folder: Path, plain: Tokenizer) -> None:
        """Check that transformers gives the special tokens, the ids and the text of the file."""
        try:
            found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the loader raises errors of many types
            problem = f"holds a tokenizer that cannot be read ({error})"
            fix = "Use a GGUF file with a tokenizer that transformers knows."
            raise explained(error) or ArtifactError(self._path, problem, fix) from error
        ids = [plain.encode(text).ids for text in SAMPLES]
        texts = [plain.decode(some, skip_special_tokens=False) for some in ids]
        roles = dict.fromkeys((*OFTEN, *self.roles))
        said: dict[str, Any] = {f"the id of {role}": self.roles.get(role) for role in roles}
        read: dict[str, Any] = {f"the id of {role}": getattr(found, f"{role}_id") for role in roles}
        said |= {"ids": ids, "text": texts}
        read |= {"ids": [found(text)["input_ids"] for text in SAMPLES]}
        read |= {"text": [found.decode(some) for some in ids]}
        for what, value in said.items():
            if read[what] != value:
                version = f"transformers {transformers.__version__}"
                problem = f"{version} reads {what} as {read[what]!r}, its header says {value!r}"
                fix = "Install another version of transformers, or use another GGUF file."
                raise ArtifactError(self._path, problem, fix)

    def _refuse(self) -> None:
        for name, value in self._fields.items():
            known = name in READ or name.endswith(("_token_id", "_token_ids"))
            if not known and value not in NEUTRAL.get(name, ()):
                raise self._refused(name, value, "megamask does not read this key")
        if self._fields.get("model") not in ("gpt2", "llama"):
            problem = "gpt2 (byte-level) and llama (sentencepiece) are built"
            raise self._refused("model", self._fields.get("model"), problem)

    def _refused(self, name: str, value: Any, problem: str) -> ArtifactError:
        return ArtifactError(self._path, f"has {PREFIX}{name} = {value!r}: {problem}", FIX)

    def _list(self, name: str, kind: type) -> list[Any]:
        """A list of the header, with a value for each token (but ``merges``)."""
        value = self._fields.get(name)
        if not isinstance(value, list) or not all(type(one) is kind for one in value):
            raise self._refused(name, type(value).__name__, f"a list of {kind.__name__} is needed")
        if name not in ("tokens", "merges") and len(value) != len(self._tokens):
            problem = f"there are {len(self._tokens)} tokens"
            raise self._refused(name, f"{len(value)} values", problem)
        return value

    def _roles(self) -> Iterator[tuple[str, int]]:
        for role, name in ROLES.items():
            key = f"{name}_token_id"
            if (index := self._fields.get(key)) is None:
                continue
            if type(index) is not int or not 0 <= index < len(self._tokens):
                raise self._refused(key, index, f"there are {len(self._tokens)} tokens")
            yield role, index

    def _flag(self, name: str, otherwise: bool) -> bool:
        value = self._fields.get(name, otherwise)
        if type(value) is not bool:
            raise self._refused(name, value, "true or false is needed")
        return value

    def _words(self) -> list[str]:
        """The tokens as tokenizer.json spells them: runs of spaces as sentencepiece writes them."""
        if self._fields["model"] == "gpt2":
            return self._tokens
        return [SPACE * len(word) if set(word) == {" "} else word for word in self._tokens]

    def _added(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text before it is split."""
        special = {at for at, kind in enumerate(self._kinds) if kind in (CONTROL, UNKNOWN)}
        special |= set(self.roles.values())
        spelled = self._words()
        return [
            {
                "id": at,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": at in special,
            }
            for at, word in enumerate(self._tokens)
            if at in special or (self._kinds[at] == USER and word == spelled[at])
        ]

    def _model(self, merges: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **more,
            "vocab": {word: at for at, word in enumerate(self._words())},
            "merges": merges,
        }

    def _byte_level(self) -> dict[str, Any]:
        name = self._fields.get("pre")
        if not isinstance(name, str) or name not in SPLITTINGS:
            raise self._refused("pre", name, f"one of {', '.join(SPLITTINGS)} is built")
        splitting = SPLITTINGS[name]
        merges = [tuple(merge.split(" ")) for merge in self._list("merges", str)]
        if not all(len(merge) == 2 for merge in merges):
            raise self._refused("merges", "a list", "each must be two tokens and a space")
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        steps: list[dict[str, Any]] = []
        if splitting.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if splitting.pattern is not None:
            pattern, behavior = {"Regex": splitting.pattern}, "Isolated"
            split = {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}
            steps.append(split)
        steps.append({**level, "use_regex": splitting.pattern is None})
        return {
            "normalizer": {"type": "NFC"} if splitting.composed else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "post_processor": self._template(splitting.bos),
            "decoder": {**level, "use_regex": True},
            "model": self._model(merges, ignore_merges=splitting.whole),
        }

    def _sentencepiece(self) -> dict[str, Any]:
        prefix = self._flag("add_space_prefix", True)
        unknown = self.roles.get("unk_token")
        if unknown is None and UNKNOWN in self._kinds:
            unknown = self._kinds.index(UNKNOWN)
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
        words = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
        decoders = [words, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
            "pre_tokenizer": None,
            "post_processor": self._template(True),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self._model(
                list(self._merges()),
                unk_token=None if unknown is None else self._words()[unknown],
                fuse_unk=True,
                byte_fallback=True,
            ),
        }

    def _merges(self) -> Iterator[tuple[str, str]]:
        """The merges that give what sentencepiece gives: the best piece first, pieces of the user
        before all others.
        """
        scores = self._list("scores", float)
        words = self._words()
        merged = [at for at, kind in enumerate(self._kinds) if kind in (NORMAL, USER)]
        parts = {words[at] for at in merged}
        ranks = {at: -math.inf if self._kinds[at] == USER else -scores[at] for at in merged}
        for at in sorted(merged, key=ranks.__getitem__):  # equal ranks in the order of the file
            word = words[at]
            for cut in range(len(word) - 1, 0, -1):
                if word[:cut] in parts and word[cut:] in parts:
                    yield word[:cut], word[cut:]

    def _template(self, bos: bool) -> dict[str, Any] | None:
        """What stands before and after a text, or None for nothing."""
        before = self._ends("add_bos_token", bos and "bos_token" in self.roles, "bos_token")
        after = self._ends("add_eos_token", False, "eos_token")
        if not before and not after:
            return None

        def around(letter: str, number: int) -> list[dict[str, Any]]:
            text = {"Sequence": {"id": letter, "type_id": number}}
            first = [{"SpecialToken": {"id": word, "type_id": number}} for word in before]
            return [*first, text, *({"SpecialToken": {"id": w, "type_id": number}} for w in after)]

        known = {
            word: {"id": word, "ids": [self._tokens.index(word)], "tokens": [word]}
            for word in (*before, *after)
        }
        single, pair = around("A", 0), [*around("A", 0), *around("B", 1)]
        kind = "TemplateProcessing"
        return {"type": kind, "single": single, "pair": pair, "special_tokens": known}

    def _ends(self, flag: str, otherwise: bool, role: str) -> list[str]:
        if not self._flag(flag, otherwise):
            return []
        if role not in self.roles:
            key = f"{ROLES[role]}_token_id"
            raise self._refused(key, None, f"{flag} is true")
        return [self._tokens[self.roles[role]]]
