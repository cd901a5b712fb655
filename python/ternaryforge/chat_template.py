# SPDX-License-Identifier: Apache-2.0
"""Chat templates: messages become the text that a model was trained on.

They are jinja2 programs that come with a checkpoint, so they are run in a sandbox with a budget.
What they see, and what they make of it, is that of transformers' `apply_chat_template`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ternaryforge._core import FormatError
from ternaryforge.checkpoint import read_json, read_text

if TYPE_CHECKING:
    import jinja2

DEFAULT = "default"
TOOL_USE = "tool_use"
MAX_TEMPLATE_BYTES = 1 << 17  # compiling so much takes some seconds; real ones have up to 17,000 bytes
SECONDS = 5.0
# A template may write so many characters, and so many more for each one it is given.
CHARACTERS = 1 << 22
CHARACTERS_PER_CHARACTER = 16

Message = Mapping[str, Any]
"""One message of a conversation: `role`, `content`, and what else the template knows."""

TURN_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|end_of_turn|>",
    "<end_of_turn>", "<turn|>", "<|eot|>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "</s>",
)  # fmt: skip
"""Names of special tokens that end an answer, in the templates of published models."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplateError(ValueError):
    """A chat template that refuses the messages, fails, or exceeds its budget."""


class ChatTemplate:
    """The template of a model, or its several templates by name.

    `sources` has the text of each; `where` says in errors where they come from. `special_tokens`
    (`bos_token`, `eos_token` and the like) are variables of every template.
    """

    def __init__(
        self, sources: Mapping[str, str], *, where: str, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self.sources = dict(sources)
        self.where = where
        self.special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_file(cls, path: Path, *, special_tokens: Mapping[str, str] | None = None) -> Self:
        """A template from a file of its own."""
        return cls(
            {DEFAULT: read_text(path, limit=MAX_TEMPLATE_BYTES, what="chat template")},
            where=str(path),
            special_tokens=special_tokens,
        )

    @classmethod
    def from_folder(cls, folder: Path, *, special_tokens: Mapping[str, str] | None = None) -> Self | None:
        """The templates of a checkpoint folder, or None where it has none.

        As in transformers, template files go before tokenizer_config.json, that before
        chat_template.json.
        """
        sources = {}
        if (folder / "chat_template.jinja").is_file():
            sources[DEFAULT] = read_text(folder / "chat_template.jinja", limit=MAX_TEMPLATE_BYTES, what="chat template")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = read_text(path, limit=MAX_TEMPLATE_BYTES, what="chat template")
        where = folder / "chat_template.jinja" if DEFAULT in sources else folder / "additional_chat_templates"
        for name in ("tokenizer_config.json", "chat_template.json"):
            if not sources and (folder / name).is_file():
                where = folder / name
                sources = _sources(read_json(where).get("chat_template"), where)
        return cls(sources, where=str(where), special_tokens=special_tokens) if sources else None

    def source(self, name: str | None = None, *, tools: bool = False) -> str:
        """The text of the template `name`; None is "tool_use" with tools, if there is one, else "default"."""
        return self.sources[self._choose(name, tools=tools)]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
        name: str | None = None,
        seconds: float = SECONDS,
    ) -> str:
        """The text of a conversation.

        `tools` are JSON schemas. `add_generation_prompt` ends the text where an answer begins.
        `variables` are whatever else the template knows, such as `enable_thinking`. Raises
        ChatTemplateError where the template refuses the messages, fails, or takes more than
        `seconds` of CPU time; FormatError where it is no template.
        """
        from ternaryforge import template_sandbox

        chosen = self._choose(name, tools=tools is not None)
        try:
            known = {
                **_plain(self.special_tokens | dict(variables or {})),
                "messages": _plain_messages(messages),
                "tools": _plain_mappings("tools", tools),
                "documents": _plain_mappings("documents", documents),
                "add_generation_prompt": add_generation_prompt,
            }
        except RecursionError:
            raise ChatTemplateError("[chat template] messages or tools are nested too deeply") from None
        template = self._compile(chosen)
        given = template_sandbox.size(known, 1 << 62)
        budget = template_sandbox.Budget(seconds=seconds, characters=CHARACTERS + CHARACTERS_PER_CHARACTER * given)
        try:
            return template_sandbox.render(template, budget, known)
        except Exception as error:  # a template may raise whatever Python does
            raise ChatTemplateError(f"[chat template] {self._place(chosen)} {_reason(error)}") from error

    def _choose(self, name: str | None, *, tools: bool) -> str:
        if name is None:
            name = TOOL_USE if tools and TOOL_USE in self.sources else DEFAULT
        if name not in self.sources:
            raise ChatTemplateError(
                f"[chat template] '{self.where}' has no template '{name}'; it has {sorted(self.sources)}"
            )
        return name

    def _compile(self, name: str) -> "jinja2.Template":
        template = self._compiled.get(name)
        if template is None:
            try:
                template = _environment().from_string(self.sources[name])
            except Exception as error:  # noqa: BLE001 - the parser and Python's compiler raise many kinds
                number = getattr(error, "lineno", None)
                line = f", line {number}," if isinstance(number, int) else ""
                raise FormatError(f"[chat template] {self._place(name)}{line} {_reason(error)}") from None
            self._compiled[name] = template
        return template

    def _place(self, name: str) -> str:
        return f"'{self.where}'" + (f" (template '{name}')" if len(self.sources) > 1 else "")


