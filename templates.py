"""One conversation to text and trained spans, and to token ids and labels: exact, or refused with a ValueError."""

import functools
import json
from datetime import datetime
from typing import NamedTuple

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

IGNORE_INDEX = -100


class Rendered(NamedTuple):
    text: str
    spans: list[tuple[int, int]]  # [start, end) characters of `text` that are trained


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # as long as input_ids; IGNORE_INDEX where nothing is trained


def render(chat_template: str, messages: list[dict], tools: list[dict] | None = None, **variables) -> Rendered:
    """The text of a conversation as `apply_chat_template` writes it, and what the assistant has to say in it.

    `variables` are what the template reads besides: `bos_token`, `eos_token`, `enable_thinking`, ... A span begins
    where the generation prompt ends and ends with the end-of-turn text. Raises ValueError where that cannot be known.
    """
    text, turns = render_turns(chat_template, messages, tools, **variables)
    return Rendered(text, [(start, end) for _, start, end in turns])


def render_turns(chat_template, messages, tools=None, **variables) -> tuple[str, list[tuple[int, int, int]]]:
    """As `render`, with the message that each span belongs to: (index in `messages`, start, end).

    With `{% generation %}` tags the template says it itself. Without, a turn is what stands between two texts: the one
    that inference feeds before the turn (`add_generation_prompt`), and the conversation up to and with the turn. Both
    must be beginnings of the whole text; a template that looks ahead or back may break that, and is refused.
    """
    messages = [{k: v for k, v in message.items() if k not in ("train", "weight")} for message in messages]
    template, writer = compile_template(chat_template)
    variables = {"tools": tools, "documents": None, **variables}

    def text_of(upto: int, add_generation_prompt: bool) -> str:
        try:
            return template.render(messages=messages[:upto], add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"the chat template refuses messages[:{upto}]: {error}") from None

    assistant = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if writer.has_tags:
        text, blocks = split_marks(text_of(len(messages), False), writer)
        if len(blocks) != len(assistant):
            raise ValueError(
                f"the chat template wrote {len(blocks)} {{% generation %}} blocks for {len(assistant)} assistant turns; "
                "put the tags around the whole of what each assistant turn writes"
            )
        return text, [(i, start, end) for i, (start, end) in zip(assistant, blocks, strict=True)]

    text = text_of(len(messages), False)
    turns = []
    for i in assistant:
        prompt, upto = text_of(i, True), text_of(i + 1, False)
        if not text.startswith(upto) or not upto.startswith(prompt):
            other = prompt if text.startswith(upto) else upto
            place = next(
                (k for k, (a, b) in enumerate(zip(other, text, strict=False)) if a != b), min(len(other), len(text))
            )
            raise ValueError(
                f"messages[{i}]: the chat template writes the conversation up to this turn differently once more "
                f"follows (at character {place}: {other[place : place + 30]!r}, later {text[place : place + 30]!r}), so "
                "what to train cannot be known; mark it in the template with {% generation %} ... {% endgeneration %}"
            )
        turns.append((i, len(prompt), turn_end(upto, len(prompt), messages[i])))
    return text, turns


def turn_end(upto: str, start: int, message: dict) -> int:
    """The end of a turn without the white space that only separates it from the next one."""
    stripped = max(start, len(upto.rstrip()))
    content = message.get("content")
    if isinstance(content, str) and content.strip() and upto[:stripped].endswith(content.rstrip()):
        return len(upto)  # nothing but white space says that the turn is over
    return stripped


class Writer:
    """Where `{% generation %}` blocks begin and end: marks are written into the text, and taken out again."""

    def __init__(self, has_tags: bool):
        self.has_tags = has_tags
        # Private-use characters that no text of a chat has; one that has them is refused.
        self.start, self.end = "\U0010fff0", "\U0010fff1"


def split_marks(marked: str, writer: Writer) -> tuple[str, list[tuple[int, int]]]:
    pieces, blocks, position, start = [], [], 0, None
    for piece in marked.replace(writer.start, "\0\0S").replace(writer.end, "\0\0E").split("\0\0"):
        if piece[:1] == "S" and pieces and start is None:
            piece, start = piece[1:], position
        elif piece[:1] == "E" and pieces and start is not None:
            blocks.append((start, position))
            piece, start = piece[1:], None
        elif pieces:
            raise ValueError("a text of this conversation holds characters that are reserved (NUL or U+10FFF0)")
        pieces.append(piece)
        position += len(piece)
    return "".join(pieces), blocks


