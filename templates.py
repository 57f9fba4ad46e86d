"""One conversation to text and trained spans, and to token ids and labels: exact, or refused with a ValueError."""

import collections
import functools
import itertools
import json
import re
from datetime import datetime
from typing import NamedTuple

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

import tracing

IGNORE_INDEX = -100


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # [start, end) characters of `text` that are trained


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # as long as input_ids; IGNORE_INDEX where nothing is trained


def render(chat_template: str, messages: list[dict], tools: list[dict] | None = None, **variables) -> Rendered:
    """The text of a conversation as `apply_chat_template` writes it, and what the assistant has to say in it.

    `variables`: what else the template reads: `bos_token`, `eos_token`, `enable_thinking`, ... A span begins
    where the generation prompt ends and ends with the end-of-turn text. Raises ValueError where that cannot be known.
    """
    text, turns = render_turns(chat_template, messages, tools, **variables)
    return Rendered(text, [(start, end) for _, start, end in turns])


def render_turns(chat_template, messages, tools=None, **variables) -> tuple[str, list[tuple[int, int, int]]]:
    """As `render`, with the message that each span belongs to: (index in `messages`, start, end), in order.

    For every character it is known whose value it is, and which message the template was processing when it printed it
    (see tracing.py). What an assistant message printed of its own, after the generation prompt, is trained.
    """
    compiled = compile_template(chat_template)
    chat = Chat(compiled, [prepared(message) for message in messages], tools, variables)
    plain = chat.plain_text()  # first, so that what it refuses is said of plain strings
    rendered = tracing.joined(chat.chunks(chat.traced, False))
    text = str.__str__(rendered)
    if text != plain:
        raise ValueError("the chat template does something that cannot be followed: " + ADVICE)
    segments, position = [], 0
    for length, (source, printer, block) in rendered.runs:
        segments.append(Segment(position, position + length, source, tracing.printer_of(printer), block))
        position += length
    lost = next((segment for segment in segments if segment.source == tracing.LOST), None)
    if lost:
        place = f"at character {lost.start} ({text[lost.start : lost.start + 40]!r})"
        raise ValueError(f"the chat template changes a text so that it cannot be followed, {place}: {ADVICE}")
    if compiled.has_tags:
        turns = tagged_spans(chat, text, segments)
    else:
        turns = [span for i in chat.assistants for span in turn_spans(chat, text, segments, i)]
    turns.sort(key=lambda turn: turn[1])
    for k, (i, start, end) in enumerate(turns[:-1]):
        gap = [
            segment
            for segment in segments
            if end <= segment.start < turns[k + 1][1] or segment.start < end < segment.end
        ]
        if gap and not text[end : turns[k + 1][1]].strip() and all(segment.printer == i for segment in gap):
            turns[k] = (i, start, turns[k + 1][1])  # no prompt is fed in between, so the model writes it too
    return text, turns


class Segment(NamedTuple):
    start: int
    end: int
    source: int
    printer: int
    block: int


ADVICE = "mark what to train in the template with {% generation %} ... {% endgeneration %}"


def prepared(message: dict) -> dict:
    """As `apply_chat_template` hands it to the template, which finds the reasoning under either name."""
    message = {name: value for name, value in message.items() if name not in ("train", "weight")}
    fields = [message[name] for name in ("reasoning_content", "thinking", "reasoning") if message.get(name) is not None]
    return {"thinking": fields[0], **message, "reasoning_content": fields[0]} if fields else message


