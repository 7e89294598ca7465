"""What of a worker's room each router is offered."""


def share_by_demand(total: int, num_own: int, num_all: int, num_sessions: int) -> int:
    """Split something among routers by the attempts that each has here, counting one more for each.

    While nothing runs each router may take all: whoever comes second is refused and tries again,
    but a request larger than an even share is not kept out for ever.
    """
    if num_sessions <= 1 or not num_all:
        return total
    return total * (num_own + 1) // (num_all + num_sessions)
