"""Lines from a terminal with prompt_toolkit: editing, history, several lines, pasted text as it is.

In: keys. Out: a message. Enter sends; Alt-Enter, or a backslash before Enter, begins another line; what is pasted
(bracketed paste) never sends by itself, however long it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from lfm2_export import console, interrupts
from lfm2_export.terminal.history import TypedHistory
from lfm2_export.terminal.typed import cleaned


class EditedLines:
    """``commands``: what is completed behind a "/"."""

    interactive = True

    def __init__(self, history: TypedHistory, commands: Iterable[str]):
        self._session: PromptSession[str] = PromptSession(
            message="> ",
            prompt_continuation="  ",
            multiline=True,
            key_bindings=_bindings(),
            history=_Kept(history),
            completer=_Commands(commands),
            complete_while_typing=False,
        )
        self._asking: PromptSession[str] = PromptSession()

    def read(self) -> str | None:
        """Ctrl-C once empties the line, twice in a row asks whether to leave; Ctrl-D leaves."""
        pressed = 0
        while True:
            try:  # around all of it: a Ctrl-C may come while this still draws what the one before asked for
                if pressed == 1:
                    console.note("Ctrl-C once more, or Ctrl-D, leaves")
                elif pressed > 1:
                    pressed = 0
                    if self._leaves():
                        return None
                return cleaned(self._session.prompt(handle_sigint=False))
            except EOFError:
                return None
            except KeyboardInterrupt:
                interrupts.forget()
                pressed += 1

    def _leaves(self) -> bool:
        answer = self.ask("leave the conversation? [y/N] ")
        return answer is None or answer.strip().lower() in ("y", "yes")

    def ask(self, question: str) -> str | None:
        try:
            return cleaned(self._asking.prompt(question, handle_sigint=False))
        except EOFError:
            return None
        except KeyboardInterrupt:
            interrupts.forget()
            return None


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class _Kept(History):
    """Ours as prompt_toolkit asks for it: the newest first."""

    def __init__(self, history: TypedHistory):
        super().__init__()
        self._history = history

    def load_history_strings(self) -> Iterator[str]:
        yield from reversed(self._history.read())

    def store_string(self, string: str) -> None:
        self._history.add(cleaned(string))


class _Commands(Completer):
    def __init__(self, names: Iterable[str]):
        self._names = sorted(names)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        if text.startswith("/") and not any(character.isspace() for character in text):
            yield from (Completion(name, start_position=-len(text)) for name in self._names if name.startswith(text))
