"""The runner: what it measures is what the strategies release, and no kill loses, repeats or changes a row."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inferenceguard.budget import SafetyBudget
from inferenceguard.config import read_method
from inferenceguard.contracts import BoundsRows, Sampling, ScorerLimits, conversation, render_conversation
from inferenceguard.critic import CriticNetwork, Provenance, SafetyCritic
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.errors import InvalidArgument, MissingCapability
from inferenceguard.evaluation.flops import Meter, Size, transformer_size, weights
from inferenceguard.evaluation.merge import merge
from inferenceguard.evaluation.metrics import summarise
from inferenceguard.evaluation.prompts import EvaluationPrompt
from inferenceguard.evaluation.refusals import is_refusal
from inferenceguard.evaluation.runner import Entry, Evaluation, run
from inferenceguard.guard import Guard
from inferenceguard.kv import CachedTransformer
from inferenceguard.scorers import EmbeddedCost
from inferenceguard.scorers.embedded import collate
from inferenceguard.testing import FaultyScorer, ToyCost, ToyCritic, ToyEngine, ToyReward
from inferenceguard.text import visible_text
from tiny import tiny_model, tiny_tokenizer

SIZES = {"n_beams": 8, "keep": 2, "block_tokens": 2, "max_new_tokens": 6, "retries": 1}
KINDS = ("harmful", "jailbreak", "borderline_benign", "benign")
PROMPTS = [EvaluationPrompt(f"prompt {i}", KINDS[i % 4], "made-up") for i in range(11)]
ENGINE, REWARD, COST = ToyEngine(1), ToyReward(2), ToyCost(3, low=-1.0, high=1.5)


def guard(cost=COST, *, gate_cost=None, critic=None, budget=SafetyBudget(0.5), rows=24, engine=ENGINE):  # noqa: B008
    strategy = read_method("base", max_new_tokens=6, budget=budget).strategy
    return Guard(engine, REWARD, cost, gate_cost=gate_cost, critic=critic, strategy=strategy, batch_rows=rows)


def entry(spec, gate=False, **fields):
    method = read_method(spec, **{**SIZES, "budget": SafetyBudget(0.5), **fields})
    return Entry(method.name + "+gate" * gate, method, gate)


def evaluate(out, *entries, prompts=PROMPTS, **fields):
    """(errors, rows)"""
    settings = {"guard": guard(), "block_tokens": 2, **fields}
    errors = run(Evaluation(entries=entries, prompts=prompts, **settings), out)
    return errors, rows_of(out)


def rows_of(out, name="results.jsonl"):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["base", "best-of-n:augmented", "beam:lagrangian", "inferenceguard:no-critic", "args"])
def test_rows_are_the_best_rows_of_the_search_measured_anew(spec, tmp_path):
    """Against the strategy called alone, the scorers' exact sums, and prefixes cut by hand."""
    errors, rows = evaluate(tmp_path, entry(spec))
    assert errors == 0
    assert [(row["prompt"], row["kind"]) for row in rows] == [(p.prompt, p.kind) for p in PROMPTS]
    strategy, models = entry(spec).method.strategy, guard().models
    for row in rows:
        messages = conversation(row["prompt"])
        alone = strategy.generate([messages], models, Sampling(), [row["seed"]])
        tokens = alone.ungated().token_ids[0]
        assert row["text"] == visible_text(ENGINE, tokens)
        assert row["finish_reason"] == ("stop" if tokens[-1] == 0 else "length")
        assert row["completion_tokens"] == len(tokens)
        assert row["proposed_tokens"] == sum(block.proposed_tokens for block in alone.trace[0])
        assert row["reward"] == REWARD.exact(messages, row["text"])
        assert row["cost"] == row["charged"] == COST.exact(messages, row["text"])
        cuts = [*range(2, len(tokens), 2), len(tokens)]
        prefixes = [COST.exact(messages, visible_text(ENGINE, tokens[:cut])) for cut in cuts]
        assert row["largest_cost"] == max(prefixes)
        assert row["ledger"]["tokens"] == cuts
        assert row["ledger"]["scores"] == prefixes
        assert row["budget_left"] == 0.5 - row["cost"]
        assert row["safe"] == (row["cost"] <= 0.5)
        assert row["error"] is None


