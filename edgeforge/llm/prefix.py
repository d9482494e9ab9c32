"""prefix: the token that begins every text, computed once in float when a model is quantized.

    cache = [keys and values of BOS | ...]      its logits are kept too, so that no integer graph ever computes it

Trained decoders give their first token activations hundreds of times larger than any other's, which a static range
would have to cover; behind a fixed first token they are constants. Chen et al., "PrefixQuant" (arXiv:2410.05265) and
Son et al., "Prefixing Attention Sinks" (arXiv:2406.12016); Sun et al., "Massive Activations" (arXiv:2402.17762)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeforge.bundle import Bundle, load_arrays
from edgeforge.ir.graph import Graph

#: Of a bundle, the arrays of `Prefix`.
FILE = "prefix.safetensors"

#: Per layer float keys [kv_heads, head_dim, N] and values [kv_heads, N, head_dim].
Cache = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Prefix:
    """``token`` and what the graphs are fed of it, as codes: ``past_keys.L`` [1, kv_heads, head_dim, 1] and
    ``past_values.L`` [1, kv_heads, 1, head_dim]; and the ``logits`` [1, 1, vocab] behind it."""

    token: int
    arrays: Mapping[str, np.ndarray]


def in_codes(token: int, cache: Cache, logits: np.ndarray, graph: Graph) -> Prefix:
    """The prefix in the encodings of ``graph``. cache: of that one token; logits: float [vocab] behind it."""
    real = {"logits": logits[None, None]}
    for layer, (keys, values) in enumerate(cache):
        real |= {f"past_keys.{layer}": keys[None], f"past_values.{layer}": values[None]}
    codes = {}
    for name, array in real.items():
        kind = graph.type(name)
        codes[name] = array if kind.q is None else kind.q.quantize(array, kind.dtype)
    return Prefix(token, codes)


def prefix_of(bundle: Bundle) -> Prefix | None:
    """The prefix that a language model's bundle begins with, if it has one."""
    record = bundle.manifest.language
    if record is None or not record.prefix or record.bos is None:
        return None
    return Prefix(record.bos, load_arrays(bundle.path / FILE))
