"""How far NF4, bf16 and fp8 move a product, an input gradient and a LoRA gradient, on real weights and real rows.

    python tests/perf/fp8_errors.py --json errors.json

An error is the norm of the difference over the norm of what it should be. The network runs once in fp32 over the
dequantised NF4 weights; at every projection the product's own code meets the inputs and output gradients of that run.
Then the LoRA gradients of one step, with an adapter that has been trained for some steps. On the CPU: fp8 is emulated.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from anima.config.schema import DataConfig, LoraConfig, ModelConfig
from anima.data.loader import StepLoader
from anima.data.prepare import prepare
from anima.model import fp8
from anima.model.base_model import load_base, nf4_layers
from anima.model.compute import Compute
from anima.model.console import quiet_libraries
from anima.model.lora import AdaptedModel, attach_lora, compute_in_fp8, trainable_parameters
from anima.model.packed import packed_hidden
from anima.model.qlora_linear import _input_gradient, base_weight, frozen_linear
from anima.objectives.objective import PackedBatch
from anima.objectives.sft import SupervisedFineTuning

REPOSITORY = Path(__file__).resolve().parents[2]
LORA = LoraConfig(lora_r=16, lora_alpha=32, lora_dropout=0.0)
WAYS = ("nf4", "bf16", "fp8 weights", "fp8 inputs", "fp8")
"""nf4: against the 16-bit weights, in fp32. Others against fp32 over NF4: what they add. fp8 weights and fp8 inputs
(which are the gradients, on the way back) round one factor alone and else compute in fp32."""


@dataclass
class Network:
    """A transformers model as objectives see a policy."""

    model: PreTrainedModel

    @property
    def head_weight(self) -> Tensor:
        """(vocabulary, hidden)."""
        return cast(nn.Linear, self.model.get_output_embeddings()).weight

    def __call__(self, batch: PackedBatch) -> Tensor:
        """(tokens, hidden)."""
        return packed_hidden(
            self.model, batch.input_ids, batch.position_ids, batch.cu_seqlens, list(batch.document_lengths)
        )


def network_of(adapted: AdaptedModel) -> Network:
    """With LoRA layers in place."""
    return Network(cast(PreTrainedModel, adapted.get_base_model()))


@dataclass
class Errors:
    """Of one projection, by way of computing."""

    name: str
    output: dict[str, float] = field(default_factory=dict)
    gradient: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Last part of the name."""
        return self.name.rpartition(".")[2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / ".models" / "smollm2-135m-instruct"))
    parser.add_argument("--train_files", nargs="+", default=[str(REPOSITORY / "launch/data/quickstart_sft.jsonl")])
    parser.add_argument("--rows", type=int, default=8, help="conversations of a step")
    parser.add_argument("--steps", type=int, default=8, help="that train the adapter before its gradients are compared")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet_libraries(show_progress=False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = prepare(DataConfig(train_files=tuple(options.train_files)), tokenizer, seed=0)
    loader: StepLoader[Any] = StepLoader(
        data.train, global_batch_size=options.rows, micro_batch_tokens=8192, packing=True, seed=0, rank=0, world_size=1
    )
    original = load(options.model, "none", torch.float32)
    wide = load(options.model, "nf4", torch.float32)
    found = projection_errors(original, wide, loader.step(0))
    print_projections(found)
    gradients = lora_gradients(options, loader, original, wide)
    should = gradients.pop("nf4, fp32")
    lora = {name: gradient_errors(should, other) for name, other in gradients.items()}
    print_lora(lora)
    if options.json:
        projections = [vars(one) for one in found]
        options.json.write_text(json.dumps({"projections": projections, "lora_gradients": lora}))


def load(model: str, quantization: Literal["nf4", "none"], dtype: torch.dtype) -> PreTrainedModel:
    """The frozen base."""
    compute = Compute(torch.device("cpu"), dtype, "")
    return load_base(ModelConfig(model_name_or_path=model, quantization=quantization), compute)


def projection_errors(original: PreTrainedModel, wide: PreTrainedModel, batches: Sequence[Any]) -> list[Errors]:
    """Errors of every NF4 layer of `wide` where a step meets it; the 16-bit `original` gives the exact weights.

    A plain copy of the network runs, with NF4's values as fp32 matrices: it has places to look at inputs and gradients.
    """
    running, layers = copy.deepcopy(original), nf4_layers(wide)
    as_they_are = {name: copy.copy(layer) for name, layer in layers.items()}  # of the same weights
    left = fp8.enable_fp8(wide, [[layer] for layer in layers.values()])
    found = {name: Errors(name) for name in layers if name not in left}
    for name, errors in found.items():
        plain, exact = (cast(nn.Linear, model.get_submodule(name)) for model in (running, original))
        plain.weight.data = base_weight(as_they_are[name], torch.float32)
        plain.register_forward_hook(Probe(errors, as_they_are[name], layers[name], exact))
    running.get_input_embeddings().register_forward_hook(lambda *parts: parts[-1].requires_grad_())
    backward(Network(running), batches)
    for name in found:
        delattr(layers[name], fp8._ATTRIBUTE)
    return list(found.values())


class Probe:
    """A hook on a projection that computes its errors as inputs and gradients come by."""

    def __init__(self, errors: Errors, layer: nn.Linear, in_fp8: nn.Linear, exact: nn.Linear) -> None:
        """The NF4 layer as it is and set up for fp8, and the 16-bit one."""
        self.errors, self.layer, self.in_fp8, self.exact = errors, layer, in_fp8, exact

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward; and leave a hook for the way back."""
        x_TI = inputs[0].detach().flatten(0, -2)
        self.errors.output = self.compare(x_TI, forward=True)
        output.register_hook(self.gradient)

    def gradient(self, gradient: Tensor) -> None:
        """Backward."""
        self.errors.gradient = self.compare(gradient.detach().flatten(0, -2), forward=False)

    @torch.no_grad()
    def compare(self, values: Tensor, *, forward: bool) -> dict[str, float]:
        """Relative errors of values W^T (forward) or values W, (tokens, features), by way of computing."""

        def product(of: Tensor, layer: nn.Linear) -> Tensor:
            return frozen_linear(of, [layer])[0] if forward else _input_gradient([of], [layer], None)

        should = product(values, self.layer)
        before = product(values, self.exact)
        rows, scales = fp8.quantize_rows(values)
        rounded = nn.Linear(self.layer.in_features, self.layer.out_features, bias=False, device="meta")
        rounded.weight = nn.Parameter(weight_after_fp8(self.in_fp8), requires_grad=False)
        with computing_in(self.layer, torch.bfloat16):
            narrow = product(values.bfloat16(), self.layer)
            both = product(values.bfloat16(), self.in_fp8)
        return {
            "nf4": relative(should, before),
            "bf16": relative(narrow, should),
            "fp8 weights": relative(product(values, rounded), should),
            "fp8 inputs": relative(product(rows.float() * scales, self.layer), should),
            "fp8": relative(both, should),
        }


@contextmanager
def computing_in(layer: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let an NF4 layer, and its copies, be dequantised in another format."""
    state = layer.weight.quant_state
    before, state.dtype = state.dtype, dtype
    yield
    state.dtype = before


def weight_after_fp8(layer: nn.Linear) -> Tensor:
    """What e4m3 makes of the weights, fp32 (out, in)."""
    scales: fp8.WeightScales = getattr(layer, fp8._ATTRIBUTE)
    return fp8.weight_in_fp8(layer, scales, transposed=False).float() / scales.inverse


def relative(got: Tensor, should: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((got.double() - should.double()).norm() / should.double().norm())


def backward(network: Network, batches: Sequence[Any]) -> None:
    """Gradients of the mean loss of a step."""
    objective = SupervisedFineTuning()
    weight = sum(objective.weight(batch) for batch in batches)
    for batch in batches:
        (objective(network, batch.to(network.head_weight.device)).loss_sum / weight).backward()


def lora_gradients(
    options: argparse.Namespace,
    loader: StepLoader[Any],
    original: PreTrainedModel,
    wide: PreTrainedModel,
) -> dict[str, dict[str, Tensor]]:
    """LoRA gradients of one step by way of computing, of an adapter trained in fp32 over NF4 for the steps before.

    Beside them those of another step's rows: what differs from step to step anyway.
    """
    last, found = loader.step(options.steps), {}
    adapted = attach_lora(wide, LORA, dtype=torch.float32, seed=0)
    optimizer = torch.optim.AdamW(
        trainable_parameters(adapted).values(), lr=options.learning_rate, weight_decay=0.0, eps=1e-8
    )
    for step in range(options.steps):
        backward(network_of(adapted), loader.step(step))
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: p.detach().clone() for name, p in trainable_parameters(adapted).items()}
    found["nf4, fp32"] = gradients_of(adapted, trained, last)
    found["nf4, fp32, other rows"] = gradients_of(adapted, trained, loader.step(options.steps + 1))
    found["16 bit, fp32"] = gradients_of(attach_lora(original, LORA, dtype=torch.float32, seed=0), trained, last)
    narrow = attach_lora(load(options.model, "nf4", torch.bfloat16), LORA, dtype=torch.bfloat16, seed=0)
    found["nf4, bf16"] = gradients_of(narrow, trained, last)
    compute_in_fp8(narrow)
    found["nf4, fp8"] = gradients_of(narrow, trained, last)
    return found


def gradients_of(adapted: AdaptedModel, values: dict[str, Tensor], batches: Sequence[Any]) -> dict[str, Tensor]:
    """Gradients at the given LoRA matrices, by name; none are left."""
    parameters = trainable_parameters(adapted)
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])
    backward(network_of(adapted), batches)
    found = {name: p.grad.float() for name, p in parameters.items() if p.grad is not None}
    adapted.zero_grad(set_to_none=True)
    return found


