"""Texts for benchmarks/speculative.py: a prompt and the answer that an able model would give. Written for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Text:
    """``repeats``: whether the answer is made of what its prompt says."""

    name: str
    prompt: str
    answer: str
    repeats: bool = True


_MODULE = """
class Stock:
    def __init__(self, name, count, price):
        self.name = name
        self.count = count
        self.price = price

    def add(self, amount):
        self.count = self.count + amount
        return self.count

    def remove(self, amount):
        self.count = self.count - amount
        return self.count

    def value(self):
        return self.count * self.price

    def describe(self):
        return f"{self.name}: {self.count} at {self.price} each, {self.value()} in all"


def total(stocks):
    result = 0
    for stock in stocks:
        result = result + stock.value()
    return result


def report(stocks):
    lines = [stock.describe() for stock in stocks]
    lines.append(f"total: {total(stocks)}")
    return "\\n".join(lines)
"""

_EDITED = _MODULE.replace(
    "    def remove(self, amount):\n",
    "    def remove(self, amount):\n        if amount > self.count:\n            raise ValueError(amount)\n",
).replace("def total(stocks):", 'def total(stocks):\n    """The value of all."""')

_MINUTES = """
The harbour committee met on Tuesday in the old customs house. Ms Okafor reported that the dredging of the northern
channel will begin on the third of May and end before the first week of July. The cost is 412,000 crowns, of which the
region pays two thirds. Mr Lindqvist asked who answers for damage to the mussel beds; the contractor does, up to
50,000
crowns. The committee then heard that the ferry company wants to move its winter timetable forward by twenty minutes,
because the train from Halmstad arrives earlier from December on. Mr Lindqvist was against it: the school bus from the
islands would miss the first lesson. The committee will ask the school before it decides. Last, the lamp on the outer
mole has failed four times since January. A new one has been ordered and will be fitted on the ninth of April.
"""

_SUMMARY = """- The dredging of the northern channel will begin on the third of May and end before the first week of
July.
- The cost is 412,000 crowns, of which the region pays two thirds; the contractor answers for damage to the mussel
  beds,
  up to 50,000 crowns.
- The ferry company wants to move its winter timetable forward by twenty minutes, because the train from Halmstad
  arrives
  earlier from December on. Mr Lindqvist was against it: the school bus from the islands would miss the first lesson.
  The
  committee will ask the school before it decides.
- The lamp on the outer mole has failed four times since January. A new one has been ordered and will be fitted on the
  ninth of April.
"""

_TOOLS = """List of tools: [{"name": "find_connections", "description": "Trains and buses between two places.",
"parameters":
{"departure_station": "string", "arrival_station": "string", "earliest_departure": "ISO 8601 date and time",
"latest_arrival": "ISO 8601 date and time", "travellers": [{"age": "integer", "discount_card": "string or null"}]}}]

I need to get from Halmstad Central to Göteborg Östra on 2026-12-03, not before 07:40, and have to be there by 10:15
at
the latest. There are three of us: 41 with the card "Regionkort 25", 39 with the card "Regionkort 25", and 6 without
one.
"""

_CALL = """[find_connections(departure_station="Halmstad Central", arrival_station="Göteborg Östra",
earliest_departure="2026-12-03T07:40", latest_arrival="2026-12-03T10:15", travellers=[{"age": 41, "discount_card":
"Regionkort 25"}, {"age": 39, "discount_card": "Regionkort 25"}, {"age": 6, "discount_card": null}])]
"""

_PROSE = """It was the kind of morning on which nobody in the street spoke first. Rain had stopped an hour ago, yet
gutters
still ran, and a smell of wet slate came down from the roofs. Marta carried two loaves under one arm and, in her free
hand, a letter that she had not opened. At the corner she met the baker's boy, who was counting pigeons. Eleven, he
said,
and one of them lame. She gave him half a loaf for it. Further on a window stood open; somebody practised scales,
badly,
then laughed and began a dance instead. By noon the sun had found its way between the chimneys, and whoever could do
so
sat outside. The letter lay unopened beside her plate until evening, when her brother held it up against the lamp and
read, through the paper, a single word.
"""

TEXTS = (
    Text(name="edit", prompt=f"Let remove() refuse more than there is, document total().\n{_MODULE}", answer=_EDITED),
    Text(name="summary", prompt=f"Sum up the minutes in the words of the text.\n{_MINUTES}", answer=_SUMMARY),
    Text(name="tool call", prompt=_TOOLS, answer=_CALL),
    Text(name="prose", prompt="Tell me a short story.", answer=_PROSE, repeats=False),
)
