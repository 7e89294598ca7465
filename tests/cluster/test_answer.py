"""What is printed about an answer."""

from paceline.cluster.cli.demonstration import _phases
from paceline.cluster.cli.talk import Answer, _document
from paceline.v1 import inference_pb2 as pb

ANSWER = Answer(
    token_ids=[1, 2, 3],
    usage=pb.Usage(prompt_tokens=7, completion_tokens=3),
    phase_times=pb.PhaseTimes(
        queue_s=0.001, wait_s=0.25, prefill_s=0.1, router_s=0.05, kv_transfer_s=0.002, decode_s=0.5
    ),
)


def test_the_summary_names_every_phase() -> None:
    assert ANSWER.summary() == (
        "7 + 3 tokens, 4.0 tokens/s · queue 1.0 ms, worker wait 250.0 ms, prefill 100 ms, "
        "router wait 50.0 ms, KV transfer 2.0 ms, decode 0.50 s"
    )


def test_the_document_has_every_phase() -> None:
    phases = _document(ANSWER)["phase_times"]
    assert isinstance(phases, dict)
    assert set(phases) == {
        "queue_s",
        "wait_s",
        "prefill_s",
        "router_s",
        "kv_transfer_s",
        "decode_s",
    }
    assert phases["wait_s"] == 0.25


def test_the_demonstrations_table_has_a_column_for_each_wait() -> None:
    table = _phases([ANSWER])
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["worker wait"] == ["250.0 ms"]
    assert columns["router wait"] == ["50.0 ms"]