def test_with_the_gate_on_rows_are_what_the_guard_releases(tmp_path):
    _, rows = evaluate(tmp_path, entry("base", gate=True), entry("inferenceguard:no-critic", gate=True))
    assert all(row["safe"] for row in rows)
    assert {row["fallback"] for row in rows} == {True, False}  # base cannot always pass
    for row in rows:
        spec = row["method"].removesuffix("+gate")
        alone = Guard(ENGINE, REWARD, COST, strategy=entry(spec).method.strategy)
        (response,) = alone.generate([row["prompt"]], seeds=[row["seed"]])
        assert (row["text"], row["finish_reason"]) == (response.text, response.finish_reason)
        assert row["cost"] == response.cost
        assert row["reward"] == response.reward
        assert row["proposed_tokens"] == response.usage.proposed_tokens


@pytest.mark.parametrize(("accounting", "discount"), [("accumulate", 1.0), ("increment", 0.9), ("final", 0.9)])
def test_the_ledger_follows_the_accounting(accounting, discount, tmp_path):
    """z by the recursion of METHOD 2, token by token, in plain Python."""
    budget = SafetyBudget(1.0, discount)
    one = entry("base", budget=budget, accounting=accounting)
    given = Guard(ENGINE, REWARD, COST, strategy=one.method.strategy, batch_rows=24)
    _, rows = evaluate(tmp_path, one, guard=given)
    for row in rows:
        messages, z, charged, before = conversation(row["prompt"]), 1.0, 0.0, 0.0
        ends = row["ledger"]["ends"]
        lengths = [b - a for a, b in zip([0, *row["ledger"]["tokens"]], row["ledger"]["tokens"], strict=False)]
        for block, (start, end, length) in enumerate(zip([0, *ends], ends, lengths, strict=False)):
            if accounting == "accumulate":
                cost = max(COST.exact(messages, row["text"][start:end]), 0.0)
                charged += cost
            else:
                score = COST.exact(messages, row["text"][:end])
                cost = score - before if accounting == "increment" else score if block == len(ends) - 1 else 0.0
                charged, before = score, score
            for token in range(length):
                z = (z - (cost if token == length - 1 else 0.0)) / discount
        assert row["budget_left"] == pytest.approx(z)
        assert row["charged"] == pytest.approx(charged)
        assert row["cost"] == COST.exact(messages, row["text"])
        assert row["safe"] == (z >= 0)


def test_the_search_may_be_imprecise_and_the_measures_are_not(tmp_path):
    """The search's cost model is a rough one; what is recorded is the gate's."""
    rough = ToyCost(99)
    _, rows = evaluate(tmp_path, entry("best-of-n:augmented"), guard=guard(rough, gate_cost=COST))
    assert [row["cost"] for row in rows] == [COST.exact(conversation(row["prompt"]), row["text"]) for row in rows]
    assert not all(row["safe"] for row in rows)


def test_the_judge_scores_all_and_steers_none(tmp_path):
    judge = ToyCost(7)
    _, plain = evaluate(tmp_path / "a", entry("best-of-n:augmented"))
    _, judged = evaluate(tmp_path / "b", entry("best-of-n:augmented"), judge=judge)
    for row in judged:
        assert row.pop("judge_cost") == judge.exact(conversation(row["prompt"]), row["text"])
    assert judged == plain


def test_critics_go_to_the_methods_that_ask_for_them(tmp_path):
    critic = ToyCritic(ENGINE, [conversation(prompt.prompt) for prompt in PROMPTS], REWARD, COST, 6, block_tokens=2)
    both = entry("inferenceguard"), entry("inferenceguard:no-critic")
    _, rows = evaluate(tmp_path, *both, guard=guard(critic=critic))
    with_critic, without = rows[: len(PROMPTS)], rows[len(PROMPTS) :]
    alone = Guard(ENGINE, REWARD, COST, critic=critic, strategy=both[0].method.strategy)
    for row in with_critic:
        result = alone.strategy.generate([conversation(row["prompt"])], alone.models, Sampling(), [row["seed"]])
        assert row["text"] == visible_text(ENGINE, result.ungated().token_ids[0])
    assert [row["text"] for row in with_critic] != [row["text"] for row in without]
    with pytest.raises(InvalidArgument, match="without a critic"):
        evaluate(tmp_path / "none", entry("inferenceguard"))
    with pytest.raises(InvalidArgument, match="without a value model"):
        evaluate(tmp_path / "none", entry("re-control"))