class Chat:
    """A conversation with all that its template reads."""

    def __init__(self, compiled, messages, tools, variables):
        self.compiled, self.messages, self.tools = compiled, messages, tools
        self.variables = {"documents": None, **variables}
        self.traced = [tracing.traced(message, 2 * i) for i, message in enumerate(messages)]
        self.traced_tools = tracing.traced(tools, tracing.FOREIGN)
        self.assistants = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        compiled.clock[0] = datetime.now()

    def chunks(self, messages: list[dict], add_generation_prompt: bool) -> list[str]:
        """What the template prints, piece by piece."""
        template = self.compiled.tracing
        variables = {**self.variables, "messages": messages, "tools": self.traced_tools}
        context = template.new_context({**variables, "add_generation_prompt": add_generation_prompt})
        try:
            return list(template.root_render_func(context))
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def fed(self, messages: list[dict]) -> str | None:
        """All that inference feeds for an answer to these messages; None: the template refuses."""
        try:
            return "".join(self.chunks(messages, True))
        except ValueError:
            return None

    def plain_text(self) -> str:
        try:
            return self.compiled.plain.render(
                messages=self.messages, tools=self.tools, add_generation_prompt=False, **self.variables
            )
        except TEMPLATE_ERRORS as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def prompts(self, messages: list[dict]) -> list[str] | None:
        """What inference may feed for an answer to these messages, the longest first; None: the template refuses."""
        try:
            asked, told = self.chunks(messages, True), self.chunks(messages, False)
        except ValueError:
            return None
        # what is printed after the messages: more than the prompt, where the template always ends with some text
        text = tracing.joined(asked)
        same = common(asked, told)
        asked, told = "".join(asked[same:]), "".join(told[same:])
        # a template that prints all at once has no pieces
        found = {tail_of(text), asked if same else asked[common(asked, told) :]}
        return sorted(found - {""}, key=len, reverse=True) if str.__str__(text) else None

    def usual_prompts(self) -> list[str] | None:
        """As `prompts`, for an answer to a single question."""
        blocks = any(isinstance(message.get("content"), list) for message in self.messages)
        key = (blocks, repr(self.tools), repr(self.variables))
        if key not in self.compiled.prompts:
            content = [{"type": "text", "text": "x"}] if blocks else "x"
            question = tracing.traced({"role": "user", "content": content}, 0)
            self.compiled.prompts[key] = self.prompts([question])
        return self.compiled.prompts[key]

    def refuse(self, i: int, what: str, text: str, place: int):
        raise ValueError(f"messages[{i}]: {what}, at character {place} ({text[place : place + 40]!r}): {ADVICE}")


TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, AttributeError, LookupError, ValueError, ArithmeticError, RecursionError,
)  # fmt: skip


def common(a, b) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def turn_spans(chat: Chat, text: str, segments: list[Segment], i: int) -> list[tuple[int, int, int]]:
    """The trained spans of assistant message i: one, or several where tools answer within the turn."""
    own = [k for k, segment in enumerate(segments) if segment.printer == i]
    for segment in segments:
        if segment.source == 2 * i and segment.printer != i:
            chat.refuse(i, "what the assistant says is printed where another message is due", text, segment.start)
    if not own:
        return []  # left out by the template
    spans, start = [], turn_start(chat, text, segments, i, own[0])
    for k in range(own[0], own[-1] + 1):
        segment = segments[k]
        if segment.printer == i:
            if segment.source != tracing.LITERAL and segment.source >> 1 != i:
                chat.refuse(i, "the turn has a text that is not the assistant's", text, segment.start)
            if spans and spans[-1][1] == segment.start:
                spans[-1][1] = segment.end
            elif segment.end > start:
                spans.append([max(start, segment.start), segment.end])
        elif segment.printer == tracing.NOBODY or chat.messages[segment.printer].get("role") not in (
            "tool",
            "function",
        ):
            chat.refuse(i, "the turn contains text that is not part of it", text, segment.start)
    if spans:
        spans[-1][1] = turn_end(chat, text, segments, i, own, spans[-1][0])
    return [(i, start, end) for start, end in spans if start < end]


