"""What a step gave: which tokens are reported or held back, and which sequences end with theirs."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paceline.decode_worker.attempts import Attempt, AttemptState, OutputToken
from paceline.decode_worker.batch import Rows, RunningBatch
from paceline.decode_worker.outbox import Outbox
from paceline.decode_worker.outcomes import PrefilledAttempt
from paceline.decode_worker.planning import PlannedChunk, UnappliedStep
from paceline.decode_worker.roster import Roster
from paceline.engine.chunking import ChunkTime
from paceline.engine.step_plan import Int32Array, StepResult
from paceline.request import FailureReason, FinishReason, TopLogprobs
from paceline.worker.step_output import StepOutput

Uint8Array = npt.NDArray[np.uint8]


class _Samples(NamedTuple):
    """Samples of sequences that still run. Element i of each array belongs to one sample."""

    rows: Rows | slice
    """Rows of the batch; the slice is all of them, in order."""
    token_ids: Int32Array
    indices: Int32Array
    logprobs: dict[int, TopLogprobs]

    def take(self, batch: RunningBatch, elements: npt.NDArray[np.intp]) -> "_Samples":
        rows = np.arange(batch.num_rows)[self.rows][elements]
        logprobs = {}
        if self.logprobs:
            top = ((i, self.logprobs.get(number)) for i, number in enumerate(elements.tolist()))
            logprobs = {i: found for i, found in top if found is not None}
        return _Samples(rows, self.token_ids[elements], self.indices[elements], logprobs)


def take_samples(
    step: UnappliedStep, result: StepResult, roster: Roster, outbox: Outbox, now: float
) -> None:
    """Take a step's result: store and report its tokens, end what is finished."""
    # Tokens of sequences that have ended since the step was planned are stored too: later steps may
    # have written their KV, and the departures cache it.
    roster.tables.tokens[step.sample_slots, step.token_positions] = result.token_ids
    failed = _fail_sequences(step, result, roster, now)
    for chunk in step.chunks:
        if chunk.attempt not in failed:
            roster.cache_context(chunk.attempt, chunk.end)
        _time_chunk(chunk, outbox, now)
    batch = roster.batch
    samples = _of_running(step, result, batch)
    if not len(samples.token_ids):
        return
    finished, reasons = _finished(batch, samples)
    sequences = [batch.sequences[row] for row in _row_numbers(batch, samples.rows)[finished]]
    indices = samples.indices
    if batch.num_held:
        samples, reported_ends, reported_reasons = _hold_back(batch, samples, finished, reasons)
    else:
        reported_ends, reported_reasons = finished, reasons
    if len(samples.token_ids):
        stream_ids = batch.stream_ids[samples.rows].copy()
        output = StepOutput(
            stream_ids,
            samples.indices.view(np.uint32),
            samples.token_ids.view(np.uint32),
            stream_ids[reported_ends],
            reported_reasons,
            samples.logprobs,
        )
        outbox.add_columns(batch.sessions[samples.rows], output, reported_ends)
    for sequence, number in zip(sequences, finished.tolist(), strict=True):
        index, first_index = int(indices[number]), sequence.attempt.work.next_index
        roster.finish(sequence, index + 1 - first_index, now)


def _time_chunk(chunk: PlannedChunk, outbox: Outbox, now: float) -> None:
    attempt = chunk.attempt
    attempt.chunk_times.append(ChunkTime(chunk.num_tokens, chunk.planned_s, now))
    if chunk.end == attempt.num_tokens and attempt.state is AttemptState.RUNNING:
        attempt.running_s = now
        times = tuple(attempt.chunk_times)
        outbox.add_prefilled(PrefilledAttempt(attempt.work.key, attempt.session, times))


def _fail_sequences(
    step: UnappliedStep, result: StepResult, roster: Roster, now: float
) -> set[Attempt]:
    """Give sequences back for which no token could be chosen; keep their KV out of the cache."""
    failed = set()
    for number, message in result.failures.items():
        row = roster.batch.row_of_slot[step.sample_slots[number]]
        if row < 0:  # it has ended since the step was planned
            continue
        sequence = roster.batch.sequences[row]
        attempt = sequence.attempt
        # Before the confirmation, what was read may be garbage, and the model is not to blame.
        is_confirmed = attempt.state is not AttemptState.UNCONFIRMED
        reason = FailureReason.INTERNAL if is_confirmed else FailureReason.LEASE_LOST
        roster.fail([sequence], reason, message, now, is_kv_good=False)
        roster.forget_context(attempt)
        failed.add(attempt)
    return failed


def _of_running(step: UnappliedStep, result: StepResult, batch: RunningBatch) -> _Samples:
    """Drop the samples of sequences that have ended since the step was planned."""
    token_ids = result.token_ids
    if step.batch_version == batch.version:
        rows = slice(0, batch.num_rows)
        return _Samples(rows, token_ids, step.sample_indices, result.logprobs)
    found = batch.row_of_slot[step.sample_slots]
    samples = _Samples(found, token_ids, step.sample_indices, result.logprobs)
    if np.count_nonzero(found < 0):
        alive = np.flatnonzero(found >= 0)
        logprobs = {
            i: result.logprobs[number]
            for i, number in enumerate(alive.tolist())
            if number in result.logprobs
        }
        samples = _Samples(found[alive], token_ids[alive], step.sample_indices[alive], logprobs)
    return samples


def _finished(batch: RunningBatch, samples: _Samples) -> tuple[npt.NDArray[np.intp], Uint8Array]:
    """Give the samples that are their sequence's last, and why."""
    stop_ids = batch.stop_ids[samples.rows, : batch.max_num_stop_ids]
    is_stop = stop_ids == samples.token_ids[:, None]
    is_last = samples.indices >= batch.last_indices[samples.rows]
    if not np.count_nonzero(is_stop) and not np.count_nonzero(is_last):
        return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.uint8)
    stops = is_stop.any(axis=1)
    finished = np.flatnonzero(stops | is_last)
    reasons = np.where(stops[finished], FinishReason.STOP.value, FinishReason.LENGTH.value)
    return finished, reasons.astype(np.uint8)


def _hold_back(
    batch: RunningBatch,
    samples: _Samples,
    finished: npt.NDArray[np.intp],
    reasons: Uint8Array,
) -> tuple[_Samples, npt.NDArray[np.intp], Uint8Array]:
    """Keep the tokens of unconfirmed attempts with these; give the others."""
    rows = _row_numbers(batch, samples.rows)
    is_held = batch.is_held[rows]
    reason_of = dict(zip(finished.tolist(), reasons.tolist(), strict=True))
    for number in np.flatnonzero(is_held).tolist():
        sequence = batch.sequences[rows[number]]
        reason = reason_of.get(number)
        sequence.attempt.held_back.append(
            OutputToken(
                sequence.stream_id,
                int(samples.indices[number]),
                int(samples.token_ids[number]),
                None if reason is None else FinishReason(reason),
                samples.logprobs.get(number),
            )
        )
    free = np.flatnonzero(~is_held)
    is_free_end = ~is_held[finished]
    ends = np.searchsorted(free, finished[is_free_end])
    return samples.take(batch, free), ends, reasons[is_free_end]


def _row_numbers(batch: RunningBatch, rows: Rows | slice) -> Rows:
    return np.arange(batch.num_rows) if isinstance(rows, slice) else rows
