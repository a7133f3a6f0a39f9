"""Additive codebooks (AQLM, arXiv 2401.06118), fitted in the metric of H.

1. Words by weighted k-means, then k-means of the residual, for each codebook in turn.
2. Codes with error feedback over groups of d columns (block LDL; GPTVQ, arXiv 2402.15319), each group by beam search.
3. Rounds of: words by conjugate gradients on tr(E H E^T), which is quadratic in them; row scales in closed form; codes
   by beam search one group at a time given all others, the group's optimum being the nearest word to
   w_g + (E_others H)_g H_gg^-1 in the metric of H_gg. A round that gains under MIN_GAIN is the last; the best is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.formats.codecs import AdditiveCodec

BEAM = 4
BLOCK_COLUMNS = 128
KMEANS_SAMPLES = 1 << 15
KMEANS_ITERATIONS = 20
CG_ITERATIONS = 2  # more change nothing: the codes move again anyway
MAX_ROUNDS = 3
MIN_GAIN = 0.01  # AQLM stops here


@dataclass
class AdditiveCodes:
    """Codes [N, G, M] int64, row scales [N] and codebooks [M, 2^B, d], as stored."""

    codes: Tensor
    scales: Tensor
    codebooks: Tensor

    def values(self, cols: int) -> Tensor:
        """W_hat [N, cols]."""
        return gather_words(self.codes, self.codebooks)[:, :cols] * self.scales[:, None]


def gather_words(codes: Tensor, books: Tensor) -> Tensor:
    """Sum of the chosen words, [N, G d]."""
    total = books[0][codes[:, :, 0]]
    for m in range(1, books.shape[0]):
        total = total + books[m][codes[:, :, m]]
    return total.flatten(1)


def normalised_vectors(W: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(row scales [N] as stored, W over its scale cut into vectors [N, G, d], the last padded with zeros)."""
    scales = to_half(W.square().mean(1).sqrt())
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    padded = torch.nn.functional.pad(W / scales[:, None], (0, -W.shape[1] % dim))
    return scales, padded.reshape(len(W), -1, dim)


def fit_codebooks(vectors: Tensor, weights: Tensor, codec: AdditiveCodec, seed: int) -> Tensor:
    """Residual k-means of vectors [n, d] with weights [n]: codebooks [M, 2^B, d], rounded to fp16."""
    generator = torch.Generator().manual_seed(seed)
    count, words = vectors.shape[0], 1 << codec.codebook_bits
    if count > KMEANS_SAMPLES:
        chosen = torch.randperm(count, generator=generator)[:KMEANS_SAMPLES]
        vectors, weights = vectors[chosen], weights[chosen]
    residual, books = vectors.clone(), []
    for _ in range(codec.num_codebooks):
        book, assigned = _kmeans(residual, weights, words, generator)
        residual = residual - book[assigned]
        books.append(book)
    return to_half(torch.stack(books))


