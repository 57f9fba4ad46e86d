"""Where each character of a rendered chat comes from: strings that remember it, and a Jinja environment for them.

A run is (length, tag), a tag (source, printer, block), three ints:
  source    whose value it is: 2 * message, or 2 * message + 1 for what only labels it (its role, a name, a key); else
            LITERAL (the template's own text, or a variable), FOREIGN (a tool's description) or LOST
  printer   the message that the template was processing when it printed it; NOBODY; or, below NOBODY, only a hint:
            -2 - the message being processed when the text was put together; whoever prints it overrules that
  block     the {% generation %} block that it stands in, counted from 1; 0: none
"""

import functools
import json
import string

import jinja2
from jinja2 import nodes
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment

LITERAL, FOREIGN, LOST = -1, -2, -3
NOBODY = -1
PLAIN = (LITERAL, NOBODY, 0)
UNKNOWN = (LOST, NOBODY, 0)
# What labels a message or a call, and may rightly be repeated elsewhere (a tool's answer names the call)
LABELS = ("role", "name", "id", "type", "tool_call_id")


class Traced(str):
    """A string with the runs of its characters. Every method that returns text is followed, or gives LOST text."""

    __slots__ = ("runs",)

    def __new__(cls, text="", runs=None):
        self = super().__new__(cls, text)
        length = len(self)
        self.runs = runs if runs is not None else [(length, UNKNOWN)] if length else []
        return self

    def __str__(self):
        return self

    def cut(self, start: int, stop: int):
        if start <= 0 and stop >= len(self):
            return self
        runs, position = [], 0
        for length, tag in self.runs:
            first, last = max(start, position), min(stop, position + length)
            if first < last:
                runs.append((last - first, tag))
            position += length
        return Traced(str.__getitem__(self, slice(max(start, 0), max(start, stop, 0))), runs)

    def __getitem__(self, key):
        text = str.__getitem__(self, key)
        if not isinstance(key, slice):
            at = range(len(self))[key]
            return self.cut(at, at + 1)
        start, stop, step = key.indices(len(self))
        if step == 1:
            return self.cut(start, stop)
        tags = [tag for length, tag in self.runs for _ in range(length)]
        return Traced(text, [(1, tag) for tag in tags[key]])

    def __iter__(self):
        position = 0
        for length, tag in self.runs:
            for at in range(position, position + length):
                yield Traced(str.__getitem__(self, at), [(1, tag)])
            position += length

    def __add__(self, other):
        return (
            Traced(str.__add__(self, other), self.runs + runs_of(other)) if isinstance(other, str) else NotImplemented
        )

    def __radd__(self, other):
        return (
            Traced(str.__add__(other, self), runs_of(other) + self.runs) if isinstance(other, str) else NotImplemented
        )

    def __mul__(self, count):
        return Traced(str.__mul__(self, count), self.runs * count)

    __rmul__ = __mul__

    def __mod__(self, values):
        return percent(self, values)

    def __rmod__(self, left):
        return percent(left, self)

    def lstrip(self, chars=None):
        return self.cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars=None):
        return self.cut(0, len(str.rstrip(self, chars)))

    def strip(self, chars=None):
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix):
        return self.cut(len(prefix) if prefix and str.startswith(self, prefix) else 0, len(self))

    def removesuffix(self, suffix):
        return self.cut(0, len(self) - (len(suffix) if suffix and str.endswith(self, suffix) else 0))

    def parts(self, texts, gap):
        pieces, position = [], 0
        for text in texts:
            # white space between parts may be of any length; nothing but white space precedes the next part
            start = str.find(self, text, position) if gap is None else position
            pieces.append(self.cut(start, start + len(text)))
            position = start + len(text) + (gap or 0)
        return pieces

    def split(self, sep=None, maxsplit=-1):
        return self.parts(str.split(self, sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep=None, maxsplit=-1):
        return self.parts(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends=False):
        lines = self.parts(str.splitlines(self, True), 0)
        return (
            lines
            if keepends
            else [line.cut(0, len(text)) for line, text in zip(lines, str.splitlines(self), strict=True)]
        )

    def partition(self, sep):
        return tuple(self.parts(str.partition(self, sep), 0))

    def rpartition(self, sep):
        return tuple(self.parts(str.rpartition(self, sep), 0))

    def replace(self, old, new, count=-1):
        if not old:
            return whole(str.replace(self, old, new, count), (self, new))
        pieces = self.split(old, count)
        return joined([piece for k, part in enumerate(pieces) for piece in ((new, part) if k else (part,))])

    def join(self, values):
        return joined([piece for k, value in enumerate(values) for piece in ((self, value) if k else (value,))])


def case(method):
    def changed(self, *arguments):
        text = method(self, *arguments)
        return Traced(text, self.runs) if len(text) == len(self) else whole(text, self)

    return changed


def padding(method):
    return lambda self, *arguments, **keywords: whole(method(self, *arguments, **keywords), self)


for name in ("upper", "lower", "capitalize", "title", "swapcase", "casefold"):
    setattr(Traced, name, case(getattr(str, name)))
for name in ("center", "ljust", "rjust", "zfill", "expandtabs", "translate"):
    setattr(Traced, name, padding(getattr(str, name)))


class Dict(dict):
    """A dict of a message (or a part of it); `_source` as in a tag."""

    _source = FOREIGN


class List(list):
    _source = FOREIGN


def traced(value, source: int):
    """A copy of a JSON value whose strings know their source."""
    if isinstance(value, str):
        return Traced(value, [(len(value), (source, NOBODY, 0))] if value else [])
    if isinstance(value, dict):
        copy = Dict()
        copy._source = source
        label = source | 1 if source >= 0 else source
        for key, item in value.items():
            # what a tool answered is not the assistant's, even where its message holds it
            inside = FOREIGN if key in ("tool_responses", "tool_response") else label if key in LABELS else source
            copy[traced(key, label) if isinstance(key, str) else key] = traced(item, inside)
        return copy
    if isinstance(value, (list, tuple)):
        copy = List(traced(item, source) for item in value)
        copy._source = source
        return copy
    return value


def runs_of(text: str) -> list:
    return text.runs if type(text) is Traced else [(len(text), PLAIN)] if text else []


def joined(pieces) -> Traced:
    pieces = [piece if isinstance(piece, str) else as_text(piece) for piece in pieces]
    runs = []
    for piece in pieces:
        runs += runs_of(piece)
    return Traced("".join(pieces), runs)


def tags_in(value) -> set:
    """The tags of all strings in a value."""
    if type(value) is Traced:
        return {tag for _, tag in value.runs}
    if isinstance(value, dict):
        tags = set().union(*(tags_in(part) for item in value.items() for part in item))
        return tags | {(value._source, NOBODY, 0)} if type(value) is Dict else tags
    if isinstance(value, (list, tuple)):
        tags = set().union(*(tags_in(item) for item in value))
        return tags | {(value._source, NOBODY, 0)} if type(value) is List else tags
    return set()


def whole(text: str, origin) -> Traced:
    """Text made from `origin` in a way that is not followed: its source is known if `origin` is all of one message."""
    sources = {tag[0] for tag in tags_in(origin)}
    found = {source & ~1 if source >= 0 else source for source in sources} - {LITERAL}
    source = LITERAL if not found else found.pop() if len(found) == 1 else LOST
    return Traced(text, [(len(text), (source, NOBODY, 0))] if text else [])


def as_text(value) -> str:
    return value if isinstance(value, str) else whole(str(value), value)


def percent(form, values):
    if not isinstance(form, str):
        return form % values
    text = str.__mod__(form, values)
    arguments = values if isinstance(values, tuple) else (values,)
    literals = str(form).split("%s")
    pieces = joined([p for pair in zip(literals, arguments, strict=False) for p in pair] + literals[len(arguments) :])
    simple = len(literals) == len(arguments) + 1 and "%" not in "".join(literals) and pieces == text
    return pieces if simple else whole(text, (form, *arguments))


# ---- what the template prints, and for whom --------------------------------------------------------------------------


def owner(candidates) -> int:
    """The first message among the values that the template has at hand: loop variables, `messages[i]`, ..."""
    for value in candidates:
        kind = type(value)
        if kind is Dict or kind is List:
            if value._source >= 0:
                return value._source >> 1
        elif kind is Traced:
            sources = {tag[0] for _, tag in value.runs}
            messages = {source >> 1 for source in sources if source >= 0}
            if len(messages) == 1 and min(sources) >= 0:
                return messages.pop()
        elif kind is Argument:
            return value.message
    return NOBODY


class Argument:
    """What a macro's arguments belong to."""

    __slots__ = ("message",)

    def __init__(self, message):
        self.message = message


def one_owner(_, *arguments):
    owners = {owner((argument,)) for argument in arguments} - {NOBODY}
    return Argument(owners.pop()) if len(owners) == 1 else None


def emit(value, *candidates):
    """A printed value: what has no printer yet gets one."""
    message = owner(candidates)
    value = value if isinstance(value, str) else as_text(value)
    runs = runs_of(value)
    if message == NOBODY:
        return hinted(value, runs, {tag[0] >> 1 for _, tag in runs if tag[0] >= 0})
    return Traced(value, [(length, tag if tag[1] >= 0 else (tag[0], message, tag[2])) for length, tag in runs])


def assign(value, *candidates):
    """A value that is stored, not printed: the current message is a hint, used if there is none at printing."""
    if not isinstance(value, str):
        return value
    return hinted(value, runs_of(value), {owner(candidates)} - {NOBODY})


def hinted(value, runs, messages):
    if len(messages) != 1:
        return value
    hint = -2 - messages.pop()
    return Traced(value, [(length, (tag[0], hint, tag[2]) if tag[1] == NOBODY else tag) for length, tag in runs])


def printer_of(printer: int) -> int:
    """The message that a run's `printer` names, as a hint or not; NOBODY."""
    return printer if printer >= NOBODY else -2 - printer


def mark(text, block: int) -> Traced:
    return Traced(text, [(length, (tag[0], tag[1], block)) for length, tag in runs_of(text)])


def follow(node, candidates=()):
    """Rewrites a template's syntax tree in place, so that its output passes through `emit`. Returns the node."""
    if isinstance(node, nodes.For):
        node.iter = follow(node.iter, candidates)
        node.test = follow(node.test, candidates) if node.test else None
        # inside, `loop` is the inner loop: candidates found through the outer one no longer hold
        outer = [c for c in candidates if not any(name.name == "loop" for name in c.find_all(nodes.Name))]
        names = names_in(node.target)
        by_name, by_loop = owners_by_index(node.body, names)
        inner = by_name + [nodes.Name(name, "load") for name in names] + by_loop
        node.body = [follow(child, inner + outer) for child in node.body]
        node.else_ = [follow(child, candidates) for child in node.else_]
        return node
    if isinstance(node, nodes.Macro):
        names = [argument.name for argument in node.args]
        arguments = [nodes.Name(name, "load") for name in names]
        candidates = [
            *owners_by_index(node.body, names)[0],
            helper(nodes.Const(None), "__one_owner", arguments),
            *candidates,
        ]
        node.body = [follow(child, candidates) for child in node.body]
        return node
    if isinstance(node, nodes.Output):
        node.nodes = [
            (child if not candidates else helper(nodes.Const(child.data), "__emit", candidates))
            if isinstance(child, nodes.TemplateData)
            else helper(follow(child, candidates), "__emit", candidates)
            for child in node.nodes
        ]
        return node
    for field, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, field, follow(value, candidates))
        elif isinstance(value, list):
            setattr(node, field, [follow(v, candidates) if isinstance(v, nodes.Node) else v for v in value])
    if isinstance(node, nodes.Assign) and candidates and not isinstance(node.node, (nodes.Const, nodes.Call)):
        node.node = helper(node.node, "__assign", candidates)
    if isinstance(node, nodes.Concat):
        return helper(node.nodes[0], "__concat", node.nodes[1:])
    if isinstance(node, nodes.Mod):
        return helper(node.left, "__percent", [node.right])
    return node