def _environment() -> "jinja2.Environment":
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    from ternaryforge.template_sandbox import BoundedEnvironment, to_json

    class GenerationTag(Extension):
        """`{% generation %}` marks what a model is trained on; it changes nothing in the text."""

        tags = {"generation"}  # noqa: RUF012 - what jinja2 looks for

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:  # noqa: A002 - transformers' name
        return datetime.now().strftime(format)  # noqa: DTZ005 - templates want the local time

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _reason(error: Exception) -> str:
    """What went wrong, as the end of a sentence that begins with the template."""
    import jinja2

    from ternaryforge.template_sandbox import BudgetError

    text = str(error)
    match error:
        case BudgetError():
            return text
        case RecursionError():
            return "calls itself, or nests, too deeply"
        case jinja2.TemplateSyntaxError():
            return f"is no valid template: {text}"
        case jinja2.exceptions.SecurityError() | jinja2.exceptions.TemplateRuntimeError():
            return f"fails: {text}"
        case jinja2.TemplateError():
            return f"refuses the messages: {text}"
    return f"fails: {type(error).__name__}" + (f": {text}" if text else "")


def _sources(entry: object, where: Path) -> dict[str, str]:
    """The entry `chat_template` of a JSON file: a text, or a list of {name, template}."""
    found: dict[Any, Any]
    match entry:
        case None:
            return {}
        case str():
            found = {DEFAULT: entry}
        case dict():
            found = entry
        case list() if all(isinstance(item, dict) and {"name", "template"} <= item.keys() for item in entry):
            found = {item["name"]: item["template"] for item in entry}
        case _:
            raise FormatError(f"[chat template] '{where}': chat_template must be a text or a list of named ones")
    for name, text in found.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise FormatError(f"[chat template] '{where}': a name or a text in chat_template is no string")
        if len(text) > MAX_TEMPLATE_BYTES:
            raise FormatError(f"[chat template] '{where}': a template is larger than {MAX_TEMPLATE_BYTES} bytes")
    return found


def _plain_messages(messages: Any) -> list[Any]:
    """Plain copies, without keys whose value is None; reasoning goes by the name templates read."""
    if isinstance(messages, str | Mapping):
        raise TypeError(f"[chat] messages must be a list of dicts with role and content, got {messages!r:.80}")
    if not messages:
        raise ValueError("[chat] there are no messages; give at least one")
    found = []
    for given in messages:
        if not isinstance(given, Mapping):
            raise TypeError(f"[chat] a message must be a dict with role and content, got {given!r:.80}")
        message = _plain({key: value for key, value in given.items() if value is not None})
        reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        found.append(message)
    return found


def _plain_mappings(what: str, values: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if values is None:
        return None
    for value in values:
        if not isinstance(value, Mapping):
            raise TypeError(f"[chat] {what} must be dicts as in JSON, got {value!r:.80}")
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A copy of nothing but JSON's types, so that a template reaches no object of the program."""
    if isinstance(value, np.generic):
        value = value.item()
    match value:
        case None | bool():
            return value
        case str() | int() | float():
            return _plain_scalar(value)
        case Mapping():
            return {_plain(key): _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case tuple():
            return tuple(_plain(item) for item in value)
    return _plain_object(value)


def _plain_scalar(value: str | float) -> str | float:
    """Without the methods of subclasses, such as enumerations."""
    match value:
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
    return float.__float__(value)


def _plain_object(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    dump = getattr(value, "model_dump", None)  # pydantic
    return _plain(dump()) if callable(dump) else f"<{type(value).__name__}>"
