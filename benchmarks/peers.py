# SPDX-License-Identifier: Apache-2.0
"""Runs the same shape here, in llama.cpp, and in other engines, taking turns; prints the ratios.

Usage: python benchmarks/peers.py [--shape bitnet-2b-4t] [--threads 2] [--context 0] [--measure decode,prefill]
           [--types TQ2_0,I2_S,IQ2_BN-repacked] [--bitnet LLAMA_BENCH] [--ik LLAMA_BENCH] [--targets avx512-vnni,avx2]
           [--head int6] [--kv f16] [--prompt-tokens 128] [--tokens 24] [--rounds 5] [--seconds 60]
           [--folder FOLDER] [--output FILE.json]

Needs the gguf package, and llama-cpp-python built for this machine (CMAKE_ARGS=-DGGML_NATIVE=ON).
LLAMA_BENCH is the program of that name of a build of bitnet.cpp or ik_llama.cpp: I2_S runs in the
first, IQ2_BN, IQ2_BN-repacked (all matrices, as they are loaded) and IQ2_BN_R4 in the second. TYPES
are TQ2_0 and all of the programs that are named, if not told otherwise. Files have random codes and
a Q6_K head and are kept in FOLDER (a temporary one by default); here the head has 6 bits, and keys
and values 16, as in the others. A turn is TOKENS decoded tokens, and one prompt; turns stop after
ROUNDS rounds, or when SECONDS have passed and each engine has had two. Figures are medians over all
turns. A run is added to those that FILE.json already holds.
"""

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from peer_files import LAYOUTS, write_gguf

from ternaryforge import _core
from ternaryforge.benchmark import build_shape
from ternaryforge.machine import measure_machine

MEASURES = ("decode", "prefill")


@dataclass
class Turns:
    """Rates of one engine so far, in tokens per second."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Median and extremes of what was measured."""
        return {
            name: value
            for measure in MEASURES
            if (rates := getattr(self, measure))
            for name, value in (
                (f"{measure}_tokens_per_second", statistics.median(rates)),
                (f"{measure}_range", [min(rates), max(rates)]),
            )
        }


class Engine:
    """Tokens in, likeliest next token out: what runs in this process."""

    vocab_size: int

    def forward(self, ids: NDArray[np.int32]) -> int:
        """Appends tokens; returns the likeliest next one."""
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        """Rolls back to the first tokens."""
        raise NotImplementedError

    def prepare(self, options: argparse.Namespace) -> None:
        """Warms up, as llama-bench does, and fills the context."""
        if "prefill" in options.measure:
            self.forward(prompt(options.prompt_tokens))
            self.truncate(0)
        if options.context:
            self.forward(prompt(options.context))
        self.decode(options, 3)

    def decode(self, options: argparse.Namespace, count: int) -> float:
        """Tokens per second of `count` greedy tokens after the context: the median."""
        seconds = []
        token = 1
        for _ in range(count):
            start = time.perf_counter()
            token = self.forward(np.array([token], np.int32))
            seconds.append(time.perf_counter() - start)
        self.truncate(options.context)
        return 1 / statistics.median(seconds)

    def turn(self, options: argparse.Namespace, turns: Turns) -> None:
        """One turn."""
        if "decode" in options.measure:
            turns.decode.append(self.decode(options, options.tokens))
        if "prefill" in options.measure:
            start = time.perf_counter()
            self.forward(prompt(options.prompt_tokens))
            turns.prefill.append(options.prompt_tokens / (time.perf_counter() - start))
            self.truncate(options.context)


class Ours(Engine):
    """The shape in this package, on one target."""

    def __init__(self, transformer: _core.model.Transformer, target: str) -> None:
        self.transformer, self.target = transformer, target
        self.state = transformer.new_sequence()

    def forward(self, ids: NDArray[np.int32]) -> int:
        """Runs the transformer."""
        _core.simd.use_target(self.target)
        return self.transformer.likeliest_tokens([(ids, self.state)])[0]

    def truncate(self, length: int) -> None:
        """Drops blocks of the cache."""
        self.state.truncate(length)


