"""Generate answers to a validation split, greedily and over any number of ranks, and score them.

python evaluate.py results/squad                                   # the newest model there, the data of its config.yaml
torchrun --nproc_per_node 8 evaluate.py MODEL configs/squad.yaml   # any model's folder, or its name on the Hub

It generates the last assistant turn of each validation conversation. Where that lists its right `answers`, exact match
and F1 are those of SQuAD's official script; elsewhere only the turn's own text, to the letter, is right.
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
import config
import distributed
from attention import eval_mode
from data import at_row, load_mixture, read_conversation, splits_of
from model import is_sharded, max_positions, open_saved, parallelize, stop_ids_of, take_device
from templates import IGNORE_INDEX, SWITCHES, encode
from tokens import choose_template


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space, as in the official script of SQuAD 1.1,
    https://rajpurkar.github.io/SQuAD-explorer/ (evaluate-v1.1.py)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


class EvalExample(NamedTuple):
    """A turn to generate. `prompt`: the token ids before it. `reference`: the turn's text. `answers`: the right answers
    by SQuAD's rules, or None where only the reference itself is right. `dataset`: its index in the mixture."""

    prompt: list[int]
    reference: str
    answers: list[str] | None
    dataset: int

    def exact_match(self, answer: str) -> bool:
        if self.answers is None:
            return answer == self.reference
        return any(normalize_answer(answer) == normalize_answer(right) for right in self.answers)

    def f1(self, answer: str) -> float:
        """The harmonic mean of precision and recall of the normalized words, for the best of the right answers."""
        words, scores = normalize_answer(answer).split(), []
        for expected in [normalize_answer(right).split() for right in self.answers]:
            common = (collections.Counter(words) & collections.Counter(expected)).total()
            scores.append(2 * common / (len(words) + len(expected)) if common else 0.0)
        return max(scores)


def score(examples: list[EvalExample], answers: list[str], names: list[str]) -> dict[str, float]:
    """Metrics from 0 to 1: `exact_match`, `f1` over the examples with a list of answers and, if there is more than one
    dataset, `exact_match/NAME` and `f1/NAME` of each."""
    metrics, datasets = {}, {f"/{name}": [k] for k, name in enumerate(names) if len(names) > 1}
    for suffix, chosen in {"": range(len(names)), **datasets}.items():
        pairs = [(e, a) for e, a in zip(examples, answers, strict=True) if e.dataset in chosen]
        if pairs:
            metrics[f"exact_match{suffix}"] = sum(e.exact_match(a) for e, a in pairs) / len(pairs)
        if pairs := [(e, a) for e, a in pairs if e.answers]:
            metrics[f"f1{suffix}"] = sum(e.f1(a) for e, a in pairs) / len(pairs)
    return metrics


def eval_examples(entries, tokenizer, chat_template: str, stop_ids, max_examples: int | None, date=None):
    """The last assistant turn in the first `max_examples` validation conversations of each dataset (None: all of them),
    whether trained or not, and the (dataset, row, id) of each. `date`: see `templates.encode`."""
    examples, places = [], []
    splits = [(rows, name) for _, split, rows, name in splits_of(entries) if split == "validation"]
    for dataset, (rows, name) in enumerate(splits):
        for i in range(len(rows))[:max_examples]:
            conversation = read_conversation(rows, i, name)
            if not (messages := conversation.get("messages")):  # a document
                continue
            last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
            messages = [{**message, **dict.fromkeys(SWITCHES)} for message in messages[: last + 1]]
            with at_row(rows, i, name):
                ids, labels = encode(tokenizer, messages, conversation.get("tools"), chat_template, "last", date)
            if {*labels} != {IGNORE_INDEX}:
                examples.append(eval_example(tokenizer, ids, labels, stop_ids, conversation.get("answers"), dataset))
                places.append((dataset, i, conversation.get("id")))
    return examples, places


def eval_example(tokenizer, ids, labels, stop_ids, answers: list[str] | None, dataset: int) -> EvalExample:
    """The last trained turn of a tokenized conversation: `ids` and `labels` are integers, (tokens,)."""
    ids, trained = np.asarray(ids), np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
    first = int(np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)[-1][0])
    reference = [token for token in ids[first : trained[-1] + 1].tolist() if token not in stop_ids]
    return EvalExample(ids[:first].tolist(), tokenizer.decode(reference).strip(), answers, dataset)


