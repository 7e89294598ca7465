"""Requests that nobody will ever run must be refused or take another way, never wait for ever."""

import numpy as np
from fake_worker import BLOCK_TOKENS, arithmetic_oracle
from router_requests import make_active_request
from simulated_pair import SimulatedCluster

from paceline.request import FailureReason, FinishReason, Work
from paceline.router.dispatch import TokenColumns
from paceline.router.placement import Role
from paceline.sampling_params import SamplingParams

ORACLE = arithmetic_oracle(500)


def test_choice_that_has_outgrown_the_prefill_pool_does_not_block_the_queue_for_ever() -> None:
    cluster = SimulatedCluster(ORACLE)
    cluster.join("prefill-0", Role.PREFILL, 0.0, num_blocks=2)
    cluster.join("decode-0", Role.DECODE, 0.0, num_blocks=64)
    # Fits both pools as it comes, and the decode pool up to its last token.
    long = make_active_request("long", prompt=range(BLOCK_TOKENS), max_tokens=4 * BLOCK_TOKENS)
    cluster.dispatcher.submit(long, 0.0)
    now = cluster.run(0.0, 2 * BLOCK_TOKENS)
    assert not long.is_done
    # Now it has more tokens than the prefill pool holds, and its decode worker gives it back.
    cluster.workers["decode-0"].fail(0, FailureReason.PREEMPTED)
    now = cluster.run(now + 1.0, 3)
    short = make_active_request("short", prompt=(1, 2, 3), max_tokens=2)
    cluster.dispatcher.submit(short, now)
    now = cluster.run(now, 20)
    assert short.is_done, "a request that fits everywhere waits behind one that fits nowhere"
    assert long.is_done, "the resumed request neither goes on nor fails"


class CountingCluster(SimulatedCluster):
    """Counts dispatches, and refuses work with more choices than a worker runs sequences."""

    def __init__(self, max_num_seqs: int) -> None:
        super().__init__(ORACLE)
        self.max_num_seqs = max_num_seqs

    def admit(self, worker_id: str, work: Work, source: object) -> None:
        # As `DecodeScheduler.admit` does: "20 choices are as many sequences, 8 may run".
        self.workers[worker_id].refuses = len(work.choices) > self.max_num_seqs
        super().admit(worker_id, work, source)  # type: ignore[arg-type]


def test_request_with_more_choices_than_any_worker_runs_is_not_dispatched_for_ever() -> None:
    cluster = CountingCluster(max_num_seqs=8)
    cluster.join("prefill-0", Role.PREFILL, 0.0, num_blocks=1000)
    cluster.join("decode-0", Role.DECODE, 0.0, num_blocks=1000)
    request = make_active_request("wide", n=20, max_tokens=4)
    try:
        cluster.dispatcher.submit(request, 0.0)
    except Exception:
        return  # refused at once with the numbers: right
    cluster.run(0.0, 100)
    assert request.is_done, f"dispatched {request.num_attempts} times in 100 s, and goes on"


def test_choice_whose_last_token_fills_a_gap_ends_its_request() -> None:
    cluster = SimulatedCluster(ORACLE)
    cluster.join("prefill-0", Role.PREFILL, 0.0)
    cluster.join("decode-0", Role.DECODE, 0.0)
    request = make_active_request("gap", max_tokens=2)
    cluster.dispatcher.submit(request, 0.0)
    worker = cluster.workers["decode-0"]
    worker.inbox.popleft()()
    while worker.outbox:
        worker.outbox.popleft()(0.0)
    [work] = [work for worker_id, work in cluster.sent if worker_id == "decode-0"]
    [stream] = work.stream_ids
    # The decode worker's report of index 1, its end included, overtakes the one of index 0.
    last = TokenColumns([stream], [1], [8], [(stream, FinishReason.LENGTH)])
    cluster.dispatcher.tokens("decode-0", last, 1.0)
    assert not request.is_done
    cluster.dispatcher.tokens("prefill-0", TokenColumns([stream], [0], [7]), 1.0)
    assert request.journal.choices[0].output == [7, 8]
    assert request.journal.is_finished
    assert request.is_done, "every choice has finished and nobody ends the request"


def test_log_probabilities_of_the_first_token_do_not_depend_on_who_reports_it_first() -> None:
    """The decode worker's echo of the first token has none; the prefill worker's report does."""
    from paceline.router.journal import ChoiceJournal, Logprobs, RequestJournal
    from router_requests import SilentText

    sampling = SamplingParams(max_tokens=4, seed=1, logprobs=1)
    journal = RequestJournal(np.array([1], dtype=np.int32), sampling, [SilentText()])
    choice: ChoiceJournal = journal.choices[0]
    choice.add(0, 7, None)
    choice.add(0, 7, Logprobs(-0.5, ((7, -0.5),)))
    choice.add(1, 8, Logprobs(-0.1, ((8, -0.1),)))
    [delta] = journal.take()
    assert delta.token_ids == [7, 8]
    assert None not in delta.logprobs
