"""One conversation to text with trained spans, and to token ids with labels: exact, or a ValueError (docs/masks.md)."""

import contextlib
import copy
import functools
import html
import itertools
import json
import os
import re
from datetime import datetime
from typing import NamedTuple

import tokenizers

import spans
import tracing

IGNORE_INDEX = -100
SWITCHES = ("train", "weight", "loss", "training")  # keys by which a message is left out of the training
# Keys of a message that are read here or by an engine; a template may read others.
READ_KEYS = "role content tool_calls tool_call_id name id reasoning_content reasoning thinking".split()
FIX = 'set tokenizer.chat_template to another one, or "train": false in this message'
ADVICE = "mark what to train in the template with {% generation %} ... {% endgeneration %}"


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # [start, end) characters of `text` that are trained


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # as long as input_ids; IGNORE_INDEX where nothing is trained


def render(chat_template: str, messages: list[dict], tools: list[dict] | None = None, **variables) -> Rendered:
    """Renders a conversation as `apply_chat_template` does, and finds what the assistant has to say in it.

    `variables` is what else the template reads: `bos_token`, `eos_token`, `enable_thinking`, ... A span begins where
    the generation prompt ends, and ends with the end-of-turn text. Raises ValueError where this cannot be known."""
    chat, turns = render_turns(chat_template, messages, tools, **variables)
    return Rendered(chat.text, [(start, end) for _, start, end in turns])


def render_turns(chat_template, messages, tools=None, **variables) -> tuple["Chat", list[tuple[int, int, int]]]:
    """The rendered chat, and its spans with the index of their message: (i, start, end), in the order of the text."""
    chat = Chat(chat_template, messages, tools, variables)
    chat.render()
    if chat.has_tags:
        turns = spans.tagged_spans(chat)
    else:
        turns = [span for i in chat.assistants for span in spans.turn_spans(chat, i)]
    turns.sort(key=lambda turn: turn[1])
    for k, (i, start, end) in enumerate(turns[:-1]):
        # White space that a turn prints before the next turn begins, as between two messages of the assistant, is its
        # own: nothing is fed in between, so that the model has to write it.
        next_start = turns[k + 1][1]
        between = [segment for segment in chat.segments if segment.start < next_start and segment.end > end]
        if not chat.text[end:next_start].strip() and all(segment.printer == i for segment in between):
            turns[k] = (i, start, next_start)
    return chat, turns


class Segment(NamedTuple):
    """The characters [start, end) of the rendered text, which have the same origin (see `tracing.Tag`)."""

    start: int
    end: int
    source: int
    is_label: bool
    printer: int
    block: int