def turn_start(chat: Chat, text: str, segments: list[Segment], i: int, first: int) -> int:
    """Where the generation prompt ends, by the first of these that holds for what message i prints before it says
    anything (its head):
    1. it begins with the prompt that follows a question, or these messages;
    2. it has that prompt further on, behind a BOS or a default system message;
    3. all that inference feeds for an answer ends in it;
    4. the template has no prompt;
    5. it begins with a part of the prompt, whose rest opens or closes thoughts that this turn has not got."""
    start, said = segments[first].start, first
    while said < len(segments) and segments[said].printer == i and segments[said].source != 2 * i:
        said += 1
    head = text[start : segments[said - 1].end] if said > first else ""
    usual = chat.usual_prompts()
    for prompt in usual or []:  # 1
        if head.startswith(prompt):
            return start + len(prompt)
    here = chat.prompts(chat.traced[:i])
    for prompt in here or []:
        if head.startswith(prompt):
            return start + len(prompt)
    for prompt in [*(usual or []), *(here or [])]:  # 2
        if head.count(prompt) == 1 and re.search(r"\w", prompt):
            return start + head.index(prompt) + len(prompt)
    full = chat.fed(chat.traced[:i])
    if full and text.startswith(full) and start <= len(full) <= start + len(head):  # 3
        return len(full)  # the header was printed by another message, or before the system message was known
    if not here and not usual or here == []:  # 4
        if usual is None and here is None:
            chat.refuse(
                i, "the template writes no generation prompt for this conversation or for a question", text, start
            )
        return start
    for prompt in here or usual:  # 5
        pieces = re.findall(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\s|.", prompt)
        kept = ""
        while pieces and head.startswith(kept + pieces[0]):
            kept += pieces.pop(0)
        rest = "".join(pieces).strip()
        if kept.strip() and (not rest or rest[0] in "<[" or kept.endswith("\n")):
            return start + len(kept)
        if (
            not kept.strip()
            and not re.search(r"\w", re.sub(r"<[^<>]*>", "", head))
            and i
            and continues(chat.messages[i - 1])
        ):
            return start
    chat.refuse(
        i, f"the header cannot be told from what follows (the generation prompt is {(here or usual)[0]!r})", text, start
    )


def continues(before: dict) -> bool:
    """Whether an assistant message may go on in the same turn, with no header of its own."""
    return before.get("role") in ("assistant", "tool", "function")


def turn_end(chat: Chat, text: str, segments: list[Segment], i: int, own: list[int], start: int) -> int:
    """The end of a turn: its end-of-turn text, without the white space that only separates it from what follows."""
    last = own[-1]
    end = segments[last].end
    said = next((k for k in reversed(own) if segments[k].source != tracing.LITERAL), None)
    closing = text[max(start, segments[said].end) if said is not None else start : end]
    if closing.strip():
        return end - len(closing) + len(closing.rstrip())
    # The turn does not say that it is over: what follows may
    eos = chat.variables.get("eos_token")
    after = ""
    while last + 1 < len(segments) and segments[last + 1].source == tracing.LITERAL:
        last += 1
        after += text[segments[last].start : segments[last].end]
        if segments[last].printer != segments[own[-1] + 1].printer:
            break
    if after.strip() and eos and after.lstrip().startswith(eos):
        return end + after.index(eos) + len(eos)
    if after.strip():
        # what closes a chat that ends here, where it is not a generation prompt that comes unasked
        tail = tail_of(tracing.joined(chat.chunks(chat.traced[: i + 1], False)))
        if tail.strip() and after.startswith(tail) and not any(tail.endswith(p) for p in chat.usual_prompts() or []):
            return end + len(tail.rstrip())
    return end


def tail_of(text: tracing.Traced) -> str:
    """The end of a text, as far as no message printed it."""
    runs = itertools.takewhile(lambda run: run[1][1] == tracing.NOBODY, reversed(text.runs))
    return str.__str__(text[len(text) - sum(length for length, _ in runs) :])


def tagged_spans(chat: Chat, text: str, segments: list[Segment]) -> list[tuple[int, int, int]]:
    """The template's own {% generation %} blocks: they must hold nothing but what assistant messages print."""
    spans = []
    for segment in segments:
        if not segment.block:
            continue
        turn = segment.printer
        if turn == tracing.NOBODY and chat.assistants:  # an end that is printed behind the messages
            turn = chat.assistants[-1]
        if turn not in chat.assistants:
            raise ValueError(
                f"a {{% generation %}} block holds text that is not an assistant's, at character {segment.start} "
                f"({text[segment.start : segment.start + 40]!r})"
            )
        if segment.source not in (tracing.LITERAL, 2 * turn, 2 * turn + 1):
            chat.refuse(turn, "a {% generation %} block holds a text of another message", text, segment.start)
        if spans and spans[-1][0] == turn and spans[-1][2] == segment.start and spans[-1][3] == segment.block:
            spans[-1][2] = segment.end
        else:
            spans.append([turn, segment.start, segment.end, segment.block])
    for span in spans:  # a block may hold the header, which inference feeds
        header = next(
            (p for p in chat.usual_prompts() or [] if text.startswith(p, span[1]) and span[1] + len(p) < span[2]), ""
        )
        span[1] += len(header)
    return [tuple(span[:3]) for span in spans]


class Compiled(NamedTuple):
    plain: jinja2.Template
    tracing: jinja2.Template
    has_tags: bool
    clock: list  # the time that the template sees: the same in all renderings of a conversation
    prompts: dict  # generation prompts that are known, see Chat.usual_prompts


@functools.lru_cache(maxsize=32)
def compile_template(chat_template: str) -> Compiled:
    """The compiled template, in environments set up as `transformers.utils.chat_template_utils` does it."""
    has_tags, blocks, clock = [], itertools.count(1), [datetime.now()]

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            has_tags.append(True)
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return tracing.mark(caller(), next(blocks))

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **kwargs):
            self, attributes = args[0], dict(*args[1:], **kwargs)
            for name in attributes:
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name, value):
            Namespace.check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def compiled(kind):
        environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
        if kind is ImmutableSandboxedEnvironment:
            environment.filters["tojson"] = tracing.tojson
        environment.globals.update(
            raise_exception=raise_exception, namespace=Namespace, strftime_now=lambda form: clock[0].strftime(form)
        )
        return environment.from_string(chat_template)

    try:
        plain, traced = compiled(ImmutableSandboxedEnvironment), compiled(tracing.TracingEnvironment)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None
    return Compiled(plain, traced, bool(has_tags), clock, {})


