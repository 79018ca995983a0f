"A checkpoint survives the trip into a GGUF file: same tokens, same logits, same text; and `slm-study export` writes it."
import json
import numpy as np
import pytest, torch
from transformers import AutoModelForCausalLM

from slm_study.assistant.cli import main
from slm_study.compression.early_exit import decode
from slm_study.compression.pruning import prune_ffn
from slm_study.finetuning.pretrain import train_tokenizer
from slm_study.models import config_for, save_checkpoint
from slm_study.recipes import Run, Size, StudyError
from slm_study.runtime.gguf import TYPES, export, files
from slm_study.runtime.llama_cpp import Llama, detokenize, library, tokenize, write, write_batch

TEXTS = ["import pandas as pd\nprint(df[C0].mean())", "  \t x = 1234.5\r\n\r\n", "é日本🙂 naïve", "<|endoftext|>C1 <|pad|>N0", "a" * 300, "'''\"\\n\"'''", "C0,C1;N0\n"]

@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(["import pandas as pd\nprint(df['amount'].mean() + 123)\nfor x in range(9): y = x**2\n"]*50, 450, ["C0", "C1", "N0"])

def net(kind, tokenizer, tied=None, hidden=64, heads=4, kv_heads=2, layers=3, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_for(kind, Size(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=128, positions=192), len(tokenizer), tied)).eval()
    for p in model.parameters(): p.data = torch.randn_like(p)*.1 if p.ndim > 1 else p.data + torch.randn_like(p)*.1
    return model

SHAPES = [("tinyllama", {}), ("tinyllama", dict(tied=True)), ("tinyllama", dict(heads=8, kv_heads=1)), ("tinyllama", dict(heads=2, kv_heads=2, hidden=96)), ("starcoder", {}), ("starcoder", dict(tied=False)), ("starcoder", dict(heads=2, hidden=96))]

@pytest.mark.parametrize("ratio", [0, .25])
@pytest.mark.parametrize("kind, shape", SHAPES)
def test_logits_agree(tokenizer, tmp_path, kind, shape, ratio):
    model = net(kind, tokenizer, **shape)
    if ratio: model = prune_ffn(model, ratio)
    path = export((model, tokenizer), tmp_path/"m.gguf", "f16")
    ids = np.random.default_rng(1).integers(2, len(tokenizer), 60).tolist()
    with Llama(path) as m:
        m.feed([(t, i, 0, True) for i, t in enumerate(ids)])
        ours = np.stack([m.logits(i) for i in range(len(ids))])
    theirs = model(torch.tensor([ids])).logits[0].detach().numpy()
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] >= .9999

@pytest.mark.parametrize("kind", ["tinyllama", "starcoder"])
def test_greedy_text_agrees(tokenizer, tmp_path, kind):
    "Random weights leave logits close together, the hard case: where the texts part, the two candidates must be as good as equal."
    model, rng = net(kind, tokenizer), np.random.default_rng(2)
    prompts = [rng.integers(2, len(tokenizer), rng.integers(3, 50)).tolist() for _ in range(100)]
    with Llama(export((model, tokenizer), tmp_path/"m.gguf", "f16")) as m: ours = [write(m, p, 10).tokens for p in prompts]
    theirs = [decode(model, torch.tensor([p]), max_new_tokens=10, eos_token_id=tokenizer.eos_token_id).tokens[0] for p in prompts]
    differ = [(p, a, b) for p, a, b in zip(prompts, ours, theirs) if a != b]
    assert len(differ) <= 10
    for p, a, b in differ:
        at = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
        z = model(torch.tensor([p + a[:at]])).logits[0, -1]
        assert (z[b[at]] - z[a[at]]) < .01*z.std()