def helper(node, name, arguments):
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def names_in(target) -> list[str]:
    return [target.name] if isinstance(target, nodes.Name) else [name.name for name in target.find_all(nodes.Name)]


def owners_by_index(body, names) -> tuple[list, list]:
    """`messages[i]` for each `i` of `names`, and `messages[loop.index0]`, as far as the body has them."""
    container = nodes.Template(body)
    assigned = {name.name for name in container.find_all(nodes.Name) if name.ctx == "store"}
    by_name, by_loop = {}, {}
    for item in container.find_all(nodes.Getitem):
        if not isinstance(item.node, nodes.Name) or item.node.name in assigned:
            continue
        if isinstance(item.arg, nodes.Name) and item.arg.name in names:
            by_name[item.node.name, item.arg.name] = nodes.Getitem(
                nodes.Name(item.node.name, "load"), nodes.Name(item.arg.name, "load"), "load"
            )
        arg = item.arg
        if isinstance(arg, nodes.Getattr) and arg.attr == "index0" and getattr(arg.node, "name", None) == "loop":
            by_loop[item.node.name] = nodes.Getitem(
                nodes.Name(item.node.name, "load"), nodes.Getattr(nodes.Name("loop", "load"), "index0", "load"), "load"
            )
    return [*by_name.values()], [*by_loop.values()]


