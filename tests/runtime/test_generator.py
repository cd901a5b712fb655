# SPDX-License-Identifier: Apache-2.0
"""The generation loop on a made model: batches, limits, and the distributions that the options promise."""

import numpy as np
import pytest

from ternaryforge import _core

VOCAB, CONTEXT = 23, 40
Transformer = _core.model.Transformer
Options = _core.runtime.SamplingOptions


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    layer = _core.model.LayerSpec(
        heads=3, kv_heads=1, head_dim=6, rotation=[1, 0.1, 0.01], ffn_size=20, activation="silu"
    )
    spec = _core.model.ModelSpec(
        vocab_size=VOCAB, hidden_size=12, context_length=CONTEXT, norm_epsilon=1e-5, layers=[layer], tied_head=False
    )
    random = np.random.default_rng(0)
    weights = {}
    for name, (rows, cols) in spec.slots().items():
        values = random.normal(size=(rows, cols)).astype(np.float32)
        weights[name] = _core.formats.PackedTensor("f32", rows, cols, values)
    return Transformer(spec, weights, activations="float", threads=1)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def logits_after(transformer: Transformer, tokens: np.ndarray) -> np.ndarray:
    return transformer.forward([(tokens, transformer.new_sequence())], logits="last")[0].astype(np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def run(
    transformer: Transformer,
    prompts: list[np.ndarray],
    *,
    options: list[Options] | None = None,
    max_new_tokens: int = 8,
    stop_ids: tuple[int, ...] = (),
) -> list[list[_core.runtime.GeneratedToken]]:
    generator = _core.runtime.Generator(
        transformer, prompts, options or [Options()] * len(prompts), max_new_tokens=max_new_tokens, stop_ids=stop_ids
    )
    results: list[list[_core.runtime.GeneratedToken]] = [[] for _ in prompts]
    while not generator.done:
        for token in generator.step():
            results[token.sequence].append(token)
    return results


def greedy_by_hand(transformer: Transformer, prompt: np.ndarray, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(transformer, ids(*tokens)).argmax()))
    return tokens[len(prompt) :]


def test_greedy_follows_the_largest_logit(transformer: Transformer) -> None:
    (tokens,) = run(transformer, [ids(1, 2, 3)])
    assert [t.token_id for t in tokens] == greedy_by_hand(transformer, ids(1, 2, 3), 8)
    assert [t.finish_reason for t in tokens] == [None] * 7 + ["length"]


def test_log_probabilities_are_those_of_the_model(transformer: Transformer) -> None:
    (tokens,) = run(transformer, [ids(4)], options=[Options(temperature=2.0, repetition_penalty=1.7, seed=5)])
    text = [4]
    for token in tokens:
        expected = np.log(softmax(logits_after(transformer, ids(*text))))[token.token_id]
        assert token.logprob == pytest.approx(expected, abs=1e-5)
        text.append(token.token_id)


def test_a_batch_gives_what_each_prompt_gives_alone(transformer: Transformer) -> None:
    prompts = [ids(1), ids(5, 6, 7, 8), ids(9, 10)]
    options = [Options(temperature=0.9, seed=seed) for seed in (1, 2, 3)]
    together = run(transformer, prompts, options=options)
    for prompt, option, tokens in zip(prompts, options, together, strict=True):
        (alone,) = run(transformer, [prompt], options=[option])
        assert [t.token_id for t in tokens] == [t.token_id for t in alone]
        assert [t.logprob for t in tokens] == [t.logprob for t in alone]


def test_an_end_token_ends_its_sequence_only(transformer: Transformer) -> None:
    texts = {token: greedy_by_hand(transformer, ids(token), 8) for token in range(VOCAB)}
    first, second = next((a, b) for a in texts for b in texts if texts[a][0] not in texts[b])
    end = texts[first][0]
    one, two = run(transformer, [ids(first), ids(second)], stop_ids=(end,))
    assert [(t.token_id, t.finish_reason) for t in one] == [(end, "stop")]
    assert [t.token_id for t in two] == texts[second]


def test_a_full_context_ends_the_text(transformer: Transformer) -> None:
    prompt = ids(*([3] * (CONTEXT - 2)))
    (tokens,) = run(transformer, [prompt], max_new_tokens=100)
    assert [t.finish_reason for t in tokens] == [None, None, "length"]


