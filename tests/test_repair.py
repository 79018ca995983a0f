"""Repair: what it mends, what it leaves, and that it adds nothing."""
import ast, random, time

import pytest

from slm_study.curation.tasks import generate_tasks
from slm_study.evaluation.repair import IMPORTS, MAX_CHARS, REPAIRS, Repaired, corrupt, parses, repair

PROGRAMS = [t.program for t in generate_tasks(60, seed=3, split="iid")]
WRAPS = {"plain": "{}", "fence": "```python\n{}```", "bare fence": "```\n{}```\n", "unclosed fence": "```python\n{}", "sentence": "Here is the code for your request:\n\n{}", "both": "Sure! This program does it.\n```python\n{}```\nIt prints the result.",
         "trailing": "{}\nThis code prints the answer you asked for."}

@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapping_is_taken_off_and_the_program_is_untouched(wrap):
    for p in PROGRAMS:
        got = repair(WRAPS[wrap].format(p))
        assert got.program.strip() == p.strip(), (wrap, got)
        assert (not got.repairs) == (wrap == "plain") and set(got.repairs) <= set(REPAIRS)

def test_prompt_echo(): assert repair("Request: count\nprint(1)", "Request: count\n").program == "print(1)"

def test_margin():
    for p in PROGRAMS[:20]:
        got = repair("\n".join("    " + l for l in p.splitlines()))
        assert ast.dump(ast.parse(got.program)) == ast.dump(ast.parse(p)) and got.repairs == ("indentation",)

def test_cut_programs_keep_only_statements_that_were_there():
    for p in PROGRAMS:
        lines = p.rstrip("\n").split("\n")
        whole = {ast.dump(n) for n in ast.walk(ast.parse(p)) if isinstance(n, ast.stmt)}
        got = repair("\n".join(lines) + "\nfor row in")
        assert got.repairs == ("truncated_tail",) and {ast.dump(n) for n in ast.parse(got.program).body} <= whole

@pytest.mark.parametrize("text,program", [("print([1, (2, {'a': 3", "print([1, (2, {'a': 3})])\n"), ("print(f(1, 2)", "print(f(1, 2))\n"), ("x = {'a': [1, 2}", None), ("print('a b c)", "print('a b c')\n")])
def test_brackets_and_strings(text, program):
    got = repair(text)
    if program: assert got.program == program and "unclosed" in got.repairs
    else: assert got == Repaired(text)

def test_no_logic_is_added():
    """Every call and operator of the result was in the text, apart from imports and savefig."""
    rng = random.Random(0)
    kinds = lambda t: {type(n) for n in ast.walk(ast.parse(t)) if isinstance(n, (ast.operator, ast.cmpop, ast.boolop, ast.unaryop))}
    ops = lambda t: {n.id for n in ast.walk(ast.parse(t)) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(ast.parse(t)) if isinstance(n, ast.Attribute)}
    for p in PROGRAMS*4:
        damaged = corrupt(p, rng)
        got = repair(damaged)
        if parses(got.program):
            assert all(w in damaged or w == "savefig" for w in ops(got.program)), (damaged, got.program)
            assert kinds(got.program) <= kinds(p), (damaged, got.program)

def test_damage_beyond_repair_is_returned_unchanged():
    for text in ("))) what (((", "", "\0", "def", "\ud800(", "a b c d e"): assert repair(text) == Repaired(text)

@pytest.mark.parametrize("text", ["("*50_000, "x = " + "["*19_000, "'"*10_001, "a\n"*10_000 + "(", "```"*5_000, " "*15_000 + "x", "é("*5_000, "print('" + "\\"*9_999, "#"*10**6, "if x:\n"*3_000])
def test_strange_text_takes_no_time(text):
    start = time.time(); repair(text)
    assert time.time() - start < 20

def test_imports_are_right():
    for name, line in IMPORTS.items():
        assert parses(line)
        assert repair(f"print({name})").program.startswith(line + "\n"), name
    assert repair("import pandas as pd\nprint(pd)").repairs == ()
    assert repair("def f(np): return np").repairs == ()

def test_show_becomes_a_file():
    got = repair("import matplotlib.pyplot as plt\nplt.plot([1]); plt.show()\nplt.show()")
    assert got.program.count("savefig") == 2 and "show()" not in got.program and got.repairs == ("show_to_savefig",)

def test_long_text_is_left_alone(): assert repair("x"*(MAX_CHARS + 1)).repairs == ()
