"""Chat templates that work without end, fill the memory or nest too deeply: by name, each a whole template.

Every one of them must end in one line. They are grouped by what they lean on, since each group needs another defence
where work is capped by operation; a process with limits needs none.
"""

from __future__ import annotations


def _each(body: str, count: int = 99_999) -> str:
    return f"{{% for i in range({count}) %}}{body}{{% endfor %}}"


def _set(start: str, body: str, end: str, count: int = 60) -> str:
    """A namespace ``n`` that a loop changes."""
    return f"{{% set n = namespace({start}) %}}{_each(body, count)}{end}"


def _doubling(start: str, step: str, end: str = "") -> str:
    return _set(f"x={start}", f"{{% set n.x = {step} %}}", end, 99)


def _nested(count: int, inside: str = "", over: str = "range(99999)") -> str:
    return f"{{% for i in {over} %}}" * count + inside + "{% endfor %}" * count


# A number that the compiler does not know: with constants it would do the work once.
_K = "{% set k = messages | length * 10**6 %}"

LOOPS = {
    "nested ranges": _nested(4),
    "nested ranges with output": _nested(4, "x"),
    "nested ranges that continue": _nested(4, "{% continue %}"),
    "a range that is summed": _each("{{ range(99999) | sum }}"),
    "a range that is sorted": _each("{{ range(99999) | list | sort | length }}"),
    "a condition on each item": _nested(1, _nested(3, "", "range(99999) if i is divisibleby(2)")),
    "a filter block in a loop": _nested(3, "{% filter upper %}x{% endfilter %}"),
    "a call block in a loop": "{% macro m() %}{{ caller() }}{% endmacro %}"
    + _nested(3, "{% call m() %}x{% endcall %}"),
    "a generation block": _nested(3, "{% generation %}a{% endgeneration %}"),
    "loop.cycle": _nested(3, "{{ loop.cycle('a', 'b') }}"),
    "cycler": "{% set c = cycler(1, 2) %}" + _nested(3, "{{ c.next() }}"),
    "in over a list": "{% set l = range(99999) | list %}" + _nested(2, "{% if 'x' in l %}{% endif %}"),
    "in over text": "{% set t = 'a' * 99999 %}" + _nested(2, "{% if 'ab' in t %}{% endif %}"),
    "comparisons of long lists": "{% set l = range(99999) | list %}" + _nested(2, "{% if l == l %}{% endif %}"),
}

TEXT = {
    "times": "{{ 'x' * 10**10 }}",
    "times in a variable": "{% set n = messages | length * 10**10 %}{{ 'x' * n }}",
    "times, folded": "{{ ('x' * 10**10)[0] }}",
    "times of a list": "{{ ([1] * 10**10) | length }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "center": "{{ 'x'.center(10**10) }}",
    "center, the filter": "{{ 'x' | center(10**10) }}",
    "zfill": "{{ 'x'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "percent width": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9 * 2, 1) }}",
    "percent precision": "{{ '%.2000000000f' % 1.5 }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "format precision": "{{ '{:.2000000000f}'.format(1.5) }}",
    "format, the filter": "{{ '%10000000000s' | format('a') }}",
    "replace": "{{ ('a' * 10**5).replace('a', 'b' * 10**6) }}",
    "replace nothing": "{{ ('a' * 10**5).replace('', 'b' * 10**6) }}",
    "join": "{{ ('b' * 10**6).join('a' * 10**5) }}",
    "indent": "{{ ('a\n' * 10**5) | indent(10**6) }}",
    "wordwrap": _K + _each("{{ ('ab ' * k) | wordwrap(1) | length }}"),
    "urlize": "{{ ('http://a.b/ ' * 10**6) | urlize(rel='x' * 10**5) }}",
    "striptags": _K + _each("{{ ('<a>' * k) | striptags }}"),
    "escape": _K + _each("{{ ('<' * (10 * k)) | escape | length }}"),
    "escape of escapes": _doubling("'&' * 1000", "n.x | e | string | replace('&', '&&')"),
    "title": _K + _each("{{ ('ab ' * k) | title | length }}"),
    "translate": "{{ ('a' * 10**5).translate({97: 'b' * 10**6}) }}",
    "tojson with a deep indent": "{{ [[1]] | tojson(indent=10**10) }}",
    "tojson with a long indent": "{{ ([1] * 10**5) | tojson(indent='x' * 10**6) }}",
    "tojson of much": _K + _each("{{ (['é'] * k) | tojson | length }}"),
    "pprint": "{{ ([['a']] * 10**6) | pprint }}",
    "xmlattr": "{{ dict.fromkeys(range(99999) | map('string'), 'x' * 10**6) | xmlattr }}",
    "strftime_now repeated": "{{ strftime_now('%c' * 10**8) }}",
    "lipsum": "{{ lipsum(10**9) }}",
    "lipsum of long paragraphs": "{{ lipsum(1, html=false, min=10**9, max=10**9 + 1) }}",
    "encode": _K + _each("{{ ('a' * (10 * k)).encode('utf-8') | length }}"),
    "a long text many times": "{% set t = 'a' * 10**6 %}{% for i in range(99999) %}{{ t }}{% endfor %}",
}

