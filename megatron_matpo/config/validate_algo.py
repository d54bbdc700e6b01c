"""Violations in the section `algo` and in `compat`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_matpo.config.root import Config


def check_algo(config: Config) -> Iterator[str]:
    """Violations that the configuration alone shows."""
    algo = config.algo
    if algo.tis != "off" and algo.old_logprobs == "engine":
        yield (
            f"algo.tis={algo.tis}: has nothing to correct with algo.old_logprobs=engine, where the "
            "ratio of the loss already starts from the engine's log-probs; use "
            "algo.old_logprobs=trainer or algo.tis=off"
        )
    if algo.tis == "mask" and algo.tis_cap == 1:
        yield (
            "algo.tis_cap=1: with algo.tis=mask every token whose log-probs differ at all is "
            "masked; must be more than 1"
        )
    if config.compat == "reference":
        yield from _check_reference(config)


def _check_reference(config: Config) -> Iterator[str]:
    """Options that the original does not have where `compat` fixes what it does."""
    algo = config.algo
    if algo.baseline != "group_mean":
        yield (
            f"algo.baseline={algo.baseline}: compat=reference fixes group_mean, the original's; "
            "use compat=corrected for others"
        )
    if algo.aggregation != "token":
        yield (
            f"algo.aggregation={algo.aggregation}: compat=reference fixes token, the original's "
            "default; use compat=corrected for others"
        )


def warn_algo(config: Config) -> Iterator[str]:
    """Settings that are allowed but probably not meant."""
    algo = config.algo
    if algo.kl_coef > 0 and algo.kl_estimator == "k1":
        yield (
            "algo.kl_estimator=k1: as a loss its expected gradient is 0, so it penalises nothing; "
            "k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy)"
        )
    if algo.baseline == "leave_one_out" and algo.normalize_std:
        yield (
            "algo.baseline=leave_one_out: with algo.normalize_std=true it differs from group_mean "
            "by a factor only; RLOO sets algo.normalize_std=false"
        )
    if config.compat == "reference" and (algo.kl_coef > 0 or algo.tis != "off"):
        yield (
            "compat=reference: the published runs had no KL penalty and no importance weights "
            f"(algo.kl_coef={algo.kl_coef:g}, algo.tis={algo.tis})"
        )
