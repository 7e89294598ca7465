"""Make what a process hosts: the real worker or router."""

from paceline.cluster.hosted import HostContext, Hosted


def build_hosted(context: HostContext) -> Hosted:
    """Make it. Imports late: a router must not load torch, a worker no router."""
    if context.name.role.is_worker:
        from paceline.cluster.hosted_worker import HostedWorker

        return HostedWorker(context)
    from paceline.cluster.hosted_router import HostedRouter

    return HostedRouter(context)
