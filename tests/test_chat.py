"""Talking to a trained model, as a user does."""

import pytest
import torch
from running import call, script

import chat


@pytest.mark.slow
def test_a_chat_answers_through_its_template_and_stops_at_turn_ends(memorized):
    lines = "Where is Oslo?\nAnd Lima?\n/reset\nWhere is Paris?\n/what\n/exit\nWho are you?\n"
    output, _ = call(chat.main, memorized, said=lines)
    answers = [line.removeprefix("> ") for line in output.splitlines()[1:]]
    assert answers[:2] == ["In Norway.", "In Peru."] and answers[2].endswith("In France.")
    assert "/what" in answers[3] and "small" not in output


@pytest.mark.slow
def test_a_prompt_is_answered_with_nothing_else_on_standard_output(memorized):
    assert script("chat.py", memorized, "--prompt", "Who are you?")[0] == "A small model.\n"
    rome = ["--prompt", "Where is Rome?"]
    assert call(chat.main, memorized / "model", *rome) == ("It is in Italy.\n", "")
    (step,) = (memorized / "checkpoints").iterdir()
    assert call(chat.main, step, *rome, "--max-new-tokens", 3)[0] != "It is in Italy.\n"


def options(model, **others):
    defaults = {"model": str(model), "system": None, "temperature": 0.0, "seed": 0}
    return type("Options", (), {**defaults, "max_new_tokens": 20, **others})


def test_ctrl_c_ends_an_answer_and_the_chat_continues(memorized, monkeypatch, capsys):
    talk = chat.Chat(options(memorized))
    talk.answer("Where is Oslo?")

    class Interrupted(chat.TextStreamer):
        def put(self, value):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat, "TextStreamer", Interrupted)
        talk.answer("Where is Rome?")
    assert [message["content"] for message in talk.messages] == ["Where is Oslo?", "In Norway."]
    talk.answer("And Lima?")
    assert talk.messages[-1]["content"] == "In Peru." and "In Norway.\n" in capsys.readouterr().out


def test_a_conversation_that_cannot_be_answered_is_one_line(memorized):
    output, error = call(chat.main, memorized, said="word " * 300 + "\nWho are you?\n/exit\n")
    assert "error" in output and "256" in output and "A small model." in output and "Traceback" not in error


def test_a_template_that_refuses_is_an_error_and_the_chat_continues(memorized, capsys):
    talk = chat.Chat(options(memorized))
    own = talk.tokenizer.chat_template
    talk.tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].content) }}"
    with pytest.raises(ValueError, match="no weather"):
        talk.answer("weather")
    talk.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template is not set"):
        talk.answer("weather")
    talk.tokenizer.chat_template = own
    talk.answer("Who are you?")
    assert capsys.readouterr().out == "A small model.\n"


def test_sampling_repeats_with_its_seed_and_differs_with_another(memorized):
    def answers(seed):
        talk = chat.Chat(options(memorized, temperature=3.0, seed=seed))
        for _ in range(3):
            talk.answer("Where is Oslo?")
        return talk.messages

    torch.manual_seed(5)
    assert answers(1) == answers(1) != answers(2)


@pytest.mark.parametrize("model, arguments", [(None, ["--temperature", "-1"]), ("nowhere/model", [])])
def test_a_wrong_argument_is_an_error_in_one_line(memorized, model, arguments):
    _, error = call(chat.main, model or memorized, *arguments, "--prompt", "Who are you?", expect=1)
    assert (model or "temperature") in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")
