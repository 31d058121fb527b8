"""What other tests rely on in conftest.py: errors of a rank arrive, hangs end, nothing is left running."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def ranks_sum(offset):
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return total, os.environ["RANK"], os.environ["WORLD_SIZE"]


def fails_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def hangs_on_rank_0():
    if dist.get_rank() == 0:
        time.sleep(600)


def dies_on_rank_0():
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def test_ranks_form_a_group_and_return_tensors_in_rank_order(run_ranks):
    results = run_ranks(ranks_sum, 2, 10)
    assert [(total.item(), rank, size) for total, rank, size in results] == [(21.0, "0", "2"), (21.0, "1", "2")]


@pytest.mark.parametrize(
    ("function", "timeout", "error", "text"),
    [
        (fails_on_rank_1, 120, RuntimeError, r"(?s)rank 1 failed.*fails_on_rank_1.*ValueError: the reason"),
        (dies_on_rank_0, 120, RuntimeError, "rank 0 died, exit code 7|rank 1 failed"),
        (hangs_on_rank_0, 8, TimeoutError, r"no result from ranks \[0"),
    ],
)
def test_a_bad_rank_ends_all_of_them_with_its_reason(run_ranks, function, timeout, error, text):
    with pytest.raises(error, match=text):
        run_ranks(function, 2, timeout=timeout)


def test_launch_is_clean_of_the_users_environment(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    script = tmp_path / "show.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv[1:], os.environ.get('RANK'), os.environ.get('WANDB_PROJECT'), os.path.expanduser('~'))\n"
        "print(os.environ['EXTRA'], file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    done = launch(["--a", "b c"], script=str(script), env={"EXTRA": "yes"})
    assert (done.returncode, done.stderr) == (3, "yes\n")
    assert done.stdout == f"['--a', 'b c'] None None {tmp_path / 'home'}\n"


def test_launch_kills_grandchildren_at_the_timeout(launch, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(TimeoutError) as caught:
        launch([], script=str(script), timeout=2)
    child = Path("/proc") / str(caught.value).split("\n")[1]
    deadline = time.monotonic() + 5  # whoever adopts a killed process takes a moment to reap it
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or (child / "stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_start_the_ranks(launch, tmp_path, launcher):
    script = tmp_path / "rank.py"
    script.write_text("import os\nopen(__file__ + '.' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])\n")
    done = launch([], script=str(script), launcher=launcher, nproc=2)
    assert done.returncode == 0, done
    assert {path.suffix: path.read_text() for path in tmp_path.glob("rank.py.*")} == {".0": "2", ".1": "2"}, done


def test_tiny_llama_has_one_token_a_byte_and_three_distinct_ends(tiny_llama_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = "12 é\n你"
    assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids == [3, 5 + sorted_letters().index("a"), 4]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    assert model.get_input_embeddings().weight.shape == (288, 64)
    assert model.dtype == torch.float32


def sorted_letters():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())
