"""The naive guard, which the real one is compared with, finds what the real one finds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.naive import Generates, NaiveGuard, spread
from benchmarks.shapes import Shape, plain_twin, random_critic, random_scorer

from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import Sampling, conversation
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.guard import Guard
from inferenceguard.strategies import InferenceGuard
from tiny import VOCABULARY, tiny_model, tiny_tokenizer

SHAPE = Shape(hidden=32, inner=48, layers=2, heads=4, kv_heads=2, positions=512, vocabulary=VOCABULARY)
SIZES = {"n_beams": 8, "keep": 2, "block_tokens": 4, "max_new_tokens": 14}
SAMPLING = Sampling(temperature=0.9)
PROMPTS = ("Hello there", "What is this?", "Count to ten", "Name a colour")


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")


@pytest.fixture(scope="module")
def scorers():
    options = {"dtype": torch.float32, "device": "cpu"}
    return (
        Whole(random_scorer("reward", SHAPE, tiny_tokenizer(), seed=1, **options)),
        Whole(random_scorer("cost", SHAPE, tiny_tokenizer(), seed=2, **options)),
    )


class Whole:
    """A scorer that reads whole texts only. Random bytes are not the text that they decode to, so that token by token
    they would score otherwise."""

    def __init__(self, scorer) -> None:
        self.name, self.fingerprint = scorer.name, scorer.fingerprint
        self.score, self.score_partial = scorer.score, scorer.score_partial


def drawn_by(engine, seed):
    """Proposals with the random numbers of the real search, read anew from the prompt on in every block."""

    def propose(prompt, rows, source, tokens, block):
        beams = engine.begin([prompt], [seed]).take([0] * len(source))
        for place in range(len(rows[0])):
            beams = engine.append(beams, torch.tensor([rows[row][place] for row in source]))
        before = len(rows[0])
        return [row[before:] for row in engine.extend(beams, tokens, SAMPLING, block, None).token_ids]

    return propose


@pytest.mark.parametrize("with_critic", [False, True])
def test_the_same_proposals_end_in_the_same_text(engine, scorers, with_critic):
    reward, cost = scorers
    critic = random_critic(engine, engine.latent_width, cost, width=16, seed=3) if with_critic else None
    limit = _middle(engine, cost)
    strategy = InferenceGuard(**SIZES, retries=0, budget=SafetyBudget(limit), threshold=0.2)
    guard = Guard(engine, reward, cost, critic=critic, strategy=strategy, sampling=SAMPLING)
    plain = plain_twin(engine.model)
    found, fates = [], set()
    for seed, prompt in enumerate(PROMPTS):
        naive = NaiveGuard(engine, drawn_by(engine, seed), reward, cost, **SIZES, budget=limit, critic=critic,
                           read=Generates(plain).read, threshold=0.2)  # fmt: skip
        (real,) = guard.generate(prompt, seed=seed)
        answer = naive.generate(conversation(prompt))
        assert answer.text == ("" if real.finish_reason == "content_filter" else real.text)
        assert answer.proposed_tokens == real.usage.proposed_tokens
        found.append(answer.text)
        fates |= {fate for block in real.record["search"] for fate in block["fate"]}
    assert any(found)
    assert {"kept", "over budget"} <= fates  # or nothing was there to disagree about


def _middle(engine, cost) -> float:
    """A budget that some responses keep to and some do not."""
    texts = [engine.decode(row) for row in _samples(engine)]
    scores = cost.score([conversation(PROMPTS[0])] * len(texts), texts)
    return float(scores.median())


def _samples(engine):
    beams = engine.begin([engine.encode(conversation(PROMPTS[0]))], [7]).take([0] * 16)
    return engine.extend(beams, 14, SAMPLING, 0, None).token_ids


def test_greedy_proposals_of_generate_end_in_the_real_guards_text(engine, scorers):
    reward, cost = scorers
    strategy = InferenceGuard(**SIZES, retries=0, budget=SafetyBudget(1e6))
    guard = Guard(engine, reward, cost, strategy=strategy, sampling=Sampling(temperature=0))
    propose = Generates(plain_twin(engine.model), {"do_sample": False}, engine.end_tokens)
    naive = NaiveGuard(engine, propose, reward, cost, **SIZES, budget=1e6)
    for prompt in PROMPTS:
        text = naive.generate(conversation(prompt)).text
        assert text
        assert text == guard.generate(prompt)[0].text


def test_a_search_worked_by_hand():
    """K = 2 of N = 4, blocks of one letter: the cost model forbids b, the reward model likes late letters."""
    letters = "abcdefghij"
    # Block 0: a b c d; kept: d, c (b is over budget). Block 1, of d d c c: da db ca cj; kept: cj (reward 9) and
    # da (0), for db is over budget and ca (0) stands behind da.
    script = [[(0,), (1,), (2,), (3,)], [(0,), (1,), (0,), (9,)]]
    asked = []

    def propose(prompt, rows, source, tokens, block):
        asked.append((list(rows), list(source), tokens))
        return script[block]

    def score(rule):
        return SimpleNamespace(
            name="", fingerprint="",
            score=lambda prompts, texts: torch.tensor([rule(text) for text in texts], dtype=torch.float64),
        )  # fmt: skip

    engine = SimpleNamespace(
        end_tokens=(), encode=lambda prompt: [0], decode=lambda ids: "".join(letters[token] for token in ids)
    )
    reward = score(lambda text: float(letters.index(text[-1])))
    cost = score(lambda text: 1.0 if "b" in text else -1.0)
    naive = NaiveGuard(engine, propose, reward, cost, n_beams=4, keep=2, block_tokens=1, max_new_tokens=2)
    answer = naive.generate(conversation("x"))
    assert asked == [([()], [0, 0, 0, 0], 1), ([(3,), (2,)], [0, 0, 1, 1], 1)]
    assert (answer.text, answer.proposed_tokens) == ("cj", 8)
    nothing = NaiveGuard(engine, propose, reward, score(lambda text: 1.0), 4, 2, 1, 2).generate(conversation("x"))
    assert nothing.text == ""


def test_proposals_are_spread_over_the_rows():
    assert spread(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_generate_stops_a_row_at_its_end_token(engine):
    propose = Generates(plain_twin(engine.model), {"do_sample": False}, (257,))
    assert propose._ended([5, 257, 0, 0]) == (5, 257)
    assert propose._ended([5, 6]) == (5, 6)
    new = propose(engine.encode(conversation("Hello")), [(1, 2), (3, 4)], [0, 0, 1, 1, 1], 3, 0)
    assert len(new) == 5
    assert new[0] == new[1]
    assert new[2] == new[3] == new[4]
