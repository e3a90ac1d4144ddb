"""Train a mini from nothing on the corpus: resumable, with its loss curve kept."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from signlattice.data import corpus
from signlattice.errors import InputError
from signlattice.io import Progress, Scratch, no_progress
from signlattice.models.checkpoint import quiet, weights_hash
from signlattice.models.minis import ModelSpec


@dataclass(frozen=True)
class TrainConfig:
    """How a mini is trained. ``lr`` is the peak: a linear warm-up, then a cosine down to 2 %."""

    steps: int = 1800
    batch_size: int = 16
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    seed: int = 0
    precision: str = "bfloat16"
    checkpoint_every: int = 100
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup", "checkpoint_every"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name}={value}: use 1 or more")
        if not 0 < self.lr < 1:
            raise InputError(f"lr={self.lr}: use a step between 0 and 1")
        if self.precision not in ("float32", "bfloat16"):
            raise InputError(
                f"precision={self.precision!r}: use 'float32' or 'bfloat16' (autocast)"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class LossPoint:
    """One training step: tokens read until then, its loss in nats per token, seconds until then."""

    step: int
    tokens: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Trained:
    """A finished training: model, tokenizer, loss curve, and wall time in seconds."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    losses: tuple[LossPoint, ...]
    seconds: float


def train(
    spec: ModelSpec,
    config: TrainConfig,
    scratch: Path,
    progress: Progress = no_progress,
) -> Trained:
    """Train ``spec`` on the corpus's train side; go on from ``scratch`` if it holds a checkpoint.

    A checkpoint of another spec, configuration or corpus is not taken. Batches depend on the seed
    and the step alone, so that a resumed run reads what an uninterrupted one would. ``progress`` is
    called once for every step, those of the checkpoint included.
    """
    folder = _folder(spec, config, scratch)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(spec, folder)
    stream = _token_stream(tokenizer)

    torch.manual_seed(config.seed)
    model = spec.build()
    cast(nn.Module, model).to(config.device)  # in place
    balanced = hasattr(model.config, "output_router_logits")  # a loss that evens out the experts
    model.config.output_router_logits = balanced
    optimizer = _optimizer(model, config)
    losses = _resume(folder, model, optimizer)
    for point in losses:
        progress(f"step {point.step}")

    model.train()
    started = time.perf_counter() - (losses[-1].seconds if losses else 0.0)
    for step in range(len(losses), config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        batch = _batch(stream, spec.context, config, step).to(config.device)
        autocast = config.precision == "bfloat16"
        with torch.autocast(config.device, torch.bfloat16, enabled=autocast):
            output = model(batch, labels=batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        point = LossPoint(
            step=step + 1,
            tokens=(step + 1) * batch.numel(),
            loss=_token_loss(model, output),
            seconds=time.perf_counter() - started,
        )
        losses.append(point)
        progress(f"step {point.step}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            _save_state(folder, model, optimizer, losses)
    if balanced:
        model.config.output_router_logits = False
    return Trained(model.eval(), tokenizer, tuple(losses), losses[-1].seconds)


def save_checkpoint(trained: Trained, spec: ModelSpec, folder: Path) -> str:
    """Write model (fp16 safetensors), configuration and tokenizer; return the hash of the weights.

    The folder is replaced only when everything has been written.
    """
    building = folder.with_name(folder.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    with quiet():
        trained.model.half().save_pretrained(building)
    trained.model.float()
    end = corpus.END_OF_DOCUMENT
    PreTrainedTokenizerFast(
        tokenizer_object=trained.tokenizer,
        model_max_length=spec.context,
        bos_token=end,
        eos_token=end,
        pad_token=end,
    ).save_pretrained(building)
    digest = weights_hash(building)
    (building / "training.json").write_text(json.dumps({"weights_hash": digest}, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(building, folder)
    return digest


def _tokenizer(spec: ModelSpec, folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        texts = (document.text for document in corpus.documents("train"))
        corpus.train_tokenizer(texts, spec.vocab_size).save(str(file))
    return Tokenizer.from_file(str(file))


def _token_stream(tokenizer: Tokenizer) -> Tensor:
    """Join the train side to one stream of tokens, an end token before each document. [n_tokens]"""
    texts = [document.text for document in corpus.documents("train")]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.cat(
        [torch.tensor([0, *encoding.ids], dtype=torch.int16) for encoding in encodings]
    )


def _batch(stream: Tensor, context: int, config: TrainConfig, step: int) -> Tensor:
    """Random windows of the stream, [batch_size, context]; without replacement over an epoch."""
    n_windows = (len(stream) - context) // context
    epoch, first = divmod(step * config.batch_size, n_windows)
    orders = [
        torch.randperm(n_windows, generator=torch.Generator().manual_seed(1000 * config.seed + e))
        for e in (epoch, epoch + 1)
    ]
    offsets = [
        int(torch.randint(context, (1,), generator=torch.Generator().manual_seed(e)))
        for e in (epoch, epoch + 1)
    ]
    starts = torch.cat([order * context + offset for order, offset in zip(orders, offsets)])
    starts = starts[first : first + config.batch_size]
    return torch.stack([stream[start : start + context] for start in starts.tolist()]).long()


def _optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def _token_loss(model: PreTrainedModel, output) -> float:
    """Cross-entropy in nats per token: the loss without the router's load-balancing term."""
    auxiliary = getattr(output, "aux_loss", None)
    loss = output.loss.detach()
    if auxiliary is not None:
        loss = loss - model.config.router_aux_loss_coef * auxiliary.detach()
    return float(loss)


def _folder(spec: ModelSpec, config: TrainConfig, scratch: Path) -> Path:
    """Name a folder for what depends on spec, configuration and corpus, but not on the device."""
    settings = asdict(config) | {"device": None, "checkpoint_every": None}
    text = corpus.fingerprint(corpus.documents("train"))
    return Scratch.of(scratch, asdict(spec), settings, text).folder


def _save_state(folder: Path, model, optimizer, losses: list[LossPoint]) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": [asdict(point) for point in losses],
    }
    building = folder / "state.part"
    torch.save(state, building)
    os.replace(building, folder / "state.pt")


def _resume(folder: Path, model, optimizer) -> list[LossPoint]:
    file = folder / "state.pt"
    if not file.exists():
        return []
    state = torch.load(file, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [LossPoint(**point) for point in state["losses"]]
