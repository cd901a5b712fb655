# SPDX-License-Identifier: Apache-2.0
"""What `plan` foretells, against what convert writes and what a process then takes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import made_models
import pytest
from test_ternary_core import make_config as core_config
from test_ternary_core import make_tensors as core_tensors

from ternaryforge import FormatError, TernaryModel, _core, convert, machine_rates, plan, planning, shapes
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.expected_loss import FIGURES
from ternaryforge.machine_rates import RunRates
from ternaryforge.model import HeadMode, KvType
from ternaryforge.rounding import RoundingOptions

RATES = RunRates(packed_bytes=1e9, dense_bytes=2e9, packed_prefill=1e10, dense_prefill=5e9, repack_bytes=4e9)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates and memory that do not depend on who else uses this machine."""
    monkeypatch.setattr(planning, "measure_run_rates", lambda *_: RATES)
    monkeypatch.setattr(planning, "measure_rounding_rate", lambda *_: 1e6)
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**12)


def write_dense(folder: Path, **changes: Any) -> Path:
    config = made_models.llama_config(**changes)
    made_models.write_folder(folder, config, made_models.make_tensors(config, dtype="BF16"))
    return folder


def test_the_demo_model() -> None:
    report = plan("demo", threads=2)
    model = TernaryModel.demo(threads=1)
    stage = report.stages[0]
    assert [stage.verb for stage in report.stages] == ["generate", "evaluate"]
    assert (report.method, report.scale, report.activations) == (None, None, "int8")
    assert report.file_bytes == report.source_bytes == (model.path / "model.safetensors").stat().st_size
    assert report.ternary_params == 3145728
    assert model.transformer.weight_bytes == stage.parts["packed weights"] + 2 * 1024 * 256
    assert report.kv_bytes_per_token == 4 * 2 * 2 * 64 * 4  # layers, keys and values, heads, head size, float32
    assert stage.parts["key-value cache"] == 256 * report.kv_bytes_per_token
    assert stage.peak_anonymous_bytes == sum(stage.parts.values())
    assert stage.peak_rss_bytes == stage.peak_anonymous_bytes + stage.peak_mapped_bytes
    assert report.peak_rss_bytes == max(stage.peak_rss_bytes for stage in report.stages)
    assert report.warnings == ()
    assert report.expected_loss.least_perplexity_factor == 1
    assert json.loads(json.dumps(report.to_dict()))["stages"][1]["verb"] == "evaluate"


def test_times_follow_from_the_rates() -> None:
    report = plan("demo", prompt_tokens=100, max_new_tokens=50)
    packed, table = 3145728 // 4, 2 * 1024 * 256
    token = packed / 1e9 + (table + 150 * report.kv_bytes_per_token) / 2e9
    prompt = 3145728 / 1e10
    assert report.tokens_per_second == pytest.approx(1 / token)
    assert report.prompt_tokens_per_second == pytest.approx(1 / prompt)
    loading = packed / 4e9 + report.file_bytes / 1e9
    assert report.stages[0].seconds == pytest.approx(loading + 100 * prompt + 50 * token)
    assert report.seconds == pytest.approx(sum(stage.seconds for stage in report.stages))


