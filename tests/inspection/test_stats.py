"""Figures of a set: against pandas, against the loader itself, and by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anima.config.schema import BatchConfig, DataConfig
from anima.data.formats import to_conversation
from anima.data.kinds import CONVERSATIONS
from anima.data.loader import StepLoader
from anima.data.prepare import prepare, tokenise
from anima.data.sources import resolve
from anima.data.templates import make_template
from anima.data.text_templates import ALPACA_WITH_INPUT
from anima.data.tokenizer import tokenize
from anima.inspection.stats import QUANTILES, Stats, facts, histogram, measure, quantiles, table


def _measure(file: str, tokenizer: Any, cache: Path, batch: BatchConfig, ranks: int = 1, **options: Any) -> Stats:
    config = DataConfig(train_files=(file,), data_cache_dir=str(cache), data_workers=1, **options)
    template = make_template(config.chat_template, tokenizer)
    data = prepare(config, tokenizer, seed=3, template=template)
    whole = tokenise(CONVERSATIONS, config, tokenizer, template)[0]
    return measure(data.train, whole.lengths(), whole.report, config, batch, unit="sequences", seed=3, ranks=ranks)


def test_quantiles_by_hand() -> None:
    found = quantiles(np.array([10, 20, 30, 40, 50], np.int32))
    # Position 0.9 * 4 = 3.6: 40 + 0.6 * 10; 0.98 * 4 = 3.92; 0.85 * 4 = 3.4.
    assert found == {"0.5": 30, "0.8": 42, "0.85": 44, "0.9": 46, "0.95": 48, "0.98": pytest.approx(49.2), "1": 50}
    assert quantiles(np.zeros(0, np.int32)) == {}


def test_the_length_report_of_the_ancestor_on_real_rows(shared_data_dir: Path, smol_tokenizer: Any) -> None:
    """Source in the template with an input, target alone, quantiles as pandas has them: all three agree with ours."""
    import pandas as pd

    rows = [row.values for row in resolve([str(shared_data_dir / "alpaca_zh_demo.json")], "t")[0].rows()]
    shape = f"{ALPACA_WITH_INPUT}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response: "
    texts = {"source": [shape.format(**row) for row in rows], "target": [str(row["output"]) for row in rows]}
    for column in texts.values():
        lengths = [len(ids) for ids in tokenize(smol_tokenizer, column)]
        expected = pd.Series(lengths).quantile(list(QUANTILES))
        assert list(quantiles(np.array(lengths, np.int32)).values()) == pytest.approx(expected.tolist(), abs=1e-9)


def test_source_and_target_of_real_rows(shared_data_dir: Path, smol_tokenizer: Any, tmp_path: Path) -> None:
    file = str(shared_data_dir / "alpaca_en_demo.json")
    options = {"chat_template": "alpaca", "source_max_len": 100, "target_max_len": 200}
    found = _measure(file, smol_tokenizer, tmp_path, BatchConfig(), **options)
    template = make_template("alpaca", smol_tokenizer)
    source, target = [], []
    for row in resolve([file], "t")[0].rows():
        messages = to_conversation(row.values, "alpaca", "f").messages
        source.append(len(tokenize(smol_tokenizer, [template.prompt(messages[:1])])[0]))
        target.append(len(tokenize(smol_tokenizer, [messages[1].content])[0]) + 1)  # and the EOS
    assert found.quantiles["source"] == quantiles(np.array(source))
    assert found.quantiles["target"] == quantiles(np.array(target))
    assert found.over_limit["source"] == pytest.approx(np.mean(np.array(source) > 100))
    assert found.over_limit["target"] == pytest.approx(np.mean(np.array(target) > 200))
    assert found.rows == 999
    assert found.examples_an_epoch == sum(s <= 100 and t <= 200 for s, t in zip(source, target, strict=True))


def test_steps_and_packing_are_those_of_training(write_rows: Any, byte_tokenizer: Any, tmp_path: Path) -> None:
    # Plain template: prompt 1, answer n, EOS: n + 2 tokens.
    rows = [{"prompt": "Q", "completion": "x" * (n % 30 + 1)} for n in range(50)]
    batch = BatchConfig(global_batch_size=8, micro_batch_tokens=64)
    options = {"chat_template": "plain", "max_seq_length": 32}
    found = _measure(write_rows(rows), byte_tokenizer(), tmp_path, batch, ranks=2, **options)
    tokens = [n % 30 + 3 for n in range(50) if n % 30 + 3 <= 32]
    assert (found.examples_an_epoch, found.tokens_an_epoch) == (len(tokens), sum(tokens))
    assert found.steps_an_epoch == -(-len(tokens) // 8)
    assert found.supervised_share == pytest.approx(1 - len(tokens) / sum(tokens))
    config = DataConfig(train_files=(str(tmp_path / "rows.jsonl"),), data_cache_dir=str(tmp_path), **options)
    train = prepare(config, byte_tokenizer(), seed=3).train
    counts, filled = [], 0
    for step in range(found.steps_an_epoch):
        for rank in range(2):
            loader = StepLoader(
                train, global_batch_size=8, micro_batch_tokens=64, packing=True, seed=3, rank=rank, world_size=2
            )
            micro_batches = loader.step(step, num_train_epochs=1)
            counts.append(len(micro_batches))
            filled += sum(m.input_ids.numel() for m in micro_batches if m.num_scored)
    assert found.packing.micro_batches_mean == pytest.approx(2 * np.mean(counts))
    assert found.packing.efficiency == pytest.approx(filled / (sum(counts) * 64))
    assert "steps of 8" in facts(found)[0]
    undecided = _measure(write_rows(rows), byte_tokenizer(), tmp_path, replace(batch, micro_batch_tokens=0), **options)
    assert undecided.micro_batch_tokens == 8192
    assert undecided.packing.micro_batches_mean == 1
    assert [row[0] for row in table(found)] == ["tokens", "source", "target", "total"]


def test_bins() -> None:
    lengths = np.array([0, 1, 9, 10, 99, 100, 5000], np.int32)
    found = histogram(lengths)
    assert sum(found.counts) == 7
    assert len(found.edges) == len(found.counts) + 1
    assert found.edges[-1] > 5000
    for start, end, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        assert count == np.count_nonzero((lengths >= start) & (lengths < end))
    assert histogram(np.zeros(0, np.int32)).counts == [0]
    assert histogram(np.array([3], np.int32)).counts[-1] == 1
