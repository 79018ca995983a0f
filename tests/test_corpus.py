"Sources, filters and corpus where they do not teach: planted rows found, rows near them kept, bad input, kills."
import json, os, random, signal, subprocess, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch

import pytest

from slm_study.curation import sources
from slm_study.curation.corpus import curate, held_out_tasks
from slm_study.curation.rows import SourceRows, split_of
from slm_study.curation.dedup import Contamination
from slm_study.curation.packing import as_batch, encode, pack
from slm_study.curation.sources import MissingSource, hub_rows, load_source
from slm_study.recipes import StudyError, load_recipe

SUBJECTS = "rainfall pressure luminosity enzyme latency sediment voltage traffic pollen spectrum humidity torque glucose salinity neutrino ozone friction albedo plankton viscosity radon biomass tremor velocity".split()
METHODS = ["rolling median", "principal components", "a random forest", "k-means", "a Fourier transform", "bootstrap intervals", "a Kalman filter", "quantile regression", "isotonic fits", "wavelets", "a Gaussian process", "ridge regression"]
PLACES = "Lisbon Osaka Nairobi Quito Tromso Perth Pune Accra Lima Hanoi Oslo Dakar Tunis Cork Turin Baku Davos Minsk Natal Siena Windhoek Zadar Kyoto Leeds".split()
BOILERPLATE = "# Copyright 2020 The Measuring Authors.\n# Licensed under the MIT licence; see the file LICENSE in the top folder\n# for what you may do with this file and what nobody promises about it.\n"

def code_row(text, key=None): return {"hexsha": key or str(abs(hash(text))), "max_stars_repo_licenses": ["MIT"], "content": text}

def program(i, rng):
    "A clean file: its own subject, method and numbers, half of them under shared boilerplate"
    s, place = SUBJECTS[i % len(SUBJECTS)], PLACES[(i * 7) % len(PLACES)]
    n, cut, scale = rng.randint(3, 400), round(rng.random() * 9, 3), rng.randint(2, 50)
    steps = rng.sample([f"{s} = {s}[{s} > {cut}]", f"{s} = ({s} - {s}.mean()) / {s}.std()", f"{s} = np.log1p(np.abs({s}) * {scale})", f"{s} = np.convolve({s}, np.ones({n % 9 + 2}) / {n % 9 + 2}, 'valid')",
                        f"{s} = np.sort({s})[::-1]", f"{s} = np.diff({s}, n={n % 3 + 1})", f"{s} = np.clip({s}, -{scale}, {scale})", f"{s} = {s}[::{n % 5 + 1}]"], 4)
    return BOILERPLATE * (i % 2) + f"import numpy as np\n\nSEED = {n}\n{s} = np.random.default_rng(SEED).normal({cut}, {scale}, size={n * 11})\n" + "\n".join(steps) + f"\nprint('{s} at {place}', {s}.sum().round({i % 4}))\n"

def abstract(i, rng):
    s, m, p = SUBJECTS[i % len(SUBJECTS)], rng.sample(METHODS, 3), rng.sample(PLACES, 2)
    ways = [f"Between {p[0]} and {p[1]} the {s} changed within {rng.randint(2, 90)} years, and nobody has said why.", f"Stations in {p[0]} report {s} every {rng.randint(2, 50)} minutes.", f"How well does {m[0]} follow {s} when a third of the values is missing?",
            f"With {m[1]} the error falls to {rng.randint(2, 40)} percent of what {m[2]} gives.", f"We release {rng.randint(100, 9000)} series from {p[1]} under an open licence.", f"Neither noise nor drift of the {s} sensors explains the gap.", f"A simple rule built on {m[0]} is nearly as good and needs {rng.randint(2, 30)} lines."]
    return f"{s.capitalize()} in {p[0]} seen through {m[0]}", " ".join(rng.sample(ways, 5))

def paper_row(i, rng):
    title, text = abstract(i, rng)
    return {"paper_id": f"p{i}", "title": title, "abstract": text + " " + "More on this in the supplement." * (len(text) < 220)}

def words_changed(text, rng, n):
    words = text.split(" ")
    for i in rng.sample(range(8, len(words)), n): words[i] = rng.choice(("some", "often", "ours", "wide"))
    return " ".join(words)

