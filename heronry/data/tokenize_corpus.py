"""Texts to token files: worker processes encode, one process writes, and a killed run can be resumed.

- the files are the same for any number of workers, here or on a cluster, and whether or not the run was interrupted
- only a few pieces of text per worker are in memory, however large the sources are
- PREFIX.progress.json is written every second; what was written after it is cut off and encoded again
- a run that its input has ended begins anew once the input or the options are corrected
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, count
from ..files import atomic_write, hash_file, only_process
from ..text.template_choice import template_text
from ..text.tokenizers import plain_name
from .cluster import encode_on_cluster
from .encoding import Encoder, encode_chunks
from .rows import check_options
from .sources import START, Position, Rows, TemporaryError, find_sources, read_records
from .token_file import TokenWriter, Written, discard_parts, part_file, prefix_file, publish_parts, strip_suffix

SMALL = 16 << 20  # bytes; smaller sources are encoded before other processes have started
MAX_WORKERS = 256  # all of them start at once
SAVE_SECONDS = 1.0  # between two writes of PREFIX.progress.json
NOTHING = Written()
MOST_NAMED = 5  # bad rows whose places are kept
MOST_REASONS = 20
ENDINGS = (".bin", ".idx", ".mask", ".json", ".tokenizer.json")  # of the files that are written, besides those of a run


@dataclass(frozen=True)
class Skipped:
    """The bad rows of a run that skips them.

    Attributes:
        rows: how many there were.
        reasons: how many for each reason, without the details that differ from row to row.
        first: the first ones, each with its place and the whole reason.
    """

    rows: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    first: tuple[str, ...] = ()

    def add(self, location: str, problem: str) -> Skipped:
        reason = re.sub(r"(?<![\w-])\d+", "N", re.sub(r" \(.*\)", "", problem))
        if reason not in self.reasons and len(self.reasons) >= MOST_REASONS:
            reason = "other reasons"
        reasons = {**self.reasons, reason: self.reasons.get(reason, 0) + 1}
        first = (*self.first, f"{location}: {problem}") if self.rows < MOST_NAMED else self.first
        return Skipped(self.rows + 1, reasons, first)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        position: in the sources, where reading resumes.
        documents: number of documents encoded so far, including held-out ones.
        written: how much of PREFIX has been written.
        held_out: how much of PREFIX-eval has been written.
        skipped: the bad rows so far.
        sealed: everything is written, and only the .part files have to be renamed.
    """

    position: Position = START
    documents: int = 0
    written: Written = NOTHING
    held_out: Written = NOTHING
    skipped: Skipped = Skipped()
    sealed: bool = False

    @property
    def tokens(self) -> int:
        return self.written.tokens + self.held_out.tokens


OnProgress = Callable[[int, Progress], None]  # bytes of the sources read so far, and how far the run is


def tokenize_corpus(
    sources: list[str],
    out: str | Path,
    tokenizer: str | Path,
    *,
    key: str | None = None,
    shape: str | None = None,
    skip_bad: bool = False,
    template: str | None = None,
    holdout: float = 0.0,
    workers: int | None = None,
    cluster: str | None = None,
    restart: bool = False,
    on_progress: OnProgress = lambda n_bytes, progress: None,
) -> Progress:
    """Encodes `sources` into the token file `out`, or resumes doing so.

    Args:
        sources: files, folders, globs and hf:// names, see sources.py.
        out: PREFIX of the token file, with or without .bin or .idx.
        tokenizer: "bytes", "world", or the path of a tokenizer.json, which is copied to PREFIX.tokenizer.json.
        key: the field of a row that holds its text or messages; None: told by the names of the fields, see rows.py.
        shape: which one is meant where a row has the fields of several, a name in rows.SHAPES.
        skip_bad: leave out rows that cannot be read, which PREFIX.json counts by reason; by default they are errors.
        template: the chat template for conversations, which are refused without one: the name of one, of a .jinja file,
            or a turn, see text/template_choice.py. It is recorded for models that are trained on the file.
        holdout: this fraction of the documents, every k-th, goes to PREFIX-eval instead.
        workers: number of processes that encode; None: one here, or on a cluster one a core.
        cluster: the address of a Ray cluster that encodes, see cluster.py; None: this machine does.
        restart: start over even if there are files of an earlier run, which stay until the new ones are complete.
        on_progress: called once it is known where to start, and then repeatedly.

    Returns:
        The final progress, with the numbers of documents and tokens.

    Raises:
        InputError: unreadable sources, an unknown template, files that already exist or cannot be written, an
            unfinished run with other options, or another process that writes there.
    """
    prefix = strip_suffix(out)
    try:
        rows = Rows(key, shape, skip_bad)
        busy = f"{prefix}: another process is writing it; wait for its end, or choose another name"
        with only_process(part_file(prefix, ".lock"), busy):
            return _tokenize(
                sources, prefix, tokenizer, rows, template, holdout, workers, cluster, restart, on_progress
            )
    except OSError as error:
        raise InputError(f"{prefix}: cannot be written ({error.strerror or error})") from error


