"""`model.generate(..., custom_generate=guarded_generate(...))` against transformers' own `generate` and `Guard`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import T5Config, T5ForConditionalGeneration, TextStreamer
from transformers.cache_utils import DynamicCache
from transformers.generation import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from inferenceguard import Guard, InferenceGuard, SafetyBudget, Sampling
from inferenceguard.chat import encode_text
from inferenceguard.embedded import load_engine
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.errors import InvalidArgument, PromptTooLong, UnsupportedModel
from inferenceguard.guard import FALLBACKS
from inferenceguard.integrations import GuardedGenerate, guarded_generate
from inferenceguard.scorers import FunctionScorer
from tiny import ARCHITECTURES, BEGIN, END, UNKNOWN, tiny_model, tiny_tokenizer

PROMPTS = ["hello there, you", "hi"]
STRATEGY = InferenceGuard(n_beams=4, keep=2, block_tokens=3)
Score = Callable[[list[str], list[str]], list[float]]


def nothing(prompts: list[str], texts: list[str]) -> list[float]:
    return [0.0] * len(texts)


def capitals(prompts: list[str], texts: list[str]) -> list[float]:
    return [sum(letter.isupper() for letter in text) / max(1, len(text)) - 0.1 for text in texts]


def length(prompts: list[str], texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def guarded(cost: Score = nothing, **settings: Any) -> GuardedGenerate:
    scorers = {"cost": FunctionScorer("cost", cost), "reward": FunctionScorer("length", length)}
    return guarded_generate(tokenizer(), **{"strategy": STRATEGY, **scorers, **settings})


def tokenizer() -> Any:
    tokens = tiny_tokenizer()
    tokens.pad_token, tokens.padding_side = "<|unknown|>", "left"
    return tokens


def ids(*texts: str) -> dict[str, torch.Tensor]:
    read = tokenizer()(list(texts), return_tensors="pt", padding=True)
    return {name: read[name] for name in ("input_ids", "attention_mask")}


def responses(inputs: dict[str, torch.Tensor], sequences: torch.Tensor) -> list[list[int]]:
    """Each row's new tokens, without what pads it."""
    assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    rows = [row[inputs["input_ids"].shape[1] :].tolist() for row in sequences]
    for row in rows:
        while row and row[-1] == UNKNOWN:
            row.pop()
    return rows


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_with_nothing_to_guard_greedy_ids_are_those_of_generate(family: str) -> None:
    inputs, generate = ids(*PROMPTS), guarded()
    plain = responses(inputs, tiny_model(family).generate(**inputs, max_new_tokens=12, do_sample=False))
    model = tiny_model(family)
    mine = responses(inputs, model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=generate))
    for theirs, ours in zip(plain, mine, strict=True):
        assert ours[-1:] == [END] or END not in theirs
        body = [token for token in ours if token != END]
        assert [token for token in theirs if token not in (BEGIN, UNKNOWN, END)][: len(body)] == body
        # no reader sees an incomplete character at the end: its bytes are left out
        assert tokenizer().decode(body) == tokenizer().decode(theirs, skip_special_tokens=True).rstrip("\ufffd")
    # and the model is as it was: its own generate still works, and gives what it gave
    assert responses(inputs, model.generate(**inputs, max_new_tokens=12, do_sample=False)) == plain


@pytest.mark.parametrize("seed", range(6))
def test_ids_are_of_the_text_that_the_guard_gives(seed: int) -> None:
    reward, cost = FunctionScorer("length", length), FunctionScorer("cost", capitals)
    strategy = InferenceGuard(4, 2, 3, 8)
    engine = TransformersEngine(tiny_model("llama"), tokenizer(), "tiny")
    sampling = Sampling(0.9, top_p=0.95, top_k=200)
    expected = Guard(engine, reward, cost, strategy=strategy, sampling=sampling).generate("be kind", seed=seed)[0]
    inputs = {"input_ids": torch.tensor([engine.encode(expected_prompt(expected))])}
    answer = tiny_model("llama").generate(
        **inputs, custom_generate=guarded(capitals), seed=seed, prompts=["be kind"], max_new_tokens=8, do_sample=True,
        temperature=0.9, top_p=0.95, top_k=200, return_dict_in_generate=True,
    )  # fmt: skip
    (mine,) = responses(inputs, answer.sequences)
    assert tokenizer().decode(mine, skip_special_tokens=True) == expected.text
    (response,) = answer.responses
    assert (response.text, response.cost, response.finish_reason) == (
        expected.text, expected.cost, expected.finish_reason
    )  # fmt: skip
    assert response.record["released"] == expected.record["released"]
    assert response.record["search"] == expected.record["search"]
    assert (mine[-1:] == [END]) == (expected.finish_reason != "length")


