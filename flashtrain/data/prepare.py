"""Text, JSON lines and Parquet to a set of tokens, by many processes, so that a kill costs little.

    inputs -> shards -> a durable part each, by worker processes -> one .bin and one .idx

Shards are a pure function of the inputs, and parts are joined in their order, so neither the number of
workers nor a kill changes a byte of the result.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from flashtrain.data import durable, inputs, parts
from flashtrain.data.indexed import token_type, write_index
from flashtrain.data.parts import Damaged, Part
from flashtrain.data.pool import Work, each
from flashtrain.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from flashtrain.errors import UserError

TOKENS, SUMMARY, DAMAGED = "tokens", "prepared.json", "damaged.log"
_PARTS, _LOCK = "parts", ".lock"


@dataclass(frozen=True)
class Prepared:
    """What a prepared set holds. ``damaged`` records were skipped; damaged.log beside the set names them.

    ``tokenizer`` is "bytes", or the name of the folder's own tokenizer.json. ``plan`` is a digest of the
    inputs and of all settings that the set depends on.
    """

    documents: int
    tokens: int
    empty: int
    damaged: int
    tokenizer: str
    plan: str


def prepare(
    sources: Sequence[str],
    out: Path,
    tokenizer: str,
    *,
    field: str = "text",
    boundary: str | None = None,
    damaged: Damaged = "refuse",
    workers: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = inputs.SHARD_BYTES,
) -> Prepared:
    """Tokenize ``sources`` into tokens.bin and tokens.idx of the folder ``out``, with its tokenizer.

    Each document ends with the tokenizer's boundary; documents keep the order of their records in the
    inputs. ``advance`` is told the bytes of input done and in all. What an earlier, interrupted call did
    for the same inputs and settings is not done again; a set that is complete is left alone.

    Raises UserError for inputs, tokenizers and damaged records that are to be refused, for a folder that
    holds another set or that another process fills, and for a worker that was killed; OSError if ``out``
    cannot be written.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    loaded = load_tokenizer(tokenizer, boundary)
    settings = json.dumps([1, loaded.identity, field])
    plan = inputs.shards(inputs.find(sources), shard_bytes)
    if not plan:
        raise UserError(f"{', '.join(sources)}: all files are empty: give some that hold text")
    keys = [shard.key(settings) for shard in plan]
    digest = hashlib.sha256("".join(keys).encode()).hexdigest()
    with _locked(out):
        if (done := read_summary(out)) is not None:
            if done.plan != digest:
                raise UserError(f"{out} holds a set of other inputs or settings: choose another folder")
            if damaged == "refuse" and done.damaged:
                first = (out / DAMAGED).read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
                raise UserError(parts.refusal(first))
            return done
        folder = out / _PARTS
        folder.mkdir(exist_ok=True)
        _remove_stale(folder, set(keys))
        work = Work(folder, tokenizer, boundary, field, damaged)
        each(work, dict(zip(keys, plan, strict=True)), workers, advance)
        whole = [_load(folder, key) for key in keys]
        return _join(out, keys, whole, loaded, damaged, digest)


def read_summary(folder: Path) -> Prepared | None:
    """What the prepared set in ``folder`` says of itself, or None if none is complete there.

    Raises UserError for a damaged prepared.json.
    """
    path = folder / SUMMARY
    try:
        return Prepared(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged: remove {folder} and prepare the set anew") from None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing {out}: wait for it or choose another") from None
        yield


def _remove_stale(folder: Path, keys: set[str]) -> None:
    """Remove parts of other inputs and settings, and what a killed worker left."""
    for path in folder.iterdir():
        key = path.name.split(".")[0]
        if key not in keys or path.suffix == ".fresh":
            path.unlink()


def _load(folder: Path, key: str) -> Part:
    part = parts.load(folder, key)
    if part is None:
        raise UserError(f"{folder / key}.json vanished during the preparation: give the same command again")
    return part


def _join(
    out: Path, keys: list[str], whole: list[Part], tokenizer: Tokenizer, damaged: Damaged, digest: str
) -> Prepared:
    """Join the parts in order; the summary comes last, and only then the parts go."""
    folder, names = out / _PARTS, _damage(whole)
    if names and damaged == "refuse":
        raise UserError(parts.refusal(names[0]))
    summary = Prepared(
        documents=sum(part.documents for part in whole),
        tokens=sum(part.tokens for part in whole),
        empty=sum(part.empty for part in whole),
        damaged=len(names),
        tokenizer=BYTES if tokenizer.identity == BYTES else "tokenizer.json",
        plan=digest,
    )
    if summary.documents == 0:
        why = f", the first: {names[0]}" if names else ""
        raise UserError(f"no document is left: {summary.empty} are empty and {len(names)} damaged{why}")
    data, index = (out / f"{TOKENS}{suffix}.fresh" for suffix in (".bin", ".idx"))
    with data.open("wb") as stream:
        for key in keys:
            with (folder / f"{key}.bin").open("rb") as part:
                shutil.copyfileobj(part, stream, 16 << 20)
        durable.sync(stream)
    write_index(index, token_type(tokenizer.vocab_size), [folder / f"{key}.lengths" for key in keys])
    tokenizer.save(out)
    if names:
        durable.write(out / DAMAGED, "".join(f"{name}\n" for name in names))
    durable.move(data, out / f"{TOKENS}.bin")
    durable.move(index, out / f"{TOKENS}.idx")
    durable.write(out / SUMMARY, json.dumps(asdict(summary), indent=2) + "\n")
    shutil.rmtree(folder)
    return summary


def _damage(whole: list[Part]) -> list[str]:
    """Every damaged record as "file:line: reason"; lines of a file go on from stretch to stretch."""
    names, path, before = [], None, 0
    for stretch in (stretch for part in whole for stretch in part.stretches):
        if stretch.path != path:
            path, before = stretch.path, 0
        names += [f"{path}:{before + line}: {reason}" for line, reason in stretch.damaged]
        before += stretch.lines
    return names
