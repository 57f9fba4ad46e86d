"""Strings that remember where each of their characters comes from, and a Jinja environment that renders with them.

A `Traced` string has runs: a list of (length, Tag), one for each stretch of characters with the same origin. The tag
says whose value the characters are, and which message the template was processing when it printed them. From these
two, templates.py finds out what is trained; docs/masks.md works an example through.

Adding, cutting, splitting, joining and replacing texts is followed character by character. The result of any other
operation gets one tag for all of it, at worst UNTRACKED, with which the conversation is refused (`approximate`).
"""

import functools
import itertools
from typing import NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

NONE = -1  # in place of the index of a message
LITERAL, TOOLS, UNTRACKED = -2, -3, -4  # sources that are not a message


class Tag(NamedTuple):
    """The origin of a stretch of characters."""

    source: int = LITERAL  # the message whose value it is; LITERAL: the template's own text or a variable; TOOLS
    is_label: bool = False  # the value only names or classifies the message: its role, an id, a key of a dict
    printer: int = NONE  # the message that the template was processing when it printed this
    hint: int = NONE  # the message being processed when the text was put together, in case no message prints it
    block: int = 0  # the {% generation %} block around it, counted from 1; 0: none
    outer: int = NONE  # the message of the outermost loop that it is printed in; `printer` is that of the innermost

    @property
    def message(self) -> int:
        return self.hint if self.printer == NONE else self.printer


# ---- strings ---------------------------------------------------------------------------------------------------------
class Traced(str):
    """A string with the runs of its characters."""

    __slots__ = ("runs",)

    def __new__(cls, text="", runs=None):
        self = super().__new__(cls, text)
        # Jinja makes strings of the type of a given one. What they consist of is not known then.
        self.runs = ([(len(text), Tag(UNTRACKED))] if text else []) if runs is None else runs
        return self

    def __str__(self):
        return self  # `str` of it would forget the runs, and Jinja calls that for everything it prints

    def __getitem__(self, key):
        text = str.__getitem__(self, key)
        start, stop, step = (key if isinstance(key, slice) else slice(key, key + 1 or None)).indices(len(self))
        if step != 1:
            return approximate(text, self)
        if len(text) == len(self):
            return self
        runs, position = [], 0
        for length, tag in self.runs:
            first, last = max(start, position), min(stop, position + length)
            if first < last:
                runs.append((last - first, tag))
            position += length
        return Traced(text, runs)

    def __iter__(self):
        return (self[position] for position in range(len(self)))

    def __add__(self, other):
        return Traced(str.__add__(self, other), self.runs + runs_of(other))

    def __radd__(self, other):
        return Traced(str.__add__(other, self), runs_of(other) + self.runs)

    def lstrip(self, chars=None):
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars=None):
        return self[: len(str.rstrip(self, chars))]

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def split(self, sep=None, maxsplit=-1):
        texts = str.split(self, sep, maxsplit)
        if sep is None:  # white space of any length may be between two parts
            return [approximate(text, self) for text in texts]
        pieces, start = [], 0
        for text in texts:
            pieces.append(self[start : start + len(text)])
            start += len(text) + len(sep)
        return pieces

    def replace(self, old, new, count=-1):
        return as_traced(new).join(self.split(old, count))

    def join(self, values):
        return joined([piece for value in values for piece in (self, value)][1:])


def runs_of(text: str) -> list:
    """The runs of a string. A plain one is the template's own or a variable (`bos_token`); escaped text is not."""
    if type(text) is Traced:
        return text.runs
    return [(len(text), Tag() if type(text) is str else Tag(UNTRACKED))] if text else []


def joined(pieces) -> Traced:
    """The texts of the pieces one after the other, with their runs."""
    pieces = [piece if isinstance(piece, str) else approximate(str(piece), piece) for piece in pieces]
    return Traced("".join(pieces), [run for piece in pieces for run in runs_of(piece)])


def as_traced(value) -> Traced:
    return value if type(value) is Traced else joined([value])


def untagged_suffix(text: Traced) -> str:
    """The end of a text, as far as no message printed it."""
    runs = itertools.takewhile(lambda run: run[1].message == NONE, reversed(text.runs))
    return "".join(text[len(text) - sum(length for length, _ in runs) :])


