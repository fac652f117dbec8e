"""`make bench` and `make bench-gpu`: every figure a ratio of two alternatives measured in turn.

    python -m benchmarks.bench [--gpu] [--only NAME ...] [--quick] [--out FILE] [--vllm URL] [--prompts FILE]

Each row is written to the file as soon as it is measured; `--only` measures some again and keeps the others' rows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.entries import ENTRIES, Entry, Lab
from benchmarks.gpu import GPU_ENTRIES, Rig, require_gpu
from benchmarks.measure import Skipped, read_rows, unmeasured, updated, write_rows

ROOT = Path(__file__).resolve().parents[1]
FILE, QUICK_FILE = ROOT / "bench.json", ROOT / "runs" / "bench-quick.json"
ORDER = tuple(entry.name for entry in (*ENTRIES, *GPU_ENTRIES))


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    entries: Sequence[Entry] = GPU_ENTRIES if options.gpu else ENTRIES
    if unknown := [name for name in options.only if name not in {entry.name for entry in entries}]:
        print(f"no entry is called {unknown[0]}; there are: {', '.join(e.name for e in entries)}", file=sys.stderr)
        return 2
    chosen = [entry for entry in entries if not options.only or entry.name in options.only]
    lab: Any
    if options.gpu:
        try:
            require_gpu()
        except Skipped as error:
            print(error, file=sys.stderr)
            return 2
        lab = Rig(quick=options.quick)
    else:
        lab = Lab(quick=options.quick, vllm=options.vllm, prompts=options.prompts)
    rows = run(chosen, lab, options.out)
    names = {entry.name for entry in entries}
    show([row for row in rows if row["name"] in names], Console())
    print(f"written to {options.out}")
    return int(any("failed" in row["settings"] for row in rows if row["name"] in {entry.name for entry in chosen}))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measures ratios of speed and memory in turn.")
    parser.add_argument("--gpu", action="store_true", help="the 7B shape on a GPU instead of the embedded models")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this entry alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; nothing is judged")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"default: {FILE.name} in the project's root")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="harmful prompts, in place of the shipped ones")
    parser.add_argument("--vllm", default=os.environ.get("INFERENCEGUARD_BENCH_VLLM", ""), metavar="URL",
                        help="a vLLM server of the same model (or INFERENCEGUARD_BENCH_VLLM)")  # fmt: skip
    options = parser.parse_args(arguments)
    options.out = options.out or (QUICK_FILE if options.quick else FILE)
    return options


def run(entries: Sequence[Entry], lab: Any, path: Path) -> list[dict[str, Any]]:
    """Measures the entries and writes each row into the file when it is there: all rows of the file."""
    rows = read_rows(path)
    columns = (TextColumn("{task.fields[what]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(entries), what="")
        for entry in entries:
            lab.tick = lambda what, name=entry.name: progress.update(task, what=f"{name}: {what}")
            lab.tick("loading")
            try:
                row = entry.measure(lab)
            except Skipped as why:
                row = unmeasured(entry.name, "skipped", str(why))
            except Exception as error:  # an hour's other rows are not lost with it
                row = unmeasured(entry.name, "failed", f"{type(error).__name__}: {error}")
            rows = updated(rows, row, ORDER)
            write_rows(path, rows)
            progress.advance(task)
    return rows


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line per row."""
    table = Table(title="Ratios, measured in turn")
    for column in ("name", "ratio", "spread", "bar", "holds"):
        table.add_column(column, no_wrap=True)
    table.add_column("against", max_width=60)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The row as text. What was not measured says why in place of what it is against."""
    settings = row["settings"]
    if row["ratio"] is None:
        why = next(f"{how}: {settings[how]}" for how in ("skipped", "failed") if how in settings)
        return row["name"], "-", "-", "-", "-", why
    unit = " s" if settings.get("unit") else ""
    spread = "-" if row["spread"] is None else "{:.2f} .. {:.2f}".format(*row["spread"])
    bar = "-" if row["bar"] is None else f"{settings['sense']} {row['bar']:g}{unit}"
    holds = {None: "-", True: "yes", False: "NO"}[row["holds"]]
    return row["name"], f"{row['ratio']:.2f}{unit}", spread, bar, holds, row["baseline"]


if __name__ == "__main__":
    sys.exit(main())