@pytest.mark.parametrize(("head", "kv"), [("int6", "f16"), ("int4", "int8"), ("two-stage", "f32"), ("exact", "f16")])
def test_heads_and_caches_of_fewer_bits(head: HeadMode, kv: KvType) -> None:
    report, exact = plan("demo", head=head, kv=kv), plan("demo")
    transformer = TernaryModel.demo(threads=1, head=head, kv=kv).transformer
    assert (report.head, report.kv) == (head, kv)
    assert report.head_bytes == transformer.head_bytes
    assert report.kv_bytes_per_token == transformer.kv_bytes_per_token
    packed = report.stages[0].parts["packed weights"]
    token = packed / 1e9 + (report.head_bytes + 256 * report.kv_bytes_per_token) / 2e9
    assert report.tokens_per_second == pytest.approx(1 / token)
    parts = report.stages[0].parts
    assert parts.get("quantized head", 0) == (0 if head == "exact" else report.head_bytes)
    more = parts.get("quantized head", 0) - 256 * (exact.kv_bytes_per_token - report.kv_bytes_per_token)
    assert report.stages[0].peak_anonymous_bytes == exact.stages[0].peak_anonymous_bytes + more
    assert plan(shape="llama3-8b", head="int6").head_bytes == 128256 * (4096 * 13 // 16 + 12)


def test_unknown_heads_and_caches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[plan\] kv is one of .*, got 'f32' and 'int5'"):
        plan("demo", head="int5")  # type: ignore[arg-type]


def test_no_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dense(tmp_path / "model", tie_word_embeddings=True)
    monkeypatch.setattr(Checkpoint, "raw", lambda *_: pytest.fail("a tensor was read"))
    assert plan(folder).method == "ls"


@pytest.mark.parametrize(("scale", "group_size"), [("tensor", 128), ("row", 128), ("group", 64)])
def test_the_file_has_the_size_that_convert_writes(tmp_path: Path, scale: Any, group_size: int) -> None:
    source = write_dense(tmp_path / "source", intermediate_size=200)
    report = plan(source, scale=scale, group_size=group_size)
    done = convert(source, tmp_path / "out", scale=scale, group_size=group_size)
    assert report.file_bytes == done.file_bytes
    assert report.ternary_params == done.ternary_params
    assert report.source_bytes == (source / "model.safetensors").stat().st_size
    after = plan(tmp_path / "out")  # what convert made is planned like what it was foretold to make
    assert after.stages[0].parts == report.stages[1].parts
    assert after.activations == report.activations
    assert after.file_bytes == done.file_bytes


def test_rounding_a_dense_model_is_warned_of(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "model")
    report = plan(folder, method="absmean")
    assert report.stages[0].verb == "convert"
    assert report.stages[0].seconds > report.ternary_params / 1e6
    assert "gibberish" in report.warnings[0]
    assert any("no tokenizer" in warning for warning in report.warnings)
    assert report.expected_loss.least_perplexity_factor == pytest.approx(476 / 4.32)
    assert {figure.method for figure in report.expected_loss.figures} == {"absmean"}
    assert all(figure.source for figure in FIGURES)
    as_it_is = plan(folder, method="none")
    assert as_it_is.ternary_params == 0
    assert as_it_is.activations == "float"
    assert not any("gibberish" in warning for warning in as_it_is.warnings)


def test_latents_are_planned_as_they_are_run(tmp_path: Path) -> None:
    config = made_models.bitnet_config(
        quantization_config={
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "online",
        }
    )
    folder = made_models.write_folder(tmp_path / "model", config)
    report = plan(folder)
    assert report.method is None
    assert report.ternary_params > 0
    assert report.stages[0].parts["latents on their way"] > 0
    assert plan(folder, method="absmean").file_bytes == convert(folder, tmp_path / "out", scheme="absmean").file_bytes
    with pytest.raises(FormatError, match="absmean"):
        plan(folder, method="ls")


@pytest.mark.parametrize("swiglu", [False, True])
def test_a_family_with_rules_of_its_own(tmp_path: Path, swiglu: bool) -> None:
    """Ternary-Core: fused tensors, latents that run as they are, int8 ends."""
    config = core_config(use_swiglu=swiglu, layer_bit_map={"embedding": "8bit", "layer_modes": ["ternary"] * 3})
    folder = made_models.write_folder(tmp_path / "model", config, core_tensors(config))
    report = plan(folder, method="ls")
    assert plan(folder).method is None
    assert plan(folder).stages[0].parts["latents on their way"] > 0
    done = convert(folder, tmp_path / "out")
    assert (report.file_bytes, report.ternary_params) == (done.file_bytes, done.ternary_params)
    assert not any("gibberish" in warning for warning in (*report.warnings, *done.warnings))
    after = plan(tmp_path / "out")
    assert (after.file_bytes, after.ternary_params) == (done.file_bytes, done.ternary_params)
    with pytest.raises(FormatError, match="have a rule of their own with one scale per tensor"):
        plan(folder, method="ls", scale="row")


def test_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core.kernels, "fastest_layout", lambda *_, **__: "t16")
    report = plan(shape="llama3-8b")
    assert report.parameters == 8_030_261_248
    assert report.kv_bytes_per_token == 2 * 32 * 8 * 128 * 4
    dense = 2 * 2 * 128256 * 4096
    assert report.file_bytes == pytest.approx(dense + report.ternary_params / 4, rel=1e-3)
    assert report.stages[0].parts["packed weights"] == report.ternary_params // 4
    assert report.peak_anonymous_bytes < 1.4 * report.ternary_params / 4
    rounded = plan(shape="llama3-8b", method="ls", scale="group")
    assert rounded.source_bytes == pytest.approx(2 * report.parameters, rel=1e-4)
    assert rounded.stages[1].parts["scales"] == pytest.approx(16 * report.ternary_params / 128, rel=1e-3)


