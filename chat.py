"""Talk to a model through its chat template.

python chat.py results/squad                                     # the newest model there, or any model's folder or name
python chat.py results/squad --system "Paris is in France." --prompt "Where is Paris?"

/system TEXT sets the system message and starts over, /reset starts over, /exit or Ctrl-D ends, Ctrl-C ends an answer.
"""

import argparse
import sys

import torch
from transformers import TextStreamer

from evaluate import generate, open_model
from model import max_positions, take_device
from templates import adapt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an output_dir, a checkpoint, a model's folder, or a name on the Hub")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="seed for sampling (0)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="the longest answer (512)")
    options = parser.parse_args()
    try:
        chat = Chat(options)
        if options.prompt is not None:
            return chat.answer(options.prompt)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {options.model}: {' '.join(str(error).split())}") from None
    import readline  # noqa: F401 (gives input() a history)

    print("/system TEXT, /reset, /exit; Ctrl-C ends an answer")
    while True:
        try:
            line = input("> ").strip()
            command, _, text = line.partition(" ")
            if command == "/exit":
                return
            if command in ("/reset", "/system"):
                chat.start_over(chat.system if command == "/reset" else text.strip())
            elif command.startswith("/"):
                print(f"there is no command {command}; there are /system TEXT, /reset, /exit")
            elif line:
                chat.answer(line)
        except ValueError as error:  # The template refuses the conversation, or it is too long.
            print(f"error: {error}")
        except (EOFError, KeyboardInterrupt):
            return print()


class Chat:
    """A model with its tokenizer, and a conversation (`messages`)."""

    def __init__(self, options):
        self.options, device = options, take_device(0)
        self.tokenizer, model, self.stop_ids = open_model(options.model, device, "auto")
        self.model = model.to(device)
        torch.manual_seed(options.seed)
        self.start_over(options.system)

    def start_over(self, system: str | None):
        self.system, self.messages = system, [{"role": "system", "content": system}] if system else []

    def answer(self, text: str):
        """Print the answer to a user's message as it is generated, and add both to the conversation. Raises ValueError
        where the template refuses the conversation or the model cannot take one as long."""
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            adapted = adapt(self.tokenizer, self.tokenizer.chat_template, messages)
            ids = self.tokenizer.apply_chat_template(adapted, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # A template may raise anything.
            raise ValueError(f"the chat template refuses this conversation: {error}") from None
        if len(ids) >= (longest := max_positions(self.model)):
            raise ValueError(f"the conversation has {len(ids):,} tokens, the model takes {longest:,}; try /reset")
        sampling = {"streamer": TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)}
        if self.options.temperature:  # top_k 0: among all tokens
            sampling |= {"do_sample": True, "temperature": self.options.temperature, "top_k": 0}
        try:
            answers = generate(self.model, [ids], self.options.max_new_tokens, self.stop_ids, **sampling)
        except KeyboardInterrupt:
            return print(" (not added to the conversation)")
        self.messages = [*messages, {"role": "assistant", "content": self.tokenizer.decode(answers[0]).strip()}]


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # A character that the terminal cannot show is no error.
    main()
