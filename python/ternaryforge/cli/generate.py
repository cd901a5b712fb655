# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge generate MODEL --prompt TEXT`: continues a text."""

import sys
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
    MinPOption,
    RepetitionPenaltyOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    print_json,
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, org/name[@revision], or 'demo'.")],
    *,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    stop: StopOption = None,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    kv: KvOption = KvType.F32,
    head: HeadOption = HeadMode.EXACT,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Continue a text."""
    from ternaryforge.model import TernaryModel

    loaded = TernaryModel.from_pretrained(
        model,
        threads=threads,
        activations=activations.value if activations else None,
        kv=kv.value,
        head=head.value,
        adapter=adapter,
    )
    loaded.require_tokenizer()
    stream = loaded.stream(
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        seed=seed,
    )
    if not json:
        print(prompt, end="", flush=True)
    for piece in stream:
        if not json:
            print(piece.text, end="", flush=True)
    if json:
        print_json(stream.result.to_dict())
        return
    print()
    if sys.stderr.isatty():
        result = stream.result
        print(
            f"[{len(result.token_ids)} tokens, {result.tokens_per_second:.1f} per second; prompt "
            f"{result.prompt_tokens} tokens, {result.prompt_tokens_per_second:.1f} per second]",
            file=sys.stderr,
        )
