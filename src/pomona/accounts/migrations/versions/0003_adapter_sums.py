"""Sums of this month per adapter: what adapters' budgets are asked about."""

import calendar
import time

import sqlalchemy as sa
from alembic import op

from pomona.accounts.clock import month_of, now_s

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Sum up the month's rows; earlier months are never asked about."""
    month = month_of(now_s())
    op.get_bind().execute(
        sa.text(
            "INSERT INTO spending (scope, scope_id, month, num_requests, num_tokens, cost_nanos)"
            " SELECT 'adapter', adapter, :month, COUNT(*), SUM(input_tokens + output_tokens), SUM(cost_nanos)"
            " FROM usage WHERE ended_s >= :start_s GROUP BY adapter"
        ),
        {"month": month, "start_s": calendar.timegm(time.strptime(month, "%Y-%m"))},
    )
