"""One analysis per file: `VERSION` and `analyze(run) -> Analysis`, from what runs saved, without any model.

A changed metric is a new `VERSION`; scores that were printed stay as they are in their board's records.
"""
