"""Greedy answers to a validation split, on any number of processes, and how good they are.

python evaluate.py results/squad                                   # the newest model there, the data of its config.yaml
torchrun --nproc_per_node 8 evaluate.py FOLDER configs/squad.yaml  # any model's folder, or its name on the Hub

It asks for the last assistant turn of each validation conversation. Where rows have a list of `answers`, as in SQuAD,
exact match and F1 are those of its official script; elsewhere an answer is right if it equals the reference exactly.
"""

import argparse
import collections
import json
import os
import re
import string
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

import checkpoint
import config as configuration
import data
import model as modelling
import ranks
import templates

LONGEST = 256  # tokens of an answer; a right one that is longer counts as missed


# ---- scores ----------------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space, as in the official script of SQuAD 1.1,
    https://rajpurkar.github.io/SQuAD-explorer/ (evaluate-v1.1.py)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, after `normalised`."""
    said, right = normalised(answer).split(), normalised(reference).split()
    same = sum((collections.Counter(said) & collections.Counter(right)).values())
    return 2 * same / (len(said) + len(right)) if same else 0.0


class Question(NamedTuple):
    """`prompt`: token ids that are fed; `reference`: the assistant's turn as text; `answers`: all that are right by
    SQuAD's rules (None: only the reference, verbatim); `dataset`: its index in a mixture, from 0; `tokens`: of the
    longest of reference and answers."""

    prompt: list[int]
    reference: str
    answers: list[str] | None
    dataset: int
    tokens: int

    def exact_match(self, answer: str) -> bool:
        if self.answers is None:
            return answer == self.reference
        return any(normalised(answer) == normalised(right) for right in self.answers)

    def f1(self, answer: str) -> float:
        return max(f1(answer, right) for right in self.answers)


def score(questions: list[Question], answers: list[str], names: list[str]) -> dict[str, float]:
    """Means from 0 to 1 by name: `exact_match`; `f1` over the questions that have a list of answers; and, if there is
    more than one dataset, the same for each as `exact_match/NAME` and `f1/NAME`."""
    figures = {}
    for dataset in [None, *range(len(names))] if len(names) > 1 else [None]:
        chosen = [(q, a) for q, a in zip(questions, answers, strict=True) if dataset in (None, q.dataset)]
        suffix = "" if dataset is None else f"/{names[dataset]}"
        if chosen:
            figures[f"exact_match{suffix}"] = sum(q.exact_match(a) for q, a in chosen) / len(chosen)
        if listed := [(q, a) for q, a in chosen if q.answers]:
            figures[f"f1{suffix}"] = sum(q.f1(a) for q, a in listed) / len(listed)
    return figures


# ---- answers ---------------------------------------------------------------------------------------------------------


@torch.compiler.set_stance("force_eager")  # a graph for each length and layer would use up those of the training
@torch.no_grad()
def generate(
    model, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int], alive=lambda: None, **sampling
) -> list[list[int]]:
    """Answers (ids before the first stop id) to a batch of prompts of token ids; greedy unless `sampling` (arguments of
    transformers' `generate`) says otherwise. `alive` is called at each token."""
    own, longest = model.generation_config, max(len(prompt) for prompt in prompts)
    max_new_tokens = max(1, min(max_new_tokens, modelling.positions_of(model) - longest))
    pad = stop_ids[0]
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)  # (prompts, longest)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    def note(ids, scores, **_):
        alive()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    kernel = "sdpa" if model._supports_sdpa and model.config._attn_implementation != "eager" else "eager"
    model.generation_config = GenerationConfig()  # its own may hold penalties and beams, which are no greedy answers
    try:
        with modelling.answering(model, kernel):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_ids,
                pad_token_id=pad,
                use_cache=True,
                stopping_criteria=[note],
                synced_gpus=modelling.is_sharded(model),  # a sharded model runs on all ranks or none
                **({"do_sample": False} | sampling),
            )[:, longest:].tolist()
    finally:
        model.generation_config = own
    return [
        answer[: next((k for k, token in enumerate(answer) if token in stop_ids), len(answer))] for answer in output
    ]


