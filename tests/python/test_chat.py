# SPDX-License-Identifier: Apache-2.0
"""`model.chat` and the verb `chat`: prompts, ends of answers, the session in a pipe and in a terminal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_models
import numpy as np
import pytest

from ternaryforge import TernaryModel
from ternaryforge.chat_template import ChatTemplate, ChatTemplateError
from ternaryforge.tokenizer import Tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'stranger' %}{{ raise_exception('no strangers') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | length }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START, END = 259, 260
USER = [{"role": "user", "content": "Hi"}]
USER_IDS = [257, START, *b"user\nHi", END, *b"\n", START, *b"assistant\n"]


def write_chat_model(folder: Path, *, context: int = 400, answers: str = "") -> Path:
    """A random model; with `answers`, one that says that token over and over."""
    config = made_models.llama_config(max_position_embeddings=context)
    tensors = made_models.make_tensors(config)
    made_models.write_tokenizer(folder if folder.exists() else _made(folder))
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    for index, name in ((START, "<|im_start|>"), (END, "<|im_end|>")):
        special = {"id": index, "content": name, "special": True, "normalized": False}
        description["added_tokens"].append(special | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    path.write_text(json.dumps(description), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    if answers:
        # Every token looks the same, the layers add nothing, and the head knows one answer.
        for name, (dtype, values) in list(tensors.items()):
            if "embed_tokens" in name or name == "model.norm.weight":
                tensors[name] = (dtype, np.ones_like(values))
            elif "lm_head" in name or "o_proj" in name or "down_proj" in name:
                tensors[name] = (dtype, np.zeros_like(values))
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer is not None
        tensors["lm_head.weight"][1][tokenizer.encode_chat(answers)[0]] = 1
    return made_models.write_folder(folder, config, tensors)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> TernaryModel:
    return TernaryModel.from_pretrained(folder, threads=1)


def test_chat_is_generate_of_the_rendered_text(model: TernaryModel) -> None:
    result = model.chat(USER, max_new_tokens=9)
    assert result.prompt_tokens == len(USER_IDS)
    assert result.token_ids == model.generate(USER_IDS, max_new_tokens=9).token_ids
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": 2.0, "top_k": 40, "seed": 3}
    assert model.chat(USER, **options).token_ids == model.generate(USER_IDS, **options).token_ids
    stream = model.stream_chat(USER, **options)
    assert "".join(piece.text for piece in stream) == stream.result.text == model.chat(USER, **options).text
    longer = model.chat(USER, tools=[{"name": "f"}], add_generation_prompt=False, max_new_tokens=1)
    assert longer.prompt_tokens == len(USER_IDS) - len("\nassistant") + 1 - 1


def test_template_variables(folder: Path) -> None:
    model = TernaryModel.from_pretrained(folder)
    model.chat_template = ChatTemplate({"default": "{{ messages[0].content }}{{ 'think' if deep }}"}, where="made")
    assert model.chat(USER, max_new_tokens=1).prompt_tokens == 2
    assert model.chat(USER, max_new_tokens=1, template_variables={"deep": True}).prompt_tokens == 7


@pytest.mark.parametrize(("answers", "reason"), [("<|im_end|>", "stop"), ("</s>", "stop"), ("x", "length")])
def test_answers_end_with_the_turn(tmp_path: Path, answers: str, reason: str) -> None:
    model = TernaryModel.from_pretrained(write_chat_model(tmp_path, answers=answers))
    result = model.chat(USER, max_new_tokens=4)
    assert (result.finish_reason, result.text) == (reason, "xxxx" if answers == "x" else "")
    # The end of a turn is nothing special to `generate`.
    expected = "length" if answers == "<|im_end|>" else reason
    assert model.generate(USER_IDS, max_new_tokens=4).finish_reason == expected


def test_what_chat_refuses(tmp_path: Path, model: TernaryModel) -> None:
    with pytest.raises(ChatTemplateError, match="refuses the messages: no strangers"):
        model.chat([{"role": "stranger", "content": "x"}])
    with pytest.raises(ValueError, match=r"conversation has 520 tokens and must be shorter than the context of 400"):
        model.chat([{"role": "user", "content": "x" * 500}])
    with pytest.raises(ValueError, match="max_new_tokens must be positive"):
        model.chat(USER, max_new_tokens=0)
    with pytest.raises(TypeError, match="nothing"):
        model.chat(USER, nothing=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"has no chat template.*put a chat_template.jinja there"):
        TernaryModel.demo().chat(USER)
    shutil.copytree(model.path, tmp_path / "broken")
    (tmp_path / "broken/chat_template.jinja").write_text("{% if %}")
    broken = TernaryModel.from_pretrained(tmp_path / "broken")
    assert broken.generate("ab", max_new_tokens=1).token_ids
    with pytest.raises(ValueError, match="is no valid template"):
        broken.chat(USER)


@pytest.mark.shared
@pytest.mark.parametrize("legacy", [True, False])
def test_special_tokens_of_sentencepiece(shared: Path, tmp_path: Path, legacy: bool) -> None:
    """The ids from tokenizer.model are those that transformers makes with the tokenizer.json of the same model."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    source = shared / "data/tokenizers/llama2"
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8")) | {"legacy": legacy}
    for name, file in (("ours", "tokenizer.model"), ("other", "tokenizer.json")):
        (tmp_path / name).mkdir()
        shutil.copy(source / file, tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_folder(tmp_path / "ours")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "other")
    assert ours is not None
    assert ours.kind == "sentencepiece"
    assert ours.named_tokens == other.special_tokens_map
    template = ChatTemplate.from_folder(tmp_path / "ours", special_tokens=ours.named_tokens)
    assert template is not None
    answered = [*USER, {"role": "assistant", "content": "Yes <s>1"}, {"role": "user", "content": "é"}]
    messages = [{"role": "system", "content": "Be brief."}, *answered]
    text = template.render(messages)
    assert text.startswith("<s>[INST] <<SYS>>")
    ids = ours.encode_chat(text)
    assert ids == other.apply_chat_template(messages, return_dict=False)
    assert ids.count(1) == 3
    assert ours.encode("<s>", add_special_tokens=False) != [1]
    # transformers puts no space in front of a text that begins with one; SentencePiece does.
    for odd in ("", "x", "</s>", "a</s>\n b<s>c  d", "x<s>é"):
        assert ours.encode_chat(odd) == other.encode(odd, add_special_tokens=False), odd


