# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 - a template stands in one line
"""Chat templates: equal to transformers' on real ones, and hostile ones that must end soon."""

import dataclasses
import enum
import json
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ternaryforge import FormatError
from ternaryforge.chat_template import ChatTemplate, ChatTemplateError

USER = [{"role": "user", "content": "Hi"}]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> & later in a 'city'",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where: Zürich, 日本"},
                    "days": {"type": "integer", "enum": [1, 2, 3]},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}
CALL_AS_TEXT = CALL | {"function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
QUESTION = {"role": "user", "content": "What is 2 + 2? <b>\n\n  'quoted' \"twice\" 🙂"}
ANSWER = {"role": "assistant", "content": "It is 4.\n"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [QUESTION]},
    "system": {"messages": [{"role": "system", "content": " Be brief. "}, QUESTION]},
    "several turns": {"messages": [QUESTION, ANSWER, {"role": "user", "content": "And 3 + 3?"}]},
    "ends with an answer": {"messages": [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER]},
    "reasoning": {
        "messages": [QUESTION, ANSWER | {"reasoning_content": "Two and two."}, QUESTION],
        "enable_thinking": True,
    },
    "thinking in the text": {"messages": [QUESTION, {"role": "assistant", "content": "<think>So</think>\n4"}, QUESTION]},
    "no thinking": {"messages": [QUESTION], "enable_thinking": False, "reasoning_effort": "low"},
    "tools": {"messages": [QUESTION], "tools": TOOLS},
    "a tool's answer": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": '{"sky": "blue"}'},
        ],
        "tools": TOOLS,
    },
    "a tool's answer, arguments as text, no content": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [CALL_AS_TEXT]},
            {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "blue"},
            ANSWER,
        ],
        "tools": TOOLS,
    },
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}]},
    "documents": {"messages": [QUESTION], "documents": [{"title": "Sums", "text": "2 + 2 = 4"}]},
    "tools of another kind": {
        "messages": [QUESTION],
        "tools": [{"name": "f", "description": "Does it", "parameter_definitions": {
            "x": {"description": "What", "type": "str", "required": True}}}],
        "functions": '[{"name": "f"}]',
        "datetime": "2026-11-21",
    },
    "wrong order": {"messages": [ANSWER, ANSWER]},
    "unknown role": {"messages": [{"role": "stranger", "content": "?"}]},
}  # fmt: skip


def of(source: str, **sources: str) -> ChatTemplate:
    return ChatTemplate({"default": source} | sources, where="made", special_tokens=SPECIAL_TOKENS)


def render(source: str | ChatTemplate, messages: Any = USER, **options: Any) -> str:
    """Arguments as transformers takes them, where the variables of a template stand among them."""
    template = of(source) if isinstance(source, str) else source
    own = {key: options.pop(key) for key in ("tools", "documents", "add_generation_prompt") if key in options}
    return template.render(messages, variables=options, **own)


