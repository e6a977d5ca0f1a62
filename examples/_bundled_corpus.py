"""The text that the bundled checkpoints are trained and measured on.

In: nothing but the running CPython. Out: `Corpus`: documents to train on, documents kept out, questions with answers.

The text is English that every CPython carries: `pydoc_data.topics`, the docstrings and comments of the standard
library, read from its source files (nothing of it is run), and the docstrings of what is written in C. Order, cuts and
the split depend on the text alone. A paragraph that was seen before is dropped, so nothing that is kept out was also
trained on.
"""

import ast
import builtins
import hashlib
import importlib
import inspect
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "turtledemo", "__pycache__", "_bundled", "__phello__"}
C_MODULES = ("os", "sys", "io", "math", "cmath", "itertools", "functools", "collections", "time", "datetime", "decimal")
C_MODULES += ("array", "zlib", "bz2", "lzma", "select", "socket", "struct", "gc", "_thread", "operator", "unicodedata")
# Links, mail addresses, absolute paths and addresses in memory: no use to a small model, or different on each machine.
UNWANTED = re.compile(r"https?://|ftp://|\S@\S+\.\w|(?:^|\s)/(?:usr|home|etc|tmp|opt|var)/|0x[0-9a-f]{6,}|\\Users\\")
TITLE = re.compile(r"(class |module )?([\w.]+)(?:\(.*\))?(?: in [\w.]+)?")
DEFINITION = re.compile(r'(?:(An? [a-z][a-z -]{2,28}[a-z]) is (?:an?|any|the) |(The "\w+" statement) is )')
COMMENTS = re.compile(r"(?:^[ \t]*#(?: .*)?\n)+", re.MULTILINE)
DOCUMENT_CHARS = 2000
HELD_OUT_SHARE = 10
ASK = ("What is {}?", "What does {} do?", "Explain {}.", "How do I use {}?", "Tell me about {}.", "Describe {}.")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text documents (one string each) and chats (a question, its answer) to train on; documents kept out of it."""

    train: list[str]
    held_out: list[str]
    chats: list[tuple[str, str]]


def load_corpus() -> Corpus:
    """Collects, cuts and splits the text; the same list on every run of the same CPython."""
    seen: set[str] = set()
    documents = [cut for text in _documents() for cut in _cut(_fresh_paragraphs(text, seen))]
    train = [text for text in documents if not _is_held_out(text)]
    return Corpus(train=train, held_out=[text for text in documents if _is_held_out(text)], chats=_chats(train))


def _documents() -> Iterator[str]:
    """Yields texts of any length. The long topics quote the short ones, so they go first and keep their flow."""
    for _, text in sorted(topics.topics.items(), key=lambda item: (-len(item[1]), item[0])):
        yield _plain(text)
    for path in _sources():
        yield from _module_documents(_module_name(path), path)
        yield _comments(path.read_text(errors="replace"))
    for owner in [builtins, *map(importlib.import_module, C_MODULES)]:
        yield from _loaded_documents(owner)


def _sources() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]
    return sorted(path for path in paths if not re.search(r"/(?:config-|_sysconfigdata)", path.as_posix()))


def _module_name(path: Path) -> str:
    parts = path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_documents(name: str, path: Path) -> Iterator[str]:
    """Yields the module's own text with its functions, and each class with its methods."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # lib2to3 carries a file of Python 2
        return
    entries = [_entry("module " + name, tree)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            entries.append(_entry(_signature(node), node))
        elif isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            own = _entry(f"class {node.name} in {name}", node)
            yield _joined([own, *(_entry(_signature(n), n) for n in methods)])
    yield _joined(entries)


def _comments(source: str) -> str:
    """Returns the comments that read as prose: some length, a capital at the beginning, mostly letters."""
    blocks = [re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE) for block in COMMENTS.findall(source)]
    paragraphs = [_plain(paragraph) for block in blocks for paragraph in re.split(r"\n\s*\n", block)]
    return _joined(text for text in paragraphs if len(text) > 60 and text[0].isupper() and _letters(text) > 0.85)


def _letters(text: str) -> float:
    return sum(character.isalpha() or character.isspace() for character in text) / len(text)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    arguments = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg != "self"]
    return f"{node.name}({', '.join(arguments)})"


def _entry(title: str, node: ast.AST) -> str:
    text = ast.get_docstring(node)
    return f"{title}\n\n{_plain(text)}" if text and len(text) > 30 else ""


def _loaded_documents(owner: object) -> Iterator[str]:
    """Yields the docstrings of what is written in C: a built-in type with its methods, a module with its functions."""
    members = sorted(vars(owner).items())
    classes = [member for _, member in members if inspect.isclass(member)]
    functions = [(name, member) for name, member in members if inspect.isbuiltin(member)]
    yield _joined(_loaded_entry(f"{name}()", member) for name, member in functions)
    for cls in classes:
        methods = sorted((n, m) for n, m in vars(cls).items() if inspect.isroutine(m) and not n.startswith("__"))
        own = _loaded_entry(f"class {cls.__name__}", cls)
        yield _joined([own, *(_loaded_entry(f"{cls.__name__}.{n}()", m) for n, m in methods)])


