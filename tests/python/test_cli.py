# SPDX-License-Identifier: Apache-2.0
"""The command line: what goes to stdout, what to stderr, and with which exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import made_models
import pytest

import ternaryforge
from ternaryforge import TernaryModel, _core


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ternaryforge", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def run_json(*arguments: str | Path) -> dict[str, Any]:
    """The one document on stdout; nothing may be on stderr, which is no terminal here."""
    done = run(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def fails(*arguments: str | Path, code: int = 1) -> str:
    """The message of a failure: one line on stderr, nothing on stdout."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    if code == 1:
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model"
    made_models.write_folder(path, made_models.llama_config(max_position_embeddings=64))
    return made_models.write_tokenizer(path)


def test_generate_with_a_small_cache(folder: Path) -> None:
    options = ["--prompt", "ab", "--max-new-tokens", "20", "--threads", "1"]
    document = run_json("generate", folder, *options, "--kv", "int8")
    expected = TernaryModel.from_pretrained(folder, kv="int8").generate("ab", max_new_tokens=20)
    assert document["token_ids"] == expected.token_ids
    assert "'f32', 'f16', 'int8'" in fails("generate", folder, "--prompt", "ab", "--kv", "q4", code=2)


def test_generate(folder: Path) -> None:
    document = run_json("generate", folder, "--prompt", "ab", "--max-new-tokens", "5", "--threads", "1")
    result = TernaryModel.from_pretrained(folder, threads=1).generate("ab", max_new_tokens=5)
    assert {"text", "token_ids", "prompt_tokens", "tokens_per_second", "prompt_tokens_per_second"} <= set(document)
    assert document["token_ids"] == result.token_ids
    assert document["prompt_tokens"] == 3
    plain = run("generate", folder, "--prompt", "ab", "--max-new-tokens", "5")
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, "ab" + result.text + "\n", "")


def test_generate_options(folder: Path) -> None:
    options = {"temperature": 2.5, "top_k": 50, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.1, "seed": 7}
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    found = run_json("generate", folder, "--prompt", "ab", "--activations", "float", "--max-new-tokens", "9", *flags)
    expected = TernaryModel.from_pretrained(folder).generate("ab", max_new_tokens=9, **options)
    assert found["token_ids"] == expected.token_ids
    text = expected.text
    stopped = run_json(
        "generate", folder, "--prompt", "ab", "--max-new-tokens", "9", *flags, "--stop", text[4:6], "--stop", "zz"
    )
    assert stopped["text"] == text[: text.index(text[4:6])]
    assert stopped["finish_reason"] == "stop"