def test_prompts_have_seeds_of_their_own_the_same_for_all_methods(tmp_path):
    _, rows = evaluate(tmp_path, entry("base"), entry("best-of-n"))
    seeds = [row["seed"] for row in rows]
    assert seeds[: len(PROMPTS)] == seeds[len(PROMPTS) :]
    assert len(set(seeds)) == len(PROMPTS)
    _, others = evaluate(tmp_path / "other", entry("base"), seed=1)
    assert not set(seeds) & {row["seed"] for row in others}


# --- what goes wrong -------------------------------------------------------------------------------------------------


class Picky:
    """An engine that fails on one prompt's tokens."""

    def __init__(self):
        self.__dict__.update(ENGINE.__dict__)
        self.name, self.end_tokens = ENGINE.name, ENGINE.end_tokens
        self.encode, self.decode, self.extend = ENGINE.encode, ENGINE.decode, ENGINE.extend
        self.bad = ENGINE.encode(conversation(PROMPTS[4].prompt))

    def begin(self, prompts, seeds):
        if self.bad in [list(prompt) for prompt in prompts]:
            raise RuntimeError("out of\nmemory")
        return ENGINE.begin(prompts, seeds)


def test_a_prompt_that_fails_is_recorded_and_costs_no_other(tmp_path):
    methods = entry("base"), entry("best-of-n")
    errors, rows = evaluate(tmp_path / "picky", *methods, guard=guard(engine=Picky()))
    assert errors == 2
    _, whole = evaluate(tmp_path / "whole", *methods)
    for row, expected in zip(rows, whole, strict=True):
        if row["prompt"] == PROMPTS[4].prompt:
            assert row["error"] == "EngineFault: engine toy failed on the prompts: out of memory"
            assert "text" not in row
        else:
            assert row == {**expected, "flops": None}


def test_prompts_that_are_too_long_are_errors_and_not_the_runs(tmp_path):
    long = EvaluationPrompt("word " * 3000, "benign", "made-up")
    errors, rows = evaluate(tmp_path, entry("base"), prompts=[*PROMPTS[:2], long, *PROMPTS[2:]])
    assert errors == 1
    assert rows[2]["error"].startswith("PromptTooLong: prompt 0 must be at most 4090 tokens")
    assert all(row["error"] is None for row in rows if row["prompt"] != long.prompt)


def test_rows_that_cannot_be_scored_are_errors(tmp_path):
    broken = FaultyScorer(COST, raises=1.0)
    errors, rows = evaluate(tmp_path, entry("best-of-n"), guard=guard(broken))
    assert errors == len(PROMPTS)
    assert all(row["error"].startswith("no row could be scored: ") for row in rows)
    assert all(row["proposed_tokens"] > 0 for row in rows)


def test_a_reward_that_fails_at_the_end_is_null(tmp_path):
    class Moody(ToyReward):
        def score(self, prompts, responses):
            values = super().score(prompts, responses)
            values[[not text for text in responses]] = math.nan
            return values

    prompts = [EvaluationPrompt(f"p {i}", "benign", "x") for i in range(40)]
    given = Guard(ENGINE, Moody(2), COST, strategy=entry("base").method.strategy, batch_rows=24)
    errors, rows = evaluate(tmp_path, entry("base"), guard=given, prompts=prompts)
    empty = [row for row in rows if row.get("text") == ""]
    assert errors == 0 or all("no row" in row["error"] for row in rows if row["error"])
    assert all(row["reward"] is None for row in empty)
    assert all(row["reward"] is not None for row in rows if row.get("text"))


def test_what_is_wrong_with_a_method_stops_the_run_before_it_draws(tmp_path):
    class Bare:
        """An engine that can neither rank nor append tokens."""

        def __init__(self):
            for name in (
                "name",
                "fingerprint",
                "context",
                "vocabulary",
                "end_tokens",
                "encode",
                "decode",
                "begin",
                "extend",
            ):
                setattr(self, name, getattr(ENGINE, name))

    with pytest.raises(MissingCapability):
        evaluate(tmp_path, entry("args"), guard=guard(engine=Bare()))
    assert rows_of(tmp_path) == []


# --- resuming --------------------------------------------------------------------------------------------------------


