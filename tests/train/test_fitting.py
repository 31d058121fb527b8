"""--recompute auto on a made-up GPU (made_up_gpu.py), alone and on two ranks."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from conftest import RunRanks

Cases = list[tuple[list[float] | None, float, int, bool]]
"""Bytes that each rank has, or None for no GPU; the share that is left after measuring; the size given; packing."""


def fit_and_train(model_dir: str, cases: Cases) -> list[dict[str, Any]]:
    """In each case: choose, rehearse, train two steps; what was said, tried, chosen and learned."""
    sys.path.insert(0, str(Path(__file__).parent))
    from made_up_gpu import MadeUpGpu, Noted, Rows, config_of

    from anima.data.batching import collate
    from anima.errors import OutOfMemory
    from anima.model.lora import lora_b_parameters
    from anima.objectives.sft import SupervisedFineTuning
    from anima.train.fitting import fit
    from anima.train.method import Setup
    from anima.train.metrics import MetricSums
    from anima.train.rehearsal import rehearse
    from anima.train.run import Run
    from anima.train.step import GradientProbe, train_step

    results = []
    for memory, shrinks_to, given, packing in cases:
        torch.manual_seed(5)
        rows, said = Rows(), list[str]()
        gpu = MadeUpGpu(model_dir, None)
        ranks, engine = gpu.engine.ranks, gpu.engine
        gpu.memory = memory[ranks.rank] if memory else gpu.memory
        setup, config = Setup(Noted(gpu), rows, None), config_of(model_dir, given, packing)  # type: ignore[arg-type]
        random = torch.get_rng_state()
        fitted = fit(config, ranks, setup, engine, gpu.network, said.append, gpu if memory else None)
        assert torch.equal(torch.get_rng_state(), random)
        result: dict[str, Any] = {"why": fitted.plan.why, "measured": list(gpu.tried), "said": said}
        results.append(result)
        gpu.memory *= shrinks_to
        probe = GradientProbe(lora_b_parameters(gpu.network))
        parts = {"config": config, "num_steps": 2, "engine": engine, "objective": setup.objective, "fitted": fitted}
        told = {"probe": probe, "progress": SimpleNamespace(message=said.append)}
        run = Run(**{**dict.fromkeys(Run.__dataclass_fields__), **parts, **told})  # type: ignore[arg-type]
        try:
            run = rehearse(run)
        except OutOfMemory as error:
            result["error"] = str(error)
            continue
        assert not probe._seen.any()
        result |= {"plan": (run.plan.micro_batch_tokens, run.plan.recompute), "policy": gpu.recomputed()}
        gpu.tried.clear()
        sums, mine = MetricSums(), [rows[i] for i in range(ranks.rank, 6, ranks.world_size)]
        learned = [train_step(engine, SupervisedFineTuning(), [collate(mine)], 1e-2, sums) for _ in range(2)]
        probe.check()
        result |= {"norms": [(step.grad_norm, step.skipped) for step in learned], "loss": sums.reduce()}
    return results


def alone(megabytes: float | None, shrinks_to: float = 1.0, given: int = 0, packing: bool = True) -> Any:
    return (None if megabytes is None else [megabytes * 1e6], shrinks_to, given, packing)


def test_choices_of_one_rank(run_ranks: RunRanks, tiny_llama_dir: Path) -> None:
    checks: list[tuple[Any, Callable[..., None]]] = [
        (alone(None), nothing_to_measure),
        (alone(None, given=500), nothing_to_measure_but_a_size),
        (alone(1000), all_the_memory_in_the_world),
        (alone(80), as_worked_out_by_hand),
        (alone(80, given=600), only_the_layers_for_a_given_size),
        (alone(220, given=9000), only_the_layers_for_a_size_that_is_never_filled),
        (alone(80, shrinks_to=0.75), a_second_plan),
        (alone(12), hardly_any_memory),
        (alone(7.5), no_memory),
        (alone(15, packing=False), without_packing),
    ]
    results = run_ranks(fit_and_train, 1, str(tiny_llama_dir), [case for case, _ in checks])[0]
    for (_, check), found in zip(checks, results, strict=True):
        check(found)
        if "error" not in found:  # neither the policy nor measuring it changes a number
            assert (found["norms"], found["loss"]) == (results[0]["norms"], results[0]["loss"]), check.__name__
    assert not any(skipped for _, skipped in results[0]["norms"])


def nothing_to_measure(found: dict[str, Any]) -> None:
    assert found["plan"] == (8192, "all")
    assert "no GPU to measure, so all layers are recomputed, 8,192 tokens a micro-batch" in found["why"]
    assert found["measured"] == []


def nothing_to_measure_but_a_size(found: dict[str, Any]) -> None:
    assert found["plan"] == (500, "all")


def all_the_memory_in_the_world(found: dict[str, Any]) -> None:
    """One pass of 2880 tokens: 3.88 s, and twice that with all recomputed; 70,000 * 3072 bytes and 6 MB."""
    assert found["plan"] == (3072, "cheap")
    assert found["policy"] == 0
    assert "3,072 tokens a micro-batch, only the cheap parts recomputed: 742 tokens/s expected" in found["why"]
    assert found["why"].endswith("0.2 of 0.9 GiB (all at 3,072: 371 tokens/s)")
    sizes = {layers: sorted({size for n, size in found["measured"] if n == layers}) for layers in (0, 1, 2)}
    assert sizes == {0: [1020, 2040, 2550], 1: [1020, 2040, 2550], 2: [240, 1020, 2040, 2550]}
    assert found["said"][-1] == "heaviest micro-batch of the run: 2,880 tokens; it fits"


def as_worked_out_by_hand(found: dict[str, Any]) -> None:
    """96 % of 80 MB less 5: 71.8 MB for a pass. All kept: 512 tokens, 6 passes, 6 + 2.88 s. One layer recomputed: 1536
    tokens (62.4 MB), 2 passes, 1.5 * (2 + 2.88) s. Both: one pass, 2 * (1 + 2.88) s.
    """
    assert found["plan"] == (1536, "1")
    assert found["policy"] == 1
    assert "1,536 tokens a micro-batch, 1 of 2 layers recomputed: 393 tokens/s" in found["why"]
    assert found["why"].endswith("(cheap at 512: 324 tokens/s; all at 3,072: 371 tokens/s)")


def only_the_layers_for_a_given_size(found: dict[str, Any]) -> None:
    assert found["plan"] == (600, "cheap")


def only_the_layers_for_a_size_that_is_never_filled(found: dict[str, Any]) -> None:
    """A step has 2880 tokens: 203 MB with 206 allowed."""
    assert found["plan"] == (9000, "cheap")


def a_second_plan(found: dict[str, Any]) -> None:
    """60 MB are left: 1440 tokens of the first plan take 63.6. The next may take 60.7: all at once takes 36.7."""
    assert found["plan"] == (3072, "all")
    *_, failed, why, fits = found["said"]
    assert failed.startswith("rank 0 ran out of memory before the first step")
    assert failed.endswith("once more with 10 % less memory")
    assert "3,072 tokens a micro-batch, all 2 layers" in why
    assert "it fits" in fits


def hardly_any_memory(found: dict[str, Any]) -> None:
    """6.5 MB for a pass: 512 tokens with all recomputed take 6.1; those of 1024 that are tried first fail."""
    assert found["plan"] == (512, "all")
    assert "(cheap does not fit)" in found["why"]
    assert (2, 1020) in found["measured"]


def no_memory(found: dict[str, Any]) -> None:
    assert "no pass fitted into memory; the smallest micro-batch is tried: 512 tokens" in found["why"]
    assert "ran out of memory before the first step" in found["error"]
    assert "--max_seq_length" in found["error"] or "--micro_batch_tokens" in found["error"]


def without_packing(found: dict[str, Any]) -> None:
    """A pass is one sequence, 90 tokens at most: 7.3 MB without recomputation."""
    assert found["plan"] == (90, "cheap")
    assert max(size for _, size in found["measured"]) == 90


def test_two_ranks_choose_alike(run_ranks: RunRanks, tiny_llama_dir: Path) -> None:
    """Each has 1440 tokens a step: one pass with a layer recomputed, 1.5 * 2.44 s; 3 passes without, 3 + 1.44 s."""
    unlike: Cases = [([1000e6, 80e6], 1.0, 0, True), ([800e6, 80e6], 0.75, 0, True), ([800e6, 80e6], 0.1, 0, True)]
    cases: Cases = [(None, 1.0, 0, True), *unlike, ([1000e6, 70e6], 1.0, 0, True)]
    first, second = run_ranks(fit_and_train, 2, str(tiny_llama_dir), cases)
    assert [found["why"] for found in first] == [found["why"] for found in second]
    for here, there in zip(first, second, strict=True):  # a rank that has no memory for a pass does not repeat it
        assert list(dict.fromkeys(here["measured"])) == list(dict.fromkeys(there["measured"]))
    plain, least, again, error, tight = first
    # 1020 tokens without recomputation fail on the second rank, so on both half of that comes next, then a quarter.
    assert list(dict.fromkeys(size for layers, size in tight["measured"] if layers == 0)) == [1020, 510, 240]
    assert least["plan"] == second[1]["plan"] == (1536, "1")
    assert "787 tokens/s" in least["why"]
    assert again["plan"] == second[2]["plan"]
    assert again["plan"] != least["plan"]
    assert again["said"][-3].startswith("rank 1 ran out of memory")
    for found in (least, again, tight):
        assert (found["norms"], found["loss"]) == (plain["norms"], plain["loss"])
    for found in (error, second[3]):
        assert "rank 1 ran out of memory before the first step" in found["error"]
