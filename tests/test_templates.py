"""Exactly what the assistant says is trained: known templates, random conversations, tokens."""

import datetime
import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from jinja2.filters import FILTERS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import data
import templates
import tracing
from data import OpenAssistant, Squad

FOLDER = Path(__file__).parent / "templates"
CASES = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": " Second. "},
]


def trained_texts(chat_template, messages, tools=None, **variables):
    text, spans = templates.render(chat_template, messages, tools, **variables)
    expected, _ = chat_template_utils.render_jinja_template(
        [messages], chat_template=chat_template, tools=tools, **variables
    )
    assert text == expected[0]
    return [text[start:end] for start, end in spans]


# ---- known templates: the exact characters to train, see tests/templates/SOURCES.md ----------------------------------


class StoppedClock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 15, 12, tzinfo=tz)


def characters(spans):
    return {i for start, end, *_ in spans for i in range(start, end)}


def conversation(key, name):
    meta, chat = CASES["templates"][key], CASES["conversations"][name]
    messages, tools = chat["messages"], chat["tools"]
    if meta["content_format"] == "blocks":
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
            for m in messages
        ]
    if meta.get("always_tools"):
        tools = tools or CASES["conversations"]["tool_call"]["tools"]
    return messages, tools, meta["special_tokens"]


@pytest.mark.parametrize("key", sorted(CASES["expected"]))
def test_exactly_what_the_assistant_says_is_trained(key, monkeypatch):
    monkeypatch.setattr(templates, "datetime", StoppedClock)
    template = (FOLDER / f"{key}.jinja").read_bytes().decode()
    assert "{% generation" not in template
    for name, truth in CASES["expected"][key].items():
        messages, tools, special_tokens = conversation(key, name)
        text, spans = templates.render(template, messages, tools, **special_tokens)
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == truth["sha"], name
        wrong = (characters(spans) ^ characters(truth["spans"])) - characters(truth["may"])
        assert not wrong, f"{name}: {text[min(wrong) : min(wrong) + 60]!r}"


@pytest.mark.parametrize("path", sorted([*FOLDER.glob("*/*_training.jinja"), *FOLDER.glob("trl_tagged/*.jinja")]))
def test_generation_tags_give_the_same_as_the_template_without_them(path, monkeypatch):
    monkeypatch.setattr(templates, "datetime", StoppedClock)
    key = f"{path.parent.name.removesuffix('_tagged')}/{path.stem.removesuffix('_training')}"
    same_text = 0
    for name, truth in CASES["expected"][key].items():
        messages, tools, special_tokens = conversation(key, name)
        text, spans = templates.render(path.read_bytes().decode(), messages, tools, **special_tokens)
        if hashlib.sha256(text.encode()).hexdigest()[:16] == truth["sha"]:
            same_text += 1
            assert not (characters(spans) ^ characters(truth["spans"])) - characters(truth["may"]), name
    assert same_text or (FOLDER / "trl_tagged" / path.name.replace("_training", "")).exists()


def test_a_turn_is_trained_from_the_generation_prompt_to_its_end():
    assert trained_texts(CHATML, CHAT) == ["First.<|im_end|>", " Second. <|im_end|>"]
    assert trained_texts(Squad.custom_template, CHAT[:3]) == [" First."]
    assert trained_texts(OpenAssistant.custom_template, CHAT, eos_token="</s>") == ["First.</s>", "Second.</s>"]


MACROS = (
    "{% macro turn(m) %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endmacro %}"
    "{% macro parts(role, text) %}<|{{ role }}|>{{ text }}<|end|>{% endmacro %}"
    "{% macro framed(role) %}<|{{ role }}|>{{ caller() }}<|end|>{% endmacro %}"
    "{% set ns = namespace(all='', list=[]) %}"
)


