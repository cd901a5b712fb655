# SPDX-License-Identifier: Apache-2.0
"""The C99 decoder of .1bit files: the same tokens as the scalar target, within its memory, whatever the file holds."""

import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest

import ternaryforge as tf
from ternaryforge.onebit import read_onebit
from ternaryforge.onebit_export import export_onebit

SOURCE = Path(__file__).resolve().parents[2] / "cpp" / "embedded"
WARNINGS = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]


def build(out: Path, *options: str) -> Path:
    compiler = shutil.which("cc")
    assert compiler is not None, "the tests need a C compiler named cc"
    sources = sorted(map(str, SOURCE.glob("*.c")))
    subprocess.run([compiler, *WARNINGS, *options, *sources, "-lm", "-o", str(out)], check=True)
    return out


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("onebit") / "onebit", "-O2")


@pytest.fixture
def scalar() -> Iterator[None]:
    previous = tf.simd.active_target()
    tf.simd.use_target("scalar")
    yield
    tf.simd.use_target(previous)


def run(program: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=True, timeout=120)


def ids_of(program: Path, file: Path, prompt: Sequence[int], count: int) -> list[int]:
    options = ("--ids", ",".join(map(str, prompt)), "--max-new-tokens", count, "--print-ids")
    text = run(program, file, *options).stdout.strip()
    return [int(part) for part in text.split(",")] if text else []


def greedy(model: tf.TernaryModel, prompt: Sequence[int], count: int) -> list[int]:
    result = model.generate(list(prompt), max_new_tokens=count)
    return [token for token in result.token_ids if token not in model.eos_ids]


def ternaryforge_scales(kind: str) -> dict[str, Any]:
    fields = {"quant_method": "ternaryforge", "scale": kind, "activation_bits": None}
    return fields | ({"group_size": 64} if kind == "group" else {})


MODELS = {
    "llama, dense": made_models.llama_config(),
    "llama, stock": made_models.llama_config(quantization_config={"quant_method": "bitnet"}),
    "llama, row scales, float": made_models.llama_config(quantization_config=ternaryforge_scales("row")),
    "llama, groups, float": made_models.llama_config(
        hidden_size=152,
        intermediate_size=132,
        eos_token_id=261,
        quantization_config=ternaryforge_scales("group"),
    ),
    "llama, groups, int8": made_models.llama_config(
        hidden_size=152,
        intermediate_size=132,
        eos_token_id=261,
        quantization_config=ternaryforge_scales("group") | {"activation_bits": 8},
    ),
    "llama, a window of positions": made_models.llama_config(tie_word_embeddings=True, rope_theta=500.0),
    "bitnet": made_models.bitnet_config(),
}


@pytest.mark.usefixtures("scalar")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", ["f32", "f16", "int8"])
def test_the_same_tokens(name: str, head: Any, program: Path, tmp_path: Path) -> None:
    config = MODELS[name]
    made_models.write_folder(tmp_path / "model", config, made_models.make_tensors(config, seed=3))
    file = tmp_path / "model.1bit"
    report = export_onebit(tmp_path / "model", file, head=head)
    assert report.exact == (head == "f32")
    model = tf.TernaryModel.from_pretrained(file, threads=1)
    lengths = []
    for prompt in ([5, 17, 250, 3], [0], list(range(30))):
        ours = greedy(model, prompt, 40)
        assert ids_of(program, file, prompt, 40) == ours
        lengths.append(len(ours))
    assert sum(lengths) > 30


@pytest.mark.usefixtures("scalar")
def test_the_embedded_model_in_four_megabytes(program: Path, tmp_path: Path) -> None:
    file = tmp_path / "demo.1bit"
    export_onebit("demo", file)
    model = tf.TernaryModel.from_pretrained(file, threads=1)
    for prompt in ("Once upon a time", "Tom didn't like 2 of the  red\n\nballs.", "!", " a\n "):
        result = model.generate(prompt, max_new_tokens=100)
        shown = run(program, file, "--prompt", prompt, "--max-new-tokens", 100)
        assert shown.stdout == prompt + result.text + "\n"
        sizes = [int(number) for number in re.findall(r"\d+", shown.stderr)]
        assert len(sizes) == 4
        assert sizes[0] == file.stat().st_size
        assert sum(sizes) < 4_000_000