@pytest.mark.shared
@pytest.mark.parametrize(("name", "kind"), [("tinyllama", "PreTrainedTokenizerFast"), ("qwen2", "AutoTokenizer")])
def test_prompts_of_real_models(shared: Path, name: str, kind: str) -> None:
    """Folder in, token ids out: the same as transformers' apply_chat_template."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = shared / "data/tokenizers" / name
    # Not tinyllama's own class: transformers 5 rebuilds that one otherwise than tokenizer.json says.
    ours, other = Tokenizer.from_folder(folder), getattr(transformers, kind).from_pretrained(folder)
    assert ours is not None
    template = ChatTemplate.from_folder(folder, special_tokens=ours.named_tokens)
    assert template is not None
    messages = [
        {"role": "system", "content": "Be brief."},
        *USER,
        {"role": "assistant", "content": "Hello é 🙂"},
        {"role": "user", "content": "2 + 2?\n"},
    ]
    for some in (messages[1:2], messages[:2], messages):
        expected = other.apply_chat_template(some, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(template.render(some, add_generation_prompt=True)) == expected


def run(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ternaryforge", "chat", *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=120)


def test_messages_from_a_pipe(folder: Path, model: TernaryModel) -> None:
    done = run(folder, "--max-new-tokens", "8", "--threads", "1", text="Hi\n\nAnd now?\n")
    first = model.chat(USER, max_new_tokens=8).text
    messages = [*USER, {"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    second = model.chat(messages, max_new_tokens=8).text
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{first}\n{second}\n"
    assert done.stderr.count("[the answer was cut off after 8 tokens]") == 2


def test_one_document(folder: Path, model: TernaryModel) -> None:
    text = '"""one\ntwo"""\n/undo\nfirst \\\nsecond\n//slash\n'
    done = run(folder, "--system", "Be brief.", "--max-new-tokens", "5", "--threads", "1", "--json", text=text)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert [message["role"] for message in document["messages"]] == ["system", *["user", "assistant"] * 2]
    assert [document["messages"][i]["content"] for i in (0, 1, 3)] == ["Be brief.", "first \nsecond", "/slash"]
    assert len(document["answers"]) == 3  # the one taken back as well
    result = model.chat(document["messages"][:4], max_new_tokens=5)
    assert document["answers"][-1]["token_ids"] == result.token_ids


def test_commands(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    lines = ["/help", "a", "b", "/undo", "/system New one.", f"/save {saved}", "/clear", "c", "/quit", "never read"]
    done = run(folder, "--max-new-tokens", "2", "--json", text="\n".join(lines))
    assert done.returncode == 0, done.stderr
    conversation = json.loads(saved.read_text(encoding="utf-8"))
    assert [message["content"] for message in conversation[:2]] == ["New one.", "a"]
    assert len(conversation) == 3
    document = json.loads(done.stdout)
    assert [message["content"] for message in document["messages"][:2]] == ["New one.", "c"]
    assert len(document["messages"]) == 3
    shown = run(folder, text="/help\n/system\n/clear\n/undo\n")
    assert (shown.returncode, shown.stdout) == (0, "")
    assert "/system TEXT" in shown.stderr
    assert "[0 messages taken back]" in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["demo"], "Hi\n", "has no chat template, so it was probably not made for conversations; .*--template FILE"),
        (["FOLDER"], "/nothing\n", "unknown command '/nothing'; /help lists them"),
        (["FOLDER"], "/save\n", "/save needs the name of a file"),
        (["FOLDER"], "x" * 500 + "\n", "conversation has 520 tokens and must be shorter than the context of 400"),
        (["FOLDER", "--template", "absent.jinja"], "Hi\n", "absent.jinja"),
    ],
)
def test_failures(folder: Path, arguments: list[str], text: str, message: str) -> None:
    done = run(*[str(folder) if argument == "FOLDER" else argument for argument in arguments], text=text)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr


def test_a_template_for_a_model_without(tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    done = run("demo", "--template", template, "--max-new-tokens", "4", text="Once upon a time\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


class Terminal:
    """The verb on a pseudo-terminal; `expect` waits for a text and returns what came before it."""

    def __init__(self, *arguments: str | Path) -> None:
        pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
        self._master, child = pty.openpty()
        command = [sys.executable, "-m", "ternaryforge", "chat", *map(str, arguments)]
        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509 - nothing else runs in the child yet
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read(self, seconds: float) -> None:
        """Waits for output, which `seen` then ends with."""
        import select

        ready, _, _ = select.select([self._master], [], [], seconds)
        if ready:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:
                data = b""
            assert data, self.seen[-2000:]
            self.seen += data.decode(errors="replace").replace("\r\n", "\n")

    def expect(self, text: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, (text, self.seen[-2000:])
            self.read(0.2)
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_terminal() -> None:
    """Makes standard input the controlling terminal, so that it turns ^C into a signal, which is not ignored."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs in the background start with it ignored


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str | Path) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_session_in_a_terminal(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    folder = write_chat_model(tmp_path / "model", answers="x", context=100_000)
    session = terminal(folder, "--max-new-tokens", "90000", "--threads", "1")
    session.expect("Type a message, or /help.")
    session.expect("> ")
    session.type("Hi\n")
    session.expect("xxxxxxxx")
    session.type("\x03")
    session.expect("[stopped]")
    session.expect("> ")
    while "[Ctrl-D or /quit ends]" not in session.seen:
        session.type("\x03")  # at the prompt; Python may miss one that comes just as it begins to wait
        session.read(1)
    session.type("/nothing\n")
    session.expect("error: [chat] unknown command")
    session.expect("> ")
    session.type('"""\nseveral\n')
    session.expect("| ")
    session.type('lines"""\n')
    session.expect("xxxx")
    session.type("\x03")
    session.expect("[stopped]")
    session.expect("> ")
    session.type(f"/save {tmp_path / 'saved.json'}\n")
    session.expect("[4 messages written")
    session.expect("> ")
    session.type("\x04")
    assert session.process.wait(timeout=60) == 0
    contents = [message["content"] for message in json.loads((tmp_path / "saved.json").read_text())]
    assert [contents[0], contents[2]] == ["Hi", "several\nlines"]
    assert set(contents[1]) == set(contents[3]) == {"x"}


def test_a_full_context_does_not_end_a_session(folder: Path, terminal: Callable[..., Terminal]) -> None:
    session = terminal(folder, "--max-new-tokens", "2")
    session.expect("> ")
    session.type('"""' + ("x" * 100 + "\n") * 5 + '"""\n')
    session.expect("must be shorter than the context of 400; leave out messages; /undo or /clear makes room")
    session.expect("> ")
    session.type("Hi\n")
    session.expect("[the answer was cut off after 2 tokens]")
    session.type("/quit\n")
    assert session.process.wait(timeout=60) == 0


def test_a_model_cannot_steer_the_terminal(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    folder = write_chat_model(tmp_path / "model", answers="\x1b")
    session = terminal(folder, "--max-new-tokens", "3")
    session.expect("> ")
    session.type("Hi\n")
    assert "\x1b" not in session.expect("\ufffd\ufffd\ufffd")
    session.type("\x04")
