"""Changes a chat template by the pieces that Jinja has: tags, expressions, text, and what stands in them.

The pieces to put in are what a template can do much work or harm with: loops in loops, powers, padding, doubling,
attributes that lead to Python, messages without end.
"""

from __future__ import annotations

import re
from random import Random

from tests.fuzz.mutation import mutate_bytes

_PIECES = re.compile(rb"(\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\})", re.DOTALL)
_NUMBER = re.compile(rb"\d+")
_NUMBERS = (b"0", b"1", b"-1", b"9999999999", b"10**9", b"2**62", b"1e400", b"9" * 4301, b"99999")
_EXPRESSIONS = rb"""
messages
messages[0].content
tools
bos_token
missing
none
[]
{}
''
'x' * 10**10
10 ** 10 ** 7
2 ** 99999999
[0] * 10**9
('a' * 9999999) * 9
1 / 0
1 % 0
'%999999999d' % 1
'{:999999999}'.format(1)
'x'.ljust(10**10)
'x'.center(10**9)
'x'|center(10**9)
'x'|indent(10**9)
range(99999)|list
range(10**9)
range(99999)|map('string')|join
lipsum(999999)
''.__class__.__mro__
messages.__class__
self
self._TemplateReference__context
cycler
joiner
namespace(__class__=1)
dict(a=1)
raise_exception('x' * 9999999)
raise_exception('a\nb')
strftime_now('%' ~ 'd' * 99999)
strftime_now('\ud800')
strftime_now(1)
messages|tojson(indent=10**9)
messages|tojson
undefined_thing.x.y
messages|sort
messages|groupby('role')
'a'|replace('', 'b'*999)
messages|map(attribute='role')|list
tools|random
'\ud800'
'\x1b[2J'
(1).__add__
'a'.encode()
[1,2,3]|batch(10**9)|list
[1]|slice(10**8)|list
'a'|wordwrap(0)
'a'|truncate(-1)
'%c'|format(1114112)
9.9e307 * 10
(9 * 10**4299)|string
[[]]|sum(start=[])
'a' < 1
'x' ~ 'y' * 10**8
""".split(b"\n")[1:-1]
_STATEMENTS = (
    *rb"""
{%- for a in range(99999) %}{%- for b in range(99999) %}x{%- endfor %}{%- endfor %}
{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}
{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}
{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}
{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}
{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}
{% generation %}x{% endgeneration %}
{% break %}
{% continue %}
{% include 'x' %}
{% raw %}
{% extends 'x' %}
{% import 'x' as y %}
{% block a %}{% endblock %}
{% if x %}
{% endfor %}
{% set a, b = 1 %}
{% set messages = 1 %}
{% filter upper %}x{% endfilter %}
{# 
{{
{%
{% set x = [] %}{% for m in messages %}{% set _ = x.append(x) %}{% endfor %}{{ x }}
{% call(x) f() %}{% endcall %}
""".split(b"\n")[1:-1],
    *(b"{{ " + expression + b" }}" for expression in _EXPRESSIONS),
    b"{% if " + b"(" * 300 + b"1" + b")" * 300 + b" %}{% endif %}",
    b"{% if 1 %}" * 120 + b"{% endif %}" * 120,
)


def mutate_template(data: bytes, rng: Random) -> bytes:
    """One change to a piece, or to a number or name in one."""
    pieces = _PIECES.split(data)
    index = rng.randrange(len(pieces))
    match rng.randrange(8):
        case 0:
            del pieces[index]
        case 1:
            pieces.insert(index, pieces[rng.randrange(len(pieces))])
        case 2 | 3:
            pieces.insert(index, rng.choice(_STATEMENTS))
        case 4:
            pieces[index] = _NUMBER.sub(rng.choice(_NUMBERS), pieces[index], count=1)
        case 5 | 6:
            pieces[index] = _with_expression(pieces[index], rng)
        case _:
            return mutate_bytes(data, rng)
    return b"".join(pieces)


def _with_expression(piece: bytes, rng: Random) -> bytes:
    """A word of a piece replaced by an expression."""
    words = list(re.finditer(rb"[\w.]+", piece))
    if not words:
        return piece + rng.choice(_STATEMENTS)
    word = rng.choice(words)
    return piece[: word.start()] + rng.choice(_EXPRESSIONS) + piece[word.end() :]