@pytest.mark.usefixtures("scalar")
@pytest.mark.shared
def test_a_sentencepiece_model(program: Path, shared: Path, tmp_path: Path) -> None:
    file = tmp_path / "stories.1bit"
    export_onebit(shared / "data" / "stories260k" / "hf", file, head="int8")
    model = tf.TernaryModel.from_pretrained(file, threads=1)
    for prompt in ("Once upon a time", "Zoë saw a  dog \u2581 at 5 o'clock. \U0001f415", " "):
        ids = model.encode(prompt)
        text = model.require_tokenizer().decode([*ids, *greedy(model, ids, 60)])
        assert run(program, file, "--prompt", prompt, "--max-new-tokens", 60).stdout == text + "\n"


def test_a_model_inside_the_program(tmp_path: Path) -> None:
    config = made_models.bitnet_config()
    made_models.write_folder(tmp_path / "model", config, made_models.make_tensors(config))
    export_onebit(tmp_path / "model", tmp_path / "model.1bit", emit_c_header=True)
    header = tmp_path / "model.1bit.h"
    built = build(tmp_path / "with_model", "-O1", f'-DONEBIT_HEADER="{header}"')
    from_file = build(tmp_path / "without", "-O1")
    inside = run(built, "--ids", "7,8", "--print-ids").stdout
    assert inside == run(from_file, tmp_path / "model.1bit", "--ids", "7,8", "--print-ids").stdout


