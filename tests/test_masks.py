"""Where the trained spans begin and end, for small templates that do what is rarely done."""

import pytest
from test_templates import CHAT, trained_texts
from transformers import AutoTokenizer

import templates

TOKENIZER = AutoTokenizer.from_pretrained("configs/quickstart")


def call(name, call_id, **arguments):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "", "tool_calls": [call("f", "c1", x=1), call("g", "c2")]},
    {"role": "tool", "tool_call_id": "c1", "content": "R1"},
    {"role": "tool", "tool_call_id": "c2", "content": "R2"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "B"},
]
MESSAGE = (
    "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}]{% endfor %}<end>"
)
TOOL_OR_MESSAGE = (
    "{% for m in messages %}{% if m.role == 'tool' %}<tool>RESULT: {{ m.content }}</tool>"
    "{% else %}" + MESSAGE + "{% endif %}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)
THINKING = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}{{ PROMPT if add_generation_prompt }}"


def look_up(call_id, printed):
    found = "{% for c in n.tool_calls or [] if c.id == " + call_id + " %}" + printed + "{% endfor %}"
    return "{% for n in messages %}" + found + "{% endfor %}"


@pytest.mark.parametrize(
    "result",
    [
        look_up("m.tool_call_id", "{{ c.function.name }}"),
        look_up("m.tool_call_id", "call {{ loop.index0 }}"),
        "{% set name %}" + look_up("m.tool_call_id", "{{ c.id }}") + "{% endset %}{{ name }}",
        "{{ look_up(m.tool_call_id) }}",
        "{{ attributes([('role', 'tool'), ('name', ns.calls[0].function.name)]) }}",
    ],
)
def test_what_a_tools_result_looks_up_in_a_call_is_not_trained(result):
    macros = (
        "{% macro look_up(id) %}" + look_up("id", "{{ c.function.name }}#{{ loop.index }}") + "{% endmacro %}"
        "{% macro attributes(pairs) %}{% for pair in pairs %}{{ pair[0] + '=' }}{{ quoted(pair[1]) }}{% endfor %}"
        "{% endmacro %}{% macro quoted(text) %}'{{ text }}'{% endmacro %}{% set ns = namespace(calls=[]) %}"
        "{% for m in messages %}{% set ns.calls = ns.calls + (m.tool_calls or []) %}{% endfor %}"
    )
    texts = ['[f{"x": 1}][g{}]<end>', "A<end>", "B<end>"]
    assert trained_texts(macros + TOOL_OR_MESSAGE.replace("RESULT", result), CALLS) == texts


def test_a_call_that_is_printed_only_in_its_result_is_not_trained():
    result, no_calls = look_up("m.tool_call_id", "{{ c.function.name }}"), "{% for c in [] %}"
    template = TOOL_OR_MESSAGE.replace("{% for c in m.tool_calls or [] %}", no_calls).replace("RESULT", result)
    assert trained_texts(template, CALLS) == ["<end>", "A<end>", "B<end>"]


def test_what_a_tools_result_says_for_the_assistant_is_refused():
    result = look_up("m.tool_call_id", "{{ c.function | tojson }}")
    with pytest.raises(ValueError, match=r"messages\[1\].*'\{\"name"):
        templates.render(TOOL_OR_MESSAGE.replace("RESULT", result), CALLS)


@pytest.mark.parametrize(
    "template",
    [
        # each question with all that follows it; the results of tools within the message that called them
        "{% for q in messages if q.role == 'user' %}<user>{{ q.content }}<end>{% set ns = namespace(state=0) %}"
        "{% for m in messages %}{% if m == q %}{% set ns.state = 1 %}{% elif m.role == 'user' %}{% set ns.state = 0 %}"
        "{% elif ns.state %}" + MESSAGE + "{% endif %}{% endfor %}{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt }}",
        "{% for m in messages if m.role != 'tool' %}" + MESSAGE + "{% for r in messages if r.role == 'tool' %}"
        "{{ '<tool>' + r.content if m.tool_calls }}{% endfor %}{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt }}",
    ],
)
def test_a_template_may_print_one_message_in_the_loop_of_another(template):
    assert trained_texts(template, CALLS) == ['[f{"x": 1}][g{}]<end>', "A<end>", "B<end>"]