DOUBLING = {
    "text by ~": _doubling("'x'", "n.x ~ n.x"),
    "text by +": _doubling("'x'", "n.x + n.x"),
    "text by *": _doubling("'x'", "n.x * 2"),
    "text by format": _doubling("'x'", "'{0}{0}'.format(n.x)"),
    "text by replace": _doubling("'x'", "n.x | replace('x', 'xx')"),
    "text by join": _doubling("'x'", "[n.x, n.x] | join"),
    "text by urlencode": _doubling("'%'", "n.x ~ (n.x | urlencode)"),
    "text by tojson": _doubling("'\"'", "n.x | tojson"),
    "text by indent": _doubling("'a\n'", "(n.x ~ n.x) | indent(9)"),
    "text by set blocks": _set("x='x'", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}", ""),
    "text by macros": "{% macro m(x, k) %}{% if k %}{{ m(x ~ x, k - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}"
    "{{ m('x', 60) }}",
    "lists by +": _doubling("[1]", "n.x + n.x"),
    "lists by *": _doubling("[1]", "n.x * 2"),
    "lists by map": _doubling("[1]", "(n.x + n.x) | map('string') | list"),
    "lists in lists, printed": _set("x=[1]", "{% set n.x = [n.x, n.x] %}", "{{ n.x }}"),
    "lists in lists, as JSON": _set("x=[1]", "{% set n.x = [n.x, n.x] %}", "{{ n.x | tojson }}"),
    "lists in lists, compared": _set(
        "x=[1], y=[1]", "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}", "{{ n.x == n.y }}"
    ),
    "dicts in dicts": _set("x={}", "{% set n.x = {'a': n.x, 'b': n.x} %}", "{{ n.x }}"),
    "numbers by *": _doubling("7", "n.x * n.x"),
}

NUMBERS = {
    "power of powers": "{{ (10 ** (10 ** 10)) % 7 }}",
    "power, unprinted": "{% set x = (messages | length * 9) ** 999999999 %}done",
    "power in a condition": "{% if 9 ** (9 ** 9) > 1 %}a{% endif %}",
    "power with a modulus": "{{ (3 ** (10 ** 9)) % 7 }}",
    "many digits": "{{ 10 ** 5000 }}",
    "a number of many digits": "{{ " + "9" * 10_000 + " }}",
    "factorial": _set("x=1", "{% set n.x = n.x * (i + 1) %}", "{{ n.x % 7 }}", 99_999),
    "fibonacci": "{% macro f(n) %}{% if n < 2 %}{{ n }}{% else %}{{ f(n - 1) | int + f(n - 2) | int }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "shift by formatting": "{{ '%d' % (10 ** 4000 * 10 ** 4000) }}",
    "round": "{{ (messages | length + 10 ** 5000) | round(2) }}",
    "division of huge numbers": "{% set a = 7 ** 300000 %}{% set b = 3 ** 200000 %}"
    "{% for i in range(99999) %}{% set x = a // b %}{% endfor %}",
    "float of a huge number": "{{ (10 ** 400) | float + (10 ** 400) / 3 }}",
}

