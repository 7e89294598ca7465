"""What waits to leave the worker, until the scheduler's caller takes it."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from paceline.decode_worker.attempts import OutputToken
from paceline.decode_worker.outcomes import (
    DecodeStep,
    EndedAttempt,
    PrefilledAttempt,
    SequenceFailure,
)
from paceline.request import AttemptKey, FinishReason
from paceline.worker.step_output import StepOutput

NONE: npt.NDArray[np.intp] = np.empty(0, dtype=np.intp)


class Outbox:
    """Collects tokens, failures, ends and imports to abandon.

    Tokens of a step come in columns; a few others, such as those that waited for a confirmation,
    one by one.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, list[OutputToken]] = {}
        self._outputs: dict[int, StepOutput] = {}
        self._prefilled: list[PrefilledAttempt] = []
        self._failures: list[SequenceFailure] = []
        self._abandoned_imports: list[AttemptKey] = []
        self._ended: list[EndedAttempt] = []

    def add_tokens(self, session: int, tokens: list[OutputToken]) -> None:
        """Add tokens that come before those of the next columns."""
        if tokens:
            self._tokens.setdefault(session, []).extend(tokens)

    def add_columns(
        self,
        sessions: npt.NDArray[np.int64],
        output: StepOutput,
        finished: npt.NDArray[np.intp],
    ) -> None:
        """Add the tokens of a step, once between two `take`s.

        `finished` has the elements whose token is their last, for `output.finish_reasons`.
        """
        first = int(sessions[0])
        if not np.count_nonzero(sessions != first):
            self._outputs[first] = output
            return
        ends_of = dict(_elements_by_session(sessions[finished]))
        for session, mine in _elements_by_session(sessions):
            ends = ends_of.get(session, NONE)
            logprobs = {}
            if output.logprobs:
                top = ((i, output.logprobs.get(number)) for i, number in enumerate(mine.tolist()))
                logprobs = {i: found for i, found in top if found is not None}
            self._outputs[session] = StepOutput(
                output.stream_ids[mine],
                output.indices[mine],
                output.token_ids[mine],
                output.finished_stream_ids[ends],
                output.finish_reasons[ends],
                logprobs,
            )

    def add_prefilled(self, prefilled: PrefilledAttempt) -> None:
        self._prefilled.append(prefilled)

    def add_failure(self, failure: SequenceFailure) -> None:
        self._failures.append(failure)

    def add_abandoned_import(self, key: AttemptKey) -> None:
        self._abandoned_imports.append(key)

    def add_ended(self, ended: EndedAttempt) -> None:
        self._ended.append(ended)

    def drop_session(self, session: int) -> None:
        """Forget what waits for a router that is gone."""
        self._tokens.pop(session, None)
        self._failures = [f for f in self._failures if f.session != session]

    def take(self) -> DecodeStep:
        """Give everything and forget it."""
        outputs = self._outputs
        for session, tokens in self._tokens.items():
            outputs[session] = _joined(tokens, outputs.get(session))
        step = DecodeStep(
            outputs,
            tuple(self._prefilled),
            tuple(self._failures),
            tuple(self._abandoned_imports),
            tuple(self._ended),
        )
        self._outputs = {}
        self._tokens.clear()
        for waiting in (self._prefilled, self._failures, self._abandoned_imports, self._ended):
            waiting.clear()
        return step


def _elements_by_session(
    sessions: npt.NDArray[np.int64],
) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """Give each session with the numbers of its elements, in order; sorts once for all sessions."""
    order = np.argsort(sessions, kind="stable")
    found, starts = np.unique(sessions[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    for session, start, end in zip(found.tolist(), starts.tolist(), ends, strict=False):
        yield session, order[start:end]


def _joined(tokens: list[OutputToken], rest: StepOutput | None) -> StepOutput:
    ends = [token for token in tokens if token.finish_reason is not None]
    logprobs = {i: token.logprobs for i, token in enumerate(tokens) if token.logprobs is not None}
    first = StepOutput(
        np.array([token.stream_id for token in tokens], dtype=np.uint32),
        np.array([token.index for token in tokens], dtype=np.uint32),
        np.array([token.token_id for token in tokens], dtype=np.uint32),
        np.array([token.stream_id for token in ends], dtype=np.uint32),
        np.array([_value(token.finish_reason) for token in ends], dtype=np.uint8),
        logprobs,
    )
    if rest is None:
        return first
    return StepOutput(
        np.concatenate((first.stream_ids, rest.stream_ids)),
        np.concatenate((first.indices, rest.indices)),
        np.concatenate((first.token_ids, rest.token_ids)),
        np.concatenate((first.finished_stream_ids, rest.finished_stream_ids)),
        np.concatenate((first.finish_reasons, rest.finish_reasons)),
        logprobs | {len(tokens) + i: top for i, top in rest.logprobs.items()},
    )


def _value(reason: FinishReason | None) -> int:
    assert reason is not None
    return reason.value
