"""Talk to a model through the chat template that it was trained with.

python chat.py results/squad                                     # the newest model there, or any model's folder or name
python chat.py results/squad --system "Paris is in France." --prompt "Where is Paris?"
python chat.py results/squad --jsonl questions.jsonl > answered.jsonl                      # - reads the standard input

In a chat: /system TEXT sets the system message and starts over, /reset starts over, /exit or Ctrl-D ends, Ctrl-C stops
an answer. A line of --jsonl is {"prompt": "..."} or {"messages": [...]}. Lines are written back in order, each with its
answer as `completion` or as one more message.
"""

import argparse
import contextlib
import json
import os
import sys
import warnings

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache

import checkpoint
import data
import evaluate
import formats
import model as modelling

# The newer name is not in the transformers that still run on Python 3.10
warnings.filterwarnings("ignore", "`past_key_values` is deprecated")


def main():
    parser = argparse.ArgumentParser(
        prog="chat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an output_dir, a checkpoint, a model's folder, or a name on the Hub")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--jsonl", metavar="FILE", help="answer each line of a file (-: of the standard input)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest that sum up to p (1: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling (0)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="the longest answer (512)")
    parser.add_argument("--batch-size", type=int, default=16, help="lines of --jsonl at once (16)")
    options = parser.parse_args()
    if not (options.temperature == 0 or 0.01 <= options.temperature < 100):
        parser.error("--temperature must be 0, or from 0.01 to 100")
    if not 0 < options.top_p <= 1 or options.top_k < 0:
        parser.error("--top-k must be at least 0, --top-p above 0 and at most 1")
    if options.max_new_tokens < 1 or options.batch_size < 1:
        parser.error("--max-new-tokens and --batch-size must be at least 1")
    if options.prompt is not None and options.jsonl:
        parser.error("--prompt and --jsonl are two ways to ask; give one")
    try:
        chat = Chat(options)
        if options.prompt is not None:
            chat.answer(options.prompt)
        elif options.jsonl:
            answer_lines(chat, options)
        else:
            talk(chat)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)  # nobody listens any more
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None


def talk(chat: "Chat"):
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() gets a history)
    print("/system TEXT, /reset, /exit; Ctrl-C ends an answer")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            chat.begin(chat.system)
        elif command == "/system":
            chat.begin(rest.strip() or None)
        elif command.startswith("/"):
            print(f"there is no command {command}; there are /system TEXT, /reset, /exit")
        elif line:
            try:
                chat.answer(line)
            except ValueError as error:  # what the template refuses, or a chat that is too long
                print(f"error: {error}")


class Chat:
    """A model with its tokenizer, and a conversation whose keys and values it remembers."""

    def __init__(self, options):
        name = checkpoint.find_model(options.model)
        self.device = modelling.take_device(0)
        with data.from_hub("the model", name):
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            dtype = "auto" if self.device.type == "cuda" else torch.float32
            self.model = modelling.open_saved(name, dtype).to(self.device)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{name} has no chat template: it was not made for chats")
        self.stop_ids = modelling.stop_ids_of(self.model, self.tokenizer)
        self.max_new_tokens = options.max_new_tokens
        self.sampling = {}
        if options.temperature:
            self.sampling = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k,
                             "top_p": options.top_p}  # fmt: skip
        torch.manual_seed(options.seed % 2**63)
        self.begin(options.system)

    def begin(self, system: str | None):
        self.system, self.seen, self.cache = system, [], None
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> str:
        """Print the answer as it comes, and remember both."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = prompt_ids(self.tokenizer, messages)
        self.check_length(ids)
        if self.cache is None or ids[: len(self.seen)] != self.seen:
            self.cache, self.seen = DynamicCache(config=self.model.config), []  # the template rewrote what was said
        said = Printer(self.tokenizer, self.stop_ids)
        try:
            evaluate.generate(
                self.model, [ids], self.max_new_tokens, self.stop_ids, streamer=said, past_key_values=self.cache,
                **self.sampling,
            )  # fmt: skip
            self.seen = [*ids, *said.ids][: self.cache.get_seq_length()]
        except KeyboardInterrupt:
            self.cache = None
        print()
        self.messages = [*messages, {"role": "assistant", "content": said.text.strip()}]
        return said.text.strip()

    def check_length(self, ids: list[int]):
        longest = modelling.positions_of(self.model)
        if len(ids) >= longest:
            raise ValueError(
                f"the conversation has {len(ids):,} tokens, the model takes {longest:,}; /reset starts over"
            )


class Printer:
    """What `generate` calls with each token: prints the text that is whole, and keeps `ids` and `text`."""

    def __init__(self, tokenizer, stop_ids):
        self.tokenizer, self.stop_ids, self.ids, self.text, self.shown = tokenizer, stop_ids, None, "", 0

    def put(self, value):
        if self.ids is None:
            self.ids = []  # the first call brings the prompt
            return
        self.ids += value.flatten().tolist()
        kept = self.ids[:-1] if self.ids[-1] in self.stop_ids else self.ids
        self.text = self.tokenizer.decode(kept, skip_special_tokens=False).lstrip()
        whole = len(self.text.rstrip("\ufffd"))  # a character may take more than one token
        print(self.text[self.shown : whole], end="", flush=True)
        self.shown = max(self.shown, whole)

    def end(self):
        print(self.text[self.shown :], end="", flush=True)


def prompt_ids(tokenizer, messages: list[dict], tools=None) -> list[int]:
    """What the model is fed. Raises ValueError where the template refuses."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template refuses this conversation: {error}") from None


def answer_lines(chat: Chat, options):
    """JSON lines in, the same with their answers out."""
    if options.jsonl == "-":
        file = formats.File("standard input", sys.stdin.buffer.read().rstrip().split(b"\n"), first=1)
    else:
        file = formats.read_file(options.jsonl)
    rows, prompts = [file.row(i) for i in range(len(file.rows))], []
    for i, row in enumerate(rows):
        messages = row.get("messages", row.get("prompt")) if isinstance(row, dict) else None
        if isinstance(messages, str) and "messages" not in row:
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError(f'{file.where(i)}: a line is {{"prompt": "..."}} or {{"messages": [...]}}')
        if messages[-1].get("role") == "assistant":
            raise ValueError(f"{file.where(i)}: the last message is the assistant's: there is nothing to answer")
        if chat.system and messages[0].get("role") != "system":
            messages = [*chat.messages, *messages]
        try:
            prompts.append(prompt_ids(chat.tokenizer, messages, formats.tools_of(row)))
            chat.check_length(prompts[-1])
        except ValueError as error:
            raise ValueError(f"{file.where(i)}: {error}") from None
    batch, room = [], modelling.positions_of(chat.model) - chat.max_new_tokens
    for i, prompt in enumerate(tqdm(prompts, desc="answering", unit=" lines")):
        batch.append(prompt)
        # a prompt that leaves too little room for an answer is answered alone, so that it cuts no other's
        full = len(batch) == options.batch_size or i + 1 == len(prompts)
        if not full and max(len(batch[-1]), len(prompts[i + 1])) <= room:
            continue
        answers = evaluate.generate(chat.model, batch, chat.max_new_tokens, chat.stop_ids, **chat.sampling)
        for row, ids in zip(rows[i + 1 - len(batch) : i + 1], answers, strict=True):
            text = evaluate.text_of(chat.tokenizer, ids)
            if "messages" in row:
                row = {**row, "messages": [*row["messages"], {"role": "assistant", "content": text}]}
            else:
                row = {**row, "completion": text}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        batch = []


if __name__ == "__main__":
    main()