@pytest.mark.parametrize(
    "loop",
    [
        "{% for i in range(messages|length) %}<|{{ messages[i].role }}|>{{ messages[i].content }}<|end|>{% endfor %}",
        "{% for i in range(messages|length) %}{% set m = messages[loop.index0] %}{{ turn(m) }}{% endfor %}",
        "{% for i in range(messages|length) %}<|{{ messages[loop.index0].role }}|>"
        "{{ messages[loop.index0].content }}<|end|>{% endfor %}",
        "{% for m in messages %}{% set text %}{{ turn(m) }}{% endset %}{{ text }}{% endfor %}",
        "{% for m in messages %}{% set ns.all = ns.all ~ turn(m) %}{% endfor %}{{ ns.all }}",
        "{% for m in messages %}{% set ns.all = ns.all + '<|' + m.role + '|>' + m.content + '<|end|>' %}{% endfor %}"
        "{{ ns.all }}",
        "{% set at = namespace(index0=0) %}{% for m in messages %}{% set role = messages[at.index0].role %}"
        "<|{{ role }}|>{{ m.content }}{% set at.index0 = at.index0 + 1 %}<|end|>{% endfor %}",
        "{% for m in messages %}{% set outer = loop %}{% for _ in [1] %}<|{{ messages[outer.index0].role }}|>"
        "{{ m.content }}<|end|>{% endfor %}{% endfor %}",
        "{% for m in messages %}{% call framed(m.role) %}{{ m.content }}{% endcall %}{% endfor %}",
        "{% for m in messages %}{% set ns.list = ns.list + [parts(m.role, m.content)] %}{% endfor %}{{ ns.list|join }}",
    ],
)
def test_a_turn_is_found_however_the_template_goes_through_the_messages(loop):
    template = MACROS + loop + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert trained_texts(template, CHAT) == ["First.<|end|>", " Second. <|end|>"]


def test_generation_tags_are_obeyed():
    tagged = CHATML.replace(
        "{{ '<|im_start|>'",
        "{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};"
        "{% endgeneration %}{% else %}{{ '<|im_start|>'",
    ).replace("{% endfor", "{% endif %}{% endfor")
    assert trained_texts(tagged, CHAT) == ["First.;", " Second. ;"]


def test_a_turn_written_differently_later_is_trained_as_it_stands():
    looks_ahead = CHATML.replace("m['content']", "(m['content'] if loop.last else '...')")
    assert trained_texts(looks_ahead, CHAT) == ["...<|im_end|>", " Second. <|im_end|>"]


@pytest.mark.parametrize(
    "template, texts",
    [
        # The start: the prompt has been printed for the question; without a prompt the header is trained; an old turn
        # has only a part of the prompt.
        (
            "{% for m in messages %}{{ 'Q: ' if m.role == 'user' }}{{ m.content }};"
            "{{ 'A: ' if m.role == 'user' and (not loop.last or add_generation_prompt) }}{% endfor %}",
            ["Hi;", "Ho;"],
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '!' if loop.last }};{% endfor %}",
            ["<assistant>Hi;", "<assistant>Ho!;"],
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ '<think>' if loop.last and m.role == 'assistant' }}"
            "{{ m.content }};{% endfor %}{{ '<assistant><think>' if add_generation_prompt }}",
            ["Hi;", "Ho;"],
        ),
        # The end: EOS that is printed with the next question; what closes every conversation.
        (
            "{% for m in messages %}{{ '</s>' if loop.index == 3 }}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{{ '<assistant>' if add_generation_prompt }}",
            ["Hi</s>", "Ho"],
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ ';' if not loop.last }}{% endfor %}"
            "{{ '<assistant>' if add_generation_prompt else '<|endofchat|>' }}",
            ["Hi;", "Ho<|endofchat|>"],
        ),
    ],
)
def test_each_rule_for_the_start_and_the_end_of_a_turn(template, texts):
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, ["A", "Hi", "B", "Ho"], strict=True)]
    assert trained_texts(template, messages, eos_token="</s>") == texts


