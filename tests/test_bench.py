"""The benchmark: its arithmetic by hand, its file, and runs of its own code at tiny sizes."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench, rivals
from benchmarks.entries import ENTRIES, SAMPLING, Lab, auto_keeps, draw, held_bytes, long_prompt, without_end
from benchmarks.gpu import GPU_ENTRIES, Rig, Sizes
from benchmarks.measure import Bar, Ratio, Rounds, Row, Skipped, in_turn, judged, read_rows, updated, write_rows
from benchmarks.prompts import HARMLESS, MANY, harmful
from benchmarks.shapes import TOY, random_critic

from inferenceguard.contracts import conversation
from inferenceguard.engines.transformers import STATE, TransformersEngine
from inferenceguard.guard import Guard
from tiny import VOCABULARY, tiny_model, tiny_tokenizer

KEYS = ["name", "ratio", "bar", "holds", "spread", "baseline", "settings"]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(tiny_model("llama"), tiny_tokenizer(), name="tiny")


# --- arithmetic ------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while something runs."""

    def __init__(self) -> None:
        self.now, self.ran = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: list[float]):
        left = iter(seconds)

        def run() -> None:
            self.ran.append(name)
            self.now += next(left)

        return name, run


def test_a_ratio_is_the_median_over_pairs_and_its_spread_their_least_and_largest():
    ratio = Ratio.of([6.0, 8.0, 10.0], [2.0, 4.0, 2.0])  # 3, 2, 5
    assert (ratio.value, ratio.spread, ratio.pairs) == (3.0, (2.0, 5.0), 3)
    assert Ratio.of([6.0, 8.0], [2.0, 4.0]).value == 2.5
    # 80 s for 512 tokens against 8 s for 64 tokens: 0.15625 / 0.125 s a token
    assert Ratio.of([80.0], [8.0], scale=64 / 512).value == 1.25


def test_alternatives_run_in_turn():
    clock = Clock()
    first, second = clock.work("a", [6.0, 8.0, 10.0]), clock.work("b", [2.0, 4.0, 2.0])
    ratio = in_turn(first, second, Rounds(3, 3), clock=clock)
    assert clock.ran == ["a", "b", "a", "b", "a", "b"]
    assert ratio.value == 3.0
    assert ratio.spread == (2.0, 5.0)
    assert ratio.seconds == {"a": 8.0, "b": 2.0}


@pytest.mark.parametrize(
    ("rounds", "pairs"),
    [
        (Rounds(least=2, most=9, seconds=0), 2),  # too slow already: the least
        (Rounds(least=2, most=9, seconds=40), 4),  # 10 s a pair
        (Rounds(least=2, most=3, seconds=1000), 3),
    ],
)
def test_pairs_are_added_while_there_is_time(rounds: Rounds, pairs: int):
    clock = Clock()
    ratio = in_turn(clock.work("a", [6.0] * 9), clock.work("b", [4.0] * 9), rounds, clock=clock)
    assert ratio.pairs == pairs


def test_a_bar_has_a_sense():
    assert Bar(">=", 2.0).holds(2.0) is True
    assert Bar(">=", 2.0).holds(1.99) is False
    assert Bar("<=", 1.1).holds(1.1) is True
    assert Bar("<=", 1.1).holds(1.2) is False
    assert Bar(">=").holds(0.1) is None
    ratio = Ratio(3.0, (2.0, 5.0))
    assert judged("x", ratio, Bar(">=", 2.0), "", {}, quick=False).holds is True
    assert judged("x", ratio, Bar(">=", 2.0), "", {}, quick=True).holds is None


def test_what_the_narrow_search_must_keep():
    auto = {"over_budget": 0, "fallbacks": 1, "reward": -1.0}
    fixed, plain = {"over_budget": 0, "fallbacks": 1, "reward": 0.0}, {"reward": -1.0}
    assert auto_keeps({"auto": auto, "fixed": fixed, "plain": plain})
    for worse in ({"over_budget": 1}, {"fallbacks": 2}, {"reward": -1.1}):
        assert not auto_keeps({"auto": auto | worse, "fixed": fixed, "plain": plain})