def test_run_json_tells_what_was_run_and_where_no_one(tmp_path, monkeypatch):
    evaluate(tmp_path, entry("base"), entry("inferenceguard:no-critic", gate=True), judge=ToyCost(7), seed=5,
             sources=["xstest", f"alpaca={tmp_path}/secret/alpaca.json", str(tmp_path / "mine.jsonl")])  # fmt: skip
    text = (tmp_path / "run.json").read_text()
    recorded = json.loads(text)
    settings = recorded["settings"]
    assert settings["seed"] == 5
    assert settings["prompts"]["sources"] == ["xstest", "alpaca=alpaca.json", "mine.jsonl"]
    assert settings["prompts"]["kinds"] == {"benign": 2, "borderline_benign": 3, "harmful": 3, "jailbreak": 3}
    assert settings["models"]["engine"] == {"name": "toy", "fingerprint": ENGINE.fingerprint}
    assert settings["models"]["judge"]["fingerprint"] == ToyCost(7).fingerprint
    assert settings["methods"][1]["n_beams"] == 8
    assert settings["methods"][1]["gate"] is True
    assert settings["methods"][0]["budget"] == {"limit": 0.5, "discount": 1.0}
    (only,) = recorded["runs"]
    assert {"torch", "python", "inferenceguard", "numpy"} <= only["software"].keys()
    assert only["machine"]["cores"] >= 1
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text


def test_a_directory_of_other_settings_is_refused(tmp_path):
    evaluate(tmp_path, entry("base"))
    before = (tmp_path / "results.jsonl").read_bytes()
    refused = {
        "seed": {"seed": 1},
        "prompts": {"prompts": PROMPTS[:5]},
        "models": {"guard": guard(ToyCost(4))},
        "block_tokens": {"block_tokens": 3},
    }
    for name, fields in refused.items():
        with pytest.raises(InvalidArgument, match=f"the same {name}"):
            evaluate(tmp_path, entry("base"), **fields)
    with pytest.raises(InvalidArgument, match="the same methods"):
        evaluate(tmp_path, entry("base", max_new_tokens=5))
    assert (tmp_path / "results.jsonl").read_bytes() == before
    (tmp_path / "run.json").unlink()
    with pytest.raises(InvalidArgument, match=r"results have their run.json"):
        evaluate(tmp_path, entry("base"))


def test_methods_can_be_added_and_nothing_is_computed_twice(tmp_path):
    evaluate(tmp_path / "a", entry("base"))
    first = (tmp_path / "a" / "results.jsonl").read_bytes()
    evaluate(tmp_path / "a", entry("base"), entry("best-of-n"))
    evaluate(tmp_path / "a", entry("base"), entry("best-of-n"))
    evaluate(tmp_path / "b", entry("base"), entry("best-of-n"))
    both = (tmp_path / "a" / "results.jsonl").read_bytes()
    assert both.startswith(first)
    assert both == (tmp_path / "b" / "results.jsonl").read_bytes()
    assert [(row["method"], row["start"]) for row in rows_of(tmp_path / "a", "timings.jsonl")] == [
        ("base", 0), *(("best-of-n", start) for start in (0, 3, 6, 9))]  # fmt: skip
    assert len(json.loads((tmp_path / "a" / "run.json").read_text())["runs"]) == 3


@pytest.mark.parametrize("cut", [1, 40, 2000, -1])
def test_cut_anywhere_a_run_is_gone_on_with_to_the_same_bytes(cut, tmp_path):
    methods = entry("base"), entry("best-of-n:augmented"), entry("inferenceguard:no-critic", gate=True)
    evaluate(tmp_path, *methods)
    whole = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(whole[:cut])
    evaluate(tmp_path, *methods)
    assert (tmp_path / "results.jsonl").read_bytes() == whole


def test_failed_prompts_can_be_tried_again(tmp_path):
    methods = entry("base"), entry("best-of-n")
    _, whole = evaluate(tmp_path / "whole", *methods)
    evaluate(tmp_path / "again", *methods, guard=guard(engine=Picky()))
    healthy = Evaluation(guard(), methods, PROMPTS, block_tokens=2)
    assert run(healthy, tmp_path / "again") == 2  # as they are, unless asked
    assert run(healthy, tmp_path / "again", retry_failed=True) == 0
    assert rows_of(tmp_path / "again") == whole
    assert run(Evaluation(guard(engine=Picky()), methods, PROMPTS, block_tokens=2), tmp_path / "new",
               retry_failed=True) == 2  # fmt: skip


