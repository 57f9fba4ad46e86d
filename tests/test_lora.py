"""LoRA: what is trained, what is saved, and that a run of it is as any other."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from running import HOME, ROOT, call, metrics, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import checkpoint
import config
import lora
import preview
from model import cast_params, check_model, has_plain_head, load_model, notes_of, open_saved
from templates import special_ids
from tokens import load_tokenizer

PROMPT = "What is the capital of France? The capital of France is Paris."
BFLOAT16 = ["model.dtype=bfloat16", "train.global_batch_size=16"]  # Few CPUs compute fast in it.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model to adapt: random parameters, larger than initial ones, so that all layers matter."""
    folder = tmp_path_factory.mktemp("base") / "base"
    cfg = config.load("configs/quickstart.yaml", []).model
    torch.manual_seed(1)
    model = load_model(cfg, torch.device("cpu"))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(cfg.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(base):
    return [
        "configs/quickstart.yaml", f"model.name={base}", "model.from_scratch=false", "model.lora.rank=4",
        "train.max_steps=4", "train.warmup_steps=0", "train.schedule=constant", "validation.every=2",
        "validation.max_examples=8", "validation.exact_match=0", "validation.samples=0", "checkpoint.every=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    run(*arguments, "model.lora.dropout=0.1", f"output_dir={folder}")
    return folder


def logits(model, tokenizer):
    with torch.no_grad():
        return model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits


def test_a_lora_layer_adds_a_scaled_product_of_two_matrices_that_train():
    linear = torch.nn.Linear(5, 3)
    layer = lora.LoraLinear(linear, rank=2, scale=4.0, dropout=0.0)
    linear.weight.requires_grad_(False)
    x = torch.randn(7, 5)
    assert torch.equal(layer(x), linear(x))  # B is zero at first
    torch.nn.init.normal_(layer.lora_B)
    wanted = linear(x) + 4.0 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), wanted)
    model = torch.nn.Sequential(layer)
    model.adapter_config = {}
    lora.merge_adapter(model)
    torch.testing.assert_close(model(x), wanted)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.lora_A.grad is not None and layer.lora_B.grad is not None


def test_all_linear_is_all_but_the_output_layer_and_names_choose(base):
    def adapted(targets):
        cfg = config.load(None, [f"model.name={base}", "model.lora.rank=2", f"model.lora.targets={targets}"]).model
        return load_model(cfg, torch.device("cpu"))

    model = adapted("all-linear")
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    chosen = {name for name, module in model.named_modules() if isinstance(module, lora.LoraLinear)}
    assert names - chosen == {"lm_head"}
    assert {p for p in model.parameters() if p.requires_grad} == {
        p for name, p in model.named_parameters() if "lora_" in name}  # fmt: skip
    model = adapted("[q_proj, layers.0.mlp.up_proj]")
    chosen = {name for name, module in model.named_modules() if isinstance(module, lora.LoraLinear)}
    layers = range(model.config.num_hidden_layers)
    assert chosen == {f"model.layers.{i}.self_attn.q_proj" for i in layers} | {"model.layers.0.mlp.up_proj"}
    for wrong in ("[qproj]", "[lm_head]", "[embed_tokens]"):
        with pytest.raises(ValueError, match=f"model.lora.targets: .*{wrong[1:-1]}.* down_proj"):
            adapted(wrong)


