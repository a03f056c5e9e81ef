"""The ledger under kill -9 of server and engine at random moments: no request missing, none twice.

Two hundred kills, with a summary: pytest tests/accounts/test_kills.py -m slow -n 0 -s
"""

import pytest

from support.kills import KillRun, show


async def check(tmp_path, database_url, num_kills, seed):
    summary = await KillRun(tmp_path, database_url, seed).run(num_kills)
    print(show(summary))
    assert summary.is_clean, show(summary)
    assert summary.num_server_kills + summary.num_engine_kills == num_kills
    assert summary.num_rows >= summary.num_seen > num_kills


async def test_no_row_is_missing_or_twice_after_a_few_kills(tmp_path, database_url):
    await check(tmp_path, database_url, 3, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_no_row_is_missing_or_twice_after_two_hundred_kills(tmp_path, database_url):
    await check(tmp_path, database_url, 200, seed=2)
