"""One-bit keys for the KV cache of a transformer: rotate, keep the signs, attend.

From a model to a cache in four lines::

    from signlattice import SignKeyCache, learn_codec, load_model, read_text

    loaded = load_model("olmoe-mini")
    codec = learn_codec(loaded, read_text("corpus"))
    cache = SignKeyCache(loaded, codec)  # model.generate(..., past_key_values=cache)

Where things are, in the order in which data walks through them::

    models, data   a model, and the text that it reads
    rotations      matrices that bring keys near the sign lattice, drawn, fitted or learned
    quantizers     keys and values to codes and back, and the file of a codec
    kernels        the operations on packed codes, on a GPU and on a processor
    calibration    from a model and a text to a codec
    cache          the cache for ``generate()``
    evaluation     what compression costs
    cli            the command line

Names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from signlattice.alignment import beta, cosine, elliptical_ceiling, haar_beta, moment_ratio
    from signlattice.cache.sign_key_cache import CacheConfig, SignKeyCache
    from signlattice.calibration import CalibrationConfig, learn_codec, measure_codec
    from signlattice.data.texts import read_text
    from signlattice.errors import InputError, IntegrityError
    from signlattice.evaluation.through_cache import Judge, QualityConfig
    from signlattice.models.capture import capture
    from signlattice.models.full_size import load_full
    from signlattice.models.loading import LoadedModel, load_model
    from signlattice.quantizers.centering import Centering
    from signlattice.quantizers.codec import KeyCodec
    from signlattice.quantizers.sign import SignQuantizer
    from signlattice.rotations.config import LearnConfig
    from signlattice.rotations.learned import learn_rotation, learn_rotations

__version__ = "0.1.0"

_EXPORTS = {
    "CacheConfig": "cache.sign_key_cache",
    "CalibrationConfig": "calibration",
    "Centering": "quantizers.centering",
    "InputError": "errors",
    "IntegrityError": "errors",
    "Judge": "evaluation.through_cache",
    "KeyCodec": "quantizers.codec",
    "LearnConfig": "rotations.config",
    "LoadedModel": "models.loading",
    "QualityConfig": "evaluation.through_cache",
    "SignKeyCache": "cache.sign_key_cache",
    "SignQuantizer": "quantizers.sign",
    "beta": "alignment",
    "capture": "models.capture",
    "cosine": "alignment",
    "elliptical_ceiling": "alignment",
    "haar_beta": "alignment",
    "learn_codec": "calibration",
    "learn_rotation": "rotations.learned",
    "learn_rotations": "rotations.learned",
    "load_full": "models.full_size",
    "load_model": "models.loading",
    "measure_codec": "calibration",
    "moment_ratio": "alignment",
    "read_text": "data.texts",
}

__all__ = [
    "CacheConfig",
    "CalibrationConfig",
    "Centering",
    "InputError",
    "IntegrityError",
    "Judge",
    "KeyCodec",
    "LearnConfig",
    "LoadedModel",
    "QualityConfig",
    "SignKeyCache",
    "SignQuantizer",
    "__version__",
    "beta",
    "capture",
    "cosine",
    "elliptical_ceiling",
    "haar_beta",
    "learn_codec",
    "learn_rotation",
    "learn_rotations",
    "load_full",
    "load_model",
    "measure_codec",
    "moment_ratio",
    "read_text",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. Raises ``AttributeError`` on any other."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