class Chat:
    """A conversation with all that its template reads; after `render`, also its text and the segments of the text."""

    def __init__(self, chat_template: str, messages, tools, variables):
        self.plain, self.following, self.has_tags, self.prompts = tracing.compile_template(chat_template)
        self.messages, self.tools = [normalize_message(message) for message in messages], tools
        # The date is the same in all renderings: some templates print the time.
        self.variables = {"documents": None, "strftime_now": datetime.now().strftime, **variables}
        self.traced = [tracing.traced(message, tracing.Tag(i)) for i, message in enumerate(self.messages)]
        self.traced_tools = tracing.traced(tools, tracing.Tag(tracing.TOOLS))
        self.assistants = [i for i, message in enumerate(self.messages) if message.get("role") == "assistant"]
        # The generation prompts for an answer in place of message i.
        self.prompts_before = functools.cache(lambda i: self.generation_prompts(self.traced[:i]))

    def chunks(self, messages: list[dict], add_generation_prompt=False, traced=True) -> list[str]:
        """What the template prints, piece by piece."""
        template, tools = (self.following, self.traced_tools) if traced else (self.plain, self.tools)
        variables = {**self.variables, "messages": messages, "tools": tools}
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return list(template.root_render_func(template.new_context(variables)))
        except Exception as error:  # a template is a program, which may raise anything
            raise ValueError(f"the chat template refuses this conversation: {error}") from None

    def render(self):
        """Finds the text, as transformers renders it, and its segments."""
        self.text = "".join(self.chunks(self.messages, traced=False))
        rendered = tracing.joined(self.chunks(self.traced))
        if rendered != self.text:
            if "&#34;" in self.text and html.unescape(rendered) == html.unescape(self.text):
                raise ValueError("the chat template itself writes escaped quotes (&#34;): remove `safe` from it")
            raise ValueError("the chat template does something that cannot be followed: " + ADVICE)
        # Which message says something of its own, and in the loop of which message.
        said = {(tag.printer, tag.outer) for _, tag in rendered.runs if tag.source == tag.printer and not tag.is_label}
        self.segments, position = [], 0
        for length, tag in rendered.runs:
            if tag.source == tracing.UNTRACKED:
                self.refuse(None, "the chat template changes a text so that it cannot be followed", position)
            printer = tag.message
            # A tool's result may look up the name of its call: that is printed by the tool, not by the assistant. But
            # a template may group the messages, and print all that an assistant says in the loop of another message.
            inside = printer in self.assistants and tag.outer not in (tracing.NONE, *self.assistants)
            if inside and ((printer, printer) in said or (printer, tag.outer) not in said):
                printer = tag.outer
            self.segments.append(Segment(position, position + length, tag.source, tag.is_label, printer, tag.block))
            position += length

    def try_chunks(self, messages: list[dict], add_generation_prompt=False) -> list[str] | None:
        """As `chunks`; None: the template refuses these messages."""
        with contextlib.suppress(ValueError):
            return self.chunks(messages, add_generation_prompt)

    def generation_prompts(self, messages: list[dict]) -> tuple[str, list[str] | None]:
        """All that inference feeds for an answer to these messages, and what may be the generation prompt at its end.

        The candidates come longest first. Where the template refuses the messages: "" and None."""
        with_prompt, without = self.try_chunks(messages, True), self.try_chunks(messages)
        full_prompt = "".join(with_prompt or [])
        if not full_prompt or without is None:
            return full_prompt, None
        # Either what is printed behind the messages, which is more where a template ends every text with something; or
        # what is printed only on request. A template that prints all at once is compared by characters.
        same = len(os.path.commonprefix([with_prompt, without]))
        added, replaced = "".join(with_prompt[same:]), "".join(without[same:])
        on_request = added if same else added[len(os.path.commonprefix([added, replaced])) :]
        found = {tracing.untagged_suffix(tracing.joined(with_prompt)), on_request} - {""}
        return full_prompt, sorted(found, key=len, reverse=True)

    @functools.cached_property
    def default_prompts(self) -> list[str] | None:
        """What may be the prompt after a single question, which is found once for a template and its variables."""
        in_blocks = any(isinstance(message.get("content"), list) for message in self.messages)
        key = (in_blocks, repr(self.tools), repr({**self.variables, "strftime_now": None}))
        if key not in self.prompts:
            question = {"role": "user", "content": [{"type": "text", "text": "x"}] if in_blocks else "x"}
            _, self.prompts[key] = self.generation_prompts([tracing.traced(question, tracing.Tag(0))])
        return self.prompts[key]

    def refuse(self, i: int | None, what: str, place: int):
        row = "" if i is None else f"messages[{i}]: "
        raise ValueError(f"{row}{what}, at character {place} ({self.text[place : place + 40]!r}): {ADVICE}")


def normalize_message(message: dict) -> dict:
    """A message as `apply_chat_template` hands it to the template, which finds the reasoning under either name."""
    message = {name: value for name, value in message.items() if name not in SWITCHES}
    fields = [message[name] for name in ("reasoning_content", "thinking", "reasoning") if message.get(name) is not None]
    return {"thinking": fields[0], **message, "reasoning_content": fields[0]} if fields else message


# ---- tokens ----------------------------------------------------------------------------------------------------------
def encode(tokenizer, messages, tools=None, chat_template=None, train_on="all", date=None) -> Encoded:
    """Token ids of a conversation and, where the assistant speaks, the same ids as labels (elsewhere IGNORE_INDEX).

    The text is tokenized in pieces that begin where a turn begins, so that the ids before it are those that inference
    feeds. `chat_template`: Jinja text; None: the tokenizer's. `train_on`: "all" assistant turns or the "last"; a
    message's own `SWITCHES` always hold. `date`: that the template prints, YYYY-MM-DD; None: today. ValueError: as
    `render`, or the text lacks what a trained message says."""
    return encode_with_notes(tokenizer, messages, tools, chat_template, train_on, date)[0]