@pytest.fixture(scope="module")
def checked_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stops with a status of its own at the first access outside of memory or undefined operation."""
    options = ("-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
    return build(tmp_path_factory.mktemp("checked") / "onebit", *options)


def status(program: Path, file: Path, *arguments: str) -> tuple[int, str]:
    environment = {
        "ASAN_OPTIONS": "exitcode=77:detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "exitcode=77",
    }
    done = subprocess.run(
        [str(program), str(file), *(arguments or ("--ids", "1,2", "--max-new-tokens", "2"))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )
    return done.returncode, done.stderr


def test_hostile_files(checked_program: Path, tmp_path: Path) -> None:
    config = made_models.llama_config(quantization_config=ternaryforge_scales("row"), vocab_size=40, eos_token_id=3)
    made_models.write_folder(tmp_path / "model", config, made_models.make_tensors(config))
    file = tmp_path / "model.1bit"
    export_onebit(tmp_path / "model", file)
    whole = file.read_bytes()
    assert status(checked_program, file)[0] == 0
    bad = tmp_path / "bad.1bit"

    def check(data: bytes | bytearray) -> int:
        bad.write_bytes(data)
        code, errors = status(checked_program, bad)
        assert code in {0, 1}, errors
        return code

    for size in (0, 3, 15, 63, 64, 127, 200, len(whole) - 1):
        assert check(whole[:size]) == 1
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    assert check(flipped) == 1  # by the checksum
    rng = np.random.default_rng(0)
    tables = 64 + 64 * config["num_hidden_layers"] + 32 * 22
    refused = 0
    for trial in range(150):
        hostile = bytearray(whole)
        for _ in range(1 + trial % 3):
            place = 16 + 4 * int(rng.integers((tables - 16) // 4))
            value = int(rng.choice([0, 1, 2, 3, 7, 255, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]))
            hostile[place : place + 4] = value.to_bytes(4, "little")
        hostile[12:16] = zlib.crc32(hostile[16:]).to_bytes(4, "little")
        refused += check(hostile)
    assert refused > 50


def test_weights_that_are_no_numbers(checked_program: Path, tmp_path: Path) -> None:
    """Infinite and undefined inputs of a layer with int8 activations."""
    config = made_models.bitnet_config()
    tensors = made_models.make_tensors(config)
    made_models.write_folder(tmp_path / "model", config, tensors)
    file = tmp_path / "model.1bit"
    export_onebit(tmp_path / "model", file, head="f32")
    whole = file.read_bytes()
    embedding = tensors["model.embed_tokens.weight"][1].astype("<f4").tobytes()
    begin = whole.index(embedding)
    for value in (np.nan, np.inf, 3e38):
        hostile = bytearray(whole)
        hostile[begin : begin + len(embedding)] = np.full(len(embedding) // 4, value, "<f4").tobytes()
        hostile[12:16] = zlib.crc32(hostile[16:]).to_bytes(4, "little")
        file.write_bytes(hostile)
        assert status(checked_program, file)[0] == 0


def wide_model(layers: int) -> bytes:
    """Keys of 2^20 numbers, 2^24 tokens and one bit a weight; every layer names the same bytes."""
    wide = 1 << 20
    table = 64 + 64 * layers
    used = table + 32 * 10
    entries = []
    for mode, rows, cols in (
        [(0, 1, 1)] * 3  # embedding, final_norm, attention_norm
        + [(4, wide, 1)] * 3  # query, key, value
        + [(4, 1, wide), (0, 1, 1), (4, 1, 1), (4, 1, 1)]  # output, ffn_norm, up, down
    ):
        scale = 4 * (mode == 4)
        entries.append(struct.pack("<7I4x", mode, rows, cols, mode // 4, 0, used + scale, used))
        used += scale + (rows * -(-cols // 8) if mode == 4 else 4)
    record = struct.pack("<8I4f2I8x", 1, 1, wide, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, table + 64)
    content = struct.pack("<5I3fI12x", 1, 1, layers, 1 << 24, 1, 1e-5, 1, 0, used)
    content += record * layers + b"".join(entries)
    content += bytes(used - 16 - len(content)) + struct.pack("<4i24x", 0, -1, 0, -1) + bytes(2048)  # no tokenizer
    return struct.pack("<4s3I", b"1BIT", 1, len(content) + 16, zlib.crc32(content)) + content


def test_a_small_file_that_claims_much(checked_program: Path, tmp_path: Path) -> None:
    file = tmp_path / "wide.1bit"
    file.write_bytes(wide_model(layers=1))  # a cache of 2^47 bytes
    code, errors = status(checked_program, file, "--ids", "0")
    assert code == 1
    assert errors.endswith("onebit: memory: there is not enough\n")
    file.write_bytes(wide_model(layers=2))
    code, errors = status(checked_program, file, "--ids", "0")
    assert code == 1
    assert errors.endswith("a tensor lies in other bytes of the model\n")
    with pytest.raises(tf.FormatError, match="'embedding' begins at 512, in other bytes of the model"):
        read_onebit(file)


def test_wrong_arguments(program: Path, tmp_path: Path) -> None:
    file = tmp_path / "demo.1bit"
    export_onebit("demo", file)
    for arguments, reason in (
        (("--prompt", "caf\u00e9"), "only ASCII text"),
        (("--ids", "1,x"), "written as 1,2,3"),
        (("--ids", "4000"), "not in the vocabulary"),
        (("--ids", "1,2,3", "--context", "2"), "more token ids than the context"),
        (("--prompt", "a b c d", "--context", "2"), "too many tokens"),
        (("--max-new-tokens", "-1"), "takes a whole number"),
        (("--context", "9x"), "takes a whole number"),
        (("--nonsense", "1"), "is no option"),
        (("--prompt",), "its value is missing"),
    ):
        code, errors = status(program, file, *arguments)
        assert code == 1
        assert reason in errors
    assert status(program, tmp_path / "missing")[1].endswith("cannot be read\n")
