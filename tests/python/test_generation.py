# SPDX-License-Identifier: Apache-2.0
"""`TernaryModel` against the NumPy model: logits, greedy text, batches, streams, stops, wrong input."""

import json
import math
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest
from numpy_model import NumpyModel

from ternaryforge import FormatError, TernaryModel
from ternaryforge.generation import StopStrings

GROUPS = {"quant_method": "ternaryforge", "scale": "group", "group_size": 64, "activation_bits": None}
ROWS = {"quant_method": "ternaryforge", "scale": "row", "activation_bits": 8}
MULTIPLY = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
CONFIGS = {
    "llama": made_models.llama_config(),
    "llama tied": made_models.llama_config(tie_word_embeddings=True, num_key_value_heads=1, head_dim=10),
    "llama rows": made_models.llama_config(quantization_config=ROWS),
    "llama groups": made_models.llama_config(quantization_config=GROUPS, intermediate_size=164),
    "llama sixteen": made_models.llama_config(quantization_config=GROUPS | {"activation_bits": 16}),
    "bitnet divide": made_models.bitnet_config(),
    "bitnet multiply": made_models.bitnet_config(quantization_config=MULTIPLY, tie_word_embeddings=False),
}
RNG = np.random.default_rng(0)
PROMPT = RNG.integers(0, 263, 31).tolist()


@pytest.fixture
def model(tmp_path: Path) -> TernaryModel:
    made_models.write_folder(tmp_path, made_models.llama_config())
    return TernaryModel.from_pretrained(made_models.write_tokenizer(tmp_path))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_float_logits(tmp_path: Path, name: str, dtype: str) -> None:
    config = CONFIGS[name]
    tensors = made_models.make_tensors(config, dtype=dtype)
    made_models.write_folder(tmp_path, config, tensors)
    found = TernaryModel.from_pretrained(tmp_path, activations="float").logits(PROMPT)
    expected = NumpyModel(config, tensors).logits(PROMPT)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", [name for name in CONFIGS if "quantization_config" in CONFIGS[name]])
def test_int8_logits(tmp_path: Path, name: str) -> None:
    """A rounding tie can flip an activation, so whole logits agree only closely."""
    config = CONFIGS[name]
    tensors = made_models.make_tensors(config)
    made_models.write_folder(tmp_path, config, tensors)
    found = TernaryModel.from_pretrained(tmp_path, activations="int8").logits(PROMPT)
    expected = NumpyModel(config, tensors, int8=True).logits(PROMPT)
    assert np.abs(found - expected).max() <= 5e-2 * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.96


@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_what_the_checkpoint_says(tmp_path: Path, name: str) -> None:
    made_models.write_folder(tmp_path, CONFIGS[name])
    expected = "int8" if "bitnet" in name or "rows" in name else "int16" if "sixteen" in name else "float"
    assert TernaryModel.from_pretrained(tmp_path).transformer.activations == expected


@pytest.mark.parametrize("activations", ["int8", "int16", "float"])
@pytest.mark.parametrize("name", ["llama rows", "llama groups", "bitnet divide"])
def test_layouts_give_the_same_bits(tmp_path: Path, name: str, activations: Any) -> None:
    config = CONFIGS[name] | {"hidden_size": 720, "intermediate_size": 360}
    if "bitnet" in name:
        config["head_dim"] = 720 // config["num_attention_heads"]
    made_models.write_folder(tmp_path, config)
    models = [
        TernaryModel.from_pretrained(tmp_path, activations=activations, layout=layout)
        for layout in ("auto", "t16", "t20")
    ]
    assert [model.layout for model in models] == ["t16", "t16", "t20"]  # so small that nothing is measured
    expected = models[0].logits(PROMPT)
    for model in models[1:]:
        assert np.array_equal(model.logits(PROMPT), expected)
    with pytest.raises(ValueError, match="auto, t16 or t20, got 't18'"):
        TernaryModel.from_pretrained(tmp_path, layout="t18")  # type: ignore[arg-type]


