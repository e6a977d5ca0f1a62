"""The library's class: histories that are cut, replaced and taken back cost no more than they must."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from lfm2_export import Chat, GenerationConfig
from lfm2_export.backends.base import Mark
from lfm2_export.errors import ContextLimitError, GenerationError
from tests.hash_runner import TOKENIZER, HashRunner

SHORT = GenerationConfig(max_new_tokens=6)


def begun(*texts: str, context: int = 10_000, system: str | None = "Be brief.") -> Chat:
    runner = HashRunner(TOKENIZER.vocab_size, context_length=context)
    chat = Chat(runner, TOKENIZER, SHORT, system=system)
    for text in texts:
        list(chat.send(text))
    return chat


def test_what_is_undone_was_never_said() -> None:
    chat = begun("one", "two")
    assert chat.undo() == "two"
    assert chat.messages == begun("one").messages
    assert "".join(chat.send("three")) == "".join(begun("one").send("three"))
    assert chat.prefilled_tokens < 20
    for _ in range(2):
        chat.undo()
    with pytest.raises(GenerationError, match="no user message yet"):
        chat.undo()


def test_a_settled_conversation_prefills_only_what_is_new() -> None:
    chat, other = begun("one"), begun("one")
    chat.settle()
    assert chat.prefilled_tokens <= 3, "the end of the reply's message"
    chat.settle()
    assert chat.held_tokens == chat.count()
    assert "".join(chat.send("two")) == "".join(other.send("two"))
    assert chat.prefilled_tokens < other.prefilled_tokens
    with pytest.raises(GenerationError, match="nothing was said yet"):
        begun(system=None).settle()


def test_another_system_message_is_as_if_it_had_been_there() -> None:
    chat = begun("one")
    chat.system = "Be long."
    reply = "".join(chat.send("two"))
    assert chat.messages[0] == {"role": "system", "content": "Be long."}
    loaded = begun()
    loaded.load(chat.messages[:-2])
    assert (loaded.system, "".join(loaded.send("two"))) == ("Be long.", reply)
    chat.system = None
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


class Heavy(HashRunner):
    """A runner whose marks hold what the rings of many layers do; ``held``: those that somebody still has."""

    def __init__(self, mark_bytes: int):
        super().__init__(TOKENIZER.vocab_size)
        self.mark_bytes, self.held = mark_bytes, weakref.WeakSet[Mark]()

    def mark(self) -> Mark:
        self.marks.append(Mark(lengths=self.lengths, conv={}))  # for what is valid
        mark = Mark(lengths=self.lengths, conv={"ring": np.zeros(self.mark_bytes, np.uint8)})
        self.held.add(mark)
        return mark

    def is_valid(self, mark: Mark) -> bool:
        return any((mark.lengths == known.lengths).all() for known in self.marks)


@pytest.mark.parametrize(("megabytes", "least", "most"), [(7, 6, 9), (40, 2, 2), (1, 40, 63)])
def test_places_to_come_back_to_are_as_many_as_there_is_memory_for(megabytes: int, least: int, most: int) -> None:
    runner = Heavy(megabytes << 20)
    chat = Chat(runner, TOKENIZER, SHORT)
    for turn in range(40):
        list(chat.send(f"turn {turn}"))
    print(f"{megabytes} MB each: {len(runner.held)} places")
    assert least <= len(runner.held) <= most
    before = chat.messages
    assert "".join(chat.regenerate()) == before[-1]["content"]
    assert chat.prefilled_tokens < 20  # where the last turn began is never given up


def test_the_oldest_turns_go_until_there_is_room() -> None:
    chat = begun("one", "two", "three", context=96)
    before = chat.messages
    room = 96 - chat.count()
    with pytest.raises(ContextLimitError):
        chat.send("word " * room)
    assert chat.messages == before
    dropped = chat.drop_oldest("word " * (room - 8), room=6)
    assert dropped == 1
    assert chat.messages == [before[0], *before[3:]]
    assert "".join(chat.send("word " * (room - 8)))
    with pytest.raises(ContextLimitError, match="do not fit the context of 96 alone"):
        chat.drop_oldest("word " * 100, room=6)
    result = {"role": "tool", "content": "word " * 30}
    with pytest.raises(ContextLimitError):
        chat.drop_oldest(result, room=60)
    assert [m["content"] for m in chat.messages if m["role"] == "user"], "a result's own turn stays"


def test_several_messages_are_sent_at_once_and_a_reply_is_constrained() -> None:
    class Only:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def allowed(self):  # type: ignore[no-untyped-def]
            import numpy as np

            return np.arange(TOKENIZER.vocab_size) == 40 + len(self.tokens)

        def accept(self, token: int) -> None:
            self.tokens.append(token)

    chat, made, prompts = begun("one"), Only(), []

    def constrain(prompt: str) -> Only:
        prompts.append(prompt)
        return made

    results = [{"role": "tool", "content": str(number)} for number in range(2)]
    list(chat.send(results, constrain=constrain))  # type: ignore[arg-type]
    assert made.tokens == [40, 41, 42, 43, 44, 45]
    assert prompts == [chat.prompt]
    assert [m["role"] for m in chat.messages[-3:]] == ["tool", "tool", "assistant"]
    assert chat.reply_tokens == 6
