"""The shared codebooks of a search space: one set for each family of matrices and each format with shared codebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from reallm.codecs.shared_codebooks import fit_shared_codebooks
from reallm.kernels.codes.stored_fields import fields_sha256
from reallm.kernels.formats.formats import Format
from reallm.models.loaded import LoadedModel
from reallm.planner.tables.measured_table import SharedRecord
from reallm.planner.tables.tensor_layout import shared_key
from reallm.system.progress import progress_bar
from reallm.system.threads import one_thread

from .encoding import Job, codebook_values


def load_or_fit_codebooks(
    loaded: LoadedModel, formats: Mapping[str, Sequence[Format]], job: Job
) -> tuple[dict[str, Tensor], list[SharedRecord]]:
    """Read the shared codebooks from the cache, or fit them and store them there.

    `formats` maps the name of every matrix to its candidate formats.
    Returns the codebook values by key (see `planner.tables.tensor_layout.shared_key`) and their records for the table.
    """
    codebooks, records = {}, []
    shared_formats = {
        key: fmt
        for matrix in loaded.matrices
        for fmt in formats[matrix.name]
        if (key := shared_key(fmt, matrix.family)) is not None
    }
    bar = progress_bar(
        sorted(shared_formats.items()), desc="fit shared codebooks", unit=" codebooks", disable=not shared_formats
    )
    for key, fmt in bar:
        fields = job.cache.fields(job.codebook_key(key))
        if fields is None:
            members = [m for m in loaded.matrices if formats[m.name] and shared_key(fmt, m.family) == key]
            with one_thread():
                fields = fit_shared_codebooks(fmt, ((loaded.weight(m), job.metric(m)) for m in members), job.seed)
            job.cache.put_fields(job.codebook_key(key), fields)
        codebooks[key] = codebook_values(fmt, fields)
        nbytes = sum(value.nbytes for value in fields.values())
        records.append(SharedRecord(key=key, nbytes=nbytes, sha256=fields_sha256(fields)))
    return codebooks, records
