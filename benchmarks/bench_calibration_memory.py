# SPDX-License-Identifier: Apache-2.0

"""Calibrates a random checkpoint of 1.1 G parameters in bf16, by Ctrl-C in two goes, and prints the memory it took.

    python benchmarks/bench_calibration_memory.py FOLDER --blocks 2 --tokens 1024

Blocks are alike, and what one took is given back before the next: the peak of a few is that of all 16. The first go
ends by SIGINT behind `--blocks` blocks; the second goes on and ends one block later, or with the folder where all are
done. FOLDER needs 3 GB, removed at the end. Prints one JSON line; exit code 1 where the limit is passed.
"""

import argparse
import gc
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from bench_convert_memory import LAYERS, make
from tokenizers import decoders, models, pre_tokenizers

from ternaryforge.calibration import calibrate
from ternaryforge.memory import PeakAnonymous

LIMIT = 4_000_000_000
LINEARS = 7  # of a block


def write_tokenizer(folder: Path) -> None:
    """A token for every byte."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def write_text(path: Path, seed: int, documents: int, words: int) -> Path:
    """Random words of random letters."""
    random = np.random.default_rng(seed)
    letters = list("etaoinshrdlu")
    text = [" ".join("".join(random.choice(letters, 5)) for _ in range(words)) for _ in range(documents)]
    path.write_text("\n<|endoftext|>\n".join(text), encoding="utf-8")
    return path


def go(folder: Path, blocks: int, options: dict[str, Any]) -> dict[str, Any]:
    """Calibrates until so many blocks are done; what it took, and the blocks that were kept."""
    times: list[float] = []

    def step(done: int, _total: int, _name: str) -> None:
        if done % LINEARS == 1:
            times.append(time.perf_counter())
        if done > LINEARS * blocks:
            signal.raise_signal(signal.SIGINT)

    gc.collect()  # what an interrupted go has left
    finished, start = True, time.perf_counter()
    with PeakAnonymous() as memory:
        try:
            calibrate(folder / "source", folder / "out", folder / "text.txt", progress=step, **options)
        except KeyboardInterrupt:
            finished = False
    if memory.growth is None:
        raise SystemExit("this system does not tell the memory of a process")
    return {
        "peak_anonymous_bytes": memory.growth,
        "seconds": round(time.perf_counter() - start, 1),
        "block_starts": [round(begin - start, 1) for begin in times],
        "finished": finished,
        "kept_blocks": len(list((folder / ".out.calibration").glob("layer-*.npz"))),
    }


def main() -> int:
    """Exit code 1 where the limit was passed, or a go did not go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=LAYERS - 1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--descent-rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    options = {
        "tokens": arguments.tokens,
        "descent_rounds": arguments.descent_rounds,
        "threads": arguments.threads,
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        parameters = make(folder / "source")
        write_tokenizer(folder / "source")
        write_text(folder / "text.txt", 0, 200, 100)
        options["evaluation"] = write_text(folder / "evaluation.txt", 1, 1, 12)
        goes = [go(folder, blocks, options) for blocks in (arguments.blocks, arguments.blocks + 1)]
    worst = max(found["peak_anonymous_bytes"] for found in goes)
    document = {"benchmark": "calibration_memory", "parameters": parameters, **options, "blocks": arguments.blocks}
    document |= {"goes": goes, "peak_anonymous_bytes": worst}
    del document["evaluation"]
    print(json.dumps(document))
    went_on = goes[0]["kept_blocks"] == arguments.blocks and (
        goes[1]["finished"] or goes[1]["kept_blocks"] == arguments.blocks + 1
    )
    return 0 if worst <= LIMIT and went_on else 1


if __name__ == "__main__":
    sys.exit(main())
