# SPDX-License-Identifier: Apache-2.0
"""Tokenizers from every kind of file against llama.cpp's published vectors, transformers, and bad files."""

import base64
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest

from ternaryforge import FormatError
from ternaryforge.bpe_vocabulary import TIKTOKEN_VOCABULARIES, is_tiktoken, read_ranks
from ternaryforge.tokenizer import Tokenizer

# Vectors of llama.cpp -> folders of the same vocabulary, the files to take, and the kind that makes.
VECTORS = [
    ("gpt-2", "gpt2", ["tokenizer.json", "tokenizer_config.json"], "tokenizer.json"),
    ("gpt-2", "gpt2", ["vocab.json", "merges.txt", "tokenizer_config.json"], "vocab.json"),
    ("llama-spm", "llama2", ["tokenizer.json", "tokenizer_config.json"], "tokenizer.json"),
    ("llama-spm", "llama2", ["tokenizer.model"], "sentencepiece"),
    ("llama-spm", "tinyllama", ["tokenizer.json", "tokenizer_config.json"], "tokenizer.json"),
    ("llama-bpe", "llama3", ["tokenizer.model"], "tiktoken"),
    ("qwen2", "qwen2", ["vocab.json", "merges.txt", "tokenizer_config.json"], "vocab.json"),
]


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def copy(source: Path, folder: Path, names: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(source / name, folder)
    return folder


def vectors(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    """The texts stand in one file, each followed by a line of its own; the ids in another, one line each."""
    file = shared / f"data/llamacpp-vocab/ggml-vocab-{name}.gguf"
    # Not by read_text, which would change the line ends within a text.
    texts = file.with_name(file.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = file.with_name(file.name + ".out").read_text(encoding="utf-8").split("\n")
    assert texts.pop() == lines.pop() == ""
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.shared
@pytest.mark.parametrize("case", VECTORS)
def test_vectors_of_llama_cpp(shared: Path, tmp_path: Path, case: tuple[str, str, list[str], str]) -> None:
    name, folder, files, kind = case
    tokenizer = load(copy(shared / "data/tokenizers" / folder, tmp_path, files))
    assert tokenizer.kind == kind
    found = vectors(shared, name)
    assert len(found) == 46
    for text, ids in found:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        # Qwen2 normalises: what comes back is the composed form.
        if name != "qwen2":
            assert tokenizer.decode(ids) == text, repr(text)


@pytest.mark.shared
def test_llama3_has_its_special_tokens(shared: Path, tmp_path: Path) -> None:
    folder = copy(shared / "data/tokenizers/llama3", tmp_path, ["tokenizer.model"])
    tokenizer = load(folder)
    assert tokenizer.vocab_size == 128256
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (128000, (128001,))
    names = {"<|begin_of_text|>": 128000, "<|reserved_special_token_0|>": 128002, "<|start_header_id|>": 128006,
             "<|end_header_id|>": 128007, "<|reserved_special_token_4|>": 128008, "<|eot_id|>": 128009,
             "<|reserved_special_token_5|>": 128010, "<|reserved_special_token_250|>": 128255}  # fmt: skip
    assert names.items() <= tokenizer.special_tokens.items()
    assert len(tokenizer.special_tokens) == 256
    assert tokenizer.named_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    assert tokenizer.encode("Hi<|eot_id|>") == [128000, 13347, 128009]
    assert tokenizer.decode([128000, 13347, 128009]) == "Hi"
    # A later model of the family renames some, and ends its texts elsewhere.
    later = {str(128000 + i): {"content": f"<|t{i}|>", "special": i != 3} for i in range(256)}
    config = {"added_tokens_decoder": later, "bos_token": "<|t0|>", "eos_token": "<|t9|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    renamed = load(folder)
    assert (renamed.bos_id, renamed.eos_ids, len(renamed.special_tokens)) == (None, (128009,), 255)
    assert renamed.decode(renamed.encode("Hi<|t9|><|t3|>")) == "Hi<|t3|>"


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_vocab_and_merges_as_transformers_reads_them(shared: Path, tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    files = ["vocab.json", "merges.txt", "tokenizer_config.json"]
    folder = copy(shared / "data/tokenizers" / name, tmp_path, files)
    ours, other = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(other)
    assert (ours.bos_id, ours.eos_ids) == (None, (other.eos_token_id,))
    assert ours.special_ids == set(other.all_special_ids)
    text = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8")[:50_000]
    wiki = (shared / "data/wikitext-2/wiki.test.raw").read_text(encoding="utf-8")[:50_000]
    for part in (text, wiki, "e\u0301<|im_start|>x<tool_call> y<|endoftext|>", "١٢٣ 1234 'LL don't\r\n\r\n  z"):
        assert ours.encode(part, add_special_tokens=False) == other.encode(part, add_special_tokens=False)


@pytest.mark.shared
def test_tiktoken_as_the_tokenizers_package_would_join(shared: Path, tmp_path: Path) -> None:
    """Words of real text, joined by rank in plain Python as tiktoken does."""
    source = shared / "data/tokenizers/llama3/tokenizer.model"
    tokenizer = load(copy(source.parent, tmp_path, ["tokenizer.model"]))
    ranks = read_ranks(source, source.read_bytes())

    def join(word: bytes) -> list[int]:
        if word in ranks:
            return [ranks[word]]
        parts = [bytes([byte]) for byte in word]
        while True:
            unions = [left + right for left, right in pairwise(parts)]
            found = [(ranks[union], index) for index, union in enumerate(unions) if union in ranks]
            if not found:
                return [ranks[part] for part in parts]
            index = min(found)[1]
            parts[index : index + 2] = [parts[index] + parts[index + 1]]

    text = (shared / "data/wikitext-2/wiki.test.raw").read_text(encoding="utf-8")[:30_000]
    rng = np.random.default_rng(4)
    words = [word.encode() for word in text.split()]
    words += [bytes(rng.integers(0x61, 0x7B, rng.integers(1, 30))) for _ in range(500)]
    words += ["日本語の文章です".encode(), "نص".encode(), "🙂🙂🏽".encode()]
    for word in {word for word in words if word.decode().isalpha()}:
        assert tokenizer.encode(word.decode(), add_special_tokens=False) == join(word), word


def rank_lines(count: int = 256) -> list[bytes]:
    tokens = [bytes([index]) if index < 256 else b"a" * (index - 254) for index in range(count)]
    return [base64.b64encode(token) + b" %d" % index for index, token in enumerate(tokens)]


def joined(lines: list[bytes]) -> bytes:
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (joined(rank_lines(300)), r"tiktoken vocabulary of 300 tokens, but not one that is known \(Llama 3\)"),
        (joined(rank_lines()[:200]), "byte 200 has no token"),
        (joined([*rank_lines(), rank_lines()[5]]), "line 257: a token comes twice"),
        (joined([*rank_lines(), b"YWE= 258"]), "line 257: .*its rank is not the next"),
        (joined([*rank_lines(), b"YWE= 99999999999999999999"]), "line 257: expected a base64 token"),
        (joined([*rank_lines(), b"YWE 256"]), "line 257: expected a base64 token"),
        (joined([*rank_lines(), b"\xff\xfe"]), "line 257: expected a base64 token"),
        (joined([*rank_lines(), b" 256"]), "line 257: expected a base64 token"),
        (joined([b"IQ== 0", b"A" * 5000]), "line 2: expected a base64 token"),
        (b"IQ== 0", "byte 0 has no token"),
    ],
)
def test_malformed_ranks(tmp_path: Path, data: bytes, text: str) -> None:
    assert is_tiktoken(data)
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(FormatError, match=text) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.model" in str(caught.value)


def test_a_small_known_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    data = joined(rank_lines(258)).replace(b"\n", b"\r\n")
    known = next(iter(TIKTOKEN_VOCABULARIES.values()))
    monkeypatch.setitem(TIKTOKEN_VOCABULARIES, hashlib.sha256(data).hexdigest(), known)
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = load(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.bos_id) == ("tiktoken", 258 + 256, 258)
    assert tokenizer.encode("aaaaa b") == [258, 256, 257, 32, 98]
    config = {"added_tokens_decoder": {"300": {"content": "<far>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"added token '<far>' has the id 300, but the vocabulary .* make it 258"):
        Tokenizer.from_folder(tmp_path)


def test_which_file_is_which() -> None:
    assert not is_tiktoken(b"")
    assert not is_tiktoken(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    assert not is_tiktoken(b"some text\n")
    assert is_tiktoken(b"IQ== 0\r\n")


def write_vocab(folder: Path, vocab: Any = None, merges: str = "#version: 0.2\na b\n", **config: Any) -> Path:
    if vocab is None:
        vocab = {character: index for index, character in enumerate(made_models.byte_characters())} | {"ab": 256}
    (folder / "vocab.json").write_text(vocab if isinstance(vocab, str) else json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    described = {
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": {"257": {"content": "<e>", "special": True}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described | config))
    return folder


def test_a_small_vocabulary(tmp_path: Path) -> None:
    names = dict.fromkeys(("bos_token", "eos_token"), "<e>")
    tokenizer = load(write_vocab(tmp_path, add_bos_token=True, **names))
    assert (tokenizer.kind, tokenizer.vocab_size) == ("vocab.json", 258)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (257, (257,))
    assert tokenizer.encode("abc<e>") == [257, 256, ord("c"), 257]
    assert tokenizer.decode([257, 256, 0xC3, 0xA9, 257]) == "abé"
    spaced = load(write_vocab(tmp_path, add_prefix_space=True))
    assert (spaced.bos_id, spaced.encode("ab")) == (None, [32, 256])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"tokenizer_class": "MambaTokenizer"},
            "tokenizer_class is 'MambaTokenizer'.*GPT2Tokenizer and Qwen2",
        ),
        ({"tokenizer_class": None}, "tokenizer_class is None"),
        ({"vocab": "{"}, "vocab.json' is no JSON"),
        ({"vocab": "[" * 100_000}, "vocab.json' is no JSON"),
        ({"vocab": []}, "must be one object of tokens"),
        ({"vocab": {"a": "x"}}, "must be one object of tokens"),
        ({"vocab": {"a": True}}, "must be one object of tokens"),
        ({"vocab": {"a": 0, "b": 0}}, "ids must be 0 to 1, each of them once"),
        ({"vocab": {"a": 10**30}}, "ids must be 0 to 0"),
        ({"vocab": {"a": -1}}, "ids must be 0 to 0"),
        ({"vocab": {"a": 0}}, "is not byte-level: it has no token"),
        ({"merges": "a b\nb c\n"}, "merges.txt', line 2: 'b c' does not join"),
        ({"merges": "ab\n"}, "line 1: 'ab' does not join"),
        ({"merges": "a b b\n"}, "line 1: 'a b b' does not join"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder is malformed"),
        ({"added_tokens_decoder": {"257": {}}}, "added_tokens_decoder is malformed"),
        ({"added_tokens_decoder": {"257": {"content": 3}}}, "added_tokens_decoder is malformed"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is malformed"),
        ({"added_tokens_decoder": {"-1": {"content": "y"}}}, "added token 'y' has the id -1"),
        ({"added_tokens_decoder": {"5": {"content": "y"}}}, "added token 'y' has the id 5"),
    ],
)
def test_malformed_vocabularies(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        Tokenizer.from_folder(write_vocab(tmp_path, **options))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe a\n")
    with pytest.raises(FormatError, match=r"merges.txt' is not UTF-8"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    assert Tokenizer.from_folder(tmp_path) is None


def test_damaged_files_never_crash(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    rng = np.random.default_rng(3)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] = rng.integers(256)
            (tmp_path / name).write_bytes(damaged[: rng.integers(1, len(whole) + 1)])
            try:
                Tokenizer.from_folder(tmp_path)
            except FormatError:
                continue
        (tmp_path / name).write_bytes(whole)
