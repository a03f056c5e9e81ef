"""Telling a quiet machine from a disturbed one."""

import os
import subprocess
import sys

from benchmarks.meter import CpuTimes, Disturbance, Meter, process_tree, tree_memory_mib, tree_ticks

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"


def test_the_first_line_of_proc_stat_is_read_as_the_kernel_documents_it():
    times = CpuTimes.parse("cpu  100 20 30 400 50 6 7 8 90 10")
    assert times == CpuTimes(busy=100 + 20 + 30 + 6 + 7, steal=8, total=100 + 20 + 30 + 400 + 50 + 6 + 7 + 8)


def test_what_is_busy_and_not_ours_is_others():
    before, after = CpuTimes(1000, 10, 2000), CpuTimes(1180, 14, 2200)
    noise = Disturbance.between(before, after, own_ticks=160)
    assert (noise.own_pct, noise.other_pct, noise.steal_pct) == (80.0, 10.0, 2.0)
    assert not noise.is_clean


def test_a_run_with_little_else_going_on_is_clean():
    assert Disturbance(own_pct=95.0, other_pct=3.0, steal_pct=1.0).is_clean
    assert not Disturbance(own_pct=95.0, other_pct=0.0, steal_pct=5.0).is_clean


def test_more_own_ticks_than_busy_ones_is_rounding_and_not_negative():
    assert Disturbance.between(CpuTimes(0, 0, 0), CpuTimes(5, 0, 10), own_ticks=6).other_pct == 0.0


def test_a_childs_work_counts_as_own():
    with Meter() as meter:
        before = tree_ticks(os.getpid())
        child = subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        assert child.pid in process_tree(os.getpid())
        assert tree_memory_mib(child.pid) > 1.0
        own = tree_ticks(os.getpid()) - before
        child.communicate("\n")
    assert own >= 0.25 * os.sysconf("SC_CLK_TCK")
    assert meter.wall_s > 0.0
    assert meter.disturbance.own_pct > 0.0