def test_a_sequence_can_be_stopped(transformer: Transformer) -> None:
    generator = _core.runtime.Generator(transformer, [ids(1), ids(2)], [Options()] * 2, max_new_tokens=5, stop_ids=[])
    generator.stop(0)
    seen = []
    while not generator.done:
        seen += [token.sequence for token in generator.step()]
    assert seen == [1] * 5


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.2, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.8},
    ],
)
def test_samples_follow_the_distribution_of_the_options(transformer: Transformer, keywords: dict[str, float]) -> None:
    """Frequencies within five standard deviations (and two counts, for rare tokens); nothing outside what is kept."""
    prompt, count = ids(7, 8, 7), 3000
    logits = logits_after(transformer, prompt)
    penalty = keywords.get("repetition_penalty", 1.0)
    for token in set(prompt.tolist()):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    logits /= keywords["temperature"]
    order = np.argsort(-logits)
    keep = np.ones(VOCAB, bool)
    keep[order[int(keywords.get("top_k", VOCAB)) :]] = False
    weights = softmax(np.where(keep, logits, -np.inf))
    before = np.cumsum(weights[order]) - weights[order]
    keep[order[before >= keywords.get("top_p", 1.0)]] = False
    weights = softmax(np.where(keep, logits, -np.inf))
    keep &= weights >= keywords.get("min_p", 0.0) * weights.max()
    expected = softmax(np.where(keep, logits, -np.inf))

    options = [Options(seed=seed, **keywords) for seed in range(count)]
    results = run(transformer, [prompt] * count, options=options, max_new_tokens=1)
    frequency = np.bincount([tokens[0].token_id for tokens in results], minlength=VOCAB) / count
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert not frequency[~keep].any()
    assert (np.abs(frequency - expected) <= 5 * deviation + 2 / count).all()


def test_the_same_seed_gives_the_same_text(transformer: Transformer) -> None:
    texts = [
        [t.token_id for t in run(transformer, [ids(1)], options=[Options(temperature=1.5, seed=seed)])[0]]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_scores_are_the_log_probabilities_of_the_text(transformer: Transformer) -> None:
    tokens = np.random.default_rng(2).integers(0, VOCAB, CONTEXT).astype(np.int32)
    scores = _core.runtime.score(transformer, tokens)
    expected = [np.log(softmax(logits_after(transformer, tokens[:i])))[tokens[i]] for i in range(1, CONTEXT)]
    np.testing.assert_allclose(scores, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_options_out_of_range_are_refused(keywords: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**keywords)


def test_prompts_that_cannot_run_are_refused(transformer: Transformer) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        run(transformer, [ids()])
    with pytest.raises(ValueError, match="shorter than the context of 40 tokens, got 40"):
        run(transformer, [ids(*([1] * CONTEXT))])
    with pytest.raises(ValueError, match=r"0 \.\. 22, got 23"):
        run(transformer, [ids(VOCAB)])
    with pytest.raises(ValueError, match=r"0 \.\. 22, got -1"):
        _core.runtime.score(transformer, ids(1, -1))


def test_sequences_roll_back(transformer: Transformer) -> None:
    state = transformer.new_sequence()
    whole = transformer.forward([(ids(1, 2, 3, 4, 5), state)], logits="all")
    assert state.length == 5
    state.truncate(2)
    again = transformer.forward([(ids(3, 4, 5), state)], logits="all")
    np.testing.assert_array_equal(again, whole[2:])
    with pytest.raises(ValueError, match="cannot go back to 9 tokens"):
        state.truncate(9)


def test_a_batch_that_cannot_run_changes_nothing(transformer: Transformer) -> None:
    state = transformer.new_sequence()
    transformer.forward([(ids(1, 2), state)], logits="none")
    for batch, message in (
        ([(ids(1), state), (ids(2), state)], "only once"),
        ([(ids(), state)], "at least one new token"),
        ([(ids(99), state)], "got 99"),
        ([(ids(*([1] * CONTEXT)), state)], "context holds 40"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer.forward(batch)
        assert state.length == 2
