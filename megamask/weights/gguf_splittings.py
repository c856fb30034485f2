"""How the byte-level tokenizers of GGUF files cut a text, by the name in ``tokenizer.ggml.pre``.

The groups of names are those of llama.cpp, which tests each name against the published tokenizer:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp. The patterns are those of the
published tokenizer.json files.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Splitting:
    """How a byte-level tokenizer cuts a text into the words that it merges within.

    Attributes:
        pattern: the words, or None for the words of GPT-2.
        digits: each digit is a word.
        whole: a word that is a token stays whole, whatever the merges make of it.
        bos: a text begins with BOS unless the header says otherwise.
        composed: characters are composed first (NFC), as the published tokenizer does.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    composed: bool = False


_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_HIGH, _LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_HIGH}*{_LOW}+|[^\r\n\p{{L}}\p{{N}}]?{_HIGH}+{_LOW}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = Splitting(), Splitting(digits=True)
_LLAMA3 = Splitting(rf"{_WORD}\p{{N}}{{1,3}}|{_REST}", whole=True, bos=True)
_QWEN2 = Splitting(rf"{_WORD}\p{{N}}|{_REST}", composed=True)
# tokenizer.ggml.pre -> splitting
SPLITTINGS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": Splitting(_CASED, whole=True, bos=True),
}