def approximate(text: str, *origins) -> str:
    """A text that was made of `origins` in a way that is not followed: it gets one tag for all of it.

    That is their own tag if they have only one, else the source that they share. If they share none: UNTRACKED. Plain
    strings do not count: they are the arguments of a method, such as white space to strip, or keys of a dict."""
    tags = set().union(*map(tags_in, origins))
    sources = {tag.source for tag in tags}
    if not text or sources <= {LITERAL}:
        return text
    if len(tags) == 1:
        tag = tags.pop()
    elif len(sources) == 1:
        tag = Tag(sources.pop(), is_label=all(tag.is_label for tag in tags))
    else:
        # No tool is ever trained, so that a tool's description and the template's text around it need no distinction.
        tag = Tag(TOOLS if sources == {TOOLS, LITERAL} else UNTRACKED)
    return Traced(text, [(len(text), tag)])


def approximated(function, *origins):
    """The function, with the texts that it returns tagged as made of its arguments (and of `origins`)."""

    @functools.wraps(function)  # and with it the marks by which Jinja knows what to pass in front of the arguments
    def call(*arguments, **keywords):
        result = function(*arguments, **keywords)
        made_of = (*origins, *arguments, *keywords.values())
        if isinstance(result, str):
            return approximate(result, *made_of)
        if isinstance(result, (list, tuple)):
            return type(result)(approximate(text, *made_of) for text in result)
        if isinstance(result, bytes):  # they would become plain text when they are decoded
            raise TypeError("the bytes of a text cannot be followed")
        return result

    return call


# A method that is inherited from `str` would return plain text, which counts as the template's own.
methods = [name for name in dir(str) if not name.startswith("_") and name != "maketrans"]
for name in [*methods, "__mul__", "__rmul__", "__mod__", "__rmod__"]:
    if name not in vars(Traced):
        setattr(Traced, name, approximated(getattr(str, name)))


# ---- the values that a template gets ---------------------------------------------------------------------------------
# What labels a message or a call. Another message may repeat it: the answer of a tool names the call.
LABELS = ("role", "name", "id", "type", "tool_call_id")
# What a tool answered is not the assistant's, even where a message of the assistant holds it.
TOOL_ANSWERS = ("tool_responses", "tool_response")


class Dict(dict):
    tag = Tag(TOOLS)  # of the message that it belongs to, or of the tools


class List(list):
    tag = Tag(TOOLS)


def traced(value, tag: Tag, labels=LABELS):
    """A copy of a JSON value in which all strings, dicts and lists have the tag (or that of a label)."""
    if isinstance(value, str):
        return Traced(value, [(len(value), tag)] if value else [])
    if isinstance(value, dict):
        label, copy = Tag(tag.source, True), Dict()
        for key, item in value.items():
            item_tag = Tag(TOOLS) if labels and key in TOOL_ANSWERS else label if key in labels else tag
            copy[traced(key, label)] = traced(item, item_tag, () if key == "arguments" else labels)
    elif isinstance(value, (list, tuple)):
        copy = List(traced(item, tag, labels) for item in value)
    else:
        return value
    copy.tag = tag
    return copy


def walk(value) -> list:
    """A value and all that is in it, the keys of objects too."""
    items = itertools.chain(*value.items()) if isinstance(value, dict) else value
    return [value, *itertools.chain(*map(walk, items if isinstance(value, (dict, list, tuple)) else ()))]


def tags_in(value) -> set[Tag]:
    """The tags of all the strings, dicts and lists in a value that are traced."""
    parts = walk(value)
    tags = {part.tag for part in parts if type(part) in (Dict, List)}
    return tags.union(tag for part in parts if type(part) is Traced for _, tag in part.runs)


# ---- what the template prints, and for which message -----------------------------------------------------------------
def current_messages(candidates) -> list[int]:
    """The messages that are being processed, innermost loop first: those that one of the values at hand belongs to.

    The values are those of the loop variables and of `messages[i]`."""
    found = []
    for value in candidates:  # What the template itself made belongs to the messages whose values it holds.
        parts = value if type(value) is tuple else (value,)  # a tuple: the arguments of a macro
        tags = set().union(*({part.tag} if type(part) in (Dict, List) else tags_in(part) for part in parts))
        messages = {tag.source for tag in tags if tag.source >= 0}
        found += messages if len(messages) == 1 else []
    return found