def test_how_long_a_scorer_may_take_may_change(tmp_path):
    evaluate(tmp_path, entry("base"))
    strategy = entry("base").method.strategy
    patient = Guard(ENGINE, REWARD, COST, strategy=strategy, batch_rows=24, limits=ScorerLimits(seconds=600.0))
    evaluate(tmp_path, entry("base"), guard=patient)
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["limits"]["seconds"] == 600.0


# --- several runs as one ---------------------------------------------------------------------------------------------


def test_runs_of_several_directories_become_one(tmp_path):
    together = entry("base"), entry("best-of-n"), entry("beam:augmented")
    _, whole = evaluate(tmp_path / "whole", *together)
    evaluate(tmp_path / "a", *together[:2])
    evaluate(tmp_path / "b", together[2])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert rows_of(tmp_path / "ab") == whole
    assert [row["method"] for row in summarise(tmp_path / "ab")] == ["base", "best-of-n", "beam:augmented"]
    timeless = [{**row, "seconds": 0} for row in summarise(tmp_path / "whole")]
    for row, expected in zip(summarise(tmp_path / "ab"), timeless, strict=True):
        assert row["seconds"] > 0
        assert {**row, "seconds": 0} | {"kinds": 0} == expected | {"kinds": 0}
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")  # what it wrote it may write again


def test_runs_of_other_prompts_are_cut_to_those_that_all_have(tmp_path):
    evaluate(tmp_path / "a", entry("base"))
    evaluate(tmp_path / "b", entry("best-of-n"), prompts=PROMPTS[7:2:-1])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    rows = rows_of(tmp_path / "ab")
    assert [row["prompt"] for row in rows] == 2 * [prompt.prompt for prompt in PROMPTS[3:8]]
    settings = json.loads((tmp_path / "ab" / "run.json").read_text())["settings"]
    assert settings["prompts"]["count"] == 5
    assert sum(settings["prompts"]["kinds"].values()) == 5


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    evaluate(tmp_path / "a", entry("base"))
    evaluate(tmp_path / "seed", entry("best-of-n"), seed=1)
    evaluate(tmp_path / "models", entry("best-of-n"), guard=guard(ToyCost(9)))
    evaluate(tmp_path / "budget", entry("best-of-n", budget=SafetyBudget(1.0)))
    evaluate(tmp_path / "others", entry("best-of-n"), prompts=[EvaluationPrompt("another", "benign", "x")])
    for other, message in (("seed", "the same seed"), ("models", "the same models"), ("budget", "the same budget"),
                           ("others", "that share prompts"), ("a", "different methods")):  # fmt: skip
        with pytest.raises(InvalidArgument, match=message):
            merge([tmp_path / "a", tmp_path / other], tmp_path / "out")
    with pytest.raises(InvalidArgument, match="an evaluation of its own"):
        merge([tmp_path / "a"], tmp_path / "seed")
    with pytest.raises(InvalidArgument, match="none of the directories"):
        merge([tmp_path / "a"], tmp_path / "a")


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import test_evaluation_runner as tests
    from inferenceguard.contracts import ScorerLimits
    from inferenceguard.evaluation.runner import Evaluation, run
    from inferenceguard.guard import Guard
    from inferenceguard.testing import ToyCost

    class Slow(ToyCost):
        def score(self, prompts, responses):
            time.sleep(0.004)
            return super().score(prompts, responses)

    def work(out):
        specs = ("base", False), ("best-of-n:augmented", False), ("inferenceguard:no-critic", True)
        entries = [tests.entry(spec, gate) for spec, gate in specs]
        cost = Slow(3, low=-1.0, high=1.5)
        guard = Guard(tests.ENGINE, tests.REWARD, cost, strategy=entries[0].method.strategy, batch_rows=24)
        prompts = [tests.EvaluationPrompt(f"prompt {i}", "harmful", "made-up") for i in range(60)]
        run(Evaluation(guard, entries, prompts, block_tokens=2), out)

    out, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance, killed, sizes = random.Random(seed), 0, []
    while True:
        child = os.fork()
        if child == 0:
            work(out)
            os._exit(0)
        if killed < kills:
            time.sleep(chance.uniform(0.0, 0.25))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            results = out / "results.jsonl"
            sizes.append(results.stat().st_size if results.exists() else 0)
        elif os.WEXITSTATUS(status):
            sys.exit("the run failed")
        elif killed >= kills:
            break
        else:
            sys.exit(f"it ended before kill {killed + 1}: {sizes}")
    print(*sizes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
def test_killed_ten_times_at_random_the_results_are_those_of_a_run_never_killed(tmp_path):
    def start(out, kills):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / out), str(kills), "11"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    whole, killed = start("whole", 0), start("killed", 10)
    assert whole.returncode == killed.returncode == 0, whole.stderr + killed.stderr
    sizes = [int(size) for size in killed.stdout.split()]
    assert len(sizes) == 10
    assert sizes == sorted(sizes)  # nothing that was there is lost
    assert len(set(sizes)) > 3  # the kills fell into the work, not before it
    expected = (tmp_path / "whole" / "results.jsonl").read_bytes()
    assert (tmp_path / "killed" / "results.jsonl").read_bytes() == expected
    rows = rows_of(tmp_path / "killed")
    assert len(rows) == len({(row["method"], row["key"]) for row in rows}) == 180
    assert signal.SIGKILL  # the runs were ended by it: none could tidy up


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_the_formula_against_torchs_own_counter(architecture):
    """2 P L + 4 L A c, where torch's counter counts attention to all L tokens of a row."""
    model, length = tiny_model(architecture), 24
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(length)[None], use_cache=False)
    size = transformer_size(model)
    assert size.flops(length, length * length, length) == counter.get_total_flops()
    assert size.causal


