"""Answers and their scores, by function and by the command."""

import functools
import json

import architectures
import pytest
import torch
from running import call, metrics, run, script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

import config
import data
import evaluate
from export import verify_export
from model import blocks, load_model, open_saved

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
    example = evaluate.EvalExample([], "", references, 0)
    assert example.exact_match(answer) == exact and example.f1(answer) == pytest.approx(f1)


def test_without_a_list_of_answers_the_very_text_is_needed():
    example = evaluate.EvalExample([], "Yes.", None, 0)
    assert example.exact_match("Yes.") and not example.exact_match("yes") and not example.exact_match("Yes. No.")


def test_scores_are_means_over_all_and_over_each_dataset():
    examples = [evaluate.EvalExample([], "x", None, 0), evaluate.EvalExample([], "x", ["x", "y z"], 1)] * 2
    scores = evaluate.score(examples, ["x", "y", "n", "The Y, z"], ["a", "b"])
    assert scores == {"exact_match": 0.5, "f1": pytest.approx((2 / 3 + 1) / 2), "exact_match/a": 0.5,
                      "exact_match/b": 0.5, "f1/b": pytest.approx((2 / 3 + 1) / 2)}  # fmt: skip


@pytest.mark.slow
def test_the_scores_are_the_same_on_one_rank_two_and_sharded(memorized, tmp_path):
    outputs = []
    for name, ranks, overrides in [("one", 1, []), ("two", 2, []), ("fsdp", 2, ["parallel.strategy=fsdp"])]:
        arguments = [memorized, *overrides, "train.max_tokens_per_micro_batch=1", "--output", tmp_path / name]
        if name == "one":  # As a user does; the others in forks, which takes less time.
            printed = "".join(script("evaluate.py", *arguments))
        else:
            printed = run(*arguments, processes=ranks, name="evaluate.py")
        assert "4 answers of chats" in printed and "exact_match 50.00 %\nf1 83.33 %" in printed
        outputs.append((tmp_path / name).read_text())
    assert outputs[0] == outputs[1] == outputs[2]
    lines = [json.loads(line) for line in outputs[0].splitlines()]
    assert [line["answer"] for line in lines] == ["In France.", "It is in Italy.", "In Peru.", "A small model."]
    assert [line["exact_match"] for line in lines] == [True, False, False, True]
    assert lines[2]["prompt"].endswith("And Lima?<|im_end|>\n<|im_start|>assistant\n")


def test_the_command_scores_a_model_with_the_data_of_its_own_run(memorized, tmp_path):
    printed, _ = call(evaluate.main, memorized / "model", "--max-examples", 2, "--output", tmp_path / "answers.jsonl")
    assert "2 answers of chats" in printed and "exact_match 50.00 %" in printed
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(line["row"], line["answer"], line["f1"]) for line in lines] == [
        (0, "In France.", 1.0),
        (1, "It is in Italy.", pytest.approx(2 / 3)),
    ]