def test_memory_is_counted_once_and_with_what_a_view_holds_on_to():
    whole = torch.zeros(10, dtype=torch.float32)
    assert held_bytes({"a": (whole, whole[:2]), "b": [torch.zeros(3, dtype=torch.int64)]}) == 40 + 24


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_drawing_alone_draws_every_token_and_reads_the_prompt_once(engine):
    prompt = long_prompt(engine, 100)
    assert len(prompt) == 100
    beams = draw(without_end(engine), prompt, 3, 10, block=4)
    assert [len(row) for row in beams.token_ids] == [10, 10, 10]
    assert len({id(prefix) for slab in beams.states[STATE].slabs for prefix in slab.prefixes}) == 1
    assert engine.end_tokens  # the engine itself still ends


def test_the_same_tokens_in_one_block_as_the_engine_draws(engine):
    ids = engine.encode(conversation("Hello"))
    plain = without_end(engine)
    expected = plain.extend(plain.begin([ids], [0]).take([0, 0]), 6, SAMPLING, 0, None)
    assert draw(plain, ids, 2, 6).token_ids == expected.token_ids


def test_prompts(tmp_path):
    assert len(HARMLESS) == 12
    assert len(set(MANY)) == 64
    shipped, source = harmful(None, 1000)
    assert len(shipped) > 30
    assert len(set(shipped)) == len(shipped)
    assert "own_samples" in source
    file = tmp_path / "prompts.txt"
    file.write_text('{"prompt": "one"}\n\n"two"\nthree\nfour\n', encoding="utf-8")
    assert harmful(file, 3) == (["one", "two", "three"], "prompts.txt")


# --- rivals ----------------------------------------------------------------------------------------------------------


