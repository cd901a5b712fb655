"""Types of the compiled core. One submodule per C++ layer."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

class FormatError(ValueError): ...

Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
Int8: TypeAlias = NDArray[np.int8]
Int16: TypeAlias = NDArray[np.int16]
Int32: TypeAlias = NDArray[np.int32]
UInt8: TypeAlias = NDArray[np.uint8]
ScaleKind: TypeAlias = Literal["none", "tensor", "row", "group"]
Convention: TypeAlias = Literal["multiply", "divide"]
Activations: TypeAlias = Literal["int8", "int16", "float"]
KvType: TypeAlias = Literal["f32", "f16", "int8"]
HeadMode: TypeAlias = Literal["exact", "int8", "int6", "int4", "two-stage"]

class simd:
    @staticmethod
    def supported_targets() -> list[str]: ...
    @staticmethod
    def active_target() -> str: ...
    @staticmethod
    def use_target(name: str) -> None: ...
    @staticmethod
    def dispatched_target() -> str: ...
    @staticmethod
    def compiler() -> str: ...  # "g++ 12.2.0"
    @staticmethod
    def highway_version() -> str: ...  # "1.0.3"

class parallel:
    @staticmethod
    def default_threads() -> int: ...
    @staticmethod
    def backend() -> str: ...  # "openmp" or "std::thread"
    @staticmethod
    def workers(threads: int) -> int: ...  # that a call with so many threads really has
    @staticmethod
    def limit_workers(*, on: bool) -> None: ...  # no more workers than CPUs (the default); off only in tests

class formats:
    class PackedTensor:
        """One weight matrix [rows, cols]; keeps the buffer that it was made from alive."""

        def __init__(
            self,
            layout: str,
            # "f32" "f16" "bf16" "int8" "hf_packed" "onebit" "onebit_binary" "t16" "t20"; "two_plane" "t8" of two tied
            # planes, whose codes are the levels -4 .. 4; and those that hold their scales: "i2_s" "i2_s_64"
            # "i2_s_rows4" "tq1_0" "tq2_0" "q1_0" "q2_0" "pq2_0" "ptq1_0" "q2_k" "q4_0" "iq1_bn" "iq2_bn", with
            # scale_kind "none", or "tensor" for one more factor (GGUF: the .scale tensor)
            rows: int,
            cols: int,
            data: object,  # any contiguous read-only buffer of the layout's size (memoryview, mmap slice, ndarray)
            *,
            scale_kind: ScaleKind = "none",
            group_size: int = 0,
            convention: Convention = "multiply",
            scales: Float32 | None = None,  # [1], [rows] or [rows, groups] as stored, flattened by the core
        ) -> None: ...
        layout: str
        rows: int
        cols: int
        scale_kind: ScaleKind
        group_size: int
        data: UInt8  # read-only view
        effective_scales: Float32  # weight = code * scale

    @staticmethod
    def pack(trits: Int8, layout: str, *, group_size: int = 0) -> UInt8: ...  # [rows, cols] -> bytes; size: t20 alone
    @staticmethod
    def unpack(data: UInt8, layout: str, rows: int, cols: int, *, group_size: int = 0) -> Int8: ...
    @staticmethod
    def layout_bytes(layout: str, rows: int, cols: int, *, group_size: int = 0) -> int: ...
    @staticmethod
    def hf_packed_is_valid(data: UInt8) -> bool: ...

    # Layouts that hold their scales; the name of a GGUF type, lower-case, is the name of its layout. Scales are not
    # negative, and where one is 0 its trits are. Raises FormatError where the data are not ternary.
    @staticmethod
    def decode_ternary(
        layout: str, data: UInt8, rows: int, cols: int, *, threads: int = 1
    ) -> tuple[Int8, Float32]: ...  # trits [rows, cols]; scales [1, 1], [rows, 1] or [rows, blocks], by the layout
    @staticmethod
    def encode_ternary(
        layout: str, trits: Int8, scales: Float32, *, group_size: int = 0, threads: int = 1
    ) -> UInt8: ...  # scales [1], [rows] or [rows, groups]; exact, else ValueError that says where and why
    @staticmethod
    def collapse_scales(
        scales: Float32, cols: int, block_cols: int
    ) -> tuple[Literal["tensor", "row", "group"], int, Float32]: ...
    # [rows, blocks] -> the coarsest exact kind, group_size, scales [1], [rows] or [rows, groups]; 0 fits any scale
    @staticmethod
    def decode_mlx(
        codes: UInt8, scales: Float32, biases: Float32, *, bits: int, group_size: int, threads: int = 1
    ) -> tuple[Int8, Float32]: ...  # scales, biases [rows, groups] -> trits [rows, cols], scales [rows, groups]

    # Dense types by their GGUF names: F32 F16 BF16 Q8_0 Q6_K Q4_0, and Q2_K to read
    @staticmethod
    def dequantize(type_name: str, data: UInt8, rows: int, cols: int, *, threads: int = 1) -> Float32: ...
    @staticmethod
    def quantize(type_name: str, values: Float32, *, threads: int = 1) -> UInt8: ...

class io:
    class GgufTensor:
        """One tensor of an open GGUF file."""

        name: str
        type_id: int
        type_name: str  # "TQ2_0"; under the number 42 "Q2_0", "PQ2_0", "TL2" or "STQ1_0", whichever the sizes show
        type_owner: str  # the engine that defined the type
        shape: tuple[int, ...]  # slowest first, as NumPy: (rows, cols)
        offset: int  # from the start of the file `path`
        path: Path
        data: UInt8  # read-only view of the mapped file, keeps it alive

    class GgufFile:
        """A GGUF file (version 2 or 3), or the first part of a split one: the others are opened too.

        Raises OSError, and FormatError that names the file, and the key or tensor, for whatever breaks the format.
        """

        def __init__(
            self,
            path: str | os.PathLike[str],
            *,
            type_42: str = "",  # "Q2_0" or "PQ2_0" where sizes cannot tell what the type number 42 means
        ) -> None: ...
        version: int
        alignment: int
        metadata: dict[str, object]  # in file order; int, float, bool, str or a list of them
        metadata_types: dict[str, str]  # "uint32", "string", "array[float32]", ...
        tensors: dict[str, io.GgufTensor]  # in file order
        paths: list[Path]

    class GgufWriter:
        """Declares keys and tensors, then takes the tensors' bytes in that order, in any pieces.

        Writes to a temporary file beside `path` that takes its name in finish(), and is gone when the `with` block
        ends without.
        """

        def __init__(self, path: str | os.PathLike[str], alignment: int = 32) -> None: ...
        def add_metadata(self, key: str, value: object, value_type: str) -> None: ...  # as in metadata_types
        def add_tensor(self, name: str, shape: Sequence[int], type_name: str) -> None: ...
        def write(self, name: str, data: object) -> None: ...  # any C-contiguous buffer
        def finish(self) -> None: ...
        def __enter__(self) -> io.GgufWriter: ...
        def __exit__(self, *error: object) -> None: ...

class kernels:
    @staticmethod
    def quantize_acts(
        x: Float32, *, activations: Activations = "int8"
    ) -> tuple[Int16, Float32]: ...  # [m, k] -> codes [m, k], scales s [m]: x ~ codes / s
    @staticmethod
    def repack(tensor: formats.PackedTensor, layout: str, *, threads: int = 1) -> formats.PackedTensor: ...
    @staticmethod
    def linear(
        x: Float32, tensor: formats.PackedTensor, *, activations: Activations, threads: int = 1
    ) -> Float32: ...  # [m, cols] -> [m, rows]
    @staticmethod
    def linears_at(  # `linear` on addresses of C-contiguous arrays, for callers without NumPy arrays
        x: int,  # float32 [tokens, cols]
        tokens: int,
        cols: int,
        # the weight's layout_bytes(...) bytes, float32 scales, float32 out [tokens, rows], rows, number of scales
        layers: list[tuple[int, int, int, int, int]],
        layout: str,  # "t8", "t16" or "t20"; ValueError for others
        group_size: int,  # 0 unless scales belong to groups
        activations: Activations,
        threads: int,
    ) -> None: ...
    @staticmethod
    def ternary_dot(
        codes: Int8, tensor: formats.PackedTensor
    ) -> Int32: ...  # exact sums trit (or level) * code, [m, rows]
    @staticmethod
    def rms_norm(x: Float32, weight: Float32, epsilon: float) -> Float32: ...
    @staticmethod
    def layer_norm(x: Float32, weight: Float32, bias: Float32, epsilon: float) -> Float32: ...
    @staticmethod
    def rotate_halves(heads: Float32, cos: Float32, sin: Float32) -> Float32: ...
    @staticmethod
    def softmax(x: Float32) -> Float32: ...
    @staticmethod
    def log_sum_exp(x: Float32) -> float: ...
    @staticmethod
    def silu_multiply(gate: Float32, up: Float32) -> Float32: ...
    @staticmethod
    def relu_multiply(gate: Float32, up: Float32) -> Float32: ...
    @staticmethod
    def relu_squared_multiply(gate: Float32, up: Float32) -> Float32: ...
    @staticmethod
    def gelu_multiply(gate: Float32, up: Float32) -> Float32: ...
    @staticmethod
    def gelu_erf_multiply(gate: Float32, up: Float32) -> Float32: ...
    @staticmethod
    def attend(
        queries: Float32,  # [heads, n]: query heads that share one KV head
        keys: Float32,  # [tokens, n]
        values: Float32,
        scale: float,
        *,
        begin: int = 0,
        soft_cap: float = 0.0,
        kv: KvType = "f32",
    ) -> Float32: ...  # [heads, n]
    @staticmethod
    def quantized_head_bytes(rows: int, cols: int, bits: int) -> int: ...  # taken, and read by one product
    class QuantizedHead:
        """An output head in 4, 6 or 8 bits; see cpp/kernels/head.h."""

        def __init__(self, tensor: formats.PackedTensor, bits: int, *, threads: int = 1) -> None: ...
        bytes: int
        rows: Float32  # as it is multiplied, [rows, cols]
        norms: Float32  # upper bounds: of each row as multiplied, and of what quantization took away
        residuals: Float32
        def multiply(self, x: Float32, *, bounds: bool = False, threads: int = 1) -> Float32: ...
        # x [tokens, cols] -> [tokens, rows]: products, or upper bounds of the exact head's

    class TwoStageHead:
        """Finds the likeliest tokens of an exact head."""

        def __init__(self, tensor: formats.PackedTensor, *, threads: int = 1) -> None: ...
        bytes: int
        def find(
            self,
            x: Float32,  # [tokens, cols]
            *,
            count: int = 1,
            temperature: float = 1.0,
            penalty: float = 1.0,
            seen: Sequence[int] = (),  # in rising order
        ) -> list[tuple[Int32, Float32, bool]]: ...  # tokens, exact logits; all logits and no tokens where True

    @staticmethod
    def read_bandwidth(*, size: int, passes: int, threads: int) -> float: ...  # bytes per second, the best pass
    @staticmethod
    def dot_peak(*, rounds: int, passes: int, threads: int) -> float: ...  # multiply-adds u8 x i8 per second
    @staticmethod
    def time_linear(
        tensor: formats.PackedTensor, tokens: int, *, activations: Activations, threads: int = 1, passes: int = 5
    ) -> list[float]: ...  # seconds of each pass
    @staticmethod
    def fastest_layout(weights: int, *, activations: Activations, threads: int = 1) -> Literal["t16", "t20"]: ...
    @staticmethod
    def self_test() -> list[str]: ...  # failures; empty when all kernels of the active target are right

class quant:
    @staticmethod
    def quantize_weights(
        weights: Float32,  # [rows, cols]
        *,
        scheme: Literal["ls", "absmean", "absmax", "twn"],
        scale: Literal["tensor", "row", "group"],
        group_size: int = 128,
        threads: int = 1,
    ) -> tuple[Int8, Float32]: ...  # trits [rows, cols]; scales [1], [rows] or [rows, groups], fp16-exact
    @staticmethod
    def find_ternary(
        weights: Float32, *, group_size: int = 128, threads: int = 1
    ) -> tuple[Literal["tensor", "row", "group"], Int8, Float32] | None: ...
    @staticmethod
    def sum_moments(a: Float32, b: Float32 | None, sums: Float64, *, threads: int = 1) -> None: ...
    # sums [cols, cols] += a^T a, or [cols_a, cols_b] += a^T b; ValueError for NaN and infinity
    @staticmethod
    def add_correction(target: Float64, lacking: Float64, factor: Float64, *, threads: int = 1) -> None: ...
    @staticmethod
    def round_with_feedback(
        target: Float64,  # [rows, cols]
        factor: Float64 | None,  # upper triangular R, second moments = R R^T; None: plain rounding
        importance: Float64,  # [cols], above 0: what an error of a column weighs where a scale is chosen
        *,
        rule: Literal["fit", "grid", "absmean", "twn"],
        scale: Literal["tensor", "row", "group"],
        group_size: int = 128,
        tensor_scale: float = 1.0,  # given under "tensor"
        planes: Literal[1, 2] = 1,  # 2: levels -4 .. 4 = 3 * first + second trit; rules fit and grid
        threads: int = 1,
    ) -> tuple[Int8, Float32]: ...  # levels [rows, cols]; scales, fp16-exact but under "tensor"
    @staticmethod
    def descend(
        target: Float64,
        moments: Float64,  # [cols, cols]
        levels: Int8,  # changed in place
        scales: Float32,  # changed in place but under "tensor"
        *,
        scale: Literal["tensor", "row", "group"],
        group_size: int = 128,
        rounds: int = 4,
        sweeps: int = 4,
        planes: Literal[1, 2] = 1,
        threads: int = 1,
    ) -> None: ...

class model:
    class LayerSpec:
        def __init__(
            self,
            *,
            heads: int,
            kv_heads: int,
            head_dim: int,
            rotation: Sequence[float],  # angle of pair i at position p: p * rotation[i]; 0 .. head_dim / 2 pairs
            rotation_scale: float = 1.0,
            attention_scale: float | None = None,  # None: 1 / sqrt(head_dim)
            attention_soft_cap: float = 0.0,
            window: int = 0,
            ffn_size: int,
            activation: Literal["silu", "relu", "relu2", "gelu", "gelu_erf"],  # gelu: the tanh form
            gated: bool = True,  # False: down(act(up(x))), no slot gate
            norm: Literal["rms", "layer"] = "rms",  # "layer": LayerNorm, a slot *_bias for every norm
            parallel: bool = False,  # attention and feed-forward both see attention_norm(x), no slot ffn_norm
            residual_scale: float = 1.0,  # of what each half adds to the residual stream, after the post norm
            projection_bias: bool = False,
            output_bias: bool = False,
            ffn_bias: bool = False,
            head_norms: bool = False,
            sub_norms: bool = False,
            post_norms: bool = False,
        ) -> None: ...
        heads: int
        kv_heads: int
        head_dim: int
        rotation: list[float]
        rotation_scale: float
        attention_scale: float
        attention_soft_cap: float
        window: int
        ffn_size: int
        activation: str
        gated: bool
        norm: str
        parallel: bool
        residual_scale: float
        projection_bias: bool
        output_bias: bool
        ffn_bias: bool
        head_norms: bool
        sub_norms: bool
        post_norms: bool

    class ModelSpec:
        def __init__(
            self,
            *,
            vocab_size: int,
            hidden_size: int,
            context_length: int,
            norm_epsilon: float,
            layers: Sequence[model.LayerSpec],
            tied_head: bool,
            head_bias: bool = False,
            embedding_scale: float = 1.0,
            position_embedding: bool = False,  # learned rows per position, added to the scaled embedding
            norm_offset: float = 0.0,
            logit_soft_cap: float = 0.0,
        ) -> None: ...
        vocab_size: int
        hidden_size: int
        context_length: int
        norm_epsilon: float
        layers: list[model.LayerSpec]
        tied_head: bool
        head_bias: bool
        embedding_scale: float
        position_embedding: bool
        norm_offset: float
        logit_soft_cap: float
        def slots(self) -> dict[str, tuple[int, int]]: ...
        # every weight by name with its shape (rows, cols), vectors as (1, size): embedding, final_norm (of the last
        # layer's kind), head (absent when tied), where the model has them head_bias and position_embedding
        # (context_length, hidden_size), and layers.{i}. + attention_norm query key value output ffn_norm gate up down,
        # and where the layer has them *_bias of each linear, query_norm key_norm attention_sub_norm ffn_sub_norm
        # attention_post_norm ffn_post_norm; every LayerNorm has a *_bias too
        # norms and biases are floats; every matrix, embeddings and head included, may be f32, f16, bf16, int8 (tensor
        # or row scales) or ternary (any scales)

    @staticmethod
    def kv_bytes_per_token(spec: model.ModelSpec, kv: KvType) -> int: ...
    class SequenceState:
        length: int
        def repeat(self, length: int) -> None: ...  # extends by what is present, over and over: for benchmarks
        def truncate(self, length: int) -> None: ...

    class Transformer:
        """Repacks the weights. Raises ValueError that names the slot for a missing, extra or misshapen one."""

        def __init__(
            self,
            spec: model.ModelSpec,
            weights: dict[str, formats.PackedTensor],
            *,
            activations: Activations,
            kv: KvType = "f32",
            head: HeadMode = "exact",
            threads: int,
            layout: Literal["auto", "t16", "t20"] = "auto",  # of the layers' ternary matrices
            # LoRA by slot of a layer's query key value output gate up down: A [rank, cols], B [rows, rank], scaling;
            # out += scaling * B (A x), x the floats that the layer sees. Copied. ValueError with the slot's name where
            # they do not fit, for a slot that takes none, for NaN or infinity.
            adapters: Mapping[str, tuple[Float32, Float32, float]] = ...,
        ) -> None: ...
        spec: model.ModelSpec
        threads: int
        activations: Activations
        weight_bytes: int
        layout: str  # of the layers' matrices
        token_bytes: int  # of the matrices that one token multiplies
        kv: KvType
        head: HeadMode  # "exact" where "two-stage" was asked for and does not apply
        head_bytes: int  # read for a token, rows that the second stage looks up apart
        kv_bytes_per_token: int  # of keys and values, all layers
        def new_sequence(self) -> model.SequenceState: ...
        def time_parts(self, on: bool) -> None: ...  # starts, from zero, or ends adding up where time goes
        def likeliest_tokens(self, batch: Sequence[tuple[Int32, model.SequenceState]]) -> list[int]: ...
        # forward, and the likeliest next token of each sequence: the first of several
        def search_counts(self) -> dict[str, int]: ...
        # of the two-stage head: "searches", "fallbacks" to all logits, "rows" looked up by the others
        def part_seconds(self) -> dict[str, float]: ...  # of "matmul", "head", "attention", "rest"
        def embed(self, tokens: Int32) -> Float32: ...  # the start of one sequence, [tokens, hidden_size]
        def forward_block(
            self, layer: int, hidden: Float32, *, taps: Sequence[Literal["query", "output", "up", "down"]] = ...
        ) -> tuple[Float32, dict[str, Float32]]: ...
        # one layer on one whole sequence: hidden [tokens, hidden_size] behind it, and what the named linears saw
        def replace_linear(self, slot: str, tensor: formats.PackedTensor) -> None: ...  # ValueError: slot or shape
        def replace_norm(self, slot: str, weight: Float32) -> None: ...
        def forward(
            self,
            batch: Sequence[tuple[Int32, model.SequenceState]],
            *,
            logits: Literal["none", "last", "all"] = "last",
        ) -> Float32: ...  # [sequences or tokens, vocab]

class runtime:
    class SamplingOptions:
        def __init__(
            self,
            *,
            temperature: float = 0.0,
            top_k: int = 0,
            top_p: float = 1.0,
            min_p: float = 0.0,
            repetition_penalty: float = 1.0,
            seed: int = 0,
        ) -> None: ...

    class GeneratedToken:
        sequence: int
        token_id: int
        logprob: float  # computed when asked for, where choosing the token did not need it
        finish_reason: str | None  # None, "stop" (an end token: not to be shown), "length"

    class Generator:
        """Several sequences in one batch. A step runs one chunk of prompts or one token of every live sequence."""

        def __init__(
            self,
            transformer: model.Transformer,
            prompts: Sequence[Int32],
            options: Sequence[runtime.SamplingOptions],
            *,
            max_new_tokens: int,
            stop_ids: Sequence[int],
        ) -> None: ...
        done: bool
        def step(self) -> list[runtime.GeneratedToken]: ...
        def stop(self, sequence: int) -> None: ...

    @staticmethod
    def log_probabilities(tokens: Sequence[runtime.GeneratedToken]) -> list[float]: ...
    # the logprob of several tokens of one generator, in fewer passes than one by one
    @staticmethod
    def score(transformer: model.Transformer, token_ids: Int32) -> Float32: ...
    # [n - 1]: natural log-probability of every token but the first, given those before it; one window, chunked inside
