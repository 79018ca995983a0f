"Every recipe that comes with the project: it loads, its names resolve, its plan can be drawn up; and the paper's models are taken and tuned, on stand-ins."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, GPTBigCodeConfig, LlamaConfig, PreTrainedTokenizerFast

from slm_study.finetuning.adapters import TARGETS
from slm_study.finetuning.pretrain import train_tokenizer
from slm_study.finetuning.qlora import finetune
from slm_study.models import from_hub, load_checkpoint, save_checkpoint
from slm_study.recipes import MODELS, TECHNIQUES, StudyError, load_recipe, recipe_names

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_the_promised_recipes_are_there():
    assert {"smoke", "pocket", "shapes", "paper"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_loads_and_its_names_resolve(name):
    recipe = load_recipe(name)
    assert recipe.about and set(recipe.models) <= set(MODELS) and set(recipe.techniques) <= set(TECHNIQUES)
    for model in recipe.models:
        source = getattr(recipe.bases, model)
        assert source in ("train", "random") or source.startswith("hub:") or (Path(source)/"config.json").exists()
        assert recipe.qlora.of(model).batch_size % recipe.qlora.of(model).accumulate == 0


@pytest.mark.parametrize("name", [n for n in recipe_names() if n != "bases"]) # bases is made by `make bases` alone
def test_recipe_has_a_plan(name, tmp_path):
    done = subprocess.run([BIN/"slm-study", "run", "--recipe", name, "--dry-run", "--out", tmp_path/"out"], capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stdout[-1000:]+done.stderr[-1000:]
    recipe, jobs = load_recipe(name), dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2 and line.split()[1].isdigit())
    assert int(jobs["evaluate"]) == len(recipe.models)*len(recipe.techniques)*len(recipe.seeds) and int(jobs["results"]) == 1


def test_shapes_measures_only():
    recipe = load_recipe("shapes")
    assert set(recipe.bases.model_dump().values()) == {"random"} and not recipe.evaluation.quality
    assert recipe.qlora.tokens == recipe.pruning.heal_tokens == recipe.weight_sharing.heal_tokens == recipe.combined.heal_tokens == 0
    assert "random weights" in recipe.about


def test_paper_has_the_published_settings():
    recipe = load_recipe("paper")
    llama, coder = (recipe.qlora.of(m) for m in MODELS)
    assert recipe.bases.starcoder == "hub:bigcode/tiny_starcoder_py" and recipe.bases.tinyllama == "hub:TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    assert set(recipe.data.sources.model_dump().values()) == {"hub"} and recipe.data.published_prompts and recipe.qlora.sources
    assert (llama.r, llama.alpha, llama.dropout, llama.epochs, llama.max_length, llama.lr, llama.compute, llama.double_quant) == (8, 32, .05, 3, 512, 2e-4, "fp16", False)
    assert (llama.batch_size//llama.accumulate, llama.accumulate, llama.warmup_ratio, llama.loss_on) == (4, 8, .1, "padding")
    assert (coder.r, coder.alpha, coder.dropout, coder.epochs, coder.max_length, coder.lr, coder.compute, coder.double_quant, coder.grad_norm) == (8, 32, .05, 3, 1024, 3e-4, "bf16", True, .3)
    assert (coder.batch_size//coder.accumulate, coder.accumulate) == (8, 4)
    assert TARGETS["llama", "published"] == ("q_proj", "v_proj") and TARGETS["gpt_bigcode", "published"] == ("c_attn", "c_proj", "c_fc")
    assert recipe.pruning_masked.ratio == recipe.pruning.ratio == .15


@pytest.mark.parametrize("given,says", [("hub:TinyLlama", "no such file; write 'train' or 'random' or 'hub:ID'"), ("hub:a/b@", "no such file"), ("rndom", "bases: rndom: no such file")])
def test_a_base_that_is_none_says_so(tmp_path, given, says):
    (tmp_path/"r.yaml").write_text(json.dumps(dict(bases=dict(starcoder=given))))
    with pytest.raises(StudyError) as e: load_recipe(tmp_path/"r.yaml")
    assert says in str(e.value) and "\n" not in str(e.value)


# the paper's models on stand-ins: a cache of the hub with both architectures in small

TEXTS = ["request: mean of price where volume is above 10\n", "import pandas as pd\nprint(df['price'].mean())\n", "# a comment\nfor i in range(10): print(i)\n"]*4
TINY = dict(tinyllama=(LlamaConfig, dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)),
            starcoder=(GPTBigCodeConfig, dict(n_embd=64, n_layer=4, n_head=4, n_inner=128, n_positions=8192, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)))


def sentencepiece_like():
    "As TinyLlama's: BPE with byte fallback, spaces as a sign of their own, bos 1, eos 2, no pad."
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *(chr(c) for c in range(33, 127))]
    t = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def starcoder_like():
    "As tiny_starcoder_py's: byte-level BPE, single digits, one token that begins and ends, no pad."
    t = train_tokenizer(TEXTS, 400)
    return PreTrainedTokenizerFast(tokenizer_object=t.backend_tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A folder as huggingface_hub's cache, each model under one revision."
    cache = tmp_path_factory.mktemp("hub")
    for i, model in enumerate(MODELS):
        source, (config, shape) = getattr(load_recipe("paper").bases, model), TINY[model]
        tokenizer = sentencepiece_like() if model == "tinyllama" else starcoder_like()
        entry, revision = cache/("models--" + source.removeprefix("hub:").replace("/", "--")), f"{i+1:040x}"
        (entry/"refs").mkdir(parents=True); (entry/"refs"/"main").write_text(revision)
        torch.manual_seed(i)
        save_checkpoint(AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **shape)), tokenizer, entry/"snapshots"/revision)
    return cache


