# SPDX-License-Identifier: Apache-2.0
"""`TernaryModel`: a checkpoint folder ready to generate, to score and to be looked at."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, Unpack, cast, get_args, overload

import numpy as np
from numpy.typing import NDArray

from ternaryforge import _core
from ternaryforge._core import FormatError
from ternaryforge.adapters import load_adapter
from ternaryforge.chat_template import TURN_ENDS, ChatTemplate, Message
from ternaryforge.checkpoint import Checkpoint
from ternaryforge.end_tokens import find_eos_ids
from ternaryforge.evaluation import EvaluationResult, Protocol, evaluate
from ternaryforge.families import Architecture, read_architecture
from ternaryforge.generation import Generation, GenerationOptions, GenerationResult, PieceStream
from ternaryforge.model_files import LoadedModel, load_file
from ternaryforge.quantization import Quantization
from ternaryforge.sources import find_source
from ternaryforge.tokenizer import Tokenizer
from ternaryforge.weights import load_weights

Activations = Literal["int8", "int16", "float"]
KvType = Literal["f32", "f16", "int8"]
HeadMode = Literal["exact", "int8", "int6", "int4", "two-stage"]
Layout = Literal["auto", "t16", "t20"]
Prompt = str | Sequence[int] | NDArray[np.integer[Any]]


class TernaryModel:
    """A language model on the CPU. Make one with `from_pretrained` or `demo`.

    `architecture` is what config.json says, `tokenizer` is None where the folder holds none,
    `transformer` is the compiled model, `path` the folder it came from, `adapter` the source of the
    LoRA adapter that it runs with, or None.
    """

    def __init__(
        self,
        *,
        path: Path,
        architecture: Architecture,
        transformer: _core.model.Transformer,
        tokenizer: Tokenizer | None,
        eos_ids: Sequence[int],
        adapter: str | None = None,
    ) -> None:
        self.path = path
        self.architecture = architecture
        self.transformer = transformer
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.adapter = adapter

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        threads: int | None = None,
        activations: Activations | None = None,
        kv: KvType = "f32",
        head: HeadMode = "exact",
        layout: Layout = "auto",
        adapter: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Loads a folder, a GGUF or `.1bit` file, `org/name[@revision]` of the Hugging Face hub, or `"demo"`.

        `threads`: None takes the physical cores that this process may use. `activations`: "int8",
        "int16" or "float"; None does what the checkpoint says (float for dense weights). `kv`: how keys and
        values are remembered, "f32", "f16" or "int8", 4, 2 and about 1 byte a number
        (`transformer.kv_bytes_per_token`). `head`: how logits are made; "exact" multiplies the head
        as it is stored, "int8", "int6" and "int4" quantize a floating-point head when it is loaded,
        and "two-stage" chooses the tokens of the exact head, greedily or with `top_k`, at about the
        cost of "int6" (`transformer.head` says "exact" where it does not apply: docs/design/0009-head.md).
        `layout` of ternary weights in memory: "t16" (2 bits), "t20" (1.6 bits), or what a short
        measurement finds faster; the results are the same. `adapter`: a LoRA adapter as PEFT saves it,
        in a folder or on the hub, to run beside the folder of a checkpoint. Raises FormatError for what
        is malformed, not supported or does not fit, ValueError for a head that cannot be quantized,
        OSError where it cannot be read.
        """
        if threads is not None and threads < 1:
            raise ValueError(f"[load] threads must be positive, got {threads}")
        if activations not in (None, "int8", "int16", "float"):
            raise ValueError(f"[load] activations must be 'int8', 'int16' or 'float', got {activations!r}")
        if kv not in ("f32", "f16", "int8"):
            raise ValueError(f"[load] kv must be 'f32', 'f16' or 'int8', got {kv!r}")
        if head not in get_args(HeadMode):
            raise ValueError(f"[load] head must be one of {', '.join(get_args(HeadMode))}, got {head!r}")
        path = find_source(source)
        if adapter is not None and path.is_file():
            raise ValueError(f"[load] an adapter runs beside the folder of a checkpoint, and '{path}' is a file")
        threads = threads or _core.parallel.default_threads()
        loaded = load_file(path, threads=threads) or _load_folder(path)
        transformer = _core.model.Transformer(
            loaded.architecture.spec,
            loaded.weights,
            activations=activations or loaded.activations or default_activations(loaded.architecture.quantization),
            kv=kv,
            head=head,
            threads=threads,
            layout=layout,
            adapters={} if adapter is None else load_adapter(find_source(adapter), loaded.architecture),
        )
        model = cls(
            path=path,
            architecture=loaded.architecture,
            transformer=transformer,
            tokenizer=loaded.tokenizer,
            eos_ids=loaded.eos_ids,
            adapter=None if adapter is None else os.fspath(adapter),
        )
        if loaded.chat_template is not None:
            model.chat_template = loaded.chat_template
        return model

    @classmethod
    def demo(
        cls,
        *,
        threads: int | None = None,
        activations: Activations | None = None,
        kv: KvType = "f32",
        head: HeadMode = "exact",
    ) -> Self:
        """The small embedded model, which tells stories and needs no network."""
        return cls.from_pretrained("demo", threads=threads, activations=activations, kv=kv, head=head)

    def __repr__(self) -> str:
        adapter = "" if self.adapter is None else f"adapter '{self.adapter}', "
        return (
            f"TernaryModel('{self.path}': {self.architecture.architecture}, {self.layout} weights, {adapter}"
            f"{self.transformer.activations} activations, {self.transformer.threads} threads)"
        )

    @property
    def layout(self) -> str:
        """How the layers' matrices lie in memory, such as "t16" or "t20"."""
        return self.transformer.layout

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and continuation together."""
        return self.architecture.spec.context_length

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        stop: str | Sequence[str] = ...,
        seed: int = ...,
        do_sample: bool | None = ...,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[NDArray[np.integer[Any]]],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        stop: str | Sequence[str] = ...,
        seed: int = ...,
        do_sample: bool | None = ...,
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        do_sample: bool | None = None,
    ) -> GenerationResult | list[GenerationResult]:
        """Continues a prompt (text or token ids), or several in one batch.

        Greedy at temperature 0, the default; `do_sample=True` without a temperature means 1,
        `do_sample=False` means greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. Prompt `i` of a
        batch is sampled with `seed + i`, so results do not depend on what else is in the batch.
        Ends at an end token, before any of the `stop` strings, after `max_new_tokens`, or at the
        end of the context. Raises ValueError for an empty prompt and for one that leaves no room
        in the context.
        """
        batch = _is_batch(prompt)
        generation = self._start(
            cast("list[Prompt]", list(prompt) if batch else [prompt]),
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling={
                "temperature": _temperature(temperature, do_sample=do_sample),
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
            },
            seed=seed,
        )
        for _ in generation:
            pass
        results = generation.results()
        return results if batch else results[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        do_sample: bool | None = None,
    ) -> PieceStream:
        """`generate` for one prompt, token by token; the texts of the pieces join to its text.

        The stream is an iterator of `Piece`; its `result` is the `GenerationResult` so far.
        """
        return self._stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            do_sample=do_sample,
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Answers a conversation, written as the model's chat template wants it.

        `messages` are dicts with `role` and `content`, `tools` JSON schemas, `options` those of
        `generate`. `add_generation_prompt=False` continues the text as it ends.
        `template_variables` are what else the template knows, such as `enable_thinking`. An answer
        also ends at the tokens that end a turn. Raises ValueError for a model without a template,
        and ChatTemplateError, a ValueError, where the template refuses the messages.
        """
        stream = self.stream_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_variables=template_variables,
            **options,
        )
        for _ in stream:
            pass
        return stream.result

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> PieceStream:
        """`chat`, token by token; as `stream` is to `generate`."""
        text = self.require_chat_template().render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=template_variables
        )
        tokenizer = self.require_tokenizer()
        ids = tokenizer.encode_chat(text)
        self._check_vocabulary(ids)
        if len(ids) >= self.context_length:
            raise ValueError(
                f"[chat] the conversation has {len(ids)} tokens and must be shorter than the context of "
                f"{self.context_length}; leave out messages"
            )
        ends = [tokenizer.special_tokens[name] for name in TURN_ENDS if name in tokenizer.special_tokens]
        return self._stream(ids, stop_ids=ends, **options)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How a conversation is written, None where the folder does not say; can be set."""
        names = None if self.tokenizer is None else self.tokenizer.named_tokens
        return ChatTemplate.from_folder(self.path, special_tokens=names) if self.path.is_dir() else None

    def require_chat_template(self) -> ChatTemplate:
        """The chat template. Raises ValueError where the folder holds none."""
        if self.chat_template is None:
            raise ValueError(
                f"[chat] '{self.path}' has no chat template, so it was probably not made for conversations; "
                "put a chat_template.jinja there, set model.chat_template, or use generate"
            )
        return self.chat_template

    def logits(self, token_ids: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Logits after each token: float32 [tokens, vocab]. Raises ValueError beyond the context."""
        ids = self._checked_ids(token_ids)
        if len(ids) > self.context_length:
            raise ValueError(f"[logits] at most {self.context_length} tokens fit the context, got {len(ids)}")
        state = self.transformer.new_sequence()
        return self.transformer.forward([(ids, state)], logits="all")

    def perplexity(
        self,
        text: str,
        *,
        protocol: Protocol = "documents",
        window: int | None = None,
        max_documents: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> EvaluationResult:
        """How well the model predicts a text; see `evaluation.evaluate`."""
        return evaluate(
            self.transformer,
            self.require_tokenizer(),
            text,
            protocol=protocol,
            window=window,
            max_documents=max_documents,
            progress=progress,
        )

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError where the folder holds none."""
        if self.tokenizer is None:
            raise ValueError(
                f"[tokenizer] '{self.path}' holds neither tokenizer.json nor tokenizer.model, nor "
                "vocab.json with merges.txt; put one there, or pass token ids instead of text"
            )
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as a prompt: with the token that starts every text, if there is one."""
        ids = self.require_tokenizer().encode(text)
        self._check_vocabulary(ids)
        return ids

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        highest = max(ids, default=0)
        if highest >= self.architecture.spec.vocab_size:
            raise FormatError(
                f"[tokenizer] '{self.path}': token id {highest} lies beyond the vocabulary of "
                f"{self.architecture.spec.vocab_size}; the tokenizer belongs to another model"
            )

    def _stream(
        self,
        prompt: Prompt,
        *,
        stop_ids: Sequence[int] = (),
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        temperature: float = 0.0,
        do_sample: bool | None = None,
        **sampling: Any,
    ) -> PieceStream:
        generation = self._start(
            [prompt],
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling={"temperature": _temperature(temperature, do_sample=do_sample), **sampling},
            seed=seed,
            stop_ids=stop_ids,
        )
        return PieceStream(generation)

    def _start(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: str | Sequence[str],
        sampling: dict[str, Any],
        seed: int,
        stop_ids: Sequence[int] = (),
    ) -> Generation:
        if max_new_tokens < 1:
            raise ValueError(f"[generate] max_new_tokens must be positive, got {max_new_tokens}")
        stop = [stop] if isinstance(stop, str) else list(stop)
        if not all(stop):
            raise ValueError("[generate] a stop string must not be empty")
        if stop:
            self.require_tokenizer()
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"[generate] seed must lie in 0 .. 2**63 - 1, got {seed}")
        return Generation(
            self.transformer,
            self.tokenizer,
            [self._prompt_ids(prompt) for prompt in prompts],
            [_core.runtime.SamplingOptions(**sampling, seed=seed + index) for index in range(len(prompts))],
            max_new_tokens=max_new_tokens,
            stop_ids=sorted({*self.eos_ids, *stop_ids}),
            stop=stop,
        )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        is_text = isinstance(prompt, str)
        ids = self.encode(prompt) if isinstance(prompt, str) else self._checked_ids(prompt).tolist()
        if not ids:
            raise ValueError(
                "[generate] the prompt is empty"
                + (", and this tokenizer has no token that starts a text" if is_text else "")
            )
        if len(ids) >= self.context_length:
            raise ValueError(
                f"[generate] the prompt has {len(ids)} tokens and must be shorter than the context of "
                f"{self.context_length}; shorten it"
            )
        return ids

    def _checked_ids(self, token_ids: object) -> NDArray[np.int32]:
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise TypeError("[model] token ids must be a flat sequence of integers")
        vocab_size = self.architecture.spec.vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise ValueError(f"[model] a token id must lie in 0 .. {vocab_size - 1}, got {wrong}")
        return ids.astype(np.int32)


