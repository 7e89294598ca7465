"""What a request needs, held against the sizes of the pools. Pure."""

from dataclasses import replace

from paceline.errors import FieldViolation, InvalidRequestError, RequestFailedError
from paceline.router.active_request import ActiveRequest, WaitingWork
from paceline.router.capacity import KnownPools, Need


def need_of(work: WaitingWork, pools: KnownPools) -> Need:
    """Say what waiting work needs, from its output so far to its last token."""
    request = work.request
    num_output = len(request.journal.choices[work.choices[0]].output)
    return Need(
        len(request.journal.prompt) + num_output,
        len(work.choices),
        _max_tokens(request, pools) - 1 - num_output,
        work.preempted,
    )


def fix_max_tokens(request: ActiveRequest, pools: KnownPools) -> None:
    """At the first dispatch: lower a max_tokens that the client left open to what the pools can
    hold. It is the same for all later attempts."""
    journal = request.journal
    if request.max_tokens_is_default and not request.num_attempts:
        journal.sampling = replace(journal.sampling, max_tokens=_max_tokens(request, pools))


def too_large(request: ActiveRequest, pools: KnownPools) -> InvalidRequestError | None:
    """Say why a new request could not run, or could not be resumed before its last token."""
    num_prompt = len(request.journal.prompt)
    num_choices = len(request.journal.choices)
    max_tokens = _max_tokens(request, pools)
    growing = f"for {num_prompt} prompt tokens and max_tokens {max_tokens}, "
    for field, when, need in (
        ("prompt", "", Need(num_prompt, 1)),
        ("sampling.n", "", Need(num_prompt, num_choices)),
        ("sampling.max_tokens", growing, Need(num_prompt + max_tokens - 1, 1)),
        ("sampling.max_tokens", growing, Need(num_prompt, num_choices, max_tokens - 1)),
    ):
        why = pools.why_too_large(need)
        if why is not None:
            return InvalidRequestError(FieldViolation(field, when + why))
    return None


def too_large_to_go_on(
    work: WaitingWork, pools: KnownPools
) -> InvalidRequestError | RequestFailedError | None:
    """Say why waiting work fits no worker that is known now, so that it need not wait for one."""
    request = work.request
    if not request.num_attempts:
        return too_large(request, pools)
    why = pools.why_too_large(need_of(work, pools))
    if why is None:
        return None
    return RequestFailedError(
        f"after {request.num_attempts} attempt(s) and {request.journal.num_output_tokens} output "
        f"tokens no worker that is known now can go on with it: {why}"
    )


def _max_tokens(request: ActiveRequest, pools: KnownPools) -> int:
    """Return max_tokens, which the pools bound until the first dispatch if the client left it
    open."""
    journal = request.journal
    if not request.max_tokens_is_default or request.num_attempts:
        return journal.max_tokens
    room = pools.max_context_tokens()
    if room is None:
        return journal.max_tokens
    # The last token needs no KV.
    return min(journal.max_tokens, max(1, room - len(journal.prompt) + 1))
