# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: SentencePiece files against the sentencepiece package, streams, special tokens."""

import json
import shutil
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest

from ternaryforge import FormatError
from ternaryforge.sentencepiece_model import SentencePieceModel
from ternaryforge.tokenizer import DecodeStream, Tokenizer

TRICKY = [
    "", " ", "   ", "a", " a", "a ", "  two  spaces  ", "a\n\nb\n", "\t tab", "é", "e\u0301", "🙂🙂 ok", "日本語 text",
    "<s>", "</s> x", "<unk>", "<0x41>", "\u2581x \u2581", "\u00a0no-break", "ﬁ ligature", "x" * 300, "\0", "1234 5678",
    "👨‍👩‍👧 joined", "line one\r\nline two", "\uff26\uff35\uff2c\uff2c width",
]  # fmt: skip


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def only_sentencepiece(source: Path, folder: Path) -> Path:
    shutil.copy(source, folder / "tokenizer.model")
    return folder


def compare(model_file: Path, folder: Path, texts: list[str]) -> None:
    """Ids and decoded text must be those of the sentencepiece package."""
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokenizer = load(only_sentencepiece(model_file, folder))
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.vocab_size == reference.vocab_size()
    assert tokenizer.bos_id == (reference.bos_id() if reference.bos_id() >= 0 else None)
    assert tokenizer.eos_ids == ((reference.eos_id(),) if reference.eos_id() >= 0 else ())
    for text in texts:
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids), repr(text)


@pytest.mark.shared
@pytest.mark.parametrize("model", ["stories260k/hf", "babyllama/hf-tok361", "tokenizers/llama2"])
def test_real_sentencepiece_files(shared: Path, tmp_path: Path, model: str) -> None:
    stories = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    articles = (shared / "data/wikitext-2/wiki.test.raw").read_text(encoding="utf-8")
    texts = [*TRICKY, *map(str.strip, stories), *articles.split("\n")[:300], articles[:20_000]]
    compare(shared / "data" / model / "tokenizer.model", tmp_path, texts)


@pytest.mark.parametrize("options", [
    {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
     "remove_extra_whitespaces": False},
    {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<sep>", "##"]},
    {"model_type": "bpe", "byte_fallback": False, "add_dummy_prefix": False},
    {"model_type": "unigram", "byte_fallback": True},
    {"model_type": "unigram", "byte_fallback": False, "bos_id": -1, "eos_id": -1},
])  # fmt: skip
def test_trained_sentencepiece_files(tmp_path: Path, options: dict[str, Any]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = np.random.default_rng(5)
    words = ["the", "cat", "sat", "on", "mat", "with", "a", "small", "dog", "and", "éa", "日本", "##", "<sep>", "x.y"]
    corpus = tmp_path / "corpus.txt"
    lines = [" ".join(rng.choice(words, 12)) for _ in range(400)]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    size = 330 if options["byte_fallback"] else 60
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "trained"), vocab_size=size, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    # The name of a byte piece written out as text is cut differently by a unigram of `tokenizers`.
    texts = [text for text in TRICKY if text != "<0x41>" or options["model_type"] == "bpe"]
    compare(tmp_path / "trained.model", tmp_path, [*texts, *lines[:100], "the ## cat<sep>sat", "a##b  c"])


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def piece(text: str, kind: int = 1, score: float = 0.0) -> bytes:
    return message(1, message(1, text.encode()) + b"\x15" + np.float32(score).tobytes() + number(3, kind))


PIECES = piece("<unk>", 2) + piece("<s>", 3) + piece("</s>", 3) + piece("\u2581") + piece("a") + piece("\u2581a")


def test_a_minimal_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(PIECES + message(2, number(3, 2)))
    tokenizer = load(tmp_path)
    assert tokenizer.encode("a") == [1, 5]
    assert tokenizer.encode("b", add_special_tokens=False) == [3, 0]
    assert tokenizer.decode([1, 5, 4, 2]) == "aa"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no pieces"),
        (PIECES + piece("a"), "twice"),
        (PIECES + piece(""), "empty piece"),
        (PIECES + piece("b", 9), "malformed piece"),
        (PIECES + message(1, message(1, b"\xff")), "malformed piece"),
        (PIECES + message(1, message(2, b"12345")), "malformed piece"),
        (PIECES + message(2, number(3, 4)), "neither a BPE nor a unigram"),
        (PIECES + message(2, number(24, 1)), "treat_whitespace_as_suffix"),
        (PIECES + message(3, number(5, 0)), "escape_whitespaces"),
        (PIECES + message(2, number(40, 99)), "token id 99"),
        (PIECES + message(2, number(41, 2**63)), "no such thing"),
        (PIECES + message(2, number(40, 2**64 - 1)), "no unknown piece"),
        (PIECES + number(1, 3), "number where bytes"),
        (PIECES + message(2, message(3, b"x")), "bytes where a number"),
        (PIECES[:-1], "truncated"),
        (PIECES + b"\x0b", "wire type"),
        (PIECES + b"\xff" * 11, "varint"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_malformed_sentencepiece_files(tmp_path: Path, data: bytes, text: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    if text == "no such thing":  # the lowest id there is: like -1, it says that there is no such token
        assert load(tmp_path).bos_id is None
        return
    with pytest.raises(FormatError, match=text) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.model" in str(caught.value)


def test_damaged_sentencepiece_files_never_crash(tmp_path: Path) -> None:
    whole = PIECES + message(2, number(3, 2) + number(35, 1)) + message(3, number(3, 1))
    rng = np.random.default_rng(1)
    path = tmp_path / "tokenizer.model"
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(1, len(whole) + 1)])
        try:
            SentencePieceModel.read(path)
        except FormatError:
            continue


def test_byte_level_round_trip(tmp_path: Path) -> None:
    tokenizer = load(made_models.write_tokenizer(tmp_path))
    assert (tokenizer.kind, tokenizer.bos_id, tokenizer.eos_ids) == ("tokenizer.json", 257, (258,))
    assert tokenizer.encode("e é") == [257, 256, 0xC3, 0xA9]
    for text in TRICKY:
        if not {"<s>", "</s>"} & {text[:3], text[:4]}:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.token_bytes(i) for i in (0, 10, 255, 256, 257, 9999)] == [b"\0", b"\n", b"\xff", b"e ", b"", b""]


