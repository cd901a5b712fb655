# SPDX-License-Identifier: Apache-2.0
"""Tokenizers from GGUF against llama.cpp's vectors, and folders' tokenizers written and read again."""

from pathlib import Path
from typing import Any

import pytest

from ternaryforge import FormatError, _core
from ternaryforge.gguf.pre_tokenizers import PRE_TOKENIZERS, PROBES, find_pre_tokenizer, recognise
from ternaryforge.gguf.vocabulary import build_tokenizer, read_vocabulary
from ternaryforge.gguf.vocabulary_writer import describe_tokenizer, vocabulary_entries
from ternaryforge.sentencepiece_model import PieceType, SentencePieceModel
from ternaryforge.tokenizer import Tokenizer


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "phi-3", "falcon", "qwen2", "llama-bpe"])
def test_vectors_of_llama_cpp(shared: Path, name: str) -> None:
    file = shared / f"data/llamacpp-vocab/ggml-vocab-{name}.gguf"
    vocabulary = read_vocabulary(_core.io.GgufFile(file).metadata, where=name)
    assert vocabulary is not None
    assert vocabulary.warnings == []
    tokenizer = build_tokenizer(vocabulary, where=name)
    # Not by read_text, which would change the line ends within a text.
    texts = file.with_name(file.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = file.with_name(file.name + ".out").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(texts) == len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == [int(token) for token in line.split()], repr(text)
    if vocabulary.kind == "gpt2":
        flag = tokenizer.backend.model.ignore_merges
        assert recognise(tokenizer.backend, ignore_merges=flag) == vocabulary.pre


@pytest.mark.shared
def test_a_file_that_does_not_say_how_text_is_cut(shared: Path) -> None:
    file = shared / "data/llamacpp-vocab/ggml-vocab-gpt-neox.gguf"
    vocabulary = read_vocabulary(_core.io.GgufFile(file).metadata, where="neox")
    assert vocabulary is not None
    assert vocabulary.pre == "default"
    assert "does not say how text is cut" in vocabulary.warnings[0]
    metadata = dict(_core.io.GgufFile(file.with_name("ggml-vocab-llama-bpe.gguf")).metadata)
    del metadata["tokenizer.ggml.pre"]
    vocabulary = read_vocabulary(metadata, where="llama3")
    assert vocabulary is not None
    assert vocabulary.pre == "llama-bpe"
    assert "its vocabulary is that of Llama 3" in vocabulary.warnings[0]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "kind", "pre", "bos"),
    [
        ("gpt2", "gpt2", "gpt-2", False),
        ("smollm2", "gpt2", "smollm", False),
        ("qwen2", "gpt2", "qwen2", False),
        ("llama3", "gpt2", "llama-bpe", True),
        ("tinyllama", "llama", "default", True),
        ("llama2", "llama", "default", True),
    ],
)
def test_tokenizers_of_folders_written_and_read(shared: Path, name: str, kind: str, pre: str, bos: bool) -> None:
    folder = shared / "data/tokenizers" / name
    source = Tokenizer.from_folder(folder)
    assert source is not None
    size = source.vocab_size + 3
    vocabulary = describe_tokenizer(folder, source, vocab_size=size, eos_ids=source.eos_ids)
    metadata = {key: value for key, value, _ in vocabulary_entries(vocabulary)}
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == (kind, pre)
    assert metadata["tokenizer.ggml.add_bos_token"] is bos
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{size - 1}]"
    read = read_vocabulary(metadata, where=name)
    assert read is not None
    back = build_tokenizer(read, where=name)
    assert back.bos_id == source.bos_id
    assert set(source.eos_ids) <= set(back.eos_ids)
    wiki = (shared / "data/wikitext-2/wiki.test.raw").read_text(encoding="utf-8")[:20_000]
    for text in (*PROBES, wiki):
        ids = source.encode(text)
        assert back.encode(text) == ids, repr(text[:60])
        assert back.decode(ids) == source.decode(ids)


@pytest.mark.shared
@pytest.mark.peer
def test_sentencepiece_reads_what_is_written(shared: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece")
    metadata = _core.io.GgufFile(shared / "data/llamacpp-vocab/ggml-vocab-llama-spm.gguf").metadata
    vocabulary = read_vocabulary(metadata, where="spm")
    assert vocabulary is not None
    from ternaryforge.gguf.vocabulary import sentencepiece_model

    model = sentencepiece_model(vocabulary, where="spm")
    (tmp_path / "tokenizer.model").write_bytes(model.to_bytes())
    assert SentencePieceModel.read(tmp_path / "tokenizer.model") == model
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = build_tokenizer(vocabulary, where="spm")
    for text in PROBES:
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)


def test_names_are_unique_and_ways_differ() -> None:
    names = [name for known in PRE_TOKENIZERS for name in known.names]
    assert len(names) == len(set(names))
    assert find_pre_tokenizer("falcon_e") is find_pre_tokenizer("llama-bpe")
    assert find_pre_tokenizer("") is None
    cuts = {}
    for known in PRE_TOKENIZERS:
        built = known.build()
        key = (known.ignore_merges, str([built.pre_tokenize_str(probe) for probe in PROBES]))
        cuts.setdefault(key, []).append(known.names[0])
    assert [same for same in cuts.values() if len(same) > 1] == [["llama-bpe", "glm4"]]


def byte_metadata(**changes: Any) -> dict[str, Any]:
    import made_models

    tokens = [*made_models.byte_characters(), "he", "<s>", "<t>"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3, 4],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 257,
    }
    return values | changes


def build(metadata: dict[str, Any]) -> Tokenizer:
    vocabulary = read_vocabulary(metadata, where="x")
    assert vocabulary is not None
    return build_tokenizer(vocabulary, where="x")


def test_special_and_user_defined_tokens() -> None:
    vocabulary = read_vocabulary(byte_metadata(), where="x")
    assert vocabulary is not None
    tokenizer = build_tokenizer(vocabulary, where="x")
    assert tokenizer.bos_id is None
    assert tokenizer.encode("he<s><t>") == [256, 257, 258]
    assert tokenizer.decode([256, 257, 258]) == "he<t>"
    vocabulary = read_vocabulary(byte_metadata(**{"tokenizer.ggml.add_bos_token": True}), where="x")
    assert vocabulary is not None
    assert vocabulary.types[258] is PieceType.USER_DEFINED
    assert build_tokenizer(vocabulary, where="x").encode("h") == [257, ord("h")]
    none = read_vocabulary(byte_metadata(**{"tokenizer.ggml.bos_token_id": 0xFFFFFFFF}), where="x")
    assert none is not None
    assert "bos_token" not in none.ids
    assert read_vocabulary({}, where="x") is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokenizer.ggml.merges": ["h x"]}, "merge 0, 'h x', does not join two tokens to a third"),
        ({"tokenizer.ggml.merges": "h e"}, "tokenizer.ggml.merges must be a list of texts"),
        ({"tokenizer.ggml.merges": [1]}, "tokenizer.ggml.merges must be a list of texts"),
        ({"tokenizer.ggml.pre": 5}, "tokenizer.ggml.pre 5 is not a known way"),
        ({"tokenizer.ggml.pre": "deepseek-v3"}, "tokenizer.ggml.pre 'deepseek-v3' is not a known way"),
    ],
)
def test_vocabularies_that_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FormatError, match=text):
        build(byte_metadata(**changes))
