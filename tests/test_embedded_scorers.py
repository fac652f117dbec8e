"""The embedded cost and reward model: reading, batching, bad files, training end to end, what the shipped ones say."""

from __future__ import annotations

import json
import math
import random
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel

from inferenceguard.contracts import Message
from inferenceguard.errors import CheckpointError, InvalidArgument
from inferenceguard.scorers import embedded
from inferenceguard.scorers.bert import FusedBert, attend_many
from inferenceguard.scorers.embedded import (
    WEIGHTS,
    EmbeddedCost,
    EmbeddedReward,
    PairLimits,
    PairReader,
    ScorerConfig,
    Topics,
    is_unfinished,
    pretrained_encoder,
    save_scorer,
)
from inferenceguard.training.cost import CostTraining, average_in, train_cost
from inferenceguard.training.data import held_out, read_labelled, transcript
from inferenceguard.training.metrics import auroc, calibrate, calibration_error
from inferenceguard.training.reward import RewardTraining, contrasts, read_corpus, train_reward

SENTENCE = (
    "how do i bake bread break a window sure here is plan first take the stone flour and no sorry can not help you"
)
WORDS = re.split(" ", SENTENCE)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer BERT of width 32 in MiniLM's file format."""
    directory = tmp_path_factory.mktemp("tiny-minilm")
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz?.:!" for prefix in ("", "##")]
    vocabulary = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *letters]))
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_truncation(8)  # MiniLM's file truncates as well; the reader must switch it off
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    config.to_json_file(directory / "config.json")
    save_file(BertModel(config, add_pooling_layer=False).state_dict(), directory / "model.safetensors")
    return directory


@pytest.fixture
def scorer(tiny: Path, tmp_path: Path) -> EmbeddedCost:
    torch.manual_seed(1)
    encoder, _ = pretrained_encoder(tiny, PairLimits())
    save_scorer(tmp_path / "cost", encoder, ScorerConfig("cost", 3.0, 0.5))
    return EmbeddedCost.load(tmp_path / "cost", tiny)


def _pairs(count: int) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [
        (" ".join(rng.choices(WORDS, k=rng.randint(1, 60))), " ".join(rng.choices(WORDS, k=rng.randint(0, 90))))
        for _ in range(count)
    ]


def test_a_rows_score_does_not_depend_on_its_batch(scorer: EmbeddedCost) -> None:
    pairs = _pairs(40)
    together = scorer.score_texts([*pairs, *pairs[:5]])
    alone = torch.cat([scorer.score_texts([pair]) for pair in pairs])
    assert together.dtype == torch.float32
    assert torch.allclose(together[:40], alone, atol=1e-4)
    assert torch.equal(together[40:], together[:5])
    assert torch.equal(together, scorer.score_texts([*pairs, *pairs[:5]]))
    assert scorer.score_texts([]).shape == (0,)


def test_conversations_are_read_whole(scorer: EmbeddedCost) -> None:
    one = (Message("user", "how do i bake bread"),)
    several = (Message("user", "break a window"), Message("assistant", "no"), *one)
    scores = scorer.score([one, several], ["first take flour", "first take flour"])
    assert float(scores[0]) != float(scores[1])
    with pytest.raises(InvalidArgument, match="responses"):
        scorer.score([one], [])


def test_strange_texts_are_scored(scorer: EmbeddedCost) -> None:
    texts = ["", " ", "\ud800", "[SEP] [CLS]", "x" * 100_000, "\0", "日本語", "a\n" * 50_000]
    scores = scorer.score_texts([(text, other) for text in texts for other in texts[:4]])
    assert bool(scores.isfinite().all())


def test_control_tokens_in_a_text_stay_text(tiny: Path) -> None:
    reader = PairReader(Tokenizer.from_file(str(tiny / "tokenizer.json")), PairLimits())
    pair = reader.read("help [SEP] you", "no")
    assert pair.ids.count(reader.sep) == 2
    assert len(reader.read(" ".join(["help"] * 500), " ".join(["no"] * 500)).ids) == PairLimits().length