def test_a_run_with_exact_match_writes_the_scores_at_its_end(memorized):
    assert metrics(memorized, "val/exact_match") == {0: 0.0, 60: 0.5}
    assert metrics(memorized, "val/f1")[60] == pytest.approx(5 / 6)
    events = EventAccumulator(str(memorized / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/exact_match")] == [(0, 0.0), (60, 0.5)]


def test_a_validation_shows_sample_answers_beside_the_reference(memorized):
    said = (memorized.parent / "said").read_text()
    assert "Where is Paris?" in said and "expected: In France.\n    answered: In France." in said
    events = EventAccumulator(str(memorized / "tensorboard")).Reload()
    shown = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/1/text_summary")]
    assert len(shown) == 2 and all("Where is Paris?" in text and "expected: In France." in text for text in shown)
    assert "answered: In France." in shown[1]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["configs/quickstart"], "configs/quickstart: is in no run's output_dir"),
        (["tests", "configs/quickstart.yaml"], "tests"),
        (["configs/nowhere", "configs/quickstart.yaml"], "configs/nowhere"),
        (["configs/quickstart", "configs/quickstart.yaml", "--output", "nowhere/answers.jsonl"], "nowhere/answers"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error_in_one_line(arguments, named):
    _, error = call(evaluate.main, *arguments, expect=1)
    assert error.splitlines()[-1].startswith("error: ") and named in error.splitlines()[-1]


def test_greedy_is_the_likeliest_token_despite_the_generation_config(memorized):
    tokenizer, model = AutoTokenizer.from_pretrained(memorized / "model"), open_saved(memorized / "model", None)
    ids, stop = tokenizer.encode("<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"), [2]
    wanted = evaluate.generate(model, [ids], 20, stop)
    assert tokenizer.decode(wanted[0]).strip() == "A small model."
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 5.0, 1, 2
    assert evaluate.generate(model, [ids], 20, stop) == wanted
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_batches_of_answers_fit_and_prompts_that_do_not_fit_are_empty(memorized, monkeypatch):
    tokenizer, model = AutoTokenizer.from_pretrained(memorized / "model"), open_saved(memorized / "model", None)
    batches = []

    def generate(model, prompts, max_new_tokens, stop_ids):
        batches.append((len(prompts), max(map(len, prompts)) + max_new_tokens))
        return [prompt[-1:] for prompt in prompts]

    monkeypatch.setattr(evaluate, "generate", generate)
    lengths = [(i * 37) % 91 for i in range(48)] + [230, 231, 255, 256, 300]
    examples = [evaluate.EvalExample([0] * (length - 1) + [7 + i], "x", None, 0) for i, length in enumerate(lengths)]
    answers = evaluate.answer_all(model, tokenizer, examples, [2], 500)
    assert answers == [tokenizer.decode([7 + i]).strip() for i in range(51)] + ["", ""]  # 256 positions
    assert all(n == 1 or n * most <= 500 and most <= 256 for n, most in batches) and len(batches) < 30
    examples[0] = examples[0]._replace(prompt=[])
    assert evaluate.answer_all(model, tokenizer, [], [2], 500) == []
    short = evaluate.answer_all(model, tokenizer, examples, [2], 500, max_prompt=90)
    assert [not text for text in short] == [length == 0 or length >= 90 for length in lengths]


def test_the_last_turn_is_generated_whether_it_is_trained_or_not():
    tokenizer = AutoTokenizer.from_pretrained("configs/quickstart")
    turns = [{"role": "user", "content": "Where is Oslo?"}, {"role": "assistant", "content": "In Norway."},
             {"role": "user", "content": "And Lima?"},
             {"role": "assistant", "content": "In Peru.", "train": False}]  # fmt: skip
    rows = [{"messages": turns, "answers": ["Peru"]}, {"messages": turns[:2]}, {"messages": turns[:2]}]
    entry = data.MixtureEntry("rows", type("Rows", (), {"formatted_ds": {"validation": rows}}), 1.0, ["validation"])
    examples, places = evaluate.eval_examples([entry], tokenizer, tokenizer.chat_template, [2], 2)
    assert [e.reference for e in examples] == ["In Peru.", "In Norway."] and places == [(0, 0, None), (0, 1, None)]
    assert tokenizer.decode(examples[0].prompt).endswith("And Lima?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("model_type", ["gpt_oss", "gptj"])
def test_a_model_without_sdpa_is_saved_opened_and_answers(tmp_path, model_type):
    torch.manual_seed(0)
    architectures.small(model_type).save_pretrained(tmp_path / "config")
    model_cfg = config.Model(name=str(tmp_path / "config"), from_scratch=True, dtype="float32")
    model = load_model(model_cfg, torch.device("cpu"))
    own_attention = model.config._attn_implementation
    model.save_pretrained(tmp_path / "model")
    verify_export(tmp_path / "model", model.state_dict())
    opened, prompts = open_saved(tmp_path / "model", torch.float32), [[5, 6, 7], [8, 9]]
    answers = evaluate.generate(model, prompts, 8, [2])
    assert answers == evaluate.generate(opened, prompts, 8, [2]) and model.config._attn_implementation == own_attention
    greedy = [*prompts[1]]
    for _ in range(len(answers[1])):
        greedy.append(int(opened(torch.tensor([greedy]), use_cache=False).logits[0, -1].argmax()))
    assert greedy[2:] == answers[1] and len(answers[1]) > 2


@pytest.mark.slow
def test_answers_use_up_no_graphs_of_a_compiled_model(memorized):
    model = open_saved(memorized / "model", torch.float32, "per_document")
    compiled = functools.partial(torch.nn.Module.compile, backend="eager")
    for block in blocks(model):
        compiled(block, dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    before = graphs["unique_graphs"]
    evaluate.generate(model, [[5, 6, 7]], 4, [2])
    assert graphs["unique_graphs"] == before
    model(torch.arange(9)[None], use_cache=False)
    assert graphs["unique_graphs"] > before