def encode(tokenizer, messages, tools=None, chat_template=None, train_on="all") -> Encoded:
    """Token ids of a conversation and, where the assistant speaks, the same ids as labels (elsewhere -100).

    The text is tokenised in pieces that begin where the assistant begins to speak: so the ids before a turn are those
    that inference feeds for it. `chat_template`: Jinja text; None: the tokenizer's. `train_on`: all assistant turns or
    the last; a message's own `"train": false` or `"weight": 0` is always obeyed. Raises ValueError, as `render`.
    """
    chat_template = chat_template or tokenizer.chat_template
    if not isinstance(chat_template, str):
        raise ValueError("the tokenizer has no chat template (or several); set tokenizer.chat_template")
    text, turns = render_turns(chat_template, messages, tools, **tokenizer.special_tokens_map)
    if not turns:
        raise ValueError("the chat template prints nothing of what the assistant says")
    last = turns[-1][0]
    input_ids, labels = [], []
    if starts_with_bos(tokenizer) and not text.startswith(tokenizer.bos_token):
        shift = len(tokenizer.bos_token)
        text, turns = tokenizer.bos_token + text, [(i, start + shift, end + shift) for i, start, end in turns]

    def append(ids: list[int], trained: bool):
        input_ids.extend(ids)
        labels.extend(ids if trained else [IGNORE_INDEX] * len(ids))

    append(ids_of(tokenizer, text[: turns[0][1]], at_start=True), False)
    for (i, start, end), next_start in zip(turns, [turn[1] for turn in turns[1:]] + [len(text)], strict=True):
        trained = is_trained(messages[i], train_on == "all" or i == last, i)
        turn = ids_of(tokenizer, text[start:end], at_start=start == 0)
        whole = ids_of(tokenizer, text[start:next_start], at_start=start == 0)
        # What follows the turn is tokenised with it, as inference does, unless a token would reach over the end.
        after = (
            whole[len(turn) :]
            if whole[: len(turn)] == turn
            else ids_of(tokenizer, text[end:next_start], at_start=False)
        )
        append(turn, trained)
        if i == last and not (turn and turn[-1] in special_ids(tokenizer)) and after[:1] != [tokenizer.eos_token_id]:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    "the chat template ends the assistant's turn with no special token, and the tokenizer has no EOS: "
                    "the model could never stop"
                )
            append([tokenizer.eos_token_id], trained)
        append(after, False)
    return Encoded(input_ids, labels)


def is_trained(message: dict, chosen: bool, index: int) -> bool:
    train, weight = message.get("train"), message.get("weight")
    if not (train is None or isinstance(train, bool)) or weight not in (None, 0, 1):  # (0 == False)
        raise ValueError(f'messages[{index}]: "train" must be true or false, and "weight" 0 or 1')
    return chosen and train is not False and weight != 0