@pytest.mark.slow
def test_the_saved_adapter_is_the_trained_one_without_its_base(trained, base):
    weights = load_file(trained / "model/adapter_model.safetensors")
    state = checkpoint.read_parameters(trained / "checkpoints/step_00000004")
    assert {f"base_model.model.{name}.weight": value.tolist() for name, value in state.items()} == {
        name: value.tolist() for name, value in weights.items()}  # fmt: skip
    assert all("lora_" in name for name in weights) and any(w.abs().sum() for n, w in weights.items() if "lora_B" in n)
    assert json.loads((trained / "model/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    text = AutoTokenizer.from_pretrained(trained / "model").apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert text.startswith("<|im_start|>user")


@pytest.mark.slow
def test_peft_opens_the_adapter_with_equal_logits(trained):
    peft = pytest.importorskip("peft")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(trained / "model").eval()
    ours = open_saved(trained / "model", torch.float32)
    untrained = open_saved(theirs.peft_config["default"].base_model_name_or_path, torch.float32)
    torch.testing.assert_close(logits(theirs, tokenizer), logits(ours, tokenizer), rtol=1e-5, atol=1e-5)
    assert (logits(untrained, tokenizer) - logits(ours, tokenizer)).abs().max() > 0.01


@pytest.mark.slow
def test_a_merged_adapter_is_a_plain_model_with_equal_logits(trained, arguments, tmp_path):
    checkpoint.main([str(trained / "checkpoints/step_00000004"), str(tmp_path / "merged")])
    shutil.copytree(trained / "model", tmp_path / "above/run/model")
    decoy = tmp_path / "above/checkpoints/step_00000001/model"  # a run in the folder above has nothing to do with it
    shutil.copytree(trained / "model", decoy)
    weights = {name: w * 2 for name, w in load_file(decoy / "adapter_model.safetensors").items()}
    save_file(weights, decoy / "adapter_model.safetensors")
    checkpoint.main([str(tmp_path / "above/run/model"), str(tmp_path / "of_model")])
    cards = [
        (folder / "README.md").read_text() for folder in (trained / "model", tmp_path / "merged", tmp_path / "of_model")
    ]
    assert cards[0] == cards[1] == cards[2] and "| LoRA rank | 4 |" in cards[0]
    run(*arguments, "model.lora.dropout=0.1", "model.lora.merge=true", f"output_dir={tmp_path}/run")
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    wanted = logits(open_saved(trained / "model", torch.float32), tokenizer)
    for folder in (tmp_path / "merged", tmp_path / "of_model", tmp_path / "run/model"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(model, tokenizer), wanted, rtol=1e-5, atol=1e-5)
        assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
        with pytest.raises(SystemExit, match=f"{folder} holds no adapter"):  # neither a checkpoint nor an adapter
            checkpoint.main([str(folder), str(tmp_path / "again")])


@pytest.mark.slow
def test_a_run_with_dropout_repeats_and_resumes_bitwise(trained, arguments, tmp_path):
    arguments = [*arguments, "model.lora.dropout=0.1", f"output_dir={tmp_path}/run"]
    run(*arguments, "train.max_steps=2")
    run(*arguments)
    a, b = (load_file(folder / "model/adapter_model.safetensors") for folder in (tmp_path / "run", trained))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    assert metrics(tmp_path / "run") == metrics(trained)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["parallel.strategy=ddp"], ["parallel.strategy=fsdp"]])
def test_the_losses_do_not_depend_on_the_number_of_ranks(arguments, tmp_path, overrides):
    for name, processes in (("one", 1), ("two", 2)):
        run(*arguments, *overrides, f"output_dir={tmp_path}/{name}", processes=processes)
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert metrics(tmp_path / "two", name) == pytest.approx(metrics(tmp_path / "one", name), rel=1e-5)
    a, b = (load_file(tmp_path / name / "model/adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.strategy=ddp"],
        ["parallel.strategy=fsdp"],
        # Recomputed, all blocks are one graph: less to compile.
        ["model.compile=true", "model.activation_checkpointing=true", "validation.every=null"],
    ],
)
def test_the_base_may_be_bfloat16_and_the_adapter_is_float32(arguments, tmp_path, overrides):
    out = tmp_path / "out"
    processes = 1 if "compile" in overrides[0] else 2
    said = run(*arguments, *BFLOAT16, *overrides, f"output_dir={out}", processes=processes)
    losses = metrics(out)
    assert losses[4] < losses[1], said
    weights = load_file(out / "model/adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    cfg = config.load(str(out / "config.yaml"), []).model
    model = load_model(cfg, torch.device("cpu"))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    "override", ["model.from_scratch=true", "model.lora.targets=linear", "model.lora.alpha=0"],
)  # fmt: skip
def test_a_lora_that_cannot_be_is_refused(override):
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        config.load(None, ["model.lora.rank=4", "model.dtype=float32", override])


