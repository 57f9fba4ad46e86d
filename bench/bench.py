"""Speed and memory beside TRL's SFTTrainer: the same model, tokenizer, conversations, precision and global batch.

python bench/bench.py                  # on a GPU where there is one, else on the CPU; bench/README.md has the tables
python bench/bench.py --rounds 1 ours trl_best         # some of the settings, once each

The settings take turns, so that all of them meet the machine's good and bad minutes. Each result is kept in the folder:
the same command goes on where it was stopped. TRL gets an environment of its own (bench/.venv, made at the first run:
newest TRL, this torch). SQuAD comes from the Hub; the tokenizer is trained on it.
"""

import argparse
import importlib.metadata
import importlib.util
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
}
LORA = {"rank": 16, "alpha": 16}  # on all linear layers but the output layer, on both sides
OURS = {"ours": [], "ours_lora": [f"model.lora.{name}={value}" for name, value in LORA.items()]}
# On a GPU: 126 conversations a step are about 23,600 tokens, in 6, 3 or 2 rows.
FLASH = {**SAME_TOKENS, "padding_free": True, "max_length": None, "attn_implementation": "flash_attention_2"}
OURS_ON_GPU, TRL_ON_GPU = {}, {"trl_flash_8192": {**FLASH, "per_device_train_batch_size": 42}}
for row, conversations in ((4096, 21), (8192, 42), (16384, 63)):
    OURS_ON_GPU[f"ours_{row}"] = [f"train.max_tokens_per_micro_batch={row}"]
    OURS_ON_GPU[f"ours_{row}_uncompiled"] = [*OURS_ON_GPU[f"ours_{row}"], "model.compile=false"]
    TRL_ON_GPU[f"trl_liger_{row}"] = {**FLASH, "per_device_train_batch_size": conversations, "use_liger_kernel": True}


def sizes(device: str) -> dict:
    """Of the model, and of the work: on the CPU a model that a laptop trains, on a GPU a Llama of 1B weights."""
    if device == "cpu":
        shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
        shape |= {"num_key_value_heads": 6, "vocab_size": 16384, "max_position_embeddings": 2048}
        return {"shape": shape, "dtype": "float32", "batch": 8, "steps": 16, "micro_batch": 8, "row": 8192}
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 4096}
    return {"shape": shape, "dtype": "bfloat16", "batch": 126, "steps": 20, "micro_batch": 18, "row": 8192}


def main():
    if sys.argv[1:2] == ["worker"]:
        return worker(sys.argv[2], Path(sys.argv[3]))
    import torch

    on_gpu = torch.cuda.is_available()
    settings = [*OURS_ON_GPU, *TRL_ON_GPU] if on_gpu else [*OURS, *TRL]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=settings, help=f"of {', '.join(settings)}; none: all")
    parser.add_argument("--rounds", type=int, default=2, help="how often each setting is run (2)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run later than this")
    parser.add_argument("--trl-python", help="a Python that has TRL; none: bench/.venv is made")
    parser.add_argument("--folder", type=Path, default=ROOT / "results/bench", help="for model, data and results")
    parser.add_argument("--data-only", action="store_true", help="make the data of the GPU's work, without a GPU")
    options = parser.parse_args()
    if unknown := {*options.settings} - {*OURS, *TRL, *OURS_ON_GPU, *TRL_ON_GPU}:
        parser.error(f"there is no setting {', '.join(sorted(unknown))}; there are {', '.join(settings)}")
    began = time.monotonic()
    prepare(options.folder, sizes("cuda" if on_gpu or options.data_only else "cpu"), options.data_only)
    if options.data_only:
        return
    names = ["products", *options.settings]
    trl = [name for name in names if name.startswith("trl")]
    trl_python = options.trl_python or (make_environment() if trl else None)
    files = {name: [options.folder / f"{name}.{turn}.json" for turn in range(options.rounds)] for name in names}
    for turn in range(options.rounds):
        for name in names:
            if not files[name][turn].exists() and time.monotonic() - began < options.seconds:
                print(f"round {turn + 1} of {options.rounds}: {name}", end=" ", flush=True)
                said = run_worker(trl_python if name in trl else sys.executable, name, options.folder)
                print(said, flush=True)
                if said.startswith("{"):
                    files[name][turn].write_text(said)
    results = {name: [json.loads(file.read_text()) for file in files[name] if file.exists()] for name in names}
    print(f"\n{table({name: runs for name, runs in results.items() if runs})}\n\n{machine()}")