def test_shards_give_the_same_bits(tmp_path: Path, model: TernaryModel) -> None:
    config = made_models.llama_config()
    folder = made_models.write_shards(tmp_path / "sharded", config, made_models.make_tensors(config))
    assert np.array_equal(TernaryModel.from_pretrained(folder).logits(PROMPT), model.logits(PROMPT))


@pytest.mark.parametrize("name", ["llama", "bitnet divide"])
def test_threads_give_the_same_bits(tmp_path: Path, name: str) -> None:
    made_models.write_folder(tmp_path, CONFIGS[name])
    logits = [TernaryModel.from_pretrained(tmp_path, threads=n).logits(PROMPT) for n in (1, 2, 3)]
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("name", ["llama", "bitnet divide", "llama groups"])
def test_greedy_tokens(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name] | {"eos_token_id": None}
    tensors = made_models.make_tensors(config, seed=3)
    made_models.write_folder(tmp_path, config, tensors)
    result = TernaryModel.from_pretrained(tmp_path, activations="float").generate(PROMPT[:5], max_new_tokens=20)
    reference = NumpyModel(config, tensors)
    assert result.token_ids == reference.greedy(PROMPT[:5], 20)
    assert (result.finish_reason, result.prompt_tokens, result.text) == ("length", 5, "")
    log_probs = reference.log_probs(PROMPT[:5] + result.token_ids)[4:-1]
    expected = log_probs[np.arange(20), result.token_ids]
    assert np.allclose(result.logprobs, expected, atol=1e-4)


def test_text_prompts_start_with_the_first_token(model: TernaryModel) -> None:
    assert model.encode("ab") == [257, 97, 98]
    as_text, as_ids = model.generate("ab"), model.generate([257, 97, 98])
    assert as_text.token_ids == as_ids.token_ids
    assert as_text.text == as_ids.text == str(as_text)


def test_a_batch_gives_what_single_prompts_give(model: TernaryModel) -> None:
    prompts = ["one", "a second, longer one", "x" * 40]
    batch = model.generate(prompts, max_new_tokens=9)
    assert [result.token_ids for result in batch] == [
        model.generate(prompt, max_new_tokens=9).token_ids for prompt in prompts
    ]
    assert [result.prompt_tokens for result in batch] == [4, 21, 41]
    sampled = model.generate(["ab"] * 3, max_new_tokens=20, temperature=2.0, seed=5)
    assert [result.token_ids for result in sampled] == [
        model.generate("ab", max_new_tokens=20, temperature=2.0, seed=5 + i).token_ids for i in range(3)
    ]
    assert sampled[0].token_ids != sampled[1].token_ids
    assert model.generate([[1, 2], [3]], max_new_tokens=1)[1].prompt_tokens == 1


def test_sampling_options(model: TernaryModel) -> None:
    greedy = model.generate("ab").token_ids
    assert model.generate("ab", temperature=3.0, do_sample=False).token_ids == greedy
    assert model.generate("ab", temperature=3.0, top_k=1).token_ids == greedy
    assert model.generate("ab", temperature=3.0, top_p=1e-6).token_ids == greedy
    assert model.generate("ab", temperature=3.0, min_p=1.0).token_ids == greedy
    sampled = model.generate("ab", do_sample=True).token_ids
    assert sampled == model.generate("ab", temperature=1.0).token_ids
    assert sampled != model.generate("ab", temperature=1.0, seed=1).token_ids
    assert model.generate("ab", repetition_penalty=1e6).token_ids[:20] != greedy[:20]


def test_the_context_ends_a_text(model: TernaryModel) -> None:
    result = model.generate(PROMPT, max_new_tokens=1000)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 48 - len(PROMPT) + 1  # the last token is not run


def test_streams_join_to_the_text(model: TernaryModel) -> None:
    for seed in range(5):
        options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 3.0, "seed": seed}
        stream = model.stream("ab", **options)
        pieces = list(stream)
        result = model.generate("ab", **options)
        assert "".join(piece.text for piece in pieces) == result.text == stream.result.text
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == result.finish_reason
        shown = [piece.token_id for piece in pieces]
        assert (shown[:-1] if result.finish_reason == "stop" else shown) == result.token_ids


