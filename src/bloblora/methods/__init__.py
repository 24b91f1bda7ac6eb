"""One file a method, all of one shape: how an adapter is prepared, fitted, saved and loaded, and drawn from."""

from .bbb import Bbb
from .blob import Blob
from .blob_b import BlobB
from .blob_symmetric import BlobSymmetric
from .distilled import Distilled
from .ensemble import Ensemble
from .full import Full
from .ivon import Ivon
from .laplace import Laplace
from .laplace_last import LaplaceLast
from .lora import Lora
from .map import Map
from .mc_dropout import McDropout
from .method import Method, Training
from .scalabl import Scalabl
from .temperature import Temperature
from .tfb import Tfb

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Lora,
        Map,
        Full,
        McDropout,
        Ensemble,
        Bbb,
        Blob,
        BlobSymmetric,
        BlobB,
        Laplace,
        LaplaceLast,
        Tfb,
        Ivon,
        Scalabl,
        Distilled,
        Temperature,
    )
}
"""The methods by name."""

__all__ = [
    "METHODS",
    "Bbb",
    "Blob",
    "BlobB",
    "BlobSymmetric",
    "Distilled",
    "Ensemble",
    "Full",
    "Ivon",
    "Laplace",
    "LaplaceLast",
    "Lora",
    "Map",
    "McDropout",
    "Method",
    "Scalabl",
    "Temperature",
    "Tfb",
    "Training",
]