def make_environment() -> str:
    """bench/.venv with the newest TRL and this environment's torch and transformers."""
    python = HERE / ".venv/bin/python"
    if not python.exists():
        print("installing TRL into bench/.venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", HERE / ".venv"], check=True)
        same = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in ("torch", "transformers")]
        subprocess.run([python, "-m", "pip", "install", "-q", "trl", "peft", *same], check=True)
    return str(python)


def prepare(folder: Path, work: dict, data_only: bool):
    """model/ (random weights and a tokenizer) and train.jsonl, of as many conversations as the steps need; what is
    there already stays."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "validation.jsonl").exists():
        print(f"making the data in {folder}", flush=True)
        sys.path.insert(0, str(ROOT))
        import data

        rows = data.Squad().formatted_ds["train"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=16384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator((m["content"] for row in rows for m in row["messages"]), trainer)
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder / "model")
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        LlamaConfig(**work["shape"], **ids).save_pretrained(folder / "model")
        chosen = rows.shuffle(seed=0).select(range(work["batch"] * (WARM_UP + work["steps"])))
        for name, part in (("train", chosen), ("validation", rows.select(range(8)))):
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps({"messages": row["messages"]}) + "\n" for row in part)
    if not (data_only or [*folder.glob("model/*.safetensors")]):
        print("making the weights", flush=True)
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "model"))
        model.save_pretrained(folder / "model")


def flash_attn_of_torch(folder: Path):
    """Where flash-attn is not installed: a package of its name that calls the flash attention that torch brings."""
    package, info = folder / "site/flash_attn", folder / "site/flash_attn-2.8.3.dist-info"
    for made in (package, info):
        made.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (info / "top_level.txt").write_text("flash_attn\n")
    (package / "bert_padding.py").write_text("def pad_input():\n    pass\n\n\nunpad_input = pad_input\n")
    (package / "__init__.py").write_text(
        "from torch.nn.attention.varlen import varlen_attn\n\n\n"
        "def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,\n"
        "                           softmax_scale=None, causal=False, **_):\n"
        "    assert causal and not dropout_p\n"
        "    longest = int(max_seqlen_q), int(max_seqlen_k)\n"
        "    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, scale=softmax_scale, "
        "window_size=(-1, 0))\n\n\n"
        "def flash_attn_func(*_, **__):\n    raise NotImplementedError\n\n\n"
        "flash_attn_with_kvcache = flash_attn_func\n"
    )
    sys.path.insert(0, str(folder / "site"))


def run_worker(python: str, name: str, folder: Path) -> str:
    command = [python, str(HERE / "bench.py"), "worker", name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return f"failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout.splitlines()[-1]


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
        report = (train_ours if name.startswith("ours") else train_trl)(name, work, folder, device)
    print(json.dumps({key: round(value, 3) for key, value in report.items()}), flush=True)
    os._exit(0)


def the_data(folder: Path) -> list[str]:
    return [f"data.dataset={folder}/train.jsonl", f"data.args.validation={folder}/validation.jsonl"]


def train_ours(name, work, folder, device) -> dict:
    import shutil

    overrides = sys.argv[4:]
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
    train_sft.checkpoint.CheckpointWriter.save = train_sft.end_run = save_nothing
    shutil.rmtree(folder / "run", ignore_errors=True)
    sys.argv = [
        "train_sft.py", "configs/squad.yaml", f"output_dir={folder}/run", f"model.name={folder}/model",
        *the_data(folder), "train.max_epochs=2", f"model.dtype={work['dtype']}",
        f"train.global_batch_size={work['batch']}",
        f"train.max_tokens_per_micro_batch={work['row']}", f"train.max_steps={WARM_UP + work['steps']}",
        "validation.every=null", "checkpoint.every=null", "logger.tensorboard.enabled=false",
        *(OURS | OURS_ON_GPU)[name], *overrides,
    ]  # fmt: skip
    train_sft.main()
    return meter.report()


def train_trl(name, work, folder, device) -> dict:
    options = {"per_device_train_batch_size": work["micro_batch"], **(TRL | TRL_ON_GPU)[name]}
    kernel = options.pop("attn_implementation", None)  # None: the model's default
    if kernel and importlib.util.find_spec("flash_attn") is None:
        flash_attn_of_torch(folder)
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    meter = Meter(device == "cuda")
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
