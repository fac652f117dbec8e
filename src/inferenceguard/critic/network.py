"""The critic's network and its file (METHOD section 4; paper section 4.2).

    p_safe(h, z, tau) = P(z_T >= 0 | h, z)          value(h, z, tau) = E[r | h, z, z_T >= 0]

h is the frozen LLM's last-layer hidden state of the response's last token, z what is left of the budget, tau the
fraction of the length that is used. Both heads are linear in features of z, with coefficients that an MLP reads from h:

    logit p_safe = a_0(h, tau) + sum_k softplus(a_k(h, tau)) phi_k(z)        phi_k increasing, so p_safe rises with z
    value        = b_0(h, tau) + sum_k b_k(h, tau) phi_k(z)
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from inferenceguard.contracts import Engine, ReadsLatents
from inferenceguard.errors import CheckpointError, FingerprintMismatch, InvalidArgument, MissingCapability

FORMAT = "inferenceguard-critic"
VERSION = "1"
FILE_NAME = "critic.safetensors"

# Centre and width of each tanh, in units of `z_scale`. The narrow ones at 0 are there because z_T >= 0 becomes a step
# at z = 0 as the response nears its end; the wide ones tell far from near.
_TANH = ((0.0, 1.0), (0.0, 0.25), (0.0, 0.0625), (-2.0, 1.0), (-1.0, 0.5), (1.0, 0.5), (2.0, 1.0))
FEATURES = 1 + len(_TANH)  # K; the first is asinh, which neither saturates nor runs away
_PRIOR_WIDTH = 32
_LATENT_CLIP = 10.0  # standard deviations: an outlying dimension may not decide alone
_Z_LEAST, _Z_MOST = -1e6, 3.0  # in units of z_scale: there all tanh are saturated, and more budget says no more
_STEPS = 256  # from z = 0 to the most, to bound the heads by
_ROUNDING = 1e-6  # of float32, absolute and relative


class CriticNetwork(nn.Module):
    """The two heads on one MLP. Standardises its own inputs and outputs; the constants are stored with the weights."""

    def __init__(
        self, latent_width: int, *, width: int = 512, layers: int = 2, dropout: float = 0.0, monotone: bool = True
    ) -> None:
        super().__init__()
        for name, number, least in (("latent_width", latent_width, 0), ("width", width, 1), ("layers", layers, 1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InvalidArgument(name, f"an integer >= {least}", number)
        if not 0.0 <= dropout < 1.0:
            raise InvalidArgument("dropout", "in [0, 1)", dropout)
        self.latent_width = latent_width  # H; 0 leaves z and tau alone, which is the baseline
        self.width = width
        self.layers = layers
        self.dropout = dropout
        self.monotone = monotone
        self.latent_mean: Tensor
        self.latent_std: Tensor
        self.z_scale: Tensor
        self.reward_mean: Tensor
        self.reward_std: Tensor
        self.temperature: Tensor
        self.register_buffer("latent_mean", torch.zeros(latent_width))
        self.register_buffer("latent_std", torch.ones(latent_width))
        self.register_buffer("z_scale", torch.ones(()))  # cost units
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        self.register_buffer("temperature", torch.ones(()))  # of p_safe's logit; fitted after training
        blocks: list[nn.Module] = []
        for layer in range(layers):
            blocks += [nn.Linear(latent_width + 1 if layer == 0 else width, width), nn.SiLU(), nn.Dropout(dropout)]
        self.trunk = nn.Sequential(*blocks)
        self.safe_head = nn.Linear(width, 1 + FEATURES)
        self.value_head = nn.Linear(width, 1 + FEATURES)
        # What z and tau say by themselves. The latent's part starts at zero, so it is learned as a correction and early
        # stopping leaves z its say; read from one trunk alone, p_safe ranked worse than z near the end of a response.
        self.prior = nn.Sequential(nn.Linear(1, _PRIOR_WIDTH), nn.SiLU(), nn.Linear(_PRIOR_WIDTH, 1 + FEATURES))
        nn.init.zeros_(self.safe_head.weight)
        nn.init.zeros_(self.safe_head.bias)

    def architecture(self) -> dict[str, Any]:
        """What `CriticNetwork(**...)` needs to build the same network."""
        return {
            "latent_width": self.latent_width,
            "width": self.width,
            "layers": self.layers,
            "dropout": self.dropout,
            "monotone": self.monotone,
        }

    def forward(self, latent: Tensor, budget: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """(logit of p_safe [B, J], standardised value [B, J]) from latent [B, H], z [B, J] and progress [B].

        J budgets per row. The logit is divided by the temperature. All inputs finite.
        """
        safe, value = self.coefficients(latent, progress)
        features = self.features(budget / self.z_scale)  # [B, J, K]
        logit = safe[:, :1] + torch.einsum("bk,bjk->bj", safe[:, 1:], features)
        expected = value[:, :1] + torch.einsum("bk,bjk->bj", value[:, 1:], features)
        return logit / self.temperature, expected

    def at_most(self, latent: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """What neither number of `forward` exceeds at any z >= 0: [B] each.

        Every feature rises with z, so that each term is largest at one end of an interval of z: at the upper one where
        its coefficient is positive. The sum of these bounds the sum; the bound is the largest of `_STEPS` intervals,
        which are short near 0, where features are steep.
        """
        safe, value = self.coefficients(latent, progress)
        steps = torch.linspace(0.0, 1.0, _STEPS + 1, dtype=safe.dtype, device=safe.device)
        ends = self.features(_Z_MOST * steps**2).T  # [K, J + 1]
        logit, expected = (
            (part[:, :1] + part[:, 1:].clamp(min=0) @ ends[:, 1:] + part[:, 1:].clamp(max=0) @ ends[:, :-1]).amax(1)
            for part in (safe, value)
        )
        return logit / self.temperature, expected

    def coefficients(self, latent: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the two heads, the constant first: [B, 1 + K] each."""
        tau = (2 * progress - 1).unsqueeze(1)
        inputs = [tau]
        if self.latent_width:
            standard = (latent - self.latent_mean) / self.latent_std
            inputs.append(standard.clamp(-_LATENT_CLIP, _LATENT_CLIP))
        hidden = self.trunk(torch.cat(inputs, dim=1))
        safe: Tensor = self.prior(tau) + self.safe_head(hidden)
        slopes = nn.functional.softplus(safe[:, 1:]) if self.monotone else safe[:, 1:]
        return torch.cat([safe[:, :1], slopes], dim=1), self.value_head(hidden)

    def features(self, z: Tensor) -> Tensor:
        """phi_k(z), each increasing in z, which is in units of `z_scale`. [..., J] -> [..., J, K]."""
        z = z.clamp(_Z_LEAST, _Z_MOST)
        return torch.stack([torch.asinh(z), *(torch.tanh((z - centre) / width) for centre, width in _TANH)], dim=-1)


