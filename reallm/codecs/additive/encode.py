"""The encoder for additive codebooks (AQLM, arXiv 2401.06118), fitted in the metric of H.

1. The words of the first codebook are fitted by weighted k-means, those of each further one by k-means of the residual.
2. The codes are chosen group by group (d columns each) with error feedback (block LDL; GPTVQ, arXiv 2402.15319); within
   a group by beam search.
3. Rounds of three steps follow. The words are refitted by conjugate gradients on tr(E H E^T), which is quadratic in the
   words. The codes are searched again, one group at a time with all other groups fixed: the best sum of words is the
   one nearest to w_g + (E_others H)_g H_gg^-1 in the metric of H_gg. The row scales are set to their optimum in closed
   form. The rounds end when one lowers the cost by a share of less than MIN_GAIN; the best result is returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reallm.codecs.encoder import CodedMatrix, EncodingContext
from reallm.codecs.metric import Workspace
from reallm.codecs.packed_fields import to_half
from reallm.kernels.formats.codecs import AdditiveCodec

BEAM = 4
BLOCK_COLUMNS = 128
KMEANS_SAMPLES = 1 << 15
KMEANS_ITERATIONS = 20
CG_ITERATIONS = 2  # more iterations make no difference, because the codes change again afterwards
MAX_ROUNDS = 3
MIN_GAIN = 0.01  # as in AQLM


@dataclass
class AdditiveCodes:
    """The codes, scales and codebooks of a matrix."""

    codes: Tensor
    """int64 [N, G, M]"""
    scales: Tensor
    """One scale per row, [N], rounded to fp16."""
    codebooks: Tensor
    """[M, 2^B, d], rounded to fp16."""

    def decode(self, cols: int) -> Tensor:
        """The decoded matrix W_hat [N, cols]."""
        return gather_words(self.codes, self.codebooks)[:, :cols] * self.scales[:, None]


def gather_words(codes: Tensor, books: Tensor) -> Tensor:
    """Look up the words of `codes` [N, G, M] in `books` [M, 2^B, d] and add them over the M codebooks: [N, G d]."""
    total = books[0][codes[:, :, 0]]
    for m in range(1, books.shape[0]):
        total = total + books[m][codes[:, :, m]]
    return total.flatten(1)


def normalised_vectors(W: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Divide W[N, K] by its row scales and cut it into vectors of d columns; the last one is padded with zeros.

    Returns the scales [N], rounded to fp16, and the vectors [N, G, d].
    """
    scales = to_half(W.square().mean(1).sqrt())
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    padded = torch.nn.functional.pad(W / scales[:, None], (0, -W.shape[1] % dim))
    return scales, padded.reshape(len(W), -1, dim)


def fit_codebooks(vectors: Tensor, weights: Tensor, codec: AdditiveCodec, seed: int) -> Tensor:
    """Fit codebooks [M, 2^B, d], rounded to fp16, to vectors [n, d] with weights [n], by residual k-means."""
    generator = torch.Generator().manual_seed(seed)
    count, words = vectors.shape[0], 1 << codec.codebook_bits
    if count > KMEANS_SAMPLES:
        chosen = torch.randperm(count, generator=generator)[:KMEANS_SAMPLES]
        vectors, weights = vectors[chosen], weights[chosen]
    residual, books = vectors.clone(), []
    for _ in range(codec.num_codebooks):
        book, nearest = _kmeans(residual, weights, words, generator)
        residual = residual - book[nearest]
        books.append(book)
    return to_half(torch.stack(books))