@pytest.mark.parametrize(
    "template, named",
    [
        ("{% for m in messages %}{{ '{\"text\": ' + m.content | tojson | safe }}{% endfor %}", "&#34;"),
        (
            "{% for m in messages %}{% autoescape true %}{{ m.content + '\"' }}{% endautoescape %}{% endfor %}",
            "Be brief",
        ),
        ("{{ messages | tojson }}", r"character 0 .*\{% generation %\}"),
        ("{{ messages | map(attribute='content') | join(' ') }}", r"messages\[2\].* at character 15"),
        (CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"), r"messages\[2\].*<\|im_start\|>bot"),
        ("{% for m in messages %}{{ m.content }", "line 1"),
        ("{{ raise_exception('no system message, please') }}", "no system message, please"),
        (CHATML.replace("m['content']", "messages[-1]['content']"), r"messages\[2\].* at character \d+"),
        (CHATML.replace("m['content']", "('<%s>' % m['content'])"), r"character \d+.*<Be brief"),
    ],
)
def test_what_cannot_be_known_is_refused(template, named):
    with pytest.raises(ValueError, match=named):
        templates.render(template, CHAT)


def test_no_operation_turns_a_message_into_text_of_the_template():
    environment = tracing.compile_template("")[1].environment
    text = tracing.traced("<ä> öü é\n{} %s", tracing.Tag(source=0))  # what is not ASCII is the message's
    functions = [f"text.{name}(" for name in dir(str) if name[0] != "_" and name != "maketrans"]
    functions += ["'<%s>'.join(", "'{}'.format(", "'a'.replace(", "'a'.join(text | map("]
    functions += [f"{value} | {name}(" for value in ("text", "'a%s'", "[text, 'a']") for name in FILTERS]
    arguments = "; 1; 40; 'e'; 'e', 'x'; ['a', 'b']; text; 'a', text; [text]; {}; {97: 'b'}; 'trim')".split("; ")
    operations = [f"{function}{of})" for function in functions for of in arguments]
    operations += "text[1] text[1:5] text[::-1] text+'a' 'a'+text text*2 2*text text~1 [text][0] '%s'%text".split()
    operations += ["'<%s%s>' % (text, 1)", "'{a}'.format(a=text)", "'{0}{1}'.format(1, text)", "(text,) | string"]
    followed = 0
    for operation in operations:
        try:
            template = environment.from_string("{% for x in [" + operation + "] %}{{ x }}{% endfor %}")
            printed = template.render(text=text)
        except Exception:  # the operation does not take such values
            continue
        tags = [tag for length, tag in tracing.runs_of(printed) for _ in range(length)]
        own = [c for c, tag in zip(printed, tags, strict=True) if tag.source not in (0, tracing.UNTRACKED)]
        assert "".join(own).isascii(), operation
        followed += not printed.isascii()
    assert followed > 200


# ---- tokens ----------------------------------------------------------------------------------------------------------


def make_tokenizer(kind, **special):
    corpus = ["the quick brown fox jumps over the lazy dog " * 3, "user assistant system \n Hello, hello world. " * 3]
    tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:  # as Llama 2's: spaces are ▁, unknown characters bytes
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = {
            "metaspace": None,
            "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        }[kind]
        if kind == "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokens += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens)
    backend.train_from_iterator(corpus, trainer)
    if kind != "byte-level":  # bytes are plain tokens, not special ones
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", additional_special_tokens=["<|im_start|>", "<|im_end|>"], **special
    )


def text_of(tokenizer, ids):
    """What ids stand for, each byte and space of it: `decode` would strip."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if any(token.startswith("<0x") or "▁" in token for token in tokenizer.get_vocab()):
        out = b""
        for token in tokens:
            byte = token.startswith("<0x") and len(token) == 6
            out += bytes([int(token[3:5], 16)]) if byte else token.replace("▁", " ").encode()
        return out.decode()
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def random_content(rng):
    words = ["hello", " the", "fox ", "\n", "  ", "é", "漢字", "🙂", "e\u0301", "<|im", "assistant", "\tx", ".", "0"]
    return "".join(rng.choice(words) for _ in range(rng.randint(0, 8)))


def random_chat(rng):
    messages = [{"role": "system", "content": random_content(rng)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": random_content(rng)})
        messages.append({"role": "assistant", "content": random_content(rng)})
    return messages


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "prepend"])
@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("template", ["chatml", "with bos", "plain"])
def test_ids_are_the_text_labels_the_spans_and_the_prompt_what_is_fed(kind, bos, template):
    tokenizer = make_tokenizer(kind, eos_token="</s>", **({"bos_token": bos} if bos else {}))
    chat_template = {
        "chatml": CHATML,
        "with bos": "{{ bos_token }}" + CHATML,
        "plain": "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    }[template]
    saved = templates.with_bos(tokenizer, chat_template)
    for seed in range(60):
        messages = random_chat(random.Random(seed))
        text, spans = templates.render(saved, messages, **tokenizer.special_tokens_map)
        ids, labels = templates.encode(tokenizer, messages, None, chat_template)
        assert len(ids) == len(labels)
        assert all(label in (templates.IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
        trained = [token for token in labels if token != templates.IGNORE_INDEX]
        eos = [tokenizer.eos_token_id] * (template == "plain")
        assert trained[len(trained) - len(eos) :] == eos
        assert text_of(tokenizer, trained[: len(trained) - len(eos)]) == "".join(text[a:b] for a, b in spans)
        everything = text_of(tokenizer, [token for token in ids if token not in eos])
        if kind == "byte-level":
            assert everything == text
        else:  # these put a space before the text, or behind each special token
            assert re.sub(r"(^|<s>|<.im_(?:start|end).>) ", r"\1", everything) == re.sub(
                r"(^|<s>|<.im_(?:start|end).>) ", r"\1", text
            )
        prompt = tokenizer.apply_chat_template(
            messages[: next(i for i, m in enumerate(messages) if m["role"] == "assistant")],
            chat_template=saved, add_generation_prompt=True, return_dict=False,
        )  # fmt: skip
        first = next(i for i, label in enumerate(labels) if label != templates.IGNORE_INDEX)
        assert ids[:first] == prompt


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "prepend"])
@pytest.mark.parametrize("bos", ["<s>", "<|im_start|>"])
@pytest.mark.parametrize("puts_bos", [True, False])
def test_bos_stands_only_where_the_tokenizer_or_the_template_puts_it(kind, bos, puts_bos):
    tokenizer = make_tokenizer(kind, bos_token=bos, eos_token="</s>")
    if puts_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    plain = CHATML.replace("<|im_start|>", "<|im_end|>")
    for template, expected in [
        (plain, puts_bos),
        ("{{ bos_token }}" + plain, True),
        (CHATML, puts_bos or bos[1] == "|"),
    ]:
        ids = templates.encode(tokenizer, CHAT, None, template).input_ids
        assert (ids[0] == tokenizer.bos_token_id) == expected
        assert ids[1] != tokenizer.bos_token_id
        saved = templates.with_bos(tokenizer, template)
        assert ids == templates.encode(tokenizer, CHAT, None, saved).input_ids


def test_the_prompt_of_every_turn_is_what_inference_feeds():
    for kind in ("byte-level", "metaspace"):
        tokenizer = make_tokenizer(kind, eos_token="</s>")
        for seed in range(40):
            # (a header and an answer that begins with white space are one token when the text is read again)
            messages = [{**m, "content": m["content"].strip() or "."} for m in random_chat(random.Random(seed))]
            ids, labels = templates.encode(tokenizer, messages, None, CHATML)
            starts = [i for i in range(1, len(ids)) if labels[i] >= 0 > labels[i - 1]]
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            for start, turn in zip(starts, turns, strict=True):
                assert ids[:start] == tokenizer.apply_chat_template(
                    messages[:turn], chat_template=CHATML, add_generation_prompt=True, return_dict=False
                )


def test_a_message_or_all_but_the_last_can_be_left_out_of_the_loss():
    tokenizer = make_tokenizer("byte-level", eos_token="</s>")

    def trained(messages, train_on="all"):
        labels = templates.encode(tokenizer, messages, None, CHATML, train_on).labels
        return tokenizer.decode([token for token in labels if token >= 0])

    assert trained(CHAT) == "First.<|im_end|> Second. <|im_end|>"
    assert trained(CHAT, "last") == " Second. <|im_end|>"
    for off in ({"train": False}, {"weight": 0}):
        assert trained([*CHAT[:2], {**CHAT[2], **off}, *CHAT[3:]]) == " Second. <|im_end|>"
        assert trained([*CHAT[:4], {**CHAT[4], **off}]) == "First.<|im_end|>"
        assert trained([*CHAT[:4], {**CHAT[4], **off}], "last") == ""
    with pytest.raises(ValueError, match=r'messages\[2\]: "train"'):
        trained([*CHAT[:2], {**CHAT[2], "train": "no"}, *CHAT[3:]])
    with pytest.raises(ValueError, match=r'messages\[2\].*"weight"'):
        trained([*CHAT[:2], {**CHAT[2], "weight": 0.5}, *CHAT[3:]])


@pytest.mark.parametrize("train", [0, 0.0, 1, "false"])
def test_train_has_to_be_true_or_false(train):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": train}]
    with pytest.raises(ValueError, match=r'messages\[1\]: "train"'):
        templates.encode(AutoTokenizer.from_pretrained("configs/quickstart"), messages)


def test_a_template_that_prints_no_answer_is_refused():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="chat template prints nothing"):
        templates.encode(AutoTokenizer.from_pretrained("configs/quickstart"), messages, chat_template="hello")


def test_the_example_of_the_explanation_prints_what_it_shows(capsys):
    page = Path("docs/masks.md").read_text(encoding="utf-8")
    code, output = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", page, re.DOTALL).groups()
    exec(code, {})
    assert capsys.readouterr().out == output


# ---- a trained turn has what its message says ------------------------------------------------------------------------


def chatml(body):
    return CHATML.replace("+ m['content'] + '<|im_end|>' + '\\n' }}", "}}" + body + "<|im_end|>\n")


CALLS = {  # small templates, and how each writes the call look_up(place="Oslo")
    "as JSON": (
        chatml(
            "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}"
            "{% endfor %}"
        ),
        'look_up {"place": "Oslo"}',
    ),
    "by key": (
        chatml(
            "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% for k, v in "
            "c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}"
        ),
        "look_up place=Oslo",
    ),
    "from JSON text": (
        chatml(
            "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}"
            "{% endfor %}"
        ),
        'look_up {"place": "Oslo"}',
    ),
    "as it comes": (
        chatml(
            "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments }}"
            "{% endfor %}"
        ),
        'look_up {"place": "Oslo"}',
    ),
    "in blocks": (
        chatml(
            "{% for b in m.content %}{{ b.text }}{% endfor %}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
            "{% endfor %}"
        ),
        '{"name": "look_up", "arguments": {"place": "Oslo"}}',
    ),
}
QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def call_of(arguments):
    return {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": arguments}}


def calling(*arguments, content=None, **others):
    return {"role": "assistant", "content": content, "tool_calls": [*map(call_of, arguments)], **others}


def trained_by_encode(chat_template, *messages, **options):
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    messages = data.normalize({"messages": [*messages]})["messages"]
    labels = templates.encode(tokenizer, messages, None, chat_template, **options).labels
    return tokenizer.decode([token for token in labels if token >= 0])


@pytest.mark.parametrize("name", CALLS)
def test_a_call_and_an_answer_are_trained_as_the_template_writes_them(name):
    template, text = CALLS[name]
    blocks = [{"type": "text", "text": "4 "}, {"type": "text", "text": "degrees"}]
    for arguments in ('{"place": "Oslo"}', {"place": "Oslo"}):
        messages = [QUESTION, calling(arguments), {"role": "tool", "content": "4"}, {**ANSWER, "content": blocks}]
        assert trained_by_encode(template, *messages) == f"{text}<|im_end|>4 degrees<|im_end|>"


def test_each_role_gets_text_or_blocks_as_the_template_takes_them():
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    loop = "{% for b in m.content %}{{ b.text }};{% endfor %}"
    for_user = chatml("{% if m.role == 'user' %}" + loop + "{% else %}{{ m.content }}{% endif %}")
    either = chatml("{% if m.content is string %}{{ m.content }}{% else %}" + loop + "{% endif %}")
    blocks = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT[1:3]]
    for template, of_text, of_blocks in (
        (chatml("{{ m.content }}"), ["One?", "First."], ["One?", "First."]),
        (chatml(loop), ["One?;", "First.;"], ["One?;", "First.;"]),
        (for_user, ["One?;", "First."], ["One?;", "First."]), (either, ["One?", "First."], ["One?", "First."]),
    ):  # fmt: skip
        for messages, expected in ((CHAT[1:3], of_text), (blocks, of_blocks)):
            text = tokenizer.decode(templates.encode(tokenizer, messages, None, template).input_ids)
            assert re.findall(r"\n(.*)<\|im_end", text) == expected


@pytest.mark.parametrize(
    "template, said, part",
    [
        (CHATML, calling({"place": "Oslo"}), "tool_calls"),
        (CHATML, calling({"place": "Oslo"}, content="Let me see."), "tool_calls"),
        (
            CALLS["as JSON"][0].replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
            calling({"a": "x"}, {"a": "x"}),
            "tool_calls",
        ),
        (
            chatml("{{ m.content or m.tool_calls[0].function.name }}"),
            calling({"a": 1}),
            "tool_calls",
        ),
        (CALLS["as JSON"][0].replace("m.content", "''"), calling({"a": "Oslo"}, content="Oslo?"), "content"),
        (chatml("{{ m.reasoning_content }}"), {**ANSWER, "thinking": "Hm"}, "content"),
        (CHATML, {**ANSWER, "content": None, "reasoning": "Hm"}, "reasoning_content"),
        (chatml("{{ m.content.split('</think>')[-1] }}"), {**ANSWER, "content": "<think>Hm</think>"}, "content"),
        (chatml("{% if loop.last %}{{ m.content }}{% endif %}"), ANSWER, "content"),
        (CALLS["by key"][0], calling({"a": None}), "None"),
        (CALLS["by key"][0], calling({"a": ["x"]}), r"\['x'\]"),
    ],
)
def test_a_message_of_which_the_template_leaves_out_a_part_is_refused(template, said, part):
    with pytest.raises(ValueError, match=rf'messages\[1\]: .*{part}.*tokenizer.chat_template.*"train": false'):
        trained_by_encode(template, QUESTION, said, QUESTION, ANSWER)
    for off in ("train", "loss", "training"):
        assert "A" in trained_by_encode(CHATML, QUESTION, {**said, off: False}, QUESTION, ANSWER)
    assert "A" in trained_by_encode(CHATML, QUESTION, said, QUESTION, ANSWER, train_on="last")


def test_reasoning_and_a_part_of_the_content_may_be_left_out():
    assert trained_by_encode(CHATML, QUESTION, {**ANSWER, "reasoning_content": "Hm"}) == "A<|im_end|>"
    for body in ("{{ m.content.split('</think>')[-1] }}", "{{ m.content[-2:] | upper | trim }}"):
        assert trained_by_encode(chatml(body), QUESTION, {**ANSWER, "content": "<think>Hm</think> a"}) in (
            " a<|im_end|>", "A<|im_end|>",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["weight", "loss", "training"])
def test_every_key_that_switches_training_off_is_obeyed(name):
    answers = [{**ANSWER, "content": "B", name: value} for value in (0, False, 1, True, None)]
    assert trained_by_encode(CHATML, QUESTION, *answers) == "B<|im_end|>" * 3
    with pytest.raises(ValueError, match=rf'messages\[1\]: "{name}"'):
        trained_by_encode(CHATML, QUESTION, {**ANSWER, name: "no"})


def test_arguments_that_are_text_are_not_trained_escaped():
    messages = [QUESTION, calling('{"place": "Oslo"}', content="")]
    with pytest.raises(ValueError, match=r"messages\[1\]: .*tool_calls"):
        templates.encode(AutoTokenizer.from_pretrained("configs/quickstart"), messages, None, CALLS["as JSON"][0])


AS_XML = chatml(
    "{{ m.content }}{% for c in m.tool_calls or [] %}<f={{ c.function.name }}>"
    "{% for k, v in c.function.arguments.items() %}<p={{ k }}>{{ v }}</p>{% endfor %}</f>{% endfor %}"
)
ONLY_A_CALL = chatml(
    "{% if m.content is none %}{% for c in m.tool_calls %}<c>{{ c.function.name }}{{ c.function.arguments }}</c>"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}"
)
EMPTY_TURN = chatml(
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% if m.content is not none %}<answer>{{ m.content }}{% endif %}"
)
TWO_BLOCKS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]


@pytest.mark.parametrize(
    "template, said, trained",
    [
        (AS_XML, calling({"role": "assistant"}), "<f=look_up><p=role>assistant</p></f>"),
        (ONLY_A_CALL, calling({"x": 1}), '<c>look_up{"x": 1}</c>'),
        (EMPTY_TURN, calling({"x": 1}), '{"name": "look_up", "arguments": {"x": 1}}'),
        (
            chatml("{{ m.content if m.content is string else m.content[0].text }}"),
            {**ANSWER, "content": TWO_BLOCKS},
            "one two",
        ),
        (CALLS["as JSON"][0], calling({"x": ["a"]}, content="x = ['a']."), None),
        (CALLS["as JSON"][0], calling({"tool_response": "x"}), 'look_up {"tool_response": "x"}'),
        (CALLS["as JSON"][0].replace("tojson", "tojson(ensure_ascii=True)"), calling({"q": "Zürich"}), None),
    ],
)
def test_what_a_message_says_is_found_where_the_template_prints_it(template, said, trained):
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    encoded = templates.encode(tokenizer, [*CHAT[:2], said], None, template)
    text = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert text.endswith("<|im_end|>") and (trained is None or text == f"{trained}<|im_end|>")


@pytest.mark.parametrize("content, arguments", [("1", {"n": 12}), ("name", {"n": 1}), ("arguments", {})])
def test_a_content_is_not_found_in_the_numbers_and_keys_of_a_call(content, arguments):
    template = CALLS["as JSON"][0].replace("m.content", "'' if m.tool_calls else m.content")
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    with pytest.raises(ValueError, match=r"messages\[2\]: .*content"):
        templates.encode(tokenizer, [*CHAT[:2], calling(arguments, content=content)], None, template)


@pytest.mark.parametrize("value", [False, 0, True, "off"])
def test_a_key_of_a_message_that_nothing_reads_is_noted_whatever_its_value(value):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "trainable": value, "n": None}]
    _, notes = templates.encode_with_notes(AutoTokenizer.from_pretrained("configs/quickstart"), messages, None, None)
    assert notes == ["nothing reads the key 'trainable' of a message"]