SECRETS = [lambda r: "AKIA" + "".join(r.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", k=16)), lambda r: "ghp_" + "".join(r.choices("abcdefghijKLMNOP0123456789", k=36)), lambda r: "xoxb-" + str(r.randint(10**11, 10**12 - 1)) + "-" + "".join(r.choices("abcdefghij", k=12)),
           lambda r: "sk_live_" + "".join(r.choices("abcdefghijKLMN0123456789", k=24)), lambda r: "-----BEGIN RSA " + "PRIVATE KEY-----", lambda r: "postgres://ada:" + "".join(r.choices("qwzuiop78901", k=11)) + "@db.internal:5432/runs"]
def with_secret(text, i, rng):
    if i % 7 == 6: line = f"db_password = '{''.join(rng.choices('gT7mKp2Q9vbnXz', k=12))}'"
    else: line = f"{('key', 'conn', 'TOKEN')[i % 3]} = '{SECRETS[i % 7](rng)}'"
    lines = text.splitlines(keepends=True)
    return "".join(lines[:-1]) + line + "\n" + lines[-1]

NEAR_SECRETS = ["password = getpass.getpass()", "token = tokens[0]", "api_key = os.environ['API_KEY']", "secret = '<your secret here>'", "commit = '8c876579c124364ee4f8f32764895f5e426adf6a'", "url = 'https://data.lab.org/v2/stations?key=name'", "pwd = os.getcwd()"]
ADDRESSES = ["ada.king@uni-north.edu", "j_doe+logs@mail.lab.co.uk", "X.Y@sub.example-host.org", "first-last99@observatory.int", "me@dept.physics.ac.at"]
BROKEN = [lambda t: t.replace("print('", "print '", 1).replace(").sum()", ".sum()"), lambda t: t + "def f(:\n    pass\n", lambda t: t.replace("import numpy as np", "import numpy as np\nexcept ValueError, e:\n    pass", 1), lambda t: t + "x = [1, 2\n", lambda t: t.replace("\n\nSEED", "\n  \n    SEED", 1), lambda t: t + "print >>f, 'done'; exec 'x = 1'\n", lambda t: t + '"""never closed\n']

def kept_texts(tmp_path, name, rows, tests=None):
    path = tmp_path/f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = SourceRows(name, str(path), None, tests)
    return [(r["id"], r["text"]) for r in rows if r["source"] == name], rows

@pytest.fixture(scope="module")
def tests(): return held_out_tasks(40, 3, False)

def planted(tests):
    "(kind, row) of clean and planted rows of the code source, and of papers"
    rng, code, papers = random.Random(7), [], []
    clean = [program(i, rng) for i in range(120)]
    code += [("clean", code_row(t, f"clean{i}")) for i, t in enumerate(clean)]
    for i, line in enumerate(NEAR_SECRETS * 3): code.append(("clean", code_row(program(200 + i, rng) + "import os, getpass\n" + line + "\n", f"near{i}")))
    for i in range(24):
        base = clean[i * 4]
        code.append(("duplicate", code_row(base.replace("\n", " \n") if i % 2 else base.replace(" = ", "  = "), f"dup{i}")))
        code.append(("near-duplicate", code_row((BOILERPLATE if i % 2 else "") + clean[i * 4 + 1].replace("SEED", "START") + f"# version {i}\n", f"neardup{i}")))
        code.append(("secret", code_row(with_secret(program(300 + i, rng), i, rng), f"secret{i}")))
        code.append(("unparsable", code_row(BROKEN[i % len(BROKEN)](program(400 + i, rng)), f"broken{i}")))
    long = [t for t in tests if len(t.request.split()) >= 8]
    for i in range(24):
        t, noise = long[i % len(long)], program(500 + i, rng)
        leak = f"# task: {t.request}\n" if i % 2 else t.program
        if i % 2 or len([l for l in t.program.splitlines() if "import" not in l and "read" not in l]) >= 3: code.append(("contaminated", code_row(noise + "\n" + leak, f"leak{i}")))
        papers.append(("contaminated", dict(paper_row(600 + i, rng), paper_id=f"leak{i}") | {"abstract": f"We asked models this: {t.request} {abstract(700 + i, rng)[1]}"}))
    base = [paper_row(i, rng) for i in range(100)]
    papers += [("clean", r) for r in base]
    for i in range(24):
        papers.append(("duplicate", base[i] | {"paper_id": f"dup{i}", "abstract": base[i]["abstract"].upper() if i % 2 else base[i]["abstract"].replace(" ", "  ")}))
        papers.append(("near-duplicate", base[i + 24] | {"paper_id": f"near{i}", "abstract": words_changed(base[i + 24]["abstract"], rng, 2)}))
    return code, papers

def test_planted_rows_go_and_clean_ones_stay(tmp_path, tests, capsys):
    guard = Contamination([x for t in tests for x in (t.request, t.prompt)], [t.program for t in tests])
    removed, missed, lost, kinds = Counter(), [], [], Counter()
    for name, rows in zip(("code", "scidocs"), planted(tests)):
        kept, _ = kept_texts(tmp_path, name, [r for _, r in rows], guard)
        kept = {id for id, _ in kept}
        for kind, row in rows:
            kinds[kind] += 1
            gone = sources.row_id(name, row) not in kept
            removed[kind] += gone
            key = row.get("hexsha") or row.get("paper_id")
            if kind == "clean" and gone: lost.append(key)
            if kind != "clean" and not gone: missed.append(key)
    bad = sum(n for k, n in removed.items() if k != "clean")
    with capsys.disabled():
        print(f"\n  planted: {({k: f'{removed[k]} of {n} removed' for k, n in kinds.items()})}; precision {bad / max(1, bad + removed['clean']):.3f}, recall {bad / sum(n for k, n in kinds.items() if k != 'clean'):.3f}")
    assert all(n >= 20 for n in kinds.values()) and kinds["clean"] > 200
    assert not missed and not lost, (missed, lost)

def test_addresses_go_and_rows_stay(tmp_path):
    rng = random.Random(1)
    rows = [code_row(f"# by Ada <{ADDRESSES[i % 5]}>\n" + program(i, rng) + f"mail = '{ADDRESSES[(i + 1) % 5]}'\ny = np.eye(3)@np.ones(3)\n", f"k{i}") for i in range(24)]
    kept, source = kept_texts(tmp_path, "code", rows)
    assert len(kept) == 24 and source.redacted == 48
    assert not [a for _, t in kept for a in ADDRESSES if a in t] and all("np.eye(3)@np.ones(3)" in t for _, t in kept)
    after = code_row("import numpy as np\n" + program(99, rng) + 'mail = "Contact:\\nada@uni-x.org or\\tbob@uni-x.org"\n', "escaped") # the letter of an escape is no part of an address
    (_, text), = kept_texts(tmp_path, "code", [after])[0]
    assert '"Contact:\\nuser@example.com or\\tuser@example.com"' in text
    kept, source = kept_texts(tmp_path, "scidocs", [r | {"abstract": f"Write to {ADDRESSES[i % 5]}. " + r["abstract"]} for i, r in enumerate(paper_row(i, rng) for i in range(24))])
    assert len(kept) == 24 and source.redacted == 24 and not [t for _, t in kept if "@" in t.replace("user@example.com", "")]

def test_bad_rows_are_counted(tmp_path):
    good = [paper_row(i, random.Random(i)) for i in range(4)]
    lines = [json.dumps(good[0]), json.dumps(good[1] | {"title": None}), json.dumps(good[2] | {"abstract": ""}), json.dumps(good[0]), "[1, 2]", "{not json", "", json.dumps(good[3] | {"title": 7})]
    (tmp_path/"rows.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe{}\n" + json.dumps(good[3]).encode() + b"\n")
    counts = Counter()
    assert len(list(load_source("scidocs", str(tmp_path/"rows.jsonl"), counts=counts))) == 2
    assert counts == {"read": 9, "kept": 2, "no title": 1, "no abstract": 1, "paper_id seen before": 1, "not a row": 1, "not JSON": 1, "title is no text": 1, "broken UTF-8": 1}

def test_csv_rows_and_a_missing_column(tmp_path):
    (tmp_path/"a.csv").write_bytes("prompt,chosen\nIs it far?,yes\n\"a, b\nc\",no\nx,y,z\n,empty\n".encode() + b"br\xe9ken,yes\n")
    counts = Counter()
    assert [r["prompt"] for r in load_source("astronomy", str(tmp_path/"a.csv"), counts=counts)] == ["Is it far?", "a, b\nc"]
    assert counts == {"read": 5, "kept": 2, "more cells than columns": 1, "no prompt": 1, "broken UTF-8": 1}
    (tmp_path/"b.csv").write_text("question,chosen\nIs it far?,yes\n")
    with pytest.raises(StudyError, match="no column 'prompt'"): list(load_source("astronomy", str(tmp_path/"b.csv")))

@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_a_line_of_300_megabytes_is_not_held(tmp_path, kind):
    path = tmp_path/f"long.{kind}"
    with open(path, "wb") as f:
        f.write({"jsonl": b'{"prompt": "', "csv": b"prompt,chosen\nIs it far?,yes\n", "json": b'{"a": {"prompt": "'}[kind])
        for _ in range(300): f.write(b"x" * (1 << 20))
        f.write({"jsonl": b'"}\n{"prompt": "Is it far?", "chosen": ""}\n', "csv": b",yes\n", "json": b'"}}'}[kind])
    code = ("from collections import Counter\nfrom slm_study.memory import peak_mib, resident_mib\nfrom slm_study.curation.sources import load_source\nfrom slm_study.recipes import StudyError\nc = Counter()\nbefore = resident_mib()\n"
            f"try: print(len(list(load_source('astronomy', {str(path)!r}, counts=c))), dict(c))\nexcept StudyError as e: print(e)\nprint(int(peak_mib() - before))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    said, grown = out.stdout.strip().splitlines()
    assert ("'line longer than 16 MiB': 1" in said if kind == "jsonl" else "long." in said), out
    assert int(grown) < (200 if kind == "json" else 100) # MiB; a reader that holds the line needs more

def test_an_empty_file_is_one_line(tmp_path):
    for kind in ("jsonl", "json", "csv", "parquet"):
        (tmp_path/f"empty.{kind}").touch()
        with pytest.raises(StudyError, match="is empty") as e: list(load_source("science", str(tmp_path/f"empty.{kind}")))
        assert "\n" not in str(e.value)

def test_the_bucket_is_streamed_and_its_loss_is_said():
    rows = {str(i): paper_row(i, random.Random(i)) for i in range(300)}
    class Bucket(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path.endswith("view_cite_read.json") else 403); self.end_headers()
            if self.path.endswith("view_cite_read.json"): self.wfile.write(json.dumps(rows).encode())
        def log_message(self, *a): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with patch.object(sources, "_BUCKET", address + "/{file}"): assert list(hub_rows("scidocs")) == list(rows.values())
    with patch.object(sources, "_BUCKET", address + "/none"), pytest.raises(MissingSource, match="github.com/allenai/scidocs"): list(hub_rows("scidocs"))
    server.shutdown()
    with patch.object(sources, "_BUCKET", address + "/{file}"), pytest.raises(MissingSource, match="cannot be reached"): server.server_close(); list(hub_rows("scidocs"))

def test_offline_hub_is_one_line():
    code = "from slm_study.curation.sources import load_source\nfrom slm_study.recipes import StudyError\nfor n in ('astronomy', 'science', 'code'):\n    try: list(load_source(n, 'hub'))\n    except StudyError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}, timeout=60)
    lines = out.stdout.strip().splitlines()
    assert len(lines) == 3 and all("cannot be reached" in l and "missing_sources" in l for l in lines), out

@pytest.fixture(scope="module")
def small():
    recipe = load_recipe("smoke")
    return recipe.model_copy(update=dict(data=recipe.data.model_copy(update=dict(pretrain_tasks=600, train_tasks=400, validation_tasks=30, test_tasks=10))))

def test_a_killed_curation_goes_on(tmp_path, small):
    "kill -9 at several moments; the files are those of a run that was left alone"
    whole = curate(small, tmp_path/"whole", progress=False)
    code = ("import sys\nfrom slm_study.recipes import load_recipe\nfrom slm_study.curation.corpus import curate\nr = load_recipe('smoke')\nprint('go', flush=True)\n"
            "curate(r.model_copy(update=dict(data=r.data.model_copy(update=dict(pretrain_tasks=600, train_tasks=400, validation_tasks=30, test_tasks=10)))), sys.argv[1], progress=False)")
    kills = 0
    for wait in (.1, .4, .5):
        p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"killed")], stdout=subprocess.PIPE)
        p.stdout.readline(); time.sleep(wait)
        kills += p.poll() is None
        p.send_signal(signal.SIGKILL); p.wait()
    assert kills >= 2
    assert curate(small, tmp_path/"killed", progress=False) == whole
    assert sorted(p.name for p in (tmp_path/"killed").iterdir()) == sorted([*whole["files"], "manifest.json"])
    for name in whole["files"]: assert (tmp_path/"killed"/name).read_bytes() == (tmp_path/"whole"/name).read_bytes()

def test_a_row_keeps_its_side_when_others_go(tmp_path):
    ids = [sources.row_id("scidocs", {"paper_id": f"p{i}"}) for i in range(3000)]
    sides = Counter(map(split_of, ids))
    assert .01 < sides["heldout"] / 3000 < .03
    assert len(set(ids)) == 3000 and sources.row_id("scidocs", {"paper_id": "p5", "title": "x"}) == ids[5]

def test_packing_with_a_tokenizer(small):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "c": 3, "?": 4}, unk_token="?")); inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ids, labels = encode(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>"), "a b", "c")
    assert (ids, labels) == ([1, 2, 3, 0], [-100, -100, 3, 0])
    counts = {}
    row, = pack([(ids, labels), ([1] * 99,) * 2, (ids, ids)], 10, pad=0, counts=counts)
    assert counts == {"too long": 1} and row.labels.tolist() == [-100, -100, 3, 0, -100, 2, 3, 0, -100, -100]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 0] and row.segment_ids.tolist() == [1] * 4 + [2] * 4 + [0] * 2
    assert as_batch([row])["attention_mask"].shape == (1, 1, 10, 10)
