# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge evaluate MODEL --text FILE`: perplexity by a named protocol."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ternaryforge.cli.output import (
    ActivationsOption,
    AdapterOption,
    HeadMode,
    HeadOption,
    JsonOption,
    KvOption,
    KvType,
    SeedOption,
    ThreadsOption,
    print_json,
    print_table,
    progress_bar,
)


class ProtocolName(StrEnum):
    """Values of `--protocol`."""

    DOCUMENTS = "documents"
    WIKITEXT = "wikitext"
    LLAMA_CPP = "llama.cpp"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, org/name[@revision], or 'demo'.")],
    *,
    text: Annotated[Path, typer.Option(help="UTF-8 text; documents end with <|endoftext|>.")],
    protocol: Annotated[ProtocolName, typer.Option(help="How the text is cut and scored.")] = ProtocolName.DOCUMENTS,
    window: Annotated[int | None, typer.Option(min=4, help="Tokens seen at once; default: the protocol's.")] = None,
    max_documents: Annotated[int | None, typer.Option(min=1, help="Only the first ones, with 'documents'.")] = None,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    kv: KvOption = KvType.F32,
    head: HeadOption = HeadMode.EXACT,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Measure perplexity on a text."""
    from ternaryforge.model import TernaryModel

    del seed  # nothing here is random
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[evaluate] '{text}' is not UTF-8: {error}") from None
    loaded = TernaryModel.from_pretrained(
        model,
        threads=threads,
        activations=activations.value if activations else None,
        kv=kv.value,
        head=head.value,
        adapter=adapter,
    )
    with progress_bar("Evaluating") as progress:
        result = loaded.perplexity(
            content,
            protocol=protocol.value,
            window=window,
            max_documents=max_documents,
            progress=progress,
        )
    document = result.to_dict() | {"tasks": {}}
    if json:
        print_json(document)
        return
    print_table(
        {
            "protocol": f"{result.protocol}, windows of {result.window} tokens",
            "perplexity": f"{result.perplexity:.4f} per token",
            "nll": f"{result.nll:.4f} nats per token",
            "bits per byte": f"{result.bits_per_byte:.4f}",
            "scored": f"{result.tokens:,} tokens, {result.bytes:,} bytes",
        }
    )