@pytest.mark.parametrize(
    "template, end",
    [
        ("{% for m in messages %}{{ '<eom>' if not loop.first }}BODY{% endfor %}<eom>PROMPT", "<eom>"),
        (
            "{% for m in messages %}{% if not loop.first %}<eom>\n{% endif %}BODY{{ ' ' }}{% endfor %}<eom>\nPROMPT",
            " <eom>",
        ),
        ("{% for m in messages %}{{ eos_token if m.role in ('user', 'tool') }}BODY{% endfor %}</s>PROMPT", "</s>"),
        # what closes the conversation ends no turn that has an end of its own
        ("{% for m in messages %}BODY<end>{% endfor %}{{ eos_token if not add_generation_prompt }}PROMPT", "<end>"),
    ],
)
@pytest.mark.parametrize("length", [2, 7])
def test_the_end_of_turn_after_a_call_is_that_after_a_text(template, end, length):
    template = template.replace("BODY", MESSAGE.removesuffix("<end>"))
    template = template.replace("PROMPT", "{{ '<assistant>' if add_generation_prompt }}")
    texts = [text + end for text in ('[f{"x": 1}][g{}]', "A", "B")]
    assert trained_texts(template, CALLS[:length], eos_token="</s>") == texts[: 1 if length == 2 else 3]


@pytest.mark.parametrize(
    "template, texts",
    [
        (THINKING.replace("PROMPT", "'[assistant]<think>\\n'"), ["hm</think>A[end]", "<think>B[end]"]),
        (THINKING.replace("PROMPT", "'\\n[assistant]<think>\\n'"), ["hm</think>A[end]", "<think>B[end]"]),
        ("<s>" + THINKING.replace("PROMPT", "'[assistant]<think>\\n'"), ["hm</think>A[end]", "<think>B[end]"]),
        # The prompt that follows these messages counts, not the one that follows any question.
        (
            THINKING.replace("PROMPT", "'[assistant]' + ('<think>\\n' if messages[0].content != 'Q' else '')"),
            ["<think>\nhm</think>A[end]", "<think>B[end]"],
        ),
    ],
)
def test_a_turn_begins_where_the_prompt_ends_within_the_content(template, texts):
    contents = ["Q", "<think>\nhm</think>A", "Q2", "<think>B"]
    messages = [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * 2, contents, strict=True)]
    assert trained_texts(template, messages) == texts


@pytest.mark.parametrize(
    "built",
    [
        "{'role': m['role'], 'content': m['content']}",
        "{'role': 'assistant' if m.role == 'assistant' else 'user', 'content': 'x: ' + m.content}",
        "dict(m, content=m.content | trim)",
        "{'role': m.role, 'content': [{'type': 'text', 'text': m.content}]}",
    ],
)
def test_messages_that_the_template_builds_anew_are_followed(built):
    template = (
        "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [BUILT] %}{% endfor %}"
        "{% for m in ns.l %}{{ '[INST]' if m.role == 'user' else ' ' }}{% if m.content is string %}{{ m.content }}"
        "{% else %}{{ m.content[0].text }}{% endif %}{{ '[/INST]' if m.role == 'user' else '</s>' }}{% endfor %}"
    ).replace("BUILT", built)
    text = "x: " if "x: " in built else ""
    assert trained_texts(template, CHAT[1:]) == [
        f" {text}First.</s>",
        f" {text}{'Second.' if 'trim' in built else ' Second. '}</s>",
    ]


def test_questions_that_the_template_merges_are_followed():
    template = (
        "{% set ns = namespace(l=[]) %}{% for m in messages %}{% if ns.l and ns.l[-1].role == m.role %}"
        "{% set ns.l = ns.l[:-1] + [{'role': m.role, 'content': ns.l[-1].content + '\n' + m.content}] %}"
        "{% else %}{% set ns.l = ns.l + [{'role': m.role, 'content': m.content}] %}{% endif %}{% endfor %}"
        "{% for m in ns.l %}{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else ' ' + m.content + '</s>' }}"
        "{% endfor %}"
    )
    assert trained_texts(template, [CHAT[1], *CHAT[1:]]) == [" First.</s>", "  Second. </s>"]
    with pytest.raises(ValueError, match=r"messages\[1\]"):
        templates.render(template, [CHAT[1], CHAT[2], CHAT[2]])


@pytest.mark.parametrize(
    "separator, prompt",
    [
        ("\n", "\n[assistant]"),  # the message before prints the line break
        ("\n", "\n[assistant]<think>\n"),
        ("", "\n[assistant]"),  # only the prompt has it
        (" ", " \n[assistant]\n"),
    ],
)
def test_white_space_before_the_prompt_may_stand_elsewhere(separator, prompt):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{{ SEPARATOR if not loop.last }}{% endfor %}"
        "{{ PROMPT if add_generation_prompt }}"
    )
    template = template.replace("SEPARATOR", repr(separator)).replace("PROMPT", repr(prompt))
    assert trained_texts(template, CHAT) == ["First.[end]", " Second. [end]"]


