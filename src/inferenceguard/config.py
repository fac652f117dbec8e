"""Names, directories and YAML files to a `Guard`: presets, plugins by entry point, and the `--config` file.

preset: embedded                       # or: model, reward, cost
model: ./my-llm                        # or {name: ..., dtype: float32, device: cpu, engine: transformers}
                                       # or {name: ./my-llm, engine: vllm, options: {url: http://gpu:8000,
                                       #     latents_url: http://gpu:8001}}: a running vLLM (docs/deploy.md)
reward: embedded                       # a name, a directory, "module:Class", an entry point; or {name, options}
cost:                                  # or a combination
  max:
    - ./my-cost-model
    - {name: ./my-guard-llm, options: {unsafe: unsafe}}
  budgets: [0, 0]
critic: ./my-critic                    # false: none
value: ./my-value                      # of re_control alone; false: none
search: {strategy: inference_guard, n_beams: 16, keep: 4, block_tokens: 16, max_new_tokens: 64, retries: 2}
                                       # n_beams: auto begins with 1 proposal and widens where the risk is real
budget: {limit: 0, discount: 1, accounting: increment}
sampling: {temperature: 0.8, top_p: 1, top_k: 0}
fallbacks: ["I'm sorry, but I can't help with that."]
limits: {seconds: 60, rows: 1024}      # of the scorers
batch_rows: 128
seed: 0
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag, ValidationError

from inferenceguard.budget import SafetyBudget
from inferenceguard.contracts import Critic, Engine, ReadsLatents, Sampling, Scorer, ScorerLimits, ValueModel
from inferenceguard.critic.network import SafetyCritic
from inferenceguard.critic.value import LatentValue
from inferenceguard.embedded import TEMPERATURE, choose_dtype, embedded_directory, load_engine, quiet_transformers
from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.engines.vllm import VLLMEngine
from inferenceguard.errors import CheckpointError, InvalidArgument, MissingCapability, UnknownName
from inferenceguard.guard import Guard
from inferenceguard.objectives import OBJECTIVES
from inferenceguard.scorers import EmbeddedCost, EmbeddedReward, Maximum, WeightedSum, load_scorer
from inferenceguard.scorers.int8 import multiplies_bytes
from inferenceguard.strategies import ARGS, BaseSampling, BeamSearch, BestOfN, InferenceGuard, REControl

EMBEDDED = "embedded"
PRESET_BEAMS = 16
AUTO, AUTO_WIDTHS = "auto", (1, 4)  # n_beams: auto tries these first and widens to PRESET_BEAMS (METHOD 7.4)
# The paper's models and hyper-parameters (METHOD 5, 8 and 9), as a `--config` file would give them. Its critics are not
# published: train one with `inferenceguard train critic`.
_PAPER: dict[str, Any] = {
    "search": {"n_beams": 128, "keep": None, "block_tokens": 32, "max_new_tokens": 128, "retries": 2},
    "budget": {"limit": 10.0, "discount": 0.999, "accounting": "accumulate"},
    "sampling": {"temperature": 1.0},
    "limits": {"seconds": 600.0},
    "batch_rows": 512,
}
PAPER: dict[str, dict[str, Any]] = {
    "paper-alpaca": {
        "model": {"name": "PKU-Alignment/alpaca-7b-reproduced", "template": "beaver"},
        "reward": "PKU-Alignment/beaver-7b-v1.0-reward",
        "cost": "PKU-Alignment/beaver-7b-v1.0-cost",
        **_PAPER,
    },
    "paper-beaver": {
        "model": {"name": "PKU-Alignment/beaver-7b-v3.0", "template": "beaver"},
        "reward": "PKU-Alignment/beaver-7b-v3.0-reward",
        "cost": "PKU-Alignment/beaver-7b-v3.0-cost",
        **_PAPER,
    },
}
PRESETS = (EMBEDDED, *PAPER)
# Chat templates of checkpoints that bring none, as Jinja (METHOD 9). A system text opens the next user turn.
TEMPLATES = {
    "beaver": (
        "{{ bos_token }}BEGINNING OF CONVERSATION:{% set before = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set before.text = message['content'] + '\n\n' %}"
        "{% elif message['role'] == 'user' %}{{ ' USER: ' + before.text + message['content'] + ' ASSISTANT:' }}"
        "{% set before.text = '' %}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
}
STRATEGIES: dict[str, type[Any]] = {
    "inference_guard": InferenceGuard,
    "base_sampling": BaseSampling,
    "best_of_n": BestOfN,
    "beam_search": BeamSearch,
    "args": ARGS,
    "re_control": REControl,
}
# As they are written in a list of methods: the search, and what it is called in STRATEGIES.
METHODS = {
    "base": "base_sampling",
    "best-of-n": "best_of_n",
    "beam": "beam_search",
    "args": "args",
    "re-control": "re_control",
    "inferenceguard": "inference_guard",
}
NO_CRITIC = "no-critic"
ENGINES: dict[str, Any] = {
    "transformers": TransformersEngine.from_pretrained,
    "vllm": VLLMEngine.from_pretrained,
}
GROUPS = ("engines", "scorers", "strategies")
CRITIC_WEIGHTS = Path(__file__).resolve().parent / "weights" / "critic"
VALUE_WEIGHTS = CRITIC_WEIGHTS.parent / "value"
GUARD_SETTINGS = tuple(
    name for name, p in inspect.signature(Guard.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY
)

ScorerSource = Scorer | str | Path
CriticSource = Critic | str | Path
ValueSource = ValueModel | str | Path


def build_guard(
    model: Engine | str | Path,
    *,
    reward: ScorerSource,
    cost: ScorerSource,
    critic: CriticSource | None = None,
    value: ValueSource | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    **settings: Any,
) -> Guard:
    """A guard of a hub name or a local directory, with scorers and critic by name, by directory, or as objects.

    `settings` are those of `Guard`. Raises UnknownName, CheckpointError or FingerprintMismatch before a token is drawn.
    """
    _known("setting", settings, GUARD_SETTINGS)
    with quiet_transformers():
        scorers = read_scorer(reward, "reward"), read_scorer(cost, "cost")
        engine = read_engine(model, dtype=dtype, device=device)
        steers = read_value(value, engine)
        return Guard(engine, *scorers, critic=read_critic(critic, engine), value=steers, **settings)


def preset_guard(
    preset: str = EMBEDDED,
    *,
    critic: CriticSource | bool | None = True,
    value: ValueSource | bool | None = None,
    model: Engine | str | Path | None = None,
    reward: ScorerSource | None = None,
    cost: ScorerSource | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    **settings: Any,
) -> Guard:
    """A named set of models: `embedded` is SmolLM2-135M-Instruct with its own reward, cost model and critic;
    `paper-alpaca` and `paper-beaver` are those of the paper, with its hyper-parameters and without a critic.

    `critic`: True for the preset's, False or None for none, or one's own; `value` likewise, but None is the preset's
    where the strategy is RE-Control. `model` (of the paper's presets), `reward` and `cost` replace the preset's.
    `dtype`: float32, bfloat16 or auto (bfloat16 where this CPU is fast at it); it steers the search alone, for the gate
    always scores in float32. `settings` are those of `Guard`; the preset's defaults are `preset_settings`.
    """
    if preset not in PRESETS:
        raise UnknownName("preset", preset, PRESETS)
    _known("setting", settings, GUARD_SETTINGS)
    if preset in PAPER:
        return _paper_guard(preset, critic, value, model, reward, cost, dtype, device, settings)
    if model is not None:
        raise InvalidArgument("model", f"left out with the preset {preset}", model)
    precision = choose_dtype(dtype)
    with quiet_transformers():
        gate = read_scorer(EMBEDDED if cost is None else cost, "cost")
        chosen = read_scorer(EMBEDDED if reward is None else reward, "reward")
        settings = {**preset_settings(preset), "gate_cost": gate, **settings}
        scorers = steering(chosen, precision), steering(gate, precision)
        # Read before the model: a damaged critic shows at once.
        own = read_critic(CRITIC_WEIGHTS if critic is True else critic or None, None)
        needed = isinstance(settings["strategy"], REControl) if value is None else value
        steers = read_value(VALUE_WEIGHTS if needed is True else needed or None, None)
        return Guard(load_engine(precision, device), *scorers, critic=own, value=steers, **settings)


def preset_settings(preset: str) -> dict[str, Any]:
    """What a preset searches with unless told otherwise; the embedded one's is small enough for two cores."""
    if preset not in PRESETS:
        raise UnknownName("preset", preset, PRESETS)
    if preset in PAPER:
        return parse_config({"preset": preset}).settings()
    return {
        "strategy": InferenceGuard(n_beams=16, keep=4, block_tokens=16, max_new_tokens=64, retries=2),
        "sampling": Sampling(temperature=TEMPERATURE),
    }


def _paper_guard(
    preset: str,
    critic: CriticSource | bool | None,
    value: ValueSource | bool | None,
    model: Engine | str | Path | None,
    reward: ScorerSource | None,
    cost: ScorerSource | None,
    dtype: str | torch.dtype,
    device: str,
    settings: dict[str, Any],
) -> Guard:
    """The paper's models, or others in their formats."""
    config = parse_config({"preset": preset, "device": device})
    assert isinstance(config.model, ModelPart)
    with quiet_transformers():
        helpful = config.reward_scorer() if reward is None else read_scorer(reward, "reward")
        harmful = config.cost_scorer() if cost is None else read_scorer(cost, "cost")
        named = config.model.name if model is None else model
        engine = read_engine(named, dtype=dtype, device=device, template=config.model.template)
        own = read_critic(None if isinstance(critic, bool) else critic, engine)
        steers = read_value(None if isinstance(value, bool) else value, engine)
        return Guard(engine, helpful, harmful, critic=own, value=steers, **{**config.settings(), **settings})


def steering(scorer: Scorer, precision: torch.dtype) -> Scorer:
    """The scorer as the search runs it: where the LLM runs in bfloat16 an embedded one does, in int8 if it can."""
    if precision == torch.bfloat16 and isinstance(scorer, EmbeddedCost | EmbeddedReward):
        return scorer.with_precision("int8" if multiplies_bytes() else "bfloat16")
    return scorer


def read_engine(
    model: Engine | str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu",
    engine: str = "transformers", template: str | None = None, options: Mapping[str, Any] = {},
) -> Engine:  # fmt: skip
    """An engine object as it is; a name or a directory through the engine of that name (or entry point).

    `template` names one of TEMPLATES for the engine's tokenizer, for checkpoints that bring none; `options` are further
    keyword arguments of the engine (the addresses of a vLLM server, say).
    """
    if template is not None and template not in TEMPLATES:
        raise UnknownName("template", template, TEMPLATES)
    if not isinstance(model, str | Path):
        return model
    if isinstance(dtype, str) and dtype != "auto":
        dtype = choose_dtype(dtype)
    if str(model) == EMBEDDED:
        if engine == "transformers":
            return load_engine(dtype, device)
        model = embedded_directory()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgument("device", "one that torch can use here", device) from error
    loader: Any = load_entry_point("inferenceguard.engines", engine)
    loader = getattr(loader, "from_pretrained", loader)
    _fits(f"the engine {engine}", loader, options)
    loaded: Engine = loader(model, dtype=dtype, device=device, **options)
    if template is not None:
        tokenizer: Any = getattr(loaded, "tokenizer", None)
        if tokenizer is None:
            raise InvalidArgument("template", f"left out with the engine {engine}, which has no tokenizer", template)
        tokenizer.chat_template = TEMPLATES[template]
    return loaded


def read_scorer(source: ScorerSource, purpose: Literal["reward", "cost"], options: Mapping[str, Any] = {}) -> Scorer:
    """A scorer object as it is; else the shipped one, a plugin's, "module:Class", or a checkpoint's."""
    if not isinstance(source, str | Path):
        return source
    name = str(source)
    plugin = ":" in name and not Path(name).exists()
    if plugin or name in _published("inferenceguard.scorers"):
        made: Scorer = _made(load_entry_point("inferenceguard.scorers", name), purpose, dict(options))
        return made
    if name == EMBEDDED:
        require_weights(purpose)
    elif not Path(name).exists() and "/" not in name:
        known = [EMBEDDED, *_published("inferenceguard.scorers")]
        raise UnknownName(purpose, name, known, hint="Or pass a directory, an owner/name of the hub, or module:Class.")
    return load_scorer(source, purpose=purpose, **options)


def read_critic(source: CriticSource | None, engine: Engine | None) -> Critic | None:
    """A critic object as it is, or the file or directory of one; `embedded` is the shipped one."""
    if source is None or not isinstance(source, str | Path):
        return source
    if engine is not None and not isinstance(engine, ReadsLatents):
        hint = getattr(engine, "latents_hint", "Search without the critic (--no-critic).")
        raise MissingCapability(engine.name, "InferenceGuard with a critic", "latents", hint=hint)
    if str(source) == EMBEDDED or source == CRITIC_WEIGHTS:
        require_weights("critic")
        source = CRITIC_WEIGHTS
    return SafetyCritic.load(source, engine_fingerprint=None if engine is None else engine.fingerprint)


def read_value(source: ValueSource | None, engine: Engine | None) -> ValueModel | None:
    """A value model object as it is, or the file or directory of one; `embedded` is the shipped one."""
    if source is None or not isinstance(source, str | Path):
        return source
    if str(source) == EMBEDDED or source == VALUE_WEIGHTS:
        require_weights("value")
        source = VALUE_WEIGHTS
    return LatentValue.load(source, engine_fingerprint=None if engine is None else engine.fingerprint)


def require_weights(part: str) -> None:
    """Raises CheckpointError where this installation does not carry a model of its own."""
    folder = CRITIC_WEIGHTS.parent / part
    if not list(folder.glob("*.safetensors")):
        hints = {
            "critic": "Go without it: --no-critic, or critic=False.",
            "value": "Train one with `inferenceguard train value`.",
        }
        raise CheckpointError(
            f"the embedded {part} model is not in this installation ({folder} is missing).",
            hint=hints.get(part, "Install the whole package again."),
        )


def load_entry_point(group: str, name: str) -> Any:
    """The object that a built-in name, an installed entry point or "module:Class" stands for.

    Raises UnknownName (with the nearest known) or CheckpointError where it cannot be imported.
    """
    if group.removeprefix("inferenceguard.") not in GROUPS:
        raise UnknownName("group", group, [f"inferenceguard.{short}" for short in GROUPS])
    own: Mapping[str, Any] = {"inferenceguard.engines": ENGINES, "inferenceguard.strategies": STRATEGIES}.get(group, {})
    if name in own:
        return own[name]
    points = _published(group)
    try:
        if name in points:
            return points[name].load()
        module, separator, attribute = name.partition(":")
        if separator and module and attribute:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
            return found
    except Exception as error:  # a plugin may fail in any way
        raise CheckpointError(f"cannot load {name}: {type(error).__name__}: {error}") from error
    kind = group.removeprefix("inferenceguard.").removesuffix("s").replace("strategie", "strategy")
    raise UnknownName(kind, name, [*own, *points], hint='Or write "module:Class".')


def make_strategy(name: str, fields: Mapping[str, Any]) -> Any:
    """A strategy by name with its settings; unknown settings raise UnknownName."""
    kind = load_entry_point("inferenceguard.strategies", name)
    if not dataclasses.is_dataclass(kind):
        return _made(kind, name, dict(fields))
    _known(f"setting of {name}", fields, [field.name for field in dataclasses.fields(kind)])
    strategy: Any = kind(**fields)  # type: ignore[operator]
    return strategy


@dataclasses.dataclass(frozen=True)
class Method:
    """A search under an objective, by name: `strategy` and which of the models it is to be given."""

    name: str  # search[:objective][:no-critic], in one spelling
    strategy: Any
    critic: bool  # whether Models.critic is used where there is one
    value: bool  # whether Models.value is needed


def read_method(spec: str, **sizes: Any) -> Method:
    """`search[:objective]` to a strategy: base, best-of-n, beam, args, re-control, inferenceguard (and :no-critic).

    The objective is reward, lagrangian, augmented or cost; by default reward, and inferenceguard's augmented. Hyphens
    and underscores are the same. `sizes` are settings of any of the strategies: each takes those that it has, so that
    one set serves a list of methods. Raises UnknownName (with the nearest known) or InvalidArgument.
    """
    name, *parts = (part.strip().lower().replace("_", "-") for part in spec.split(":"))
    by_name = METHODS | {full.replace("_", "-"): full for full in STRATEGIES}
    if name not in by_name:
        raise UnknownName("method", spec, METHODS, hint="Write search:objective, such as beam:lagrangian.")
    kind = STRATEGIES[by_name[name]]
    known = {field.name for each in STRATEGIES.values() for field in dataclasses.fields(each)}
    _known("size", sizes, known - {"objective"})
    own = {field.name for field in dataclasses.fields(kind)}
    guarded = kind is InferenceGuard
    options = [*(OBJECTIVES if "objective" in own else ()), *((NO_CRITIC,) if guarded else ())]
    for part in parts:
        if not options:
            raise InvalidArgument("method", f"{name} without an objective: it chooses nothing", spec)
        if part not in options:
            raise UnknownName(f"part of method {spec}", part, options)
    objectives = [part for part in parts if part != NO_CRITIC]
    if len(objectives) > 1 or len(set(parts)) < len(parts):
        raise InvalidArgument("method", "a search with one objective at most", spec)
    fields = {name: value for name, value in sizes.items() if name in own}
    strategy = kind(**fields, **({"objective": objectives[0]} if objectives else {}))
    short = next(short for short, full in METHODS.items() if full == by_name[name])
    without = [NO_CRITIC] if NO_CRITIC in parts else []
    return Method(":".join([short, *objectives, *without]), strategy, guarded and not without, kind is REControl)


# --- the file --------------------------------------------------------------------------------------------------------


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelPart(_Part):
    """The LLM: a hub name or a directory, and how it is run."""

    name: StrictStr
    dtype: StrictStr = "auto"
    device: StrictStr = "cpu"
    engine: StrictStr = "transformers"
    template: StrictStr | None = None  # of TEMPLATES, for a checkpoint without a chat template
    options: dict[str, Any] = Field(default_factory=dict)  # of the engine: a vLLM server's addresses, for instance


def _branch(given: object) -> str:
    """Which of a union's branches was meant, so that its own complaint is heard and no other's."""
    if isinstance(given, BaseModel):
        return type(given).__name__
    if not isinstance(given, dict):
        return "str"
    return "SumPart" if "sum" in given else "MaxPart" if "max" in given else "ScorerPart"


class ScorerPart(_Part):
    """One scorer by name, with the options of its kind."""

    name: StrictStr
    options: dict[str, Any] = Field(default_factory=dict)


_Scorer = Annotated[
    Annotated[StrictStr, Tag("str")]
    | Annotated[ScorerPart, Tag("ScorerPart")]
    | Annotated["SumPart", Tag("SumPart")]
    | Annotated["MaxPart", Tag("MaxPart")],
    Discriminator(_branch),
]


class SumPart(_Part):
    """score = sum_i weight_i score_i."""

    sum: list[_Scorer] = Field(min_length=1)
    weights: list[float] | None = None


class MaxPart(_Part):
    """cost = max_i (cost_i - budget_i)."""

    max: list[_Scorer] = Field(min_length=1)
    budgets: list[float] | None = None


class SearchPart(_Part):
    """The strategy's name; every other field is a setting of that strategy, checked by it."""

    model_config = ConfigDict(extra="allow")
    strategy: StrictStr = "inference_guard"


class BudgetPart(_Part):
    """d, gamma and the accounting."""

    limit: float = 0.0
    discount: float = 1.0
    accounting: StrictStr = "increment"


class SamplingPart(_Part):
    """How the LLM is sampled."""

    temperature: float = TEMPERATURE
    top_p: float = 1.0
    top_k: StrictInt = 0


class LimitsPart(_Part):
    """Of one call of a scorer."""

    seconds: float = 60.0
    rows: StrictInt = 1024


class Config(_Part):
    """A `--config` file. With a preset its models need not be named."""

    preset: StrictStr | None = None
    model: (
        Annotated[
            Annotated[StrictStr, Tag("str")] | Annotated[ModelPart, Tag("ModelPart")],
            Discriminator(lambda given: "ModelPart" if isinstance(given, dict | ModelPart) else "str"),
        ]
        | None
    ) = None
    reward: _Scorer | None = None
    cost: _Scorer | None = None
    critic: StrictBool | StrictStr | None = None
    value: StrictBool | StrictStr | None = None
    dtype: StrictStr = "auto"
    device: StrictStr = "cpu"
    search: SearchPart = Field(default_factory=SearchPart)
    budget: BudgetPart = Field(default_factory=BudgetPart)
    sampling: SamplingPart = Field(default_factory=SamplingPart)
    fallbacks: list[StrictStr] | None = None
    limits: LimitsPart = Field(default_factory=LimitsPart)
    batch_rows: StrictInt = 128
    seed: StrictInt = 0

    def strategy(self) -> Any:
        """The search with its settings and budget, checked."""
        fields = dict(self.search.model_extra or {})
        for name in fields.keys() & {"budget", "accounting"}:
            raise InvalidArgument(f"search.{name}", "given as a field of budget", fields[name])
        if fields.get("n_beams") == AUTO:
            fields |= {"n_beams": PRESET_BEAMS, "widths": fields.get("widths", AUTO_WIDTHS)}
        budget = SafetyBudget(self.budget.limit, self.budget.discount)
        return make_strategy(
            self.search.strategy,
            {**_defaults(self.search.strategy), **fields, "budget": budget, "accounting": self.budget.accounting},
        )

    def settings(self) -> dict[str, Any]:
        """The keyword settings of `Guard`, checked; no model is read."""
        settings: dict[str, Any] = {
            "strategy": self.strategy(),
            "sampling": Sampling(**self.sampling.model_dump()),
            "limits": ScorerLimits(**self.limits.model_dump()),
            "batch_rows": self.batch_rows,
        }
        return settings if self.fallbacks is None else {**settings, "fallbacks": self.fallbacks}

    def cost_scorer(self) -> Scorer:
        """The cost model as the gate runs it."""
        return _scorer(EMBEDDED if self.cost is None else self.cost, "cost")

    def reward_scorer(self) -> Scorer:
        """The reward model in full precision."""
        return _scorer(EMBEDDED if self.reward is None else self.reward, "reward")

    def guard(self) -> Guard:
        """Reads the models. Everything that can be wrong without them is found first."""
        settings = self.settings()
        if self.model is None:
            return preset_guard(
                self.preset or EMBEDDED,
                critic=True if self.critic is None else self.critic,
                value=self.value,
                reward=None if self.reward is None else self.reward_scorer(),
                cost=None if self.cost is None else self.cost_scorer(),
                dtype=self.dtype,
                device=self.device,
                **settings,
            )
        if self.preset is not None and self.preset not in PAPER:
            raise InvalidArgument("preset", "left out where a model is named", self.preset)
        for name in ("reward", "cost"):
            if getattr(self, name) is None:
                raise InvalidArgument(name, "named where a model is named", None, hint="`embedded` is the shipped one.")
        part = self.model if isinstance(self.model, ModelPart) else ModelPart(name=self.model, dtype=self.dtype,
                                                                              device=self.device)  # fmt: skip
        with quiet_transformers():
            scorers = self.reward_scorer(), self.cost_scorer()
            engine = read_engine(
                part.name, dtype=part.dtype, device=part.device, engine=part.engine, template=part.template,
                options=part.options,
            )  # fmt: skip
            critic, value = (name if isinstance(name, str) else EMBEDDED if name else None
                             for name in (self.critic, self.value))  # fmt: skip
            steers = read_value(value, engine)
            return Guard(engine, *scorers, critic=read_critic(critic, engine), value=steers, **settings)


def load_config(path: Path | str) -> Config:
    """Reads a YAML file. Raises InvalidArgument or UnknownName that names the field, its bound and its value."""
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument("config", "a file that can be read", str(path), hint=f"{error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument("config", f"a YAML file ({' '.join(str(error).split())})", str(path)) from error
    return parse_config({} if fields is None else fields)


def parse_config(fields: object) -> Config:
    """The same from plain data."""
    if not isinstance(fields, dict):
        raise InvalidArgument("config", "a mapping of fields", fields)
    fields = _with_preset(fields)
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise _mapped(error, fields) from error


def _with_preset(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields over those of a preset of the paper. A model, reward or cost given by name keeps the preset's format;
    all of them run on the given device."""
    own = PAPER.get(fields["preset"]) if isinstance(fields.get("preset"), str) else None
    if own is None:
        return fields
    merged = own | fields
    search = fields.get("search")
    if isinstance(search, dict) and search.get("strategy") in STRATEGIES:  # its own sizes only
        sizes = {field.name for field in dataclasses.fields(STRATEGIES[search["strategy"]])}
        own = own | {"search": {name: size for name, size in own["search"].items() if name in sizes}}
    for part, defaults in own.items():
        if isinstance(defaults, dict) and isinstance(fields.get(part), dict):
            merged[part] = defaults | fields[part]
    placed = {name: fields[name] for name in ("dtype", "device") if name in fields}
    given = {"name": merged["model"]} if isinstance(merged["model"], str) else merged["model"]
    if isinstance(given, dict):
        merged["model"] = own["model"] | placed | given
    for part in ("reward", "cost"):
        if "device" in fields and isinstance(merged[part], str) and "/" in merged[part]:
            merged[part] = {"name": merged[part], "options": {"device": fields["device"]}}
    return merged


def _mapped(error: ValidationError, fields: Mapping[str, Any]) -> InvalidArgument:
    """The first thing that is wrong, as our own error."""
    errors = error.errors(include_url=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    place = [str(part) for part in first["loc"] if not _is_branch(part)]
    where = ".".join(place)
    if first["type"] == "extra_forbidden":
        parts = [part for part in first["loc"] if isinstance(part, str)]
        model: type[BaseModel] = next((_BRANCHES[part] for part in reversed(parts) if part in _BRANCHES), Config)
        if model is Config and len(parts) > 1:
            model = _PARTS.get(parts[-2], Config)
        return UnknownName("config field", where, [".".join([*place[:-1], name]) for name in model.model_fields])
    if first["type"] == "missing":
        return InvalidArgument(where, "given", None)
    bound = first["msg"].removeprefix("Input should be ")
    if first["type"] == "too_short":
        bound = "a list that is not empty"
    return InvalidArgument(where, bound, first.get("input"))


_BRANCHES: dict[str, type[BaseModel]] = {part.__name__: part for part in (ModelPart, ScorerPart, SumPart, MaxPart)}
_PARTS: dict[str, type[BaseModel]] = {
    "budget": BudgetPart,
    "sampling": SamplingPart,
    "limits": LimitsPart,
    "search": SearchPart,
}


def _is_branch(part: object) -> bool:
    return isinstance(part, str) and (part in _BRANCHES or part in ("str", "bool"))


def _scorer(part: _Scorer, purpose: Literal["reward", "cost"]) -> Scorer:
    if isinstance(part, str):
        return read_scorer(part, purpose)
    if isinstance(part, ScorerPart):
        return read_scorer(part.name, purpose, part.options)
    if isinstance(part, SumPart):
        scorers = [_scorer(each, purpose) for each in part.sum]
        return WeightedSum(scorers, [1.0] * len(scorers) if part.weights is None else part.weights)
    return Maximum([_scorer(each, purpose) for each in part.max], part.budgets)


def _defaults(strategy: str) -> dict[str, Any]:
    """The small sizes of the preset, for our own strategies; a plugin's keeps its own defaults."""
    small = {"n_beams": PRESET_BEAMS, "keep": None, "block_tokens": 16, "max_new_tokens": 64}
    if strategy not in STRATEGIES:
        return {}
    own = {field.name for field in dataclasses.fields(STRATEGIES[strategy])}
    return {name: size for name, size in small.items() if name in own}


def _fits(what: str, loader: Any, options: Mapping[str, Any]) -> None:
    """Raises UnknownName for an option that the loader does not have, InvalidArgument for one that it needs."""
    _, *own = inspect.signature(loader).parameters.values()  # the first is the model's name
    own = [each for each in own if each.name not in ("dtype", "device")]
    named = {each.name: each for each in own if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    if any(each.kind is each.VAR_KEYWORD for each in own):
        return
    for name in options:
        if not named:
            raise InvalidArgument(f"options of {what}", "none", name)
        if name not in named:
            raise UnknownName(f"option of {what}", name, named)
    for name, each in named.items():
        if each.default is each.empty and name not in options:
            raise InvalidArgument(f"option of {what}: {name}", "given", None)


def _made(kind: Any, what: str, options: dict[str, Any]) -> Any:
    """Calls a plugin's class; an object that is no class is taken as it is."""
    if not callable(kind) and not options:
        return kind
    try:
        return kind(**options)
    except TypeError as error:
        raise InvalidArgument(f"options of {what}", "those of its class", options, hint=f"{error}.") from error


def _published(group: str) -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=group)}


def _known(what: str, given: Any, known: Any) -> None:
    for name in given:
        if name not in known:
            raise UnknownName(what, str(name), known)
