"""Per-example gradients in batches are those of autograd, one example at a time, whatever the layers and batches."""

import logging

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import baselines.kernels.norms
from baselines.gradients import per_example
from baselines.gradients.per_example import PerExample, last_layer, rows_of
from cads.data.batch import Batch
from cads.errors import ConfigError

B, VOCABULARY = 5, 19


class Stub:
    """As much of a task as gradients need: the loss of each example is a fixed function of the outputs."""

    name = "stub"

    def losses(self, model, batch):
        output = model(batch.inputs["x"]).float().flatten(1)
        weights = torch.linspace(-1, 1, output.shape[1])
        return (output * weights + 0.1 * output.square()).mean(dim=1) * (1 + batch.labels)


class Tokens(Stub):
    """Next-token losses of a language model."""

    def losses(self, model, batch):
        logits = model(input_ids=batch.inputs["x"]).logits[:, :-1].float()
        answers = batch.inputs["x"][:, 1:]
        return nn.functional.cross_entropy(logits.mT, answers, reduction="none").mean(dim=1)


def batch_of(x):
    n = len(x)
    return Batch({"x": x}, torch.arange(n) / n, torch.arange(n), tokens=n, answer_tokens=n)


def reference(task, model, batch):
    """By autograd, one example at a time, in the model's precision; shape (B, entries)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch)):
        loss = task.losses(model, rows_of(batch, i, i + 1)).sum()
        result = torch.autograd.grad(loss, parameters, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, result, strict=True)]
            )
        )
    return torch.stack(rows)


def collected(gradients, batch):
    """All that is handed out, shape (B, entries), and how many pieces that took."""
    result = {name: torch.full((len(batch), size), float("nan")) for name, size in gradients.sizes.items()}
    pieces = 0

    def receive(name, start, g):
        nonlocal pieces
        pieces += 1
        rows = result[name][start : start + len(g)]
        assert rows.isnan().all(), f"{name} was handed out twice"
        rows.copy_(g)
        g.zero_()  # It is the receiver's to change.

    gradients.each(batch, receive)
    return torch.cat(list(result.values()), dim=1), pieces


def check(task, model, batch, tolerance=1e-4):
    model.eval()
    gradients = PerExample(task, model)
    gradients.check(batch)
    actual, _ = collected(gradients, batch)
    exact = reference(task, model, batch)
    error = (actual - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.max()) < tolerance
    return gradients


def seeded(build):
    torch.manual_seed(0)
    return build()


class Tied(nn.Module):
    """One table embeds and scores; a norm is used twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.norm(self.table(x)))))


class HalfUsed(nn.Module):
    """One of its layers is never called."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.used(x)


FLOATS = torch.randn(B, 4, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(B, 4, 9, 7, generator=torch.Generator().manual_seed(2))
WORDS = torch.randint(0, VOCABULARY, (B, 7), generator=torch.Generator().manual_seed(3))
BATCHED = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), FLOATS),
    "linear, no positions": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), FLOATS[:, 0]),
    "linear, two axes of positions": (lambda: nn.Linear(3, 5), FLOATS.view(B, 2, 4, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(VOCABULARY, 6, padding_idx=2), nn.Linear(6, 2)), WORDS),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)), FLOATS),
    "layer norm of two axes": (lambda: nn.Sequential(nn.LayerNorm((4, 6)), nn.LayerNorm(6, bias=False)), FLOATS),
    "rms norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6), nn.RMSNorm(6, eps=1e-2)), FLOATS),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)), IMAGES),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)), IMAGES),
    "batch norm of vectors": (lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)), FLOATS[:, 0]),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 2)),
        IMAGES,
    ),
    "grouped, dilated": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=(2, 1), padding=(1, 2), bias=False), IMAGES),
    "convolution in one dimension": (lambda: nn.Conv1d(4, 5, 3), FLOATS),
    "convolution in three": (lambda: nn.Conv3d(1, 2, 3), IMAGES.unsqueeze(1)),
    "tied": (Tied, WORDS),
    "half used": (HalfUsed, FLOATS),
}


@pytest.mark.parametrize("name", BATCHED)
def test_layers_agree_with_autograd(name):
    build, x = BATCHED[name]
    model = seeded(build)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            nn.init.normal_(module.weight)
    assert check(Stub(), model, batch_of(x)).batched


def llama():
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=20,
        vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_lora(model, **options):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **options))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return adapted


LANGUAGE = {
    "llama, everything": llama,
    "llama, LoRA": lambda: with_lora(llama(), lora_dropout=0.5),
    "llama, LoRA and the norm": lambda: with_lora(llama(), modules_to_save=["norm"]),
    "gpt-2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=8, bos_token_id=0, eos_token_id=0)
    ),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_agree_with_autograd(name):
    assert check(Tokens(), seeded(LANGUAGE[name]), batch_of(WORDS)).batched


def test_a_network_of_torchvision_agrees_with_autograd():
    from torchvision.models import resnet18

    model = seeded(lambda: resnet18(num_classes=3))
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert check(Stub(), model, batch_of(x)).batched


@pytest.mark.parametrize("name", ["linear", "convolution", "tied", "embedding"])
def test_batch_size_order_and_chunks_change_nothing(name, monkeypatch):
    build, x = BATCHED[name]
    gradients = PerExample(Stub(), seeded(build))
    batch = batch_of(x)
    at_once, _ = collected(gradients, batch)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled, _ = collected(gradients, Batch({"x": x[order]}, batch.labels[order], order, B, B))
    torch.testing.assert_close(shuffled, at_once[order], rtol=1e-5, atol=1e-7)
    pieces = torch.cat([collected(gradients, rows_of(batch, i, i + 2))[0] for i in range(0, B, 2)])
    torch.testing.assert_close(pieces, at_once, rtol=1e-5, atol=1e-7)
    parameters = len(gradients.sizes)
    monkeypatch.setattr(per_example, "CHUNK_VALUES", 1)
    chunked, count = collected(gradients, batch)
    torch.testing.assert_close(chunked, at_once, rtol=1e-5, atol=1e-7)
    # A shared parameter is added up for the whole batch before it is handed out.
    assert count == (1 + 2 if name == "tied" else B * parameters)


class Crossed(nn.Module):
    """Positions before examples: what its layer reads has another first dimension."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Bare(nn.Module):
    """A parameter in a layer without a rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(6, 3)

    def forward(self, x):
        return self.inner(x * self.scale)


class Around(nn.Module):
    """It uses the weight of a layer without calling the layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x) @ self.inner.weight


