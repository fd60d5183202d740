"""The pretraining run: set up, train, evaluate, export, report.

A run is ``steps`` or ``minutes`` long. The learning rate is a function of the run's progress, 0 … 1. With minutes,
progress is the share of the time that is spent, evaluation and export included, so the rate reaches 0 when the time is
over. On SIGINT, SIGTERM or SIGUSR1 the run finishes the step, saves a checkpoint and says how to continue. On a CPU a
continued run gives the same bits as an uninterrupted one (with steps; with minutes it depends on the clock).

Launched by torchrun, the processes share the micro-batches of each step. Their content, order and dropout depend on
the settings only, not on the number of processes. Rank 0 keeps the clock, writes and prints.
"""

from __future__ import annotations

import torch

from ...model.hf.save import save_hf
from ...model.pretraining import BertForPreTraining
from ..errors import UserError
from ..step.distributed import LostPeer, Ranks, lost_connection
from ..step.sharding import unsharded
from .checkpoint import read_state, weights_to_export
from .evaluate import Evaluation
from .first_model import name_of_model
from .guesses import guess_masked_words
from .log import read_log
from .loop import check_inputs, errors_explained, evaluate_and_log, keeps_best, save, selected, train
from .loss_curve import plot_loss_curve
from .phases import in_words, phases, trained_positions
from .places import check_places
from .plan import choose_device
from .report import Report
from .settings import PretrainSettings
from .setup import Run, set_up
from .signals import Interrupted, Stopped, StopSignal, exit_status


def pretrain(settings: PretrainSettings, resume_command: str) -> Report | None:
    """Runs ``fusebert pretrain``: writes checkpoints/, hf/, log.jsonl, loss.png, report.md and report.json to ``out``.

    Args:
        resume_command: the command that continues the run, for messages.

    Returns:
        The report; None on the ranks above 0 of a torchrun job.

    Raises:
        UserError: an option or a checkpoint is not usable, loss or weights are not finite, or another process of the
            job ended.
        CorpusError: ``settings.data`` is missing or damaged.
        OSError: for example no space left. It names the path, the last good checkpoint and the command to go on.
        signals.Interrupted: a signal came; a checkpoint was saved. A signal before the first step ends the process.
    """
    ranks = Ranks.from_environment()
    with StopSignal(silent=not ranks.alone) as stop:
        try:
            ranks.join(choose_device(settings.device, ranks))
            run = set_up(settings, resume_command, ranks)
            try:
                with errors_explained(run):
                    report = _run(run, stop)
            finally:
                run.close()
            ranks.leave()
            return report
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU's memory is full: lower --tokens-per-batch, and give --batch-tokens to keep the size of a step"
            ) from error
        except Exception as error:
            if lost_connection(error):
                raise LostPeer from error
            raise


def _run(run: Run, stop: StopSignal) -> Report | None:
    try:
        train(run, stop)
        return _finish(run, stop)
    except Stopped as stopped:
        where = run.last_good() if run.schedule.complete else f"saved in {save(run)}"
        raise Interrupted(
            f"stopped after step {run.state.step}, {where}; go on with:\n{run.resume_command}",
            exit_status(stopped.interrupted),
        ) from None


def _finish(run: Run, stop: StopSignal) -> Report | None:
    """Evaluates, saves, exports to hf/, draws loss.png and writes the report, which rank 0 returns."""
    settings, state, out, complete = run.settings, run.state, run.settings.out, run.schedule.complete
    check_inputs(run)
    after = evaluate_and_log(run, stop)
    state.finished = True
    if not complete:
        selected(run, after)
        save(run)
    if run.average is not None:
        run.average.apply()
    model = unsharded(run.model, run.ranks)
    if model is None:
        return None
    if run.log_error is not None:
        raise run.log_error
    check_places(out)
    model_step = state.step
    if keeps_best(settings) and state.selection is not None and state.selection["step"] != state.step:
        model_step, after = state.selection["step"], Evaluation.from_json(state.selection["scores"])
        path = run.checkpoints / f"step-{model_step:08d}"
        read_state(path)
        model = BertForPreTraining(model.config)
        model.load_state_dict(weights_to_export(path))
        model.to(run.plan.device)
    positions = trained_positions(settings.seqlen, settings.init_from is not None, model.config)
    save_hf(model, out / "hf", run.inputs.keep(out), model_max_length=positions)
    records = read_log(out / "log.jsonl")
    try:
        loss_curve = "not drawn: log.jsonl has no evaluation, perhaps because it was deleted"
        if any(record["kind"] == "eval" for record in records):
            plot_loss_curve(records, run.corpus.unigram_entropy, out / "loss.png")
            loss_curve = str(out / "loss.png")
    except ModuleNotFoundError as error:
        loss_curve = f"not drawn: {error}"
    assert state.first_evaluation is not None
    train_s = max(state.train_s, 1e-9)
    report = Report(
        model=name_of_model(settings, run.plan),
        parameters=run.model.num_parameters(),
        device=run.device_words,
        precision=run.plan.precision,
        steps=state.step,
        seqlen=in_words(phases(settings.seqlen)),
        epochs=run.epochs(),
        tokens=state.tokens,
        spikes=state.spikes,
        seconds=state.elapsed_s if complete else run.clock.elapsed(),
        tokens_per_second=state.tokens / train_s,
        mfu=state.flops / train_s / run.matmul_rate,
        matmul_rate=run.matmul_rate,
        matmul=run.matmul,
        unigram_entropy=run.corpus.unigram_entropy,
        before=Evaluation.from_json(state.first_evaluation),
        after=after,
        best_loss=min(
            [
                record["mlm_loss"]
                for record in records
                if record["kind"] == "eval"
                and record["mlm_loss"] is not None
                and record.get("seqlen", run.phase.seqlen) == run.phase.seqlen
            ],
            default=after.mlm_loss,
        ),
        model_step=model_step,
        guesses=guess_masked_words(model, run.corpus, run.phase.seqlen),
        hf_directory=str(out / "hf"),
        loss_curve=loss_curve,
    )
    report.write(out)
    return report