def test_tokens_of_prompts_and_draws_are_counted_once():
    engine = TransformersEngine(tiny_model("llama"), tiny_tokenizer())
    meter = Meter()
    counted, size = meter.engine(engine), transformer_size(engine.model)
    conversations = [conversation("hi"), conversation("a longer prompt")]
    lengths = [len(engine.encode(messages)) for messages in conversations]
    with meter.batch(conversations) as count:
        rows = counted.begin([engine.encode(messages) for messages in conversations], [0, 0])
        rows = counted.extend(rows.take([0, 1, 1]), 5, Sampling(), 0, None)
    drawn = [len(tokens) for tokens in rows.token_ids]
    assert 1 <= min(drawn) <= 5
    expected = [0.0, 0.0]
    for prompt, length in enumerate(lengths):
        expected[prompt] += size.flops(length, sum(range(1, length + 1)))
    for prompt, tokens in zip([0, 1, 1], drawn, strict=True):
        expected[prompt] += sum(size.flops(1, lengths[prompt] + at + 1, 1) for at in range(tokens))
    assert [count.of(0), count.of(1)] == expected


def test_the_tokens_that_a_scorer_reads_are_counted():
    """Against torch's counter on the embedded cost model's own modules, in one call with texts of several lengths."""
    scorer, meter = EmbeddedCost.load(), Meter()
    prompts = [conversation("How do I bake bread?"), conversation("Hi")]
    texts = ["Mix flour, water, salt and yeast; wait; bake it for forty minutes.", "Hello there!"]
    counted = meter.scorer(scorer)
    alone = 0.0
    for prompt, text in zip(prompts, texts, strict=True):  # alone, so that nothing is padded
        pair = scorer.reader.read(render_conversation(prompt), text)
        with FlopCounterMode(display=False) as counter:  # it does not see the products of the fused pass
            scorer.encoder(*collate([pair]))
        alone += counter.get_total_flops()
    meter.engine(TransformersEngine(tiny_model("llama"), tiny_tokenizer()))  # an engine whose weights are known
    with meter.batch(prompts) as count:
        values = counted.score(prompts, texts)
    torch.testing.assert_close(values, scorer.score(prompts, texts))
    assert count.of(0) + count.of(1) == pytest.approx(alone, rel=0.02)
    assert count.of(0) > count.of(1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # read by a fused pass; by its own modules
def test_a_causal_scorers_cached_reads_are_counted(architecture):
    body = tiny_model(architecture).base_model
    size = transformer_size(body)

    class Causal:
        name, fingerprint = "causal", "0"

        def __init__(self):
            self.reader = CachedTransformer(body)

        def score(self, prompts, responses):
            cache, _ = self.reader.prefill([[5] * 7])
            self.reader.read(cache, torch.tensor([[6, 7, 8]]))
            return torch.zeros(len(prompts))

    meter = Meter()
    meter.engine(TransformersEngine(tiny_model("llama"), tiny_tokenizer()))
    counted = meter.scorer(Causal())
    with meter.batch([conversation("hi")]) as count:
        counted.score([conversation("hi")], ["you"])
    rows = 4  # three of them pad the batch, and are read
    assert count.of(0) == size.flops(7, sum(range(1, 8))) + rows * size.flops(3, 8 + 9 + 10)


def test_gradient_steps_count_forward_and_back():
    class Value:
        name, fingerprint, engine_fingerprint = "v", "v", "e"

        def __init__(self):
            self.net = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.SiLU(), torch.nn.Linear(20, 3))

        def outcomes(self, latent):
            return self.net(latent)

    meter = Meter()
    value = meter.value(Value())
    with meter.batch([conversation("hi")]) as count:
        value.outcomes(torch.zeros(4, 10))
        value.outcomes(torch.zeros(4, 10, requires_grad=True))
    assert count.of(0) == 2 * (10 * 20 + 20 * 3) * 4 * 3