def encode_with_notes(tokenizer, messages, tools, chat_template, train_on="all", date=None):
    """As `encode`; and a list of what is trained as it is but may surprise, as "kind: example" (see `notes_of`)."""
    chat_template = chat_template or tokenizer.chat_template
    messages = adapt(tokenizer, chat_template, messages)
    now = {"strftime_now": datetime.fromisoformat(date).strftime} if date else {}
    chat, turns = render_turns(chat_template, messages, tools, **tokenizer.special_tokens_map, **now)
    if not turns:
        raise ValueError("the chat template prints nothing of what the assistant says")
    text, chosen = chat.text, chat.assistants if train_on == "all" else chat.assistants[-1:]
    chosen = [i for i in chosen if is_trained(messages[i], i)]
    keys = {name for message in messages for name, value in message.items() if value not in (None, "", [], {})}
    keys -= {*SWITCHES, *READ_KEYS}
    notes = [f"nothing reads the key {name!r} of a message" for name in sorted(keys) if name not in chat_template]
    notes += ["the template may print the date"] if "strftime_now" in chat_template else []
    notes += notes_of(tokenizer, chat, turns, chosen) + [note for i in chosen for note in check_said(chat, i)]
    if not text.startswith(bos := own_bos(tokenizer)):
        text, turns = bos + text, [(i, start + len(bos), end + len(bos)) for i, start, end in turns]
    ids = token_ids(tokenizer, text[: turns[0][1]], at_start=True)
    labels = [IGNORE_INDEX] * len(ids)
    next_starts = [start for _, start, _ in turns[1:]] + [len(text)]
    for (i, start, end), next_start in zip(turns, next_starts, strict=True):
        turn = token_ids(tokenizer, text[start:end], at_start=start == 0)
        # What follows the turn is tokenized together with it, as inference does, unless a token reaches over the end.
        after = token_ids(tokenizer, text[start:next_start], at_start=start == 0) if next_start > end else turn
        if after[: len(turn)] == turn:
            after = after[len(turn) :]
        else:
            after = token_ids(tokenizer, text[end:next_start], at_start=False)
        # The model stops at a special token. If the template ends the last turn without one, EOS is put there.
        is_ended = (turn and turn[-1] in special_ids(tokenizer)) or after[:1] == [tokenizer.eos_token_id]
        if start == turns[-1][1] and not is_ended:
            if tokenizer.eos_token_id is None:
                raise ValueError("the chat template ends the turn with no special token, and the tokenizer has no EOS")
            turn = [*turn, tokenizer.eos_token_id]
        if i in chosen and turn[-1] not in special_ids(tokenizer):
            notes.append(f"a trained turn ends in no special token: {text[:end][-20:]!r}")
        ids += turn + after
        labels += (turn if i in chosen else [IGNORE_INDEX] * len(turn)) + [IGNORE_INDEX] * len(after)
    return Encoded(ids, labels), list(dict.fromkeys(notes))


def is_trained(message: dict, i: int) -> bool:
    for name in SWITCHES:
        value = message.get(name)
        if value not in (None, 0, 1) or (name == "train" and not isinstance(value, (bool, type(None)))):
            raise ValueError(f'messages[{i}]: "{name}" is {value!r}, not true or false ("weight": 1 or 0)')
    return all(message.get(name) in (None, 1) for name in SWITCHES)


def adapt(tokenizer, chat_template: str, messages: list[dict]) -> list[dict]:
    """The messages as the template takes them: contents as text or in blocks, arguments as objects or as JSON text."""
    if not isinstance(chat_template, str):
        raise ValueError("the tokenizer's chat_template is not set (or has several): set tokenizer.chat_template")
    adapted = [dict(message) for message in messages]
    for message in adapted:
        content = text_of(message)
        in_blocks = takes_blocks(tokenizer, chat_template, message.get("role"))
        if message.get("tool_calls"):
            empty, kind = call_form(tokenizer, chat_template)
            content, calls = content or empty, copy.deepcopy(message["tool_calls"]) if kind is str else []
            for function in [call.get("function", call) for call in calls]:
                if isinstance(function.get("arguments"), dict):
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            message["tool_calls"] = calls or message["tool_calls"]
        message["content"] = [{"type": "text", "text": content or ""}] if in_blocks else content
    return adapted


