"""The commands. Results go to stdout, messages and progress to stderr; an error is one line and an exit code.

0  done          1  something failed, or a record does not hold          2  bad input          130  interrupted

torch is imported by the commands that need it, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeRemainingColumn
from typer.core import TyperGroup

from inferenceguard import memory
from inferenceguard.cli import files, show
from inferenceguard.cli.certify import certify
from inferenceguard.cli.evaluate import evaluate, report
from inferenceguard.cli.serve import serve
from inferenceguard.cli.theorem import theorem
from inferenceguard.errors import EngineFault, InferenceGuardError, InvalidArgument, ScorerFault

if TYPE_CHECKING:
    from inferenceguard.config import Config
    from inferenceguard.contracts import Conversation, GuardedResponse, Models, Sampling, Scorer
    from inferenceguard.guard import Guard

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Guards a frozen LLM at inference time: no answer over the safety budget leaves it, "
    "with respect to the cost model.",
)
notes = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

_Prompts = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="JSON Lines with `prompt`, or text: one prompt a line.")
]
_Preset = Annotated[str | None, typer.Option(help="A set of models.", show_default="embedded")]
_ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Models and settings as YAML.")]
_Model = Annotated[str | None, typer.Option(metavar="DIR", help="The LLM: a directory or a hub name.")]
_Reward = Annotated[str | None, typer.Option(metavar="NAME-or-DIR", help="The reward model; `embedded` is shipped.")]
_Cost = Annotated[str | None, typer.Option(metavar="NAME-or-DIR", help="The cost model; `embedded` is shipped.")]
_Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.", show_default="auto")]
_Device = Annotated[str | None, typer.Option(help="Where the LLM runs: cpu, cuda, ...")]
_Temperature = Annotated[float | None, typer.Option(help="Of the LLM; 0 is greedy.", show_default="0.8")]
_TopP = Annotated[float | None, typer.Option(help="Draw from the most likely tokens of this probability.")]
_TopK = Annotated[int | None, typer.Option(help="Draw from this many tokens; 0: all.")]
_MaxTokens = Annotated[int | None, typer.Option(help="D: tokens of an answer at most.", show_default="64")]
_Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.", show_default="0")]


@app.command()
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT ...]")] = None,
    prompts: _Prompts = None,
    preset: _Preset = None,
    config: _ConfigFile = None,
    model: _Model = None,
    reward: _Reward = None,
    cost: _Cost = None,
    critic: Annotated[str | None, typer.Option(metavar="DIR", help="A critic trained on this LLM.")] = None,
    no_critic: Annotated[bool, typer.Option("--no-critic", help="Search without a critic.")] = False,
    n_beams: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto", help="N: proposals per block; auto: few where there is no risk.", show_default="16"
        ),
    ] = None,
    keep: Annotated[int | None, typer.Option(help="K: rows kept per block.", show_default="N / 4")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="m: tokens per block.", show_default="16")] = None,
    max_new_tokens: _MaxTokens = None,
    budget: Annotated[float | None, typer.Option(help="d: cost that an answer may have.", show_default="0")] = None,
    discount: Annotated[float | None, typer.Option(help="gamma, per token.", show_default="1")] = None,
    accounting: Annotated[
        str | None, typer.Option(help="increment, accumulate or final.", show_default="increment")
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="M: times a failed block is proposed again.", show_default="2")
    ] = None,
    seed: _Seed = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    dtype: _Dtype = None,
    device: _Device = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show text as soon as it cannot be taken back.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt, with its record.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JSON Lines here; a file that is there is gone on with.")
    ] = None,
) -> None:
    """Answer prompts with the guard: the text, and the ledger of its safety budget."""
    if stream and (as_json or out is not None):
        raise InvalidArgument("--stream", "used without --json and --out", True)
    if critic is not None and no_critic:
        raise InvalidArgument("--critic", "left out with --no-critic", critic)
    settings = _config(
        config,
        {"preset": preset, "model": model, "reward": reward, "cost": cost, "critic": False if no_critic else critic,
         "dtype": dtype, "device": device, "seed": seed},
        search={"n_beams": _width(n_beams), "keep": keep, "block_tokens": block_tokens,
                "max_new_tokens": max_new_tokens, "retries": retries},
        budget={"limit": budget, "discount": discount, "accounting": accounting},
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k},
    )  # fmt: skip
    rows, conversations = _prompts(prompt or [], prompts)
    settings.settings()  # everything that is wrong without a model, before one is read
    guard = settings.guard()
    guard.check(conversations, seed=settings.seed)
    if stream:
        _stream(guard, rows, conversations, settings.seed)
    elif out is None:
        _print_answers(guard, rows, conversations, settings.seed, as_json)
    else:
        _write_answers(guard, rows, conversations, settings.seed, out)


@app.command()
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines with `prompt` and `response`.")],
    cost: Annotated[str, typer.Option(metavar="NAME-or-DIR")] = "embedded",
    reward: Annotated[str, typer.Option(metavar="NAME-or-DIR")] = "embedded",
    batch: Annotated[int, typer.Option(help="Rows per batch.")] = 256,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write here instead of to stdout.")] = None,
) -> None:
    """Add `reward` and `cost` to each row of `prompt, response`; null where a score failed."""
    if batch < 1:
        raise InvalidArgument("batch", ">= 1", batch)
    if file.exists() and not file.is_file():
        raise InvalidArgument("file", "a regular file, because it is read twice", str(file))
    from inferenceguard.contracts import conversation

    count = 0
    for count, row in enumerate(files.read_rows(file, ("prompt", "response")), 1):
        conversation(row["prompt"], name=f"prompt of row {count} in {file}")
        if not isinstance(row["response"], str):
            raise InvalidArgument(f"response of row {count} in {file}", "a string", row["response"])
    scorers = {"reward": _wall(reward, "reward"), "cost": _wall(cost, "cost")}
    failed = dict.fromkeys(scorers, 0)
    with files.whole_file(out) if out else contextlib.nullcontext(_print) as write, _Bar(count) as bar:
        rows = files.read_rows(file, ("prompt", "response"))
        while some := list(itertools.islice(rows, batch)):
            conversations = [conversation(row["prompt"]) for row in some]
            texts = [row["response"] for row in some]
            scores = {name: _scores(scorer, conversations, texts) for name, scorer in scorers.items()}
            with bar.aside():
                for index, row in enumerate(some):
                    added = {name: values[index] for name, values in scores.items()}
                    write(files.json_line({**row, **added}))
            failed = {name: failed[name] + values.count(None) for name, values in scores.items()}
            bar.advance(len(some))
    for name, number in failed.items():
        if number:
            notes.print(f"{number} of {count} rows have no {name}: {scorers[name].name} failed on them")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `generate` wrote with --json or --out.")],
    cost: Annotated[str, typer.Option(metavar="NAME-or-DIR", help="The cost model of the gate.")] = "embedded",
    config: _ConfigFile = None,
) -> None:
    """Score recorded answers again and say whether each record holds."""
    from inferenceguard.scorers.safe import FailClosed

    rows = files.read_rows(file, ("prompt", "text", "record"))
    gate = _wall(cost, "cost") if config is None else FailClosed(_config(config, {}).cost_scorer())
    held = count = 0
    for count, row in enumerate(rows, 1):
        reasons, found = _replayed(row, gate)
        held += not reasons
        _print(f"row {count}: " + (f"does not hold: {'; '.join(reasons)}" if reasons else f"holds ({found})"))
    notes.print(f"{held} of {count} records hold")
    if held < count:
        raise typer.Exit(1)


@app.command()
def sample(
    prompts: Annotated[Path, typer.Option("--prompts", metavar="FILE")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON Lines; a file that is there is gone on with.")],
    samples: Annotated[int, typer.Option(help="Answers per prompt.")] = 5,
    preset: _Preset = None,
    config: _ConfigFile = None,
    model: _Model = None,
    reward: _Reward = None,
    cost: _Cost = None,
    max_new_tokens: _MaxTokens = None,
    seed: _Seed = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    dtype: _Dtype = None,
    device: _Device = None,
) -> None:
    """Draw UNGUARDED answers of the bare LLM with their reward and cost: data for training and comparison."""
    if samples < 1:
        raise InvalidArgument("samples", ">= 1", samples)
    settings = _config(
        config,
        {"preset": preset, "model": model, "reward": reward, "cost": cost, "critic": False, "dtype": dtype,
         "device": device, "seed": seed},
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k},
    )  # fmt: skip
    from inferenceguard.strategies import BaseSampling

    limit = settings.search.model_extra.get("max_new_tokens", 64) if settings.search.model_extra else 64
    strategy = BaseSampling(max_new_tokens=limit if max_new_tokens is None else max_new_tokens)
    rows, conversations = _prompts([], prompts)
    guard = settings.guard()
    guard.check(conversations, seed=settings.seed)
    models, sampling = guard.models, guard.sampling
    made = {
        "models": {name: guard.description["models"][name] for name in ("engine", "reward", "cost")},
        "sampling": dataclasses.asdict(sampling),
        "max_new_tokens": strategy.max_new_tokens,
    }
    jobs = [(index, number) for index in range(len(rows)) for number in range(samples)]

    def check(place: int, row: dict[str, Any]) -> None:
        expected = (rows[jobs[place][0]].prompt, settings.seed + jobs[place][1]) if place < len(jobs) else None
        if (row.get("prompt"), row.get("seed")) != expected or row.get("made_with") != json.loads(json.dumps(made)):
            raise InvalidArgument("out", "a file of the same prompts and settings", str(out), hint=_ANOTHER_FILE)

    with files.RowFile(out, check) as file, _Bar(len(jobs), file.rows) as bar:
        notes.print("UNGUARDED: these answers pass no gate and may be harmful. Do not show them to anyone as answers.")
        for done, some in _unfinished(jobs, guard.batch_rows, file.rows):
            answers = _unguarded(models, strategy, sampling, [conversations[index] for index, _ in some],
                                 [settings.seed + number for _, number in some])  # fmt: skip
            file.append(
                {**rows[index].fields, "prompt": rows[index].prompt, **answer, "sample": number,
                 "seed": settings.seed + number, "guarded": False, "made_with": made}
                for (index, number), answer in list(zip(some, answers, strict=True))[done:]
            )  # fmt: skip
            bar.advance(len(some) - done)
        notes.print(f"{file.rows} UNGUARDED answers in {out}")


app.command()(evaluate)
app.command()(report)
app.command()(theorem)
app.command()(certify)
app.command()(serve)


class _Train(TyperGroup):
    """Builds a command when it is asked for, because its options are read from what needs torch."""

    def list_commands(self, ctx: Any) -> list[str]:
        return ["cost", "reward", "critic", "value"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        known = {"cost": _train_cost, "reward": _train_reward, "critic": _train_critic, "value": _train_value}
        build = known.get(cmd_name)
        if build is None:
            return None
        own = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        own.command(cmd_name)(build())
        return typer.main.get_command(own)


train = typer.Typer(cls=_Train, no_args_is_help=True, help="Train a cost, reward or value model, or a critic.")
app.add_typer(train, name="train")


@train.callback()
def _train() -> None:
    """Train a cost model, a reward model, a critic, or RE-Control's value model."""


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    if version:
        import importlib.metadata

        _print(f"inferenceguard {importlib.metadata.version('inferenceguard')}")
        raise typer.Exit()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line: no traceback for users."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = list(itertools.takewhile(lambda argument: argument != "--", given))
    debug = "--debug" in options  # wherever it stands
    given = [argument for argument in options if argument != "--debug"] + given[len(options) :]
    _set_up_streams(debug)
    memory.bound_kernel_caches()  # before torch is imported
    sys.exit(_run(given, debug))


