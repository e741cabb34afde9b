"""Memory: what cannot fit is refused with an estimate, and what fails all the same is told without the allocator."""

import errno
import subprocess
import sys

import pytest
import torch
from torch import nn

import local_elasticity as le
from local_elasticity.impact import plan
from local_elasticity.impact.plan import available_memory, check_memory, told_of_memory

GIB = 2**30


def test_without_a_limit_more_than_there_is_is_refused_with_the_estimate(monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device=None: GIB)
    check_memory(GIB, None)
    with pytest.raises(le.InputError, match=r"1,073,741,825 bytes.*got 1,073,741,824 bytes.*measure_tiles"):
        check_memory(GIB + 1, None)


def test_a_few_bytes_are_not_worth_a_question(monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device=None: pytest.fail("asked"))
    check_memory(1000, None)


def test_nothing_is_refused_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device=None: None)
    check_memory(2**60, None)


def test_the_limit_of_the_user_goes_before_what_is_free(monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda device=None: 1000)
    check_memory(5000, 5000)
    with pytest.raises(le.InputError, match="max_memory of at least 5,001"):
        check_memory(5001, 5000)


@pytest.mark.parametrize("engine", ["replay", "linear"])
@pytest.mark.parametrize("free", [200_000_000, 10**12])
def test_free_memory_decides_only_the_refusal(monkeypatch, engine, free):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(20, 4), torch.randint(0, 3, (20,))
    plans = []
    for room in (None, free):
        monkeypatch.setattr(plan, "available_memory", lambda device=None, room=room: room)
        impact = le.measure(model, nn.functional.cross_entropy, (x, y), update=le.SGD(lr=0.1), engine=engine)
        plans.append((impact.plan.route, impact.plan.chunk_size, impact.plan.estimated_bytes, impact.change))
    assert plans[0][:3] == plans[1][:3]
    assert torch.equal(plans[0][3], plans[1][3])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 4 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_an_allocation_that_fails_is_told_with_the_estimate(error):
    with pytest.raises(le.InputError, match="about 1,234 bytes") as caught, told_of_memory(1234):
        raise error
    assert str(error) not in str(caught.value)


def test_the_estimate_is_the_largest_that_was_checked():
    @told_of_memory()
    def work():
        check_memory(77, None)
        check_memory(5, None)
        raise MemoryError

    with pytest.raises(le.InputError, match="about 77 bytes"):
        work()


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "nothing there"), KeyError("x")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, told_of_memory(1):
        raise error
    assert caught.value is error


def test_a_loss_that_runs_out_of_memory_is_told_by_measure():
    def loss(outputs, labels):
        raise MemoryError("the words of an allocator")

    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(le.InputError) as caught:
        le.measure(nn.Linear(4, 3), loss, (x, y), update=le.SGD(lr=0.1), engine="replay")
    assert "the words of an allocator" not in str(caught.value)


def test_control_groups_of_both_versions_bound_what_is_free(tmp_path):
    v2, v1 = tmp_path / "outer" / "inner", tmp_path / "memory" / "job"
    v2.mkdir(parents=True)
    v1.mkdir(parents=True)
    (v2 / "memory.max").write_text("max\n")
    (v2 / "memory.current").write_text("10\n")
    (v2.parent / "memory.max").write_text("1000\n")
    (v2.parent / "memory.current").write_text("400\n")
    (v2.parent / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    (v1 / "memory.limit_in_bytes").write_text("300\n")
    (v1 / "memory.usage_in_bytes").write_text("100\n")
    groups = tmp_path / "groups"
    groups.write_text("4:cpu,memory:/job\n3:pids:/job\n0::/outer/inner\n")
    assert list(plan._group_rooms(tmp_path, groups)) == [200, 650]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system tells only on Linux")
def test_a_limit_of_the_process_is_met_before_anything_is_allocated():
    code = """
import resource, torch, local_elasticity as le
size = int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30,) * 2)
x, y = torch.randn(1500, 16), torch.randint(0, 1000, (1500,))
loss, step = torch.nn.CrossEntropyLoss(), le.SGD(lr=0.01)
for engine in ("replay", "linear"):
    try:
        le.measure(torch.nn.Linear(16, 1000), loss, (x, y), update=step, engine=engine)
    except le.InputError as error:
        print(error)
try:
    le.kernel(torch.nn.Linear(16, 1000), x)
except le.InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr[-500:]
    assert all("free memory" in line and "measure_tiles" in line for line in lines)


def test_what_is_free_is_a_plausible_number():
    free = available_memory()
    assert free is None or GIB // 64 < free < 2**50
    assert available_memory(torch.device("meta")) is None


class RunsOut(nn.Linear):
    """Has no memory for so many samples."""

    def __init__(self, many: int) -> None:
        super().__init__(4, 3)
        self.many = many

    def forward(self, x):
        if len(x) >= self.many:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")
        return super().forward(x)


X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
LOSS = nn.functional.cross_entropy
ENTRIES = {
    "measure": lambda model, _: le.measure(model, LOSS, (X, Y), update=le.SGD(lr=0.1)),
    "linear": lambda model, _: le.measure(model, LOSS, (X, Y), update=le.SGD(lr=0.1), engine="linear"),
    "kernel": lambda model, _: le.kernel(model, X),
    "tiles": lambda model, path: le.measure_tiles(model, LOSS, (X, Y), update=le.SGD(lr=0.1), out=path / "tiles"),
    "gram": lambda model, path: le.gradient_gram(model, LOSS, (X, Y), out=path / "gram"),
    "ripple": lambda model, _: le.ripple(model, LOSS, (X, Y), X),
    "collapse": lambda model, _: le.collapse.layer_metrics(nn.Sequential(model), X, Y, ["0"]),
    "ensemble": lambda model, _: le.train_ensemble(
        lambda: RunsOut(model.many), (X, Y), LOSS, lr=0.1, steps=2, replicas=2, batch_size=8
    ),
}


@pytest.mark.parametrize("many", [1, 8])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_forward_pass_that_runs_out_is_no_matter_of_its_inputs(tmp_path, entry, many):
    with pytest.raises(le.InputError, match="free memory for this work"):
        ENTRIES[entry](RunsOut(many), tmp_path)
