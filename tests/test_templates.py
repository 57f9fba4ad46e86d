from transformers.utils.chat_template_utils import render_jinja_template

import templates
from data import OpenAssistant, Squad

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


def spoken(chat_template, messages, **variables):
    text, spans = templates.render(chat_template, messages, **variables)
    expected, _ = render_jinja_template([messages], chat_template=chat_template, **variables)
    assert text == expected[0]
    return [text[start:end] for start, end in spans]


def test_a_turn_is_trained_from_the_generation_prompt_to_its_end():
    assert spoken(CHATML, CHAT) == ["First.<|im_end|>", " Second. <|im_end|>"]
    assert spoken(Squad.custom_template, CHAT[:3]) == [" First."]
    assert spoken(OpenAssistant.custom_template, CHAT, eos_token="</s>") == ["First.</s>", "Second.</s>"]


def test_generation_tags_are_obeyed():
    tagged = CHATML.replace(
        "{{ '<|im_start|>'",
        "{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }};"
        "{% endgeneration %}{% else %}{{ '<|im_start|>'",
    ).replace("{% endfor", "{% endif %}{% endfor")
    assert spoken(tagged, CHAT) == ["First.;", " Second. ;"]


def test_a_turn_that_the_template_writes_differently_later_is_trained_as_it_stands_in_the_text():
    looks_ahead = CHATML.replace("m['content']", "(m['content'] if loop.last else '...')")
    assert spoken(looks_ahead, CHAT) == ["...<|im_end|>", " Second. <|im_end|>"]
