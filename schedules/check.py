"""The checker, and the sends and receives that follow from a program.

Three ways to run the same program, from the laziest executor to the one that needs a plan:

* ``blocking``: a rank sends each result when it has made it and waits until it is taken; it asks for what a cell needs
  right before that cell. GPipe runs so; 1F1B does not, as neighbours send to each other at the same time.
* ``batched``: the sends after a cell and the receives before the next one are one group, waited for as a whole
  (``batch_isend_irecv``). 1F1B and ZB-1P run so; interleaved, V-shaped and bidirectional programs do not, as a rank
  then waits for a send that its peer has not yet reason to receive (DualPipe's own code delays some sends by hand).
* ``posted``: a receive stands where its peer sends, not where its result is needed. ``communicate`` places them so, by
  projecting one order of all cells and transfers on every rank. The first of that order not yet done is the next on all
  ranks it concerns, so it can always run: no program that runs at all can deadlock, whether sends block or not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dsv3c.schedules.graph import failure, graph, held, start_times
from dsv3c.schedules.program import Cell, Overlap, Program

Sends = Literal["posted", "batched", "blocking"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """``2SEND_F0``: stage 2's output of micro-batch 0 leaves for rank ``peer``; ``3RECV_F0`` is its other end.

    F carries activations to the next stage, B gradients to the one before.
    """

    stage: int
    word: Literal["SEND", "RECV"]
    kind: Literal["F", "B"]
    microbatch: int
    direction: int
    peer: int

    def __str__(self) -> str:
        return f"{self.stage}{self.word}_{self.kind}{self.microbatch}{'r' if self.direction else ''}"


Step = Cell | Transfer
Message = tuple[Literal["F", "B"], int, int, int]  # the stage that needs it, its micro-batch, its direction


def check(program: Program, *, sends: Sends = "posted", activations: int | None = None) -> None:
    """Prove that a program runs: complete, in an order without a circle, within the memory, with such sends.

    Raises:
        ScheduleError: with the rank x step grid around the first cell that is wrong: an action twice, missing or on a
            second rank; ranks that wait for each other; more than ``activations`` micro-batches held by a rank.
    """
    g = graph(program)
    start_times(g.rows, [1] * len(g.cells), g.needs, program)
    for rank, row in enumerate(program):
        for step, count in enumerate(held(row, [1] * g.num_stages)):
            if activations is not None and count > activations:
                message = f"expected at most {activations} micro-batches' activations on a rank, found {count}"
                raise failure(program, rank, step, f"{message}; try a backward before this cell")
    if sends != "posted":
        check_communication(communicate(program, late=True), batched=sends == "batched")


def communicate(program: Program, *, late: bool = False) -> tuple[tuple[Step, ...], ...]:
    """The program with its sends and receives; a send follows its result at once.

    Receives stand where their peer sends, as if F, I and W took equally long; with ``late`` right before their use.

    Raises:
        ScheduleError: a program that is incomplete or waits for ever.
    """
    g = graph(program)
    ticks = [3 if isinstance(cell, Overlap) else 2 if cell.kind == "B" else 1 for cell in g.cells]
    starts, _ = start_times(g.rows, ticks, g.needs, program)

    # (time, turn, number): at one time a rank first transfers, in the order of numbers, then computes.
    placed: list[list[tuple[int, int, int, Step]]] = [[(starts[i], 1, 0, g.cells[i]) for i in row] for row in g.rows]
    for number, (source, target, a) in enumerate(g.messages()):
        made, used = starts[source] + ticks[source], starts[target]
        kind: Literal["F", "B"] = "F" if a.kind == "F" else "B"
        sender, receiver = g.rank[source], g.rank[target]
        from_stage = a.stage - 1 if kind == "F" else a.stage + 1
        send = Transfer(from_stage, "SEND", kind, a.microbatch, a.direction, receiver)
        receive = Transfer(a.stage, "RECV", kind, a.microbatch, a.direction, sender)
        placed[sender].append((made, 0, number, send))
        placed[receiver].append((used if late else made, 0, number, receive))
    return tuple(tuple(step for *_, step in sorted(row)) for row in placed)


def check_communication(rows: Sequence[Sequence[Step]], *, batched: bool) -> None:
    """Prove that ranks which do these steps in order, and wait in each send until it is received, come to an end.

    ``batched``: the sends and receives between two cells are posted together and waited for together.

    Raises:
        ScheduleError: a program that does not run; a send or receive missing, doubled or for nothing; a deadlock.
    """
    program = tuple(tuple(step for step in row if not isinstance(step, Transfer)) for row in rows)
    g = graph(program)
    needs = [tuple(n for n in required if g.rank[n] == g.rank[i]) for i, required in enumerate(g.needs)]
    messages: dict[Message, tuple[int, int]] = {  # the nodes where it is made and used
        ("F" if a.kind == "F" else "B", a.stage, a.microbatch, a.direction): (made, used)
        for made, used, a in g.messages()
    }
    ranks = {message: (g.rank[made], g.rank[used]) for message, (made, used) in messages.items()}
    missing = {("SEND", message): pair for message, pair in ranks.items()}
    missing |= {("RECV", message): pair[::-1] for message, pair in ranks.items()}

    # A group of transfers is a node of its row; groups[word, message] is the one with that end of the message.
    groups: dict[tuple[str, Message], int] = {}
    order: list[list[int]] = [[] for _ in rows]
    labels: list[list[str]] = [[] for _ in rows]
    cell = iter(range(len(g.cells)))
    for rank, row in enumerate(rows):
        for step, item in enumerate(row):
            if not isinstance(item, Transfer):
                order[rank].append(next(cell))
                labels[rank].append(str(item))
                continue
            if batched and step > 0 and isinstance(row[step - 1], Transfer):
                labels[rank][-1] += f"+{item}"
            else:
                order[rank].append(len(needs))
                labels[rank].append(str(item))
                needs.append(())
            ahead = 0 if item.word == "RECV" else 1 if item.kind == "F" else -1
            message = (item.kind, item.stage + ahead, item.microbatch, item.direction)
            if missing.pop((item.word, message), None) != (rank, item.peer):
                raise failure(rows, rank, step, f"expected transfers that are needed, each once, found {item}")
            groups[item.word, message] = order[rank][-1]
    for word, message in missing:
        raise g.failure(messages[message][1], f"expected a {word} of what this cell needs, found none; try adding it")

    # It ends when all peers have come to their ends of it, that is, when what stands in front of these has ended.
    front = {node: before for row in order for before, node in pairwise(row)}
    for message, (made, used) in messages.items():
        send, receive = groups["SEND", message], groups["RECV", message]
        needs[send] += (made, *(front[end] for end in [receive] if end in front))
        needs[receive] += tuple(front[end] for end in [send] if end in front)
        needs[used] += (receive,)
    start_times(order, [1] * len(needs), needs, labels)