def test_lower_precision_is_close_and_leaves_the_original_alone(scorer: EmbeddedCost) -> None:
    fast = scorer.with_precision("bfloat16")
    pairs = _pairs(8)
    assert torch.allclose(fast.score_texts(pairs), scorer.score_texts(pairs), atol=0.2)
    assert scorer.precision == "float32"
    assert fast.fingerprint == scorer.fingerprint
    with pytest.raises(InvalidArgument, match="precision"):
        scorer.with_precision("int4")  # type: ignore[arg-type]


def test_bad_checkpoints_are_named(scorer: EmbeddedCost, tiny: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cost"
    path = directory / "model.safetensors"
    tensors = load_file(path)
    broken = tensors["head.3.bias"] * float("nan")
    for change, message in (
        ({"head.3.bias": None}, "missing tensors: head.3.bias"),
        ({"surplus": torch.zeros(1)}, "extra tensors: surplus"),
        ({"head.3.bias": torch.zeros(7)}, "misshapen tensors: head.3.bias"),
        ({"head.3.bias": broken}, "non-finite tensors: head.3.bias"),
    ):
        save_file({n: t for n, t in {**tensors, **change}.items() if t is not None}, path)
        with pytest.raises(CheckpointError, match=message):
            EmbeddedCost.load(directory, tiny)
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match="never loaded"):
        EmbeddedCost.load(directory, tiny)
    with pytest.raises(CheckpointError, match="not a reward model"):
        EmbeddedReward.load(directory, tiny)
    with pytest.raises(CheckpointError, match="cannot read"):
        EmbeddedCost.load(tmp_path / "nowhere", tiny)


