"""A driver under any order of starts, rows, divergences, deaths, late rows and crashes; tests begin it with a spec."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bfm.sweep.driver.driver import SweepDriver
from bfm.sweep.ledger.state import SweepState
from bfm.sweep.ledger.task import Finished, Task, Wait
from bfm.sweep.space.settings import SweepSpec
from bfm.training.task import Account
from tests.sweep.serial import run_serial
from tests.sweep.world import execute, in_memory, make_spec


class CapMachine(RuleBasedStateMachine):
    """Subclasses call `open_with` when they begin."""

    spec: SweepSpec
    driver: SweepDriver

    def open_with(self, **changes):
        self.spec = make_spec(**changes)
        self.fates: dict[str, Account] = {}
        self.driver = in_memory(self.spec, settle=self.settle)
        self.closed: list[Task] = []

    def settle(self, task):
        return self.fates.get(task.task_id, Account(task.reserved_flops))

    def account(self, task, used, saved):
        """Of a task that has trained a share of its reservation, and kept a share of that."""
        spent_flops = int(used * task.reserved_flops)
        progress_flops = task.begins_flops + int(saved * spent_flops)
        return Account(spent_flops, f"{task.task_id}-progress" if saved else None, progress_flops if saved else 0)

    def open(self):
        state = self.driver.state
        return [Task.from_dict(state.attempts[place].task) for place in state.open_tasks.values()]

    @rule()
    def ask(self):
        state = self.driver.state
        bad = {t.trial for t in state.trials.values() if any(row["status"] != "ok" for row in t.rows.values())}
        begun = {trial for trial, _ in state.attempts}
        answer = self.driver.next_task()
        running = len(state.open_tasks)
        assert running <= self.spec.scaling.slots
        match answer:
            case Task():
                assert answer.trial not in bad
                assert answer.task_id in state.open_tasks
                if answer.task_id.endswith("-a0"):
                    assert answer.trial not in begun
            case Wait():
                assert running
                assert answer.reason
            case Finished():
                assert not running
                assert answer.reason

    @precondition(lambda self: self.open())
    @rule(which=st.integers(0, 9), used=st.floats(0, 1), status=st.sampled_from(["ok", "ok", "ok", "diverged", "oom"]))
    def row(self, which, used, status):
        tasks = self.open()
        task = tasks[which % len(tasks)]
        row = {**execute(task), "checkpoint_bytes": 1 << 30}
        if row["status"] == "ok" and status != "ok":
            row |= {"status": status, "metrics": {}}
        if row["status"] != "ok":
            row |= {"task_flops": int(used * task.reserved_flops), "checkpoint": None}
        assert self.driver.report(task.task_id, row)
        self.closed.append(task)

    @precondition(lambda self: self.open())
    @rule(which=st.integers(0, 9), used=st.floats(0.1, 1), saved=st.sampled_from([0.0, 0.5, 1.0]))
    def death(self, which, used, saved):
        tasks = self.open()
        task = tasks[which % len(tasks)]
        self.fates[task.task_id] = self.account(task, used, saved)
        spent_flops = self.driver.state.spent_flops
        assert self.driver.lost(task.task_id, "killed")
        assert self.driver.state.spent_flops - spent_flops == int(used * task.reserved_flops)
        self.closed.append(task)

    @precondition(lambda self: self.open())
    @rule(which=st.integers(0, 9), used=st.floats(0, 1))
    def yields(self, which, used):
        tasks = self.open()
        task = tasks[which % len(tasks)]
        lost_flops = self.driver.state.lost_flops
        assert self.driver.yielded(task.task_id, self.account(task, used, 1.0))
        assert self.driver.state.lost_flops == lost_flops, "what a yield has trained is not lost"
        self.closed.append(task)

    @precondition(lambda self: self.closed)
    @rule(which=st.integers(0, 99))
    def late(self, which):
        task = self.closed[which % len(self.closed)]
        before = len(self.driver._ledger.records)
        assert not self.driver.report(task.task_id, execute(task))
        assert not self.driver.lost(task.task_id, "again")
        assert not self.driver.yielded(task.task_id, Account(1))
        assert len(self.driver._ledger.records) == before

    @rule()
    def crash(self):
        self.closed += self.open()
        self.driver = in_memory(self.spec, self.driver._ledger.records, settle=self.settle)
        assert not self.driver.state.open_tasks

    @invariant()
    def tasks_go_on_from_trunks_that_stand(self):
        for task in self.open():
            assert (task.resume_from is None) == (task.from_rung is None)
            assert (task.trial, task.from_rung) not in self.driver.state.evicted

    @invariant()
    def the_cap_holds(self):
        state = self.driver.state
        assert state.spent_flops + state.reserved_flops <= self.spec.budget.total_flops
        assert state.reserved_flops == sum(task.reserved_flops for task in self.open())

    @invariant()
    def replay_is_the_state(self):
        assert SweepState.fold(self.driver._ledger.records) == self.driver.state

    def teardown(self):
        if hasattr(self, "driver"):
            self.crash()
            run_serial(self.driver, execute)
            self.the_cap_holds()
            assert self.driver.state.finished