def template_names() -> list[str]:
    folder = Path(__file__).resolve().parents[3] / "shared/data/llamacpp-vocab/templates"
    return sorted(path.name for path in folder.glob("*.jinja")) or ["absent"]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' rendering, at a time that stands still for both."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    from ternaryforge import chat_template

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 11, 21, 12, 30, 15, tzinfo=tz)

    monkeypatch.setattr(chat_template, "datetime", Clock)
    monkeypatch.setattr(utils, "datetime", Clock)

    def render_as_transformers(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
        # What apply_chat_template does before it calls this.
        kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
        texts: list[str]
        texts, _ = utils.render_jinja_template([kept], chat_template=source, **(SPECIAL_TOKENS | options))
        return texts[0]

    return render_as_transformers


@pytest.mark.shared
@pytest.mark.parametrize("name", template_names())
def test_real_templates(shared: Path, name: str, reference: Any) -> None:
    """Each text is transformers', or both refuse; every template renders at least one conversation."""
    path = shared / "data/llamacpp-vocab/templates" / name
    template = ChatTemplate.from_file(path, special_tokens=SPECIAL_TOKENS)
    rendered = 0
    for title, conversation in CONVERSATIONS.items():
        for prompt in (False, True):
            options = {"add_generation_prompt": prompt, **conversation}
            try:
                expected = reference(path.read_text(encoding="utf-8"), **options)
            except Exception:  # noqa: BLE001 - a template raises what it likes
                with pytest.raises(ChatTemplateError, match=name):
                    render(template, **options)
                continue
            assert render(template, **options) == expected, title
            rendered += 1
    assert rendered


def test_what_the_environment_has(reference: Any) -> None:
    """Constructs of templates, each against transformers."""
    sources = [
        "{% for m in messages %}\n    {% if loop.first %}\n{{ m.role }}\n{% endif %}\n{% endfor %}\nend\n",
        "{% generation %}\n{{ messages[0].content }}{% endgeneration %} {{ bos_token }}{{ eos_token }}",
        "{{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=true) }}",
        "{{ 'é' | tojson(ensure_ascii=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}",
        "{{ strftime_now('%d %b %Y') }}{{ extra }}{{ documents }}{{ tools is none }}{{ nothing }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% set ns = namespace(a=1, b=[]) %}{% set ns.b = ns.b + [ns.a, 'x'] %}{{ ns.b }}{{ ns }}{{ dict(a=1, b=ns.a) }}",
        "{% macro f(x, y=2) %}[{{ x }}|{{ y }}{{ caller() if caller }}]{% endmacro %}{{ f(1) }}{% call f(3, y='z') %}in{% endcall %}",
        "{{ 'a' ~ 1 ~ none ~ [1, 'b'] }}{{ 'x' * 3 }}{{ '%05.2f|%s' % (3.14159, 'q') }}{{ '%s' | format('z') }}{{ 2 ** 10 }}",
        "{{ '{:>5}|{x}'.format('ab', x=3) }}{{ 'a-b'.split('-') | join('+') }}{{ ','.join(['p', 'q']) }}{{ 'abc'.replace('b', 'BB') }}",
        "{{ [1, 2, 3] | sum }}{{ [[1], [2]] | sum(start=[]) }}{{ messages | map(attribute='role') | list }}{{ 'abc' | list }}",
        "{{ 'a\nb' | indent(2, true) }}{{ 'ab' | center(6) }}|{{ 'hello' | replace('l', 'L', 1) }}{{ 7 | string + 'x' }}{{ 3.7 | round }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'in', ['user']) | list }}",
        "{% for a, b in {'k': 1, 'l': [2]}.items() %}{{ a }}={{ b }};{% else %}none{% endfor %}{{ messages[::-1] | length }}",
        "{% for i in range(6) if i is odd %}{{ loop.index }}/{{ loop.length }}:{{ i }}{{ ',' if not loop.last }}{% endfor %}",
        "{% for n in [{'v': 1, 'c': [{'v': 2, 'c': []}]}] recursive %}{{ n.v }}({{ loop(n.c) }}){% endfor %}",
        "{% set x %}captured {{ messages[0].content }}{% endset %}{{ x | upper }}{% filter trim %}  y {% endfilter %}{{ [x, x] }}",
        "{{ 'x' | e }}{{ '<' | escape }}{{ {'a': 1} | items | list }}{{ [3, 1] | sort }}{{ [1, 2, 3, 4, 5] | batch(2, 0) | list }}",
        "{{- 'A' -}}   {%- if true %} B {%+ if true %}C{% endif %}{% endif -%}\n\n  {#- note -#} D\n",
        "{{ (1, 2) }}{{ -3 % 2 }}{{ 7 // 2 }}{{ 1.5 * 2 }}{{ 'a' 'b' }}{{ 'b' in 'abc' }}{{ [1] + [2] }}{{ true }}",
    ]  # fmt: skip
    options: dict[str, Any] = {"messages": USER, "tools": TOOLS, "extra": {"k": (1, 2.5)}}
    for source in sources:
        assert render(source, **options) == reference(source, **options), source


def test_what_a_template_is_given(reference: Any) -> None:
    class Role(enum.StrEnum):
        USER = "user"

    @dataclasses.dataclass
    class Part:
        kind: str
        value: Any

    class Model:
        def model_dump(self) -> dict[str, Any]:
            return {"m": 1}

    message = {
        "role": Role.USER, "content": None, "flag": np.bool_(False), "number": np.float32(0.5), "part": Part("k", [1]),
        "model": Model(), "data": np.zeros(3), "nested": {"none": None}, "thinking": "hm",
    }  # fmt: skip
    source = "{{ messages }}{{ extra }}{{ 'content' in messages[0] }}"
    assert render(source, [message], extra=object) == reference(source, [message], extra=object)
    with pytest.raises(TypeError, match="list of dicts with role and content, got 'Hi'"):
        render(source, "Hi")
    with pytest.raises(TypeError, match="a message must be a dict"):
        render(source, ["Hi"])
    with pytest.raises(ValueError, match="there are no messages"):
        render(source, [])
    with pytest.raises(TypeError, match="tools must be dicts"):
        render(source, tools=[print])
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ChatTemplateError, match="nested too deeply"):
        render(source, [{"role": "user", "content": deep}])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ raise_exception('only users & <tools>') }}", "'made' refuses the messages: only users & <tools>"),
        ("{{ messages[0].content.nothing.at_all }}", "'made' fails: .*has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{{ 'a' + 1 }}", "fails: TypeError"),
        ("{{ messages.__class__.__mro__ }}", "fails: access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ ''['__class__'] }}{{ messages.append(1) }}", "fails: access to attribute"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "fails: access to attribute '__class__'"),
        ("{% set ns = namespace(_x=1) %}", "fails: a namespace cannot hold '_x'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "fails: a namespace cannot hold '_x'"),
        ("{% include 'x' %}", "fails: TypeError: no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself, or nests, too deeply"),
        ("{% macro f(x) %}{{ f([x]) }}{% endmacro %}{{ f(1) }}", "calls itself, or nests, too deeply"),
    ],
)
def test_templates_that_fail(source: str, text: str) -> None:
    with pytest.raises(ChatTemplateError, match=text):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'some text' }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}some text{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999) | list | sort | reverse | list %}{% endfor %}",
        "{{ range(99999) | select('in', range(99999) | list | reverse | list) | list | length }}",
        "{{ range(99999) | map('string') | map('center', 60000) | list | length }}",
        "{% set r = range(99999) | list %}" + "{{ r | sort | length and r | sort | length }}" * 5000,
        "{% set r = range(99999) | list %}" + "{{ 'x' in r or r | length == 'y' in r }}" * 500,
        "{% set r = range(99999) | list %}" + "{{ 'x' is in r or 'y' is in r }}" * 500,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for n in [1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}",
    ],
)
def test_templates_that_do_not_end(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"runs for more than 0.02 seconds|characters of text"):
        of(source).render(USER, seconds=0.02)


DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = DOUBLED %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 10 }}", "{{ 10 ** 10 * 'a' }}", "{{ [1] * 10 ** 10 }}", "{{ 10 ** (10 ** 10) }}",
        "{{ 'a' | center(10 ** 10) }}", "{{ 'a'.ljust(10 ** 10) }}", "{{ '\t'.expandtabs(10 ** 10) }}",
        "{{ '1'.zfill(10 ** 10) }}", "{{ (1).to_bytes(10 ** 10) }}", "{{ 'a\nb' | indent(10 ** 10) }}",
        "{{ '{:>9999999999}'.format(1) }}", "{{ '{:{}}'.format(1, 10 ** 10) }}", "{{ '{x:>9999999999}'.format_map({'x': 1}) }}",
        "{{ '%9999999999d' % 1 }}", "{{ '%*d' % (10 ** 10, 1) }}", "{{ '%9999999999d' | format(1) }}", "{{ '%.9999999999f' % 1.5 }}",
        "{{ 'a' | tojson(indent=10 ** 10) }}", "{{ [1] | batch(10 ** 10, 'x') | list }}", "{{ [1] | slice(10 ** 10) | list }}",
        "{{ 2.5 | round(10 ** 10, 'ceil') }}", "{{ lipsum(n=10 ** 10) }}", "{{ range(10 ** 10) }}", "{{ cycler() | string * 10 ** 9 }}",
        "{% set x = 'a' * 60000 %}{{ x.replace('a', x) }}", "{% set x = 'a' * 60000 %}{{ x | replace('a', x) }}",
        "{% set x = 'a' * 60000 %}{{ x | list | join(x) }}", "{% set x = 'a' * 60000 %}{{ x.join(x) }}",
        "{% set x = 'a' * 60000 %}{{ x.translate({97: x}) }}", "{% set x = 'a\n' * 60000 %}{{ x | indent(x) }}",
        "{% set x = 'a' * 99999 %}{{ '%s' * 9999 % ((x,) * 9999) }}", "{% set x = 'a' * 60000 %}{{ ('{0}' * 9999).format(x) }}",
        "{{ '%60000d' * 9999 % ((1,) * 9999) }}", "{{ ('{0:60000}' * 9999).format(1) }}",
        DOUBLE.replace("DOUBLED", "ns.x + ns.x"), DOUBLE.replace("DOUBLED", "ns.x ~ ns.x"),
        DOUBLE.replace("DOUBLED", "[ns.x, ns.x]"), DOUBLE.replace("DOUBLED", "(ns.x, ns.x)"),
        DOUBLE.replace("DOUBLED", "{'a': ns.x, 'b': ns.x}"), DOUBLE.replace("DOUBLED", "dict(a=ns.x, b=ns.x)"),
        DOUBLE.replace("DOUBLED", "namespace(a=ns.x, b=ns.x)"), DOUBLE.replace("DOUBLED", "'%s%s' % (ns.x, ns.x)"),
        DOUBLE.replace("DOUBLED", "'{0}{0}'.format(ns.x)"), DOUBLE.replace("DOUBLED", "[ns.x] * 2"),
        DOUBLE.replace("DOUBLED", "[ns.x, ns.x] | join"), DOUBLE.replace("DOUBLED", "ns.x | replace('a', 'aa')"),
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        "{% macro f(n, t) %}{{ f(n - 1, t ~ t) if n else t }}{% endmacro %}{{ f(60, 'ab') }}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | string }}",
    ],
)  # fmt: skip
def test_templates_that_would_fill_the_memory(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(source)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("line one\n{% if %}", "'made', line 2, is no valid template"),
        ("{% for x in y %}", "is no valid template: Unexpected end of template"),
        ("{% nothing %}", "unknown tag 'nothing'"),
        ("{{ 'a' | nothing }}", "No filter named 'nothing'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nests, too deeply"),
        ("{{ " + "-" * 5000 + "1 }}", "nests, too deeply"),
        ("{% for i in x %}" * 100 + "{% endfor %}" * 100, "fails: IndentationError: too many levels"),
    ],
)
def test_broken_templates(source: str, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        render(source)


@pytest.mark.shared
def test_a_long_conversation_is_no_attack(shared: Path) -> None:
    template = ChatTemplate.from_file(shared / "data/llamacpp-vocab/templates/Qwen-Qwen3-0.6B.jinja")
    messages = [
        {"role": role, "content": f"message {i} " + "word " * 900} for i in range(500) for role in ("user", "assistant")
    ]
    assert len(template.render(messages)) > 4_500_000


def test_several_threads_at_once() -> None:
    template = of("{% for m in messages %}{{ m.content }};{% endfor %}{% for i in range(2000) %}{% endfor %}")
    found: dict[int, str] = {}

    def work(index: int) -> None:
        found[index] = template.render([{"role": "user", "content": str(index)}] * 3)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: f"{index};" * 3 for index in range(6)}