def sentencepiece(all_halves=True):
    "A tokenizer as TinyLlama's: BPE over pieces with a mark for the space, bytes to fall back on, each token mergeable from any of its halves."
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast
    special, raw = ["<unk>", "<s>", "</s>"], [f"<0x{i:02X}>" for i in range(256)]
    form = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    learn = Tokenizer(models.BPE()); learn.normalizer = form
    learn.train_from_iterator(["import pandas as pd", "print(df['amount'].mean() + 123)", "for x in range(9): y = x**2", "the mean of the amounts in the range", "aaaa aaa aa"]*9, trainers.BpeTrainer(vocab_size=180, show_progress=False))
    pieces = json.loads(learn.to_str())["model"]
    vocab = {t: i for i, t in enumerate([*special, *raw, *sorted(pieces["vocab"], key=pieces["vocab"].get)])}
    merges = [(t[:i], t[i:]) for t in vocab if t not in special + raw for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    if not all_halves: merges = [tuple(m) for m in pieces["merges"]]
    t = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)); t.normalizer = form
    t.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in special])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

def test_a_sentencepiece_tokenizer_survives_too(tmp_path):
    "The kind that TinyLlama comes with: ids equal on odd texts and on random ones; one that llama.cpp would read otherwise is refused."
    t, rng = sentencepiece(), np.random.default_rng(3)
    texts = [*TEXTS, "</s>x <s> y", *("".join(rng.choice(list("aemn thripd=.()'\n\u00e9"), 40)) for _ in range(100))]
    with Llama(export((net("tinyllama", t), t), tmp_path/"m.gguf", "f16")) as m:
        for text in texts:
            ids = t(text, add_special_tokens=False).input_ids
            assert tokenize(m, text) == ids, text
            if not set(ids) & {1, 2}: assert detokenize(m, ids).removeprefix(" ") == text.removeprefix(" "), text
    with pytest.raises(StudyError, match="some of its halves"): export((net("tinyllama", t), sentencepiece(False)), tmp_path/"n.gguf", "f16")