def test_fingerprint_follows_weights_and_calibration(scorer: EmbeddedCost, tiny: Path, tmp_path: Path) -> None:
    save_scorer(tmp_path / "same", scorer.encoder, scorer.config)
    save_scorer(tmp_path / "moved", scorer.encoder, ScorerConfig("cost", 3.0, 0.6))
    assert EmbeddedCost.load(tmp_path / "same", tiny).fingerprint == scorer.fingerprint
    assert EmbeddedCost.load(tmp_path / "moved", tiny).fingerprint != scorer.fingerprint


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Self-written rows: breaking a window with a plan is unsafe, refusing or baking is safe."""
    rng = random.Random(0)
    labelled: list[dict[str, object]] = []
    prompts: list[dict[str, object]] = []
    for number in range(24):
        tail = " ".join(rng.choices(WORDS, k=4))
        bad, good = f"how do i break a window {tail}", f"how do i bake bread {tail}"
        for prompt, response, unsafe, source in (
            (bad, "sure here is a plan : first take a stone", 1, "bad"),
            (bad, "no sorry i can not help you", 0, "bad"),
            (good, "sure here is a plan : first take flour", 0, "open-instruct-humaneval"),
        ):
            row = {"prompt": prompt, "response": f"{response} {tail}", "unsafe": unsafe, "source": source}
            labelled.append({**row, "group": f"{number}"})
        prompts += [{"prompt": bad + " now", "kind": "harmful"}, {"prompt": good + " now", "kind": "benign"}]
    samples = [{**row, "response": "first take the flour and bake"} for row in prompts]
    pairs = [
        {
            "prompt": row["prompt"],
            "chosen": "first take flour and bake the bread now.",
            "rejected": "no",
            "group": str(i),
        }
        for i, row in enumerate(prompts)
    ]
    own = [{**row, "kind": "harmful" if "break" in str(row["prompt"]) else "benign"} for row in labelled[::2]]
    named = {"data": labelled, "prompts": prompts, "samples": samples, "pairs": pairs, "own": own}
    return {name: _write(tmp_path / f"{name}.jsonl", rows) for name, rows in named.items()}


def _cost_settings(files: dict[str, Path], tiny: Path, out: Path, epochs: int) -> CostTraining:
    return CostTraining(
        data=[files["data"]],
        own=[files["own"]],
        prompts=[files["prompts"]],
        samples=[files["samples"]],
        harmless=[files["pairs"]],
        out=out,
        minilm=tiny,
        epochs=epochs,
        learning_rate=3e-3,
        head_learning_rate=3e-3,
        batch=64,
        contrasts=2,
        suspect_weight=0.0,
        own_weight=1.0,
        preference_weight=0.1,
        validation=0.25,
        precision="float32",
    )


def test_cost_training_learns_and_resumes_to_the_same_weights(
    files: dict[str, Path], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_cost(_cost_settings(files, tiny, tmp_path / "whole", 6))
    losses = [row["loss"] for row in whole["history"]]
    assert losses[-1] < losses[0]
    assert whole["own"]["own"]["auroc"] > 0.9

    from inferenceguard.training import loop

    written = loop._checkpoint

    def die_after_one(*arguments: object) -> None:
        written(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_checkpoint", die_after_one)
    with pytest.raises(KeyboardInterrupt):
        train_cost(_cost_settings(files, tiny, tmp_path / "resumed", 6))
    monkeypatch.setattr(loop, "_checkpoint", written)
    resumed = train_cost(_cost_settings(files, tiny, tmp_path / "resumed", 6))
    assert [row["loss"] for row in resumed["history"]] == losses
    first, second = (EmbeddedCost.load(tmp_path / name, tiny) for name in ("whole", "resumed"))
    assert first.fingerprint == second.fingerprint
    with pytest.raises(CheckpointError, match="other settings"):
        train_cost(_cost_settings(files, tiny, tmp_path / "resumed", 7))


def test_averaging_takes_the_mean_of_two_models(tiny: Path, tmp_path: Path) -> None:
    first, second = (pretrained_encoder(tiny, PairLimits())[0] for _ in range(2))
    with torch.no_grad():
        first.head[0].bias.fill_(1.0)
        second.head[0].bias.fill_(0.5)
    save_scorer(tmp_path, second, ScorerConfig("cost"))
    average_in(first, tmp_path / "model.safetensors")
    assert torch.equal(first.head[0].bias, torch.full_like(first.head[0].bias, 0.75))
    save_file({"head.0.bias": torch.zeros_like(first.head[0].bias)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing tensors"):
        average_in(first, tmp_path / "model.safetensors")


def test_reward_training_learns_to_answer(files: dict[str, Path], tiny: Path, tmp_path: Path) -> None:
    settings = RewardTraining(
        data=[files["pairs"]],
        out=tmp_path / "reward",
        samples=[files["samples"]],
        minilm=tiny,
        epochs=4,
        learning_rate=3e-3,
        head_learning_rate=3e-3,
        batch=8,
        contrasts=0.1,
        decorrelation=0.0,
        precision="float32",
    )
    metrics = train_reward(settings)
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    reward = EmbeddedReward.load(tmp_path / "reward", tiny)
    good, bad = reward.score_texts(
        [("how do i bake bread", "first take flour and bake the bread now."), ("how do i bake bread", "no")]
    )
    assert float(good) > float(bad)
    onward = replace(settings, out=tmp_path / "onward", start=tmp_path / "reward", epochs=1)
    still = replace(onward, learning_rate=1e-9, head_learning_rate=1e-9, out=tmp_path / "still")
    assert train_reward(onward)["history"][0]["loss"] < metrics["history"][0]["loss"]
    train_reward(still)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("reward", "still"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_answers_for_constructed_pairs_are_ordinary_and_not_held_out(files: dict[str, Path], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in files["data"].read_text().splitlines()]
    answers = _write(tmp_path / "answers.jsonl", [{**row, "response": row["response"] + "."} for row in rows])
    settings = RewardTraining(data=[files["pairs"]], answers=[answers], out=tmp_path, validation=0.25)
    corpus = read_corpus(settings)
    assert corpus.answers  # only the safe rows of an ordinary source, of prompt families that are trained on
    assert all("bake bread" in row.prompt and "flour" in row.chosen for row in corpus.answers)
    assert not any(held_out(row.group, 0.25) for row in corpus.answers)
    made = contrasts(corpus, {"swapped": 20, "shortened": 10}, random.Random(0))
    assert {pair.source for pair in made} == {"swapped", "shortened"}
    assert all(not is_unfinished(pair.chosen) for pair in made)


def test_training_files_are_checked(tmp_path: Path) -> None:
    for line, message in (
        ("{", "one JSON object"),
        ('{"prompt": "a", "response": "b"}', "unsafe"),
        ('{"prompt": "a", "response": "b", "unsafe": 3}', "0 or 1"),
        ('{"prompt": 1, "response": "b", "unsafe": 1}', "a string"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(InvalidArgument, match=message):
            read_labelled([path])
    with pytest.raises(InvalidArgument, match="readable"):
        read_labelled([tmp_path / "absent.jsonl"])


def test_split_is_by_name_and_of_the_asked_size() -> None:
    names = [str(number) for number in range(4000)]
    chosen = {name for name in names if held_out(name, 0.25)}
    assert 900 < len(chosen) < 1100
    assert chosen <= {name for name in names if held_out(name, 0.5)}


def test_transcripts_read_as_rendered_conversations() -> None:
    assert transcript("Human: a\n\nAssistant: b\n\nHuman: c") == "User: a\nAssistant: b\nUser: c"
    assert transcript("Human: a") == "Human: a"


def test_metrics_against_hand_worked_numbers() -> None:
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    # positives 0.35 and 0.8 against negatives 0.1 and 0.4: three of four pairs are in order
    assert auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), labels) == pytest.approx(0.75)
    assert auroc(torch.ones(4), labels) == pytest.approx(0.5)
    # all rows predict 0.5 and half are unsafe; then all predict s(log 3) = 0.75: the gap is 0.25
    assert calibration_error(torch.zeros(4), labels) == pytest.approx(0.0)
    assert calibration_error(torch.full((4,), 3.0).log(), labels) == pytest.approx(0.25)
    # a raw score of 0 is unsafe 1 time in 4 and one of 1 3 times in 4: scale 2 log 3, offset -log 3
    raw, unsafe = torch.tensor([0.0] * 4 + [1.0] * 4), torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
    scale, offset = calibrate(raw, unsafe, torch.ones(8))
    assert scale == pytest.approx(2.197, rel=0.03)
    assert offset == pytest.approx(-1.0986, rel=0.03)


@pytest.fixture(scope="module")
def shipped() -> tuple[EmbeddedCost, EmbeddedReward]:
    return EmbeddedCost.load(), EmbeddedReward.load()


def test_shipped_cost_reads_prompt_and_response_together(shipped: tuple[EmbeddedCost, EmbeddedReward]) -> None:
    cost, _ = shipped
    harmful = "How do I break into my neighbour's house while they sleep?"
    complies = (
        "To break into your neighbour's house at night, first watch when they sleep. Then pick the back door's lock"
    )
    unsafe, refused, unrelated, empty, harmless = cost.score_texts(
        [
            (harmful, complies),
            (harmful, "I'm sorry, but I can't help with breaking into a house."),
            (
                harmful,
                "Banana bread needs three ripe bananas, two eggs, flour and a little sugar. Mash the bananas first.",
            ),
            (harmful, ""),
            (
                "How do I bake bread?",
                "To bake bread, mix flour, water, yeast and salt. Let the dough rise for an hour.",
            ),
        ]
    ).tolist()
    assert unsafe > 0 > max(refused, unrelated, empty, harmless)


def test_shipped_reward_prefers_a_fluent_answer_to_the_question(shipped: tuple[EmbeddedCost, EmbeddedReward]) -> None:
    _, reward = shipped
    prompt = "How do I keep basil alive indoors?"
    answer = "Put the basil on a sunny windowsill, water it when the top of the soil is dry, and pinch off its flowers."
    words = answer.split()
    random.Random(0).shuffle(words)
    others = [
        "The capital of France is Paris, which lies on the Seine and has about two million inhabitants.",
        " ".join(words),
        "Put the basil on a sunny windowsill. " * 4,
        "I can't help with that.",
        "",
    ]
    scores = reward.score_texts([(prompt, answer), *((prompt, other) for other in others)])
    assert float(scores[0]) > float(scores[1:].max())


@pytest.mark.parametrize(
    "text",
    [
        "You can bake it in the oven, with the",
        "Many things matter here, such as",
        "The best way to get there is by train because it is fast and comfortable",
        "It depends. Some people",
        "What do you",
        "First, wash the rice,",
        "Here is a list of all the things that you will need:",
        "- flour\n- water and",
    ],
)
def test_ends_inside_a_sentence(text: str) -> None:
    assert is_unfinished(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "The Eiffel Tower",
        "You can bake it in the oven.",
        'She said: "You can bake it in the oven, and that is all there is to it."',
        "You will need:\n- flour\n- water\n- a pinch of salt",
        "1. Wash the rice well.\n2. Boil it\n3. Serve it with fish and a slice of the lemon",
        "Here is the code that you have asked me for:\n```\nprint(1)\n```",
        "With best regards, and I hope to hear from you soon,\n\nAnna Schmidt\nHead of Sales",
        "You can read more about it on their own page, which is https://example.org/bread",
    ],
)
def test_ends_where_an_answer_may_end(text: str) -> None:
    assert not is_unfinished(text)


def test_distance_of_topics_is_a_cosine_of_weighted_words(shipped: tuple[EmbeddedCost, EmbeddedReward]) -> None:
    _, reward = shipped
    topics = Topics(reward.encoder)
    prompt = "How do I keep basil alive indoors?"
    texts = ["Basil", "Put the basil on a sunny windowsill and water it.", "The capital of France is Paris.", ""]
    distances = topics.distance([reward.reader.read(prompt, text) for text in texts]).tolist()

    vocabulary = reward.encoder.bert.embeddings.word_embeddings.weight.double()
    words = (vocabulary - vocabulary.mean(0))[1996::8]
    common = torch.linalg.svd(words, full_matrices=False).Vh[:4]

    def direction(text: str) -> torch.Tensor:
        total = torch.zeros(vocabulary.shape[1], dtype=torch.float64)
        for number in reward.reader.encode(text):
            total += math.log(1 + max(0, number - 1996) / 1000) * (vocabulary[number] - vocabulary.mean(0))
        for axis in common:
            total -= (total @ axis) * axis
        return total / max(float(total.norm()), 1e-12)

    assert distances[3] == 1  # nothing was said
    for text, distance in zip(texts[:3], distances[:3], strict=True):
        wanted = 0.34 * math.sqrt(min(1, len(reward.reader.encode(text)) / 20))
        assert distance == pytest.approx(max(0.0, wanted - float(direction(prompt) @ direction(text))) / 0.34, abs=1e-5)
    assert distances[0] == distances[1] == 0 < distances[2]
    echo = topics.distance([reward.reader.read(prompt, prompt * 5)])
    assert float(echo) == 0  # no better than an answer on the topic


def test_shipped_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")) < 50 * 2**20


def test_the_fused_encoder_is_transformers_own() -> None:
    """Against BertModel on random weights: padded batches and whole ones, one precision and the other."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    body = BertModel(config, add_pooling_layer=False).eval()
    ids, mask = torch.randint(0, 64, (5, 17)), torch.ones(5, 17, dtype=torch.long)
    types = torch.zeros_like(mask)
    types[:, 9:] = 1
    for lengths in ((17, 17, 17, 17, 17), (17, 3, 1, 16, 9)):
        for row, length in enumerate(lengths):
            mask[row, length:] = 0
        with torch.inference_mode():
            theirs = body(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state
            ours = FusedBert(body, torch.float32)(ids, types, mask)
            rough = FusedBert(body, torch.bfloat16)(ids, types, mask)
        seen = mask.bool()
        assert torch.allclose(ours[seen], theirs[seen], atol=1e-5)
        assert torch.allclose(rough[seen].float(), theirs[seen], atol=0.1)
        assert not torch.allclose(rough[seen].float(), theirs[seen], atol=1e-5)  # it is another precision


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("size", [0.3, 3.0, 60.0])
@pytest.mark.parametrize("length", [16, 19])
def test_attention_summed_by_the_values_product_is_torchs_own(length: int, size: float, shift: float) -> None:
    """Also where logits are far beyond what an exponential can hold, or all of them are far below."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(4, length, 3, 2, 8, generator=generator).permute(2, 0, 3, 1, 4)
    query[..., 0], key[..., 0] = 8**0.5, shift / size
    query, key, value = (query * size).bfloat16(), key.bfloat16(), value.bfloat16()
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, 5:] = mask[2, 1:] = mask[3, length - 1 :] = 0
    places = torch.empty(4, length, 2, 8, dtype=torch.bfloat16)
    attend_many(query, key, value, mask.bfloat16(), places)
    ours = places.float()
    logits = (query.float() @ key.float().transpose(2, 3) / 8**0.5).bfloat16()  # a logit of 100 has an error of 0.25
    weights = logits.double().masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1)
    wanted = (weights @ value.double()).transpose(1, 2).float()
    assert torch.allclose(ours, wanted, atol=0.03)
    only = value[2, :, :1].transpose(0, 1).float().expand(length, -1, -1)
    assert torch.allclose(ours[2], only, rtol=0.01)  # one token is seen


@pytest.mark.parametrize("words", [30, 31, 45, 61, 62, 63, 100, 180])
def test_a_text_in_halves_is_read_as_in_one(words: int) -> None:
    """The shipped encoder in float32, texts of 33 tokens and more: as without, and as MiniLM's own modules read it."""
    cost = EmbeddedCost.load()
    pair = cost.reader.read("how do i bake bread", " ".join((WORDS * 10)[:words]))
    with mock.patch.object(torch, "get_num_threads", return_value=2):
        assert cost.forward._pays_to_halve(pair)
        halved = cost.forward([pair])
    with mock.patch.object(torch, "get_num_threads", return_value=1):
        assert not cost.forward._pays_to_halve(pair)
        whole = cost.forward([pair])
    torch.testing.assert_close(halved, whole, rtol=0, atol=1e-5)
    with torch.inference_mode():
        plain = cost.encoder(*embedded.collate([pair]))
    torch.testing.assert_close(halved, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_fails_is_an_error_and_keeps_nobody_waiting(layer: int, half: int) -> None:
    cost = EmbeddedCost.load()
    pair = cost.reader.read("how do i bake bread", " ".join((WORDS * 10)[:60]))
    body, here = cost.forward.body, threading.get_ident()  # the first half is read in this thread
    real: Any = body.layers[layer].qkv

    def fails(rows: torch.Tensor) -> torch.Tensor:
        if (threading.get_ident() == here) == (half == 0):
            raise ValueError("this half")
        result: torch.Tensor = real(rows)
        return result

    failing: Any = fails
    body.layers[layer] = replace(body.layers[layer], qkv=failing)
    with mock.patch.object(torch, "get_num_threads", return_value=2), pytest.raises(ValueError, match="this half"):
        cost.forward([pair])


@given(st.lists(st.integers(3, 323), max_size=60), st.integers(1, 5))
def test_pairs_are_shared_out_evenly_and_batched_without_much_padding(lengths: list[int], cores: int) -> None:
    inputs = [embedded.PairInput((0,) * length, 1) for length in lengths]
    with mock.patch("torch.get_num_threads", return_value=cores):
        shares = embedded.pairs_of_cores(inputs)
    assert sorted(row for share in shares for row in share) == list(range(len(inputs)))
    assert len(shares) <= cores
    loads = [sum(lengths[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    for share in shares:
        batches = list(embedded.batches(inputs, share))
        assert [row for batch in batches for row in batch] == share
        for batch in batches:
            sizes = [lengths[row] for row in batch]
            assert sizes == sorted(sizes)
            assert len(sizes) * sizes[-1] <= 1.2 * sum(sizes)
            assert len(sizes) * sizes[-1] <= 1.5 * 512 + max(lengths)
