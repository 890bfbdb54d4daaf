"""Resuming: the checkpoint to go on from, and loading it in any layout."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffmoe.checkpoints.power_averages import length_kind, lengths_of
from diffmoe.checkpoints.reader import (
    BUFFERS,
    FIRST_MOMENT,
    MASTER,
    SECOND_MOMENT,
    Checkpoint,
    Tensors,
    complete_folders,
    ema_kind,
)
from diffmoe.checkpoints.tensor_file import Corrupt
from diffmoe.errors import UserError
from diffmoe.models.logical import load_buffers
from diffmoe.parallel.collectives import AgreedError, agreed, first_complaint, gather_objects
from diffmoe.parallel.groups import ParallelGroups
from diffmoe.remote import AnyPath
from diffmoe.training.checkpoint_check import check_tensors
from diffmoe.training.ema import Ema
from diffmoe.training.engine import Engine
from diffmoe.training.state import Place, filled, held

Say = Callable[[str], None]


def check_share(checkpoint: Checkpoint, groups: ParallelGroups) -> None:
    """Raises Corrupt where this rank's share of a checkpoint is not intact."""
    if groups.rank == 0 and (wrong := next(check_tensors(checkpoint), None)):
        raise Corrupt(wrong)
    for name in list(checkpoint.manifest.files)[groups.rank :: groups.world.size]:
        checkpoint.check_file(name)


def newest_usable(
    folder: AnyPath,
    groups: ParallelGroups,
    say: Say,
    check: Callable[[Checkpoint, ParallelGroups], None] = check_share,
) -> Checkpoint | None:
    """The newest complete checkpoint that is intact, the same on every rank; None where there is
    none at all.

    Every byte is checked, the files divided among the ranks (``check``: raises Corrupt).  ``say``
    hears of each one that is skipped.  Raises AgreedError when all are
    corrupt, or when the newest is intact but cannot be read (another format).
    """
    with agreed(groups.world):
        names = [path.name for path in complete_folders(folder)]
    # Rank 0's: others may see what was there a moment ago.
    names = gather_objects(names, groups.world)[0]
    complaints: list[str] = []
    for name in reversed(names):
        if complaints:
            say(f"{complaints[-1]}; falling back to {name}")
        wrong = None
        with agreed(groups.world):
            try:
                checkpoint = Checkpoint(folder / name)
                check(checkpoint, groups)
            except Corrupt as error:
                wrong = str(error)
        found = first_complaint(gather_objects(wrong, groups.world), groups.world)
        if found is None:
            return checkpoint
        complaints.append(f"{name} is corrupt ({found})")
    if complaints:
        raise AgreedError(f"no checkpoint in {folder} is usable: {'; '.join(complaints)}")
    return None


def restore(
    checkpoint: Checkpoint, engine: Engine, ema: Ema, groups: ParallelGroups, say: Say
) -> int:
    """Loads a checkpoint into an engine of any layout; every rank reads what it holds.  Returns the
    number of steps done.

    An average with a decay that the checkpoint has not starts from its weights, which ``say`` hears
    of.  Raises AgreedError, also for a length that it has not, which has to begin with the run.
    """
    with agreed(groups.world):
        places = held(engine)
        for kind, shards in kinds_of(engine, ema).items():
            stored = checkpoint.tensors(kind)
            if not stored and kind in (FIRST_MOMENT, SECOND_MOMENT) and checkpoint.step == 0:
                for shard in shards:  # weights from elsewhere, see writer.save_start
                    shard.detach().zero_()
                continue
            if not stored and kind not in (MASTER, FIRST_MOMENT, SECOND_MOMENT):
                if checkpoint.updates and (lengths := lengths_of([kind])):
                    raise UserError(
                        f"train.ema_lengths ({lengths[0]:g}) can only begin with the run: "
                        f"{checkpoint.path} was saved without it"
                    )
                say(f"{checkpoint.path} has no {kind}; it starts from the weights")
                stored = checkpoint.tensors(MASTER)
            _load(filled(places, shards), shards, stored, f"{kind} of {checkpoint.path}")
        load_buffers(engine.model, checkpoint.tensors(BUFFERS))
    engine.publish()
    engine.set_adam_step(checkpoint.updates)
    return checkpoint.step


def _load(places: list[Place], shards: list[Tensor], stored: Tensors, source: str) -> None:
    missing = [place.piece.name for place in places if place.piece.name not in stored]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing[:3])} ({len(missing)} missing)")
    for place in places:
        piece, shape = place.piece, stored.shape(place.piece.name)
        if shape != piece.shape:
            raise UserError(
                f"{source} has {piece.name} with shape {list(shape)} instead of {list(piece.shape)}"
            )
        stored.read_into(piece.name, piece.start, place.of(shards))


def kinds_of(engine: Engine, ema: Ema) -> dict[str, list[Tensor]]:
    """Shards by kind of what training resumes from; the masters first."""
    return {
        **{kind: engine.shards(kind) for kind in (MASTER, FIRST_MOMENT, SECOND_MOMENT)},
        **{ema_kind(decay): shards for decay, shards in ema.by_decay.items()},
        **averages_of(ema),
    }


def averages_of(ema: Ema) -> dict[str, list[Tensor]]:
    """Those of the averages by length alone."""
    return {length_kind(length): shards for length, shards in ema.by_length.items()}