def text_of(message: dict) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(block["text"] for block in content)


@functools.lru_cache(maxsize=256)
def takes_blocks(tokenizer, chat_template: str, role: str) -> bool:
    """Whether the template prints a role's content only if it comes in blocks: given text, it fails or prints none."""
    printed = []
    for content in (lambda text: text), (lambda text: [{"type": "text", "text": text}]):
        question, probed = {"role": "user", "content": content("Hi")}, {"role": role, "content": content("said")}
        messages = {"user": [probed], "system": [probed, question]}.get(role, [question, probed])
        chat = Chat(chat_template, messages, None, tokenizer.special_tokens_map)
        printed.append(re.search("(?<!text.: .)said", "".join(chat.try_chunks(chat.messages) or [])))
    return bool(printed[1] and not printed[0])


@functools.lru_cache(maxsize=64)
def call_form(tokenizer, chat_template: str) -> tuple[str | None, type]:
    """With which content of a message that only calls ("" or None), and as what (dict, or str: JSON text), the template
    prints the arguments of a call: as objects if it can, and with the least besides."""
    found = {}
    for content, arguments in itertools.product(("", None), ({"text": "said"}, '{"text": "said"}')):
        call = {"id": "a23456789", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content, "tool_calls": [call]}]
        chat = Chat(chat_template, messages, None, tokenizer.special_tokens_map)
        text = "".join(chat.try_chunks(chat.messages) or [])
        if arguments in text if isinstance(arguments, str) else re.search("(?<!text': ')said", text):
            found[content, type(arguments)] = (isinstance(arguments, str), len(text))
    return min(found, key=found.get, default=("", dict))


def check_said(chat: Chat, i: int) -> list[str]:
    """Raises ValueError if the text does not have what message i says. Templates leave out two things on purpose, which
    are returned as notes: reasoning, if something else is printed, and a part of the content."""
    message, content = chat.messages[i], text_of(chat.messages[i])
    calls = [call.get("function", call) for call in message.get("tool_calls") or []]
    own = [(s, chat.text[s.start : s.end]) for s in chat.segments if s.printer == i]
    said = "".join("\0" if s.source != i or (s.is_label and t.lower() == message["role"]) else t for s, t in own)
    has_none = any("None" in text for s, text in own if s.source != i)
    for value in tracing.walk(message):
        is_object = isinstance(value, (dict, list)) and str(value) in said and str(value) not in content
        if has_none if value is None else is_object and str(value) != json.dumps(value, ensure_ascii=False):
            raise ValueError(f"messages[{i}]: the chat template prints {str(value)[:60]!r}, as Python writes it; {FIX}")
    values = [value for call in calls for value in tracing.walk([call.get("name"), call.get("arguments")])]
    texts = [("tool_calls", text) for text in values if isinstance(text, str)]
    texts += [("reasoning_content", text) for text in [message.get("reasoning_content")] if text]
    prints = any(s.source == i and not s.is_label and text.strip() for s, text in own)
    is_left_out = content.strip() and (texts or content.strip() not in said)
    if is_left_out and prints:  # Another part may have the same text. Does another content change what is printed?
        other = {**message, "content": "?" if isinstance(message["content"], str) else [{"type": "text", "text": "?"}]}
        chunks = chat.try_chunks([*chat.messages[:i], other, *chat.messages[i + 1 :]])
        is_left_out = chunks is not None and "".join(chunks) == chat.text
    missing = {"content"} if is_left_out else set()
    missing |= {"tool_calls" for c in calls if isinstance(c.get("arguments"), str) and c["arguments"] not in said}
    # A text may be a part of another: the longest is looked for first, and what is found counts once.
    for part, text in sorted(texts, key=lambda each: -len(each[1])):
        forms = text.strip(), json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
        form = next((form for form in forms if form in said), None)
        missing, said = missing | ({part} if form is None else set()), said.replace(form or "", "\0", 1)
    notes = []
    if "reasoning_content" in missing and (calls or prints):
        missing.remove("reasoning_content")
        notes.append("the template leaves out reasoning")
    if "".join(content.split()) not in "".join("".join(text for _, text in own).split()):
        notes.append(f"the template prints the content in part: {content[:40]!r}")
    if missing:
        raise ValueError(f"messages[{i}]: the chat template leaves out {' and '.join(sorted(missing))}; {FIX}")
    return notes