def test_where_templates_come_from(tmp_path: Path) -> None:
    """The last one written goes first."""
    assert ChatTemplate.from_folder(tmp_path) is None

    def shown(**options: Any) -> str:
        template = ChatTemplate.from_folder(tmp_path)
        assert template is not None
        return template.render(USER, **options)

    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert shown() == "legacy"
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert shown() == "legacy"
    config.write_text(json.dumps({"chat_template": "config"}))
    assert shown(tools=TOOLS) == "config"
    named = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "with tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert [shown(), shown(tools=TOOLS), shown(tools=TOOLS, name="default")] == ["list", "with tools", "list"]
    (tmp_path / "chat_template.jinja").write_text("file é", encoding="utf-8")
    assert shown(tools=TOOLS) == "file é"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("more")
    assert [shown(), shown(tools=TOOLS)] == ["file é", "more"]
    with pytest.raises(ChatTemplateError, match=r"has no template 'rag'; it has \['default', 'tool_use'\]"):
        shown(name="rag")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match=r"has no template 'default'; it has \['tool_use'\]"):
        shown()


def test_templates_of_transformers_tokenizers(tmp_path: Path) -> None:
    """The same choice among files as a tokenizer of transformers makes."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    import made_models

    made_models.write_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "list {{ bos_token }}"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": named}))
    for file in (None, "chat_template.jinja"):
        if file is not None:
            (tmp_path / file).write_text("file {{ eos_token }}{{ messages[0].role }}")
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        template = ChatTemplate.from_folder(tmp_path, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
        assert template is not None
        for tools in (None, TOOLS):
            expected = tokenizer.apply_chat_template(USER, tools=tools, tokenize=False)
            assert template.render(USER, tools=tools) == expected


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer_config.json", b'{"chat_template": 3}', "must be a text or a list"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x"}]}', "must be a text or a list"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "x", "template": 3}]}', "is no string"),
        ("chat_template.json", b"{", "chat_template.json"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8"),
        ("chat_template.jinja", b" " * (1 << 17 | 1), "is larger than"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=text) as caught:
        ChatTemplate.from_folder(tmp_path)
    assert name in str(caught.value)
