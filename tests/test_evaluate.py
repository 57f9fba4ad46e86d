"""Answers and their scores, by function and by the command."""

import functools
import json

import architectures
import pytest
import torch
from running import call, metrics, script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import attention
import config
import data
import evaluate
import model as modelling

# What the official script of SQuAD 1.1 gives for (answer, references): exact match, F1
OFFICIAL = [
    ("The Denver Broncos!", ["Denver Broncos", "Carolina"], 1, 1.0),
    ("denver", ["Denver Broncos"], 0, 2 / 3),
    ("Broncos of Denver", ["the Denver Broncos", "Broncos"], 0, 0.8),
    ("a an the", ["the"], 1, 0.0),
    ("", ["x"], 0, 0.0),
    ("U.S.", ["us"], 1, 1.0),
    ("24\u201310", ["24-10"], 0, 0.0),
    ("theatre a  la carte", ["Theatre la Carte."], 1, 1.0),
    ("one one two", ["one two two"], 0, 2 / 3),
]


@pytest.mark.parametrize("answer, references, exact, f1", OFFICIAL)
def test_exact_match_and_f1_are_those_of_squads_official_script(answer, references, exact, f1):
    question = evaluate.Question([], "", references, 0, 1)
    assert question.exact_match(answer) == exact and question.f1(answer) == pytest.approx(f1)


def test_a_reference_without_a_list_of_answers_has_to_be_the_very_text():
    question = evaluate.Question([], "Yes.", None, 0, 1)
    assert question.exact_match("Yes.") and not question.exact_match("yes") and not question.exact_match("Yes. No.")


def test_scores_are_means_over_all_and_over_each_dataset():
    made = [evaluate.Question([], "x", None, 0, 1), evaluate.Question([], "x", ["x", "y z"], 1, 1)] * 2
    scores = evaluate.score(made, ["x", "y", "n", "The Y, z"], ["a", "b"])
    assert scores == {"exact_match": 0.5, "f1": pytest.approx((2 / 3 + 1) / 2), "exact_match/a": 0.5,
                      "exact_match/b": 0.5, "f1/b": pytest.approx((2 / 3 + 1) / 2)}  # fmt: skip


def test_the_command_gives_the_same_scores_on_one_process_two_and_sharded(memorised, tmp_path):
    outputs = []
    for name, processes, override in [
        ("one", 1, []),
        ("two", 2, ["data.args.seed=1"]),
        ("fsdp", 2, ["parallel.strategy=fsdp"]),
    ]:
        arguments = [memorised, *override, "--batch-size", 1, "--output", tmp_path / name]
        said, _ = script("evaluate.py", *arguments, processes=processes)
        assert "4 questions of chats" in said and "exact_match 50.00 %\nf1 83.33 %" in said
        assert ("may have been trained on some of these" in said) == (override == ["data.args.seed=1"])
        outputs.append((tmp_path / name).read_text())
    assert outputs[0] == outputs[1] == outputs[2]
    lines = [json.loads(line) for line in outputs[0].splitlines()]
    assert [line["answer"] for line in lines] == ["In France.", "It is in Italy.", "In Peru.", "A small model."]
    assert [line["exact_match"] for line in lines] == [True, False, False, True]
    assert lines[2]["prompt"].endswith("And Lima?<|im_end|>\n<|im_start|>assistant\n")