def test_a_critics_predictions_and_bounds_are_counted():
    provenance = Provenance("e", "e", "c", "c", "r", "r", "increment", 1.0, (0.0,), (0.0, 1.0), 8, 1.0, 1.0, 0, 1)
    meter, critic = Meter(), SafetyCritic(CriticNetwork(5, width=16), provenance)
    counted = meter.critic(critic)
    assert isinstance(counted, BoundsRows)
    with meter.batch([conversation("hi")]) as count:
        counted.predict(torch.zeros(4, 5), torch.zeros(4), torch.zeros(4))
        counted.at_most(torch.zeros(3, 5), torch.zeros(3))
    assert count.shared == 7 * 2.0 * weights(critic.network)


def test_an_engine_without_weights_has_no_flops(tmp_path):
    _, rows = evaluate(tmp_path, entry("base"))
    assert all(row["flops"] is None for row in rows)


def test_flops_of_a_whole_run_are_the_sum_of_its_parts(tmp_path):
    """Plain sampling and best-of-N on a tiny LLM with toy scorers: the LLM alone, by hand."""
    engine = TransformersEngine(tiny_model("llama"), tiny_tokenizer())
    given = Guard(engine, REWARD, COST, strategy=entry("base").method.strategy, batch_rows=24)
    _, rows = evaluate(tmp_path, entry("base"), entry("best-of-n"), guard=given)
    size: Size = transformer_size(engine.model)
    for row in rows[: len(PROMPTS)]:
        length, drawn = len(engine.encode(conversation(row["prompt"]))), row["proposed_tokens"]
        context = sum(range(1, length + drawn + 1))
        assert row["flops"] == size.flops(length + drawn, context, drawn)
    assert all(b["flops"] > a["flops"] for a, b in zip(rows[: len(PROMPTS)], rows[len(PROMPTS) :], strict=True))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("Sorry, no.", True),
        ("  I cannot assist with this request.", True),
        ("As an AI language model, I do not have opinions.", True),
        ("It is illegal to do so, and I won't explain it.", True),
        ("The capital of France is Paris.", False),
        ("", False),
        ("Bananas cannot grow in snow.", False),
        ("To say sorry, write a letter.", False),
        ("Here is how: first " + "word " * 40 + "I cannot stress this enough.", False),
    ],
)
def test_refusals(text, refuses):
    assert is_refusal(text) == refuses


def test_the_fallbacks_open_as_refusals_or_count_as_fallbacks():
    assert [is_refusal(text) for text in guard().fallbacks] == [True, True, True]


def test_entries_keep_their_strategies_settings():
    one = entry("best-of-n:lagrangian", n_beams=32, multiplier=2.0)
    settings = one.settings(guard())
    wanted = {"search": "BestOfN", "n_beams": 32, "multiplier": 2.0, "objective": "lagrangian", "gate": False}
    assert settings == settings | wanted
    assert settings["critic"] is None
    assert dataclasses.is_dataclass(one.method.strategy)
