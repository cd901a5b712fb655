# SPDX-License-Identifier: Apache-2.0
"""A jinja2 sandbox whose templates cannot run for ever or fill the memory.

jinja2's own sandbox keeps a template away from Python. This one also counts what it does: the
syntax tree gets a step at the start of every loop and macro body, and a measure around whatever
becomes text or part of a list, so that no template outgrows its budget without passing a check.
"""

import functools
import json
import re
import time
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from string import Formatter
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context

MAX_NUMBER_BITS = 1 << 16
MAX_WIDTH = 1 << 16  # of padding, indents and the like
ELEMENT = 8  # what a value costs beside its characters: a pointer, and the time to look at it

# No template can write a name with a space.
_STEP = "budget step"
_MEASURE = "budget measure"


class BudgetError(Exception):
    """A template that wants more than it may have."""


class Budget:
    """What one rendering may cost: seconds of this thread's CPU time, and characters produced.

    Characters are counted wherever they are made, also those of texts that are not shown; an
    element of a list counts as `ELEMENT` of them.
    """

    def __init__(self, *, seconds: float, characters: int) -> None:
        self._seconds = seconds
        self._characters = characters
        self._left = characters
        self._deadline = time.monotonic() + seconds
        self._begin = time.thread_time()

    def step(self) -> None:
        """Checks the time. A thread that waits for the CPU gets more of the clock's."""
        if time.monotonic() > self._deadline:
            used = time.thread_time() - self._begin
            if used > self._seconds:
                raise BudgetError(f"runs for more than {self._seconds:g} seconds")
            self._deadline = time.monotonic() + self._seconds - used

    def take(self, characters: int) -> None:
        """Counts characters before they are made."""
        self._left -= characters
        if self._left < 0:
            raise BudgetError(f"makes more than {self._characters} characters of text")
        self.step()

    def measure(self, value: object) -> None:
        """Counts a value with everything in it, as its text would be written."""
        self.take(size(value, self._left))


_BUDGET: ContextVar[Budget] = ContextVar("budget")


def size(value: object, limit: int) -> int:
    """Characters and elements of a value with all that is in it; stops once above `limit`."""
    total = 0
    waiting = [value]
    while waiting and total <= limit:
        item = waiting.pop()
        total += ELEMENT
        match item:
            case str() | bytes():
                total += len(item)
            case int():
                total += item.bit_length() // 3
            case dict():
                waiting.extend(item.keys())
                waiting.extend(item.values())
            case list() | tuple() | set() | frozenset():
                waiting.extend(item)
            case Namespace():
                total += 8 * ELEMENT  # looking into one is slow
                waiting.append(namespace_fields(item))
    return total


def namespace_fields(namespace: Namespace) -> dict[str, Any]:
    """The variables of a namespace, which hides them from the template."""
    fields: dict[str, Any] = object.__getattribute__(namespace, "_Namespace__attrs")
    return fields


