"""The measured tables of a work folder, and how a plan finds the one that it was made from.

`table.json` is the newest table. When a run of `measure` replaces it by a different one (other windows, another text or
seed, or more formats), the replaced table is kept in `tables/`, under the first 16 digits of its digest. A plan records
the digest of its table, so it stays usable.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .measured_table import TABLE_FILE, MeasuredTable
from .plan import Plan
from .records import RecordError, read_record, write_record
from .units import PlanError

EARLIER_FOLDER = "tables"
"""Name of the folder inside a work folder that keeps the tables that newer ones replaced."""
TEXT_FILES = (".txt", ".jsonl", ".parquet")
"""Ends of the names of text files."""
DIGEST_DIGITS = 16
"""Number of hexadecimal digits of a digest in a file name of EARLIER_FOLDER."""


def table_path(work: str | Path) -> Path:
    """The file of the table that `work` names: the newest one of a work folder, or a table's own file."""
    path = Path(work).expanduser()
    return path if path.is_file() else path / TABLE_FILE


def folder_of(work: str | Path) -> Path:
    """The work folder that `work` names, which may also be the file of a table inside it."""
    path = Path(work)
    if not path.is_file():
        return path
    return path.parent.parent if path.parent.name == EARLIER_FOLDER else path.parent


def read_table(work: str | Path) -> MeasuredTable:
    """The newest measured table of the work folder `work`, or the table in the file `work`.

    Raises RecordError when there is none, or an invalid one.
    """
    return read_record(table_path(work), MeasuredTable, "measure")


def tables_in(work: Path) -> Iterator[tuple[Path, MeasuredTable]]:
    """(file, table) of every measured table in the work folder `work`, the newest first; unreadable ones are left out.

    A table that an earlier run measured and a later one measured again appears once.
    """
    earlier = sorted((work / EARLIER_FOLDER).glob("*.json"), key=lambda path: (-path.stat().st_mtime_ns, path.name))
    digests = set()
    for path in (work / TABLE_FILE, *earlier):
        try:
            table = read_record(path, MeasuredTable, "measure")
        except RecordError:
            continue
        if (digest := table.digest()) not in digests:
            digests.add(digest)
            yield path, table


def keep_earlier(work: Path, newer: MeasuredTable) -> tuple[Path, MeasuredTable | None] | None:
    """Keep the table that `newer` is about to replace: (its new file, the table), or None where nothing would be lost.

    A file that cannot be read as a table (damaged, or of another version) is kept too; its table is then None.
    """
    newest, folder = work / TABLE_FILE, work / EARLIER_FOLDER
    if not newest.exists():
        return None
    try:
        replaced = read_record(newest, MeasuredTable, "measure")
    except RecordError:
        folder.mkdir(exist_ok=True)
        path = folder / f"unreadable-{newest.stat().st_mtime_ns}.json"
        newest.rename(path)
        return path, None
    digest = replaced.digest()
    if digest == newer.digest():
        return None
    path = folder / f"{digest[:DIGEST_DIGITS]}.json"
    write_record(path, replaced)
    return path, replaced


def described(table: MeasuredTable, *, folders: bool = True) -> str:
    """The settings that a table was measured with, for people to read; of a file only the name unless `folders`."""
    settings, text = table.settings, table.text
    prefix = str(settings.get("prefix") or "")
    if not folders:
        text = Path(text).name if text.endswith(TEXT_FILES) else text
        prefix = Path(prefix).name
    parts = [f"{settings.get('nsamples')} windows of {settings.get('seqlen')} tokens of {text}"]
    parts.append(f"seed {settings.get('seed')}")
    parts += ["chat template"] if settings.get("chat_template") else []
    parts += [f"inputs of {prefix}"] if prefix else []
    return ", ".join(parts)


def find_table(plan: Plan, plan_path: str | Path | None = None, work: str | Path | None = None) -> Path:
    """The file of the table that `plan` was made from; where it is gone, the newest table of the plan's work folder.

    `plan_path` is where the plan was read from, `work` the work folder if it has moved. Raises RecordError, which names
    the option --work, when there is no table.
    """
    return _find(plan, plan_path, work)[0]


def table_of(plan: Plan, plan_path: str | Path | None = None, work: str | Path | None = None) -> MeasuredTable:
    """The table that `plan` was made from; parameters as for `find_table`.

    Raises RecordError when there is no table or a damaged one, and PlanError when the plan was made from none of the
    tables that are there.
    """
    path, table = _find(plan, plan_path, work)
    if table is None:
        read_table(path)  # says what is wrong with a damaged one
        raise PlanError(
            f"the plan was made from another measured table than those in {folder_of(path)}; name the folder with its "
            "own table by --work, or plan again"
        )
    return table


def _find(plan: Plan, plan_path: str | Path | None, work: str | Path | None) -> tuple[Path, MeasuredTable | None]:
    """As `find_table`, with the table if it is the one that the plan was made from."""
    places = [folder_of(work)] if work else recorded_places(plan.work, plan_path)
    for place in places:
        for path in (place / EARLIER_FOLDER / f"{plan.table_sha256[:DIGEST_DIGITS]}.json", place / TABLE_FILE):
            if (table := _readable(path)) is not None and table.digest() == plan.table_sha256:
                return path, table
    for place in places:
        if (place / TABLE_FILE).exists():
            return place / TABLE_FILE, None
    if work:
        raise RecordError(f"{places[0] / TABLE_FILE} does not exist; `reallm measure` makes it")
    lacking = f"holds no {TABLE_FILE}" if places[0].exists() else "does not exist here or beside the plan"
    raise RecordError(
        f"the plan was made from the work folder {places[0]}, which {lacking}; if it has moved, name it with --work, "
        "otherwise measure and plan again"
    )


def recorded_places(recorded: str, plan_path: str | Path | None) -> list[Path]:
    """The paths that a path recorded in a plan may mean, the most likely first.

    A relative path was relative to the folder in which the command ran, so it is also tried from the folder of the plan
    and from every folder above.

    >>> [str(path) for path in recorded_places("work", "/home/me/job/plan.json")[:3]]
    ['work', '/home/me/job/work', '/home/me/work']
    """
    path = Path(recorded).expanduser()
    if path.is_absolute() or plan_path is None:
        return [path]
    return [path, *(folder / path for folder in Path(plan_path).absolute().parents)]


def _readable(path: Path) -> MeasuredTable | None:
    """The table in `path`; None if there is none that can be read."""
    try:
        return read_record(path, MeasuredTable, "measure")
    except RecordError:
        return None