def test_an_adapter_that_peft_made_gives_the_logits_that_peft_gave():
    """tests/saved_by_peft: saved by peft, with the logits of the last three tokens that it computed."""
    wanted = json.loads((ROOT / "tests/saved_by_peft/logits.json").read_text())
    adapter = ROOT / "tests/saved_by_peft/adapter"
    model = open_saved(adapter, torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([wanted["input_ids"]])).logits[0, -3:]
    torch.testing.assert_close(logits, torch.tensor(wanted["logits"]), rtol=1e-4, atol=1e-5)
    ours = {f"base_model.model.{name}.weight" for name, p in model.named_parameters() if p.requires_grad}
    assert ours == set(load_file(adapter / "adapter_model.safetensors"))


EMBEDDINGS = ["model.lora.train_embeddings=true", "tokenizer.add_tokens=[<|im_end|>, <think>, </think>]"]


@pytest.fixture(scope="module", params=["tied", "untied"])
def with_embeddings(request, arguments, tmp_path_factory):
    """A run that trains the embeddings and two new tokens beside the adapter, on a bfloat16 base; what it said."""
    folder = tmp_path_factory.mktemp("embeddings")
    arguments = [*arguments, *EMBEDDINGS, *BFLOAT16, f"output_dir={folder}/run"]
    if request.param == "untied":
        untie(arguments, folder)
    return folder / "run", run(*arguments), arguments


def untie(arguments, folder):
    name = next(k for k, argument in enumerate(arguments) if argument.startswith("model.name="))
    base = arguments[name].partition("=")[2]
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0.5)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "base")
    arguments[name] = f"model.name={folder}/base"