def _kmeans(vectors: Tensor, weights: Tensor, words: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Run weighted k-means: (codebook [words, d], index of the word nearest to each vector [n])."""
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
        if len(empty) and count > words:  # unused words restart at the vectors of the largest error
            worst = ((vectors - book[assigned]).square().sum(1) * weights).topk(min(len(empty), count)).indices
            book[empty[: len(worst)]] = vectors[worst]
    return book, _nearest(vectors, book)


def _nearest(vectors: Tensor, book: Tensor, rows: int = 4096) -> Tensor:
    norms = 0.5 * book.square().sum(1)
    parts = [_smallest(torch.addmm(norms, part, book.T, alpha=-1), 1) for part in torch.split(vectors, rows)]
    return torch.cat(parts).squeeze(1)


def beam_codes(target: Tensor, books: Tensor, row_scales: Tensor) -> Tensor:
    """Search for the codes [N, M] whose sum of words, times the row's scale, is nearest to `target` [N, d].

    `target` and the words of `books` [M, 2^B, d] must be whitened by the same matrix.
    """
    residual = (target / row_scales[:, None])[:, None, :]  # [N, beam, d]
    distance = torch.zeros(len(target), 1)  # half the squared distance, up to a constant per row
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
    """Indices [N, width] of the smallest scores in each row, smallest first.

    Uses numpy's argmin, which is ten times as fast as torch's.
    """
    if width == 1:
        return torch.from_numpy(scores.numpy().argmin(1)).unsqueeze(1)
    remaining, smallest = scores.clone(), []
    for _ in range(width):
        smallest.append(torch.from_numpy(remaining.numpy().argmin(1)).unsqueeze(1))
        remaining.scatter_(1, smallest[-1], torch.inf)
    return torch.cat(smallest, 1)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values[n, index[n, b], :] for values [N, beam, d] and index [N, b]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))


class AdditiveFit:
    """The codes, scales and codebooks of one matrix during fitting, which updates them in turn."""

    def __init__(self, W: Tensor, codec: AdditiveCodec, work: Workspace, shared: Tensor | None, seed: int) -> None:
        self.W, self.codec, self.cols = W, codec, W.shape[1]
        self.H = work.hessian32
        self.groups, self.factor = self._feedback_order(work)
        self.fixed_books = shared is not None
        scales, vectors = normalised_vectors(W, codec.dim)
        weight = torch.nn.functional.pad(work.column_weight, (0, -self.cols % codec.dim)).reshape(-1, codec.dim).mean(1)
        if shared is None:
            flat = weight.expand(W.shape[0], -1).reshape(-1)
            shared = fit_codebooks(vectors.flatten(0, 1), flat, codec, seed)
        self.state = AdditiveCodes(
            torch.zeros(*vectors.shape[:2], codec.num_codebooks, dtype=torch.long), scales, shared
        )

    def _feedback_order(self, work: Workspace) -> tuple[list[int], Tensor]:
        """The groups sorted by falling mean of H's diagonal, and the inverse factor of H with columns in that order."""
        count = -(-self.cols // self.codec.dim)
        weight = [float(work.column_weight[self._span(g)].mean()) for g in range(count)]
        groups = sorted(range(count), key=lambda g: -weight[g])
        order = torch.cat([torch.arange(self.cols)[self._span(g)] for g in groups])
        return groups, work.inverse_factor(order)

    def _span(self, group: int) -> slice:
        return slice(group * self.codec.dim, min((group + 1) * self.codec.dim, self.cols))

    def cost(self, state: AdditiveCodes) -> float:
        """tr(E H E^T) for the given codes."""
        error = self.W - state.decode(self.cols)
        return float(((error @ self.H) * error).sum(dtype=torch.float64))

    def feed_back(self) -> None:
        """Choose the initial codes, group by group, with error feedback."""
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
        """Set every row scale to its optimum for the current codes."""
        words = gather_words(self.state.codes, self.state.codebooks)[:, : self.cols]
        product = words @ self.H
        numerator, denominator = (product * self.W).sum(1), (product * words).sum(1)
        optimum = numerator / denominator.clamp_min(1e-30)
        scales = to_half(torch.where(denominator > 0, optimum, self.state.scales))
        self.state.scales = torch.where(scales == 0, self.state.scales, scales)

    def refit_codebooks(self) -> None:
        """Improve the words by conjugate gradients; shared codebooks stay as they are."""
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
        """Search again for the codes of each group, with all other groups fixed; keep the old codes unless better.

        With e the error, slope = e H. After a change of codes, the slope is updated at once for the groups in the same
        block of columns, and for the other blocks when the block is finished.
        """
        error = self.W - self.state.decode(self.cols)
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
        """Search again for the codes of one group; returns the change of the group's error [N, width]."""
        span, state = self._span(group), self.state
        width = span.stop - span.start
        root, failed = torch.linalg.cholesky_ex(self.H[span, span])
        if int(failed):  # singular in float32: use the diagonal; worse codes are rejected below
            root = torch.diag(self.H.diagonal()[span].sqrt())
        old, old_codes = self._group_values(group)[:, :width], state.codes[:, group].clone()
        optimum = old + torch.cholesky_solve(slope.T, root).T  # the minimiser with everything else fixed
        codes = beam_codes(optimum @ root, state.codebooks[:, :, :width] @ root, state.scales)
        state.codes[:, group] = codes
        new = self._group_values(group)[:, :width]
        worse = ((optimum - new) @ root).square().sum(1) >= ((optimum - old) @ root).square().sum(1)
        state.codes[:, group] = torch.where(worse[:, None], old_codes, codes)
        return torch.where(worse[:, None], torch.zeros_like(old), old - new)

    def _group_values(self, group: int) -> Tensor:
        words = sum(self.state.codebooks[m][self.state.codes[:, group, m]] for m in range(self.codec.num_codebooks))
        assert isinstance(words, Tensor)
        return words * self.state.scales[:, None]


def encode_additive(W: Tensor, codec: AdditiveCodec, context: EncodingContext) -> CodedMatrix:
    """Encode W[N, K] float32 in additive codes; see `encoder` for the interface."""
    fitted = fit_additive_codes(W, codec, context.work, context.shared, context.seed)
    values = {"codes": fitted.codes, "scales": fitted.scales}
    if not codec.shared:
        values["codebooks"] = fitted.codebooks
    return CodedMatrix(values, fitted.decode(W.shape[1]))


def fit_additive_codes(
    W: Tensor, codec: AdditiveCodec, work: Workspace, shared: Tensor | None, seed: int, rounds: int = MAX_ROUNDS
) -> AdditiveCodes:
    """Fit codes, scales and codebooks to W[N, K] float32; `shared` codebooks [M, 2^B, d], if given, stay unchanged."""
    fit = AdditiveFit(W, codec, work, shared, seed)
    fit.feed_back()
    fit.refit_scales()
    best, best_cost = _copy(fit.state), fit.cost(fit.state)
    for _ in range(rounds):
        fit.refit_codebooks()
        fit.search_codes()
        fit.refit_scales()
        cost = fit.cost(fit.state)
        gain = 1 - cost / best_cost if best_cost > 0 else 0.0
        if cost < best_cost:
            best, best_cost = _copy(fit.state), cost
        if gain < MIN_GAIN:
            break
    zero_rows = to_half(W.square().mean(1).sqrt()) == 0
    return AdditiveCodes(best.codes, best.scales.masked_fill(zero_rows, 0.0), best.codebooks)


def _copy(state: AdditiveCodes) -> AdditiveCodes:
    return AdditiveCodes(state.codes.clone(), state.scales.clone(), state.codebooks.clone())