def tag_output(value, *candidates):
    """A printed value. The current message becomes the printer of what has none yet.

    The output of a macro, or of a {% set %} block, has one already: it was printed there first."""
    value, messages = value if isinstance(value, str) else as_traced(value), current_messages(candidates)
    if not messages:  # as in {{ messages[0].content }}, before the loop
        return with_hint(value, {tag.source for _, tag in runs_of(value) if tag.source >= 0})
    inner, outer = messages[0], messages[-1]
    return Traced(value, [(length, with_printer(tag, inner, outer)) for length, tag in runs_of(value)])


@functools.lru_cache(maxsize=4096)  # called for each run that is printed, mostly with arguments that it has had before
def with_printer(tag: Tag, inner: int, outer: int) -> Tag:
    return tag._replace(printer=inner if tag.printer == NONE else tag.printer, outer=outer)


def tag_stored(value, *candidates):
    """A value that {% set %} stores: it may be printed when no message is being processed, behind the loop."""
    return with_hint(value, set(current_messages(candidates)[:1])) if isinstance(value, str) else value


def with_hint(text: str, messages: set[int]) -> str:
    if len(messages) != 1:
        return text
    hint = messages.pop()
    runs = [(length, tag._replace(hint=hint) if tag.message == NONE else tag) for length, tag in runs_of(text)]
    return Traced(text, runs)


class OutputTagger(NodeTransformer):
    """Rewrites the syntax tree of a template in place, so that all that it prints passes through `tag_output`.

    In a loop over messages `{{ message.content }}` becomes `{{ message.content | __tag_output(message) }}`. The
    `candidates` that are passed down are the expressions for `current_messages`, innermost first."""

    def visit_For(self, node, candidates):
        node.iter = self.visit(node.iter, candidates)
        node.test = node.test and self.visit(node.test, candidates)
        node.else_ = [self.visit(child, candidates) for child in node.else_]
        # In the body `loop` is this loop, so that expressions with the `loop` around it have another meaning.
        outer = [c for c in candidates if not any(name.name == "loop" for name in c.find_all(nodes.Name))]
        names = [name.name for name in nodes.Template([node.target]).find_all(nodes.Name)]
        by_name, by_loop = indexed_messages(node.body, names)
        inner = [*by_name, *(nodes.Name(name, "load") for name in names), *by_loop, *outer]
        node.body = [self.visit(child, inner) for child in node.body]
        return node

    def visit_Macro(self, node, candidates):
        names = [argument.name for argument in node.args]
        # A macro gets parts of one message, mostly, such as its role and its content.
        together = nodes.Tuple([nodes.Name(name, "load") for name in names], "load")
        return self.generic_visit(node, [*indexed_messages(node.body, names)[0], together, *candidates])

    def visit_Output(self, node, candidates):
        for k, child in enumerate(node.nodes):
            node.nodes[k] = filtered(self.visit(child, candidates), "__tag_output", candidates)
        return node

    def visit_Assign(self, node, candidates):
        node = self.generic_visit(node, candidates)
        if candidates and not isinstance(node.node, (nodes.Const, nodes.Call)):
            node.node = filtered(node.node, "__tag_stored", candidates)
        return node

    def visit_Concat(self, node, candidates):
        first, *others = self.generic_visit(node, candidates).nodes
        return filtered(first, "__concat", others)  # for a ~ b Jinja calls "".join, which forgets the runs


def filtered(node, name: str, arguments) -> nodes.Filter:
    """The expression `node | name(*arguments)`."""
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def indexed_messages(body: list[nodes.Node], names: list[str]) -> tuple[list, list]:
    """The expressions `messages[i]` in a body, for each `i` of `names`, and those like `messages[loop.index0]`."""
    body, by_name, by_loop = nodes.Template(body), {}, {}
    # A variable that the body assigns may have no value yet where its name stands.
    assigned = {name.name for name in body.find_all(nodes.Name) if name.ctx == "store"}
    for item in body.find_all(nodes.Getitem):
        index, is_known = item.arg, isinstance(item.node, nodes.Name) and item.node.name not in assigned
        if is_known and isinstance(index, nodes.Name) and index.name in names:
            by_name[item.node.name, index.name] = item
        elif is_known and index == nodes.Getattr(nodes.Name("loop", "load"), "index0", "load"):
            by_loop[item.node.name] = item
    return [*by_name.values()], [*by_loop.values()]