@pytest.fixture
def offline(hub, monkeypatch):
    "The hub is that folder, and nothing else."
    import huggingface_hub
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **kw: real(*a, **kw, cache_dir=hub, local_files_only=True))


@pytest.mark.parametrize("model", MODELS)
def test_a_published_model_is_taken_and_tuned_with_the_published_settings(offline, model, tmp_path):
    torch.set_num_threads(1)
    recipe = load_recipe("paper")
    facts = from_hub(getattr(recipe.bases, model), tmp_path/"base")
    net, tokenizer = load_checkpoint(tmp_path/"base")
    assert facts["revision"] == f"{MODELS.index(model)+1:040x}" and json.loads((tmp_path/"base"/"slm_study.json").read_text()) == facts
    assert tokenizer.pad_token_id is None and net.config.eos_token_id == tokenizer.eos_token_id == dict(tinyllama=2, starcoder=0)[model]
    rows = [dict(prompt=f"mean of C{i}\n", completion=f"print(df[C{i}].mean())") for i in range(4)] + [dict(prompt="", completion=TEXTS[0]*40)] # of a source: cut at the limit
    short = {m: {**given, "max_length": 96, "batch_size": 4, "accumulate": 2} for m, given in recipe.qlora.only.items()}
    log = finetune(tmp_path/"base", rows, recipe.qlora.model_copy(update=dict(only=short, epochs=2)), tmp_path/"tuned", model, validation=rows)
    made = json.loads((tmp_path/"tuned"/"slm_study.json").read_text())
    assert [e for e in log if "loss" in e] and made["settings"]["targets"] == "published" and made["settings"]["loss_on"] == "padding"
    tuned, before = load_checkpoint(tmp_path/"tuned")[0].state_dict(), net.state_dict()
    assert {n.split(".")[-2] for n, p in tuned.items() if not torch.equal(p, before[n])} == set(TARGETS[net.config.model_type, "published"])


def test_a_model_that_the_hub_does_not_give(offline, tmp_path):
    with pytest.raises(StudyError) as e: from_hub("hub:bigcode/none", tmp_path/"base")
    assert "bases: hub:bigcode/none cannot be had" in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"base").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "", ".hidden"])
def test_a_recipe_is_no_path(tmp_path, name):
    "Its name becomes a folder below runs and figures."
    (tmp_path/"mine.yaml").write_text(f"name: {name!r}\n")
    with pytest.raises(StudyError, match="name") as e: load_recipe(str(tmp_path/"mine.yaml"))
    assert "\n" not in str(e.value)