def default_activations(quantization: Quantization | None) -> Activations:
    """What a checkpoint was made for: `activation_bits`, floating point where it names none."""
    bits = None if quantization is None else quantization.activation_bits
    names: dict[int | None, Activations] = {8: "int8", 16: "int16"}
    return names.get(bits, "float")


def _temperature(temperature: float, *, do_sample: bool | None) -> float:
    if do_sample is None:
        return temperature
    if not do_sample:
        return 0.0
    return temperature or 1.0


def _is_batch(prompt: object) -> bool:
    """A list of texts or of id sequences; an empty one counts as an empty prompt."""
    if isinstance(prompt, str | np.ndarray):
        return isinstance(prompt, np.ndarray) and prompt.ndim == 2
    if not isinstance(prompt, Sequence):
        raise TypeError(f"[generate] a prompt is text or a sequence of token ids, got {type(prompt).__name__}")
    return bool(prompt) and isinstance(prompt[0], str | Sequence | np.ndarray)


def _load_folder(path: Path) -> LoadedModel:
    checkpoint = Checkpoint.open(path)
    if not checkpoint.config:
        raise FormatError(f"[load] '{path}' has no config.json; name the folder of a checkpoint")
    architecture = read_architecture(checkpoint.config, where=str(path / "config.json"))
    tokenizer = Tokenizer.from_folder(path)
    return LoadedModel(
        architecture=architecture,
        weights=load_weights(checkpoint, architecture),
        tokenizer=tokenizer,
        eos_ids=find_eos_ids(path, architecture, tokenizer),
    )