def _kmeans(vectors: Tensor, weights: Tensor, words: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count = vectors.shape[0]
    start = torch.randperm(count, generator=generator)[:words]
    book = vectors[start].clone()
    if count < words:
        book = torch.cat([book, torch.zeros(words - count, vectors.shape[1])])
    assigned = torch.zeros(count, dtype=torch.long)
    for _ in range(KMEANS_ITERATIONS):
        assigned = _nearest(vectors, book)
        mass = torch.zeros(words).index_add_(0, assigned, weights)
        total = torch.zeros_like(book).index_add_(0, assigned, vectors * weights[:, None])
        book = torch.where(mass[:, None] > 0, total / mass.clamp_min(1e-30)[:, None], book)
        empty = torch.nonzero(mass == 0).flatten()
        if len(empty) and count > words:  # split: an unused word starts at the worst-served vectors
            worst = ((vectors - book[assigned]).square().sum(1) * weights).topk(min(len(empty), count)).indices
            book[empty[: len(worst)]] = vectors[worst]
    return book, _nearest(vectors, book)


def _nearest(vectors: Tensor, book: Tensor, rows: int = 4096) -> Tensor:
    norms = 0.5 * book.square().sum(1)
    parts = [_smallest(torch.addmm(norms, part, book.T, alpha=-1), 1) for part in torch.split(vectors, rows)]
    return torch.cat(parts).squeeze(1)


def beam_codes(target: Tensor, books: Tensor, row_scales: Tensor) -> Tensor:
    """Codes [N, M] whose summed words, times the row's scale, come nearest to `target` [N, d] (whitened alike)."""
    residual = (target / row_scales[:, None])[:, None, :]  # [N, beam, d]
    distance = torch.zeros(len(target), 1)  # half the squared distance, up to a constant of the row
    paths = torch.zeros(len(target), 1, 0, dtype=torch.long)
    for m, book in enumerate(books):
        norms = 0.5 * book.square().sum(1)
        scores = torch.addmm(norms, residual.flatten(0, 1), book.T, alpha=-1).reshape(len(target), -1, len(book))
        scores = (scores.add_(distance[:, :, None]) if m else scores).flatten(1)
        best = _smallest(scores, 1 if m == len(books) - 1 else min(BEAM, scores.shape[1]))
        parent, code = best // len(book), best % len(book)
        paths = torch.cat([_rows(paths, parent), code[:, :, None]], 2)
        if m < len(books) - 1:
            distance = scores.gather(1, best)
            residual = _rows(residual, parent) - book[code]
    return paths[:, 0]


def _smallest(scores: Tensor, width: int) -> Tensor:
    """Indices [N, width] of the smallest scores of each row, best first; numpy's argmin is 10 times torch's."""
    if width == 1:
        return torch.from_numpy(scores.numpy().argmin(1)).unsqueeze(1)
    rest, found = scores.clone(), []
    for _ in range(width):
        found.append(torch.from_numpy(rest.numpy().argmin(1)).unsqueeze(1))
        rest.scatter_(1, found[-1], torch.inf)
    return torch.cat(found, 1)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values[n, index[n, b], :] for values [N, beam, d] and index [N, b]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


class _Fitter:
    """One matrix while its codes are fitted."""

    def __init__(self, W: Tensor, codec: AdditiveCodec, work: Workspace, shared: Tensor | None, seed: int) -> None:
        self.W, self.codec, self.cols = W, codec, W.shape[1]
        self.H = work.hessian32
        self.groups, self.factor = self._visits(work)
        self.fixed_books = shared is not None
        scales, vectors = normalised_vectors(W, codec.dim)
        weight = torch.nn.functional.pad(work.column_weight, (0, -self.cols % codec.dim)).reshape(-1, codec.dim).mean(1)
        if shared is None:
            flat = weight.expand(W.shape[0], -1).reshape(-1)
            shared = fit_codebooks(vectors.flatten(0, 1), flat, codec, seed)
        self.state = AdditiveCodes(
            torch.zeros(*vectors.shape[:2], codec.num_codebooks, dtype=torch.long), scales, shared
        )

    def _visits(self, work: Workspace) -> tuple[list[int], Tensor]:
        """Groups by falling mean diagonal of H, and the inverse factor of H in that order of columns."""
        count = -(-self.cols // self.codec.dim)
        weight = [float(work.column_weight[self._span(g)].mean()) for g in range(count)]
        groups = sorted(range(count), key=lambda g: -weight[g])
        order = torch.cat([torch.arange(self.cols)[self._span(g)] for g in groups])
        return groups, work.inverse_factor(order)

    def _span(self, group: int) -> slice:
        return slice(group * self.codec.dim, min((group + 1) * self.codec.dim, self.cols))

    def cost(self, state: AdditiveCodes) -> float:
        error = self.W - state.values(self.cols)
        return float(((error @ self.H) * error).sum(dtype=torch.float64))

    def feed_back(self) -> None:
        """First codes: error feedback, group by group."""
        state, start = self.state, 0
        targets = torch.cat([self.W[:, self._span(g)] for g in self.groups], 1)
        for group in self.groups:
            width = self._span(group).stop - self._span(group).start
            span = slice(start, start + width)
            whiten = torch.linalg.inv(self.factor[span, span])
            books = state.codebooks[:, :, :width] @ whiten
            state.codes[:, group] = beam_codes(targets[:, span] @ whiten, books, state.scales)
            error = (targets[:, span] - self._group_values(group)[:, :width]) @ whiten
            start = span.stop
            if start < self.cols:
                targets[:, start:].addmm_(error, self.factor[span, start:], alpha=-1)

    def refit_scales(self) -> None:
        words = gather_words(self.state.codes, self.state.codebooks)[:, : self.cols]
        product = words @ self.H
        top, bottom = (product * self.W).sum(1), (product * words).sum(1)
        scales = to_half(torch.where(bottom > 0, top / bottom.clamp_min(1e-30), self.state.scales))
        self.state.scales = torch.where(scales == 0, self.state.scales, scales)

    def refit_codebooks(self) -> None:
        """Conjugate gradients on the words, from where they are."""
        if self.fixed_books:
            return
        state = self.state
        missing = -self.cols % self.codec.dim
        flat = [state.codes[:, :, m].reshape(-1) for m in range(self.codec.num_codebooks)]

        def spread(books: Tensor) -> Tensor:
            return gather_words(state.codes, books)[:, : self.cols] * state.scales[:, None]

        def gather(field: Tensor) -> Tensor:
            scaled = torch.nn.functional.pad((field @ self.H) * state.scales[:, None], (0, missing))
            vectors = scaled.reshape(-1, self.codec.dim)
            return torch.stack([torch.zeros_like(state.codebooks[0]).index_add_(0, f, vectors) for f in flat])

        books = state.codebooks.clone()
        residual = gather(self.W - spread(books))
        direction, norm = residual.clone(), residual.square().sum()
        for _ in range(CG_ITERATIONS):
            field = spread(direction)
            curvature = ((field @ self.H) * field).sum()
            if float(curvature) <= 0 or float(norm) == 0:
                break
            step = norm / curvature
            books += step * direction
            residual -= step * gather(field)
            new_norm = residual.square().sum()
            direction = residual + (new_norm / norm) * direction
            norm = new_norm
        state.codebooks = to_half(books)

    def search_codes(self) -> None:
        """One beam-search pass over the groups, each given all the others; a code is only replaced by a better one.

        With e the error and slope = e H, groups of one block of columns see each other's changes at once; the other
        blocks see them when the block is done.
        """
        error = self.W - self.state.values(self.cols)
        slope = error @ self.H
        per_block = max(1, BLOCK_COLUMNS // self.codec.dim)
        for first in range(0, self.state.codes.shape[1], per_block):
            groups = range(first, min(first + per_block, self.state.codes.shape[1]))
            block = slice(self._span(groups[0]).start, self._span(groups[-1]).stop)
            before, local = error[:, block].clone(), slope[:, block].contiguous()
            for group in groups:
                span = self._span(group)
                inner = slice(span.start - block.start, span.stop - block.start)
                change = self._improve(group, local[:, inner])
                error[:, span] += change
                local.addmm_(change, self.H[span, block])
            slope.addmm_(error[:, block] - before, self.H[block])

    def _improve(self, group: int, slope: Tensor) -> Tensor:
        """Search the codes of one group; returns the change of its error [N, width]."""
        span, state = self._span(group), self.state
        width = span.stop - span.start
        root, failed = torch.linalg.cholesky_ex(self.H[span, span])
        if int(failed):  # singular in float32: its diagonal will do, and a worse code is not taken
            root = torch.diag(self.H.diagonal()[span].sqrt())
        old, old_codes = self._group_values(group)[:, :width], state.codes[:, group].clone()
        wanted = old + torch.cholesky_solve(slope.T, root).T  # the minimiser, all else fixed
        codes = beam_codes(wanted @ root, state.codebooks[:, :, :width] @ root, state.scales)
        state.codes[:, group] = codes
        new = self._group_values(group)[:, :width]
        worse = ((wanted - new) @ root).square().sum(1) >= ((wanted - old) @ root).square().sum(1)
        state.codes[:, group] = torch.where(worse[:, None], old_codes, codes)
        return torch.where(worse[:, None], torch.zeros_like(old), old - new)

    def _group_values(self, group: int) -> Tensor:
        words = sum(self.state.codebooks[m][self.state.codes[:, group, m]] for m in range(self.codec.num_codebooks))
        assert isinstance(words, Tensor)
        return words * self.state.scales[:, None]


def encode_additive(
    W: Tensor, codec: AdditiveCodec, work: Workspace, shared: Tensor | None, seed: int, rounds: int = MAX_ROUNDS
) -> AdditiveCodes:
    """Codes, scales and codebooks of W[N, K] float32; `shared` [M, 2^B, d] are codebooks that may not move."""
    fitter = _Fitter(W, codec, work, shared, seed)
    fitter.feed_back()
    fitter.refit_scales()
    best, best_cost = _copy(fitter.state), fitter.cost(fitter.state)
    for _ in range(rounds):
        fitter.refit_codebooks()
        fitter.search_codes()
        fitter.refit_scales()
        cost = fitter.cost(fitter.state)
        gain = 1 - cost / best_cost if best_cost > 0 else 0.0
        if cost < best_cost:
            best, best_cost = _copy(fitter.state), cost
        if gain < MIN_GAIN:
            break
    empty = to_half(W.square().mean(1).sqrt()) == 0
    return AdditiveCodes(best.codes, best.scales.masked_fill(empty, 0.0), best.codebooks)


def _copy(state: AdditiveCodes) -> AdditiveCodes:
    return AdditiveCodes(state.codes.clone(), state.scales.clone(), state.codebooks.clone())
