"""Breaks tiny runs at random for a while, and counts what is lost: `make soak`.

    python soak.py MINUTES [--trials N] [--only KIND,KIND] [--seed S]

A trial breaks a run (the kinds are the methods of `Trials`), continues it with --resume, and compares checkpoint,
export and log with those of a run that was left alone: they must have the same bits. The exit status is 1 if a trial
lost anything; the folders of such trials are kept.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import broken_runs
from broken_runs import Ended
from runs import SMALL, command_line
from small_corpus import prepare_text, write_text

STEPS = 3
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class Lost(Exception):
    """A trial lost something; the message says what."""


class Trials:
    """One method a kind of trial. Each raises `Lost`.

    Args:
        place: a folder for everything.

    Attributes:
        kills: the runs that were killed while they were running, by the way.
    """

    def __init__(self, place: Path, seed: int) -> None:
        self._rng = random.Random(seed)
        self._place = place
        self.kills: collections.Counter[str] = collections.Counter()
        self.corpus = place / "corpus"
        if os.fork() == 0:  # the forking process computes nothing
            prepare_text(write_text(place / "text.txt", documents=60), self.corpus)
            os._exit(0)
        os.wait()
        started = time.monotonic()
        whole = self._run(place / "whole", plot=True)
        self._seconds = time.monotonic() - started
        if whole.status != 0:
            raise SystemExit(whole.output)
        self._expected, self._events = outcome(place / "whole"), whole.events
        at = self._events // 2
        while len(list((place / "broken" / "checkpoints").glob("step-*"))) < 2:
            at += 1
            shutil.rmtree(place / "broken", ignore_errors=True)
            self._run(place / "broken", "event", at)
        self._work = place / "run"

    def _run(
        self,
        out: Path,
        how: str = "",
        at: float = 0.0,
        workers: int = 0,
        corpus: Path | None = None,
        plot: bool = False,  # takes as long as the rest
    ) -> Ended:
        options: dict[str, Any] = {"steps": STEPS, "save_every": 1, "workers": workers, "data": corpus or self.corpus}
        return broken_runs.run([*command_line(**SMALL, **options, out=out), "--resume"], self._place, how, at, plot)

    def _continue(self, out: Path, workers: int = 0, without: str = "") -> None:
        ended = self._run(out, workers=workers)
        if ended.status != 0:
            raise Lost(f"status {ended.status} of the continued run: {ended.output[-500:]}")
        found = outcome(out)
        differing = [name for name in self._expected if name != without and found[name] != self._expected[name]]
        if differing:
            raise Lost(f"other content in {', '.join(differing)}")

    def _check_end(self, ended: Ended, statuses: tuple[int, ...]) -> None:
        if ended.status not in statuses or "Traceback" in ended.output:
            raise Lost(f"status {ended.status}: {ended.output[-500:]}")

    def kill(self) -> None:
        """SIGKILL before a file event, at a random time, or in the middle of a write; sometimes again."""
        while True:
            how = self._rng.choice(("event", "event", "write", "time"))
            at = self._rng.uniform(0.0, self._seconds) if how == "time" else self._rng.randint(1, self._events)
            ended = self._run(self._work, how, at, plot=self._rng.random() < 0.25)
            killed = ended.status is not None and ended.status < 0
            self.kills[how] += killed
            if not killed:  # it had ended before
                shutil.rmtree(self._work)
            elif self._rng.random() < 0.8:
                return self._continue(self._work)

    def kill_with_workers(self) -> None:
        """SIGKILL of a run with two loader workers at a random time."""
        ended = self._run(self._work, "time", self._rng.uniform(0.0, 1.5 * self._seconds), workers=2)
        self.kills["time, with workers"] += ended.status == -9
        self._continue(self._work, workers=2)

    def signal(self) -> None:
        """SIGINT, SIGTERM or SIGUSR1 to all processes of a run with two loader workers."""
        name = self._rng.choice(SIGNALS)
        ended = self._run(self._work, name, self._rng.uniform(0.0, 1.5 * self._seconds), workers=2)
        self._check_end(ended, (0, 130, 143, -2, -15, -10))
        self._continue(self._work, workers=2)

    def full_disk(self) -> None:
        """No file can grow from some file event on."""
        ended = self._run(self._work, "full", self._rng.randint(1, self._events))
        self._check_end(ended, (0, 1, 2))
        if ended.status and str(self._work) not in ended.output.splitlines()[-1]:
            raise Lost(f"the message names no path: {ended.output[-500:]}")
        self._continue(self._work)

    def flip_in_run(self) -> None:
        """One bit of one file of an unfinished run: the same bits in the end, or an error that names a file."""
        shutil.copytree(self._place / "broken", self._work)
        path = self._flip(self._work)
        ended = self._run(self._work)
        self._check_end(ended, (0, 1, 2))
        if ended.status:
            if str(self._work) not in ended.output.splitlines()[-1]:
                raise Lost(f"{path.name}: the message names no file: {ended.output[-500:]}")
            return
        self._continue(self._work, without=path.name if path.name == "log.jsonl" else "")  # it has no checksum

    def flip_in_corpus(self) -> None:
        """One bit of one file of a corpus: the same bits in the end, or an error that names a file."""
        corpus = self._place / "flipped"
        shutil.rmtree(corpus, ignore_errors=True)
        shutil.copytree(self.corpus, corpus)
        path = self._flip(corpus)
        ended = self._run(self._work, corpus=corpus)
        self._check_end(ended, (0, 1, 2))
        if ended.status and str(corpus) not in ended.output.splitlines()[-1]:
            raise Lost(f"{path.name}: the message names no file: {ended.output[-500:]}")
        if not ended.status and outcome(self._work) != self._expected:
            raise Lost(f"{path.name}: trained on damaged text")

    def _flip(self, folder: Path) -> Path:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        path = self._rng.choice(files)
        content = bytearray(path.read_bytes())
        content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)
        path.write_bytes(content)
        return path


def outcome(out: Path) -> dict[str, Any]:
    """What must be the same after every trial."""
    import json

    found: dict[str, Any] = {}
    names = [f"checkpoints/step-{STEPS:08d}/{name}.safetensors" for name in ("model", "optimizer")]
    for name in (*names, "hf/model.safetensors", "hf/config.json", "hf/tokenizer.json", "hf/vocab.txt"):
        found[name] = (out / name).read_bytes() if (out / name).is_file() else None
    lines = (out / "log.jsonl").read_bytes().splitlines() if (out / "log.jsonl").is_file() else []
    records = [json.loads(line) for line in lines]
    found["log.jsonl"] = [(each["step"], each["mlm_loss"]) for each in records if each["kind"] == "train"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = [name for name, value in vars(Trials).items() if not name.startswith("_") and callable(value)]
    parser.add_argument("minutes", type=float)
    parser.add_argument("--trials", type=int, default=sys.maxsize)
    parser.add_argument("--only", default=",".join(kinds), help=f"some of {', '.join(kinds)}")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    broken_runs.import_everything()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    trials = Trials(place, options.seed)
    tried: collections.Counter[str] = collections.Counter()
    lost: collections.Counter[str] = collections.Counter()
    chosen, rng, started = options.only.split(","), random.Random(options.seed), time.monotonic()
    while time.monotonic() < started + 60.0 * options.minutes and sum(tried.values()) < options.trials:
        kind = rng.choice(chosen)
        tried[kind] += 1
        try:
            getattr(trials, kind)()
        except (Lost, OSError, ValueError) as error:
            lost[kind] += 1
            kept = place / f"lost-{sum(lost.values())}"
            print(f"LOST by {kind} (kept in {kept}): {type(error).__name__}: {error}", flush=True)
            if (place / "run").exists():
                (place / "run").rename(kept)
        shutil.rmtree(place / "run", ignore_errors=True)
    minutes = (time.monotonic() - started) / 60.0
    print(f"seed {options.seed}, {minutes:.1f} minutes, {sum(tried.values())} trials, {sum(lost.values())} lost")
    for kind in sorted(tried):
        print(f"  {kind:<18} {tried[kind]:>6} tried {lost[kind]:>4} lost")
    print("  kills that hit a run:", ", ".join(f"{count} ({how})" for how, count in sorted(trials.kills.items())))
    if lost:
        sys.exit(1)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
