# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge chat MODEL`: a conversation in the terminal, or with lines from a pipe."""

import contextlib
import json as json_format
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    report_error,
)

if TYPE_CHECKING:
    from ternaryforge.generation import GenerationOptions, GenerationResult
    from ternaryforge.model import TernaryModel

HELP = '''\
/help         these lines
/clear        forget the conversation, keep the system message
/system TEXT  set the system message; without a text, remove it
/undo         take back the last question and its answer
/save FILE    write the conversation as JSON
/quit         end; so does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one; """ begins and ends several lines.
A message that begins with / is written with two of them.'''

# Not even a model may move the cursor or change the title.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, org/name[@revision], or 'demo'.")],
    *,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    template: Annotated[
        Path | None, typer.Option(help="A chat template (jinja) to use instead of the model's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
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
    """Talk with a model. Without a terminal, every line of the input is a message."""
    from ternaryforge.chat_template import ChatTemplate
    from ternaryforge.model import TernaryModel

    loaded = TernaryModel.from_pretrained(
        model,
        threads=threads,
        activations=activations.value if activations else None,
        kv=kv.value,
        head=head.value,
        adapter=adapter,
    )
    if template is not None:
        names = loaded.require_tokenizer().named_tokens
        loaded.chat_template = ChatTemplate.from_file(template, special_tokens=names)
    try:
        loaded.require_chat_template()
    except ValueError as error:
        if loaded.chat_template is not None:
            raise
        raise ValueError(f"{error}; here: --template FILE") from None
    options: GenerationOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or (),
        "seed": seed,
    }
    session = Session(loaded, options, system=system, interactive=sys.stdin.isatty() and not json, quiet=json)
    session.run()
    if json:
        print_json({"messages": session.conversation(), "answers": [answer.to_dict() for answer in session.answers]})


class Session:
    """A conversation. An interactive one goes on after errors; `quiet` ones print nothing."""

    def __init__(
        self, model: "TernaryModel", options: "GenerationOptions", *, system: str, interactive: bool, quiet: bool
    ) -> None:
        self._model = model
        self._options = options
        self._system = system
        self._interactive = interactive
        self._quiet = quiet
        self._messages: list[dict[str, Any]] = []
        self.answers: list[GenerationResult] = []

    def run(self) -> None:
        """Reads messages and answers them until the input ends."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - edits the line and remembers former ones
            print("Type a message, or /help.", file=sys.stderr)
        while True:
            try:
                text = self._read()
                if text is None:
                    break
                if not self._handle(text):
                    break
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print("\n[Ctrl-D or /quit ends]", file=sys.stderr)
            except (ValueError, OSError) as error:
                if not self._interactive or isinstance(error, BrokenPipeError):
                    raise
                report_error(error)

    def conversation(self) -> list[dict[str, Any]]:
        """All messages, with the system message in front."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *self._messages]

    def _read(self) -> str | None:
        """The next message, joined from its lines; None at the end of the input."""
        line = self._read_line("> ")
        if line is None:
            return None
        if line.lstrip().startswith('"""'):
            text = line.lstrip()[3:]
            while '"""' not in text:
                line = self._read_line("| ")
                if line is None:
                    break
                text += "\n" + line
            return text.partition('"""')[0].strip("\n")
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            line = self._read_line("| ")
            if line is None:
                break
            lines.append(line)
        return "\n".join(lines)

    def _read_line(self, prompt: str) -> str | None:
        if self._interactive:
            try:
                return input(prompt)
            except EOFError:
                print()
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _handle(self, text: str) -> bool:
        """Obeys a command or answers a message; False ends the conversation."""
        if not text.strip():
            return True
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            return self._obey(text)
        self._answer(text)
        return True

    def _obey(self, text: str) -> bool:
        name, _, argument = text.partition(" ")
        argument = argument.strip()
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                self._say(HELP)
            case "/clear":
                self._messages.clear()
                self._say("[the conversation is empty]")
            case "/system":
                self._system = argument
                self._say("[the system message is set]" if argument else "[there is no system message]")
            case "/undo":
                self._undo()
            case "/save" if argument:
                document = json_format.dumps(self.conversation(), indent=2, ensure_ascii=False)
                Path(argument).write_text(document + "\n", encoding="utf-8")
                self._say(f"[{len(self.conversation())} messages written to {argument}]")
            case "/save":
                raise ValueError("[chat] /save needs the name of a file")
            case _:
                raise ValueError(f"[chat] unknown command {name!r}; /help lists them")
        return True

    def _undo(self) -> None:
        """Takes messages back up to the last one of the user."""
        before = len(self._messages)
        while self._messages and self._messages.pop()["role"] != "user":
            pass
        self._say(f"[{before - len(self._messages)} messages taken back]")

    def _say(self, text: str) -> None:
        """What is no answer goes where it does not mix with them."""
        if not self._quiet:
            print(text, file=sys.stderr)

    def _answer(self, text: str) -> None:
        question = {"role": "user", "content": text}
        try:
            stream = self._model.stream_chat([*self.conversation(), question], **self._options)
        except ValueError as error:
            hint = "; /undo or /clear makes room" if self._interactive and "context" in str(error) else ""
            raise ValueError(f"{error}{hint}") from None
        stopped = False
        try:
            for piece in stream:
                self._show(piece.text)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            stopped = True
        result = stream.result
        if stopped and not result.token_ids:
            self._say("[stopped]")
            return
        self._messages += [question, {"role": "assistant", "content": result.text}]
        self.answers.append(result)
        self._show("\n")
        if stopped:
            self._say("[stopped]")
        elif result.finish_reason == "length":
            self._say(f"[the answer was cut off after {len(result.token_ids)} tokens]")

    def _show(self, text: str) -> None:
        if not self._quiet:
            print(_CONTROL.sub("\ufffd", text) if sys.stdout.isatty() else text, end="", flush=True)
