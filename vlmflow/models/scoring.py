"""Log-likelihood of given answers by a model of our own families: packed, nothing padded, nothing computed twice.

What makes it fast: requests are sorted by length and packed, every segment attends to itself alone (`models.attention`);
the head meets only the rows whose next token is counted, in chunks (the full logits of one 1500-token sample under a
vocabulary of 152k are 0.9 GB in fp32, spec data-eval-soup.md 5.1), and so do the row-wise parts of the last layer, whose
other rows nobody reads; a tile that stands in several requests is encoded once.

What makes it exact: log-softmax in fp32, and the same arithmetic for a sample whatever stands beside it. Matrix products
give each row the same bits whatever the other rows are, as long as there are a few of them: a product of fewer than about
8 rows takes another path through MKL. So nothing here multiplies fewer than ROWS rows. Attention is computed a segment at
a time. On a CPU in fp32 a score has therefore the same bits whatever the packing (a test holds it); elsewhere it differs
in rounding only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from vlmflow.models.family import Family

ROWS = 16  # fewest rows of a matrix product
TILES = 64  # encoder tiles a pass
CPU_TOKENS = 2048  # tokens a pass on a CPU: the fastest of 512 to 4096 by a little; more only costs memory
HEAD_ROWS = 256  # rows of a chunk of the head, at least: fewer make its matrix product slow
CPU_LOGITS, GPU_LOGITS = 1 << 23, 1 << 27  # logits of a chunk of the head: 32 MiB and 512 MiB in fp32
ROW_WISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")  # parts of a decoder layer that look at one row alone


@dataclass(frozen=True)
class Score:
    """`nll`: nats summed over `tokens` = the target's tokens and the end token (points.md 5). ppl = exp(nll/tokens).

    `error` is set, and nll and tokens are not, where the sample alone does not fit into the device's memory.
    """

    nll: float = 0.0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A request as ids, target mask and tiles (uint8 [t, S, S, 3] an image); `digests` tells equal tiles, one each."""

    ids: list[int]
    mask: list[bool]
    tiles: list[np.ndarray]
    digests: list[bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        return sum(tiles.nbytes for tiles in self.tiles) + 10 * len(self.ids)


def tile_digests(tiles: Iterable[np.ndarray]) -> list[bytes]:
    """Content hash of each tile: equal tiles are encoded once."""
    return [hashlib.blake2b(tile, digest_size=16).digest() for image in tiles for tile in np.ascontiguousarray(image)]


def score_packed(
    model: Any,
    family: Family,
    encoded: Sequence[Encoded],
    batch_tokens: int,
    progress: Callable[[int], Any] | None = None,
) -> list[Score]:
    """Score of each request, in their order; `progress(n)` is called after each pack of n.

    On a GPU that runs out of memory a pack is halved, and a sample that does not fit alone gets an error.
    """
    limit = batch_tokens if model.device.type == "cuda" else min(batch_tokens, CPU_TOKENS)
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].ids), i))
    features = Features(model, encoded)
    scores: dict[int, Score] = {}

    def forward(pack: Sequence[int]) -> dict[int, Score]:
        items = [encoded[i] for i in pack]
        found = dict(zip(pack, _score(model, family, items, features.of(items)), strict=True))
        features.done(items)
        return found

    for pack in packs(order, [len(item.ids) for item in encoded], limit):
        scores |= halving(forward, pack)
        if progress:
            progress(len(pack))
    return [scores[i] for i in range(len(encoded))]


def halving(forward: Callable[[Sequence[int]], dict[int, Score]], pack: Sequence[int]) -> dict[int, Score]:
    """`forward(pack)`, in halves where the GPU's memory does not hold it; an error where it does not hold one sample."""
    import torch

    try:
        return forward(pack)
    except torch.OutOfMemoryError as error:
        reason = f"the GPU's memory does not hold this sample alone ({str(error).split('. ')[0]})"
    torch.cuda.empty_cache()
    if len(pack) == 1:
        return {pack[0]: Score(error=reason)}
    middle = len(pack) // 2
    return halving(forward, pack[:middle]) | halving(forward, pack[middle:])


def packs(order: Sequence[int], tokens: Sequence[int], limit: int) -> Iterator[list[int]]:
    """`order` cut where a pack would pass `limit` tokens; a longer one stands alone."""
    pack: list[int] = []
    length = 0
    for i in order:
        if pack and length + tokens[i] > limit:
            yield pack
            pack, length = [], 0
        pack.append(i)
        length += tokens[i]
    if pack:
        yield pack


