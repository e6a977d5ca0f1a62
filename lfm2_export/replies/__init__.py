"""What a reply says: its thinking, its text and its calls of tools, told apart while it streams.

In: a reply's text in pieces of any size, with its markers. Out: events, which are the same however the text was cut.
``reply.py`` is the state machine, one file each has what a call looks like (``calls.py``, ``python_calls.py``,
``xml_calls.py``), what a tool takes (``tools.py``), where a stop string ends a text (``stops.py``), and how messages
with calls and thinking go back into a template (``history.py``). Nothing here runs a call.
"""

from lfm2_export.replies.events import Called as Called
from lfm2_export.replies.events import Event as Event
from lfm2_export.replies.events import Said as Said
from lfm2_export.replies.events import Thought as Thought
from lfm2_export.replies.events import ToolCall as ToolCall
from lfm2_export.replies.history import for_template as for_template
from lfm2_export.replies.reply import ReplyParser as ReplyParser
from lfm2_export.replies.reply import opens_thinking as opens_thinking
from lfm2_export.replies.stops import StopStrings as StopStrings
from lfm2_export.replies.tools import Tools as Tools
