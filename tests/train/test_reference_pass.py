"""The reference is the model it says it is, asked once, by any number of ranks, and picked up where a pass was cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunRanks

LENGTHS = ((3, 4, 30), (20, 11, 2), (9, 8, 9), (1, 25, 40), (14, 2, 6), (5, 5, 8), (7, 30, 3))


def dataset(folder: Path) -> Any:
    """Ragged pairs of random tokens on disk; every rank maps the same file."""
    from anima.data.dataset import SequenceWriter, TokenizedDataset
    from anima.data.encode import IGNORE_INDEX, TokenSequence
    from anima.data.pairs import PairDataset

    path = folder / "tokens.arrow"
    if not path.exists():
        generator, writer = np.random.default_rng(0), SequenceWriter(path)
        for number, (prompt_length, *answers) in enumerate(LENGTHS):
            prompt = generator.integers(5, 280, prompt_length)
            for length in answers:
                ids = np.concatenate([prompt, generator.integers(5, 280, length)]).astype(np.int32)
                labels = ids.copy()
                labels[:prompt_length] = IGNORE_INDEX
                writer.write([(TokenSequence(ids, labels), 0, f":{number + 1}")])
        writer.close()
    return PairDataset(TokenizedDataset.open(path, ["pairs.jsonl"], "key"))


def network(model_dir: str, adapter: str | None = None, *, moved: int | None = None) -> Any:
    """Base and adapter; `moved` draws B matrices that are not zero under that seed."""
    from anima.config.schema import LoraConfig, ModelConfig
    from anima.model.base_model import load_base
    from anima.model.compute import Compute
    from anima.model.lora import attach_lora, lora_b_parameters
    from anima.model.packed import PackedModel

    base = load_base(ModelConfig(model_name_or_path=model_dir), Compute(torch.device("cpu"), torch.float32, "test"))
    adapted = attach_lora(base, LoraConfig(lora_r=16), dtype=torch.float32, seed=1, adapter_path=adapter)
    if moved is not None:
        generator = torch.Generator().manual_seed(moved)
        for parameter in lora_b_parameters(adapted).values():
            parameter.data.normal_(0, 0.05, generator=generator)
    return PackedModel(adapted, "all")


def ask(pairs: Any, there: Any, reference: Any, root: Path, *, numbers: Any = None, budget: int = 90) -> Any:
    """What the pass finds, and the lines that it printed."""
    from anima.distributed import read_ranks
    from anima.objectives.reference import ReferenceCache
    from anima.train.reference_pass import NetworkPolicy, ReferencePass

    lines: list[str] = []
    cache = ReferenceCache(root, {"of": "test"}, len(pairs))
    with reference.in_place(there):
        work = ReferencePass(NetworkPolicy(there), torch.device("cpu"), read_ranks(), budget, True, lines.append)
        wanted = np.arange(len(pairs)) if numbers is None else np.array(numbers)
        return work.complete("train", pairs, wanted, cache), lines


def separately(model_dir: str, pairs: Any, adapter: Path | None) -> np.ndarray[Any, Any]:
    """The definition: a copy of the base of its own, with that adapter, one answer at a time."""
    from anima.data.encode import IGNORE_INDEX
    from anima.model.adapters import Adapters

    model: Any = network(model_dir).adapted.unload()
    if adapter is not None:
        model = Adapters(model, {"tried": adapter}).model
    model.set_attn_implementation("sdpa")
    found = np.zeros((len(pairs), 2))
    for i in range(len(pairs)):
        for j, side in enumerate(pairs[i]):
            ids = torch.from_numpy(side.input_ids.astype(np.int64))
            with torch.no_grad():
                table = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1)
            scored = torch.from_numpy(side.labels[1:] != IGNORE_INDEX)
            found[i, j] = float(table.gather(1, ids[1:, None])[:, 0][scored].sum())
    return found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> dict[int, Path]:
    """Two saved adapters."""
    from anima.model.lora import save_adapter

    folders = {}
    for seed in (7, 8):
        folders[seed] = tmp_path_factory.mktemp("adapter")
        save_adapter(network(str(tiny_llama_dir), moved=seed).adapted, folders[seed])
    return folders


def test_each_reference_is_the_separate_model_and_leaves_the_policy_as_it_was(
    tiny_llama_dir: Path, adapters: dict[int, Path], tmp_path: Path
) -> None:
    from anima.model.lora import adapter_hash, trainable_parameters
    from anima.train.reference_pass import Reference

    pairs, model_dir = dataset(tmp_path), str(tiny_llama_dir)
    there = network(model_dir, str(adapters[7]))
    before = {name: p.detach().clone() for name, p in trainable_parameters(there).items()}
    first, second = adapter_hash(str(adapters[7])), adapter_hash(str(adapters[8]))
    assert first != second
    cases = {
        None: Reference("", None, adapter_off=True, equals_start=False),
        adapters[7]: Reference(first, None, adapter_off=False, equals_start=True),
        adapters[8]: Reference(second, str(adapters[8]), adapter_off=False, equals_start=False),
    }
    expected = {folder: separately(model_dir, pairs, folder) for folder in cases}
    assert np.abs(expected[None] - expected[adapters[7]]).max() > 0.5
    assert np.abs(expected[adapters[8]] - expected[adapters[7]]).max() > 0.5
    for number, (folder, reference) in enumerate(cases.items()):
        found, _ = ask(pairs, there, reference, tmp_path / str(number))
        np.testing.assert_allclose(found, expected[folder], rtol=1e-5, atol=1e-3)
        after = trainable_parameters(there)
        assert after.keys() == before.keys()
        assert all(torch.equal(p, before[name]) for name, p in after.items())
        assert not any("reference" in name for name, _ in there.named_parameters())
    again, _ = ask(pairs, there, cases[adapters[7]], tmp_path / "again")
    np.testing.assert_allclose(again, expected[adapters[7]], rtol=1e-5, atol=1e-3)


def test_a_pass_that_was_cut_goes_on_and_a_whole_one_is_not_repeated(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anima.train import reference_pass
    from anima.train.reference_pass import Reference

    monkeypatch.setattr(reference_pass, "ROUND_MICRO_BATCHES", 1)
    pairs, there = dataset(tmp_path), network(str(tiny_llama_dir), moved=7)
    off = Reference("", None, adapter_off=True, equals_start=True)
    whole, lines = ask(pairs, there, off, tmp_path / "whole")
    assert lines[0].startswith("reference, train: 0 of 7 pairs known")
    assert lines[-1] == "reference, train: 7 of 7 pairs"
    assert len(lines) > 3
    part, _ = ask(pairs, there, off, tmp_path / "cut", numbers=[4, 1])
    assert np.isnan(part[:, 0]).tolist() == [True, False, True, True, False, True, True]
    rest, lines = ask(pairs, there, off, tmp_path / "cut", budget=200)
    assert lines[0].startswith("reference, train: 2 of 7 pairs known")
    np.testing.assert_allclose(rest, whole, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(reference_pass, "pair_logps", lambda *_: pytest.fail("asked again"))
    again, lines = ask(pairs, there, off, tmp_path / "cut")
    assert np.array_equal(again, rest)
    assert len(lines) == 1


def test_a_full_disk_loses_the_cache_but_not_the_numbers(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anima.objectives.reference import ReferenceCache
    from anima.train.reference_pass import Reference

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    pairs, there = dataset(tmp_path), network(str(tiny_llama_dir))
    off = Reference("", None, adapter_off=True, equals_start=True)
    expected, _ = ask(pairs, there, off, tmp_path / "one")
    monkeypatch.setattr(ReferenceCache, "add", refuse)
    found, lines = ask(pairs, there, off, tmp_path / "two")
    assert np.array_equal(found, expected)
    assert any("No space left on device" in line for line in lines)


def test_a_number_that_is_not_finite_stops_and_names_the_row(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from anima.errors import TrainingError
    from anima.train.reference_pass import Reference

    pairs, there = dataset(tmp_path), network(str(tiny_llama_dir))
    there.head_weight.data[int(pairs[3][1].input_ids[-1])] = float("nan")
    with pytest.raises(TrainingError, match="no number") as caught:
        ask(pairs, there, Reference("", None, adapter_off=True, equals_start=True), tmp_path / "x")
    assert "pairs.jsonl:" in str(caught.value.where)


def asked_by_ranks(model_dir: str, folder: str) -> Any:
    """For run_ranks."""
    from anima.train.reference_pass import Reference

    off = Reference("", None, adapter_off=True, equals_start=True)
    return ask(dataset(Path(folder)), network(model_dir, moved=7), off, Path(folder) / "cache")[0]


def test_ranks_share_the_work_and_know_the_same(run_ranks: RunRanks, tiny_llama_dir: Path, tmp_path: Path) -> None:
    from anima.objectives.reference import ReferenceCache
    from anima.train.reference_pass import Reference

    pairs = dataset(tmp_path)
    two = run_ranks(asked_by_ranks, 2, str(tiny_llama_dir), str(tmp_path))
    assert np.array_equal(two[0], two[1])
    off = Reference("", None, adapter_off=True, equals_start=True)
    one, _ = ask(pairs, network(str(tiny_llama_dir), moved=7), off, tmp_path / "alone")
    np.testing.assert_allclose(two[0], one, rtol=1e-5, atol=1e-4)
    assert np.array_equal(ReferenceCache(tmp_path / "cache", {"of": "test"}, len(pairs)).load()[0], two[0])


@pytest.mark.parametrize(
    ("start", "reference", "expected"),
    [
        (None, "auto", ("base", True, True)),
        (None, "base", ("base", True, True)),
        (7, "auto", (7, False, True)),
        (7, "base", ("base", True, False)),
        (7, "adapter:7", (7, False, True)),
        (7, "adapter:8", (8, False, False)),
        (None, "adapter:8", (8, False, False)),
        (7, "none", None),
    ],
)
def test_which_model_a_name_means(start: int | None, reference: str, expected: Any, adapters: dict[int, Path]) -> None:
    from anima.config.preference import PreferenceConfig
    from anima.config.schema import Config, DataConfig, ModelConfig, OutputConfig
    from anima.model.lora import adapter_hash
    from anima.train.reference_pass import resolve_reference

    name, _, number = reference.partition(":")
    config = Config(
        model=ModelConfig(model_name_or_path="m", adapter_path=None if start is None else str(adapters[start])),
        data=DataConfig(train_files=("f",)),
        output=OutputConfig(output_dir="o"),
        objective="dpo",
        preference=PreferenceConfig(reference=f"adapter:{adapters[int(number)]}" if number else name),
    )
    found = resolve_reference(config)
    if expected is None:
        assert found is None
        return
    which, off, equal = expected
    assert found is not None
    assert found.adapter == ("" if which == "base" else adapter_hash(str(adapters[which])))
    assert (found.adapter_off, found.equals_start) == (off, equal)
    assert (found.folder is not None) == (which == 8)


def test_a_missing_reference_adapter_is_found_early(tmp_path: Path) -> None:
    from anima.errors import ModelError
    from anima.model.lora import adapter_hash

    with pytest.raises(ModelError, match=r"lacks adapter_config\.json"):
        adapter_hash(str(tmp_path))
