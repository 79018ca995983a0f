"What the compression notebooks do not show: every architecture, tied and untied, in combination, over many seeds."
import copy, json, random, subprocess, sys
import gguf, pytest, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from slm_study.compression.audit import audit, compare
from slm_study.compression.early_exit import SKIPPED, ExitHeads, decode, decode_uncached, load_exits, normed, own_fill, save_exits, taking_exits
from slm_study.compression.exit_training import calibrate_tau, fit_fills, train_exits, train_taking_exits
from slm_study.compression.decoding import runner
from slm_study.compression.healing import healed
from slm_study.compression.lossless import decode_lossless
from slm_study.compression.pruning import ffn_scores, kept_channels, kept_width, mask_ffn, prune_ffn, prune_layers, prune_masked, prune_query_heads, query_head_scores, random_scores, row_masks
from slm_study.compression.quantization import quantize
from slm_study.compression.weight_sharing import share_embedding
from slm_study.curation.corpus import held_out_tasks
from slm_study.models import PAD, architecture, blocks, config_for, ffn, input_embedding, is_tied, lm_head, load_checkpoint, save_checkpoint
from slm_study.finetuning.pretrain import train_tokenizer
from slm_study.recipes import QLoRA, Size, StudyError, root
from slm_study.runtime.gguf import stored, tensors

SIZE = Size(hidden=64, layers=4, heads=4, kv_heads=2, ffn=128, positions=96)
KINDS = [(m, t) for m in ("tinyllama", "starcoder") for t in (True, False)]

def grown(m):
    "With weights as large as those of a trained model, so that each block has a say."
    for n,p in m.named_parameters():
        if p.ndim == 2: p.data.normal_(0, .1 if len(p) == 80 else .3)
        elif n.endswith("bias"): p.data.normal_(0, .05)
    return m

def make(model, tied=None, seed=0):
    torch.manual_seed(seed)
    m = grown(AutoModelForCausalLM.from_config(config_for(model, SIZE, 80, tied)).eval())
    m.generation_config.eos_token_id = None
    return m

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(before)