def _tokenize(
    sources: list[str],
    prefix: Path,
    tokenizer: str | Path,
    rows: Rows,
    template: str | None,
    holdout: float,
    workers: int | None,
    cluster: str | None,
    restart: bool,
    on_progress: OnProgress,
) -> Progress:
    """See `tokenize_corpus`; OSError if something cannot be written."""
    if holdout and not 0 < holdout <= 0.5:
        raise InputError(f"the fraction to hold out must be above 0 and at most 0.5, got {holdout}")
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise InputError(f"workers must be from 1 to {MAX_WORKERS}, got {workers}")
    check_options(rows.key, rows.shape)
    source_list = find_sources(sources)
    tokenizer = plain_name(tokenizer)
    tokenizer_file = None if tokenizer in ("bytes", "world") else Path(tokenizer)
    if template is not None:
        template = template_text(template)
    encoder = Encoder(str(tokenizer), template, rows.skip_bad)
    options = {
        "sources": [list(asdict(source).values()) for source in source_list],
        "tokenizer": tokenizer if tokenizer_file is None else hash_file(tokenizer_file),
        **asdict(rows),
        "template": template,
        "holdout": holdout,
    }
    eval_prefix = prefix_file(prefix, "-eval")
    prefixes = [prefix, eval_prefix] if holdout else [prefix]
    progress_file = prefix_file(prefix, ".progress.json")
    targets = [prefix_file(path, ending) for path in prefixes for ending in ENDINGS]
    for path in (*targets, progress_file):
        if path.exists() and any(path.samefile(s.name) for s in source_list if Path(s.name).exists()):
            raise InputError(f"{path}: is one of the texts, and would be replaced; choose another name with --out")
    targets = [
        path for path in targets if tokenizer_file is None or not path.exists() or not path.samefile(tokenizer_file)
    ]
    progress = _load_progress(progress_file, options, prefixes, [] if restart else targets, restart)
    if not progress.sealed:
        metadata: dict[str, Any] = {
            "tokenizer": tokenizer if tokenizer_file is None else f"{prefix.name}.tokenizer.json",
            "vocab_size": encoder.vocab_size,
            "end_of_text": encoder.end_of_text,
            "template": template,
            "sources": [source.name for source in source_list],
        }
        if sum(SMALL if source.size is None else source.size for source in source_list) < SMALL:
            workers = 1
        bytes_before = [sum(source.size or 0 for source in source_list[:n]) for n in range(len(source_list) + 1)]
        eval_every = round(1 / holdout) if holdout else 0
        train_writer = TokenWriter(prefix, encoder.dtype, progress.written)
        eval_writer = TokenWriter(eval_prefix, encoder.dtype, progress.held_out) if eval_every else None

        def save(progress: Progress, refused: bool = False) -> None:
            train_writer.flush()
            if eval_writer is not None:
                eval_writer.flush()
            _save_progress(progress_file, options, progress, refused)

        def report(progress: Progress) -> None:
            on_progress(bytes_before[progress.position.source] + progress.position.byte, progress)

        last_saved = time.monotonic()
        _save_progress(progress_file, options, progress)
        report(progress)
        try:
            if cluster is None:
                chunks = encode_chunks(read_records(source_list, rows, progress.position), encoder, workers or 1)
            else:
                chunks = encode_on_cluster(source_list, rows, progress.position, encoder, cluster, workers)
            for chunk, encoded in chunks:
                documents, skipped = progress.documents, progress.skipped
                for ids, mask, problem, record in zip(*encoded.split(), encoded.problems, chunk, strict=True):
                    if problem is not None:
                        skipped = skipped.add(record.location, problem)
                        continue
                    held_out = eval_writer is not None and documents % eval_every == eval_every - 1
                    writer = eval_writer if eval_writer is not None and held_out else train_writer
                    writer.write(ids, mask, record.ends_document)
                    documents += record.ends_document
                progress = Progress(
                    chunk[-1].position,
                    documents,
                    train_writer.written,
                    eval_writer.written if eval_writer is not None else NOTHING,
                    skipped,
                )
                report(progress)
                if time.monotonic() - last_saved > SAVE_SECONDS:
                    save(progress)
                    last_saved = time.monotonic()
            on_progress(bytes_before[-1], progress)
            sizes = zip(prefixes, (progress.written, progress.held_out), strict=False)
            empty = [path for path, written in sizes if not written.tokens]
            if not empty:
                if rows.skip_bad:
                    metadata["skipped"] = asdict(progress.skipped)
                for writer in filter(None, (train_writer, eval_writer)):
                    writer.seal(metadata)
                progress = replace(progress, sealed=True)
                _save_progress(progress_file, options, progress)
        except OSError:  # the files are as the last note says, or longer
            raise
        except BaseException as error:  # Ctrl-C, or a malformed line
            with suppress(OSError):
                save(progress, isinstance(error, InputError) and not isinstance(error, TemporaryError))
            raise
        finally:
            for writer in filter(None, (train_writer, eval_writer)):
                writer.close()
        if empty:
            for path in prefixes:
                discard_parts(path)
            progress_file.unlink()
            found = count(progress.documents, "document")
            if progress.skipped.rows:
                found += f" besides {count(progress.skipped.rows, 'bad row')}, the first {progress.skipped.first[0]}"
            raise InputError(f"{empty[0]}: would be empty, as the sources have {found}")
    if tokenizer_file is not None:
        with atomic_write(prefix_file(prefix, ".tokenizer.json")) as copy:
            shutil.copyfile(tokenizer_file, copy)
    for path, written in zip(prefixes, (progress.written, progress.held_out), strict=False):
        publish_parts(path, written.masked)
    progress_file.unlink()
    return progress