def test_evaluate(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one document\n<|endoftext|>\nanother one, " + "longer " * 30, encoding="utf-8")
    for protocol in ("documents", "wikitext", "llama.cpp"):
        document = run_json("evaluate", folder, "--text", text, "--protocol", protocol, "--seed", "1")
        expected = TernaryModel.from_pretrained(folder).perplexity(text.read_text(), protocol=protocol)
        assert document == expected.to_dict() | {"tasks": {}}
    shown = run("evaluate", folder, "--text", text, "--window", "16", "--max-documents", "1")
    assert "documents, windows of 16 tokens" in shown.stdout
    assert shown.stderr == ""


def test_convert(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = run_json("convert", folder, out, "--scale", "row", "--scheme", "absmean")
    assert {
        "tensors", "ternary_params", "bits_per_weight", "file_bytes", "peak_anonymous_bytes", "seconds",
    } <= set(document)  # fmt: skip
    assert document["tensors"] == 14
    assert run_json("generate", out, "--prompt", "ab", "--max-new-tokens", "2")["token_ids"]
    assert run_json("inspect", out)["quantization"]["scale"] == "row"
    assert "name another folder" in fails("convert", folder, out)
    shown = run("convert", folder, tmp_path / "second")
    assert "ternary layers" in shown.stdout


def test_inspect(folder: Path, tmp_path: Path) -> None:
    document = run_json("inspect", folder)
    assert (document["format"], document["arch"]) == ("safetensors", "LlamaForCausalLM")
    assert document["tensors"]["F32"]["count"] == 21
    assert document["tokenizer"] == {"kind": "tokenizer.json", "vocab_size": 259, "bos_id": 257, "eos_ids": [258]}
    assert document["warnings"] == []
    file = run_json("inspect", folder / "model.safetensors")
    assert file["arch"] is None
    assert "no config.json" in file["warnings"][0]
    config = made_models.llama_config(architectures=["MambaForCausalLM"])
    odd = run_json("inspect", made_models.write_folder(tmp_path, config, {}))
    assert "'MambaForCausalLM' is not supported" in odd["warnings"][0]
    assert "no tokenizer" in odd["warnings"][1]
    demo = run_json("inspect", "demo")
    assert demo["quantization"]["method"] == "bitnet"
    assert demo["head_bytes"] == {"exact": 524288, "int8": 282624, "int6": 225280, "int4": 151552}
    assert odd["head_bytes"] is None
    shown = " ".join(run("inspect", "demo").stdout.split())
    assert "a scale per tensor (stored as reciprocals), activations in 8 bits; dense: lm_head" in shown
    shown = " ".join(run("inspect", tmp_path).stdout.split())  # where lines break depends on the folder's name
    assert "is not supported; supported are" in shown
    assert "MambaForCausalLM" in shown
    assert "no tokenizer" in shown


def test_bench(folder: Path, tmp_path: Path) -> None:
    small = ("--threads", "1,2", "--contexts", "0,5", "--prompt-tokens", "3", "--decode-tokens", "2", "--repeats", "1")
    document = run_json("bench", folder, *small, "--output", tmp_path / "bench.json")
    assert document == json.loads((tmp_path / "bench.json").read_text())
    assert {
        "threads", "context", "prompt_tokens", "target", "layout", "decode_tokens_per_second",
        "prefill_tokens_per_second", "weight_bytes_per_token", "decode_bandwidth_share", "prefill_peak_share",
    } <= set(document["results"][0])  # fmt: skip
    assert [(result["threads"], result["context"]) for result in document["results"]] == [
        (1, 0),
        (1, 5),
        (2, 0),
        (2, 5),
    ]
    assert {"cpu", "cores", "read_bandwidth", "dot_peak", "compiler", "highway"} <= set(document["machine"])
    shown = run("bench", folder, *small, "--targets", "scalar", "--activations", "float")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "float activations" in " ".join(shown.stdout.split())
    assert len([line for line in shown.stdout.splitlines() if line.strip().startswith("scalar ")]) == 4
    assert "bitnet-2b-4t" in fails("bench", "--shape", "2b")


def test_doctor() -> None:
    document = run_json("doctor")
    assert document["targets"] == _core.simd.supported_targets()
    assert document["active_target"] in document["targets"]
    assert document["self_test"] == {target: [] for target in document["targets"]}
    assert document["versions"]["ternaryforge"] == version("ternaryforge")
    assert document["layout"] in {"t16", "t20"}
    assert "passed" in run("doctor").stdout


def test_a_forced_target_is_reported() -> None:
    target = _core.simd.supported_targets()[-1]
    done = run("doctor", "--json", TERNARYFORGE_TARGET=target)
    document = json.loads(done.stdout)
    assert (document["active_target"], document["layout"]) == (target, "t16")  # scalar: nothing to choose


def test_failures_are_one_line(folder: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in fails("generate", tmp_path / "absent", "--prompt", "x")
    assert "must be shorter than the context of 64" in fails("generate", folder, "--prompt", "x" * 99)
    assert "No such file" in fails("evaluate", folder, "--text", tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    assert "is not UTF-8" in fails("evaluate", folder, "--text", tmp_path / "latin.txt")
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "is a pickle" in fails("inspect", tmp_path / "model.bin")
    made_models.write_folder(tmp_path / "silent", made_models.llama_config())
    assert "holds neither tokenizer.json" in fails("generate", tmp_path / "silent", "--prompt", "x")


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "absent", TERNARYFORGE_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate", "demo"],
        ["generate", "demo", "--prompt", "x", "--temperature", "-1"],
        ["generate", "demo", "--prompt", "x", "--activations", "int4"],
        ["convert", "a", "b", "--scheme", "nearest"],
        ["evaluate", "demo", "--text", "x", "--threads", "0"],
        ["bench"],
        ["bench", "demo", "--shape", "7b"],
        ["bench", "demo", "--layout", "t20"],
        ["bench", "demo", "--threads", "two"],
        ["bench", "demo", "--contexts", "0,-1"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert fails(*arguments, code=2)


def test_help() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for verb in ("convert", "generate", "evaluate", "bench", "inspect", "doctor"):
        assert verb in shown.stdout
        assert run(verb, "--help").returncode == 0


def test_the_demo_tells_a_story() -> None:
    document = run_json("generate", "demo", "--prompt", "Once upon a time", "--max-new-tokens", "20")
    assert len(document["text"].split()) > 5


def test_interrupt(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C ends a long evaluation at once, without a traceback."""
    text = tmp_path / "long.txt"
    text.write_text("word " * 400_000)
    command = [sys.executable, "-m", "ternaryforge", "evaluate", str(folder), "--text", str(text)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Jobs in the background, and so all they start, would ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - nothing else runs in it yet
    ) as process:
        time.sleep(4)
        assert process.poll() is None, "the evaluation must still run"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (130, "", "")


def test_without_the_core(tmp_path: Path) -> None:
    """A copy of the Python files alone says what to do."""
    source = Path(ternaryforge.__file__).parent
    shutil.copytree(source, tmp_path / "ternaryforge", ignore=shutil.ignore_patterns("*.so", "embedded_model"))
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ternaryforge; ternaryforge.FormatError"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=False)
    assert "the compiled core is missing; install the package with `pip install .`" in done.stderr


def test_the_import_is_light() -> None:
    script = "import sys, ternaryforge; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "typer", "rich", "tokenizers"} & set(loaded)