@functools.lru_cache(maxsize=32)
def compile_template(chat_template: str):
    """The compiled template, in an environment set up as `transformers.utils.chat_template_utils` does it."""
    writer = Writer(has_tags=False)

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            writer.has_tags = True
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return writer.start + caller() + writer.end

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own escapes HTML characters
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(chat_template), writer
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from None


def encode(tokenizer, messages, tools=None, chat_template=None, train_on="all") -> Encoded:
    """Token ids of a conversation and, where the assistant speaks, the same ids as labels (elsewhere -100).

    The text is tokenised in pieces that begin where the assistant begins to speak: so the ids before a turn are those
    that inference feeds for it. `chat_template`: Jinja text; None: the tokenizer's. `train_on`: all assistant turns or
    the last; a message's own `"train": false` or `"weight": 0` is always kept. Raises ValueError, as `render`.
    """
    chat_template = chat_template or tokenizer.chat_template
    if not isinstance(chat_template, str):
        raise ValueError("the tokenizer has no chat template (or several); set tokenizer.chat_template")
    text, turns = render_turns(chat_template, messages, tools, **tokenizer.special_tokens_map)
    last = turns[-1][0] if turns else None
    input_ids, labels = [], []
    if starts_with_bos(tokenizer) and not text.startswith(tokenizer.bos_token):
        input_ids, labels = [tokenizer.bos_token_id], [IGNORE_INDEX]

    def append(ids: list[int], trained: bool):
        input_ids.extend(ids)
        labels.extend(ids if trained else [IGNORE_INDEX] * len(ids))

    first_start = turns[0][1] if turns else len(text)
    append(tokenise(tokenizer, text[:first_start], at_start=True), False)
    for (i, start, end), next_start in zip(turns, [turn[1] for turn in turns[1:]] + [len(text)], strict=True):
        trained = is_trained(messages[i], train_on == "all" or i == last, i)
        turn = tokenise(tokenizer, text[start:end], at_start=start == 0)
        whole = tokenise(tokenizer, text[start:next_start], at_start=start == 0)
        # What follows the turn is tokenised with it, as inference does, unless a token would reach over the end.
        after = (
            whole[len(turn) :]
            if whole[: len(turn)] == turn
            else tokenise(tokenizer, text[end:next_start], at_start=False)
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
    if train not in (None, True, False) or weight not in (None, 0, 1):
        raise ValueError(f'messages[{index}]: "train" must be true or false, and "weight" 0 or 1')
    return chosen and train is not False and weight != 0


def with_bos(tokenizer, chat_template: str) -> str:
    """The template that is saved with the model: it writes the BOS that `encode` puts in front where it has none."""
    template, writer = compile_template(chat_template)
    try:
        text = template.render(
            messages=[{"role": "user", "content": "Hi"}],
            add_generation_prompt=True,
            tools=None,
            **tokenizer.special_tokens_map,
        )
    except Exception:  # a template that refuses this conversation is judged by the data, row by row
        return chat_template
    if starts_with_bos(tokenizer) and not text.lstrip(writer.start).startswith(tokenizer.bos_token):
        return "{{- bos_token }}" + chat_template
    return chat_template


def starts_with_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer.init_kwargs.get("add_bos_token") is not False


@functools.lru_cache(maxsize=8)
def special_ids(tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def tokenise(tokenizer, text: str, at_start: bool) -> list[int]:
    """Ids of a piece of text, without special tokens put around it."""
    if not text:
        return []
    if not at_start and adds_space(tokenizer):
        # SentencePiece puts a space before what it takes for the start of a text: tokenise behind a line end instead
        before = tokenizer.encode("\n", add_special_tokens=False)
        ids = tokenizer.encode("\n" + text, add_special_tokens=False)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return tokenizer.encode(text, add_special_tokens=False)


@functools.lru_cache(maxsize=8)
def adds_space(tokenizer) -> bool:
    ids = tokenizer.encode("a", add_special_tokens=False)
    return tokenizer.decode(ids + ids) != "aa"
