"""What a run cost: seconds of training and of each phase, tokens per second, peak bytes.

Source: PromptKD (Kim et al. 2024, https://arxiv.org/abs/2402.12842), table 2: memory allocated, memory cached
(which torch now calls reserved), time.
Differs: shared stages, evaluation, evidence and checkpoints are left out of the training time and have phases
of their own; peaks are those of training; on a CPU the peak is the process's resident set.
"""

from kdbench.record import Analysis, RunFolder, Score

VERSION = 1
# Phases that make what all methods share, measure, or save, and are no part of a method's training.
NOT_TRAINING = ("stages", "evaluate", "snapshot", "dev", "checkpoint")
_PEAKS = ("peak_allocated", "peak_reserved", "peak_rss")


def analyze(run: RunFolder) -> Analysis:
    """Scores `train_seconds`, `<phase>_seconds`, `peak_*_bytes`, `train_` and `sampled_tokens_per_s`.

    `peak_bytes` is the allocated memory of a GPU, or the resident set where there is none. What was not
    measured has no score.
    """
    record = run.record
    training = {name: phase for name, phase in record.phases.items() if name not in NOT_TRAINING}
    seconds = sum(phase.seconds for phase in training.values())
    scores = {
        f"{name}_seconds": Score(phase.seconds, "s", 1, "lower") for name, phase in record.phases.items()
    }
    scores["train_seconds"] = Score(seconds, "s", 1, "lower")
    rollout = training["rollout"].seconds if "rollout" in training else 0.0
    for name, tokens, spent in (
        ("train_tokens_per_s", record.budget.get("tokens_seen"), seconds),
        ("sampled_tokens_per_s", record.budget.get("tokens_sampled"), rollout),
    ):
        if tokens and spent > 0:
            scores[name] = Score(tokens / spent, "tokens/s", 1, "higher")
    for name in _PEAKS:
        measured = [getattr(phase, f"{name}_bytes") or 0 for phase in training.values()]
        if any(measured):
            scores[f"{name}_bytes"] = Score(max(measured), "bytes", 1, "lower")
    for name in ("peak_allocated_bytes", "peak_rss_bytes"):
        if name in scores and "peak_bytes" not in scores:
            scores["peak_bytes"] = scores[name]
    return Analysis(scores, detail={"training_phases": sorted(training)})
