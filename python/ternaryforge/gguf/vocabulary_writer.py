# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint folder as the metadata of a GGUF file."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ternaryforge._core import FormatError
from ternaryforge.chat_template import DEFAULT, ChatTemplate
from ternaryforge.gguf.pre_tokenizers import PRE_TOKENIZERS, find_pre_tokenizer, recognise
from ternaryforge.gguf.vocabulary import PREFIX, TEMPLATE, Vocabulary
from ternaryforge.sentencepiece_model import SPACE, PieceType, SentencePieceModel
from ternaryforge.tokenizer import MODEL_FILE, Tokenizer

Entry = tuple[str, Any, str]
"""Key, value, and type as the core's writer names it."""

_TURN_END = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eot|>")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LAST_SCORE = -1e9  # of pieces that no merge makes, as SentencePiece's own files give runs of spaces


def describe_tokenizer(
    folder: Path, tokenizer: Tokenizer, *, vocab_size: int, eos_ids: Sequence[int], pre: str | None = None
) -> Vocabulary:
    """The vocabulary of the tokenizer in a folder, filled up to `vocab_size` with unused tokens.

    `eos_ids` are the end tokens of the configuration. `pre` names the way to cut text where it is
    not recognised. Raises FormatError for a tokenizer that no engine would read.
    """
    where = str(folder)
    if tokenizer.kind == "sentencepiece":
        vocabulary = _from_sentencepiece(SentencePieceModel.read(folder / MODEL_FILE), where)
    else:
        description = json.loads(tokenizer.backend.to_str())
        if description["model"].get("type") != "BPE":
            raise _error(where, f"the tokenizer is a {description['model'].get('type')} model; only BPE can be written")
        if description["model"].get("byte_fallback"):
            vocabulary = _from_byte_fallback(description, where)
        else:
            vocabulary = _from_byte_level(tokenizer, description, where, pre)
    _fill(vocabulary, vocab_size, where)
    for name, content in tokenizer.named_tokens.items():
        if content in vocabulary.tokens:
            vocabulary.ids[name] = vocabulary.tokens.index(content)
    if tokenizer.bos_id is not None:
        vocabulary.ids["bos_token"] = tokenizer.bos_id
    ends = [index for index in dict.fromkeys([*eos_ids, *tokenizer.eos_ids]) if index < vocab_size]
    if ends and "eos_token" not in vocabulary.ids:
        vocabulary.ids["eos_token"] = ends[0]
    template = ChatTemplate.from_folder(folder)
    if template is not None:
        vocabulary.templates.update(template.sources)
    return dataclasses.replace(vocabulary, adds_bos=tokenizer.bos_id is not None, end_ids=tuple(ends))


def vocabulary_entries(vocabulary: Vocabulary) -> list[Entry]:
    """The keys of a vocabulary."""
    entries: list[Entry] = [
        (PREFIX + "model", vocabulary.kind, "string"),
        (PREFIX + "pre", vocabulary.pre, "string"),
        (PREFIX + "tokens", vocabulary.tokens, "array[string]"),
    ]
    if vocabulary.kind == "llama":
        entries.append((PREFIX + "scores", vocabulary.scores, "array[float32]"))
    entries.append((PREFIX + "token_type", [int(kind) for kind in vocabulary.types], "array[int32]"))
    if vocabulary.kind == "gpt2":
        entries.append((PREFIX + "merges", vocabulary.merges, "array[string]"))
    keys = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "sep_token": "seperator_token_id",
        "pad_token": "padding_token_id",
    }
    entries += [(PREFIX + key, vocabulary.ids[name], "uint32") for name, key in keys.items() if name in vocabulary.ids]
    turn_end = [index for index in vocabulary.end_ids if index != vocabulary.ids.get("eos_token")]
    turn_end.sort(key=lambda index: vocabulary.tokens[index] not in _TURN_END)
    if turn_end:
        entries.append((PREFIX + "eot_token_id", turn_end[0], "uint32"))
    entries += [
        (PREFIX + "add_bos_token", bool(vocabulary.adds_bos), "bool"),
        (PREFIX + "add_eos_token", False, "bool"),
    ]
    if vocabulary.kind == "llama":
        entries.append((PREFIX + "add_space_prefix", vocabulary.space_prefix, "bool"))
    names = [name for name in vocabulary.templates if name != DEFAULT]
    if names:
        entries.append(("tokenizer.chat_templates", names, "array[string]"))
        entries += [(f"{TEMPLATE}.{name}", vocabulary.templates[name], "string") for name in names]
    if DEFAULT in vocabulary.templates:
        entries.append((TEMPLATE, vocabulary.templates[DEFAULT], "string"))
    return entries


def _from_sentencepiece(model: SentencePieceModel, where: str) -> Vocabulary:
    if not model.is_bpe:
        raise _error(where, "tokenizer.model is a unigram model, which GGUF's 'llama' cannot hold")
    warnings = []
    if model.remove_extra_whitespaces or model.character_map:
        warnings.append(
            "The model's tokenizer normalises text (characters or spaces), which engines do not do for GGUF's 'llama'."
        )
    ids = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unknown_id}
    return Vocabulary(
        kind="llama",
        pre="default",
        tokens=list(model.pieces),
        types=list(model.types),
        merges=[],
        scores=list(model.scores),
        ids={name: index for name, index in ids.items() if index is not None},
        end_ids=(),
        adds_bos=None,
        adds_eos=False,
        space_prefix=model.add_dummy_prefix,
        templates={},
        warnings=warnings,
    )