class Features:
    """Encoder output of tiles: computed when a pack first needs it, kept until no later pack does."""

    def __init__(self, model: Any, encoded: Sequence[Encoded]) -> None:
        self._model = model
        self._left = Counter(digest for item in encoded for digest in item.digests)
        self._kept: dict[bytes, torch.Tensor] = {}

    def of(self, items: Sequence[Encoded]) -> torch.Tensor | None:
        """[tiles, tokens, D] of all tiles of the items, in order; None without images."""
        import torch

        tiles = {
            digest: tile
            for item in items
            for digest, tile in zip(item.digests, (t for image in item.tiles for t in image), strict=True)
        }
        new = [digest for digest in tiles if digest not in self._kept]
        for start in range(0, len(new), TILES):
            some = new[start : start + TILES]
            pixels = torch.from_numpy(np.stack([tiles[digest] for digest in some])).to(self._model.device)
            with torch.inference_mode():
                self._kept.update(zip(some, self._model.get_image_features(pixels), strict=True))
        return torch.stack([self._kept[d] for item in items for d in item.digests]) if tiles else None

    def done(self, items: Sequence[Encoded]) -> None:
        """Forget what no request after these needs."""
        for digest in (d for item in items for d in item.digests):
            self._left[digest] -= 1
            if not self._left[digest]:
                del self._kept[digest]


def _score(model: Any, family: Family, items: Sequence[Encoded], features: torch.Tensor | None) -> list[Score]:
    import torch

    device = model.device
    lengths = [len(item.ids) for item in items]
    ids = [token for item in items for token in item.ids]
    positions = np.concatenate([family.positions(item.ids) for item in items])
    labels = np.concatenate([family.labels(item.ids, item.mask) for item in items])
    if (lacking := ROWS - len(ids)) > 0:
        lengths, ids = [*lengths, lacking], [*ids, *ids[:1] * lacking]
        positions = np.concatenate([positions, np.arange(lacking)])
        labels = np.concatenate([labels, np.full(lacking, -100)])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.flatnonzero(labels[1:] != -100)
    wanted = torch.from_numpy(np.resize(rows, max(len(rows), ROWS)) if len(rows) else np.arange(ROWS)).to(device)
    borders = torch.from_numpy(bounds.astype(np.int32)).to(device)
    with torch.inference_mode(), only_rows(model, wanted):
        hidden = model.model(
            input_ids=torch.tensor([ids]).to(device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            image_features=features,
            cu_seq_lens_q=borders,
            cu_seq_lens_k=borders,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            use_cache=False,
        ).last_hidden_state[0]
        nats = nats_of(hidden[wanted], labels[1:][rows], model.get_output_embeddings())
    owner = np.searchsorted(bounds, rows, side="right") - 1
    sums = np.bincount(owner, weights=nats, minlength=len(items))
    counts = np.bincount(owner, minlength=len(items))
    return [Score(float(sums[i]), int(counts[i])) for i in range(len(items))]


@contextmanager
def only_rows(model: Any, rows: torch.Tensor) -> Iterator[None]:
    """While it lasts, the row-wise parts of the last decoder layer compute these rows [n] of the (flattened) batch alone.

    Keys and values of the layer stay whole. A model whose layers have other names computes everything, as without it.
    """
    layers: Any = getattr(model.get_decoder(), "layers", None)
    changed: list[Any] = []

    def narrowed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def apply(hidden: torch.Tensor) -> torch.Tensor:
            flat = hidden.flatten(0, -2)
            some = forward(flat[rows][None])[0]
            return flat.new_zeros(len(flat), some.shape[-1]).index_copy_(0, rows, some).unflatten(0, hidden.shape[:-1])

        return apply

    try:
        for name in ROW_WISE if layers is not None else ():
            module = layers[-1]
            for part in name.split("."):
                module = getattr(module, part, None)
            if type(module).__name__.endswith(("Linear", "MLP")):  # a mixture of experts returns more than its output
                module.forward = narrowed(module.forward)
                changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def nats_of(hidden: torch.Tensor, targets: np.ndarray, head: Any) -> np.ndarray:
    """-log p of each target [n] under the first n of the rows `hidden` [at least ROWS, D], float64.

    The head meets the rows in chunks; log-softmax is in fp32.
    """
    import torch

    count = len(targets)
    values = torch.from_numpy(np.pad(targets, (0, len(hidden) - count))).to(hidden.device)
    logits = GPU_LOGITS if hidden.is_cuda else CPU_LOGITS
    most = max(HEAD_ROWS, logits // head.weight.shape[0])
    chunks = -(-len(hidden) // most)
    parts = zip(hidden.tensor_split(chunks), values.tensor_split(chunks), strict=True)  # of equal size: none is small
    nats = [torch.nn.functional.cross_entropy(head(h).float(), v, reduction="none") for h, v in parts]
    return torch.cat(nats)[:count].double().cpu().numpy()
