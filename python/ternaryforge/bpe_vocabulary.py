# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE vocabularies without a tokenizer.json, rebuilt with `tokenizers`.

Two kinds: tiktoken ranks, a text file with one base64 token and its rank per line, and
vocab.json with merges.txt. Neither says how text is cut into words before the merges; that is
known of the vocabularies and tokenizer classes named here, and others are refused.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ternaryforge._core import FormatError
from ternaryforge.checkpoint import read_text

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import pre_tokenizers

MAX_FILE_BYTES = 1 << 26

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = _CONTRACTIONS + r"\p{N}{1,3}" + _REST
QWEN2_WORDS = _CONTRACTIONS + r"\p{N}" + _REST

_RANK_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})\r?")


@dataclass(frozen=True, slots=True)
class TiktokenVocabulary:
    """What is known of a ranks file beside its contents."""

    name: str
    words: str
    special_tokens: tuple[str, ...]
    bos_token: str
    eos_token: str


def _llama3_special_tokens() -> tuple[str, ...]:
    """The 256 names behind the ranks, as in Meta's tokenizer.py for Llama 3."""
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(251)]
    return (
        "<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>",
        reserved[4], "<|eot_id|>", *reserved[5:],
    )  # fmt: skip


# By the SHA-256 of the file: ranks alone do not tell how text is cut, nor the special tokens.
TIKTOKEN_VOCABULARIES = {
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": TiktokenVocabulary(
        name="Llama 3",  # BitNet-b1.58-2B-4T has the same
        words=LLAMA3_WORDS,
        special_tokens=_llama3_special_tokens(),
        bos_token="<|begin_of_text|>",  # noqa: S106 - no password
        eos_token="<|end_of_text|>",  # noqa: S106
    )
}


def is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` holds tiktoken ranks; SentencePiece files begin with a binary byte."""
    return _RANK_LINE.fullmatch(data[:4096].partition(b"\n")[0]) is not None


def build_tiktoken(
    path: Path, data: bytes, config: Mapping[str, Any]
) -> tuple["tokenizers.Tokenizer", TiktokenVocabulary]:
    """The tokenizer of a ranks file; `config` is tokenizer_config.json, which may rename special tokens."""
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(f"[tokenizer] '{path}' is larger than {MAX_FILE_BYTES} bytes")
    ranks = read_ranks(path, data)
    known = TIKTOKEN_VOCABULARIES.get(hashlib.sha256(data).hexdigest())
    if known is None:
        names = ", ".join(sorted(vocabulary.name for vocabulary in TIKTOKEN_VOCABULARIES.values()))
        raise FormatError(
            f"[tokenizer] '{path}' is a tiktoken vocabulary of {len(ranks)} tokens, but not one that is known "
            f"({names}); put the tokenizer.json of the same model beside it"
        )
    vocab = {_as_characters(token): rank for token, rank in ranks.items()}
    backend = _byte_level_bpe(vocab, _merges_of_ranks(ranks), _split(known.words), ignore_merges=True)
    default = {
        str(len(ranks) + index): {"content": name, "special": True, "normalized": False}
        for index, name in enumerate(known.special_tokens)
    }
    _add_tokens(backend, config.get("added_tokens_decoder") or default, path)
    return backend, known


def read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Token -> rank of a ranks file. Every rank from 0 on and every single byte must be there once."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        match = _RANK_LINE.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if match is None or not token:
            raise FormatError(f"[tokenizer] '{path}', line {number}: expected a base64 token and its rank")
        if token in ranks or int(match[2]) != len(ranks):
            raise FormatError(f"[tokenizer] '{path}', line {number}: a token comes twice, or its rank is not the next")
        ranks[token] = len(ranks)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise FormatError(f"[tokenizer] '{path}' is a truncated tiktoken vocabulary: byte {missing[0]} has no token")
    return ranks


def build_vocab_and_merges(folder: Path, config: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    """The tokenizer of vocab.json and merges.txt, for the class that tokenizer_config.json names."""
    from tokenizers import normalizers, pre_tokenizers

    name = config.get("tokenizer_class")
    prefix = bool(config.get("add_prefix_space"))
    normalizer: normalizers.Normalizer | None = None
    match name:
        case "GPT2Tokenizer" | "GPT2TokenizerFast":
            words: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        case "Qwen2Tokenizer" | "Qwen2TokenizerFast":
            words = _split(QWEN2_WORDS, prefix=prefix)
            normalizer = normalizers.NFC()
        case _:
            raise FormatError(
                f"[tokenizer] '{folder}': tokenizer_class is {name!r} in tokenizer_config.json; with vocab.json and "
                "merges.txt, GPT2Tokenizer and Qwen2Tokenizer are supported; put a tokenizer.json there"
            )
    vocab = _read_vocab(folder / "vocab.json")
    backend = _byte_level_bpe(vocab, _read_merges(folder / "merges.txt", vocab), words, ignore_merges=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    _add_tokens(backend, config.get("added_tokens_decoder") or {}, folder / "tokenizer_config.json")
    return backend


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_CHARACTER_OF_BYTE = {byte: character for character, byte in byte_alphabet().items()}


def _as_characters(token: bytes) -> str:
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in token)


def _split(words: str, *, prefix: bool = False) -> "pre_tokenizers.PreTokenizer":
    import tokenizers
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )


def _byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    words: "pre_tokenizers.PreTokenizer",
    *,
    ignore_merges: bool,
) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import decoders, models

    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Every way to cut a token in two, best first: tiktoken joins the neighbours whose union has the lowest rank."""
    merges = []
    for token in ranks:  # in the order of their ranks
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(_as_characters(left), _as_characters(right)) for left, right in pairs]
    return merges


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(read_text(path, limit=MAX_FILE_BYTES, what="tokenizer"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"[tokenizer] '{path}' is no JSON: {error}") from None
    if not isinstance(vocab, dict) or not all(type(index) is int for index in vocab.values()):
        raise FormatError(f"[tokenizer] '{path}' must be one object of tokens and their ids")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise FormatError(f"[tokenizer] '{path}': the ids must be 0 to {len(vocab) - 1}, each of them once")
    missing = [character for character in byte_alphabet() if character not in vocab]
    if missing:
        raise FormatError(f"[tokenizer] '{path}' is not byte-level: it has no token {missing[0]!r}")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    # Not splitlines: tokens may hold what Unicode takes for the end of a line.
    for number, line in enumerate(read_text(path, limit=MAX_FILE_BYTES, what="tokenizer").split("\n"), start=1):
        line = line.removesuffix("\r")  # noqa: PLW2901
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(f"[tokenizer] '{path}', line {number}: {line!r:.80} does not join two tokens to a third")
        merges.append((left, right))
    return merges


def _add_tokens(backend: "tokenizers.Tokenizer", entries: Any, path: Path) -> None:
    """Adds tokens as `added_tokens_decoder` of a tokenizer_config.json lists them: id -> description."""
    import tokenizers

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        listed = sorted((int(index), entry["content"], entry) for index, entry in entries.items())
        tokens = [
            tokenizers.AddedToken(content, **{name: bool(entry.get(name)) for name in flags})
            for _, content, entry in listed
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"[tokenizer] '{path}': added_tokens_decoder is malformed: {error!r:.200}") from None
    backend.add_tokens(tokens)
    for index, content, _ in listed:
        if backend.token_to_id(content) != index:
            raise FormatError(
                f"[tokenizer] '{path}': the added token {content!r:.80} has the id {index}, but the vocabulary "
                f"and the other added tokens make it {backend.token_to_id(content)}"
            )