def apart(a, b):
    ids = torch.randint(2, 80, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return a(ids).logits - b(ids).logits

def gap(a, b): return apart(a, b).abs().max().item()

def spread(a, b): return apart(a, b).pow(2).mean().sqrt().item()

def padded(seed, rows=4, tokens=16):
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(2, 80, (rows, tokens), generator=g), torch.ones(rows, tokens, dtype=torch.long)
    for r in range(rows):
        pad = int(torch.randint(tokens, (1,), generator=g)) if r else 0
        ids[r,:pad], mask[r,:pad] = PAD, 0
    return ids, mask

@pytest.mark.parametrize("model,tied", KINDS)
@pytest.mark.parametrize("ratio", (.25, .5, .75))
@pytest.mark.parametrize("norm", (1, 2))
def test_removed_equals_masked(model, tied, ratio, norm):
    m = make(model, tied)
    small = prune_ffn(m, ratio, norm)
    assert gap(small, mask_ffn(m, kept_channels(ffn_scores(m, norm), ratio))) < 1e-4
    gone, d = SIZE.ffn - kept_width(SIZE.ffn, ratio), SIZE.hidden
    per_channel = 3*d if architecture(m) == "llama" else 2*d + 1
    assert audit(m)["parameters"] - audit(small)["parameters"] == SIZE.layers*gone*per_channel
    assert is_tied(small) == tied and gap(m, small) > 1e-3
    assert {ffn(b).width for b in blocks(small)} == {SIZE.ffn - gone} and {ffn(b).width for b in blocks(m)} == {SIZE.ffn}

@pytest.mark.parametrize("model,tied", KINDS)
@pytest.mark.parametrize("norm", (1, 2))
def test_the_weakest_go(model, tied, norm):
    "A quarter of the channels made negligible: exactly those are removed, and nothing is lost."
    m, weak = make(model, tied), torch.randperm(SIZE.ffn, generator=torch.Generator().manual_seed(1))[:SIZE.ffn//4]
    with torch.no_grad():
        for f in map(ffn, blocks(m)):
            for l in f.inputs: l.weight[weak] *= 1e-5
            f.output.weight[:,weak] *= 1e-5
    assert all(not set(k.tolist()) & set(weak.tolist()) for k in kept_channels(ffn_scores(m, norm), .25))
    assert gap(m, prune_ffn(m, .25, norm)) < 1e-3 < gap(m, prune_ffn(m, .25, scores=random_scores(m)))

@pytest.mark.parametrize("model,tied", KINDS)
def test_random_scores_are_a_different_choice(model, tied):
    m = make(model, tied)
    assert gap(prune_ffn(m, .5), prune_ffn(m, .5, scores=random_scores(m))) > 1e-3
    assert gap(prune_ffn(m, .5, scores=random_scores(m, 1)), prune_ffn(m, .5, scores=random_scores(m, 1))) == 0

def test_everything_at_once_reloads_without_the_package(tmp_path):
    "Pruned, then tied, saved: plain from_pretrained in a process in which slm_study cannot be imported."
    sums = {}
    for model in ("tinyllama", "starcoder"):
        small, verdict = share_embedding(prune_ffn(make(model, False), .5), "embedding")
        assert verdict.startswith("tied: ")
        save_checkpoint(small, None, tmp_path/model)
        sums[model] = small(torch.arange(2, 20)[None]).logits.double().sum().item()
        assert len([k for k in load_file(tmp_path/model/"model.safetensors") if "lm_head" in k or "wte" in k or "embed_tokens" in k]) == 1
    code = ("import sys, torch; sys.modules['slm_study'] = None\nfrom transformers import AutoModelForCausalLM\n"
            "for p in sys.argv[1:]:\n m = AutoModelForCausalLM.from_pretrained(p).eval()\n"
            " print(m(torch.arange(2, 20)[None]).logits.double().sum().item(), m.get_input_embeddings().weight is m.get_output_embeddings().weight)")
    out = subprocess.run([sys.executable, "-c", code, *(str(tmp_path/m) for m in sums)], capture_output=True, text=True, check=True).stdout.split()
    assert out[1::2] == ["True", "True"]
    assert [float(x) for x in out[::2]] == pytest.approx(list(sums.values()), abs=1e-4)

@pytest.mark.parametrize("model,tied", KINDS)
def test_masked_keeps_its_size_and_its_tie(model, tied, tmp_path):
    m = make(model, tied)
    masked = prune_masked(m, .15)
    assert "masked only: 15." in compare(m, masked)["verdict"] and is_tied(masked) == tied
    a, b = audit(m), audit(masked)
    assert {k: v for k,v in a.items() if k != "zeros_pct"} == {k: v for k,v in b.items() if k != "zeros_pct"}

@pytest.mark.parametrize("model", ("tinyllama", "starcoder"))
@pytest.mark.parametrize("merge", ("embedding", "head", "mean", "scaled"))
def test_tie_survives_the_checkpoint(model, merge, tmp_path):
    m = make(model, False)
    E, H = input_embedding(m).weight.detach().clone(), lm_head(m).weight.detach().clone()
    tied, verdict = share_embedding(m, merge)
    assert torch.equal(lm_head(tied).weight, {"embedding": E, "head": H, "mean": (E + H)/2, "scaled": (E*(H.norm()/E.norm()) + H)/2}[merge])
    save_checkpoint(m, None, tmp_path/"two"); save_checkpoint(tied, None, tmp_path/"one")
    again, _ = load_checkpoint(tmp_path/"one")
    assert lm_head(again).weight is input_embedding(again).weight and gap(again, tied) < 1e-6
    report = compare(tmp_path/"two", tmp_path/"one")
    assert report["verdict"] == verdict and report["before"]["disk_bytes"] - report["after"]["disk_bytes"] == pytest.approx(80*64*4, abs=256)
    assert share_embedding(again, merge) == (again, "already tied: 0 bytes saved")

@pytest.mark.parametrize("model,tied", KINDS)
def test_full_depth_is_greedy_generate(model, tied):
    m = make(model, tied)
    heads = ExitHeads.of(m, [1, 3])
    for seed in range(5):
        ids, mask = padded(seed)
        theirs = m.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=PAD)[:,16:].tolist()
        assert decode(m, ids, mask, 30).tokens == theirs
        assert decode(m, ids, mask, 30, exits=heads, tau=1.).tokens == theirs
        assert [decode(m, ids[r:r+1,mask[r].bool()], None, 30).tokens[0] for r in range(4)] == theirs

@pytest.mark.parametrize("model,tied", KINDS)
@pytest.mark.parametrize("skipped", SKIPPED)
def test_cached_exits_equal_uncached(model, tied, skipped):
    chance, seen = random.Random(0), set()
    for seed in range(3):
        m, (ids, mask) = make(model, tied, seed), padded(seed)
        heads = ExitHeads.of(m, [1, 2, 3], skipped)
        for p in heads.parameters(): p.data += .1*torch.randn_like(p) # fills that no block's own weights could stand for
        taus = [chance.choice([.05, .1, .2, .4, .8, .99]) for _ in range(25)]
        got = decode(m, ids, mask, 25, exits=heads, tau=taus)
        for r in range(4):
            assert (got.tokens[r], got.layers_run[r]) == decode_uncached(m, ids[r,mask[r].bool()].tolist(), taus, heads)
            assert decode(m, ids[r:r+1,mask[r].bool()], None, 25, exits=heads, tau=taus).tokens[0] == got.tokens[r]
            seen |= set(got.layers_run[r])
    assert seen == {1, 2, 3, 4}

def test_a_row_does_not_feel_its_batch():
    "Rows that end early leave the batch; those that stay get what they get alone, exits and all."
    m = make("tinyllama")
    heads, (ids, mask) = ExitHeads.of(m, [2]), padded(3, rows=8)
    full = decode(m, ids, mask, 40, exits=heads, tau=.3)
    ends = sorted({t for row in full.tokens for t in row[5:15]})[:12]
    got = decode(m, ids, mask, 40, eos_token_id=ends, exits=heads, tau=.3)
    assert len({len(t) for t in got.tokens}) > 2
    for r in range(8):
        alone = decode(m, ids[r:r+1,mask[r].bool()], None, 40, eos_token_id=ends, exits=heads, tau=.3)
        assert (alone.tokens[0], alone.layers_run[0], alone.stop_reasons[0]) == (got.tokens[r], got.layers_run[r], got.stop_reasons[r])

@pytest.mark.parametrize("model,tied", KINDS)
def test_fills_follow_the_blocks(model, tied):
    "An exit whose skipped blocks add nothing is propagated exactly; where they do add, fitted fills come closer than the blocks' own weights, on other tokens too."
    m = make(model, tied)
    heads, (ids, _) = ExitHeads.of(m, [2]), padded(0)
    with torch.no_grad():
        for b in blocks(m)[2:]: # pass on what they get
            for p in (b.self_attn.o_proj, b.mlp.down_proj) if model == "tinyllama" else (b.attn.c_proj, b.mlp.c_proj):
                p.weight.zero_()
                if p.bias is not None: p.bias.zero_()
    taus = [(1e-6, 1.)[t % 2] for t in range(20)]
    assert decode(m, ids[:1], None, 20, exits=heads, tau=taus).tokens == decode(m, ids[:1], None, 20).tokens
    m = make(model, tied)
    heads, batch = ExitHeads.of(m, [1, 2]), lambda seed: dict(input_ids=torch.randint(2, 80, (64, 30), generator=torch.Generator().manual_seed(seed)))
    own = ExitHeads.of(m, [1, 2])
    rows = [b | dict(labels=b["input_ids"]) for b in map(batch, range(4))]
    table = fit_fills(m, heads, rows)
    assert (table.fitted_unexplained_pct < table.own_unexplained_pct).all() and table.tokens.tolist() == [4*64*30]*2
    with torch.no_grad():
        states = m.base_model(**batch(9), output_hidden_states=True).hidden_states
        run, x = runner(m), normed(runner(m), states[1])
        weight, bias = own_fill(run, 2) # of block 2, from its true input
        true = torch.nn.functional.linear(normed(run, states[2]), weight[:heads.kv], bias[:heads.kv])
        error = lambda h: (h.fill(x, 1)[...,1,:] - true).square().mean().item()
        assert error(heads) < .9*error(own)

@pytest.mark.parametrize("model", ("tinyllama", "starcoder"))
def test_exits_are_trained_as_they_are_decoded(model):
    "The forward that trains them says at every depth what decoding said, and the model stays as it is."
    m, ids = make(model), padded(0)[0][:1]
    heads, before = ExitHeads.of(m, [1, 3]), {k: v.clone() for k, v in m.state_dict().items()}
    rows = [dict(input_ids=x, labels=torch.where(torch.arange(30) < 4, -100, x)) for x in torch.randint(2, 80, (5, 8, 30), generator=torch.Generator().manual_seed(1))]
    train_taking_exits(m, heads, rows, steps=5, taus=(.1, .2))
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and not torch.equal(heads.maps[0], torch.eye(64))
    said = decode(m, ids, None, 30, exits=heads, tau=[.02, .1, .9]*10)
    fed, depth = torch.cat([ids, torch.tensor([said.tokens[0][:-1]])], 1), torch.tensor([[4]*ids.shape[1] + said.layers_run[0][1:]])
    assert len(set(said.layers_run[0])) > 1
    with torch.no_grad(), taking_exits(runner(m), heads, depth) as states: z = runner(m).head(m.base_model(fed, use_cache=False).last_hidden_state)[0]
    for e in heads.exits: z = torch.where((depth[0] == e)[:,None], runner(m).logits(heads(states[e][0], e)), z)
    assert z[ids.shape[1]-1:].argmax(-1).tolist() == said.tokens[0]

def test_heads_without_fills_do_not_propagate():
    m = make("tinyllama")
    with pytest.raises(StudyError, match="fills made for 0 numbers"): decode(m, padded(0)[0], None, 4, exits=ExitHeads([2], 64, 4), tau=.5)
    with pytest.raises(StudyError, match="no batch has a label"): fit_fills(m, ExitHeads.of(m, [2]), [dict(input_ids=padded(0)[0], labels=torch.full_like(padded(0)[0], -100))])

@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("model", ("tinyllama", "starcoder"))
def test_half_precision_decodes(model, dtype):
    m = make(model).to(dtype)
    ids, mask = padded(0)
    for way in SKIPPED:
        out = decode(m, ids, mask, 8, exits=ExitHeads.of(make(model), [2], way), tau=.2)
        assert [len(t) for t in out.tokens] == [8]*4

@pytest.mark.parametrize("model,tied", KINDS)
def test_recomputed_is_full_depth_but_for_the_exits(model, tied, monkeypatch):
    "Exits that say what the full model says change nothing, however many are taken; what they skip is made up when a later token goes deeper, and not before."
    from slm_study.compression import early_exit
    m, (ids, _), written = make(model, tied), padded(0), []
    full = decode(m, ids[:1], None, 30)
    def told(z): # in the place of the exit's logits stands the full model's answer, and every third token leaves
        z.zero_()[0, full.tokens[0][len(written)]] = 50.
        return torch.tensor([float(len(written) % 3 == 1)])
    def choose(logits, *given):
        written.append(1)
        return logits.argmax(-1)
    monkeypatch.setattr(early_exit, "confidence", told); monkeypatch.setattr(early_exit, "choose", choose)
    early = decode(m, ids[:1], None, 30, exits=ExitHeads.of(m, [1, 3], "recompute"), tau=.5)
    layers = early.layers_run[0]
    assert early.tokens == full.tokens and set(layers) == {1, 4} and layers.count(1) == 10
    assert early.late_blocks == (sum(3 for i, d in enumerate(layers) if d == 1 and 4 in layers[i+1:]),)

def test_exits_on_disk(tmp_path):
    m = make("starcoder")
    batch = dict(input_ids=padded(0)[0], labels=padded(0)[0])
    heads = train_exits(m, [batch], [2], steps=3)
    assert not torch.equal(heads.maps[0], torch.eye(64))
    save_checkpoint(m, None, tmp_path/"c")
    plain = compare(tmp_path/"c", tmp_path/"c")["verdict"]
    save_checkpoint(m, None, tmp_path/"e"); save_exits(tmp_path/"e", heads, .5, agreement=.99)
    again, tau = load_exits(tmp_path/"e")
    assert tau == .5 and torch.equal(again.maps[0], heads.maps[0]) and json.loads((tmp_path/"e"/"exit_config.json").read_text())["agreement"] == .99
    assert plain == "unchanged" and compare(tmp_path/"c", tmp_path/"e")["verdict"].startswith("unchanged; exit heads add")
    assert audit(tmp_path/"e")["exit_parameters"] == 64*64 + (4 - 2)*heads.kv*(64 + 1)
    heads.skipped = "recompute"; save_exits(tmp_path/"e", heads, .5)
    assert audit(tmp_path/"e")["exit_parameters"] == 64*64 and load_exits(tmp_path/"e")[0].kv == 0 # what is not used is not kept
    AutoModelForCausalLM.from_pretrained(tmp_path/"e") # still a plain checkpoint

@pytest.mark.parametrize("broken", (b"", b"{", b"[]", b'{"exits": [9], "hidden": 64, "layers": 4, "tau": 0.5}'))
def test_damaged_exits_are_one_line(tmp_path, broken):
    save_exits(tmp_path, ExitHeads([2], 64, 4), .5)
    (tmp_path/"exit_config.json").write_bytes(broken)
    with pytest.raises(StudyError) as e: load_exits(tmp_path)
    assert "\n" not in str(e.value)

def test_no_tau_is_good_enough():
    "Heads that are never right calibrate to 1, which never exits."
    m = make("tinyllama")
    heads = ExitHeads.of(m, [1])
    heads.maps[0].data.normal_(0, 3)
    tau, table = calibrate_tau(m, heads, [dict(input_ids=padded(0)[0], labels=padded(0)[0])], agreement=1.)
    assert tau == 1. and not (table.exits_agree_pct >= 100).any()


@pytest.mark.parametrize("model,tied", KINDS)
@pytest.mark.parametrize("rows", (1, 8))
def test_lossless_is_greedy(model, tied, rows):
    "Untrained exits, whose drafts are mostly refused: every token is still the full model's."
    refused = 0
    for seed in range(3):
        m, (ids, mask) = make(model, tied, seed), padded(seed, rows=rows)
        heads = ExitHeads.of(m, [1, 3])
        for at, tau, draft in ((1, .05, 6), (3, .3, 2)):
            got, drafts = decode_lossless(m, ids, mask, 40, exits=heads, tau=tau, draft=draft, at=at)
            assert got.tokens == decode(m, ids, mask, 40).tokens
            refused += sum(d.drafted - d.accepted for d in drafts)
    assert refused > 0

TASKS, NEW = 200, 12 # test prompts, and tokens written to each

@pytest.fixture(scope="module")
def prompts():
    return [t.prompt for t in held_out_tasks(TASKS, 7, True)]

@pytest.fixture(scope="module", params=("tinyllama", "starcoder"))
def shipped(request, prompts):
    "A base model that comes with the project, the prompts' ids, and its greedy text at batch 1."
    before = torch.get_num_threads(); torch.set_num_threads(1)
    model, tokenizer = load_checkpoint(root()/"bases"/request.param)
    ids = [tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
    alone = [decode(model, torch.tensor([i]), None, NEW, tokenizer.eos_token_id).tokens[0] for i in ids]
    torch.set_num_threads(before)
    return model, tokenizer.eos_token_id, ids, alone

def eights(ids):
    "Left-padded batches of eight, prompts of like length together: which prompts, ids, mask."
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for some in (order[i:i+8] for i in range(0, len(order), 8)):
        width = max(len(ids[i]) for i in some)
        yield some, torch.tensor([[PAD]*(width - len(ids[i])) + ids[i] for i in some]), torch.tensor([[0]*(width - len(ids[i])) + [1]*len(ids[i]) for i in some])

def eight_at_once(ids, write):
    "Each prompt's tokens, written by `write(ids, mask)` in batches of eight."
    out = [None]*len(ids)
    for some, batch, mask in eights(ids):
        for i, tokens in zip(some, write(batch, mask)): out[i] = tokens
    return out

def ties(model, ids, ours, theirs, allowed=2e-4):
    "Where two greedy texts part: nowhere, or where the two tokens' logits are equal up to rounding. The gap at each such place."
    gaps = []
    for prompt, a, b in zip(ids, ours, theirs):
        if a == b: continue
        at = next(i for i in range(max(len(a), len(b))) if a[i:i+1] != b[i:i+1])
        assert at < min(len(a), len(b)), "one text goes on where the other has ended"
        with torch.no_grad(): z = model(torch.tensor([prompt + a[:at]])).logits[0,-1]
        gap = abs(float(z[a[at]] - z[b[at]]))
        assert gap < allowed and z.max() - z[a[at]] < allowed, f"{a[at]} against {b[at]}: logits {gap} apart"
        gaps.append(gap)
    print(f"{len(gaps)} of {len(ids)} texts part at a tie, gaps {gaps}")
    assert len(gaps) <= .02*len(ids)
    return gaps

def generated(model, eos, ids, mask):
    "What transformers' greedy generate writes after each prompt, to the end token."
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, eos_token_id=eos)[:,ids.shape[1]:].tolist()
    return [row[:row.index(eos)+1] if eos in row else row for row in out]

def test_full_depth_on_200_prompts(shipped):
    "tau = 1 is full depth, alone and in batches of eight; and full depth is what transformers generates, alone and in batches of eight."
    model, eos, ids, alone = shipped
    assert len(ids) == TASKS and len({tuple(t) for t in alone}) > 10
    heads = ExitHeads.of(model, [2, 4])
    assert [decode(model, torch.tensor([i]), None, NEW, eos, heads, 1.).tokens[0] for i in ids] == alone
    together = eight_at_once(ids, lambda batch, mask: decode(model, batch, mask, NEW, eos).tokens)
    assert eight_at_once(ids, lambda batch, mask: decode(model, batch, mask, NEW, eos, heads, 1.).tokens) == together
    ties(model, ids, together, alone)
    ties(model, ids, alone, [generated(model, eos, torch.tensor([i]), torch.ones(1, len(i), dtype=torch.long))[0] for i in ids])
    ties(model, ids, together, eight_at_once(ids, lambda batch, mask: generated(model, eos, batch, mask)))

def test_lossless_on_200_prompts(shipped):
    "Drafts of an untrained exit, taken at a low threshold: many are refused, many accepted, and all 200 texts are greedy decoding's."
    model, eos, ids, alone = shipped
    heads, same, drafted, accepted = ExitHeads.of(model, [6]), [], 0, 0
    for prompt, greedy in zip(ids, alone):
        got, (d,) = decode_lossless(model, torch.tensor([prompt]), None, NEW, eos, heads, tau=.3, draft=6)
        same.append(got.tokens[0]); drafted += d.drafted; accepted += d.accepted
    assert not ties(model, ids, same, alone) and same == alone
    assert 0 < accepted < drafted

@pytest.mark.parametrize("heads", (1, 3))
@pytest.mark.parametrize("tied", (True, False))
def test_query_heads_removed_equal_masked(heads, tied):
    m = make("starcoder", tied)
    small, twin, w = prune_query_heads(m, heads), make("starcoder", tied), SIZE.hidden//SIZE.heads
    for b, s in zip(blocks(twin), query_head_scores(m)): b.attn.c_proj.weight.data.view(SIZE.hidden, SIZE.heads, w)[:,s.topk(heads, largest=False).indices] = 0
    assert gap(small, twin) < 1e-4 < gap(small, m)
    assert audit(m)["parameters"] - audit(small)["parameters"] == SIZE.layers*heads*(2*SIZE.hidden*w + w)
    ids, mask = padded(0)
    assert decode(small, ids, mask, 12).tokens == decode(twin, ids, mask, 12).tokens

def test_one_threshold_masks_the_weakest_rows_of_all():
    g = torch.Generator().manual_seed(0)
    w = {f"{i}": torch.randn(24, n, generator=g)*(1 + i) for i,n in enumerate((8, 16, 32))}
    for norm in (1, 2):
        masks = row_masks(w, .25, norm, "global")
        score = {n: x.norm(p=norm, dim=1)/x.shape[1]**(1/norm) for n,x in w.items()}
        gone = torch.cat([score[n][masks[n][:,0] == 0] for n in w]); kept = torch.cat([score[n][masks[n][:,0] == 1] for n in w])
        assert len(gone) == 18 and gone.max() < kept.min()

def test_quantised_is_a_plain_smaller_checkpoint(tmp_path):
    "Pruned, tied, quantised: reloads with the tie, decodes, and cannot be pruned or quantised again."
    size = Size(hidden=64, layers=2, heads=2, kv_heads=1, ffn=128, positions=96)
    for model in ("tinyllama", "starcoder"):
        torch.manual_seed(0)
        m = grown(AutoModelForCausalLM.from_config(config_for(model, size, 80, False)).eval())
        save_checkpoint(m, None, tmp_path/model)
        small, _ = share_embedding(prune_ffn(m, .5), "scaled")
        broken = copy.deepcopy(small) # as if the last matrix of each block had been lost
        for block in blocks(broken): ffn(block).output.weight.data.zero_()
        for format in ("nf4", "int8"):
            quantize(small, None, tmp_path/f"{model}_{format}", format)
            again, _ = load_checkpoint(tmp_path/f"{model}_{format}")
            report = compare(tmp_path/model, tmp_path/f"{model}_{format}")
            assert again.is_quantized and is_tied(again) and report["verdict"].startswith("quantised, ") and "less weight memory" in report["verdict"]
            assert report["after"]["parameters"] == audit(small)["parameters"]
            assert spread(again, small) < (.6 if format == "nf4" else .1)*spread(broken, small)
            ids, mask = padded(0)
            assert [len(t) for t in decode(again, ids, mask, 6, exits=ExitHeads.of(again, [1]), tau=.02).tokens] == [6]*4
            for again_cut in (lambda: prune_ffn(again, .5), lambda: prune_masked(again), lambda: prune_layers(again, [0]), lambda: quantize(again, None, tmp_path/"x")):
                with pytest.raises(StudyError, match="quantised"): again_cut()

@pytest.mark.parametrize("model,tied", KINDS)
def test_what_is_left_is_fitted(model, tied, tmp_path):
    "Copies of other channels are removed: least squares gives their share to the ones that stay, and nothing is lost; a plain checkpoint comes back."
    from slm_study.compression.reconstruction import reconstruct
    m, half = make(model, tied), SIZE.ffn//2
    with torch.no_grad():
        for f in map(ffn, blocks(m)):
            for l in f.inputs:
                l.weight[half:] = l.weight[:half]
                if l.bias is not None: l.bias[half:] = l.bias[:half]
    cut = prune_ffn(m, .5, scores=[torch.arange(SIZE.ffn).flip(0).float()]*SIZE.layers) # the copies go
    rows = torch.randint(2, 80, (64, 24), generator=torch.Generator().manual_seed(1))
    fitted, far = reconstruct(cut, m, [dict(input_ids=r) for r in rows.split(16)], damping=1e-6)
    assert gap(fitted, m) < 1e-2 < .1 < gap(cut, m) and max(far) < 1e-3
    assert is_tied(fitted) == tied and audit(fitted)["parameters"] == audit(cut)["parameters"]
    save_checkpoint(fitted, None, tmp_path/"fitted")
    assert gap(AutoModelForCausalLM.from_pretrained(tmp_path/"fitted").eval(), fitted) < 1e-5

@pytest.mark.parametrize("model,tied", KINDS)
def test_shared_blocks_are_copies_of_one(model, tied):
    "In pairs, the model computes what it computes with the first block's weights copied into the second; cached decoding too."
    from slm_study.compression.weight_sharing import share_blocks, shared_blocks
    m = make(model, tied); pairs, copied = share_blocks(m), make(model, tied)
    for a, b in zip(blocks(copied)[0::2], blocks(copied)[1::2]): b.load_state_dict(a.state_dict())
    assert gap(pairs, copied) < 1e-5 < gap(pairs, m)
    per_block = sum(p.numel() for p in blocks(m)[0].parameters())
    assert audit(m)["parameters"] - audit(pairs)["parameters"] == per_block*SIZE.layers//2 and audit(m)["matmul_parameters"] == audit(pairs)["matmul_parameters"]
    ids, mask = padded(0)
    assert decode(pairs, ids, mask, 8).tokens == decode(copied, ids, mask, 8).tokens
    optimizer = torch.optim.SGD(pairs.parameters(), lr=.1)
    pairs(ids, labels=ids).loss.backward(); optimizer.step()
    assert shared_blocks(pairs) and not shared_blocks(copied)
    with pytest.raises(StudyError, match="no config can say"): save_checkpoint(pairs, None, "never written")

def test_a_killed_sweep_makes_no_point_twice(tmp_path):
    "Whatever point it is killed at, the others are asked once in all; another tuned model starts it anew."
    from slm_study.compression.sweeps import points, read_points, run_sweep
    from slm_study.recipes import Pruning, Recipe, Sweep
    m, asked = make("tinyllama"), []
    class Stub: # a bench whose trainings cost nothing
        s, recipe, fit, batches = Sweep(ratios=(.25, .5), layers=(1,)), Recipe(name="x", pruning=Pruning()), [1], [dict(input_ids=padded(0)[0], labels=padded(0)[0])]
        class cut: model = m
        def make(self, p): return m, 10*(p["stage"] == "healed"), "full"
    class Killed(Exception): pass
    def answers(model, stop):
        if len(asked) == stop: raise Killed
        asked.append(1); return [True], [True]
    plan = points(m, Stub.s)
    for stop in (3, 7, len(plan)):
        try: rows = run_sweep(Stub(), lambda x: answers(x, stop), tmp_path/"points.jsonl", dict(tuned="a"), "x")
        except Killed: assert len(read_points(tmp_path/"points.jsonl", dict(tuned="a"))) == stop
    assert len(asked) == len(plan) == len(rows) and [{k: r[k] for k in plan[0]} for r in rows] == plan
    assert len({json.dumps(p) for p in plan}) == len(plan)
    run_sweep(Stub(), lambda x: answers(x, -1), tmp_path/"points.jsonl", dict(tuned="b"), "x")
    assert len(asked) == 2*len(plan)

class Stopped(TrainerCallback):
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.step: raise KeyboardInterrupt

@pytest.mark.parametrize("model", ("tinyllama", "starcoder"))
def test_healing_on_a_grid_resumes_and_is_what_the_file_holds(tmp_path, model, capsys):
    "Stopped in the middle and begun again, it ends in the same weights; llama.cpp's file holds them bit for bit; healing on no grid does not go on from its checkpoints."
    rows = [dict(prompt=f"mean of C{i}\n", completion=f"print(df[C{i}].mean())") for i in range(8)]
    tokenizer, whole = train_tokenizer([r["prompt"] + r["completion"] for r in rows], 300), make(model)
    whole.resize_token_embeddings(len(tokenizer))
    small = prune_ffn(whole, .5)
    heal = lambda work, **kw: healed(small, tokenizer, rows, QLoRA(batch_size=4), tmp_path/work, "heal", 600, "distill", teacher=whole, **{"grid": "q4_0", **kw})[0]
    at_once = heal("a")
    with pytest.raises(KeyboardInterrupt): heal("b", callbacks=[Stopped(7)])
    again = heal("b")
    assert "goes on from checkpoint-" in capsys.readouterr().out
    for x, y in zip(at_once.parameters(), again.parameters(), strict=True): assert torch.equal(x, y)
    for name, w in tensors(again).items():
        if not name.startswith("blk.") or w.ndim == 1: continue
        packed, kind = stored(name, w, "q4_0")
        assert kind == gguf.GGMLQuantizationType.Q4_0 and (gguf.quants.dequantize(packed, kind) == w).all()
    heal("b", grid="none")
    assert "goes on" not in capsys.readouterr().out