def open_model(name: str, device: torch.device, dtype: str):
    """The tokenizer, the model (on the CPU; in `dtype` for a GPU) and the stop ids: see `checkpoint.find_model`."""
    name = checkpoint.find_model(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = open_saved(name, dtype if device.type == "cuda" else "float32")
    return tokenizer, model, stop_ids_of(model, tokenizer)


@torch.compiler.set_stance("force_eager")  # A graph for each length and layer would use up those of the training.
@torch.no_grad()
def generate(model, prompts: list[list[int]], max_new_tokens: int, stop_ids: list[int], **sampling) -> list[list[int]]:
    """The answers to a batch of prompts, as ids before a stop id. `sampling`: arguments of transformers' `generate`."""
    longest = max(len(prompt) for prompt in prompts)  # The others are padded on the left.
    ids = torch.tensor([stop_ids[:1] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    # The attention of the training takes no padding, so transformers' own one answers.
    attention = "sdpa" if model._supports_sdpa and model.config._attn_implementation != "eager" else "eager"
    own_config, model.generation_config = model.generation_config, GenerationConfig()  # Its own may have penalties.
    options = {"eos_token_id": stop_ids, "pad_token_id": stop_ids[0], "use_cache": True, "do_sample": False} | sampling
    options["max_new_tokens"] = max(1, min(max_new_tokens, max_positions(model) - longest))
    options["synced_gpus"] = is_sharded(model)  # The ranks of a sharded model compute each token together.
    with eval_mode(model, attention):
        output = model.generate(input_ids=ids, attention_mask=mask, **options)
    model.generation_config = own_config
    answers = output[:, longest:].tolist()
    return [answer[: next((k for k, id in enumerate(answer) if id in stop_ids), None)] for answer in answers]


def answer_all(model, tokenizer, examples, stop_ids, max_tokens: int, max_prompt: int = 2**31) -> list[str]:
    """The answers as texts, the same on every rank; all run as many batches. A batch has at most `max_tokens` tokens
    with its answers, or a single prompt. A prompt of no tokens, of `max_prompt` or of too many is answered by ""."""
    rank, world_size = distributed.rank_and_world_size()
    right = {text for example in examples for text in (example.reference, *(example.answers or []))}
    # An answer is cut after 256 tokens, so that a longer reference counts as missed.
    max_new_tokens = min(256, max([32, *(len(tokenizer.encode(text)) + 8 for text in right)]))
    lengths, positions = np.array([len(example.prompt) for example in examples]), max_positions(model)
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    # Beyond it, the longest prompt of a batch may change the rotary frequencies of all.
    original_length = min(positions, rope.get("original_max_position_embeddings") or positions)
    left = [i for i in np.argsort(-lengths, kind="stable").tolist() if 0 < lengths[i] < min(positions, max_prompt)]
    texts = {}
    with tqdm(total=len(left), desc="answering", unit=" answers", leave=False, disable=rank > 0 or None) as bar:
        while left:
            longest = int(lengths[left[0]]) + max_new_tokens
            size = world_size * (max(1, max_tokens // longest) if longest <= original_length else 1)
            global_batch, left = left[:size], left[size:]
            batch = global_batch[rank::world_size] or global_batch[-1:]  # A rank without a share computes along.
            distributed.progress()
            answers = generate(model, [examples[i].prompt for i in batch], max_new_tokens, stop_ids)
            texts |= {i: tokenizer.decode(ids).strip() for i, ids in zip(batch, answers, strict=True)}
            bar.update(len(global_batch))
    texts = {i: text for part in distributed.all_gather_object(texts) for i, text in part.items()}
    return [texts.get(i, "") for i in range(len(examples))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an output_dir, a checkpoint, a model's folder, or a name on the Hub")
    parser.add_argument("arguments", nargs="*", help="CONFIG.yaml, KEY=VALUE: the data; default: the run's config.yaml")
    parser.add_argument("--max-examples", type=int, help="only the first N of each dataset (default: all)")
    parser.add_argument("--output", metavar="FILE", default=os.devnull, help="write answers and scores as JSON Lines")
    options = parser.parse_intermixed_args()
    try:
        evaluate(options.model, options.arguments, options.max_examples, options.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {options.model}: {' '.join(str(error).split())}") from None


def evaluate(name: str, arguments: list[str], max_examples: int | None, output: str):
    if all("=" in argument for argument in arguments):
        # The configuration of its run. It may be an output_dir, the model/ in it, a checkpoint, or the model/ in that.
        folders = [Path(name), *Path(name).absolute().parents][:4]
        files = [str(folder / "config.yaml") for folder in folders if (folder / "config.yaml").is_file()]
        if not files:
            raise ValueError("is in no run's output_dir: name a configuration, such as configs/squad.yaml")
        arguments = [files[0], *arguments]
    cfg = config.from_command_line(arguments)
    Path(output).touch()  # If it cannot be written, that is an error now and not after hours of answering.
    device = take_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group(24 * 3600)  # The ranks meet only before the first and after the last answer.
    rank, world_size = distributed.rank_and_world_size()
    tokenizer, model, stop_ids = open_model(name, device, cfg.model.dtype)
    if cfg.parallel.strategy == "fsdp" and world_size > 1:
        _, model = parallelize(model, cfg, "fsdp", world_size, device)
    else:
        model.to(device)
    if rank == 0:
        entries = load_mixture(cfg, scoring=True)
        chat_template = choose_template(cfg, tokenizer, entries)
        examples, places = eval_examples(entries, tokenizer, chat_template, stop_ids, max_examples, cfg.tokenizer.date)
        names = [entry.name for entry in entries]
    examples = distributed.broadcast_object(examples if rank == 0 else None)
    answers = answer_all(model, tokenizer, examples, stop_ids, cfg.train.max_tokens_per_micro_batch)
    if rank == 0:
        print(f"{name}: {len(examples):,} answers of {', '.join(names)}")
        for metric, value in score(examples, answers, names).items():
            print(f"{metric} {100 * value:.2f} %")
        with open(output, "w", encoding="utf-8") as file:
            for (dataset, row, id), e, answer in zip(places, examples, answers, strict=True):
                line = {"dataset": names[dataset], "row": row, "id": id, "prompt": tokenizer.decode(e.prompt)}
                line |= {"reference": e.reference, "answers": e.answers, "answer": answer}
                line |= {"exact_match": e.exact_match(answer), "f1": e.f1(answer) if e.answers else None}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    distributed.wait_for_all("scored")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # A character that the terminal cannot show is no error.
    main()
    distributed.hard_exit()