def notes_of(tokenizer, chat: Chat, turns: list[tuple[int, int, int]], chosen: list[int]) -> list[str]:
    """What may surprise in a conversation of which the messages `chosen` are trained, as "kind: example"."""
    without_tools = chat.tools and not any(segment.source == tracing.TOOLS for segment in chat.segments)
    notes = ["the template leaves out the tools"] if without_tools else []
    for message in chat.messages:
        said = [text_of(message), message.get("reasoning_content") or "", json.dumps(message.get("tool_calls") or "")]
        if found := special_texts(tokenizer).search("\n".join(said)):
            notes.append(f"a special token is typed in a text of the {message.get('role')}: {found[0]!r}")
    for i in chosen:
        message, own = chat.messages[i], [(start, end) for k, start, end in turns if k == i]
        if not (text_of(message).strip() or message.get("tool_calls") or message.get("reasoning_content")):
            notes.append("an empty answer is trained")
        for s in chat.segments if chat.has_tags else []:
            text = chat.text[s.start : s.end].strip()
            is_said = s.source == s.printer == i and text and not (s.is_label and text.lower() == "assistant")
            if is_said and not any(start <= s.start and s.end <= end for start, end in own):
                notes.append(f"no generation block holds what the assistant says: {text[:40]!r}")
        # What inference feeds for the last answer, and what stands before it.
        before = chat.text[: own[0][0]] if own and i == chosen[-1] else ""
        if before and not any(map(before.endswith, chat.default_prompts or [])):
            fed, _ = chat.prompts_before(i)
            if fed and fed != before:
                common = len(os.path.commonprefix([fed, before]))
                line = "inference feeds another text before an answer than was trained"
                notes.append(f"{line}: {fed[common:][:40]!r}, not {before[common:][:40]!r}")
    return notes


def with_bos(tokenizer, chat_template: str) -> str:
    """The template that is saved with the model: it gets a BOS if it writes none but `encode` adds one."""
    chat = Chat(chat_template, [{"role": "user", "content": "Hi"}], None, tokenizer.special_tokens_map)
    chunks = chat.try_chunks(chat.traced, True)
    # A template that refuses this conversation is judged by the dataset, row by row.
    has_bos = chunks is None or "".join(chunks).startswith(own_bos(tokenizer))
    return chat_template if has_bos else "{{- bos_token }}" + chat_template


@functools.lru_cache(maxsize=8)
def own_bos(tokenizer) -> str:
    """The BOS that the tokenizer puts in front of a text; "" if it puts none."""
    return tokenizer.bos_token if tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] else ""


@functools.lru_cache(maxsize=8)
def special_texts(tokenizer) -> re.Pattern:
    """Finds special tokens in a text, of which the tokenizer makes the tokens themselves."""
    texts = sorted(map(tokenizer.convert_ids_to_tokens, special_ids(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer) -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {index for index, token in added if token.special}


def token_ids(tokenizer, text: str, at_start: bool) -> list[int]:
    """Ids of a piece of the text, without special tokens put around it.

    Tokenizers like SentencePiece put a space before what they take for the start of a text. A piece that continues
    where the prompt ended must not get one; behind its first special token it is tokenized as any text."""
    continuing = None if at_start else without_prefix_space(tokenizer)
    if continuing is None:
        return tokenizer.encode(text, add_special_tokens=False) if text else []
    encoding, special = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False), special_ids(tokenizer)
    cut = next((begin for i, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True) if i in special), len(text))
    ids = continuing.encode(text[:cut], add_special_tokens=False).ids
    return ids + tokenizer.encode(text[cut:], add_special_tokens=False)


@functools.lru_cache(maxsize=8)
def without_prefix_space(tokenizer) -> tokenizers.Tokenizer | None:
    """The tokenizer without the space that it puts before a text; None if it puts none."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: state[name] for name in ("normalizer", "pre_tokenizer")}
    no_space = {"prepend_scheme": "never", "add_prefix_space": False, "prepend": ""}
    text = json.dumps(parts)
    without = json.loads(text, object_hook=lambda part: {name: no_space.get(name, part[name]) for name in part})
    return tokenizers.Tokenizer.from_str(json.dumps(state | without)) if without != parts else None
