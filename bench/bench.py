"""Speed and memory beside TRL's SFTTrainer: the same model, tokenizer, conversations, precision and global batch.

python bench/bench.py                  # on a GPU where there is one, else on the CPU; bench/README.md has the tables
python bench/bench.py --rounds 1 ours trl_best         # some of the settings, once each

The settings take turns, so that all of them meet the machine's good and bad minutes. TRL gets an environment of its own
(bench/.venv, made at the first run: newest TRL, this torch). SQuAD comes from the Hub; the tokenizer is trained on it.
"""

import argparse
import importlib.metadata
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
WARM_UP = 3  # steps that are not timed
CHAT_TEMPLATE = (  # with the tags that TRL's assistant_only_loss needs
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- else -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
SAME_TOKENS = {"assistant_only_loss": True, "gradient_checkpointing": False}
TRL = {  # what each setting changes in SFTConfig
    "trl_default": {},
    "trl_best": {**SAME_TOKENS, "train_sampling_strategy": "group_by_length"},
    "trl_best_micro": {**SAME_TOKENS, "per_device_train_batch_size": 1},
    "trl_packing": {**SAME_TOKENS, "packing": True},
    "trl_lora": {**SAME_TOKENS, "per_device_train_batch_size": 1},
    "trl_flash": {
        **SAME_TOKENS, "padding_free": True, "max_length": None, "per_device_train_batch_size": 32,
        "attn_implementation": "flash_attention_2",
    },
}  # fmt: skip
TRL["trl_liger"] = {**TRL["trl_flash"], "use_liger_kernel": True}
TRL["trl_long"] = {**TRL["trl_liger"], "per_device_train_batch_size": 64}
LORA = {"rank": 16, "alpha": 16}  # on all linear layers but the output layer, on both sides
OURS = {"ours": [], "ours_lora": [f"model.lora.{name}={value}" for name, value in LORA.items()]}
OURS["ours_compile"] = ["model.compile=true"]
OURS["ours_long"] = [*OURS["ours_compile"], "train.max_tokens_per_micro_batch=16384"]
ON_GPU = ("ours_compile", "ours_long", "trl_flash", "trl_liger", "trl_long")  # TRL's need flash-attn, and liger-kernel


def sizes(device: str) -> dict:
    """Of the model, and of the work: on the CPU a model that a laptop trains, on a GPU a Llama of 1B weights."""
    if device == "cpu":
        shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
        shape |= {"num_key_value_heads": 6, "vocab_size": 16384, "max_position_embeddings": 2048}
        return {"shape": shape, "dtype": "float32", "batch": 8, "steps": 16, "micro_batch": 8, "row": 8192}
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 4096}
    return {"shape": shape, "dtype": "bfloat16", "batch": 128, "steps": 20, "micro_batch": 16, "row": 4096}


def main():
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2], Path(sys.argv[3]))
    import torch

    settings = [name for name in [*OURS, *TRL] if torch.cuda.is_available() or name not in ON_GPU]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=settings, help=f"of {', '.join(settings)}; none: all")
    parser.add_argument("--rounds", type=int, default=2, help="how often each setting is run (2)")
    parser.add_argument("--trl-python", help="a Python that has TRL; none: bench/.venv is made")
    parser.add_argument("--folder", type=Path, default=ROOT / "results/bench", help="for model and data")
    options = parser.parse_args()
    if unknown := {*options.settings} - {*settings}:
        parser.error(f"there is no setting {', '.join(sorted(unknown))}; there are {', '.join(settings)}")
    trl_python = options.trl_python or (make_environment() if {*options.settings} & {*TRL} else None)
    print(f"making model and data in {options.folder}", flush=True)
    prepare(options.folder)
    results = {name: [] for name in ["products", *options.settings]}
    for turn in range(options.rounds):
        for name in results:
            print(f"round {turn + 1} of {options.rounds}: {name}", end=" ", flush=True)
            results[name].append(run_worker(sys.executable if name not in TRL else trl_python, name, options.folder))
            print(json.dumps(results[name][-1]), flush=True)
    print(f"\n{table(results)}\n\n{machine()}")
    (options.folder / "results.json").write_text(json.dumps(results, indent=1))


def make_environment() -> str:
    """bench/.venv with the newest TRL and this environment's torch and transformers."""
    python = HERE / ".venv/bin/python"
    if not python.exists():
        print("installing TRL into bench/.venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", HERE / ".venv"], check=True)
        same = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in ("torch", "transformers")]
        subprocess.run([python, "-m", "pip", "install", "-q", "trl", "peft", *same], check=True)
    return str(python)


