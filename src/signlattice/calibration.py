"""From a model and a text to a codec file: capture, learn, judge on other text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from signlattice import __version__
from signlattice.data import corpus
from signlattice.data.corpus import Document
from signlattice.data.texts import Text
from signlattice.distributed.capture import capture_parts, split_batches
from signlattice.distributed.workers import Workers
from signlattice.errors import InputError, check_counts, check_types, checked
from signlattice.evaluation.heads import HeadQuality, fit_temperature, head_quality
from signlattice.io import Progress, identity, no_progress
from signlattice.kernels import HEAD_DIMS
from signlattice.models.capture import StateBank, capture_passages, draw_tokens
from signlattice.models.hooks import AttentionLayer, attention_layers, cacheable
from signlattice.models.loading import LoadedModel
from signlattice.models.passages import Passage, enough_passages, take_tokens
from signlattice.quantizers import registry
from signlattice.quantizers.base import CalibrationSet, StoredQuantizer
from signlattice.quantizers.basis import LatticeConfig
from signlattice.quantizers.codec import Calibration, KeyCodec
from signlattice.quantizers.scales import ScaleRule
from signlattice.quantizers.sign import SignQuantizer
from signlattice.rotations.config import LearnConfig

OnCapture = Callable[[int, int], object]
"""Called with the tokens that this process has read, and all that it will read."""


@dataclass(frozen=True)
class CalibrationConfig:
    """How a codec is learned.

    Attributes:
        code: name of a quantizer in `quantizers.registry`: "lattice" (signs along a learned basis,
            found by search in the metric of the queries) or "rotation" (the paper's: signs of the
            rotated key).
        scale_rule: of `scales.token_scale`.
        keys_per_dim: calibration keys of a head for each of its coordinates, fewer where the text
            has fewer.
        n_held_out: tokens that β is measured on.
        sliding: whether layers with a sliding window are learned too.
        temperature: whether a gain for each head is fitted on calibration queries.
        seed: of the sample of keys, and of the rotation.
        batch_size: passages read at once.
        lattice, rotation: how either code is learned.

    Raises:
        InputError: on an unknown name, or a count below 1.

    Example:
        >>> from signlattice import CalibrationConfig
        >>> CalibrationConfig(code="rotation", keys_per_dim=128).scale_rule
        'unbiased'
    """

    code: str = "lattice"
    scale_rule: ScaleRule = "unbiased"
    keys_per_dim: int = 256
    n_held_out: int = 4096
    sliding: bool = False
    temperature: bool = False
    seed: int = 0
    batch_size: int = 16
    lattice: LatticeConfig = LatticeConfig()
    rotation: LearnConfig = LearnConfig()

    def __post_init__(self) -> None:
        check_types(self)
        registry.check_name(self.code)
        check_counts(self, "keys_per_dim", "n_held_out", "batch_size")


def coded_layers(loaded: LoadedModel, config: CalibrationConfig) -> dict[int, AttentionLayer]:
    """Return the layers that a codec is learned for: with keys of their own, of a size that fits.

    Raises ``InputError`` if there is none, or none that a `SignKeyCache` can hold.
    """
    found = {
        index: layer
        for index, layer in cacheable(attention_layers(loaded.model)).items()
        if layer.head_dim in HEAD_DIMS and (config.sliding or layer.window is None)
    }
    if not found:
        raise InputError(
            f"{loaded.name} has no layer to learn a code for: "
            + ("all have sliding windows, or " if not config.sliding else "")
            + f"heads of another size than {', '.join(map(str, HEAD_DIMS))}"
        )
    return found


@checked
def learn_codec(
    loaded: LoadedModel,
    text: Text,
    config: CalibrationConfig = CalibrationConfig(),
    scratch: Path | None = None,
    progress: Progress | None = None,
    on_capture: OnCapture | None = None,
) -> KeyCodec:
    """Learn a codec of ``loaded`` on the calibration side of ``text``; β is of the other side.

    What is learned is as a file of eight bits holds it. ``progress`` is told each part that is done
    (`n_parts`), ``on_capture`` the tokens that are read and those that there are, while the first
    of them is under way. With ``scratch``, a folder, keys go to disk
    and layers that are done are kept there: a run that was interrupted goes on where it was.

    Raises ``InputError`` as `coded_layers`, and on a text too short for the head sizes.

    Example:
        >>> from signlattice import CalibrationConfig, LearnConfig, learn_codec
        >>> from signlattice import load_model, read_text
        >>> config = CalibrationConfig(
        ...     code="rotation",
        ...     keys_per_dim=128,
        ...     n_held_out=512,
        ...     rotation=LearnConfig(solver="itq", steps=2),  # two steps, to be quick: leave it out
        ... )
        >>> codec = learn_codec(load_model("olmoe-mini"), read_text("corpus"), config)
        >>> sorted(codec.layers)
        [0, 1, 2, 3]
    """
    codec = learn_codec_shared(Workers(), loaded, text, config, scratch, progress, on_capture)
    assert codec is not None  # a process alone leads
    return codec


def learn_codec_shared(
    workers: Workers,
    loaded: LoadedModel,
    text: Text,
    config: CalibrationConfig = CalibrationConfig(),
    scratch: Path | None = None,
    progress: Progress | None = None,
    on_capture: OnCapture | None = None,
) -> KeyCodec | None:
    """Learn as `learn_codec` does, passages and layers shared out among ``workers``.

    All of them call this with one ``scratch`` folder. The process that leads gets the codec, which
    is the same however many they are, given as many threads to each; the others get None. The keys
    of one layer at a time are in memory.

    Raises ``InputError`` as `learn_codec`, and on several workers without ``scratch``.
    """
    _check_shared(scratch, workers)
    tell = progress or no_progress
    layers = coded_layers(loaded, config)
    if scratch is not None:
        scratch = scratch / _identity(loaded, text, config)
    fit, judged = _passages(loaded, text, layers, config)
    bank = _captured(loaded, fit, config, scratch, workers, on_capture)
    tell("captured")
    codes = learn_layers(loaded, bank, config, scratch, tell, workers)
    if not workers.leads:
        return None
    held_out = capture_passages(loaded, judged, states=("keys",), batch_size=config.batch_size)
    beta = {
        index: tuple(code.cosines(held_out.keys(index)).double().mean(-1).tolist())
        for index, code in codes.items()
    }
    tell("measured")
    smallest = min(layer.head_dim for layer in layers.values())
    n_keys = min(bank.n_tokens, config.keys_per_dim * smallest)
    return KeyCodec(
        codes,
        loaded.weights_hash,
        {
            "model": loaded.name,
            "code": config.code,
            "text": text.name,
            "seed": str(config.seed),
            "signlattice": __version__,
        },
        Calibration(_hash(fit), n_keys, beta, null_betas(n_keys, smallest, config)),
    )


def learn_layers(
    loaded: LoadedModel,
    bank: StateBank,
    config: CalibrationConfig = CalibrationConfig(),
    scratch: Path | None = None,
    progress: Progress | None = None,
    workers: Workers = Workers(),
) -> dict[int, StoredQuantizer]:
    """Learn the codes of `learn_codec` from keys and queries that are captured already.

    Keys are a sample by the seed, ``keys_per_dim`` of them if the bank has more; the metric is of
    all its queries. Several ``workers`` share the layers through the files in ``scratch``: the one
    that leads gets all codes, the others those that they have learned.

    Raises ``InputError`` as `coded_layers`, and on several workers without ``scratch``.
    """
    _check_shared(scratch, workers)
    readers, layers = _readers(loaded), coded_layers(loaded, config)
    codes = {}

    def learn(indices: Iterable[int]) -> None:
        for index in indices:
            file = None if scratch is None else scratch / f"layer-{index}.safetensors"
            codes[index] = _learned(bank, layers[index], readers[index], config, file)
            if progress is not None:
                progress(f"learned layer {index}")

    learn(workers.share(list(layers)))
    workers.barrier()
    if workers.leads:
        learn(index for index in layers if index not in codes)  # from the files of the others
    return dict(sorted(codes.items()))


def _check_shared(scratch: Path | None, workers: Workers) -> None:
    if scratch is None and workers.count > 1:
        raise InputError(f"{workers.count} processes share their work in a folder: give scratch")


def n_parts(loaded: LoadedModel, config: CalibrationConfig) -> int:
    """Count how often `learn_codec` reports progress."""
    return len(coded_layers(loaded, config)) + 2


@checked
def measure_codec(
    loaded: LoadedModel, codec: KeyCodec, pieces: Sequence[Passage], batch_size: int = 16
) -> dict[int, HeadQuality]:
    """Measure β, distortion and KL of the attention weights, by layer and head, on some passages.

    Example:
        >>> from signlattice import KeyCodec, load_model, measure_codec, read_text
        >>> from signlattice.models.loading import MODELS
        >>> from signlattice.models.passages import passages
        >>> loaded = load_model("olmoe-mini")
        >>> file = MODELS / "olmoe-mini" / "lattice.safetensors"
        >>> codec = KeyCodec.load(file, loaded.weights_hash)
        >>> pieces = passages(loaded, read_text("corpus").evaluation)[:2]
        >>> quality = measure_codec(loaded, codec, pieces)
        >>> bool(quality[0].beta.mean() > 0.8)
        True
    """
    codec.check_model(loaded.weights_hash)
    bank = capture_passages(loaded, pieces, batch_size=batch_size)
    layers = attention_layers(loaded.model)
    return {index: head_quality(code, bank, layers[index]) for index, code in codec.layers.items()}


def null_betas(n_keys: int, d: int, config: CalibrationConfig) -> tuple[float, float]:
    """Compute β (in sample, held out) learned on ``n_keys`` of Gaussian noise in d dimensions."""
    return registry.quantizer(config.code).noise_null(n_keys, d, config)


def _passages(
    loaded: LoadedModel, text: Text, layers: dict[int, AttentionLayer], config: CalibrationConfig
) -> tuple[list[Passage], list[Passage]]:
    """Take as many passages of both sides as are needed, from all over the text."""
    widest = max(layer.head_dim for layer in layers.values())
    fit = _enough(loaded, text.calibration, config.keys_per_dim * widest)
    n_tokens = sum(len(piece.ids) for piece in fit)
    least = registry.quantizer(config.code).least_keys_per_dim
    if config.keys_per_dim < least:
        raise InputError(
            f"keys_per_dim={config.keys_per_dim}: learning a {config.code} takes {least} or more"
        )
    if n_tokens < least * widest:
        raise InputError(
            f"the calibration side of {text.name} has {n_tokens} tokens: "
            f"give at least {least * widest}, {least} for each coordinate of a head"
        )
    return fit, _enough(loaded, text.evaluation, config.n_held_out)


def _enough(loaded: LoadedModel, documents: Sequence[Document], n_tokens: int) -> list[Passage]:
    """Take windows of all documents, four of each unless that is short of ``n_tokens``."""
    pieces = enough_passages(
        loaded, documents, lambda some: sum(len(piece.ids) for piece in some) >= n_tokens
    )
    return take_tokens(pieces, n_tokens)


def _captured(
    loaded: LoadedModel,
    fit: Sequence[Passage],
    config: CalibrationConfig,
    scratch: Path | None,
    workers: Workers,
    on_capture: OnCapture | None,
) -> StateBank:
    size = config.batch_size
    total, done = sum(len(piece.ids) for piece in fit) // workers.count, 0

    def count(n_tokens: int) -> None:
        nonlocal done
        done += n_tokens
        if on_capture is not None:
            on_capture(min(done, total), total)

    if scratch is None:
        return capture_passages(loaded, fit, batch_size=size, progress=count)
    parts = split_batches(fit, size)
    folder = scratch / "keys"
    return capture_parts(loaded, parts, folder, workers, batch_size=size, on_tokens=count)


def _readers(loaded: LoadedModel) -> dict[int, list[int]]:
    """List, per layer that owns keys, all layers whose queries read them."""
    readers: dict[int, list[int]] = {}
    for index, layer in attention_layers(loaded.model).items():
        readers.setdefault(layer.source, []).append(index)
    return readers


def _learned(
    bank: StateBank,
    layer: AttentionLayer,
    readers: list[int],
    config: CalibrationConfig,
    file: Path | None,
) -> StoredQuantizer:
    """Learn the code of one layer, rounded, and keep it in ``file``; or load it from there."""
    if file is not None and file.is_file():
        return KeyCodec.load(file).layers[layer.index]
    chosen = draw_tokens(bank.n_tokens, config.keys_per_dim * layer.head_dim, config.seed)
    calibration = CalibrationSet(
        bank.keys(layer.index)[:, chosen],
        lambda: [bank.queries(reader) for reader in readers],
        layer.centering,
    )
    code = registry.quantizer(config.code).fit(calibration, config).rounded()
    if config.temperature and layer.softcap is None and isinstance(code, SignQuantizer):
        code = replace(code, temperature=fit_temperature(code, _few(bank, layer.index), layer))
    if file is not None:
        KeyCodec({layer.index: code}, "").save(file, bits=8)
    return code


def _few(bank: StateBank, layer: int, n_sequences: int = 12) -> StateBank:
    """Copy some sequences of one layer of a bank: a temperature has one number to fit."""
    few = StateBank(bank.stage, lengths=bank.lengths[:n_sequences])
    n_tokens = sum(few.lengths)
    few.append("keys", layer, bank.keys(layer).transpose(0, 1)[:n_tokens])
    few.append("queries", layer, bank.queries(layer).transpose(0, 1)[:n_tokens])
    return few


def _hash(pieces: Sequence[Passage]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.ids.numpy().tobytes())
    return digest.hexdigest()


def _identity(loaded: LoadedModel, text: Text, config: CalibrationConfig) -> str:
    """Hash what kept results depend on: the model, the text, the library and the configuration."""
    sides = map(corpus.fingerprint, (text.calibration, text.evaluation))
    return identity(loaded.weights_hash, loaded.context, *sides, asdict(config), __version__)