def answer_all(
    model, tokenizer, questions, stop_ids, max_tokens: int, max_prompt: int | None = None, batch_size: int = 64,
    note_place=lambda place: None, alive=lambda: None,
) -> list[str]:  # fmt: skip
    """The model's answers as texts, on every rank. Each rank answers its share, and all ranks run the same number of
    batches, as a sharded model needs. A batch holds prompts of similar length; one of more than one prompt has at most
    `max_tokens` tokens, answers included. A prompt of no token, of `max_prompt` or more, or that leaves no room in
    the model, gets an empty answer. `note_place` is called before each batch, `alive` at each token."""
    rank, world_size = ranks.rank_and_size()
    max_new_tokens = min(LONGEST, max(32, max(question.tokens for question in questions) + 8))
    lengths, positions = [len(question.prompt) for question in questions], modelling.positions_of(model)
    order = sorted(range(len(questions)), key=lengths.__getitem__)
    order = [i for i in order if 0 < lengths[i] < min(positions, max_prompt or positions)]
    found, at, quiet = {}, 0, rank > 0 or len(order) <= batch_size or not sys.stderr.isatty()
    with tqdm(total=len(order), desc="answering", unit=" answers", leave=False, disable=quiet) as bar:
        while at < len(order):
            for size in range(batch_size, 0, -1):
                longest = lengths[order[min(at + size * world_size, len(order)) - 1]] + max_new_tokens
                if size * longest <= max_tokens and longest <= positions:
                    break  # (else there is one, with what room it has)
            everybodys = order[at : at + size * world_size]
            note_place(f"answer {at + 1} of {len(order)}")
            batch = everybodys[rank::world_size] or order[:1]  # nothing left: computes along with the others
            prompts = [questions[i].prompt for i in batch]
            for i, ids in zip(batch, generate(model, prompts, max_new_tokens, stop_ids, alive), strict=True):
                found[i] = text_of(tokenizer, ids)
            bar.update(len(everybodys))
            at += len(everybodys)
    everything = {i: text for part in ranks.from_all(found) for i, text in part.items()}
    return [everything.get(i, "") for i in range(len(questions))]


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False).strip()


def question_of(tokenizer, ids, labels, stop_ids, answers: list[str] | None, dataset: int) -> Question:
    """The last trained turn of a conversation: ids and labels, arrays (tokens,)."""
    trained = np.flatnonzero(labels != templates.IGNORE_INDEX)
    first = int(np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)[-1][0])
    reference = [token for token in ids[first : trained[-1] + 1].tolist() if token not in stop_ids]
    tokens = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in ["", *(answers or [])])
    tokens = max(tokens, len(reference))
    return Question(ids[:first].tolist(), text_of(tokenizer, reference), answers, dataset, tokens)


def make_questions(entries, tokenizer, chat_template: str, stop_ids, max_examples: int | None, show=False):
    """The last turn of the assistant in the first `max_examples` validation conversations of each dataset (None: of
    all), whether it would be trained or not. Returns (questions, (dataset, row, id) of each). Raises ValueError for
    a bad row."""
    questions, places = [], []
    for k, entry in enumerate(entries):
        rows = entry.dataset.formatted_ds["validation"]
        count = len(rows) if max_examples is None else min(len(rows), max_examples)
        if count:
            data.format_of(rows)  # it looks at all rows
        for i in tqdm(
            range(count), desc=f"reading {entry.name}", unit=" rows", leave=False, disable=None if show else True
        ):
            with data.at_row(rows, f"{entry.name} validation", i):
                row = data.read_row(rows, i)
                last = max(n for n, message in enumerate(row["messages"]) if message["role"] == "assistant")
                messages = [{**m, "train": None, "weight": None} for m in row["messages"][: last + 1]]
                encoded = templates.encode(tokenizer, messages, row.get("tools") or None, chat_template, "last")
            ids, labels = (np.array(part) for part in encoded)
            if (labels != templates.IGNORE_INDEX).any():
                questions.append(question_of(tokenizer, ids, labels, stop_ids, data.answers_of(row), k))
                places.append((k, i, row.get("id")))
    return questions, places