@pytest.mark.slow
def test_embeddings_and_added_tokens_train_beside_an_adapter(with_embeddings, base, tmp_path):
    out, said, arguments = with_embeddings
    saved, state = load_file(out / "model/adapter_model.safetensors"), checkpoint.read_parameters(
        out / "checkpoints/step_00000004")  # fmt: skip
    embedding, head = (saved[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    tokenizer, rows = AutoTokenizer.from_pretrained(out / "model"), len(AutoTokenizer.from_pretrained(base))
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>")] == [rows, rows + 1]
    assert embedding.shape == head.shape and len(embedding) == len(tokenizer) == rows + 2
    assert embedding.dtype == torch.float32 and torch.equal(state["model.embed_tokens.weight"], embedding)
    assert torch.equal(embedding, head) == ("lm_head.weight" not in state)
    assert metrics(out)[4] < metrics(out)[1] and "q_proj" in said
    old = AutoModelForCausalLM.from_pretrained(str(config.load(None, arguments[1:]).model.name))
    assert not torch.allclose(embedding[:rows].mean(0), old.get_input_embeddings().weight.mean(0), atol=1e-6)
    ours, text = open_saved(out / "model", torch.float32), "<think>" + PROMPT
    checkpoint.main([str(out / "checkpoints/step_00000004"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert merged.config.vocab_size == rows + 2 and ids[0, 0] == rows
    torch.testing.assert_close(merged(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)
    theirs = pytest.importorskip("peft").AutoPeftModelForCausalLM.from_pretrained(out / "model").eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [EMBEDDINGS, [EMBEDDINGS[1], "model.lora.rank=0"]])
def test_added_tokens_under_fsdp_and_after_a_resume(arguments, tmp_path, overrides):
    for name, strategy, processes in (("one", "auto", 1), ("two", "fsdp", 2)):
        options = [*arguments, *overrides, f"parallel.strategy={strategy}", f"output_dir={tmp_path}/{name}"]
        run(*options, processes=processes)
    run(*options[:-1], f"output_dir={tmp_path}/again", "train.max_steps=2", processes=2)
    run(*options[:-1], f"output_dir={tmp_path}/again", processes=2)
    assert metrics(tmp_path / "again") == metrics(tmp_path / "two")
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert metrics(tmp_path / "two", name) == pytest.approx(metrics(tmp_path / "one", name), rel=1e-5)
    one, two, again = (open_saved(tmp_path / name / "model", "auto").state_dict() for name in ("one", "two", "again"))
    assert all(torch.equal(two[name], again[name]) and torch.allclose(two[name], one[name], atol=1e-5) for name in two)


@pytest.mark.slow
def test_a_run_trains_an_adapter_on(trained, arguments, tmp_path):
    overrides = [f"model.name={trained}", "model.lora.rank=0", f"output_dir={tmp_path}/on"]  # the folder of its run
    said = run(*arguments, *overrides)
    assert f"from {trained}/model: r 4, lora_alpha 16" in said
    assert metrics(tmp_path / "on", "val/loss")[0] == pytest.approx(metrics(trained, "val/loss")[4], rel=1e-6)
    a, b = (json.loads((run / "model/adapter_config.json").read_text()) for run in (trained, tmp_path / "on"))
    assert a == b
    shown = json.loads(call(preview.main, *arguments, *overrides, "--json", home=HOME)[0])
    assert any("holds the run, finished" in note for note in shown["notes"])
    checkpoint.main([str(tmp_path / "on"), str(tmp_path / "merged")])


@pytest.mark.slow
def test_an_adapter_resumes_above_the_base_that_it_was_trained_for(trained, base, arguments, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(base, tmp_path / "base")
    overrides = [*arguments, "model.lora.dropout=0.1", f"output_dir={tmp_path}/run", "train.max_steps=5"]
    changed = load_file(tmp_path / "base/model.safetensors")
    save_file({name: p * 1.001 for name, p in changed.items()}, base / "model.safetensors", {"format": "pt"})
    said = run(*overrides, expect=1)
    assert "step_00000004 adapts another base" in said and max(metrics(tmp_path / "run")) == 4
    shutil.copy(tmp_path / "base/model.safetensors", base)
    run(*overrides)
    run(*overrides, "model.lora.merge=true")  # makes another model/ of the finished run
    assert max(metrics(tmp_path / "run")) == 5 and AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")


def test_an_adapter_is_trained_on_with_its_own_settings():
    folder = ROOT / "tests/saved_by_peft/adapter"
    cfg = config.load(None, [f"model.name={folder}", "model.dtype=float32"])
    model = load_model(cfg.model, torch.device("cpu"))
    wanted, saved = open_saved(folder, torch.float32).state_dict(), model.state_dict()
    assert wanted.keys() == saved.keys() and all(torch.equal(saved[name], p) for name, p in wanted.items())
    assert sum(p.requires_grad for p in model.parameters()) == sum("lora_" in name for name in wanted)
    assert model.adapter_config["r"] == 2 and model.adapter_config["lora_alpha"] == 6
    for override, there in (
        ("lora.rank=3", "2"),
        ("lora.alpha=7", "6"),
        ("lora.dropout=0.5", "0.0"),
        ("lora.targets=[q_proj]", r"\[.*\]"),
        ("lora.train_embeddings=true", "False"),
        ("from_scratch=true", "False"),
    ):
        cfg = config.load(None, [f"model.name={folder}", f"model.{override}"])
        with pytest.raises(ValueError, match=f"model.{override.partition('=')[0]} = .*{folder} has {there}:"):
            load_model(cfg.model, torch.device("cpu"))


def test_an_adapter_whose_output_layer_is_not_its_base_s_is_refused(base, tmp_path):
    cfg = config.load(None, [f"model.name={base}", "model.lora.rank=2", "model.lora.train_embeddings=true"])
    model, path = load_model(cfg.model, torch.device("cpu")), tmp_path / "adapter_model.safetensors"
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    saved, written = lora.peft_parameters(model, trained), tmp_path / "adapter_config.json"
    save_file(saved, path)
    written.write_text(json.dumps(model.adapter_config))
    opened = open_saved(tmp_path, torch.bfloat16)
    assert {p.dtype for name, p in opened.named_parameters() if "lora" not in name} == {torch.bfloat16}
    assert opened.lm_head.weight is opened.model.embed_tokens.weight
    save_file(saved | {"base_model.model.lm_head.weight": trained["model.embed_tokens.weight"] * 2}, path)
    with pytest.raises(ValueError, match=f"{tmp_path} has .* output layer .* tied"):  # as peft trains them
        open_saved(tmp_path, torch.float32)
    written.write_text(json.dumps({**model.adapter_config, "modules_to_save": ["embed_tokens"]}))
    with pytest.raises(ValueError, match="modules_to_save = .* must be .*'lm_head'"):
        open_saved(tmp_path, torch.float32)


def test_what_a_launch_leaves_out_and_what_is_untrained_is_said(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf_config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, output_router_logits=True, **sizes)
    model = MixtralForCausalLM(hf_config)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        model.model.embed_tokens.weight[sorted(special_ids(tokenizer))] = 1e-5
    model.save_pretrained(tmp_path)
    labels = torch.tensor([-100, end])
    examples = type("Examples", (), {"first": lambda *_: [0], "__getitem__": lambda *_: (labels, labels)})()

    def said(*overrides):
        cfg = config.load(None, [f"model.name={tmp_path}", *overrides])
        model = load_model(cfg.model, torch.device("cpu"))
        assert has_plain_head(model)  # in bfloat16, too, and above float32 embeddings
        return notes_of(model, cfg, tokenizer, examples)

    (router,) = said()
    assert "router_aux_loss_coef" in router
    left_out, again, untrained = said("model.lora.rank=2")
    assert again == router and left_out.endswith(": embed_tokens, experts, gate, lm_head") and "r 2" in left_out
    assert untrained.startswith("<|im_end|>:") and "model.lora.train_embeddings=true" in untrained
    left_out, again = said("model.lora.rank=2", "model.lora.train_embeddings=true")
    assert again == router and left_out.endswith(": experts, gate")


def test_random_parameters_in_place_of_a_folders_trained_ones_are_noted(base):
    for from_scratch in (True, False):
        cfg = config.load(None, [f"model.name={base}", "model.dtype=float32", f"model.from_scratch={from_scratch}"])
        notes = notes_of(load_model(cfg.model, torch.device("cpu")), cfg, load_tokenizer(cfg), None)
        assert any(f"{base} holds trained parameters" in note for note in notes) == from_scratch


def test_what_is_written_of_an_adapter_is_what_peft_writes(base):
    theirs = json.loads((ROOT / "tests/saved_by_peft/adapter/adapter_config.json").read_text())
    overrides = ["model.lora.rank=2", "model.lora.alpha=6", "model.lora.targets=[v_proj, q_proj, down_proj]"]
    cfg = config.load(None, [f"model.name={base}", *overrides]).model
    ours = load_model(cfg, torch.device("cpu")).adapter_config
    assert {**theirs, "base_model_name_or_path": str(base)} == {**theirs, **ours}


@pytest.mark.parametrize(
    "changed", [{"alpha_pattern": {"q_proj": 160}}, {"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"},
                {"peft_type": "IA3"}, {"target_modules": "all-linear"}, {"rank_pattern": {"q_proj": 1}}],
)  # fmt: skip
def test_an_adapter_of_another_kind_is_refused(tmp_path, changed):
    shutil.copytree(ROOT / "tests/saved_by_peft/adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ValueError, match=f"adapter_config.json: only plain LoRA .*{[*changed][0]}"):
        open_saved(tmp_path / "adapter", torch.float32)


def test_an_adapter_whose_base_is_gone_names_it(tmp_path):
    shutil.copytree(ROOT / "tests/saved_by_peft/adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace("tests/saved_by_peft/base", "./nowhere"))
    with pytest.raises((OSError, ValueError), match="nowhere"):
        open_saved(tmp_path / "adapter", torch.float32)


def test_an_adapter_whose_parameters_are_of_other_layers_is_refused(tmp_path):
    shutil.copytree(ROOT / "tests/saved_by_peft/adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file(dict([*load_file(path).items()][1:]), path)
    with pytest.raises(ValueError, match="adapter does not hold the parameters"):
        open_saved(tmp_path / "adapter", torch.float32)


def test_added_tokens_get_the_mean_row_where_there_is_none(base):
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    rows, mean = len(old), old.mean(0)

    def load(*overrides):
        cfg = config.load(None, [f"model.name={base}", "tokenizer.add_tokens=[<|im_end|>, <new>]", *overrides])
        tokenizer = load_tokenizer(cfg)
        assert tokenizer.encode("Hi<new>")[-1] == rows == len(tokenizer) - 1 and rows in special_ids(tokenizer)
        model = load_model(cfg.model, torch.device("cpu"), rows=len(tokenizer))
        check_model(model, cfg, 1, tokenizer, 10)
        return model

    for model in (load("model.dtype=float32"), load("model.lora.rank=2", "model.lora.train_embeddings=true")):
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert layer.weight.shape == (rows + 1, old.shape[1]) and layer.weight.dtype == torch.float32
            torch.testing.assert_close(layer.weight[:rows], old, rtol=0.01, atol=0)
            torch.testing.assert_close(layer.weight[rows], mean, rtol=0.01, atol=1e-4)
        assert model.config.vocab_size == rows + 1
    with pytest.raises(ValueError, match="tokenizer.add_tokens needs model.lora.train_embeddings=true"):
        load("model.lora.rank=2")
    padded = load_model(config.load(None, [f"model.name={base}"]).model, torch.device("cpu"), rows=rows - 1)
    assert len(padded.get_input_embeddings().weight) == rows == padded.config.vocab_size


def test_the_revision_of_a_base_is_its_commit_on_the_hub(base, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--base/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--some--base/refs").mkdir()
    (tmp_path / "models--some--base/refs/main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    model = open_saved(base, torch.float32)

    def revision(*overrides):
        cfg = config.load(None, ["model.lora.rank=2", *overrides]).model
        return lora.adapter_config(model, cfg)["revision"]

    assert revision("model.name=some/base") == "0123abc"
    assert revision("model.name=some/base", "model.revision=old") == "old"
    assert revision(f"model.name={base}") is revision(f"model.name={base}", "model.revision=old") is None


def test_the_revision_of_a_model_may_not_change_but_that_of_a_base_is_checked_by_its_commit():
    def differing(rank):
        cfgs = [config.load(None, [f"model.revision={name}", f"model.lora.rank={rank}"]) for name in ("x1", "x2")]
        return checkpoint.differing_keys(*map(config.to_dict, cfgs))

    assert differing(0) == ["model.revision ('x1' there, 'x2' now)"] and differing(2) == []


@pytest.mark.slow
def test_a_checkpoint_s_adapter_is_merged_from_its_state(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    step = tmp_path / "run/checkpoints/step_00000004"
    (step / "model/adapter_model.safetensors").unlink()
    checkpoint.main([str(step), str(tmp_path / "merged")])
    checkpoint.main([str(trained / "model"), str(tmp_path / "wanted")])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "wanted"))
    assert all(torch.equal(a[name], b[name]) for name in b)


# ---- four and eight bits ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bitsandbytes(tmp_path_factory):
    """The package, installed for these tests where it is not there."""
    if importlib.util.find_spec("bitsandbytes") is None:
        site = str(tmp_path_factory.mktemp("site"))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--no-deps", "--target", site]
        if subprocess.run([*pip, "bitsandbytes"], capture_output=True).returncode:
            pytest.skip("bitsandbytes is not installed, and cannot be")
        sys.path.append(site)
    return importlib.import_module("bitsandbytes")


@pytest.mark.slow
def test_a_base_in_four_bits_computes_with_its_rounded_weights(base, bitsandbytes):
    functional = bitsandbytes.functional
    cfg = config.load(None, [f"model.name={base}", "model.lora.rank=2", "model.lora.base=nf4", "model.dtype=float32",
                             "model.lora.targets=[q_proj,down_proj]"]).model  # fmt: skip
    models, results = [load_model(cfg, torch.device("cpu")) for _ in range(2)], []
    for p in [p for model in models for p in model.parameters()]:
        p.data.mul_(0.5)  # Its attention is so sharp that rounding shows in the gradients.
    lora.quantize(models[0], torch.device("cpu"))
    for (name, layer), (_, packed) in zip(*(model.named_modules() for model in models[::-1]), strict=True):
        if name.endswith("_proj"):
            assert packed.weight.dtype == torch.uint8 and packed.weight.numel() == layer.weight.numel() / 2
            layer.weight.data = functional.dequantize_4bit(packed.weight, packed.product.keywords["quant_state"])
    assert sum(map(lora.count, models[0].parameters())) == sum(p.numel() for p in models[1].parameters())
    for model in models:
        torch.manual_seed(0)
        for layer in model.modules():
            if isinstance(layer, lora.LoraLinear):
                torch.nn.init.normal_(layer.lora_A, std=0.1), torch.nn.init.normal_(layer.lora_B, std=0.1)
        with cast_params(model.float() if model is models[1] else model, torch.float32):
            loss = model(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])))
    (loss, gradient), (wanted_loss, wanted) = results
    assert loss == pytest.approx(wanted_loss, rel=1e-3)
    assert (gradient - wanted).norm() <= 0.03 * wanted.norm()  # bitsandbytes rounds some of the weights to bfloat16


@pytest.mark.slow
def test_a_run_in_four_and_eight_bits_resumes_to_the_last_bit_and_merges_into_the_plain_base(
    arguments, base, bitsandbytes, tmp_path
):
    bits = [*arguments, "model.lora.rank=64", "model.lora.base=nf4", "train.optimizer=adamw_8bit"]
    run(*bits, f"output_dir={tmp_path}/whole", processes=2)
    run(*bits, f"output_dir={tmp_path}/out", processes=2, fault="0:4:raise", expect=1)
    run(*bits, f"output_dir={tmp_path}/out", processes=2)
    whole, resumed = (load_file(tmp_path / name / "model/adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(resumed[name], p) for name, p in whole.items())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "out")
    files = (tmp_path / "out/checkpoints/step_00000004/state").glob("*.safetensors")
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert any(tensor.dtype == torch.uint8 for name, tensor in state.items() if name.endswith(".state1"))
    checkpoint.make_model_folder(tmp_path / "out/model", tmp_path / "merged", merge=True)
    merged, plain = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "merged", base))
    name = "model.layers.0.self_attn.q_proj"
    product = resumed[f"base_model.model.{name}.lora_B.weight"] @ resumed[f"base_model.model.{name}.lora_A.weight"]
    wanted = plain.get_submodule(name).weight + 0.25 * product
    torch.testing.assert_close(merged.get_submodule(name).weight, wanted, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "overrides, said",
    [(["train.optimizer=adamw_8bit", "parallel.strategy=fsdp"], "cannot be sharded"),
     (["model.lora.base=nf4", "model.lora.rank=4", "parallel.strategy=fsdp"], "cannot be sharded")],
)  # fmt: skip
def test_what_cannot_be_sharded_is_refused(monkeypatch, overrides, said):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(ValueError, match=said):
        config.load(None, overrides)


def test_eight_bits_without_bitsandbytes_name_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        config.load(None, ["train.optimizer=adamw_8bit"])