def test_little_memory_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "available_bytes", lambda: 10**9)
    assert any("it will swap or be killed" in warning for warning in plan(shape="llama3-8b").warnings)
    monkeypatch.setattr(planning, "available_bytes", lambda: 3 * 10**9)
    assert any("read from disk again" in warning for warning in plan(shape="llama3-8b").warnings)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"source": "demo", "method": "gptq"}, r"method is one of none, ls, .* got 'gptq'; methods with calibration"),
        ({"source": "demo", "method": "ls"}, r"'demo' are quantised already .* got method 'ls'; use 'none'"),
        ({}, r"name either a source or a shape"),
        ({"source": "demo", "shape": "7b"}, r"name either a source or a shape"),
        ({"shape": "9b"}, r"\[shape\] .* got '9b'"),
        ({"source": "demo", "activations": "int4"}, r"activations must be .* 'int4'"),
        ({"source": "demo", "layout": "t10"}, r"layout must be 'auto', 't16' or 't20', got 't10'"),
        ({"source": "demo", "threads": 0}, r"threads is at least 1, got 0"),
        ({"source": "demo", "prompt_tokens": 512}, r"shorter than the context of 512, got 512"),
        ({"source": "demo", "max_new_tokens": 0}, r"must be positive, got 128 and 0"),
        ({"shape": "7b", "method": "ls", "scale": "group", "group_size": 100}, r"multiple of 64, got 100"),
    ],
)
def test_wrong_options_are_refused(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        plan(**arguments)


def test_checkpoints_that_would_not_load_are_refused(tmp_path: Path) -> None:
    config = made_models.llama_config()
    tensors = made_models.make_tensors(config)
    del tensors["model.norm.weight"]
    with pytest.raises(FormatError, match=r"model\.norm\.weight' is missing"):
        plan(made_models.write_folder(tmp_path / "missing", config, tensors))
    other = made_models.make_tensors(made_models.llama_config(intermediate_size=32))
    with pytest.raises(FormatError, match=r"has shape \[32, 20\], expected \[28, 20\]"):
        plan(made_models.write_folder(tmp_path / "shape", config, other))
    with pytest.raises(FormatError, match=r"gate_proj.weight' has 30 rows"):
        plan(write_dense(tmp_path / "rows", intermediate_size=30))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        plan(tmp_path / "absent")
    file = tmp_path / "shape" / "model.safetensors"
    with pytest.raises(FormatError, match=r"no config\.json"):
        plan(file)


def test_a_name_of_the_hub_is_looked_up_in_the_cache_only(tmp_path: Path) -> None:
    cache = tmp_path / "models--some--model"
    made_models.write_folder(cache / "snapshots" / "0123456789abcdef", made_models.llama_config())
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123456789abcdef")

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ternaryforge", "plan", name, "--json", "--threads", "1"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HF_HUB_CACHE": str(tmp_path)},
        )

    found = run("some/model")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["source"] == "some/model"
    missing = run("some/other")
    assert missing.returncode == 1
    assert "not in the cache of the hub" in missing.stderr
    assert "hf download some/other" in missing.stderr


def test_the_machine_is_measured() -> None:
    rates = machine_rates.measure_run_rates(1, "int8")
    assert min(rates.packed_bytes, rates.dense_bytes, rates.packed_prefill, rates.dense_prefill) > 1e6
    assert rates.repack_bytes > 1e6
    assert machine_rates.measure_rounding_rate(RoundingOptions("ls", "row", 128, 1)) > 1e4


MEASURE = """
import sys
from pathlib import Path
from ternaryforge import TernaryModel
from ternaryforge.memory import PeakAnonymous, anonymous_bytes
start = anonymous_bytes()
with PeakAnonymous() as memory:
    model = TernaryModel.from_pretrained(sys.argv[1], threads=1, layout="t20")
    result = model.generate(list(range(1, 193)), max_new_tokens=8)
assert len(result.token_ids) == 8
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
print(start + memory.growth, peak, model.transformer.weight_bytes)
"""


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
def test_memory_of_a_model_of_100_million_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Which layout a machine prefers is a measurement, which may differ from run to run.
    monkeypatch.setattr(_core.kernels, "fastest_layout", lambda *_, **__: "t20")
    config = shapes.shape_config("7b") | {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    shapes.write_random_checkpoint(config, tmp_path / "model", shards=3)
    report = plan(tmp_path / "model", threads=1, prompt_tokens=192, max_new_tokens=8)
    stage = report.stages[0]
    assert report.ternary_params == 6 * 1024 * (4 * 1024 + 3 * 4096)
    # 20 weights in 4 bytes; the last of 1024 columns fill tiles of 16 columns, 4 bytes each.
    assert report.ternary_params // 5 < stage.parts["packed weights"] < report.ternary_params // 5 * 1.02
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model")], check=True, capture_output=True, text=True
    )
    anonymous, rss, weight_bytes = map(int, done.stdout.split())
    assert weight_bytes == stage.parts["packed weights"] + 2 * 2 * 4096 * 1024
    assert stage.peak_anonymous_bytes == pytest.approx(anonymous, rel=0.1)
    assert stage.peak_rss_bytes == pytest.approx(rss, rel=0.1)
    assert report.file_bytes == sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))


def test_random_checkpoints_are_refused_where_something_lies_or_nothing_is_packed(tmp_path: Path) -> None:
    config = shapes.shape_config("7b")
    with pytest.raises(FileExistsError, match="already at"):
        shapes.write_random_checkpoint(config, tmp_path)
    del config["quantization_config"]
    with pytest.raises(ValueError, match="one scale per tensor"):
        shapes.write_random_checkpoint(config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