def render(template: jinja2.Template, budget: Budget, variables: Mapping[str, Any]) -> str:
    """The text of a template. Raises BudgetError, and whatever the template raises."""
    token = _BUDGET.set(budget)
    try:
        return "".join(template.generate(**variables))
    finally:
        _BUDGET.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. `render` runs its templates; no other way has a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for functions in (self.filters, self.tests):
            functions |= {name: _stepped(function) for name, function in functions.items()}
        self.filters |= {name: _counted_filter(self.filters[name]) for name in _TEXT_FILTERS}
        self.filters |= {"sum": _sum, "join": _join, "replace": _replace, "format": _format, "list": _list}
        self.filters |= {_STEP: _step, _MEASURE: _measure}
        self.globals |= {"dict": TemplateDict(), "namespace": TemplateNamespace, "lipsum": _lipsum}

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        _instrument(source)
        return super()._generate(source, *args, **options)

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """Calls a function for the template."""
        budget = _BUDGET.get()
        budget.step()
        owner = getattr(function, "__self__", None)
        if isinstance(function, types.BuiltinMethodType) and isinstance(owner, str | bytes | int):
            args = _check_method(budget, owner, function.__name__, args, options)
        return super().call(context, function, *args, **options)

    def call_filter(self, *args: Any, **options: Any) -> Any:
        """Calls a filter by name, as `map` does for each element."""
        _BUDGET.get().step()
        return super().call_filter(*args, **options)

    def call_test(self, *args: Any, **options: Any) -> Any:
        """Calls a test by name, as `select` does for each element."""
        _BUDGET.get().step()
        return super().call_test(*args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, once it is known to be small enough."""
        _check_operator(_BUDGET.get(), operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `str.format_map` of the sandbox, with bounded widths."""
        if super().wrap_str_format(value) is None:
            return None
        template: str = value.__self__
        is_map = value.__name__ == "format_map"

        def formatted(*args: Any, **options: Any) -> str:
            if is_map:
                (options,), args = args, ()
            return type(template)(_BoundedFormatter(self).vformat(template, args, options))

        return functools.update_wrapper(formatted, value)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of transformers: JSON as it is, without jinja2's escapes for HTML."""
    budget = _BUDGET.get()
    width = len(indent) if isinstance(indent, str) else indent or 0
    _check_width(width)
    # Every element may stand on a line of its own, as deeply indented as Python can nest.
    budget.take(size(value, 1 << 30) * (1 + 2 * width + sum(map(len, separators or ()))))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class TemplateDict:
    """`dict` of a template: no class, so that nothing of it can be reached."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        """A new dict."""
        found = dict(*args, **fields)
        _BUDGET.get().measure(found)
        return found

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """`namespace` of a template, without names that begin with an underscore."""

    def __init__(self, /, *args: Any, **fields: Any) -> None:
        fields = dict(*args, **fields)
        for name in fields:
            _check_name(name)
        Namespace.__init__(self, fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


class _BoundedFormatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = _BUDGET.get()
        budget.measure(value)
        for number in re.findall(r"\d+", format_spec):
            _check_width(int(number[:9]))
            budget.take(int(number[:9]))
        return Formatter.format_field(self, value, format_spec)


def _instrument(tree: nodes.Template) -> None:
    """Adds the steps and measures to a syntax tree."""
    _add_measures(tree)
    _add_steps(tree)
    if tree.environment is not None:
        tree.set_environment(tree.environment)


def _add_measures(tree: nodes.Template) -> None:
    for concat in list(tree.find_all(nodes.Concat)):
        concat.nodes = [_measured(node) for node in concat.nodes]
    for output in list(tree.find_all(nodes.Output)):
        output.nodes = [_measured(node) for node in output.nodes]
    listings: list[nodes.List | nodes.Tuple] = [*tree.find_all(nodes.List), *tree.find_all(nodes.Tuple)]
    for listing in listings:
        if not isinstance(listing, nodes.Tuple) or listing.ctx == "load":
            listing.items = [node if isinstance(node, nodes.Const) else _measured(node) for node in listing.items]
    for pair in list(tree.find_all(nodes.Pair)):
        pair.value = _measured(pair.value)


def _add_steps(tree: nodes.Template) -> None:
    for comparison in list(tree.find_all(nodes.Compare)):
        comparison.expr = _filter(_STEP, comparison.expr)
    for loop in list(tree.find_all(nodes.For)):
        if loop.test is not None:
            loop.test = nodes.And(_filter(_STEP, nodes.Const(True)), loop.test)
    blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = [*tree.find_all(nodes.For)]
    blocks += [*tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]
    for block in blocks:
        block.body = [nodes.ExprStmt(_filter(_STEP, nodes.Const(True))), *block.body]


def _measured(node: nodes.Expr) -> nodes.Expr:
    return _filter(_MEASURE, node)


def _filter(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno or 1)


@pass_context  # so that it never counts as a constant
def _step(_: Context, value: Any) -> Any:
    _BUDGET.get().step()
    return value


@pass_context
def _measure(_: Context, value: Any) -> Any:
    _BUDGET.get().measure(value)
    return value


_TEXT_FILTERS = {
    "batch", "capitalize", "center", "e", "escape", "forceescape", "indent", "lower", "pprint", "round", "safe",
    "slice", "string", "striptags", "title", "trim", "truncate", "upper", "urlencode", "urlize", "wordcount",
    "wordwrap", "xmlattr",
}  # fmt: skip
"""Filters that write their value as text, or pad it."""


def _stepped(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def stepped(*args: Any, **options: Any) -> Any:
        _BUDGET.get().step()
        return function(*args, **options)

    return stepped


def _counted_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    has_context = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def counted(*args: Any, **options: Any) -> Any:
        value, *others = args[has_context:]
        budget = _BUDGET.get()
        budget.measure(value)
        for argument in (*others, *options.values()):
            if isinstance(argument, int):
                _check_width(argument)
                # An indent stands in front of every line.
                budget.take(abs(argument) * (1 + (value.count("\n") if isinstance(value, str) else 0)))
            elif isinstance(argument, str) and isinstance(value, str):
                budget.take(len(argument) * (1 + value.count("\n")))
        return function(*args, **options)

    return counted


@pass_context
def _sum(context: Context, values: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    if attribute is not None:
        values = context.environment.call_filter("map", values, kwargs={"attribute": attribute}, context=context)
    for value in values:
        start = context.environment.call_binop(context, "+", start, value)  # type: ignore[attr-defined]
    return start


@pass_context
def _join(context: Context, values: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        values = context.environment.call_filter("map", values, kwargs={"attribute": attribute}, context=context)
    found = list(values)
    budget = _BUDGET.get()
    budget.measure(found)
    budget.take(len(str(d)) * len(found))
    joined: str = jinja2.filters.sync_do_join(context.eval_ctx, found, d)
    return joined


@pass_context
def _replace(context: Context, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    budget = _BUDGET.get()
    for value in (text, old, new):
        budget.measure(value)
    budget.take(str(text).count(str(old)) * len(str(new)))
    return jinja2.filters.do_replace(context.eval_ctx, text, old, new, count)


def _format(text: Any, *args: Any, **options: Any) -> str:
    _check_operator(_BUDGET.get(), "%", str(text), options or args)
    return jinja2.filters.do_format(text, *args, **options)


def _list(values: Any) -> list[Any]:
    found = list(values)
    _BUDGET.get().take(ELEMENT * len(found))
    return found


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:  # noqa: A002 - jinja2's names
    _check_width(n * max)
    return jinja2.utils.generate_lorem_ipsum(n, html, min, max)


def _check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    budget.step()
    sequences = [value for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_NUMBER_BITS:
            raise BudgetError(f"computes a number of more than {MAX_NUMBER_BITS} bits")
    elif operator == "%" and isinstance(left, str | bytes):
        text = left if isinstance(left, str) else left.decode("latin-1")
        budget.measure(text)
        budget.measure(right)
        budget.take(text.count("%") * size(right, 1 << 30))
        for number in re.findall(r"%[^%a-zA-Z]*", text):
            for width in re.findall(r"\d+", number):
                _check_width(int(width[:9]))
                budget.take(int(width[:9]))
            if "*" in number:
                raise BudgetError("formats with a width of '*', which is not supported")
    elif operator == "+":
        budget.take(sum(map(_weight, sequences)))
    elif operator == "*" and sequences:
        count = right if sequences[0] is left else left
        budget.take(_weight(sequences[0]) * count if isinstance(count, int) else 0)


def _weight(values: str | bytes | list[Any] | tuple[Any, ...]) -> int:
    return len(values) * (1 if isinstance(values, str | bytes) else ELEMENT)


_CHEAP_METHODS = {"count", "endswith", "find", "index", "rfind", "rindex", "startswith"}
_PADDING_METHODS = {"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"}


def _check_method(
    budget: Budget, owner: str | bytes | int, name: str, args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a method of a text or number, once its result is known to be small enough."""
    if name in _PADDING_METHODS or name.startswith("is"):
        for width in (*args, *options.values()):
            if isinstance(width, int):
                _check_width(width)
                budget.take(abs(width) * (owner.count("\t") if isinstance(owner, str) else 1))
    if isinstance(owner, int) or name in _CHEAP_METHODS:
        return args
    budget.take(len(owner))
    if name == "join" and args:
        values = list(args[0])
        budget.take(len(owner) * len(values))
        budget.measure(values)
        return (values, *args[1:])
    if name == "replace" and len(args) > 1:
        old, new = args[:2]
        budget.take(owner.count(old) * len(new))
    if name == "translate" and args and isinstance(args[0], Mapping):
        budget.take(len(owner) * max((size(value, 1 << 30) for value in args[0].values()), default=0))
    return args


def _check_name(name: object) -> None:
    # Not a method: a namespace has no attributes but its variables.
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot hold {name!r}: names with an underscore in front are not allowed"
        )


def _check_width(width: int) -> None:
    if abs(width) > MAX_WIDTH:
        raise BudgetError(f"asks for a width of {width}, where at most {MAX_WIDTH} is allowed")