def gradient_errors(should: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Relative error and cosine of all dA and all dB as one vector each."""
    found = {}
    for matrix in ("A", "B"):
        pairs = [(got[name].double(), should[name].double()) for name in should if f".lora_{matrix}." in name]
        mine, theirs = (torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs, strict=True))
        cosine = float(mine @ theirs / (mine.norm() * theirs.norm()))
        found[f"d{matrix}"] = {"error": relative(mine, theirs), "cosine": cosine}
    return found


def print_projections(found: list[Errors]) -> None:
    """Two tables in percent: mean over the layers, and the worst of them."""
    kinds = list(dict.fromkeys(one.kind for one in found))
    for title in ("output", "gradient"):
        print(f"\nerror of the {title}, %: mean, worst layer\n| projection | {' | '.join(WAYS)} |")
        print("|" + "---|" * (len(WAYS) + 1))
        for kind in [*kinds, "all"]:
            errors = [getattr(one, title) for one in found if kind in ("all", one.kind)]
            cells = [[100 * of[way] for of in errors] for way in WAYS]
            print(f"| {kind} | {' | '.join(f'{statistics.fmean(cell):.2f}, {max(cell):.2f}' for cell in cells)} |")
        worst = max(found, key=lambda one: getattr(one, title)["fp8"])
        print(f"worst in fp8: {worst.name}")


def print_lora(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """Against fp32 over NF4 on the same rows."""
    print("\n| LoRA gradients | dA error, % | cosine | dB error, % | cosine |\n|---|---|---|---|---|")
    for name, of in found.items():
        cells = (f"{100 * part['error']:.2f} | {part['cosine']:.5f}" for part in (of["dA"], of["dB"]))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