@pytest.mark.parametrize(
    "header, prompt, start",
    [
        ("<|start|>assistant<|channel|>final:", "<|start|>assistant<|channel|>analysis:", "final:"),
        ("<|assistant|><|channel|>final<|message|>", "<|assistant|><|channel|>analysis<|message|>", "final<|message|>"),
        ("[|model|][|channel|]final:", "[|model|][|channel|]thought:", "final:"),
        ("<|start|>assistant<|message|>", "<|start|>bot<|message|>", None),  # another role
        ("<|start|>assistant final<|message|>", "<|start|>assistant thought<|message|>", None),  # no markup before it
    ],
)
def test_a_turn_begins_where_the_prompt_names_another_channel(header, prompt, start):
    template = (
        "{% for m in messages %}{{ HEADER if m.role == 'assistant' else '<|start|>user<|message|>' }}"
        "{{ m.content }}<|end|>{% endfor %}{{ PROMPT if add_generation_prompt }}"
    )
    template = template.replace("HEADER", repr(header)).replace("PROMPT", repr(prompt))
    if start is not None:
        assert trained_texts(template, CHAT) == [start + "First.<|end|>", start + " Second. <|end|>"]
    else:
        with pytest.raises(ValueError, match=r"messages\[2\]"):
            templates.render(template, CHAT)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
SAID = "{{ m.content }}<|im_end|>"
OWN_TAGS = "{% if m.content == 'B' %}{% generation %}" + SAID + "{% endgeneration %}{% else %}" + SAID + "{% endif %}"


def say(*contents, **last):
    roles = ("user", "assistant") * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [*messages[:-1], {**messages[-1], **last}]


@pytest.mark.parametrize(
    "template, messages, named",
    [
        (CHATML + PROMPT, say("Q", "A", "Q", "B"), []),
        (CHATML + PROMPT.replace("nt\n", "nt\n<think>"), say("Q", "A", "Q", "B"), ["inference feeds", "<think>"]),
        (CHATML + PROMPT, say("Q", " "), ["empty answer"]),
        (CHATML + PROMPT, say("<|im_end|>?", "A"), ["special token", "user", "<|im_end|>"]),
        (CHATML + PROMPT, say("Q", "A<|im_end|>"), ["special token", "assistant", "<|im_end|>"]),
        (CHATML + PROMPT, say("Q", "A", reasoning_content="hm"), ["leaves out reasoning"]),
        (CHATML.replace("m.content", "m.content[:1]") + PROMPT, say("Q", "AB"), ["content in part", "AB"]),
        (CHATML + PROMPT, say("Q", "A", trainable=True), ["nothing reads", "'trainable'"]),
        ("{{ strftime_now('%Y') }}" + CHATML + PROMPT, say("Q", "A"), ["may print the date"]),
        (CHATML.replace("<|im_end|>", "</call>") + PROMPT, say("Q", "A", "Q", "B"), ["no special token", "</call>"]),
        (CHATML.replace(SAID, OWN_TAGS) + PROMPT, say("Q", "A", "Q", "B"), ["no generation block", "A"]),
    ],
)
def test_what_may_surprise_is_noted_and_nothing_else(template, messages, named):
    _, notes = templates.encode_with_notes(TOKENIZER, messages, None, template)
    assert len(notes) == bool(named) and all(name in notes[0] for name in named), notes


def test_tools_that_the_template_leaves_out_are_noted():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    _, notes = templates.encode_with_notes(TOKENIZER, say("Q", "A"), tools, CHATML + PROMPT)
    assert notes == ["the template leaves out the tools"]


def test_eos_ends_the_last_turn_alone_though_a_result_stands_within_it():
    result = "{% for t in messages if t.role == 'tool' %}<result>{{ t.content }}\n{% endfor %}"
    call = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}\n" + result + "{% endfor %}"
    turn = "{{ m.role }}: {% if m.role != 'tool' %}" + call + "{{ m.content }}\n{% endif %}"
    template = "{% for m in messages %}" + turn + "{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    answer = {"role": "assistant", "content": "A", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [{"role": "user", "content": "Q"}, answer, {"role": "tool", "content": "R"}]
    ids, labels = templates.encode(TOKENIZER, messages, None, template)
    assert TOKENIZER.decode(ids).count("<|im_end|>") == 1
    assert TOKENIZER.decode([id for id in labels if id != -100]) == "<call>f\nA\n<|im_end|>"