def _from_byte_fallback(description: dict[str, Any], where: str) -> Vocabulary:
    """A tokenizer.json that was made from a SentencePiece model: its scores follow from the order of its merges."""
    model = description["model"]
    steps = _steps(description["normalizer"], "normalizers")
    kinds = [step["type"] for step in steps]
    replaces = [step for step in steps if step["type"] == "Replace"]
    if kinds not in (["Prepend", "Replace"], ["Replace"]) or replaces[0].get("content") != SPACE:
        raise _error(where, f"the normalizer {kinds or None} of tokenizer.json is none that GGUF's 'llama' stands for")
    if description["pre_tokenizer"] is not None:
        raise _error(where, "tokenizer.json cuts text before its merges, which GGUF's 'llama' cannot do")
    tokens = _by_id(model["vocab"], where)
    first: dict[str, int] = {}
    for rank, merge in enumerate(_pairs(model["merges"])):
        first.setdefault("".join(merge), rank)
    scores = [-float(first[token]) if token in first else _LAST_SCORE for token in tokens]
    # Single characters come after all merged pieces, in the order of their ids.
    for index, token in enumerate(tokens):
        if token not in first and len(token) == 1:
            scores[index] = -float(len(model["merges"]) + index)
    types = [PieceType.BYTE if _BYTE.fullmatch(token) else PieceType.NORMAL for token in tokens]
    scores = [0.0 if kind is PieceType.BYTE else score for kind, score in zip(types, scores, strict=True)]
    unknown = model.get("unk_token")
    vocabulary = Vocabulary(
        kind="llama",
        pre="default",
        tokens=tokens,
        types=types,
        merges=[],
        scores=scores,
        ids={"unk_token": tokens.index(unknown)} if unknown in tokens else {},
        end_ids=(),
        adds_bos=None,
        adds_eos=False,
        space_prefix=kinds[0] == "Prepend",
        templates={},
    )
    _add(vocabulary, description["added_tokens"], where)
    if unknown in tokens:
        vocabulary.types[tokens.index(unknown)] = PieceType.UNKNOWN
    return vocabulary


def _from_byte_level(tokenizer: Tokenizer, description: dict[str, Any], where: str, pre: str | None) -> Vocabulary:
    model = description["model"]
    normalizers = [step["type"] for step in _steps(description["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise _error(where, f"the tokenizer normalises text with {', '.join(normalizers)}, which no GGUF file can say")
    if any(step.get("add_prefix_space") for step in _steps(description["pre_tokenizer"], "pretokenizers")):
        raise _error(where, "the tokenizer puts a space in front of every text, which GGUF's 'gpt2' cannot do")
    name = pre or recognise(tokenizer.backend, ignore_merges=bool(model.get("ignore_merges")))
    if name is None or find_pre_tokenizer(name) is None:
        names = ", ".join(known.names[0] for known in PRE_TOKENIZERS)
        raise _error(
            where,
            f"how the tokenizer cuts text has no name that engines know{f' ({pre!r:.40} is none)' if pre else ''}; "
            f"name the closest with tokenizer_pre: {names}",
        )
    tokens = _by_id(model["vocab"], where)
    vocabulary = Vocabulary(
        kind="gpt2",
        pre=name,
        tokens=tokens,
        types=[PieceType.NORMAL] * len(tokens),
        # The two parts are told apart by the first space, so that one within is written in the byte alphabet.
        merges=[" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _pairs(model["merges"])],
        scores=[],
        ids={},
        end_ids=(),
        adds_bos=None,
        adds_eos=False,
        space_prefix=False,
        templates={},
    )
    if not vocabulary.merges:
        raise _error(where, "the tokenizer has no merges; engines refuse such a file")
    _add(vocabulary, description["added_tokens"], where)
    return vocabulary


def _add(vocabulary: Vocabulary, added: list[dict[str, Any]], where: str) -> None:
    """Added tokens by id; those between the vocabulary and them that nothing names are filled in."""
    for token in sorted(added, key=lambda token: int(token["id"])):
        index, content = token["id"], token["content"]
        while len(vocabulary.tokens) < index:
            _append(vocabulary, f"[PAD{len(vocabulary.tokens)}]", PieceType.UNUSED)
        kind = PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED
        if len(vocabulary.tokens) == index:
            _append(vocabulary, content, kind)
        elif vocabulary.tokens[index] != content:
            raise _error(where, f"the tokens {vocabulary.tokens[index]!r:.40} and {content!r:.40} have the same id")
        vocabulary.types[index] = kind


def _append(vocabulary: Vocabulary, token: str, kind: PieceType) -> None:
    vocabulary.tokens.append(token)
    vocabulary.types.append(kind)
    if vocabulary.kind == "llama":
        vocabulary.scores.append(-1000.0)


def _fill(vocabulary: Vocabulary, vocab_size: int, where: str) -> None:
    """Engines want a token for every row of the embedding, and no two with the same text."""
    if len(vocabulary.tokens) > vocab_size:
        raise _error(where, f"the tokenizer has {len(vocabulary.tokens)} tokens, the embedding {vocab_size} rows")
    while len(vocabulary.tokens) < vocab_size:
        _append(vocabulary, f"[PAD{len(vocabulary.tokens)}]", PieceType.UNUSED)
    if len(set(vocabulary.tokens)) != vocab_size:
        raise _error(where, "two tokens have the same text, which engines do not survive")


def _by_id(vocab: dict[str, int], where: str) -> list[str]:
    tokens = sorted(vocab, key=lambda token: vocab[token])
    holes = [index for index, token in enumerate(tokens) if vocab[token] != index]
    if holes:
        raise _error(where, f"the vocabulary of the tokenizer has no token {holes[0]}, or it has it twice")
    return tokens


def _pairs(merges: list[Any]) -> list[list[str]]:
    """Old files join the two parts with a space."""
    return [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in merges]


def _steps(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]


def _error(where: str, text: str) -> FormatError:
    return FormatError(f"[export] '{where}': {text}")