@pytest.mark.parametrize(
    ("add_bos", "template", "expected"),
    [(None, True, 257), (None, False, None), (False, True, None), (True, False, 257), (True, True, 257)],
)
def test_who_decides_about_the_first_token(
    tmp_path: Path, add_bos: bool | None, template: bool, expected: int | None
) -> None:
    made_models.write_tokenizer(tmp_path, bos=template)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": add_bos}))
    tokenizer = load(tmp_path)
    assert tokenizer.bos_id == expected
    assert tokenizer.encode("x") == ([ord("x")] if expected is None else [expected, ord("x")])
    assert tokenizer.encode("x", add_special_tokens=False) == [ord("x")]


def test_special_tokens_map_is_read(tmp_path: Path) -> None:
    made_models.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": null}')
    assert load(tmp_path).eos_ids == (258,)


def test_a_stream_never_breaks_a_character(tmp_path: Path) -> None:
    tokenizer = load(made_models.write_tokenizer(tmp_path))
    stream = DecodeStream(tokenizer)
    assert [stream.push(byte) for byte in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]
    assert stream.push(0xE2) == ""
    assert stream.push(ord("x")) == "\ufffdx"
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"


def test_a_stream_joins_to_the_whole(tmp_path: Path) -> None:
    tokenizer = load(made_models.write_tokenizer(tmp_path))
    rng = np.random.default_rng(2)
    for _ in range(200):
        ids = rng.integers(0, 259, 12).tolist()
        stream = DecodeStream(tokenizer)
        pieces = [stream.push(token) for token in ids]
        whole = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", errors="replace")
        assert "".join(pieces) + stream.flush() == whole == tokenizer.decode(ids)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["llama2", "tinyllama", "gpt2", "smollm2"])
def test_decoding_is_that_of_the_tokenizers_package(shared: Path, name: str) -> None:
    tokenizer = load(shared / "data/tokenizers" / name)
    text = (shared / "data/tinystories/valid.txt").read_text(encoding="utf-8")[:20_000]
    plain = [part for part in TRICKY if not part.startswith(("<s>", "</s>", "<unk>"))]
    for part in [*plain, *text.split("\n")]:
        ids = tokenizer.encode(part, add_special_tokens=False)
        assert tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=True)


@pytest.mark.shared
def test_a_continuation_keeps_its_space(shared: Path) -> None:
    tokenizer = load(shared / "data/stories260k/hf")
    ids = tokenizer.encode("Once upon a time", add_special_tokens=False)
    assert tokenizer.decode(ids) == "Once upon a time"
    assert tokenizer.decode(ids, continuation=True) == " Once upon a time"


BPE = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}'
WORD_PIECE = BPE + ', "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true}}'


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot be read"),
        (BPE + "}", "decoder"),
        (WORD_PIECE, "decoder .*WordPiece"),
    ],
)
def test_malformed_tokenizer_json(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FormatError, match=text):
        Tokenizer.from_folder(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_text_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    """Never read with replacement characters: a token would have another text."""
    made_models.write_tokenizer(tmp_path)
    content = (tmp_path / name).read_bytes() if (tmp_path / name).is_file() else b'{"bos_token": "<s>"}'
    assert b'"<s>"' in content
    (tmp_path / name).write_bytes(content.replace(b'"<s>"', b'"<s\xff>"', 1))
    with pytest.raises(FormatError, match=rf"{name}' .*'utf-8' codec can't decode byte 0xff"):
        Tokenizer.from_folder(tmp_path)


def test_texts_that_were_not_utf8(tmp_path: Path) -> None:
    """Python reads such bytes from arguments and pipes as halves of surrogate pairs."""
    made_models.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    for encode in (tokenizer.encode, tokenizer.encode_chat):
        with pytest.raises(ValueError, match=r"the text was not UTF-8: character 2 is '\\udcff'"):
            encode(b"ab\xff".decode("utf-8", "surrogateescape"))
    assert tokenizer.decode(tokenizer.encode("ab\U0001f642", add_special_tokens=False)) == "ab\U0001f642"
