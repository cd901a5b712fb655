# SPDX-License-Identifier: Apache-2.0
"""Models that are one file: GGUF and `.1bit`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ternaryforge import _core
from ternaryforge.chat_template import ChatTemplate
from ternaryforge.families import Architecture
from ternaryforge.gguf.reading import GgufSource, first_part, is_gguf, with_quantization
from ternaryforge.onebit import read_onebit
from ternaryforge.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """All that makes a model. `activations`: what the file was made for, None where its quantisation tells."""

    architecture: Architecture
    weights: dict[str, _core.formats.PackedTensor]
    tokenizer: Tokenizer | None
    eos_ids: Sequence[int]
    activations: Literal["int8", "float"] | None = None
    chat_template: ChatTemplate | None = None


def load_file(path: Path, *, threads: int) -> LoadedModel | None:
    """The model of a GGUF or `.1bit` file, None for anything else. Raises FormatError and OSError."""
    if path.suffix == ".1bit":
        file = read_onebit(path)
        return LoadedModel(
            architecture=file.architecture,
            weights={slot: tensor.packed() for slot, tensor in file.tensors.items()},
            tokenizer=file.tokenizer,
            eos_ids=file.architecture.eos_ids,
            activations=file.activations,
        )
    if not is_gguf(path):
        return None
    source = GgufSource.open(first_part(path))
    weights, quantization = source.load(threads=threads)
    tokenizer, template = source.tokenizer(), None
    if tokenizer is not None and source.vocabulary is not None and source.vocabulary.templates:
        template = ChatTemplate(source.vocabulary.templates, where=str(path), special_tokens=tokenizer.named_tokens)
    return LoadedModel(
        architecture=with_quantization(source.architecture, quantization),
        weights=weights,
        tokenizer=tokenizer,
        eos_ids=source.eos_ids,
        chat_template=template,
    )