class Added(nn.Module):
    """Two parameters that autograd gives one and the same gradient."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))

    def forward(self, x):
        return x * (self.one + self.other)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.GRU(6, 3, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


FALLING_BACK = {
    "crossed": (Crossed, FLOATS),
    "crossed, as many positions as examples": (Crossed, FLOATS[:4]),
    "two positions": (Crossed, FLOATS[:, :2]),
    "bare": (Bare, FLOATS),
    "around": (Around, FLOATS),
    "added": (Added, FLOATS),
    "attention": (Attention, FLOATS),
    "recurrent": (Recurrent, FLOATS),
    "reflected": (lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"), IMAGES),
}


@pytest.mark.parametrize("name", FALLING_BACK)
def test_anything_else_falls_back_says_so_once_and_is_right(name, caplog):
    build, x = FALLING_BACK[name]
    with caplog.at_level(logging.WARNING):
        gradients = check(Stub(), seeded(build), batch_of(x), tolerance=1e-5)
        collected(gradients, batch_of(x))
    assert not gradients.batched
    assert caplog.text.count("one example at a time") == 1


def test_the_check_says_what_it_took():
    batch = batch_of(FLOATS)
    assert PerExample(Stub(), seeded(BATCHED["linear"][0])).check(batch) == 3
    assert PerExample(Stub(), seeded(BATCHED["linear"][0])).check(rows_of(batch, 0, 1)) == 2
    assert PerExample(Stub(), seeded(Bare)).check(batch) == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_check_sees_what_passes_replace(precision, monkeypatch, caplog):
    model, batch = seeded(lambda: with_lora(llama())).eval(), batch_of(WORDS)
    gradients = PerExample(Tokens(), model, precision=precision)
    exact = reference(Tokens(), model, batch)
    right = baselines.kernels.norms.normalized
    monkeypatch.setattr(baselines.kernels.norms, "normalized", lambda *given: 1.1 * right(*given))
    gradients.check(batch)
    assert gradients.batched == (precision == "bf16")  # which it would only round
    if precision == "no":
        assert caplog.text.count("one example at a time") == 1
        torch.testing.assert_close(collected(gradients, batch)[0], exact, rtol=1e-5, atol=1e-7)


def test_only_named_parameters_are_handed_out():
    model = seeded(BATCHED["linear"][0])
    names = last_layer(model)
    assert names == ["2.weight"]
    gradients = PerExample(Stub(), model, names)
    actual, _ = collected(gradients, batch_of(FLOATS))
    all_gradients = reference(Stub(), model, batch_of(FLOATS))
    torch.testing.assert_close(actual, all_gradients[:, -15:], rtol=1e-5, atol=1e-7)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        last_layer(nn.ReLU())


def test_the_last_layer_may_share_its_weights_with_the_first():
    model = seeded(Tied)
    names = last_layer(model)
    assert names == ["table.weight"]
    actual, _ = collected(PerExample(Stub(), model, names), batch_of(WORDS))
    all_gradients = reference(Stub(), model, batch_of(WORDS))
    torch.testing.assert_close(actual, all_gradients[:, : VOCABULARY * 6], rtol=1e-5, atol=1e-7)


def test_batches_are_cut_where_shared_parameters_would_fill_the_memory(monkeypatch):
    model, batch = seeded(Tied), batch_of(WORDS)
    at_once, pieces = collected(PerExample(Stub(), model), batch)
    table = VOCABULARY * 6
    monkeypatch.setattr(per_example, "SHARED_VALUES", 2 * table + 1)
    held = []
    new_zeros = torch.Tensor.new_zeros
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda x, *shape: held.append(shape) or new_zeros(x, *shape))
    cut, more = collected(PerExample(Stub(), model), batch)
    torch.testing.assert_close(cut, at_once, rtol=1e-5, atol=1e-7)
    assert (pieces, more) == (3, 9)
    assert max(rows for rows, entries in held if entries == table) == 2


def test_frozen_models_are_refused():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        PerExample(Stub(), nn.Linear(2, 2).requires_grad_(False))


def test_no_gradient_of_a_weight_is_left_behind():
    model = seeded(BATCHED["linear"][0])
    collected(PerExample(Stub(), model), batch_of(FLOATS))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_bf16_is_close():
    model = seeded(lambda: with_lora(llama())).eval()
    batch = batch_of(WORDS)
    exact, _ = collected(PerExample(Tokens(), model), batch)
    result, _ = collected(PerExample(Tokens(), model, precision="bf16"), batch)
    assert result.dtype == torch.float32
    assert float(nn.functional.cosine_similarity(exact, result).min()) > 0.999