def _loaded_entry(title: str, member: object) -> str:
    text = inspect.getdoc(member) or ""
    return f"{title}\n\n{_plain(text)}" if len(text) > 30 else ""


def _joined(entries: Iterator[str] | list[str]) -> str:
    return "\n\n".join(filter(None, entries))


def _plain(text: str) -> str:
    """Returns the text without underlines, emphasis marks, trailing blanks or more than one empty line in a row."""
    text = re.sub(r"^[*=~^\-]{3,}\n", "", text.expandtabs(4), flags=re.MULTILINE)
    text = re.sub(r"\*\*?(\w[^*\n]*?)\*\*?", r"\1", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _fresh_paragraphs(text: str, seen: set[str]) -> list[str]:
    """Returns the paragraphs that are wanted and were not seen before; adds them to `seen`, in place."""
    fresh = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if UNWANTED.search(paragraph) or (len(key) > 40 and key in seen):
            continue
        seen.add(key)
        fresh.append(paragraph)
    return [p for p, after in pairwise([*fresh, "a()"]) if not (TITLE.fullmatch(p) and TITLE.fullmatch(after))]


def _cut(paragraphs: list[str]) -> Iterator[str]:
    """Yields documents of whole paragraphs, each of about DOCUMENT_CHARS at most."""
    document: list[str] = []
    for paragraph in paragraphs:
        document.append(paragraph)
        if sum(map(len, document)) > DOCUMENT_CHARS:
            yield "\n\n".join(document)
            document = []
    if sum(map(len, document)) > 80:
        yield "\n\n".join(document)


def _is_held_out(text: str) -> bool:
    """One document in HELD_OUT_SHARE, chosen by the hash of its text: nothing else can move it across."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _chats(train: list[str]) -> list[tuple[str, str]]:
    """Returns questions and answers made from the training documents: definitions, and first paragraphs of entries."""
    chats = []
    for document in train:
        paragraphs = document.split("\n\n")
        for title, body in pairwise(paragraphs):
            chats += _definitions(title, body) + _entry_chat(title, body)
    return chats


def _definitions(title: str, body: str) -> list[tuple[str, str]]:
    """Makes questions of "A generator is a ...", and of "Dictionaries" followed by "These represent ..."."""
    text = " ".join(title.split())
    if match := DEFINITION.match(text):
        thing = match[1] or match[2]
        return _questions(thing[0].lower() + thing[1:], _first_sentences(text))
    represents = " ".join(body.split()).removeprefix("These ")
    if not represents.startswith("represent ") or not text.endswith("s") or len(text) > 40:
        return []
    thing = re.sub("s$", "", re.sub("ies$", "y", text.lower()))
    article = "an" if thing[0] in "aeiou" else "a"
    answer = _first_sentences(f"{text} {represents}")
    return [(f"What are {text.lower()}?", answer), *_questions(f"{article} {thing}", answer)]


def _questions(thing: str, answer: str) -> list[tuple[str, str]]:
    forms = ("What is {}?", "Explain {}.", "Define {}.", "Tell me about {}.")
    return [(form.format(thing), answer) for form in forms]


def _entry_chat(title: str, body: str) -> list[tuple[str, str]]:
    """Makes a question of a paragraph that is an entry's title; what follows it is the answer."""
    match, text = TITLE.fullmatch(title), " ".join(body.split())
    if not match or not title[0].islower() or len(text) < 40 or not text[0].isupper() or text.count(">>>"):
        return []
    subject = f"the {match[1] or 'function '}{match[2]}"
    return [(_pick(ASK, text, subject), _first_sentences(text))]


def _first_sentences(text: str, most: int = 320) -> str:
    """Returns whole sentences from the beginning, up to about `most` characters; at least one."""
    sentences = re.split(r"(?<=[.!?:]) (?=[A-Z\"'])", text)
    kept = sentences[0]
    for sentence in sentences[1:]:
        if len(kept) + len(sentence) > most:
            break
        kept += " " + sentence
    return kept[: 2 * most]


def _pick(forms: tuple[str, ...], key: str, subject: str) -> str:
    return forms[hashlib.sha256(key.encode()).digest()[1] % len(forms)].format(subject)


def held_out_sample(documents: list[str], chars: int) -> str:
    """Returns about `chars` of the documents kept out, drawn from all over them, as one text."""
    order = random.Random(0).sample(documents, len(documents))
    sample, size = [], 0
    for document in order:
        if size >= chars:
            break
        sample.append(document)
        size += len(document)
    return "\n\n".join(sample) + "\n"


if __name__ == "__main__":
    corpus = load_corpus()
    sizes = {"train": corpus.train, "held out": corpus.held_out, "chats": [q + a for q, a in corpus.chats]}
    for name, texts in sizes.items():
        print(f"{name}: {len(texts)} texts, {sum(map(len, texts))} characters (CPython {sys.version.split()[0]})")
