"""What a run achieved, said plainly: figures before and after, the loss curve, words guessed in held-out sentences."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...model.batch import IGNORE, PackedBatch
from ...model.pretraining import BertForPreTraining
from ..corpus.reader import Corpus
from ..step.flops import rate_words
from .evaluate import Evaluation

CLEARLY_BELOW = 0.95  # of the unigram entropy: a model above it has learned next to nothing from context
TOP = 5


@dataclasses.dataclass(frozen=True)
class Guess:
    """A held-out sentence with one word masked.

    Attributes:
        sentence: the text, with [MASK] in it. truth: the word that was there.
        guesses: the model's five likeliest tokens, each with its probability.
    """

    sentence: str
    truth: str
    guesses: list[tuple[str, float]]


@torch.no_grad()
def guess_masked_words(model: BertForPreTraining, corpus: Corpus, seqlen: int, count: int = 5) -> list[Guess]:
    """The model's guesses for one masked word in each of ``count`` held-out sentences of prose, always the same ones.

    Fewer where the held-out text has too few sentences of whole words.
    """
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(corpus.tokenizer_path))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    guesses = []
    for ids, masked in _sentences(corpus, tokenizer, seqlen, count):
        truth = ids[masked]
        tokens = [corpus.special.cls, *ids, corpus.special.sep]
        tokens[masked + 1] = corpus.special.mask
        hidden = model.encode(_one_segment(tokens).to(device))  # (T, H)
        probabilities = model.predict_tokens(hidden[masked + 1]).float().softmax(-1)  # (V,)
        best = torch.topk(probabilities, TOP)
        # Decoding the whole would leave [MASK] out.
        text = f"{tokenizer.decode(ids[:masked])} [MASK] {tokenizer.decode(ids[masked + 1 :])}"
        names = [tokenizer.id_to_token(i) for i in best.indices.tolist()]
        likeliest = list(zip(names, best.values.tolist(), strict=True))
        guesses.append(Guess(text.strip(), tokenizer.id_to_token(truth), likeliest))
    model.train(was_training)
    return guesses


def _sentences(corpus: Corpus, tokenizer: Any, seqlen: int, count: int) -> list[tuple[list[int], int]]:
    """(token ids of a held-out sentence, index of the word to mask), at most ``count``, drawn with a fixed seed."""
    rng = np.random.default_rng(0)
    shards = corpus.split("heldout").shards
    found: list[tuple[list[int], int]] = []
    for _ in range(400 * count):
        shard = shards[rng.integers(len(shards))]
        at = int(rng.integers(shard.num_sentences))
        ids = shard.tokens[shard.sentences[at] : shard.sentences[at + 1]].tolist()
        if not 8 <= len(ids) <= min(32, seqlen - 2):
            continue
        names = [tokenizer.id_to_token(i) for i in ids]
        # Prose, not code or tables: nearly every token a word or a piece of one.
        if sum(name.removeprefix("##").isalpha() for name in names) < 0.8 * len(names):
            continue
        words = [
            i
            for i, name in enumerate(names)
            if i > 0 and len(name) > 2 and name.isalpha() and not (i + 1 < len(names) and names[i + 1].startswith("##"))
        ]
        if words and all(ids != other for other, _ in found):
            found.append((ids, int(rng.choice(words))))
        if len(found) == count:
            break
    return found


def _one_segment(tokens: Sequence[int]) -> PackedBatch:
    """A batch of a single segment without labels."""
    length = len(tokens)
    return PackedBatch(
        input_ids=torch.tensor(tokens),
        token_type_ids=torch.zeros(length, dtype=torch.int64),
        position_ids=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        masked_positions=torch.zeros(1, dtype=torch.int64),
        masked_labels=torch.full((1,), IGNORE),
        nsp_labels=torch.full((1,), IGNORE),
        max_seqlen=length,
        num_tokens=length,
        num_masked=0,
        num_pairs=0,
    )


def plot_loss_curve(records: Sequence[dict[str, Any]], unigram_entropy: float, path: Path) -> None:
    """Draws masked-LM loss on training and held-out text over steps, and the unigram entropy, into a PNG.

    Args:
        records: log.jsonl's, see `log`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the loss curve needs matplotlib: pip install matplotlib") from error

    ink, train_color, heldout_color = "#333333", "#9db8d2", "#c0392b"
    train = [(r["step"], r["mlm_loss"]) for r in records if r["kind"] == "train"]
    heldout = [(r["step"], r["mlm_loss"]) for r in records if r["kind"] == "eval"]
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": ink, "text.color": ink, "axes.labelcolor": ink}):
        figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
        axes = figure.subplots()
        if train:
            axes.plot(*zip(*train, strict=True), color=train_color, linewidth=1.2, label="training")
        axes.plot(
            *zip(*heldout, strict=True), color=heldout_color, linewidth=2, marker="o", markersize=4, label="held-out"
        )
        axes.axhline(unigram_entropy, color=ink, linestyle="--", linewidth=1)
        last = max(step for step, _ in heldout + train)
        axes.annotate(
            f"unigram entropy {unigram_entropy:.2f}: knowing word frequencies alone",
            (last, unigram_entropy),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
        )
        axes.annotate(
            f"{heldout[-1][1]:.2f}",
            heldout[-1],
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=heldout_color,
            fontweight="bold",
        )
        losses = [loss for _, loss in heldout + train] + [unigram_entropy]
        axes.set_xlim(0, last * 1.07)
        axes.set_ylim(min(losses) - 0.06 * (max(losses) - min(losses)), None)
        axes.set_title("Masked-LM loss", loc="left", fontweight="bold")
        axes.set_xlabel("optimisation step")
        axes.set_ylabel("nats a token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        partial = path.with_suffix(".partial")
        figure.savefig(partial, format="png")
        os.replace(partial, path)


@dataclasses.dataclass(frozen=True)
class Report:
    """A finished run in numbers; ``as_text`` says it in words, report.json keeps it.

    Attributes:
        model: the model's name. parameters: trainable scalars.
        device: where it ran, in words. precision: "bf16" or "fp32".
        steps, tokens: optimisation steps and real tokens. seconds: wall clock of the whole run.
        tokens_per_second: real tokens over the time spent in steps. mfu: share of matmul_rate.
        matmul_rate: FLOP/s measured; matmul: what was measured.
        unigram_entropy: of the training corpus, nats a token.
        before, after: held-out figures.
        guesses: masked words guessed in held-out sentences.
        hf_directory: the exported model. loss_curve: the PNG, or why there is none.
    """

    model: str
    parameters: int
    device: str
    precision: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float
    matmul_rate: float
    matmul: str
    unigram_entropy: float
    before: Evaluation
    after: Evaluation
    guesses: list[Guess]
    hf_directory: str
    loss_curve: str

    def verdict(self) -> str:
        """Whether the model has learned more than how frequent each token is."""
        loss, entropy = self.after.mlm_loss, self.unigram_entropy
        if loss < CLEARLY_BELOW * entropy:
            return f"clearly below the unigram entropy, {entropy:.3f}: the model uses context"
        if loss < entropy:
            return f"just below the unigram entropy, {entropy:.3f}: hardly any use of context yet; train longer"
        return f"NOT below the unigram entropy, {entropy:.3f}: it has learned nothing from context yet; train longer"

    def as_text(self) -> str:
        """Markdown that also reads well in a terminal."""
        before, after = self.before, self.after
        minutes, seconds = divmod(round(self.seconds), 60)
        rows = [
            ("held-out", "before", "after"),
            ("---", "---:", "---:"),
            ("MLM loss (nats)", f"{before.mlm_loss:.3f}", f"{after.mlm_loss:.3f}"),
            ("MLM perplexity", f"{before.perplexity:,.0f}", f"{after.perplexity:,.1f}"),
            ("MLM accuracy", f"{before.mlm_accuracy:.1%}", f"{after.mlm_accuracy:.1%}"),
        ]
        if before.nsp_accuracy is not None and after.nsp_accuracy is not None:
            rows.append(("NSP accuracy", f"{before.nsp_accuracy:.1%}", f"{after.nsp_accuracy:.1%}"))
        counted = f"{after.num_masked:,} masked tokens" + (f", {after.num_pairs:,} pairs" if after.num_pairs else "")
        lines = [
            f"# Pretrained {self.model}: {self.parameters / 1e6:.1f} M parameters",
            "",
            f"{self.steps:,} steps, {self.tokens:,} tokens, {minutes} min {seconds} s on {self.device}, "
            f"{self.precision}",
            f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.0%} of the {rate_words(self.matmul_rate)} "
            f"that a {self.matmul} reaches here",
            "",
            *(f"| {a:<16} | {b:>8} | {c:>8} |" for a, b, c in rows),
            "",
            f"Loss after, {after.mlm_loss:.3f}, is {self.verdict()}.",
            f"(Held-out: {counted}.)",
            "",
            "## Words it guesses in held-out sentences",
            "",
        ]
        for guess in self.guesses:
            lines.append(f"- {guess.sentence}")
            tops = ", ".join(f"{token} {p:.0%}" for token, p in guess.guesses)
            right = "✓" if guess.guesses[0][0] == guess.truth else " "
            lines.append(f"    {right} {guess.truth}: {tops}")
        lines += [
            "",
            "## Where it is",
            "",
            f"- model: {self.hf_directory} (load it with `transformers.BertForPreTraining.from_pretrained"
            f'("{self.hf_directory}")`)',
            f"- loss curve: {self.loss_curve}",
        ]
        return "\n".join(lines) + "\n"

    def write(self, directory: Path) -> None:
        """Writes report.md and report.json."""
        content = dataclasses.asdict(self)
        content |= {"before": self.before.as_json(), "after": self.after.as_json(), "verdict": self.verdict()}
        for name, text in (("report.md", self.as_text()), ("report.json", json.dumps(content, indent=1) + "\n")):
            partial = directory / f".{name}.partial"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, directory / name)


__all__ = ["Guess", "Report", "guess_masked_words", "plot_loss_curve"]