def left_out(chat_template: str, messages: list[dict], tools: list[dict] | None = None, **variables):
    """What a template may leave out of a conversation, as (name, whether it does): "tools", and of each message its
    text, reasoning and tool calls, as "content (system)". Text counts as left out where less than all of it is printed.
    Nothing is told of a template that cannot be followed."""
    chat = Chat(compile_template(chat_template), [prepared(message) for message in messages], tools, variables)
    traced, sources = [], {}
    for i, message in enumerate(chat.messages):
        traced.append(tracing.traced(message, 2 * i))
        for names in (("content",), ("tool_calls",), ("reasoning_content", "thinking", "reasoning")):
            if message.get(names[0]):
                source = 2 * (len(messages) + len(sources))  # of its own, so that it is told from the message's others
                traced[-1].update({n: tracing.traced(message[n], source) for n in names if n in message})
                sources[source] = names[0], message
    text, position, printed = tracing.joined(chat.chunks(traced, False)), 0, collections.Counter()
    for length, (source, _, _) in text.runs:
        printed[source & ~1 if source >= 0 else source] += dense(
            str.__getitem__(text, slice(position, position + length))
        )
        position += length
    if printed[tracing.LOST]:
        return []
    found = [("tools", not printed[tracing.FOREIGN])] if tools else []
    for source, (name, message) in sources.items():
        value = message[name]
        texts = [b.get("text") or "" for b in value] if name == "content" and isinstance(value, list) else [value]
        # (tags such as <think> the template may print itself)
        all_of_it = 1 if name == "tool_calls" else sum(dense(re.sub(r"<[^<>]*>|\[/?[A-Z_]+\]", "", t)) for t in texts)
        found.append((f"{name} ({message['role']})", printed[source] < all_of_it))
    return found


def trained_header(chat_template: str, **variables) -> str:
    """What stands before an answer to a question and is trained with it, as the template has no generation prompt;
    else ""."""
    question, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}
    if Chat(compile_template(chat_template), [], None, variables).usual_prompts():
        return ""
    try:
        text, turns = render_turns(chat_template, [question, answer], **variables)
    except ValueError:  # it wants other messages
        return ""
    header = text[turns[0][1] : turns[0][2]].partition(answer["content"])[0].strip() if turns else ""
    return header if re.search(r"\w", header) else ""


def dense(text: str) -> int:
    """The number of its characters but white space."""
    return len("".join(text.split()))


def with_bos(tokenizer, chat_template: str) -> str:
    """The template that is saved with the model: if it writes no BOS but `encode` adds one, it gets one."""
    try:
        text = compile_template(chat_template).plain.render(
            messages=[{"role": "user", "content": "Hi"}],
            add_generation_prompt=True,
            tools=None,
            **tokenizer.special_tokens_map,
        )
    except Exception:  # a template that refuses this conversation is judged by the data, row by row
        return chat_template
    if starts_with_bos(tokenizer) and not text.startswith(tokenizer.bos_token):
        return "{{- bos_token }}" + chat_template
    return chat_template


def starts_with_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.init_kwargs.get("add_bos_token") is not False


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def ids_of(tokenizer, text: str, at_start: bool) -> list[int]:
    """Ids of a piece of text, without special tokens put around it.

    SentencePiece-like tokenizers put a space before what they take for the start of a text. A piece that goes on where
    the prompt ended has none up to its first special token; from there on it is tokenised as any text.
    """
    bare = None if at_start else without_prefix_space(tokenizer)
    if bare is None:
        return tokenizer.encode(text, add_special_tokens=False) if text else []
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    special = special_ids(tokenizer)
    cut = next((begin for i, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True) if i in special), len(text))
    return [
        *bare.encode(text[:cut], add_special_tokens=False).ids,
        *tokenizer.encode(text[cut:], add_special_tokens=False),
    ]


@functools.lru_cache(maxsize=8)
def without_prefix_space(tokenizer) -> tokenizers.Tokenizer | None:
    """The tokenizer without the space that it puts before a text; None where it puts none."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    changed = []

    def strip(part):
        if isinstance(part, list):
            return [strip(item) for item in part if not (isinstance(item, dict) and item.get("type") == "Prepend")]
        if isinstance(part, dict):
            part = {name: strip(value) for name, value in part.items()}
            part.update({"prepend_scheme": "never"} if "prepend_scheme" in part else {})
            part.update({"add_prefix_space": False} if "add_prefix_space" in part else {})
        return part

    for name in ("normalizer", "pre_tokenizer"):
        part = strip([state[name]])  # in a list, so that a Prepend of its own goes too
        part = part[0] if part else None
        changed.append(part != state[name])
        state[name] = part
    return tokenizers.Tokenizer.from_str(json.dumps(state)) if any(changed) else None