def test_a_run_that_is_asked_to_writes_the_scores_at_its_end(memorised):
    assert metrics(memorised, "val/exact_match") == {0: 0.0, 60: 0.5}
    assert metrics(memorised, "val/f1")[60] == pytest.approx(5 / 6)
    events = EventAccumulator(str(memorised / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/exact_match")] == [(0, 0.0), (60, 0.5)]


def test_prompts_are_answered_aloud_with_the_reference_beside(memorised):
    said = (memorised.parent / "said").read_text()
    assert "Where is Paris?" in said and "expected: In France.\n    answered: In France." in said
    events = EventAccumulator(str(memorised / "tensorboard")).Reload()
    shown = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/1/text_summary")]
    assert len(shown) == 2 and all("Where is Paris?" in text and "expected: In France." in text for text in shown)
    assert "answered: In France." in shown[1]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["configs/quickstart"], "is in no run's output_dir: name a configuration"),
        (["tests", "configs/quickstart.yaml"], "tests holds no model and no whole checkpoint"),
        (["configs/nowhere", "configs/quickstart.yaml"], "the model = 'configs/nowhere' could not be read"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(arguments, reason):
    _, said = call(evaluate.main, *arguments, expect=1)
    assert reason in said.splitlines()[-1]


def test_greedy_is_the_likeliest_token_whatever_the_models_own_settings_are(memorised):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(memorised / "model"),
        modelling.open_saved(memorised / "model", None),
    )
    ids, stop = tokenizer.encode("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"), [2]
    wanted = evaluate.generate(model, [ids], 20, stop)
    assert evaluate.text_of(tokenizer, wanted[0]) == "A small model."
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 5.0, 1, 2
    assert evaluate.generate(model, [ids], 20, stop) == wanted
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_a_batch_of_answers_has_no_more_tokens_than_it_may_and_what_cannot_be_asked_has_no_answer(
    memorised, monkeypatch
):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(memorised / "model"),
        modelling.open_saved(memorised / "model", None),
    )
    batches, places, tokens = [], [], []

    def generate(model, prompts, max_new_tokens, stop_ids, alive):
        batches.append((len(prompts), max(map(len, prompts)) + max_new_tokens))
        [alive() for _ in prompts]
        return [prompt[-1:] for prompt in prompts]

    monkeypatch.setattr(evaluate, "generate", generate)
    lengths = [(i * 37) % 91 for i in range(48)] + [230, 231, 255, 256, 300]
    questions = [evaluate.Question([0] * (length - 1) + [7 + i], "x", None, 0, 1) for i, length in enumerate(lengths)]
    answers = evaluate.answer_all(
        model, tokenizer, questions, [2], 500, None, 64, places.append, lambda: tokens.append(1)
    )
    assert answers == [evaluate.text_of(tokenizer, [7 + i]) for i in range(51)] + ["", ""]  # 256 positions
    assert all(n == 1 or n * most <= 500 and most <= 256 for n, most in batches)
    assert len(places) == len(batches) < 30 and len(tokens) == 51
    questions[0] = questions[0]._replace(prompt=[])
    short = evaluate.answer_all(model, tokenizer, questions, [2], 500, max_prompt=90)
    assert [not text for text in short] == [length == 0 or length >= 90 for length in lengths]


def test_what_is_asked_is_the_last_turn_whether_it_is_trained_or_not():
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    turns = [{"role": "user", "content": "Where is Oslo?"}, {"role": "assistant", "content": "In Norway."},
             {"role": "user", "content": "And Lima?"},
             {"role": "assistant", "content": "In Peru.", "train": False}]  # fmt: skip
    rows = [{"messages": turns, "answers": ["Peru"]}, {"messages": turns[:2]}, {"messages": turns[:2]}]
    entry = data.Entry("rows", type("Rows", (), {"formatted_ds": {"validation": rows}}), 1.0, ["validation"])
    questions, places = evaluate.make_questions([entry], tokenizer, tokenizer.chat_template, [2], 2)
    assert [q.reference for q in questions] == ["In Peru.", "In Norway."] and places == [(0, 0, None), (0, 1, None)]
    assert tokenizer.decode(questions[0].prompt).endswith("And Lima?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("model_type", ["gpt_oss", "gptj"])
def test_a_model_that_sdpa_does_not_fit_is_saved_opened_and_asked(tmp_path, model_type):
    torch.manual_seed(0)
    made = architectures.small(model_type)
    kernel = attention.choose(config.Model(), modelling.class_of(config.Model(), made), torch.device("cpu"))
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation=kernel)
    model.save_pretrained(tmp_path)
    modelling.compare(tmp_path, model.state_dict())
    opened, prompts = modelling.open_saved(tmp_path, torch.float32), [[5, 6, 7], [8, 9]]
    answers = evaluate.generate(model, prompts, 8, [2])
    assert answers == evaluate.generate(opened, prompts, 8, [2]) and model.config._attn_implementation == kernel
    greedy = [*prompts[1]]
    for _ in range(len(answers[1])):
        greedy.append(int(opened(torch.tensor([greedy]), use_cache=False).logits[0, -1].argmax()))
    assert greedy[2:] == answers[1] and len(answers[1]) > 2


def test_answers_use_up_no_graphs_of_a_compiled_model(memorised):
    model = modelling.open_saved(memorised / "model", torch.float32, "per_document")
    compiled = functools.partial(torch.nn.Module.compile, backend="eager")
    for block in modelling.blocks(model):
        compiled(block, dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    before = graphs["unique_graphs"]
    evaluate.generate(model, [[5, 6, 7]], 4, [2])
    assert modelling.keeps_documents_apart(model, model.device, torch.float32) and graphs["unique_graphs"] == before
    model(torch.arange(9)[None], use_cache=False)
    assert graphs["unique_graphs"] > before


def test_where_answers_cannot_be_written_or_replace_something_else_is_told_first(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    for name in ("config.yaml", "nowhere/answers.jsonl", ""):
        with pytest.raises(ValueError, match="--output"):
            evaluate.check_output(str(tmp_path / name))
    evaluate.check_output(str(tmp_path / "answers.jsonl"))