def test_end_tokens(tmp_path: Path) -> None:
    """Whatever token comes third becomes an end token, by each file that may say so."""
    config = made_models.llama_config(eos_token_id=None)
    made_models.write_folder(tmp_path, config)
    ids = TernaryModel.from_pretrained(tmp_path).generate([1], max_new_tokens=9).token_ids
    position = next(i for i in range(1, 9) if ids[i] not in ids[:i])
    made_models.write_folder(tmp_path, config | {"eos_token_id": [ids[position], 9999]})
    by_config = TernaryModel.from_pretrained(tmp_path).generate([1], max_new_tokens=9)
    made_models.write_folder(tmp_path, config)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[position]}))
    by_generation_config = TernaryModel.from_pretrained(tmp_path).generate([1], max_new_tokens=9)
    for result in (by_config, by_generation_config):
        assert result.token_ids == ids[:position]
        assert result.finish_reason == "stop"


def test_end_tokens_must_be_token_ids(tmp_path: Path) -> None:
    folder = made_models.write_folder(tmp_path, made_models.llama_config())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(FormatError, match=r"generation_config.json': eos_token_id must be a token id"):
        TernaryModel.from_pretrained(folder)


def test_stop_strings(model: TernaryModel) -> None:
    whole = model.generate("ab", max_new_tokens=30, temperature=3.0).text
    assert len(whole) > 10
    for begin in (0, 3, 7):
        stop = whole[begin : begin + 3]
        stream = model.stream("ab", max_new_tokens=30, temperature=3.0, stop=["never in it", stop])
        pieces = list(stream)
        expected = whole[: whole.index(stop)]
        assert "".join(piece.text for piece in pieces) == expected == stream.result.text
        assert pieces[-1].finish_reason == "stop"
    held_to_the_end = model.generate("ab", max_new_tokens=30, temperature=3.0, stop=whole[-2:] + "and more")
    assert held_to_the_end.text == whole


def test_stop_strings_hold_back_only_what_they_must() -> None:
    stop = StopStrings(["<end>", "##"])
    assert stop.push("text <e") == "text "
    assert stop.push("lse> #") == "<else> "
    assert stop.push("1") == "#1"
    assert not stop.found
    assert stop.push(" a <end> b ## c") == " a "
    assert stop.found
    assert stop.push("more") == stop.flush() == ""
    other = StopStrings(["abab"])
    assert [other.push("aba"), other.push("c"), other.push("ab"), other.flush()] == ["", "abac", "", "ab"]


