"""The interactive chat: what is typed, what is shown, commands, tools that run with consent.

In: an open program. Out: a conversation in a terminal, or line by line through pipes. ``application.py`` is the loop;
a file each has where lines come from (``lines.py``, ``editor.py``, ``history.py``, ``typed.py``), how replies are
shown (``view.py``, ``markdown.py``), commands (``commands.py``), one turn with its calls (``turns.py``), tools
(``toolbox.py``, ``signatures.py``) and conversations as files (``conversations.py``). ``chat.Chat`` is the library's
class behind all of it.
"""
