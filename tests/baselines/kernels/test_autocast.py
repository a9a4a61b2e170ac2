"""Passes in bfloat16: the numbers of autocast, frozen weights cast once, and a model that is as it was."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import baselines.kernels.attention
from baselines.gradients.per_example import PerExample
from baselines.kernels.autocast import PEFT_CASTS, Passes
from baselines.kernels.matmul import FROZEN_LINEAR
from baselines.less import Less
from cads.accounting.ledger import Ledger
from cads.recipe import TrainConfig
from cads.tasks.language.config import LanguageConfig
from cads.tasks.language.rows import TextSource
from experiments.selector_speed import adapted
from tests.support.tiny_llama import model_folder, sums, write_lines

CAST, ATTENTION = torch.ops.aten._to_copy.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
LORA = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def language(folder, family="llama", **adapters):
    data = TextSource(path=str(write_lines(folder / "rows.jsonl", sums(40))))
    return LanguageConfig(
        model=str(model_folder(folder / "model", family)), pool=[data], n_target=8, n_test=8, max_tokens=64,
        peft={"type": "lora", "r": 3, "target_modules": LORA[family], **adapters},
    ).build(TrainConfig(batch_size=4))  # fmt: skip


class Seen(TorchDispatchMode):
    """Counts casts to bfloat16 by shape, and the types of what attention reads."""

    def __init__(self):
        super().__init__()
        self.casts, self.attention = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is CAST and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.casts[tuple(args[0].shape)] += 1
        if func is ATTENTION:
            self.attention.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=LORA)
def task(tmp_path, request):
    return language(tmp_path, request.param)


def plain(task, model, batch):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        return task.losses(model, batch)


def test_losses_are_those_of_autocast_bit_by_bit(task):
    model, batch = adapted(task), task.pool.batch([0, 1, 2])
    passes = Passes(model, "bf16")
    with torch.inference_mode(), passes():
        result = task.losses(model, batch)
    assert torch.equal(result, plain(task, model, batch))
    assert not torch.equal(result, task.losses(model, batch))


def test_without_it_passes_are_as_they_are(task):
    model, batch = adapted(task), task.pool.batch([0, 1, 2])
    passes = Passes(model, "no")
    with torch.no_grad():
        outside = task.losses(model, batch)
        with passes():
            assert torch.equal(task.losses(model, batch), outside)
    # Where gradients are taken attention sums in another order.
    with passes():
        torch.testing.assert_close(task.losses(model, batch).detach(), outside, rtol=1e-6, atol=1e-6)
        assert not torch.is_autocast_enabled("cpu")


def test_no_frozen_weight_is_cast_twice(task):
    model, batch = adapted(task), task.pool.batch([0, 1, 2])
    passes = Passes(model, "bf16")
    frozen = {tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.dim() == 2}
    counted = []
    for _ in range(2):
        with Seen() as seen, torch.inference_mode(), passes():
            task.losses(model, batch)
        counted.append(sum(count for shape, count in seen.casts.items() if shape in frozen))
    assert counted[0] > 0
    assert counted[1] == 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(task, fails):
    model, twin = adapted(task), task.model(1)
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    passes = Passes(model, "bf16")
    try:
        with passes():
            linear = [m for m in model.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
            assert all(m.weight.dtype == torch.bfloat16 for m in linear)
            # The base is shared with another model, which does not see it.
            assert all(p.dtype == torch.float32 for p in twin.parameters())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = dict(model.named_parameters())
    assert {n: id(p) for n, p in after.items()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(after[n], x) for n, (_, x) in before.items())
    norms = [m for m in model.modules() if "Norm" in type(m).__name__ or type(m) is nn.LayerNorm]
    assert not any(m._forward_hooks for m in norms)
    assert not any("forward" in vars(m) for m in model.modules())
    assert all(getattr(m, PEFT_CASTS, True) for m in model.modules())
    assert not torch.is_autocast_enabled("cpu")


def test_weights_that_change_are_cast_anew(tmp_path):
    task = language(tmp_path)
    model, batch = adapted(task), task.pool.batch([0, 1])
    passes = Passes(model, "bf16")
    losses = []
    for _ in range(2):
        with torch.inference_mode(), passes():
            losses.append(task.losses(model, batch))
        assert torch.equal(losses[-1], plain(task, model, batch))
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(3)
    assert not torch.equal(*losses)


def test_gradients_after_scores(tmp_path):
    """What inference mode has left behind serves a backward pass too."""
    task = language(tmp_path)
    model, batch = adapted(task), task.pool.batch([0, 1])
    passes = Passes(model, "bf16")
    with torch.inference_mode(), passes():
        task.losses(model, batch)
    with passes():
        task.losses(model, batch).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def features(task, model, batch, precision):
    gradients = PerExample(task, model, precision=precision)
    result = torch.zeros(len(batch), sum(gradients.sizes.values()))
    ends = dict(zip(gradients.sizes, torch.tensor(list(gradients.sizes.values())).cumsum(0).tolist(), strict=True))

    def receive(name, start, gradient):
        assert gradient.dtype == torch.float32
        result[start : start + len(gradient), ends[name] - gradient.shape[1] : ends[name]] = gradient

    gradients.each(batch, receive)
    return result


def test_gradients_are_close(task):
    model, batch = adapted(task), task.pool.batch(range(6))
    exact, half = (features(task, model, batch, precision) for precision in ("no", "bf16"))
    assert float(cosine_similarity(exact, half).min()) > 0.999
    assert not torch.equal(exact, half)


def test_layers_that_train_keep_their_type(tmp_path):
    task = language(tmp_path, modules_to_save=["norm"])
    model, batch = adapted(task), task.pool.batch(range(4))
    exact, half = (features(task, model, batch, precision) for precision in ("no", "bf16"))
    assert float(cosine_similarity(exact, half).min()) > 0.999


def test_attention_keeps_its_table_where_that_is_faster(tmp_path, monkeypatch):
    task = language(tmp_path)
    model, batch = adapted(task), task.pool.batch([0, 1])
    passes = Passes(model, "bf16")

    def kinds(grad):
        with Seen() as seen, torch.set_grad_enabled(grad), passes():
            task.losses(model, batch)
        return set(seen.attention)

    assert not kinds(grad=True)
    assert kinds(grad=False) == {torch.bfloat16}
    monkeypatch.setattr(baselines.kernels.attention, "SHORT", 4)
    assert kinds(grad=True) == {torch.bfloat16}


def test_images_and_convolutions(images):
    task = images(model="cnn")
    model = task.model(0).requires_grad_(False)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].requires_grad_(True)
    batch = task.pool.batch(range(8))
    exact, half = (features(task, model, batch, precision) for precision in ("no", "bf16"))
    assert float(cosine_similarity(exact, half).min()) > 0.999
    with Passes(model, "bf16")():
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert convolutions
        assert all(m.weight.dtype == torch.bfloat16 for m in convolutions)
        assert last.weight.dtype == torch.float32


def test_less_ranks_alike_and_as_always(tmp_path):
    task = language(tmp_path)
    exact, half, again = (
        Less(precision=p, warmup_share=0.5, checkpoints=2).rank(task, seed=0, ledger=Ledger()).score
        for p in ("no", "bf16", "bf16")
    )
    assert (half == again).all()
    assert torch.corrcoef(torch.tensor([exact.tolist(), half.tolist()]))[0, 1] > 0.99


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_products_and_losses_are_replaced_within_a_pass_alone(precision):
    torch.manual_seed(0)
    head = nn.Linear(64, 2048).requires_grad_(False)
    x, labels = torch.randn(600, 64, requires_grad=True), torch.arange(600)

    def steps():
        logits = head(x)
        return logits.grad_fn.name(), cross_entropy(logits.float(), labels, reduction="none").grad_fn.name()

    before = steps()
    with Passes(head, precision)():
        within = steps()
    assert within[1] == "_InPlaceBackward"
    assert (within[0] == FROZEN_LINEAR) == (precision == "no")
    assert steps() == before
    assert not {FROZEN_LINEAR, "_InPlaceBackward"} & set(before)