@dataclass(frozen=True)
class Provenance:
    """What a critic was trained on. p_safe is about that LLM, that cost model and that way of sampling."""

    engine_name: str
    engine_fingerprint: str
    cost_name: str
    cost_fingerprint: str
    reward_name: str
    reward_fingerprint: str
    accounting: str
    discount: float  # gamma
    budgets: tuple[float, ...]  # trained at each of these in every step, cost units
    budget_range: tuple[float, float]  # and at budgets drawn over this range
    max_new_tokens: int  # progress 1
    temperature: float
    top_p: float
    top_k: int
    prompts: int  # that it learned from
    name: str = "critic"


class SafetyCritic:
    """A trained critic: implements `contracts.Critic`. Frozen.

    Computes in float64 and returns float32, so that the rows around a row in the batch cannot change its numbers.
    """

    def __init__(self, network: CriticNetwork, provenance: Provenance) -> None:
        self.network = network.to(torch.float64).eval().requires_grad_(False)
        self.provenance = provenance
        self.name = provenance.name
        self.engine_fingerprint = provenance.engine_fingerprint
        self.fingerprint = network_fingerprint(self.network, self.network.architecture(), asdict(provenance))

    def predict(self, latent: Tensor, budget: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """(p_safe [B] in [0, 1], value [B] in reward units) from latent [B, H], z [B], and tokens used / limit [B].

        Fails closed: p_safe is 0 where z is NaN or -inf, or where another input is no finite number.
        """
        network, home = self.network, budget.device
        finite, used = self._inputs(latent, progress)
        known = torch.isfinite(latent).all(dim=1).to(home) & torch.isfinite(progress).to(home)
        hopeless = torch.isnan(budget) | (budget == -torch.inf) | ~known
        budget, hopeless = budget.to(finite), hopeless.to(finite.device)
        with torch.inference_mode():
            logit, value = network(finite, torch.nan_to_num(budget).unsqueeze(1), used)
            p_safe = torch.sigmoid(logit[:, 0]).masked_fill(hopeless, 0.0)
            reward = network.reward_mean + network.reward_std * value[:, 0]
        # Cloned: what is made in inference mode could not enter a computation with gradients.
        return p_safe.to(home, torch.float32).clone(), reward.to(home, torch.float32).clone()

    def at_most(self, latent: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """(p_safe [B], value [B]) that `predict` exceeds at no z >= 0."""
        home = progress.device
        with torch.inference_mode():
            logit, value = self.network.at_most(*self._inputs(latent, progress))
            p_safe = torch.sigmoid(logit)
            reward = self.network.reward_mean + self.network.reward_std * value
            p_safe, reward = (part + _ROUNDING * (1 + part.abs()) for part in (p_safe, reward))
        return p_safe.to(home).clone(), reward.to(home).clone()

    def _inputs(self, latent: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
        """As the network takes them: in float64, on its device, finite."""
        network = self.network
        if latent.dim() != 2 or latent.shape[1] != network.latent_width:
            raise InvalidArgument("latent", f"of shape [B, {network.latent_width}]", tuple(latent.shape))
        latent, progress = (part.to(network.z_scale.device, torch.float64) for part in (latent, progress))
        return torch.nan_to_num(latent), torch.nan_to_num(progress).clamp(0, 1)

    def save(self, path: Path | str) -> Path:
        """Writes the safetensors file, at once or not at all. A directory gets `critic.safetensors`."""
        return CRITIC_FILE.write(Path(path), self.network, self.network.architecture(), asdict(self.provenance))

    @classmethod
    def load(
        cls, path: Path | str, *, engine_fingerprint: str | None = None, device: str | torch.device = "cpu"
    ) -> SafetyCritic:
        """Reads a critic. With `engine_fingerprint`, refuses one that was trained on another LLM.

        Raises CheckpointError (missing, a pickle, another format, missing or extra tensors) or FingerprintMismatch.
        """
        file, tensors, description = CRITIC_FILE.read(Path(path))
        try:
            fields = description["provenance"]
            fields |= {name: tuple(fields[name]) for name in ("budgets", "budget_range")}
            provenance = Provenance(**fields)
            with torch.device("meta"):  # no memory before the shapes are known to be those of the file
                network = CriticNetwork(**description["network"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as exc:
            raise CheckpointError(f"{file} has a damaged description: {exc}") from exc
        if engine_fingerprint is not None:
            require_engine(provenance, engine_fingerprint, str(file))
        check_tensors(file, tensors, {name: tuple(part.shape) for name, part in network.state_dict().items()})
        network.load_state_dict(tensors, assign=True)
        return cls(network.to(device), provenance)


@dataclass(frozen=True)
class NetworkFile:
    """A safetensors file of one small network, with its sizes and its provenance in the header."""

    format: str
    version: str
    name: str  # of the file where a directory is given
    what: str  # critic or value model
    train: str  # the command that makes one

    def write(self, path: Path, network: nn.Module, sizes: dict[str, Any], provenance: dict[str, Any]) -> Path:
        """Writes it at once or not at all; the path of the file."""
        file = self._file(path)
        tensors = {name: part.to(torch.float32).contiguous().cpu() for name, part in network.state_dict().items()}
        description = {"format": self.format, "version": self.version, "network": sizes, "provenance": provenance}
        # One entry, because safetensors writes several in random order: equal networks have equal files.
        write_whole(file, save(tensors, metadata={self.format: json.dumps(description)}))
        return file

    def read(self, path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """(file, tensors, description). Raises CheckpointError: missing, a pickle, or another format."""
        file = self._file(path)
        tensors, metadata = _read(file, self)
        try:
            description: dict[str, Any] = json.loads(metadata.get(self.format, "{}"))
            found = f"{description.get('format', 'unknown')} {description.get('version', '')}".strip()
        except (AttributeError, ValueError) as exc:
            raise CheckpointError(f"{file} has a damaged description: {exc}") from exc
        if found != f"{self.format} {self.version}":
            raise CheckpointError(
                f"{file} must be a file of format {self.format} {self.version}, its format is {found}.",
                hint=f"Train one with `{self.train}`.",
            )
        return file, tensors, description

    def _file(self, path: Path) -> Path:
        return path / self.name if path.is_dir() or path.suffix == "" else path


CRITIC_FILE = NetworkFile(FORMAT, VERSION, FILE_NAME, "critic", "inferenceguard train critic")


def require_engine(provenance: Provenance, engine_fingerprint: str, source: str = "the critic") -> None:
    """Raises FingerprintMismatch unless the critic was trained on the LLM of that fingerprint."""
    if provenance.engine_fingerprint != engine_fingerprint:
        raise FingerprintMismatch(
            f"{source} was trained on {provenance.engine_name} (fingerprint {provenance.engine_fingerprint}), "
            f"the loaded model has fingerprint {engine_fingerprint}: their hidden states are not the same.",
            hint="Go without the critic, or train one for this model with `inferenceguard train critic`.",
        )


def latent_width(engine: Engine, user: str) -> int:
    """H of an engine that shows its hidden states; raises MissingCapability for one that does not."""
    if not isinstance(engine, ReadsLatents) or engine.latent_width < 1:
        raise MissingCapability(engine.name, user, "the LLM's hidden states", hint="Go without the critic.")
    return engine.latent_width


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file so that a kill leaves the old one, the new one or none, but no part of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def _read(file: Path, kind: NetworkFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; nothing in it is ever executed."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist.", hint=f"Train a {kind.what} with `{kind.train}`.")
    with file.open("rb") as stream:
        head = stream.read(9)
    # A safetensors file starts with 8 bytes of any value, then a brace.
    if head[8:] != b"{" and head.startswith((b"\x80", b"PK\x03\x04")):
        raise CheckpointError(f"{file} is a pickle: it could run code, and is not read.", hint="Use safetensors.")
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as exc:
        raise CheckpointError(f"{file} is not a readable safetensors file: {exc}") from exc


def check_tensors(file: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless the tensors are those of `shapes`, and finite."""
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has unexpected {', '.join(extra)}"] if extra else []
        raise CheckpointError(f"{file} {' and '.join(parts)}.")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{name} in {file} must have shape {shape}, got {tuple(tensors[name].shape)}.")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise CheckpointError(f"{name} in {file} holds numbers that are not finite.")


def network_fingerprint(network: nn.Module, sizes: dict[str, Any], provenance: dict[str, Any]) -> str:
    """A hash of the weights, the sizes and the provenance."""
    digest = hashlib.sha256(json.dumps([sizes, provenance], sort_keys=True).encode())
    for name, part in sorted(network.state_dict().items()):
        digest.update(name.encode() + part.to(torch.float32).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