# ---- the environment -------------------------------------------------------------------------------------------------
class TracingEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, in which no operation on a traced text returns plain text."""

    concat = staticmethod(joined)
    intercepted_binops = frozenset(["%"])

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        # A filter that is not known to be safe may make a text in any way.
        for name, function in FILTERS.items():
            self.filters[name] = function if name in SAFE_FILTERS else approximated(function)
        self.filters.update(OWN_FILTERS)

    def _parse(self, source, name, filename):
        return OutputTagger().visit(super()._parse(source, name, filename), []).set_environment(self)

    def wrap_str_format(self, value):
        """Called for `text.format`, also of a plain text."""
        function = super().wrap_str_format(value)
        return function and approximated(function, as_traced(value.__self__))

    def call_binop(self, context, operator, left, right):
        """Called for `left % right`, where `left` may be plain text and `right` a tuple."""
        return super().call_binop(context, operator, as_traced(left) if isinstance(left, str) else left, right)

    def call(self, context, obj, /, *arguments, **keywords):
        """Called for every call. A method of a plain text, as in ", ".join(texts), has to follow its arguments."""
        text = getattr(obj, "__self__", None)
        if type(text) is str:
            obj = getattr(as_traced(text), obj.__name__)
        return super().call(context, obj, *arguments, **keywords)


class GenerationTag(Extension):
    """The tag {% generation %} ... {% endgeneration %}: numbers its blocks, and tags the text in each."""

    tags = {"generation"}

    def __init__(self, environment):
        super().__init__(environment)
        environment.extend(has_generation_tags=False)  # sets an attribute of the environment
        self.numbers = itertools.count(1)

    def parse(self, parser):
        self.environment.has_generation_tags = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("tag_block"), [], [], body).set_lineno(line)

    def tag_block(self, caller):
        text, block = caller(), next(self.numbers)
        return Traced(text, [(length, tag._replace(block=block)) for length, tag in runs_of(text)])


@jinja2.pass_environment
def join(environment, value, d="", attribute=None):
    items = map(make_attrgetter(environment, attribute), value) if attribute is not None else value
    return as_traced(d).join(items)


# Filters of Jinja that pass on values which they are given, or return numbers.
SAFE_FILTERS = (
    "abs attr batch count d default dictsort first float groupby int items last length list map max min random reject "
    "rejectattr reverse round select selectattr slice sort sum unique wordcount"
).split()
OWN_FILTERS = {
    "join": join,
    "replace": lambda text, old, new, count=-1: as_traced(text).replace(old, new, count),
    "string": as_traced,
    "format": lambda form, *values, **named: as_traced(form) % (named or values),
    "safe": lambda value: value,  # nothing is escaped in chat templates
    "trim": lambda value, chars=None: as_traced(value).strip(chars),
    "__tag_output": tag_output,
    "__tag_stored": tag_stored,
    "__concat": lambda *values: joined(values),
}


@functools.lru_cache(maxsize=32)
def compile_template(chat_template: str) -> tuple[jinja2.Template, jinja2.Template, bool, dict]:
    """(the template as transformers compiles it; compiled so that its output is traced; whether it has generation tags;
    a place for what is found out about it once)."""
    extensions = [GenerationTag, loopcontrols]
    environment = TracingEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    try:
        # This function is private, but with it the text is by construction what `apply_chat_template` renders.
        plain = chat_template_utils._compile_jinja_template(chat_template)
        environment.globals.update(plain.environment.globals)  # `raise_exception`, a safe `namespace`, ...
        environment.filters["tojson"] = approximated(plain.environment.filters["tojson"])
        following = environment.from_string(chat_template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
    return plain, following, environment.has_generation_tags, {}