def _load_progress(
    file: Path, options: dict[str, Any], prefixes: list[Path], targets: list[Path], restart: bool
) -> Progress:
    """Where to start: the progress in `file`, or the beginning, for which old .part files are deleted. A run that its
    input has ended does not stand in the way of one with other options or sources; of `targets` none may exist."""
    if restart:
        file.unlink(missing_ok=True)
    elif file.is_file():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            saved_options, fields = saved["options"], saved["progress"]
            source, record, byte, offset = fields["position"]
            progress = Progress(
                Position(source, record, byte, offset),
                fields["documents"],
                Written(**fields["written"]),
                Written(**fields["held_out"]),
                Skipped(**{**fields["skipped"], "first": tuple(fields["skipped"]["first"])}),
                fields["sealed"],
            )
            refused = bool(saved["refused"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: damaged; start over with --restart") from error
        changed = [name for name in options if saved_options.get(name) != options[name]]
        if not changed:
            return progress
        if not refused:
            raise InputError(
                f"{file}: there is an unfinished run with other {' and '.join(changed)}; start over with --restart"
            )
        file.unlink()
    for path in targets:
        if path.exists():
            raise InputError(f"{path}: already exists; replace it with --restart")
    for prefix in prefixes:
        discard_parts(prefix)
    return Progress()


def _save_progress(file: Path, options: dict[str, Any], progress: Progress, refused: bool = False) -> None:
    """refused: the run has ended because of its input."""
    content = {"options": options, "progress": asdict(progress), "refused": refused}
    with atomic_write(file) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