class LlamaCpp(Engine):
    """A file in llama.cpp, one sequence, keys and values in f16; its other defaults."""

    def __init__(self, path: Path, *, threads: int, context_length: int) -> None:
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"[peers] llama.cpp cannot load '{path}'")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context_length
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def forward(self, ids: NDArray[np.int32]) -> int:
        """Decodes batches of 512."""
        for begin in range(0, len(ids), 512):
            part = np.ascontiguousarray(ids[begin : begin + 512])
            pointer = part.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
            if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(pointer, len(part))) != 0:
                raise SystemExit("[peers] llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def truncate(self, length: int) -> None:
        """Drops cells of the cache."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), 0, length, -1)


class Bench:
    """A file in the llama-bench of another engine: one process a turn, which warms up by itself."""

    def __init__(self, program: Path, path: Path, *, threads: int, extra: list[str]) -> None:
        self.command = [str(program), "-m", str(path), "-t", str(threads), "-r", "2", "-o", "json", *extra]

    def prepare(self, options: argparse.Namespace) -> None:
        """Refuses what the program cannot measure."""
        if options.context:
            raise SystemExit("[peers] llama-bench decodes without a context; leave --bitnet and --ik out")

    def turn(self, options: argparse.Namespace, turns: Turns) -> None:
        """Two repetitions of each measure."""
        if "decode" in options.measure:
            turns.decode += self._run(["-p", "0", "-n", str(options.tokens)])
        if "prefill" in options.measure:
            turns.prefill += self._run(["-p", str(options.prompt_tokens), "-n", "0"])

    def _run(self, arguments: list[str]) -> list[float]:
        command = [*self.command, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        try:
            # ik_llama.cpp prints other lines around the document.
            (result,) = json.loads(done.stdout[done.stdout.index("[\n") : done.stdout.rindex("]") + 1])
            return [float(rate) for rate in result["samples_ts"]]
        except (ValueError, KeyError):
            raise SystemExit(f"[peers] {command} failed: {done.stdout}{done.stderr[-2000:]}") from None


def prompt(count: int) -> NDArray[np.int32]:
    """Always the same tokens."""
    return np.random.default_rng(0).integers(0, 32000, count).astype(np.int32)


def open_engines(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All engines that were asked for, by name; ours first."""
    context_length = options.context + max(options.prompt_tokens, options.tokens) + 64
    build = build_shape(options.shape, context_length=context_length, head=options.head, kv=options.kv)
    engines: dict[str, Any] = {}
    for target in options.targets:  # each chooses its layout
        _core.simd.use_target(target)
        name = f"ternaryforge {target}" if len(options.targets) > 1 else "ternaryforge"
        engines[name] = Ours(build(options.threads), target)
    programs = {"bitnet.cpp": options.bitnet, "ik_llama.cpp": options.ik}
    for kind in options.types:
        layout, _, repacked = kind.partition("-")
        engine = LAYOUTS[layout].engine
        path = folder / f"{options.shape}-{layout}.gguf"
        if not path.exists():
            write_gguf(path, options.shape, layout)
        if engine == "llama.cpp":
            engines[f"{engine} {kind}"] = LlamaCpp(path, threads=options.threads, context_length=context_length)
        else:
            extra = ["-rtr", "1"] if repacked else []
            engines[f"{engine} {kind}"] = Bench(programs[engine], path, threads=options.threads, extra=extra)
    return engines


def take_turns(engines: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rates of every engine, and the ratios of ours to it; the best of ours where targets are several."""
    turns = {name: Turns() for name in engines}
    start = time.perf_counter()
    for turn in range(options.rounds):
        for name, engine in engines.items():
            engine.turn(options, turns[name])
        if turn >= 1 and time.perf_counter() - start > options.seconds:
            break
    found = {name: taken.to_dict() for name, taken in turns.items()}
    results = []
    for name, rates in found.items():
        result = {"engine": name, **rates}
        for measure in options.measure:
            rate = f"{measure}_tokens_per_second"
            ours = {peer: found[peer][rate] / rates[rate] for peer in found if peer.startswith("ternaryforge")}
            result[f"{measure}_ratio"] = ours if len(options.targets) > 1 else ours["ternaryforge"]
        results.append(result)
    return results


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The same shape here and in other engines.")
    parser.add_argument("--shape", default="bitnet-2b-4t")
    parser.add_argument("--threads", type=int, default=_core.parallel.default_threads())
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--measure", type=lambda text: text.split(","), default=list(MEASURES))
    parser.add_argument("--types", type=lambda text: text.split(","))
    parser.add_argument("--targets", type=lambda text: text.split(","), default=[_core.simd.active_target()])
    parser.add_argument("--head", choices=["exact", "int8", "int6", "int4"], default="int6")
    parser.add_argument("--kv", choices=["f32", "f16", "int8"], default="f16")
    parser.add_argument("--bitnet", type=Path)
    parser.add_argument("--ik", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not options.measure or set(options.measure) - set(MEASURES):
        parser.error(f"--measure is some of {','.join(MEASURES)}")
    allowed = ["TQ2_0", "TQ1_0"]
    allowed += ["I2_S"] if options.bitnet else []
    allowed += ["IQ2_BN", "IQ2_BN-repacked", "IQ2_BN_R4"] if options.ik else []
    if options.types is None:
        options.types = [kind for kind in allowed if kind != "TQ1_0"]
    if set(options.types) - set(allowed):
        parser.error(f"--types are some of {','.join(allowed)}; I2_S needs --bitnet, IQ2_BN --ik")
    return options


def main() -> int:
    """Prints one line per engine and, last, one JSON document."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        engines = open_engines(options, folder)
        for engine in engines.values():
            engine.prepare(options)
        machine = measure_machine(threads=[options.threads], targets=options.targets)
        results = take_turns(engines, options)
    for result in results:
        print(json.dumps(result), flush=True)
    ours = next(engine for engine in engines.values() if isinstance(engine, Ours)).transformer
    run = {
        "shape": options.shape,
        "threads": options.threads,
        "context": options.context,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "layouts": {name: engine.transformer.layout for name, engine in engines.items() if isinstance(engine, Ours)},
        "head": ours.head,
        "kv": ours.kv,
        "weight_bytes_per_token": ours.token_bytes,
        "kv_bytes_per_token": ours.kv_bytes_per_token * options.context,
        "results": results,
        "llama_cpp_python": llama_cpp.__version__,
        "llama_cpp_system": re.sub(r"\s+", " ", llama_cpp.llama_print_system_info().decode()),
        "machine": machine.to_dict(),
    }
    if options.output:
        runs = json.loads(options.output.read_text(encoding="utf-8"))["runs"] if options.output.exists() else []
        document = {"benchmark": "peers", "runs": [*runs, run]}
        options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