def test_llama_cpp_draws_for_all_rows_at_once_or_is_skipped(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(Skipped, match="xllamacpp is not installed"), rivals.llama_cpp(2, 64, SAMPLING):
        pass
    asked: list[dict] = []
    together = threading.Barrier(3, timeout=10)

    class Server:
        def __init__(self, params) -> None:
            assert (params.n_parallel, params.n_ctx) == (3, 192)
            assert "GOMP_SPINCOUNT" not in os.environ, "ours, and no setting of llama.cpp's"

        def handle_completions(self, request):
            together.wait()  # breaks unless three requests are in flight
            asked.append(request)
            return {"usage": {"completion_tokens": request["n_predict"]}}

    cpu = SimpleNamespace
    params = SimpleNamespace(model=cpu(), cpuparams=cpu(), cpuparams_batch=cpu())
    library = SimpleNamespace(CommonParams=lambda: params, Server=Server, __spec__="found")
    monkeypatch.setitem(sys.modules, "xllamacpp", library)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    # A thread in place of the process, which would not see the library that stands in.
    monkeypatch.setattr(
        rivals, "ProcessPoolExecutor",
        lambda workers, _, start, given: ThreadPoolExecutor(workers, initializer=start, initargs=given),
    )  # fmt: skip
    with rivals.llama_cpp(3, 64, SAMPLING) as rival:
        assert rival.draw([1, 2], 5) == 15
    assert sorted(request["seed"] for request in asked) == [0, 1, 2]
    assert {(tuple(r["prompt"]), r["temperature"], r["ignore_eos"]) for r in asked} == {((1, 2), 0.8, True)}


def test_a_vllm_server_draws_or_is_skipped():
    bodies: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{"id": "small"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            self.answer({"usage": {"completion_tokens": body["n"] * body["max_tokens"]}})

        def answer(self, content):
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert rivals.Vllm(f"{url}/v1", SAMPLING).draw([1, 2], 4, 5) == 20
        server.shutdown()
    assert bodies == [{"model": "small", "prompt": [1, 2], "n": 4, "max_tokens": 5, "ignore_eos": True,
                       "temperature": 0.8}]  # fmt: skip
    with pytest.raises(Skipped, match="answers"):
        rivals.Vllm(url, SAMPLING)
    with pytest.raises(Skipped, match="--vllm"):
        rivals.Vllm("", SAMPLING)


# --- the file --------------------------------------------------------------------------------------------------------


def row(name: str, ratio: float | None = 2.0) -> Row:
    return Row(name, ratio, 2.0, True, (1.0, 3.0), "the other", {"sense": ">="})


def test_rows_are_replaced_by_name_and_kept_in_order(tmp_path):
    file = tmp_path / "bench.json"
    assert read_rows(file) == []
    rows = updated([], row("b"), ["a", "b", "c"])
    rows = updated(rows, row("a"), ["a", "b", "c"])
    rows = updated(rows, row("b", 5.0), ["a", "b", "c"])
    write_rows(file, rows)
    assert [(each["name"], each["ratio"]) for each in read_rows(file)] == [("a", 2.0), ("b", 5.0)]
    assert [each["name"] for each in updated(rows, row("c"), ["a", "c"])] == ["a", "c"]  # b is gone from the benchmark
    assert list(tmp_path.iterdir()) == [file]
    file.write_text('{"name": "b"}', encoding="utf-8")
    with pytest.raises(ValueError, match="list of rows"):
        read_rows(file)


@dataclass
class Scores:
    """A scorer that anybody could write."""

    name: str
    rule: Callable[[str], float]
    fingerprint: str = "0"

    def score(self, prompts, responses):
        return torch.tensor([self.rule(text) for text in responses], dtype=torch.float64)


@pytest.fixture
def tiny_lab(engine, monkeypatch):
    """The command's models are tiny ones; llama.cpp is not installed."""
    cost = Scores("cost", lambda text: -1.0)
    critic = random_critic(engine, engine.latent_width, cost, width=8)
    base = Guard(engine, Scores("reward", lambda text: float(len(text))), cost, critic=critic)

    def lab(**options):
        made = Lab(**options)
        made.__dict__["base"] = base  # in place of the embedded guard
        return made

    monkeypatch.setattr(bench, "Lab", lab)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)


def test_two_entries_run_quickly_and_the_others_rows_are_kept(tmp_path, capsys, tiny_lab):
    file = tmp_path / "bench.json"
    before = [
        {"name": name, "ratio": 9.0, "bar": 2.0, "holds": True, "spread": [9.0, 9.0], "baseline": "earlier",
         "settings": {"sense": ">="}} for name in ("propose-1", "many-prompts", "gpu-propose")
    ]  # fmt: skip
    file.write_text(json.dumps(before), encoding="utf-8")
    chosen = ["--only", "propose-1", "--only", "long-prompt-memory", "--quick", "--out", str(file)]
    assert bench.main(chosen) == 0
    rows = {each["name"]: each for each in json.loads(file.read_text(encoding="utf-8"))}
    assert list(rows) == ["propose-1", "long-prompt-memory", "many-prompts", "gpu-propose"]
    assert all(list(each) == KEYS for each in rows.values())
    assert rows["many-prompts"] == before[1]
    new = rows["propose-1"]
    assert new["baseline"] == "transformers generate(num_return_sequences=1)"
    assert new["holds"] is None  # quick
    assert new["settings"]["tokens"] == 8
    assert new["settings"]["machine"]["versions"]["torch"] == torch.__version__
    low, high = new["spread"]
    assert low <= new["ratio"] <= high
    taken = new["settings"]["seconds"]
    assert new["ratio"] == pytest.approx(taken["generate"] / taken["ours"])
    held = rows["long-prompt-memory"]["settings"]["bytes"]
    # 100 tokens, 3 layers, keys and values, 2 heads of 8 numbers, float32
    assert held["1 row of transformers"] == 100 * 3 * 2 * 2 * 8 * 4
    assert rows["long-prompt-memory"]["ratio"] == held["4 rows"] / held["1 row of transformers"]
    assert held["4 rows"] >= 104 * 3 * 2 * 2 * 8 * 4  # the prompt once, and a token of each row
    shown = capsys.readouterr().out
    assert "propose-1" in shown
    assert "many-prompts" in shown
    assert "gpu-propose" not in shown


def test_every_entry_runs(tmp_path, tiny_lab):
    file, prompts = tmp_path / "bench.json", tmp_path / "prompts.txt"
    prompts.write_text("Do harm\nDo more harm\n", encoding="utf-8")
    assert bench.main(["--quick", "--out", str(file), "--prompts", str(prompts)]) == 0
    rows = {each["name"]: each for each in read_rows(file)}
    assert list(rows) == [entry.name for entry in ENTRIES]
    told = {name for name, each in rows.items() if "skipped" in each["settings"]}
    assert told == {name for name in rows if name.startswith(("llama.cpp", "vllm"))}
    for name in rows.keys() - told:
        assert rows[name]["ratio"] > 0
        assert rows[name]["settings"]["sense"] in (">=", "<=")
    # both sides of a comparison drew the same number of tokens
    for name in ("guard-critic", "guard-no-critic", "naive", "naive-critic"):
        assert len(set(rows[name]["settings"]["proposed_tokens"].values())) == 1, name
    harm = rows["harmful-auto"]["settings"]
    assert (harm["prompts"], harm["source"], harm["auto"]["over_budget"]) == (2, "prompts.txt", 0)
    assert rows["harmful-auto"]["ratio"] == harm["auto"]["proposed_tokens"] / harm["fixed"]["proposed_tokens"]


def test_an_entry_that_fails_does_not_lose_the_others(tmp_path):
    def broken(lab):
        raise RuntimeError("out of memory")

    def absent(lab):
        raise Skipped("not installed")

    entries = [bench.Entry("propose-1", broken), bench.Entry("propose-8", absent),
               bench.Entry("propose-32", lambda lab: row("propose-32"))]  # fmt: skip
    rows = bench.run(entries, SimpleNamespace(), tmp_path / "bench.json")
    assert rows == read_rows(tmp_path / "bench.json")
    assert [each["settings"] for each in rows] == [
        {"failed": "RuntimeError: out of memory"}, {"skipped": "not installed"}, {"sense": ">="}
    ]  # fmt: skip
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    bench.show(rows, console)
    console.file.close()
    table = console.export_text()
    assert "failed: RuntimeError: out of memory" in table
    assert "skipped: not installed" in table
    assert "2.00" in table


def test_an_unknown_entry_is_refused(capsys):
    assert bench.main(["--only", "propose-2"]) == 2
    assert "no entry is called propose-2" in capsys.readouterr().err


def test_every_entry_has_a_name_of_its_own_and_a_place():
    names = [entry.name for entry in (*ENTRIES, *GPU_ENTRIES)]
    assert len(set(names)) == len(names)
    assert list(bench.ORDER) == names


# --- the GPU's ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--gpu", "--out", str(tmp_path / "bench.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_gpu_entries_run_at_toy_shapes_on_the_cpu(tmp_path):
    sizes = Sizes(rows=4, tokens=8, block=4, naive_rows=2, critic_width=8)
    shape = dataclasses.replace(TOY, vocabulary=VOCABULARY)
    rig = Rig(device="cpu", shape=shape, sizes=sizes, dtype=torch.float32, quick=True)
    rig.__dict__["tokenizer"] = tiny_tokenizer()  # in place of the embedded LLM's
    rows = bench.run(GPU_ENTRIES, rig, tmp_path / "bench.json")
    assert [each["name"] for each in rows] == [entry.name for entry in GPU_ENTRIES]
    for each in rows:
        assert list(each) == KEYS
        assert each["ratio"] > 0, each
        assert each["holds"] is None
        assert all(peak > 0 for peak in each["settings"]["peak_bytes"].values())
        assert each["settings"]["shape"]["hidden"] == TOY.hidden
    assert rows[0]["ratio"] == rows[0]["settings"]["seconds"]["guarded"]
    # the search draws exactly N * tokens, as the drawing that it is held against
    response = rig.guard(4).generate("Hello")[0]
    assert response.usage.proposed_tokens == 4 * 8
    assert response.finish_reason == "length"


def test_seconds_are_held_to_their_bar(monkeypatch):
    from benchmarks import gpu

    measured = Row("gpu-seconds", 1.2, 5.0, True, (1.1, 1.3), "b", {"sense": "<=", "seconds": {"guarded": 5.5}})
    monkeypatch.setattr(gpu, "_against_drawing", lambda *_, **__: measured)
    told = gpu.seconds(SimpleNamespace(quick=False))
    assert (told.ratio, told.holds, told.bar) == (5.5, False, 5.0)
    assert bench.cells(dataclasses.asdict(told))[1:5] == ("5.50 s", "-", "<= 5 s", "NO")
