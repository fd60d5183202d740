"""The report of a finished run: held-out figures before and after, speed, guesses for masked words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...model.atomic import replace_file
from ..step.flops import rate_words
from .evaluate import Evaluation
from .guesses import Guess
from .strict_json import strict_json

CLEARLY_BELOW = 0.95  # of the unigram entropy: a model above it has learned almost nothing from context
DIVERGED = 1.1  # times the loss of the best evaluation


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a finished run.

    Attributes:
        model: the model's name.
        parameters: number of trainable scalars.
        device: in words.
        precision: one of `precision.PRECISIONS`.
        steps: optimisation steps.
        seqlen: longest segments, in words: later positions were not trained.
        epochs: how often the training text was read.
        tokens: real tokens.
        spikes: of the training loss.
        seconds: wall-clock time of the run.
        tokens_per_second: real tokens divided by the time of the steps.
        mfu: FLOP/s of the steps divided by ``matmul_rate``.
        matmul_rate: FLOP/s, measured.
        matmul: what ``matmul_rate`` is the rate of, in words.
        unigram_entropy: of the training corpus, nats a token.
        before, after: held-out evaluations before training and of the exported model.
        model_step: the step of the exported model, the last one unless --keep-best chose another.
        best_loss: masked-LM loss of the best evaluation.
        guesses: guesses for masked words in held-out sentences.
        hf_directory: folder of the exported model.
        loss_curve: path of the PNG, or the reason why there is none.
    """

    model: str
    parameters: int
    device: str
    precision: str
    steps: int
    seqlen: str
    epochs: float
    tokens: int
    spikes: int
    seconds: float
    tokens_per_second: float
    mfu: float
    matmul_rate: float
    matmul: str
    unigram_entropy: float
    before: Evaluation
    after: Evaluation
    best_loss: float
    model_step: int
    guesses: list[Guess]
    hf_directory: str
    loss_curve: str

    def verdict(self) -> str:
        """Compares the loss with the unigram entropy: whether the model uses context."""
        loss, entropy = self.after.mlm_loss, self.unigram_entropy
        advice = "lower --lr or raise --warmup"
        if self.steps and loss > 1.01 * self.before.mlm_loss:
            return f"ABOVE the loss before training, {self.before.mlm_loss:.3f}: the run has diverged; {advice}"
        if loss > DIVERGED * self.best_loss:
            return f"far above the best evaluation's, {self.best_loss:.3f}: the run has diverged; {advice}"
        if loss < CLEARLY_BELOW * entropy:
            return f"clearly below the unigram entropy, {entropy:.3f}: the model uses context"
        if loss < entropy:
            return f"just below the unigram entropy, {entropy:.3f}: hardly any use of context yet; train longer"
        return f"NOT below the unigram entropy, {entropy:.3f}: nothing learned from context yet; train longer"

    def as_text(self) -> str:
        """Markdown, also readable in a terminal."""
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
            f"{self.steps:,} steps, {self.epochs:.3g} epochs, {self.tokens:,} tokens, {minutes} min {seconds} s on "
            f"{self.device}, {self.precision}",
            f"segments of up to {self.seqlen} tokens",
            f"{self.tokens_per_second:,.0f} tokens/s, MFU {self.mfu:.0%} of the {rate_words(self.matmul_rate)} "
            f"that a {self.matmul} reaches here",
            "",
            *(f"| {a:<16} | {b:>8} | {c:>8} |" for a, b, c in rows),
            "",
            f"Loss after, {after.mlm_loss:.3f}, is {self.verdict()}.",
            f"(Held-out: {counted}.)",
            *(
                [f"The model and the figures after are those of step {self.model_step:,}, the best evaluation."]
                if self.model_step != self.steps
                else []
            ),
            *([f"Spikes of the training loss: {self.spikes} (`spike` in log.jsonl)."] if self.spikes else []),
            "",
            "## Masked words guessed in held-out sentences",
            "",
        ]
        for guess in self.guesses:
            lines.append(f"- {guess.sentence}")
            tops = ", ".join(f"{token} {p:.0%}" for token, p in guess.guesses)
            right = "✓" if guess.guesses[0][0] == guess.truth else " "
            lines.append(f"    {right} {guess.truth}: {tops}")
        lines += [
            "",
            "## Files",
            "",
            f"- model: {self.hf_directory} (load it with `transformers.BertForPreTraining.from_pretrained"
            f'("{self.hf_directory}")`)',
            f"- loss curve: {self.loss_curve}",
        ]
        return "\n".join(lines) + "\n"

    def write(self, directory: Path) -> None:
        """Writes report.md and report.json."""
        content = dataclasses.asdict(self)
        content |= {"before": self.before.to_json(), "after": self.after.to_json(), "verdict": self.verdict()}
        for name, text in (("report.md", self.as_text()), ("report.json", strict_json(content, indent=1) + "\n")):
            with replace_file(directory / name) as partial:
                partial.write_text(text, encoding="utf-8")
