"""Fixtures of all tests: real and tiny models, shared data, ranks in processes, the program as a user starts it.

The environment is set before torch, deepspeed or wandb are imported: no network, no GPU where there is none.
"""

import functools
import multiprocessing
import os
import pickle
import queue
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
if not Path("/dev/nvidiactl").exists():
    os.environ["DS_ACCELERATOR"] = "cpu"

REPOSITORY = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZERO_2: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # left out, DeepSpeed clips to 1
    "zero_optimization": {"stage": 2, "contiguous_gradients": False},
    "zero_allow_untested_optimizer": True,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
}
"""What an Engine of a tiny model is given: gradients in fp32, no clipping."""
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


class RunRanks(Protocol):
    """Type of the fixture `run_ranks`."""

    def __call__(
        self, function: Callable[..., object], world_size: int, *args: object, timeout: float = 120
    ) -> list[Any]:
        """See the fixture."""


class Launch(Protocol):
    """Type of the fixture `launch`."""

    def __call__(
        self,
        argv: Sequence[str],
        *,
        launcher: Literal["python", "torchrun", "deepspeed"] = "python",
        nproc: int = 1,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
        script: str = "launch/train.py",
    ) -> subprocess.CompletedProcess[str]:
        """See the fixture."""


@pytest.fixture(scope="session")
def small_model_dir() -> Path:
    """Folder of the real small model, SmolLM2-135M-Instruct."""
    folder = REPOSITORY / ".models" / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not there: run make models")
    return folder


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    """The folder shared/data beside the repository: real data, never copied into it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 Llama of two layers with a byte-level tokenizer (one token a byte) and the ChatML template.

    The model's vocabulary (288) is larger than the tokenizer's (261), pad, `</s>` and `<|im_end|>` differ, and
    there are fewer key-value heads than heads: as in real models, so that code which mixes them up fails.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    _save_byte_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,  # large enough for attention to matter: a leak between documents shows in the loss
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=[SPECIAL_TOKENS.index("</s>"), SPECIAL_TOKENS.index("<|im_end|>")],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _save_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """Call a function in `world_size` new processes that form a gloo process group, and return their results by rank.

    `function` must be at module level and may use torch.distributed at once; launcher variables (RANK, WORLD_SIZE,
    LOCAL_RANK, MASTER_ADDR, MASTER_PORT) are set as well. Arguments and results travel by pickle: tensors, plain
    values and classes of anima may, classes defined in a test file may not. The traceback of the first rank that fails
    is raised here as a RuntimeError; after `timeout` seconds all ranks are killed and a TimeoutError is raised.
    """
    return functools.partial(_run_ranks, tmp_path)


def _run_ranks(
    tmp_path: Path, function: Callable[..., object], world_size: int, *args: object, timeout: float = 120
) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    # A file per group, not a port: nothing to collide with. runpy, because the children cannot import tests by name.
    store = tmp_path / f"store-{time.monotonic_ns()}"
    task = {
        "SOURCE": function.__code__.co_filename,
        "NAME": function.__qualname__,
        "ARGS": args,
        "WORLD_SIZE": world_size,
        "STORE": str(store),
        "PORT": _free_port(),
        "REPORTS": reports,
    }
    script = str(Path(__file__).with_name("spawned_rank.py"))
    processes = [
        context.Process(target=runpy.run_path, args=(script, {**task, "RANK": rank}, "__rank__"), daemon=True)
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        return _collect(processes, reports, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(processes: Sequence[Any], reports: Any, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        try:
            rank, failed, payload = reports.get(timeout=0.2)
        except queue.Empty:
            dead = [rank for rank, child in enumerate(processes) if child.exitcode is not None and rank not in results]
            if dead and reports.empty():
                raise RuntimeError(f"rank {dead[0]} died, exit code {processes[dead[0]].exitcode}") from None
            if time.monotonic() > deadline:
                missing = sorted(set(range(len(processes))) - set(results))
                raise TimeoutError(f"no result from ranks {missing} in time") from None
            continue
        if failed:
            raise RuntimeError(f"rank {rank} failed:\n{payload}")
        results[rank] = pickle.loads(payload)
    return [results[rank] for rank in range(len(processes))]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Run a script of launch/ as a user does, from the repository's root, on the CPU, with a home of its own.

    `argv` follows the script's name; `env` is added to the environment, which holds no launcher's or tracker's
    variables. All processes are killed at `timeout` seconds (TimeoutError with the output so far) and at the end.
    """
    home = tmp_path / "home"
    home.mkdir()
    yield functools.partial(_launch, home)
    shutil.rmtree(home, ignore_errors=True)  # caches: not worth keeping with the failures' folders


def _launch(
    home: Path,
    argv: Sequence[str],
    *,
    launcher: Literal["python", "torchrun", "deepspeed"] = "python",
    nproc: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    script: str = "launch/train.py",
) -> subprocess.CompletedProcess[str]:
    starters = {
        "python": [sys.executable],
        "torchrun": ["torchrun", f"--nproc_per_node={nproc}", f"--master_port={_free_port()}"],
        "deepspeed": ["deepspeed", f"--num_gpus={nproc}", f"--master_port={_free_port()}"],
    }
    if launcher == "python" and nproc != 1:
        raise ValueError("plain python is one rank")
    command = [*starters[launcher], script, *argv]
    with (home / "stdout").open("w+") as stdout, (home / "stderr").open("w+") as stderr:
        # Files, not pipes: a stray grandchild that keeps a pipe open would keep this test waiting.
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**_clean_environment(home), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill_group(process)
        stdout.seek(0)
        stderr.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, stdout.read(), stderr.read())
    if timed_out:
        raise TimeoutError(f"{' '.join(command)}: not done after {timeout} s\n{done.stdout}\n{done.stderr}")
    return done


def _clean_environment(home: Path) -> dict[str, str]:
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("WANDB_")}
    return {
        **kept,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "HF_HOME": str(home / ".cache" / "huggingface"),
        "TORCH_EXTENSIONS_DIR": str(home / ".cache" / "torch_extensions"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }


def _kill_group(process: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