@pytest.mark.parametrize("text", TEXTS)
def test_the_file_tokenises_like_the_checkpoint(tokenizer, tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp()/"tok.gguf"
    if not path.exists(): export((net("starcoder", tokenizer), tokenizer), path, "f16")
    with Llama(path) as m:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenize(m, text) == ids
        if "<|" not in text: assert detokenize(m, ids) == text

@pytest.mark.parametrize("type, least", [("q8_0", .999), ("q4_0", .9)])
def test_fewer_bits_stay_close(tokenizer, tmp_path, type, least):
    model = net("tinyllama", tokenizer)
    ids = list(range(5, 45))
    with Llama(export((model, tokenizer), tmp_path/"m.gguf", type)) as m:
        m.feed([(t, i, 0, True) for i, t in enumerate(ids)])
        ours = np.stack([m.logits(i) for i in range(len(ids))])
    c = np.corrcoef(ours.ravel(), model(torch.tensor([ids])).logits[0].detach().numpy().ravel())[0, 1]
    assert least <= c < .999999

def test_a_wrong_order_of_rows_is_seen(tokenizer, tmp_path, monkeypatch):
    "The parity test can fail: without the reordering of query and key rows the logits are others."
    import slm_study.runtime.gguf as gguf
    monkeypatch.setattr(gguf, "half_turn_to_pairs", lambda w, heads: w)
    model, ids = net("tinyllama", tokenizer), list(range(5, 45))
    with Llama(export((model, tokenizer), tmp_path/"m.gguf", "f16")) as m:
        m.feed([(t, i, 0, True) for i, t in enumerate(ids)])
        ours = np.stack([m.logits(i) for i in range(len(ids))])
    assert np.corrcoef(ours.ravel(), model(torch.tensor([ids])).logits[0].detach().numpy().ravel())[0, 1] < .999

def test_a_long_prompt_is_read_in_parts(tokenizer, tmp_path):
    path = export((net("starcoder", tokenizer), tokenizer), tmp_path/"m.gguf", "f16")
    ids = [int(t) for t in np.random.default_rng(3).integers(2, 300, 150)]
    with Llama(path) as m:
        whole = m.read(ids).copy()
        m.clear(); m.width = 32
        assert np.allclose(m.read(ids), whole, atol=.02)

def test_sequences_do_not_see_each_other(tokenizer, tmp_path):
    path = export((net("tinyllama", tokenizer), tokenizer), tmp_path/"m.gguf", "f16")
    prompts = [[5, 6, 7], [9]*20, [11, 12]]
    with Llama(path) as m: alone = [write(m, p, 8, ignore_eos=True).tokens for p in prompts]
    with Llama(path, sequences=3) as m: assert write_batch(m, prompts, 8)[0] == alone

def test_a_model_without_tokenizer(tokenizer, tmp_path):
    with Llama(export((net("tinyllama", tokenizer), None), tmp_path/"m.gguf", "q8_0")) as m:
        assert m.size == len(tokenizer) and len(write(m, [5, 6], 4, ignore_eos=True).tokens) == 4

def test_no_port_is_opened(tokenizer, tmp_path):
    "llama.cpp runs in this process; nothing listens."
    listening = lambda: {l.split()[1] for f in ("tcp", "tcp6") for l in open(f"/proc/self/net/{f}").read().splitlines()[1:] if l.split()[3] == "0A"}
    before = listening()
    with Llama(export((net("starcoder", tokenizer), tokenizer), tmp_path/"m.gguf", "f16")) as m:
        write(m, [5, 6], 4)
        assert listening() <= before

@pytest.fixture
def study(tokenizer, tmp_path):
    "A trained base of the smoke recipe, as the study leaves it."
    run = Run("smoke", "starcoder", "base", out=tmp_path/"runs")
    save_checkpoint(net("starcoder", tokenizer), tokenizer, run.tuned)
    return run

def test_export_command(study, tmp_path, capsys):
    call = ["export", "--recipe", "smoke", "--model", "starcoder", "--technique", "base", "--runs", str(study.out), "--out"]
    assert main([*call, str(tmp_path/"m.gguf"), "--type", "q4_0"]) == 0 and "q4_0" in capsys.readouterr().out
    with Llama(tmp_path/"m.gguf") as m: assert tokenize(m, "C0") and write(m, [5], 3).tokens
    assert main([*call[:6], "pruning", *call[7:], str(tmp_path/"x.gguf")]) == 1
    said = capsys.readouterr().err
    assert "slm-study run" in said and said.count("\n") == 1 and not (tmp_path/"x.gguf").exists()
    (tmp_path/"file").write_text("")
    assert main([*call, str(tmp_path/"file"/"m.gguf")]) == 1 and capsys.readouterr().err.count("\n") == 1

@pytest.mark.parametrize("missing, module, says", [("xllamacpp", library, "pip install xllamacpp")])
def test_a_missing_package_is_one_line(monkeypatch, missing, module, says):
    import importlib.util, slm_study.runtime.llama_cpp as runtime
    monkeypatch.setattr(runtime, "_loaded", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(StudyError, match=says): module()

def test_a_failed_export_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    model = net("starcoder", tokenizer)
    model.transformer.h[1].mlp.c_proj = torch.nn.Linear(100, 64)
    with pytest.raises(StudyError, match="blk.1.ffn_down.weight: rows of 100 numbers are not a multiple of 32") as e: export((model, tokenizer), tmp_path/"m.gguf", "q4_0")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())

def test_files_are_made_again_only_when_weights_are_younger(tokenizer, tmp_path):
    import os, time
    save_checkpoint(net("tinyllama", tokenizer), tokenizer, tmp_path/"m")
    first = {t: p.stat().st_mtime_ns for t, p in files(tmp_path/"m", tmp_path/"gguf").items()}
    assert set(first) == set(TYPES) and {t: p.stat().st_mtime_ns for t, p in files(tmp_path/"m", tmp_path/"gguf").items()} == first
    weights = next((tmp_path/"m").glob("*.safetensors"))
    os.utime(weights, (time.time() + 60,)*2)
    assert all(p.stat().st_mtime_ns > first[t] for t, p in files(tmp_path/"m", tmp_path/"gguf").items())