# ---- the command -----------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an output_dir, a checkpoint, a model's folder, or a name on the Hub")
    parser.add_argument("arguments", nargs="*", help="CONFIG.yaml, KEY=VALUE: the data; default: the run's config.yaml")
    parser.add_argument("--max-examples", type=int, help="only the first N of each dataset (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="most answers generated at once by a process (64)")
    parser.add_argument("--output", metavar="FILE", help="write prompts, answers and their scores, one JSON a line")
    options = parser.parse_intermixed_args()
    if options.batch_size < 1 or (options.max_examples is not None and options.max_examples < 1):
        parser.error("--batch-size and --max-examples must be at least 1")
    try:
        evaluate(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None


def evaluate(options):
    check_output(options.output)
    cfg = configuration.from_command_line(with_config_of(options.model, options.arguments))
    device = modelling.take_device(int(os.environ.get("LOCAL_RANK", 0)))
    ranks.start_group()
    rank, world_size = ranks.rank_and_size()
    name = checkpoint.find_model(options.model)
    with data.from_hub("the model", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
        dtype = modelling.compute_dtype(cfg) if device.type == "cuda" else torch.float32
        model = modelling.open_saved(name, dtype)
    stop_ids = modelling.stop_ids_of(model, tokenizer)
    if cfg.parallel.strategy == "fsdp" and world_size > 1:
        _, model = modelling.parallelise(model, cfg, "fsdp", world_size, device)
    else:
        model.to(device)
    questions = None
    if rank == 0:
        entries = data.load_entries(cfg, scoring=True)
        chat_template = data.choose_template(cfg, tokenizer, entries)
        questions, places = make_questions(entries, tokenizer, chat_template, stop_ids, options.max_examples, True)
        if not questions:
            raise ValueError("the validation split has no turn of the assistant to ask for")
        names = [entry.name for entry in entries]
    questions = ranks.from_rank_0(questions)
    max_tokens = cfg.train.max_tokens_per_micro_batch
    answers = answer_all(model, tokenizer, questions, stop_ids, max_tokens, batch_size=options.batch_size)
    if rank == 0:
        figures = score(questions, answers, names)
        counts = collections.Counter(question.dataset for question in questions)
        print(f"{name}: {', '.join(f'{counts[k]:,} questions of {names[k]}' for k in sorted(counts))}")
        if not split_of_the_run(options.model, cfg.data):
            print(
                "The model was trained with other data.args: it may have been trained on some of these conversations."
            )
        print("\n".join(f"{figure} {100 * value:.2f} %" for figure, value in figures.items()))
        if options.output:
            write_answers(Path(options.output), names, places, tokenizer, questions, answers)
    ranks.barrier()


def check_output(name: str | None):
    """Raises ValueError, before any answer is computed, where the answers could not be written, or would replace
    something else."""
    if name is None:
        return
    path = Path(name)
    if path.exists() and not (path.is_file() and path.suffix == ".jsonl"):
        raise ValueError(f"--output {name} is there already and no .jsonl file; name another")
    if not (path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)):
        raise ValueError(f"--output {name}: the folder {path.absolute().parent} is not there or cannot be written to")


def config_of_run(model: str) -> Path | None:
    """The configuration of the run that a model is of."""
    folders = [Path(model), *Path(model).absolute().parents][:4]  # of a run, its model/, a checkpoint and its model/
    return next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)


def split_of_the_run(model: str, asked) -> bool:
    """Whether the run of the model split the data as `asked`, a `config.Data`, does; True where that is not known."""
    found = config_of_run(model)
    try:
        trained = configuration.load(str(found), []).data if found else asked
    except ValueError:  # another program's config.yaml
        return True
    return trained.dataset != asked.dataset or trained.args == asked.args


def with_config_of(model: str, arguments: list[str]) -> list[str]:
    """The command line, with the run's own configuration where it names none."""
    if any("=" not in argument for argument in arguments):
        return arguments
    found = config_of_run(model)
    if found is None:
        raise ValueError(
            f"{model} is in no run's output_dir: name a configuration for the data, such as configs/squad.yaml"
        )
    return [str(found), *arguments]


def write_answers(path: Path, names, places, tokenizer, questions, answers):
    lines = []
    for (k, i, id), question, answer in zip(places, questions, answers, strict=True):
        line = {"dataset": names[k], "row": i, "id": id, "prompt": tokenizer.decode(question.prompt)}
        line |= {"reference": question.reference, "answers": question.answers, "answer": answer}
        line |= {"exact_match": question.exact_match(answer), "f1": question.f1(answer) if question.answers else None}
        lines.append(json.dumps({name: value for name, value in line.items() if value is not None}, ensure_ascii=False))
    checkpoint.write_atomically(path, "\n".join(lines) + "\n")
    print(f"{path} holds the answers")


if __name__ == "__main__":
    main()
    ranks.leave()
