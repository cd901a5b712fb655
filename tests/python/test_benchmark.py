# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what it counts, what it checks, what it refuses. How long anything takes is not tested."""

from dataclasses import replace
from pathlib import Path

import made_models
import numpy as np
import pytest

from ternaryforge import TernaryModel, _core, shapes
from ternaryforge.benchmark import BenchmarkReport, Plan, benchmark, build_model, build_shape
from ternaryforge.machine import EnergyMeter, Machine, cpu_name, measure_machine

BANDWIDTH, PEAK = 1e9, 1e10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_models.write_folder(tmp_path_factory.mktemp("bench") / "model", made_models.bitnet_config())


def made_machine(*targets: str) -> Machine:
    """Round numbers, for exact shares."""
    counts = {1: 1.0, 2: 2.0, 17: 4.0}
    return Machine(
        cpu="made",
        cores=2,
        system="",
        compiler="",
        highway="",
        thread_backend="",
        read_bandwidth={n: BANDWIDTH * factor for n, factor in counts.items()},
        dot_peak={target: {n: PEAK * factor for n, factor in counts.items()} for target in targets},
    )


def test_a_row_for_every_combination_with_shares_of_the_machine(folder: Path) -> None:
    targets = [_core.simd.supported_targets()[-1], _core.simd.supported_targets()[0]]
    active = _core.simd.active_target()
    plan = Plan(threads=[1, 17], contexts=[8, 0], prompt_tokens=[4, 9], targets=targets, decode_tokens=4, repeats=2)
    seen: list[tuple[int, int, str]] = []
    report = benchmark(
        build_model(str(folder)),
        plan,
        model="made",
        machine=made_machine(*targets),
        progress=lambda *args: seen.append(args),
    )
    assert _core.simd.active_target() == active
    assert [(r.target, r.threads, r.context, r.prompt_tokens) for r in report.results] == [
        (target, threads, context, size)
        for target in targets
        for threads in (1, 17)
        for context in (0, 8)
        for size in (4, 9)
    ]
    config = made_models.bitnet_config()
    sizes = {name: np.prod(shape) for name, shape in made_models.shapes(config).items() if len(shape) == 2}
    multiplies = sum(int(size) for name, size in sizes.items() if "layers" in name)
    kv_elements = 2 * 2 * config["num_key_value_heads"] * config["head_dim"]  # keys and values of two layers
    for result in report.results:
        low, high = result.decode_range
        assert 0 < low <= result.decode_tokens_per_second <= high
        low, high = result.prefill_range
        assert 0 < low <= result.prefill_tokens_per_second <= high
        # The head is the embedding, in floats of 4 bytes; two-bit codes lie in tiles of 16 x 16.
        assert result.weight_bytes_per_token >= 4 * sizes["model.embed_tokens.weight"] + multiplies // 4
        assert result.kv_bytes_per_token % (kv_elements * (result.context + 2)) == 0
        moved = result.weight_bytes_per_token + result.kv_bytes_per_token
        scale = {1: 1, 17: 4}[result.threads]
        assert result.decode_bandwidth_share == pytest.approx(
            moved * result.decode_tokens_per_second / (BANDWIDTH * scale)
        )
        assert result.prefill_peak_share == pytest.approx(
            multiplies * result.prefill_tokens_per_second / (PEAK * scale)
        )
        for parts in (result.decode_parts, result.prefill_parts):
            assert list(parts) == ["matmul", "head", "attention", "rest"]
            assert min(parts.values()) > 0
    assert len(seen) == 16
    assert seen[-1][:2] == (8, 8)
    prompt = np.arange(24) * 7 % config["vocab_size"]
    model = TernaryModel.from_pretrained(folder)
    model.eos_ids = ()
    assert report.greedy_tokens == model.generate(prompt, max_new_tokens=16).token_ids


def test_the_machine_is_measured_before_and_after_and_the_better_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _core.simd.active_target()
    measured = []

    def measure(**asked: object) -> Machine:
        assert asked == {"threads": [1], "targets": [target]}
        machine = made_machine(target)
        factor = 4 if measured else 1  # another program took its share of the first measurement
        measured.append(replace(machine, read_bandwidth={1: BANDWIDTH * factor}, dot_peak={target: {1: PEAK / factor}}))
        return measured[-1]

    monkeypatch.setattr("ternaryforge.benchmark.measure_machine", measure)
    plan = Plan(threads=[1], prompt_tokens=[2], decode_tokens=1, repeats=1)
    report = benchmark(build_model(str(folder)), plan, model="made")
    assert len(measured) == 2
    assert report.machine.read_bandwidth == {1: BANDWIDTH * 4}
    assert report.machine.dot_peak == {target: {1: PEAK}}
    (result,) = report.results
    moved = result.weight_bytes_per_token + result.kv_bytes_per_token
    assert result.decode_bandwidth_share == pytest.approx(moved * result.decode_tokens_per_second / (BANDWIDTH * 4))


def test_models_that_choose_other_tokens_are_refused(tmp_path: Path) -> None:
    for seed in (1, 2):
        made_models.write_folder(tmp_path / str(seed), made_models.bitnet_config(), seed=seed)

    def build(threads: int) -> _core.model.Transformer:
        return build_model(str(tmp_path / str(threads)))(threads)

    target = _core.simd.active_target()
    plan = Plan(threads=[1, 2], prompt_tokens=[2], decode_tokens=1, repeats=1)
    with pytest.raises(RuntimeError, match=rf"\[bench\] {target}, 2 threads chose the tokens .* {target}, 1 threads"):
        benchmark(build, plan, model="two", machine=made_machine(target))


