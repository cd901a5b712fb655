# SPDX-License-Identifier: Apache-2.0
"""The names that GGUF files give to ways of cutting text into words, and what each of them does.

A file holds only a name (`tokenizer.ggml.pre`); the patterns are known by the engines. They are those
of the published tokenizer.json files. A name that is not here is refused: a wrong cut degrades a model silently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ternaryforge.bpe_vocabulary import LLAMA3_WORDS, QWEN2_WORDS

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import pre_tokenizers

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN35_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_OPENING = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (f"{_OPENING}{_UPPER}*{_LOWER}+", f"{_OPENING}{_UPPER}+{_LOWER}*")
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
TEKKEN_WORDS = "|".join(_CASED) + r"|\p{N}" + _CASED_REST
GPT4O_WORDS = "|".join(cased + _ENDINGS for cased in _CASED) + r"|\p{N}{1,3}" + _CASED_REST
_FALCON_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_DEFAULT_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to cut text. Each pattern cuts the parts that the one before it left, matches and gaps alike.

    `names` are what files call it; the first one is written. `ignore_merges`: a word that is a token is
    taken whole. `composes`: text is normalised to NFC first, as in the tokenizers of such models.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    composes: bool = False

    def build(self) -> "pre_tokenizers.PreTokenizer":
        """The same in the `tokenizers` package, down to the byte alphabet."""
        import tokenizers
        from tokenizers import pre_tokenizers

        # ByteLevel cuts by the pattern of GPT-2 itself, which is how tokenizer.json files say it.
        is_gpt2 = self.patterns[-1] == GPT2_WORDS
        patterns = self.patterns[:-1] if is_gpt2 else self.patterns
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_gpt2)
        steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*steps, last]) if steps else last


PRE_TOKENIZERS = (
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "falcon_e", "pixtral", "midm-2.0", "lfm2"),
        (LLAMA3_WORDS,),
        ignore_merges=True,
    ),
    PreTokenizer(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), (QWEN2_WORDS,), composes=True),
    PreTokenizer(
        ("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "gigachat", "exaone4", "modern-bert"),
        (GPT2_WORDS,),
    ),
    PreTokenizer(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", GPT2_WORDS)),
    PreTokenizer(("tekken",), (TEKKEN_WORDS,), ignore_merges=True),
    PreTokenizer(("gpt-4o", "llama4", "kanana2"), (GPT4O_WORDS,)),
    PreTokenizer(("qwen35",), (QWEN35_WORDS,), composes=True),
    PreTokenizer(("smaug-bpe", "dbrx", "chatglm-bpe"), (LLAMA3_WORDS,)),
    PreTokenizer(("glm4",), (LLAMA3_WORDS,), ignore_merges=True),
    PreTokenizer(("falcon",), (_FALCON_PUNCTUATION, GPT2_WORDS, _THREE_DIGITS)),
    PreTokenizer(("default",), (_DEFAULT_PUNCTUATION, GPT2_WORDS, r"\p{N}+", _THREE_DIGITS)),
)

# Digits, contractions in both cases, marks, signs, several scripts, and every kind of white space between them.
PROBES = (
    "I'll don't WE'VE They'Re it'S o'clock 'd",
    "1 12 123 1234 12345678 x9y 3.14 ١٢٣٤ ½² 10,000",
    "Hello World HELLOWorld camelCase XMLParser ǅungla éa e\u0301 naïve",
    "a  b   c    d\te\n\nf \n g\r\n\r\n  h   ",
    "... !? (x) [y] {z} <|end|> $5 +1 = ~ ^ | ` a/b//c #tag @me",
    "日本語の文章 мир мира ไทย हिन्दी 한국어 🙂🏽 👩‍👩‍👧",
    " \n  \n\t x\u00a0y z\u2003w_1 snake_case",
)


def find_pre_tokenizer(name: str) -> PreTokenizer | None:
    """What a file means by a name, None where that is not known."""
    return next((known for known in PRE_TOKENIZERS if name in known.names), None)


def recognise(backend: "tokenizers.Tokenizer", *, ignore_merges: bool) -> str | None:
    """The name of what a byte-level tokenizer does to text before its merges, None where no name is known.

    Two ways are taken for the same where they cut all probes alike.
    """
    own = backend.pre_tokenizer
    if own is None:
        return None
    cuts = _cuts(own)
    for known in PRE_TOKENIZERS:
        if known.ignore_merges == ignore_merges and _cuts(known.build()) == cuts:
            return known.names[0]
    return None


def _cuts(pre_tokenizer: "pre_tokenizers.PreTokenizer") -> Sequence[Sequence[str]]:
    return [[part for part, _ in pre_tokenizer.pre_tokenize_str(probe)] for probe in PROBES]