def prepare(folder: Path):
    """model/ (random weights and a tokenizer) and train.jsonl, of as many conversations as the steps need."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sys.path.insert(0, str(ROOT))
    import data

    work = sizes("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    rows = data.Squad().formatted_ds["train"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=16384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((m["content"] for row in rows for m in row["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**work["shape"], **ids)).save_pretrained(folder / "model")
    chosen = rows.shuffle(seed=0).select(range(work["batch"] * (WARM_UP + work["steps"])))
    for name, part in (("train", chosen), ("validation", rows.select(range(8)))):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": row["messages"]}) + "\n" for row in part)


def run_worker(python: str, name: str, folder: Path) -> dict:
    command = [python, str(HERE / "bench.py"), "worker", name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict) -> str:
    """Medians over the rounds, as Markdown."""
    middle = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    lines = [
        "| setting | tokens/s | of them supervised/s | share of the products' speed | TFLOP/s | peak memory "
        "| without imports |",
        "|---|---|---|---|---|---|---|",
    ]
    products = middle["products"]
    for name, m in middle.items():
        share = m["tokens_per_second"] / products["tokens_per_second"]
        rate = m["tokens_per_second"] * products["operations"] / products["tokens"] / 1e12  # of the products alone
        memory = f"{m['peak']:.2f} GiB | {m['peak'] - m['imports']:.2f} GiB" if "peak" in m else "|"
        supervised = f"{m['supervised_per_second']:,.0f}" if "supervised_per_second" in m else ""
        lines.append(f"| {name} | {m['tokens_per_second']:,.0f} | {supervised} | {share:.0%} | {rate:.3g} | {memory} |")
    return "\n".join(lines)


def machine() -> str:
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"torch {torch.__version__}, transformers {importlib.metadata.version('transformers')}, {card}"


# ---- one setting, in a process of its own ----------------------------------------------------------------------------


class Meter:
    """Times optimizer steps, whoever makes them, and counts the tokens that the model saw and was trained on."""

    def __init__(self, cuda: bool):
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.torch, self.cuda = torch, cuda
        self.times, self.tokens, self.supervised, self.imports = [], [0], [0], self.memory()
        register_optimizer_step_post_hook(self.after_step)

    def memory(self) -> float:
        """Peak so far in GiB: of the GPU, else of the process."""
        peak = (
            self.torch.cuda.max_memory_allocated()
            if self.cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return peak / 2**30

    def count(self, tokens, supervised):
        self.tokens[-1] += tokens  # (a tensor stays where it is: the device is not waited for)
        self.supervised[-1] += supervised

    def after_step(self, *_):
        if self.cuda:  # noted by the GPU when it gets there: nobody waits for it
            self.times.append(self.torch.cuda.Event(enable_timing=True))
            self.times[-1].record()
        else:
            self.times.append(time.perf_counter())
        self.tokens.append(0)
        self.supervised.append(0)
        self.peak = self.memory()

    def report(self) -> dict:
        first, last = self.times[WARM_UP - 1], self.times[-1]
        if self.cuda:
            self.torch.cuda.synchronize()
        seconds = first.elapsed_time(last) / 1000 if self.cuda else last - first
        timed = slice(WARM_UP, len(self.times))
        return {
            "tokens_per_second": int(sum(self.tokens[timed])) / seconds,
            "supervised_per_second": int(sum(self.supervised[timed])) / seconds,
            "tokens": int(sum(self.tokens[timed])),
            "seconds": seconds,
            "peak": self.peak,
            "imports": self.imports,
        }


def worker(name: str, folder: Path):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = sizes(device)
    if name == "products":
        report = products(work, folder, device)
    else:
        report = (train_ours if name in OURS else train_trl)(name, work, folder, device)
    print(json.dumps({key: round(value, 3) for key, value in report.items()}), flush=True)
    os._exit(0)


def the_data(folder: Path) -> list[str]:
    return [f"data.dataset={folder}/train.jsonl", f"data.args.validation={folder}/validation.jsonl"]


def train_ours(name, work, folder, device) -> dict:
    import shutil

    sys.path.insert(0, str(ROOT))
    import train_sft

    meter = Meter(device == "cuda")
    collate = train_sft.packing.collate

    def counting(examples, row, *arguments, **options):
        if row:
            meter.count(examples.lengths[row].sum(), examples.trained_tokens[row].sum())
        return collate(examples, row, *arguments, **options)

    def save_nothing(*_):  # nor does TRL here
        pass

    train_sft.packing.collate = counting
    train_sft.checkpoint.CheckpointWriter.save = train_sft.checkpoint.make_model_folder = save_nothing
    shutil.rmtree(folder / "run", ignore_errors=True)
    sys.argv = [
        "train_sft.py", "configs/squad.yaml", f"output_dir={folder}/run", f"model.name={folder}/model",
        *the_data(folder), "train.max_epochs=2", f"model.dtype={work['dtype']}",
        f"train.global_batch_size={work['batch']}",
        f"train.max_tokens_per_micro_batch={work['row']}", f"train.max_steps={WARM_UP + work['steps']}",
        "validation.every=null", "checkpoint.every=null", "logger.tensorboard.enabled=false", *OURS[name],
    ]  # fmt: skip
    train_sft.main()
    return meter.report()


def train_trl(name, work, folder, device) -> dict:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    meter = Meter(device == "cuda")
    options = {"per_device_train_batch_size": work["micro_batch"], **TRL[name]}
    kernel = options.pop("attn_implementation", None)  # None: the model's default
    if options.get("packing"):  # a packed row of 1,024 tokens holds about five conversations
        rows = math.ceil(work["batch"] / 5)
        options["per_device_train_batch_size"] = min(rows, 4)
        options["gradient_accumulation_steps"] = math.ceil(rows / 4)
    else:
        options["gradient_accumulation_steps"] = work["batch"] // options["per_device_train_batch_size"]
    config = SFTConfig(
        output_dir=str(folder / "trl"), report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        bf16=work["dtype"] == "bfloat16", max_steps=WARM_UP + work["steps"], **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32", attn_implementation=kernel)

    def count(module, arguments, inputs):
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        meter.count(tokens, (labels[..., 1:] != -100).sum())

    model.register_forward_pre_hook(count, with_kwargs=True)
    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    adapter = None
    if name == "trl_lora":
        from peft import LoraConfig

        adapter = LoraConfig(
            r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    return meter.report()


def products(work, folder, device) -> dict:
    """The matrix products alone of the same steps, by plain torch.mm: each linear layer's one forward and two backward
    at the step's tokens, the output layer's at the supervised ones. No attention, nothing between the layers."""
    import torch

    sys.path.insert(0, str(ROOT))
    import config
    import data
    import packing
    import tokens

    shape, dtype = work["shape"], getattr(torch, work["dtype"])
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head_dim = hidden // shape["num_attention_heads"]
    kv = head_dim * shape["num_key_value_heads"]
    linear = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    linear += [(hidden, inner), (hidden, inner), (inner, hidden)]
    cfg = config.load(None, [f"model.name={folder}/model", *the_data(folder)])
    prepared = tokens.tokenize_splits(cfg, tokens.load_tokenizer(cfg), data.load_mixture(cfg))
    examples = tokens.open_split(prepared, "train", cfg.data)

    def three_products(rows, into, out):
        x, w, dy = (torch.randn(*size, device=device, dtype=dtype) for size in ((rows, into), (into, out), (rows, out)))
        began = now()
        for _ in range(3 if device == "cpu" else 30):
            torch.mm(x, w), torch.mm(dy, w.t()), torch.mm(x.t(), dy)
        return (now() - began) / (3 if device == "cpu" else 30)

    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    tokens, seconds, operations = 0, 0.0, 0
    in_blocks = 6 * shape["num_hidden_layers"] * sum(into * out for into, out in linear)  # for a token: three products
    for step in range(1, WARM_UP + 5):
        chosen = packing.step_examples(len(examples), step, cfg.seed, work["batch"])
        for row in packing.pack(chosen, examples.lengths, 1, work["row"])[0]:
            count, supervised = int(examples.lengths[row].sum()), int(examples.trained_tokens[row].sum())
            needed = shape["num_hidden_layers"] * sum(three_products(count, *size) for size in linear)
            needed += three_products(supervised, hidden, shape["vocab_size"])
            if step > WARM_UP:
                tokens, seconds = tokens + count, seconds + needed
                operations += in_blocks * count + 6 * hidden * shape["vocab_size"] * supervised
    return {
        "tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds, "operations": operations,
    }  # fmt: skip


if __name__ == "__main__":
    main()