# ---- the environment -------------------------------------------------------------------------------------------------


class TracingEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which operations on traced text are followed, or give LOST text."""

    concat = staticmethod(joined)

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        for name, function in FILTERS.items():
            if name not in KEEPING:
                self.filters[name] = losing(function)
        self.filters.update(FOLLOWED)

    def _parse(self, source, name, filename):
        tree = super()._parse(source, name, filename)
        follow(tree)
        return tree.set_environment(self)

    def wrap_str_format(self, value):
        plain = super().wrap_str_format(value)
        return plain and functools.partial(formatted, value.__self__, plain)

    def call(self, context, obj, /, *arguments, **keywords):
        text = getattr(obj, "__self__", None)
        if type(text) is str and any(tags_in(a if isinstance(a, (str, list, tuple)) else None) for a in arguments):
            obj = getattr(
                Traced(text, runs_of(text)), obj.__name__
            )  # ", ".join(...) of a string that is the template's
        return super().call(context, obj, *arguments, **keywords)


def formatted(form, plain, *arguments, **keywords):
    text = str.__str__(plain(*arguments, **keywords))
    pieces, count = [], 0
    for literal, field, spec, conversion in string.Formatter().parse(form):
        pieces.append(literal)
        if field is None:
            continue
        key = field or str(count)
        count += 1
        value = arguments[int(key)] if key.isdigit() and int(key) < len(arguments) else keywords.get(key)
        if spec or conversion:
            return whole(text, (form, *arguments, keywords))
        pieces.append(value)
    pieces = joined(pieces)
    return pieces if pieces == text else whole(text, (form, *arguments, keywords))


def losing(function):
    @functools.wraps(function)  # and with it what Jinja passes in front of the arguments
    def followed(*arguments, **keywords):
        result = function(*arguments, **keywords)
        if isinstance(result, str) and type(result) is not Traced:
            origin = [a for a in (*arguments, *keywords.values()) if isinstance(a, (str, list, tuple, dict))]
            if any(tags_in(a) for a in origin):
                return whole(result, origin)
        return result

    return followed


@jinja2.pass_environment
def join(environment, value, d="", attribute=None):
    items = map(make_attrgetter(environment, attribute), value) if attribute is not None else value
    return Traced(d, runs_of(d)).join(items)


def indent(s, width=4, first=False, blank=False):
    """As Jinja's: lines but the first (or all of them), and blank ones only on request, start with `width`."""
    indention = width if isinstance(width, str) else " " * width
    lines = joined([s, "\n"]).splitlines()
    if not blank:
        lines = [lines[0], *(indention + line if line else line for line in lines[1:])]
    return joined([indention if first else "", Traced("\n" + indention if blank else "\n").join(lines)])


def replace(s, old, new, count=None):
    return joined([s]).replace(old, new, -1 if count is None else count)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes HTML characters
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return whole(text, value) if tags_in(value) else text


# Jinja's own filters that pass on the values they are given, or call a method of them
KEEPING = {
    *("abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int"),
    *("items", "last", "length", "list", "lower", "map", "max", "min", "random", "reject", "rejectattr", "reverse"),
    *("round", "select", "selectattr", "slice", "sort", "sum", "trim", "unique", "upper", "wordcount"),
}
FOLLOWED = {
    "join": join,
    "indent": indent,
    "replace": replace,
    "string": as_text,
    "safe": lambda value: value,  # nothing is escaped in chat templates
    "tojson": tojson,
    "format": lambda form, *values, **named: percent(form, named or values),
    "__emit": emit,
    "__assign": assign,
    "__one_owner": one_owner,
    "__concat": lambda *values: joined(values),
    "__percent": percent,
}