def test_result_as_a_report(model: TernaryModel, tmp_path: Path) -> None:
    result = model.generate("ab", max_new_tokens=12, temperature=3.0)
    result.save(tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert document["token_ids"] == result.token_ids
    assert document["text"] == result.text
    assert document["tokens_per_second"] > 0
    assert document["prompt_tokens_per_second"] > 0
    assert math.isfinite(sum(document["logprobs"]))
    assert "token_ids" in result._repr_html_()


def test_token_ids_work_without_a_tokenizer(tmp_path: Path) -> None:
    model = TernaryModel.from_pretrained(made_models.write_folder(tmp_path, made_models.llama_config()))
    assert model.generate(np.array([1, 2, 3]), max_new_tokens=4).text == ""
    for use in (
        lambda: model.generate("text"),
        lambda: model.generate([1], stop="x"),
        lambda: model.perplexity("text"),
    ):
        with pytest.raises(ValueError, match=r"holds neither tokenizer.json nor tokenizer.model.*token ids"):
            use()


@pytest.mark.parametrize(
    ("prompt", "options", "error", "text"),
    [
        ([], {}, ValueError, "the prompt is empty"),
        ([1] * 48, {}, ValueError, "has 48 tokens and must be shorter than the context of 48"),
        ("x" * 100, {}, ValueError, "has 101 tokens"),
        ([1, 263], {}, ValueError, r"lie in 0 .. 262, got 263"),
        ([-1], {}, ValueError, "got -1"),
        ([1.5], {}, TypeError, "flat sequence of integers"),
        (3, {}, TypeError, "a prompt is text or a sequence"),
        ("ab", {"max_new_tokens": 0}, ValueError, "max_new_tokens must be positive"),
        ("ab", {"stop": ["x", ""]}, ValueError, "a stop string must not be empty"),
        ("ab", {"seed": -1}, ValueError, "seed must lie"),
        ("ab", {"temperature": -1.0}, ValueError, "temperature"),
        ("ab", {"top_p": 1.5}, ValueError, "top_p"),
        ("ab", {"repetition_penalty": 0.0}, ValueError, "repetition_penalty"),
    ],
)
def test_wrong_requests(
    model: TernaryModel, prompt: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        model.generate(prompt, **options)


def test_an_empty_text_needs_a_first_token(tmp_path: Path) -> None:
    made_models.write_folder(tmp_path, made_models.llama_config())
    with_first = TernaryModel.from_pretrained(made_models.write_tokenizer(tmp_path))
    assert with_first.generate("", max_new_tokens=2).prompt_tokens == 1
    without = TernaryModel.from_pretrained(made_models.write_tokenizer(tmp_path, bos=False))
    with pytest.raises(ValueError, match="empty, and this tokenizer has no token that starts a text"):
        without.generate("")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    made_models.write_folder(tmp_path, made_models.llama_config(vocab_size=100))
    model = TernaryModel.from_pretrained(made_models.write_tokenizer(tmp_path))
    with pytest.raises(FormatError, match="token id 257 lies beyond the vocabulary of 100"):
        model.generate("ab")


def test_wrong_ways_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_models.write_folder(tmp_path, made_models.llama_config())
    with pytest.raises(ValueError, match="threads must be positive"):
        TernaryModel.from_pretrained(tmp_path, threads=0)
    with pytest.raises(ValueError, match="activations must be 'int8', 'int16' or 'float', got 'int4'"):
        TernaryModel.from_pretrained(tmp_path, activations="int4")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        TernaryModel.from_pretrained(tmp_path / "absent")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FormatError, match=r"has no config.json"):
        TernaryModel.from_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="'org/name@v1' is no folder here and could not be fetched"):
        TernaryModel.from_pretrained("org/name@v1")


def test_the_hub_is_asked_for_no_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_models.write_folder(tmp_path, made_models.llama_config())
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = TernaryModel.from_pretrained("org/some.name@refs/pr/1")
    assert repr(model).startswith(f"TernaryModel('{tmp_path}': LlamaForCausalLM, f32 weights, float activations")
    name, options = calls[0]
    assert (name, options["revision"]) == ("org/some.name", "refs/pr/1")
    patterns = options["allow_patterns"]
    assert {"*.safetensors", "*.json", "tokenizer.model"} <= set(patterns)
    assert not any("bin" in pattern or "pt" in pattern for pattern in patterns)


def test_which_files_of_the_hub_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    chosen: list[str] = []
    wanted = {"config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    other = {"original/consolidated.safetensors", "onnx/config.json", "pytorch_model.bin", "gguf/x.json", "asr/x.json"}
    made_models.write_folder(tmp_path, made_models.llama_config())

    def download(
        _: str, *, allow_patterns: list[str], ignore_patterns: list[str], revision: str | None, local_files_only: bool
    ) -> str:
        assert not local_files_only
        files = wanted | other
        chosen.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert revision is None
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    TernaryModel.from_pretrained("org/name")
    assert set(chosen) == wanted


def test_a_cached_revision_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--org--name"
    made_models.write_folder(cache / "snapshots" / commit, made_models.llama_config())
    (cache / "refs").mkdir()
    (cache / "refs/v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", None)  # would raise TypeError
    for revision in ("v1", commit):
        assert TernaryModel.from_pretrained(f"org/name@{revision}").path == cache / "snapshots" / commit
    with pytest.raises(OSError, match="'org/name@v2' is no folder here and could not be fetched"):
        TernaryModel.from_pretrained("org/name@v2")


def test_logits_beyond_the_context(model: TernaryModel) -> None:
    assert model.logits([5] * 48).shape == (48, 263)
    with pytest.raises(ValueError, match="at most 48 tokens fit the context, got 49"):
        model.logits([5] * 49)
