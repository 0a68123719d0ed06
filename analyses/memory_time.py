"""What a run cost: seconds of training and of each phase, tokens per second, peak bytes.

Source: PromptKD (Kim et al. 2024, https://arxiv.org/abs/2402.12842), table 2: memory allocated, memory cached
(which torch now calls reserved), time.
Differs: shared stages, evaluation, evidence and checkpoints are left out of the training time and have phases
of their own; peaks are those of training; on a CPU the peak is the process's resident set.
"""

from kdbench.record import Analysis, RunFolder, Score

VERSION = 1
_PEAKS = ("peak_allocated", "peak_reserved", "peak_rss")


def analyze(run: RunFolder) -> Analysis:
    """Scores `train_seconds`, `<phase>_seconds`, `seconds_per_update` (of the student, mean),
    `peak_*_bytes`, `train_` and `sampled_tokens_per_s`, `prompts_per_s`.

    `peak_bytes` is the allocated memory of a GPU, or the resident set where there is none. What was not
    measured has no score.
    """
    record = run.record
    training = record.training_phases
    seconds = sum(phase.seconds for phase in training.values())
    scores = {
        f"{name}_seconds": Score(phase.seconds, "s", 1, "lower") for name, phase in record.phases.items()
    }
    scores["train_seconds"] = Score(seconds, "s", 1, "lower")
    rollout = training["rollout"].seconds if "rollout" in training else 0.0
    if updates := record.budget.get("optimizer_steps"):
        scores["seconds_per_update"] = Score(seconds / updates, "s", 1, "lower")
    for name, amount, unit, spent in (
        ("train_tokens_per_s", record.budget.get("tokens_seen"), "tokens/s", seconds),
        ("sampled_tokens_per_s", record.budget.get("tokens_sampled"), "tokens/s", rollout),
        ("prompts_per_s", record.budget.get("prompts"), "prompts/s", seconds),
    ):
        if amount and spent > 0:
            scores[name] = Score(amount / spent, unit, 1, "higher")
    for name in _PEAKS:
        measured = [getattr(phase, f"{name}_bytes") or 0 for phase in training.values()]
        if any(measured):
            scores[f"{name}_bytes"] = Score(max(measured), "bytes", 1, "lower")
    for name in ("peak_allocated_bytes", "peak_rss_bytes"):
        if name in scores and "peak_bytes" not in scores:
            scores["peak_bytes"] = scores[name]
    return Analysis(scores, detail={"training_phases": sorted(training)})
