"""The tokenizer of a GGUF header: its special tokens and ids are those of the header, whatever the
version of transformers.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from megamask.errors import ArtifactError
from megamask.weights.gguf_splittings import SPLITTINGS
from megamask.weights.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    OFTEN,
    ROLES,
    SAMPLE,
    UNKNOWN,
    UNUSED,
    USER,
    HeaderTokenizer,
)

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACES = "\u0120\u0120"  # two spaces as a byte-level token


def byte_level(
    pre: str | None = "smollm",
    merges: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    **more: Any,
) -> dict[str, Any]:
    """A header with the 256 bytes, the results of the merges, and ``extra`` as control tokens."""
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*ALPHABET, *merged, *extra]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [NORMAL] * (len(tokens) - len(extra)) + [CONTROL] * len(extra),
        "merges": list(merges),
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def sentencepiece(**more: Any) -> dict[str, Any]:
    """A header with the bytes, the printable ASCII letters, and "ab"."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    tokens += ["ab", "\u2581", *letters]
    kinds += [NORMAL] * (len(tokens) - len(kinds))
    fields = {"model": "llama", "tokens": tokens, "token_type": kinds, **more}
    fields.setdefault("scores", [-float(at) for at in range(len(tokens))])
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def written(fields: dict[str, Any], folder: Path) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    HeaderTokenizer(fields, Path("m.gguf")).write(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def tokens_of(fields: dict[str, Any], folder: Path, text: str) -> list[str]:
    return written(fields, folder).encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("seed", range(16))
def test_special_tokens_are_those_of_the_header(tmp_path: Path, seed: int) -> None:
    """Any token can be any of them, two of them can be one, and each can be missing."""
    choose = random.Random(seed)
    names = tuple(f"<|{number}|>" for number in range(6))
    fields = byte_level("qwen2", extra=names) if seed % 2 else sentencepiece()
    if seed % 4 == 1:  # transformers has a class for it, with special tokens of its own
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    words = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    kinds[-3:] = [choose.choice([CONTROL, USER, UNUSED]) for _ in range(3)]
    roles = {}
    for role, name in ROLES.items():
        if choose.random() < 0.8:
            roles[role] = choose.randrange(
                len(words) - 6 if choose.random() < 0.7 else 0, len(words)
            )
            fields[f"tokenizer.ggml.{name}_token_id"] = roles[role]
    begins = choose.random() < 0.5 and "bos_token" in roles
    ends = choose.random() < 0.5 and "eos_token" in roles
    fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"] = begins, ends
    template = "{{ bos_token }}\n{% if x %}\u00e9{% endif %}"
    fields["tokenizer.chat_template"] = template
    written(fields, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    for role in (*OFTEN, *roles):
        assert getattr(found, f"{role}_id") == roles.get(role), role
    assert found.chat_template == template
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {role: settings.get(role) for role in ROLES} == {
        role: words[roles[role]] if role in roles else None for role in ROLES
    }
    ids, plain = found("Q")["input_ids"], found("Q", add_special_tokens=False)["input_ids"]
    before = [roles["bos_token"]] if begins else []
    assert ids == before + plain + ([roles["eos_token"]] if ends else [])
    assert len(found) == len(words)


def test_another_reading_by_transformers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.17 gave the beginning of a text as its end."""
    fields = byte_level(extra=("<s>", "</s>"), bos_token_id=256, eos_token_id=257)
    written(fields, tmp_path)
    wrong = AutoTokenizer.from_pretrained(tmp_path)
    wrong.eos_token = "<s>"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *words, **more: wrong)
    with pytest.raises(ArtifactError, match=r"the id of eos_token as 256, its header says 257"):
        written(fields, tmp_path)
    wrong.eos_token = "</s>"
    written(fields, tmp_path)
    wrong.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ArtifactError, match=r"m\.gguf: transformers .* reads ids as"):
        written(fields, tmp_path)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a  123", ["a", "\u0120", "\u0120", "12", "3"]),
        ("smollm", "a  123", ["a", SPACES, "1", "2", "3"]),
        ("qwen2", "a  123", ["a", "\u0120", "\u0120", "1", "2", "3"]),
        ("llama-bpe", "a  3412", ["a", "\u0120", "\u0120", "3", "4", "1", "2"]),
        ("llama-bpe", "3124", ["3", "12", "4"]),
        ("tekken", "a  123", ["a", "\u0120", "\u0120", "1", "2", "3"]),
        ("tekken", "aB", ["a", "B"]),
        ("smollm", "aB", ["aB"]),
        ("llama-bpe", "abc", ["abc"]),  # a word that no merge makes
        ("smollm", "abc", ["a", "b", "c"]),
        ("qwen2", "e\u0301", ["\u00c3\u00a9"]),  # composed
        ("llama-bpe", "e\u0301", ["e", "\u00cc", "\u0123"]),
        ("qwen2", "I'LL", ["I", "'", "L", "L"]),
    ],
)
def test_a_text_is_cut_as_the_header_names_it(
    tmp_path: Path, pre: str, text: str, words: list[str]
) -> None:
    merges = ("\u0120 \u0120", "1 2", "a B", "\u00c3 \u00a9")
    fields = byte_level(pre, merges)
    fields["tokenizer.ggml.tokens"].append("abc")
    fields["tokenizer.ggml.token_type"].append(NORMAL)
    assert tokens_of(fields, tmp_path, text) == words


def test_every_splitting_gives_the_text_back(tmp_path: Path) -> None:
    for pre, splitting in SPLITTINGS.items():
        fields = byte_level(pre, extra=("<|x|>",), bos_token_id=256)
        tokenizer = written(fields, tmp_path)
        back = tokenizer.decode(tokenizer.encode(SAMPLE).ids, skip_special_tokens=True)
        assert back == (SAMPLE.replace("e\u0301", "\u00e9") if splitting.composed else SAMPLE)
        assert (tokenizer.encode("x").ids[0] == 256) == splitting.bos


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece(
    tmp_path: Path, prefix: bool
) -> None:
    """The scores of the pieces decide, as in the library that made them."""
    spm = pytest.importorskip("sentencepiece")
    text, model = Path("docs/models.md").read_text() + SAMPLE, io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        # After such a symbol llama.cpp and published tokenizers put a space again.
        user_defined_symbols=[] if prefix else ["<b>", "GG"],
        minloglevel=2,
    )
    library = spm.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(library.vocab_size())
    kinds = []
    for at in ids:
        word = library.id_to_piece(at)
        kind = BYTE if library.is_byte(at) else CONTROL if library.is_control(at) else NORMAL
        kinds.append(USER if word in ("<b>", "GG") else UNKNOWN if at == 0 else kind)
    fields = sentencepiece(
        tokens=[library.id_to_piece(at) for at in ids],
        token_type=kinds,
        scores=[library.get_score(at) for at in ids],
        bos_token_id=1,
        eos_token_id=2,
        add_space_prefix=prefix,
    )
    tokenizer = written(fields, tmp_path)
    choose = random.Random(0)
    for _ in range(300):
        start = choose.randrange(len(text))
        part = text[start : start + choose.randrange(1, 300)].replace("\u2581", "")
        expected = library.encode(part)
        encoded = tokenizer.encode(part)
        assert encoded.ids == [1, *expected], part
        assert tokenizer.decode(encoded.ids) == part


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (byte_level(model="rwkv"), r"has tokenizer\.ggml\.model = 'rwkv'"),
        (byte_level("chatglm-bpe"), r"has tokenizer\.ggml\.pre = 'chatglm-bpe': one of gpt-2"),
        (byte_level(pre=None), r"has tokenizer\.ggml\.pre = None"),
        (byte_level(eos_token_id=256), r"eos_token_id = 256: there are 256 tokens"),
        (byte_level(bos_token_id=-1), r"bos_token_id = -1"),
        (byte_level(tokens=["a", "a"]), r"tokens = '2 texts': each must be another"),
        (byte_level(tokens=[1]), r"tokens = 'list': a list of str is needed"),
        (byte_level(token_type=[1]), r"token_type = '1 values': there are 256 tokens"),
        (byte_level(merges=("a b c",)), r"merges = 'a list': each must be two tokens"),
        (byte_level(merges=("a b",), tokens=ALPHABET, token_type=[1] * 256), r"cannot be built"),
        (byte_level(add_bos_token=True), r"bos_token_id = None: add_bos_token is true"),
        (byte_level(add_eos_token=1), r"add_eos_token = 1: true or false"),
        (byte_level(add_sep_token=True), r"add_sep_token = True: megamask does not read"),
        (sentencepiece(scores=None), r"scores = 'NoneType': a list of float"),
        (sentencepiece(token_type=None), r"token_type = 'NoneType'"),
        (sentencepiece(remove_extra_whitespaces=True), r"remove_extra_whitespaces = True"),
        (sentencepiece(precompiled_charsmap=[1]), r"precompiled_charsmap = \[1\]"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        written(fields, tmp_path)


def test_several_templates_keep_their_names(tmp_path: Path) -> None:
    more = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    written(byte_level() | more, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == {
        "default": "a",
        "tool_use": "b",
    }