LISTS = {
    "a huge range": "{{ range(10**9) | list | length }}",
    "a huge range in a loop": "{% for i in range(10**12) %}{% endfor %}",
    "slice": "{{ messages | slice(10**10) | list | length }}",
    "slice of a step": "{% set t = 'x' * 10**7 %}" + _each("{% set y = t[::2] %}"),
    "batch": "{{ messages | batch(10**10, 'x') | list | length }}",
    "groupby": _K + _each("{{ ([{'a': 1}] * (k // 10)) | groupby('a') | length }}"),
    "dictsort": _each("{{ dict.fromkeys(range(99999)) | dictsort | length }}"),
    "map of filters": _each("{{ range(99999) | map('string') | map('upper') | list }}"),
    "sum of lists": "{{ ([[1] * 1000] * 10**5) | sum(start=[]) | length }}",
    "a namespace that grows": _set("x=[]", "{% set n.x = n.x + [range(999) | list] %}", "", 99_999),
    "many namespaces": _set("x=none", _each("{% set n.x = namespace(x=n.x) %}"), "", 99_999),
    "copies of the messages": _K + _each("{{ (messages * k) | length }}"),
    "attributes of each": _each("{{ (messages * 10**5) | map(attribute='content') | join | length }}"),
}

DEPTH = {
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros that branch": "{% macro m(k) %}{% if k %}{{ m(k-1) }}{{ m(k-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "two macros in turns": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a recursive loop that branches": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a caller that calls": "{% macro m() %}{{ caller() }}{% endmacro %}"
    "{% macro r() %}{% call m() %}{{ r() }}{% endcall %}{% endmacro %}{{ r() }}",
    "a template that includes itself": "{% include self %}",
    "a template that extends itself": "{% extends self._TemplateReference__context.name %}",
    "blocks in themselves": "{% block a %}{{ self.a() }}{% endblock %}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "brackets": "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
    "braces": "{{ " + "{1:" * 20_000 + "1" + "}" * 20_000 + " }}",
    "minus signs": "{{ " + "-" * 100_000 + "1 }}",
    "nots": "{{ " + "not " * 50_000 + "1 }}",
    "sums": "{{ 1" + " + x" * 50_000 + " }}",
    "powers": "{{ 2" + " ** 2" * 20_000 + " }}",
    "tildes of calls": "{{ f(" + "f(" * 30_000 + "1" + ")" * 30_001 + " }}",
    "filters": "{{ 'a'" + " | upper" * 50_000 + " }}",
    "attributes": "{{ messages" + "[0]" * 50_000 + " }}",
    "conditions": "{% if true %}" * 20_000 + "{% endif %}" * 20_000,
    "loops in loops": "{% for i in [1] %}" * 2_000 + "{% endfor %}" * 2_000,
    "macros in macros": "".join(f"{{% macro m{i}() %}}" for i in range(2_000)) + "{% endmacro %}" * 2_000,
    "ternaries": "{{ " + "1 if x else " * 20_000 + "2 }}",
    "strings side by side": "{{ " + "'a' " * 200_000 + "+ }}",
}

SIZE = {
    "many variables": "".join(f"{{{{ v{i} }}}}" for i in range(60_000)),
    "many branches": "{% if a == 0 %}" + "".join(f"{{% elif a == {i} %}}{i}" for i in range(40_000)) + "{% endif %}",
    "many strings to fold": "{{ 'a' ~ 'b' ~ 'c' ~ 'd' }}" * 20_000,
    "much folded text": "".join("{{ ('x' * 10**8)[0] }}" for _ in range(99)),
    "an unfinished comment many times": "{#" * 500_000,
    "blanks before an unfinished tag": " " * 500_000 + "{%-" * 1000,
    "newlines before tags": ("\n" * 20_000 + "{%- if x %}") * 50,
}

BOMBS: dict[str, str] = {
    f"{group}: {name}": template
    for group, templates in {
        "loops": LOOPS,
        "text": TEXT,
        "doubling": DOUBLING,
        "numbers": NUMBERS,
        "lists": LISTS,
        "depth": DEPTH,
        "size": SIZE,
    }.items()
    for name, template in templates.items()
}