def expected_prompt(response: Any) -> Any:
    from inferenceguard.contracts import conversation

    return conversation(response.record["prompt"])


def test_the_embedded_llm_answers_as_through_the_guard() -> None:
    strategy = InferenceGuard(n_beams=4, keep=2, block_tokens=8, max_new_tokens=16)
    guard = Guard.from_preset("embedded", dtype="float32", critic=False, strategy=strategy)
    engine: Any = guard.models.engine
    messages = [{"role": "user", "content": "Name a colour."}]
    expected = guard.generate([messages], seed=5)[0]
    model = load_engine("float32").model
    generate = guarded_generate(engine.tokenizer, cost="embedded", reward="embedded", strategy=strategy)
    inputs = engine.tokenizer.apply_chat_template(
        [messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(
        **inputs, custom_generate=generate, prompts=[messages], seed=5, max_new_tokens=16, do_sample=True,
        temperature=guard.sampling.temperature, top_k=0, return_dict_in_generate=True,
    )  # fmt: skip
    answer = engine.decode(output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
    assert answer == expected.text != ""
    assert output.responses[0].record["released"] == expected.record["released"]


def test_left_padded_prompts_are_answered_as_alone(model: Any) -> None:
    generate = guarded(capitals)
    inputs = ids(*PROMPTS)
    assert bool((inputs["attention_mask"][1] == 0).any())
    settings: dict[str, Any] = {"custom_generate": generate, "seed": 3, "max_new_tokens": 9, "do_sample": True}
    together = responses(inputs, model.generate(**inputs, **settings))
    for text, row in zip(PROMPTS, together, strict=True):
        alone = ids(text)
        assert responses(alone, model.generate(**alone, **settings)) == [row]
    assert together[0] != together[1]


def test_sequences_of_one_prompt_have_seeds_of_their_own(model: Any) -> None:
    inputs, generate = ids(*PROMPTS), guarded()
    settings: dict[str, Any] = {"custom_generate": generate, "max_new_tokens": 6, "do_sample": True}
    several = responses_of(model.generate(**inputs, **settings, seed=7, num_return_sequences=3), inputs)
    for number in range(3):
        once = responses_of(model.generate(**inputs, **settings, seed=7 + number), inputs)
        assert [several[number], several[3 + number]] == once
    assert len({tuple(row) for row in several}) == 6


def responses_of(sequences: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    copies = len(sequences) // len(inputs["input_ids"])
    return responses({"input_ids": inputs["input_ids"].repeat_interleave(copies, 0)}, sequences)


def test_without_a_seed_torchs_generator_decides(model: Any) -> None:
    inputs, generate, found = ids("hi"), guarded(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sequences = model.generate(**inputs, custom_generate=generate, max_new_tokens=8, do_sample=True)
        found.append(sequences.tolist())
    assert found[0] == found[1] != found[2]


def test_top_k_of_one_is_greedy(model: Any) -> None:
    inputs, generate = ids("hi"), guarded()
    greedy = model.generate(**inputs, custom_generate=generate, max_new_tokens=8, do_sample=False)
    drawn = model.generate(**inputs, custom_generate=generate, max_new_tokens=8, do_sample=True, top_k=1)
    assert torch.equal(greedy, drawn)


# --- the gate --------------------------------------------------------------------------------------------------------


def only_fallbacks(prompts: list[str], texts: list[str]) -> list[float]:
    return [-1.0 if text == FALLBACKS[1] else 1.0 for text in texts]


def test_over_budget_the_fallback_leaves_whole(model: Any) -> None:
    inputs = ids(*PROMPTS)
    output = model.generate(
        **inputs, custom_generate=guarded(only_fallbacks), max_new_tokens=4, do_sample=True, seed=1,
        return_dict_in_generate=True,
    )  # fmt: skip
    expected = [*FALLBACKS[1].encode(), END]  # longer than 4 tokens
    read = [*encode_text(tokenizer(), FALLBACKS[1]), END]
    assert tokenizer().decode(read, skip_special_tokens=True).encode() == bytes(expected[:-1])
    assert responses(inputs, output.sequences) == [read, read]
    assert [answer.finish_reason for answer in output.responses] == ["content_filter"] * 2
    assert [answer.budget_left for answer in output.responses] == [1.0, 1.0]


def test_where_no_fallback_is_within_budget_nothing_leaves(model: Any) -> None:
    inputs = ids("hi")
    sequences = model.generate(**inputs, custom_generate=guarded(nothing, budget=-1), max_new_tokens=4, do_sample=True)
    assert responses(inputs, sequences) == [[END]]


def test_a_cost_model_that_fails_lets_nothing_of_the_model_through(model: Any) -> None:
    def broken(prompts: list[str], texts: list[str]) -> list[float]:
        raise RuntimeError("no scores today")

    inputs = ids("hi")
    output = model.generate(
        **inputs, custom_generate=guarded(broken), max_new_tokens=4, do_sample=True, return_dict_in_generate=True
    )
    assert output.responses[0].text == FALLBACKS[0]
    assert output.responses[0].cost is None
    assert responses(inputs, output.sequences) == [[*encode_text(tokenizer(), FALLBACKS[0]), END]]


@pytest.mark.parametrize("seed", range(4))
def test_what_leaves_is_within_budget_by_its_own_ids(model: Any, seed: int) -> None:
    """Scored here, from the ids, by the plain function."""
    inputs = ids(*PROMPTS)
    limit = -0.08
    generate = guarded(capitals, budget=limit)
    output = model.generate(
        **inputs, custom_generate=generate, max_new_tokens=12, do_sample=True, num_return_sequences=4, seed=10 * seed,
        return_dict_in_generate=True,
    )  # fmt: skip
    rows = responses_of(output.sequences, inputs)
    for row, answer in zip(rows, output.responses, strict=True):
        text = tokenizer().decode(row, skip_special_tokens=True)
        assert text == answer.text
        assert capitals([""], [text])[0] <= limit
        assert answer.budget == limit
    free = model.generate(**inputs, max_new_tokens=12, do_sample=True, num_return_sequences=16, top_k=0)
    costs = capitals([""] * 32, [tokenizer().decode(r, skip_special_tokens=True) for r in responses_of(free, inputs)])
    assert max(costs) > limit, "or the budget would not bind"


def test_control_tokens_do_not_leave() -> None:
    """The gate scores the text without them; a caller may decode with them, or feed the ids back."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[BEGIN] *= 6  # drawn often
    inputs, settings = ids("hi"), {"max_new_tokens": 16, "do_sample": True, "num_return_sequences": 8, "top_k": 0}
    torch.manual_seed(0)
    free = responses_of(model.generate(**inputs, **settings), inputs)
    assert any(BEGIN in row for row in free)
    output = model.generate(**inputs, **settings, custom_generate=guarded(), seed=0, return_dict_in_generate=True)
    for row, answer in zip(responses_of(output.sequences, inputs), output.responses, strict=True):
        assert not {BEGIN, UNKNOWN} & set(row)
        assert END not in row[:-1]
        assert tokenizer().decode(row, skip_special_tokens=True) == answer.text
    shorter = zip(responses_of(output.sequences, inputs), output.responses, strict=True)
    assert any(answer.usage.completion_tokens > len(row) for row, answer in shorter), "none was drawn"


def test_scorers_read_the_decoded_prompt_or_the_one_given(model: Any) -> None:
    seen: set[str] = set()

    def watch(prompts: list[str], texts: list[str]) -> list[float]:
        seen.update(prompts)
        return [0.0] * len(texts)

    generate, inputs = guarded(watch), ids(*PROMPTS)
    model.generate(**inputs, custom_generate=generate, max_new_tokens=3, do_sample=True)
    assert seen == set(PROMPTS)
    seen.clear()
    given: list[Any] = ["one", [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}]]
    model.generate(
        **inputs, custom_generate=generate, prompts=given, max_new_tokens=3, do_sample=True, num_return_sequences=2
    )
    assert seen == {"one", "System: s\nUser: two"}


def test_end_tokens_are_those_of_the_call(model: Any) -> None:
    inputs, generate = ids("hi"), guarded()
    free = responses(inputs, model.generate(**inputs, max_new_tokens=10, do_sample=False))[0]
    end = free[3]
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": [end, END]}
    theirs = responses(inputs, model.generate(**inputs, **settings))
    assert responses(inputs, model.generate(**inputs, **settings, custom_generate=generate)) == theirs
    assert theirs[0][-1] == end
    assert len(theirs[0]) < len(free)


def test_weights_that_change_are_noticed() -> None:
    model, generate, inputs = tiny_model("qwen3"), guarded(), ids("hi")
    settings: dict[str, Any] = {"custom_generate": generate, "max_new_tokens": 8, "do_sample": True, "seed": 1}
    before = model.generate(**inputs, **settings)
    engine: Any = generate._loaded
    model.generate(**inputs, **settings)
    assert generate._loaded is engine, "the same weights need no other engine"
    model.load_state_dict(tiny_model("qwen3", seed=9).state_dict())
    after = model.generate(**inputs, **settings)
    other = tiny_model("qwen3", seed=9)
    assert torch.equal(after, other.generate(**inputs, **{**settings, "custom_generate": guarded()}))
    assert not torch.equal(after, before)


# --- what is refused -------------------------------------------------------------------------------------------------


class Mine(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "num_beams"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
    ({"do_sample": True, "min_p": 0.1}, "MinPLogitsWarper"),
    ({"min_new_tokens": 2}, "Min(New)?(Tokens)?Length"),
    ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
    ({"guidance_scale": 2.0}, "ClassifierFreeGuidance"),
    ({"prefix_allowed_tokens_fn": lambda batch, tokens: [5]}, "PrefixConstrained"),
    ({"logits_processor": LogitsProcessorList([Mine()])}, "Mine"),
    ({"do_sample": True, "logits_processor": LogitsProcessorList([TopKLogitsWarper(5), TemperatureLogitsWarper(0.5)])},
     "in this order"),
    ({"do_sample": True, "logits_processor": LogitsProcessorList([TopKLogitsWarper(5, filter_value=-9.0)])}, "TopK"),
    ({"max_time": 5.0}, "MaxTimeCriteria"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    ({"streamer": TextStreamer(tiny_tokenizer())}, "streamer"),
    ({"synced_gpus": True}, "synced_gpus"),
    ({"past_key_values": DynamicCache()}, "past_key_values"),
    ({"position_ids": torch.tensor([[4, 5]])}, "position_ids"),
    ({"attention_mask": torch.tensor([[1, 0]])}, "attention_mask"),
    ({"attention_mask": torch.tensor([[0, 0]])}, "attention_mask"),
    ({"output_router_logits": True}, "output_router_logits"),
    ({"seed": -1}, "seed"),
    ({"prompts": "one text"}, "prompts"),
    ({"prompts": ["one", "too many"]}, "prompts"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_honoured_is_refused_by_name(model: Any, settings: Any, said: str, no_draws: None) -> None:
    with pytest.raises(InvalidArgument, match=said):
        model.generate(**{**ids("hi"), **settings}, custom_generate=guarded(), max_new_tokens=4)


@pytest.fixture
def no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*arguments: Any) -> None:
        raise AssertionError("a prompt was read")

    monkeypatch.setattr(TransformersEngine, "begin", begin)


def test_an_assistant_is_refused(model: Any, no_draws: None) -> None:
    with pytest.raises(InvalidArgument, match="assistant_model"):
        model.generate(
            **ids("hi"), custom_generate=guarded(), max_new_tokens=4, assistant_model=tiny_model("llama", seed=1)
        )


def test_embeddings_are_refused(model: Any, no_draws: None) -> None:
    embeddings = model.get_input_embeddings()(ids("hi")["input_ids"])
    with pytest.raises(InvalidArgument, match="inputs_embeds"):
        model.generate(inputs_embeds=embeddings, custom_generate=guarded(), max_new_tokens=4)


def test_a_prompt_without_text_needs_one_for_the_scorers(model: Any) -> None:
    begin = {"input_ids": torch.tensor([[BEGIN]])}
    with pytest.raises(InvalidArgument, match=r"prompts=\[\.\.\.\]"):
        model.generate(**begin, custom_generate=guarded(), max_new_tokens=4)
    sequences = model.generate(**begin, custom_generate=guarded(), prompts=["go"], max_new_tokens=4, do_sample=True)
    assert sequences.shape[1] > 1


def test_a_prompt_that_leaves_no_room_is_refused(model: Any, no_draws: None) -> None:
    with pytest.raises(PromptTooLong, match="context 256"):
        model.generate(**ids("x" * 250), custom_generate=guarded(), max_new_tokens=7)


def test_a_model_in_training_is_refused(no_draws: None) -> None:
    with pytest.raises(InvalidArgument, match="evaluation mode"):
        tiny_model("llama").train().generate(**ids("hi"), custom_generate=guarded(), max_new_tokens=4)


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(
        vocab_size=259, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=END, pad_token_id=UNKNOWN,
    )  # fmt: skip
    model: Any = T5ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        model.generate(**ids("hi"), custom_generate=guarded(), max_new_tokens=4)


def test_fallbacks_that_the_tokenizer_cannot_write_are_refused() -> None:
    lower = tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    scorer = FunctionScorer("nothing", nothing)
    with pytest.raises(InvalidArgument, match="fallbacks must be texts that the tokenizer gives back"):
        guarded_generate(lower, cost=scorer, reward=scorer)
    guarded_generate(lower, cost=scorer, reward=scorer, fallbacks=["sorry."])


def test_the_budget_is_that_of_the_strategy_unless_given() -> None:
    strategy = InferenceGuard(4, 2, 3, budget=SafetyBudget(2.0, 0.9))
    assert guarded(strategy=strategy).settings["strategy"].budget == SafetyBudget(2.0, 0.9)
    assert guarded(strategy=strategy, budget=1).settings["strategy"].budget == SafetyBudget(1.0, 0.9)