def test_time_is_only_counted_when_asked(folder: Path) -> None:
    transformer = TernaryModel.from_pretrained(folder, threads=1).transformer
    ids = np.arange(4, dtype=np.int32)

    def run() -> dict[str, float]:
        transformer.forward([(ids, transformer.new_sequence())])
        return transformer.part_seconds()

    assert set(run().values()) == {0}
    transformer.time_parts(on=True)
    first = run()
    second = run()
    assert all(0 < first[part] < second[part] for part in first)
    transformer.time_parts(on=False)
    assert set(run().values()) == {0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": []}, r"\[bench\] threads are numbers from 1 on, got \[\]"),
        ({"threads": [1, 0]}, r"threads are numbers from 1 on, got \[1, 0\]"),
        ({"contexts": [-1]}, "contexts are numbers from 0 on"),
        ({"prompt_tokens": [0]}, "prompt_tokens are numbers from 1 on"),
        ({"repeats": 0}, "repeats must be positive, got 32 and 0"),
        ({"decode_tokens": 0}, "repeats must be positive, got 0 and 3"),
    ],
)
def test_a_wrong_plan_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"threads": [1], **changes})


def test_a_context_that_is_too_short_is_refused(folder: Path) -> None:
    target = _core.simd.active_target()
    plan = Plan(threads=[1], contexts=[30], prompt_tokens=[20], decode_tokens=1, repeats=1)
    with pytest.raises(ValueError, match=r"\[bench\] contexts and prompts need 50 tokens, the model holds 48"):
        benchmark(build_model(str(folder)), plan, model="short", machine=made_machine(target))
    with pytest.raises(ValueError, match="no-such-target"):
        benchmark(build_model(str(folder)), Plan(threads=[1], targets=["no-such-target"]), model="short")
    assert _core.simd.active_target() == target


def test_a_shape_in_the_dense_layout_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80}
    small = made_models.bitnet_config() | heads | {"hidden_size": 320, "intermediate_size": 640}
    monkeypatch.setattr(shapes, "SHAPES", {"small": small})
    builds = {layout: build_shape("small", context_length=64, layout=layout)(1) for layout in ("t16", "t20")}
    assert [build.layout for build in builds.values()] == ["t16", "t20"]
    slots = shapes.read_shape("small").spec.slots()
    weights = sum(rows * cols for slot, (rows, cols) in slots.items() if shapes.read_shape("small").is_linear(slot))
    assert builds["t16"].weight_bytes - builds["t20"].weight_bytes == pytest.approx(weights * (2 - 1.6) / 8, rel=0.1)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="bitnet-2b-4t"):
        build_shape("bitnet-2b-5t", context_length=64)


def test_the_machine_is_measured() -> None:
    targets = _core.simd.supported_targets()
    machine = measure_machine(threads=[1, 3], targets=targets, bandwidth_bytes=1 << 16)
    assert list(machine.read_bandwidth) == [1, 3]
    assert min(machine.read_bandwidth.values()) > 0
    assert list(machine.dot_peak) == targets
    assert min(rate for rates in machine.dot_peak.values() for rate in rates.values()) > 0
    assert machine.cpu == cpu_name() != ""
    assert machine.cores >= 1
    assert machine.compiler.split()[0] in {"g++", "clang"}
    assert machine.highway.count(".") == 2
    assert _core.simd.active_target() == targets[0]


def made_zone(folder: Path, name: str, *, kind: str, energy: int) -> Path:
    zone = folder / name
    zone.mkdir()
    (zone / "name").write_text(kind + "\n")
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text("999999\n")
    return zone / "energy_uj"


def test_energy_is_that_of_the_packages_and_survives_a_counter_that_starts_again(tmp_path: Path) -> None:
    first = made_zone(tmp_path, "intel-rapl:0", kind="package-0", energy=900_000)
    second = made_zone(tmp_path, "intel-rapl:1", kind="package-1", energy=100)
    made_zone(tmp_path, "intel-rapl:0:0", kind="core", energy=5)
    meter = EnergyMeter(tmp_path)
    meter.start()
    first.write_text("400000\n")
    second.write_text("2000100\n")
    assert meter.stop() == pytest.approx(0.5 + 2.0)


def test_a_machine_that_does_not_tell_its_energy(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path)
    meter.start()
    assert meter.stop() is None
    made_zone(tmp_path, "intel-rapl:0", kind="package-0", energy=1).unlink()
    meter = EnergyMeter(tmp_path)
    meter.start()
    assert meter.stop() is None


def test_a_report_can_be_saved_and_shown(folder: Path, tmp_path: Path) -> None:
    target = _core.simd.active_target()
    plan = Plan(threads=[1], prompt_tokens=[2], decode_tokens=1, repeats=1)
    report: BenchmarkReport = benchmark(build_model(str(folder)), plan, model="made", machine=made_machine(target))
    report.save(tmp_path / "report.json")
    assert '"read_bandwidth"' in (tmp_path / "report.json").read_text()
    assert "greedy_tokens" in report._repr_html_()
    axes = report.plot().axes[0]
    assert axes.get_title() == "made"
    assert [line.get_label() for line in axes.lines] == [f"{target}, 1 threads"]
    assert axes.lines[0].get_xydata().tolist() == [[0, report.results[0].decode_tokens_per_second]]