def _run(arguments: list[str], debug: bool) -> int:
    """The exit code."""
    try:
        return int(app(arguments, standalone_mode=False, prog_name="inferenceguard") or 0)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
    if message:
        print("error:", " ".join(show.printable(message).split()), file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    """(what to tell the user, the exit code)"""
    if isinstance(error, EngineFault | ScorerFault):
        return str(error), 1
    if isinstance(error, InferenceGuardError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted", 130
    if hasattr(error, "format_message"):  # of the option parser; without a message it has shown the help instead
        return error.format_message(), int(getattr(error, "exit_code", 2))
    return f"{type(error).__name__}: {error} (unexpected; --debug shows the traceback)", 1


def _set_up_streams(debug: bool) -> None:
    """UTF-8 whatever the locale says; our messages on stderr, and none of the libraries'."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logger = logging.getLogger("inferenceguard")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if not debug:
        warnings.simplefilter("ignore")


# --- settings and prompts --------------------------------------------------------------------------------------------


def _width(text: str | None) -> int | str | None:
    """--n-beams as the configuration has it."""
    try:
        return text if text is None or text == "auto" else int(text)
    except ValueError:
        raise InvalidArgument("n_beams", "an integer >= 1, or auto", text) from None


def _config(path: Path | None, top: dict[str, Any], **parts: dict[str, Any]) -> Config:
    """The file's settings, and over them those that were given as options."""
    from inferenceguard.config import load_config, parse_config

    fields = {} if path is None else load_config(path).model_dump(exclude_unset=True)
    for name, part in parts.items():
        given = {key: value for key, value in part.items() if value is not None}
        if given:
            fields[name] = {**fields.get(name, {}), **given}
    return parse_config({**fields, **{key: value for key, value in top.items() if value is not None}})


def _prompts(given: list[str], file: Path | None) -> tuple[list[files.PromptRow], list[Conversation]]:
    """The prompts of the command line, then the file's, and the conversations that they are."""
    rows = [files.PromptRow(files.clean(text), place=f"prompt {index}") for index, text in enumerate(given)]
    if file is not None:
        rows += files.read_prompts(file)
    if not rows:
        raise InvalidArgument("prompt", "given: as an argument, or in a file with --prompts", None)
    from inferenceguard.contracts import conversation

    return rows, [conversation(row.prompt, name=row.place) for row in rows]


# --- generate --------------------------------------------------------------------------------------------------------


def _print_answers(
    guard: Guard, rows: list[files.PromptRow], conversations: list[Conversation], seed: int, as_json: bool
) -> None:
    console, answered = _console(), []
    with _Bar(len(rows)) as bar:
        for some in _chunks(range(len(rows)), _batch(guard)):
            responses = guard.generate([conversations[index] for index in some], seed=seed)
            new = [_row(rows[index], response) for index, response in zip(some, responses, strict=True)]
            with bar.aside():
                for row in new:
                    if as_json:
                        _print(files.json_line(row))
                    else:
                        show.answer(console, row)
            answered += new
            bar.advance(len(some))
    if len(rows) > 1:
        notes.print(show.summary(answered))


def _write_answers(
    guard: Guard, rows: list[files.PromptRow], conversations: list[Conversation], seed: int, out: Path
) -> None:
    answered: list[dict[str, Any]] = []
    wanted = json.loads(files.json_line({**guard.description, "seed": seed}))

    def check(place: int, row: dict[str, Any]) -> None:
        _check_row(place, row, wanted, rows, out)
        answered.append(row)

    with files.RowFile(out, check) as file, _Bar(len(rows), file.rows) as bar:
        if file.repaired:
            notes.print(f"{out} ended in a torn line: it was cut off and is answered again")
        if file.rows:
            notes.print(f"{out} holds {file.rows} of {len(rows)} answers already")
        for done, some in _unfinished(range(len(rows)), _batch(guard), file.rows):
            responses = guard.generate([conversations[index] for index in some], seed=seed)
            new = [_row(rows[index], response) for index, response in zip(some, responses, strict=True)][done:]
            file.append(new)
            answered += new
            bar.advance(len(new))
    notes.print(show.summary(answered))


def _check_row(place: int, row: dict[str, Any], wanted: dict[str, Any], rows: list[files.PromptRow], out: Path) -> None:
    """Raises InvalidArgument for a row that these prompts and settings would not have made."""
    if place >= len(rows) or row.get("prompt") != rows[place].prompt:
        raise InvalidArgument(
            "out", f"a file that answers these prompts in order (row {place + 1})", str(out), hint=_ANOTHER_FILE
        )
    record = row.get("record")
    found = record if isinstance(record, dict) else {}
    parts = ("models", "strategy", "sampling", "seed")  # another version of the software may go on
    if different := [part for part in parts if found.get(part) != wanted[part]]:
        raise InvalidArgument("out", f"a file made with the same {' and '.join(different)}", str(out),
                              hint=_ANOTHER_FILE)  # fmt: skip


_ANOTHER_FILE = "Choose another file, or use the settings that it was made with."


def _stream(guard: Guard, rows: list[files.PromptRow], conversations: list[Conversation], seed: int) -> None:
    console = _console()
    for row, messages in zip(rows, conversations, strict=True):
        show.title(console, row.prompt)
        for event in guard.stream([messages], seed=seed):
            print(show.printable(event.text), end="", flush=True)
            if event.response is not None:
                print()
                show.answer(console, _row(row, event.response), text=False)


def _row(row: files.PromptRow, response: GuardedResponse) -> dict[str, Any]:
    """One object of --json and --out; the other fields of the prompt's row follow."""
    answer = {field.name: getattr(response, field.name) for field in dataclasses.fields(response)}
    record = answer.pop("record")
    answer |= {"usage": dataclasses.asdict(response.usage), "record": record}
    return {"prompt": row.prompt, **answer, **{key: v for key, v in row.fields.items() if key not in answer}}


def _batch(guard: Guard) -> int:
    return max(1, guard.batch_rows // guard.strategy.n_beams)


# --- score, replay, sample -------------------------------------------------------------------------------------------


def _wall(name: str, purpose: Any) -> Any:
    from inferenceguard.config import read_scorer
    from inferenceguard.embedded import quiet_transformers
    from inferenceguard.scorers.safe import FailClosed

    with quiet_transformers():
        scorer: Scorer = read_scorer(name, purpose)
    return FailClosed(scorer)


def _scores(wall: Any, conversations: list[Conversation], texts: list[str]) -> list[float | None]:
    """A score per row; None where it failed. A batch that fails whole is halved, so that one row costs no other."""
    from inferenceguard.record import finite

    values = [finite(value) for value in wall.score(conversations, texts).tolist()]
    if len(values) == 1 or any(value is not None for value in values):
        return values
    half = len(values) // 2
    return _scores(wall, conversations[:half], texts[:half]) + _scores(wall, conversations[half:], texts[half:])


def _replayed(row: dict[str, Any], gate: Any) -> tuple[list[str], str]:
    """(what does not hold, what was found) for one row."""
    from inferenceguard.record import replay as replay_record

    try:
        outcome = replay_record(row["record"], gate)
        reasons = [*outcome.reasons, *_differences(row, outcome.cost, outcome.budget_left)]
    except (InferenceGuardError, LookupError, TypeError, ValueError, AttributeError) as error:
        return [f"it is no record of this program ({type(error).__name__}: {error})"], ""
    if outcome.cost is None or outcome.budget_left is None:
        return reasons, "not scored"
    return reasons, f"cost {outcome.cost:.4f}, left {outcome.budget_left:.4f}"


def _differences(row: dict[str, Any], cost: float | None, left: float | None) -> list[str]:
    """What the row says that its record does not."""
    record, reasons = row["record"], []
    if row["text"] != record["released"]["text"]:
        reasons.append("the row's text is not the record's")
    for name, found in (("cost", cost), ("budget_left", left), ("budget", record["budget"]["limit"])):
        told = row.get(name)
        if found is not None and (not isinstance(told, int | float) or abs(told - found) > 1e-4 * max(1, abs(found))):
            reasons.append(f"the row's {name} is {told}, not {found:.6g}")
    return reasons


def _unguarded(
    models: Models, strategy: Any, sampling: Sampling, conversations: list[Conversation], seeds: list[int]
) -> list[dict[str, Any]]:
    from inferenceguard.record import finite
    from inferenceguard.text import visible_text

    beams = strategy.generate(conversations, models, sampling, seeds).beams
    ends = models.engine.end_tokens
    return [
        {
            "response": visible_text(models.engine, tokens),
            "finish_reason": "stop" if tokens and tokens[-1] in ends else "length",
            "reward": finite(reward),
            "cost": finite(cost),
        }
        for tokens, reward, cost in zip(beams.token_ids, beams.score.tolist(), beams.spent.tolist(), strict=True)
    ]


# --- train -----------------------------------------------------------------------------------------------------------


def _train_cost() -> Any:
    from inferenceguard.cli.options import command, settings_of
    from inferenceguard.training.cost import CostTraining, train_cost

    def run(**fields: Any) -> None:
        """Train the embedded cost model on labelled answers."""
        _print(json.dumps(train_cost(CostTraining(**fields)), indent=2))

    return command(run, settings_of(CostTraining))


def _train_reward() -> Any:
    from inferenceguard.cli.options import command, settings_of
    from inferenceguard.training.reward import RewardTraining, train_reward

    def run(**fields: Any) -> None:
        """Train the embedded reward model on preferences."""
        _print(json.dumps(train_reward(RewardTraining(**fields)), indent=2))

    return command(run, settings_of(RewardTraining))


def _train_critic() -> Any:
    from inferenceguard.cli.options import command, settings_of
    from inferenceguard.contracts import Sampling
    from inferenceguard.critic import CriticTraining, RolloutSettings
    from inferenceguard.embedded import TEMPERATURE

    groups = {
        RolloutSettings: settings_of(RolloutSettings, skip=("sampling", "seed")),
        Sampling: settings_of(Sampling, defaults={"temperature": TEMPERATURE}),
        CriticTraining: settings_of(CriticTraining, skip=("rollouts",)),
    }

    def run(**given: Any) -> None:
        """Train a critic for an LLM: draws its answers to the prompts, scores them, and fits. Resumes in --out."""
        values = {kind: {each.name: given.pop(each.name) for each in group} for kind, group in groups.items()}
        seed = values[CriticTraining]["seed"]
        rollouts = RolloutSettings(sampling=Sampling(**values[Sampling]), seed=seed, **values[RolloutSettings])
        _fit_critic(CriticTraining(rollouts=rollouts, **values[CriticTraining]), **given)

    return command(run, [each for group in groups.values() for each in group], _parameters(_fit_critic))


def _fit_critic(
    training: Any,
    *,
    prompts: Annotated[Path, typer.Option("--prompts", metavar="FILE", help="Rows may name their `group`.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the rollouts and critic.safetensors go.")],
    preset: _Preset = None,
    config: _ConfigFile = None,
    model: _Model = None,
    reward: _Reward = None,
    cost: _Cost = None,
    dtype: _Dtype = None,
    device: _Device = None,
) -> None:
    from inferenceguard.cli.value import without_walls
    from inferenceguard.critic import train_critic_from_prompts

    top = {"preset": preset, "model": model, "reward": reward, "cost": cost, "dtype": dtype, "device": device}
    settings = _config(config, {**top, "critic": False})
    rows, conversations = _prompts([], prompts)
    groups = [str(row.fields.get("group", row.prompt)) for row in rows]
    models = without_walls(settings.guard().models)
    result = train_critic_from_prompts(models, conversations, training, out, groups=groups)
    notes.print(f"critic in {result.path}")
    _print(json.dumps(result.metrics, indent=2, default=float))


def _train_value() -> Any:
    from inferenceguard.cli.value import train_value

    return train_value()


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The keyword parameters of a function, with their annotations evaluated."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


# --- streams ---------------------------------------------------------------------------------------------------------


def _print(text: str) -> None:
    print(text, flush=True)


def _console() -> Console:
    """stdout for a person: colours on a terminal only, and elsewhere room enough for the table."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _unfinished(items: Sequence[Any], size: int, rows: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """(how many of it are done, batch) for each batch that is not done. The batches are those of an unbroken run: in
    low precision an answer may depend on what is computed beside it."""
    for start in range(rows - rows % size, len(items), size):
        yield max(0, rows - start), items[start : start + size]


class _Bar:
    """A bar with the time left on stderr, where there is more than one row and somebody to look at it."""

    def __init__(self, total: int, done: int = 0) -> None:
        columns: Iterable[Any] = (SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # Not redirected: rich would send what is printed to stdout to the bar's stderr.
        self._progress = Progress(
            *columns,
            console=notes,
            transient=True,
            disable=total < 2 or not notes.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=total, completed=done)

    def advance(self, steps: int) -> None:
        """Counts rows as done."""
        self._progress.advance(self._task, steps)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the bar away while results are printed: both may be one terminal."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def __enter__(self) -> _Bar:
        if not self._progress.disable:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.disable:
            self._progress.stop()
