"Each variant is measured in its own process; what a planted variant does wrong shows in the right metric."
import json, os, subprocess, sys
import pytest, torch
from tokenizers import Tokenizer, models as token_models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from slm_study.recipes import Size, StudyError
from slm_study.models import EOS, PAD, config_for, load_checkpoint, save_checkpoint
from slm_study.evaluation.efficiency import fixed_run, free_run, measure, measure_here

WORDS = ["<|endoftext|>", "<|pad|>", *map(str, range(126))]
PROMPTS = [" ".join(str((7*i + j) % 100) for j in range(12 + i)) for i in range(4)]
SETTINGS = dict(max_new_tokens=20, fixed_tokens=12, repeats=5, threads=1)

def tokenizer():
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(token_models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="0")), eos_token=WORDS[EOS], pad_token=WORDS[PAD])
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tok

def save(folder, model="tinyllama", layers=2):
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config_for(model, Size(hidden=64, layers=layers, ffn=128, positions=128), len(WORDS)))
    save_checkpoint(net, tokenizer(), folder)
    return folder

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "Both architectures, each measured once in a fresh process."
    folder = tmp_path_factory.mktemp("models")
    return {m: (folder/m, *measure(save(folder/m, m), PROMPTS, **SETTINGS)) for m in ("tinyllama", "starcoder")}

@pytest.mark.parametrize("model", ["tinyllama", "starcoder"])
def test_both_architectures_in_a_fresh_process(measured, model):
    _, metrics, raw = measured[model]
    got = {m.metric: m for m in metrics}
    assert {"parameters", "matmul_parameters", "disk_mib", "latency_ms", "ms_per_token", "prefill_ms", "new_tokens", "throughput_samples_s", "peak_mem_mib"} == set(got)
    assert len(raw["free"]) == len(PROMPTS) and len(raw["fixed"]) == SETTINGS["repeats"] and raw["threads"] == 1
    assert 0 < raw["memory"]["weights_mib"] < raw["memory"]["libraries_mib"] < raw["memory"]["peak_mib"]
    for name in ("latency_ms", "ms_per_token", "prefill_ms"): assert 0 < got[name].low <= got[name].value <= got[name].high
    json.dumps(raw)

def test_memory_is_not_inherited(measured):
    "A parent that holds 512 MiB does not change what a child is charged with."
    folder, _, alone = measured["tinyllama"]
    ballast = torch.ones(128 << 20)
    beside = measure(folder, PROMPTS, **SETTINGS)[1]
    assert ballast.numel() and abs(beside["memory"]["peak_mib"] - alone["memory"]["peak_mib"]) < 100

def test_a_model_of_more_layers_is_slower_per_token(tmp_path):
    fastest = [min(r["ms_per_token"] for r in measure_here(dict(checkpoint=str(save(tmp_path/str(n), layers=n)), prompts=PROMPTS, early_exit=False, **{**SETTINGS, "repeats": 12}))["fixed"])
               for n in (2, 16)] # other work on the machine only adds time, so the fastest runs are compared
    assert fastest[1] > 1.5*fastest[0]

def test_a_model_that_stops_early_has_fewer_tokens_and_is_not_faster_per_token(tmp_path):
    model, tok = load_checkpoint(save(tmp_path/"m"))
    full = free_run(model, tok, PROMPTS[:1], 20)[0]
    assert full["stop_reason"] == "length" and not full["success"]
    from slm_study.compression.early_exit import decode
    tokens = decode(model, tok(PROMPTS[0], return_tensors="pt").input_ids, max_new_tokens=20).tokens[0]
    stop = next(i for i in range(1, 20) if tokens[i] not in tokens[:i])
    tok.eos_token = WORDS[tokens[stop]]
    early = free_run(model, tok, PROMPTS[:1], 20)[0]
    assert early["stop_reason"] == "eos" and early["success"] and early["new_tokens"] == stop + 1 < full["new_tokens"]
    assert fixed_run(model, tok, PROMPTS, 12, 1)[0]["ms_per_token"] > 0          # the end token is ignored there

def test_an_empty_text_is_no_success(tmp_path):
    model, tok = load_checkpoint(save(tmp_path/"m"))
    from slm_study.compression.early_exit import decode
    tok.eos_token = WORDS[decode(model, tok(PROMPTS[0], return_tensors="pt").input_ids, max_new_tokens=1).tokens[0][0]]
    sample = free_run(model, tok, PROMPTS[:1], 20)[0]
    assert sample["stop_reason"] == "eos" and sample["new_tokens"] == 1 and not sample["success"]

def test_a_torn_checkpoint_is_one_line(tmp_path):
    folder = save(tmp_path/"m")
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(StudyError) as e: measure(folder, PROMPTS, **SETTINGS)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("change, message", [(dict(repeats=1), "two of each"), (dict(fixed_tokens=1), "two of each"), (dict(threads=0), "one thread")])
def test_settings_that_cannot_work(tmp_path, change, message):
    with pytest.raises(StudyError, match=message): measure(tmp_path, PROMPTS, **{**SETTINGS, **change})

def test_more_tokens_than_positions(tmp_path):
    model, tok = load_checkpoint(save(tmp_path/"m"))
    with pytest.raises(StudyError, match="fixed_tokens"): fixed_run(model, tok, PROMPTS, 500, 1)

def test_the_child_leaves_no_half_written_answer(tmp_path):
    (tmp_path/"spec.json").write_text(json.dumps(dict(checkpoint=str(tmp_path/"none"), prompts=PROMPTS, early_exit=False, **SETTINGS)))
    done = subprocess.run([sys.executable, "-m", "slm_study.evaluation.efficiency", str(tmp_path/"spec.json"), str(tmp_path/"out.json")], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and str(tmp_path/"none") in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["spec.json"]
