"""The host library: built once, by one process, from what it is keyed by; and everything works without it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import speechkit_kernels
import torch
from speechkit_kernels import build, ops, serving

FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "fake 1.0" && exit
echo "$@" >> {log}
sleep {seconds}
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done
exit {status}
"""
CompilerOf = Callable[..., Path]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompilerOf:
    """Puts a compiler in place that writes down what it is asked, and an empty cache."""
    monkeypatch.setenv("SPEECHKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPEECHKIT_NO_JIT", raising=False)

    def make(status: int = 0, seconds: float = 0) -> Path:
        log, script = tmp_path / "asked", tmp_path / "compiler"
        script.write_text(FAKE_COMPILER.format(log=log, status=status, seconds=seconds))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return make


@pytest.fixture(scope="module")
def library() -> Path:
    """The real one, of the user's cache."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler to build the CPU kernels with")
    return build.find()


def asked(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def test_a_second_process_finds_the_library_and_compiles_nothing(compiler: CompilerOf) -> None:
    log = compiler()
    first = build.find()
    assert len(asked(log)) == len(build.UNITS) + 1  # and the linker
    assert build.find() == first and first.read_text() == "built\n"
    assert len(asked(log)) == len(build.UNITS) + 1


def test_a_build_says_that_it_happens_and_finding_says_nothing(
    compiler: CompilerOf, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler()
    build.find()
    assert re.fullmatch(r"speechkit: building the CPU kernels into \S+ \.\.\. \d+\.\d s\n", capfd.readouterr().err)
    build.find()
    assert capfd.readouterr() == ("", "")


def test_two_processes_build_one_library(compiler: CompilerOf) -> None:
    log = compiler(seconds=0.1)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=build.find) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(asked(log)) == len(build.UNITS) + 1
    assert sorted(path.suffix for path in build.find().parent.iterdir()) == ["", ".so"]  # the lock, no scratch


def test_another_source_flag_or_compiler_is_another_library(
    compiler: CompilerOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler()

    def name() -> str:
        build.sources_hash.cache_clear()
        return build.library_name([os.environ["CXX"]])

    names = [name(), name()]
    script = Path(os.environ["CXX"])
    script.write_text(script.read_text().replace("fake 1.0", "fake 1.1"))
    names.append(name())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    names.append(name())
    sources = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert name() == names[-1], "where the sources lie does not matter"
    (sources / "simd.h").write_text("// changed")
    names.append(name())
    build.sources_hash.cache_clear()
    assert names[0] == names[1] and len(set(names)) == 4


def test_a_library_in_the_package_is_preferred(
    compiler: CompilerOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = compiler()
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    shipped = tmp_path / "lib" / f"speechkit-{build.sources_hash()}-elsewhere.so"
    shipped.parent.mkdir()
    shipped.touch()
    (tmp_path / "lib" / "speechkit-0000000000000000-stale.so").touch()
    assert build.find() == shipped
    assert asked(log) == []


def test_a_library_built_ahead_of_time_serves_where_no_compiler_is(
    compiler: CompilerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler()
    built = build.find()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find() == built
    built.unlink()
    with pytest.raises(build.BuildError, match=r"no C.. compiler was found .* install g"):
        build.find()


def test_a_refusing_compiler_is_one_sentence_with_the_log(compiler: CompilerOf) -> None:
    compiler(status=1)
    with pytest.raises(build.BuildError, match=r"could not build .* is in (\S+); name another") as refused:
        build.find()
    path = re.search(r"is in (\S+);", str(refused.value))
    assert path is not None and "library.cpp" in Path(path[1]).read_text()
    assert not list(build.cache_folder().rglob("*.so"))


def test_building_can_be_forbidden(compiler: CompilerOf, monkeypatch: pytest.MonkeyPatch) -> None:
    log = compiler()
    monkeypatch.setenv("SPEECHKIT_NO_JIT", "1")
    with pytest.raises(build.BuildError, match=r"SPEECHKIT_NO_JIT forbids .* run `python -m speechkit_kernels.build`"):
        build.find()
    assert asked(log) == []


def test_a_cache_that_cannot_be_written_is_named(
    compiler: CompilerOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPEECHKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=r"cannot be built in \S+file/kernels: .* SPEECHKIT_CACHE"):
        build.find()


def test_a_library_that_does_not_load_is_one_warning(compiler: CompilerOf) -> None:
    compiler()
    with pytest.warns(UserWarning, match="plain PyTorch, .* do not load: .* delete .*so to have it built anew"):
        assert serving._load.__wrapped__().library is None


def test_the_switch_is_off_or_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEECHKIT_KERNELS", "on")
    with pytest.raises(ValueError, match="SPEECHKIT_KERNELS must be 'off' or unset, but is 'on'"):
        serving._load.__wrapped__()


FRESH_PROCESS = """
import json, sys, warnings
import torch, speechkit_kernels
from speechkit_kernels import plain, serving

def is_compiled():
    return torch._C._dispatch_has_kernel_for_dispatch_key("speechkit::conv_step", "CPU")

torch.manual_seed(0)
before, warned, required = is_compiled(), [], ""
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        speechkit_kernels.ready()
    kernel = {str(s).split(":")[0]: s for s in speechkit_kernels.explain()}["conv_step on cpu"]
    warned = [str(w.message) for w in seen]
try:
    speechkit_kernels.require("conv_step", "cpu")
except RuntimeError as error:
    required = str(error)
x, weight, cache = torch.randn(2, 5, 8), torch.randn(4, 3), torch.randn(2, 2, 4)
rows, own = (torch.tensor([1, 0]), torch.tensor([5, 2])), cache.clone()
out = torch.ops.speechkit.conv_step(x, weight, None, cache, *rows, gated=True)
same = torch.allclose(out, plain.conv_step(x, weight, None, own, *rows, gated=True), atol=1e-6)
print(json.dumps({"before": before, "after": is_compiled(), "warned": warned, "kernel": kernel.kernel,
                  "reason": kernel.reason, "required": required, "same": same and torch.allclose(cache, own)}))
"""


def fresh_process(**environment: str) -> dict:
    """What a new process sees that streams under this environment."""
    kernels = str(build.PACKAGE.parent)
    environ = {**os.environ, "PYTHONPATH": kernels, **environment}
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_loads_nothing_and_ready_loads_the_kernels(library: Path) -> None:
    seen = fresh_process()
    assert (seen["before"], seen["after"], seen["warned"], seen["required"]) == (False, True, [], "")
    assert seen["kernel"] in build.ISAS and seen["same"]


def test_a_broken_compiler_costs_one_warning_and_speed(compiler: CompilerOf, tmp_path: Path) -> None:
    compiler(status=1)
    seen = fresh_process()
    assert seen["kernel"] == "plain PyTorch" and seen["same"] and not seen["after"]
    assert len(seen["warned"]) == 1 and "could not build the CPU kernels" in seen["warned"][0]
    assert str(tmp_path) in seen["reason"]
    assert re.match("conv_step has no compiled kernel on cpu: .* name another compiler in CXX", seen["required"])


def test_kernels_can_be_switched_off_without_a_word(compiler: CompilerOf) -> None:
    log = compiler()
    seen = fresh_process(SPEECHKIT_KERNELS="off")
    assert seen["kernel"] == "plain PyTorch" and seen["same"] and not seen["after"]
    assert seen["warned"] == [] and asked(log) == []
    assert seen["reason"] == "SPEECHKIT_KERNELS=off forbids compiled kernels; unset it."


def test_the_library_needs_nothing_of_torch_but_its_c_interface(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm to list the symbols with")
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert not [name for name in names if re.match(r"_Z\w*(2at|3c10|5torch)", name)]
    assert [name for name in names if "torch" in name] and all(
        name.startswith(("torch_", "aoti_torch_")) for name in names if "torch" in name
    )


def test_the_library_exports_two_names(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm to list the symbols with")
    listed = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    strong = [line.split()[-1] for line in listed.stdout.splitlines() if line.split()[-2] not in "uVW"]
    assert strong == ["speechkit_cuda", "speechkit_isa"]


def test_the_instruction_set_can_be_lowered_and_raised_again(library: Path) -> None:
    best = speechkit_kernels.instruction_set()
    assert speechkit_kernels.instruction_set("portable") == "portable"
    reasons = {s.operator: s.reason for s in speechkit_kernels.explain() if s.device == "cpu"}
    assert best == "portable" or f"{best}" in reasons["conv_step"]
    assert speechkit_kernels.instruction_set(best) == best
    with pytest.raises(ValueError, match="must be one that this machine and the library have, but is 'mmx'"):
        speechkit_kernels.instruction_set("mmx")
    assert speechkit_kernels.instruction_set() == best


def test_explain_speaks_of_every_operator_on_both_devices(library: Path) -> None:
    servings = speechkit_kernels.explain()
    assert {(s.operator, s.device) for s in servings} == {
        (operator, device) for operator in ops.SCHEMAS for device in ("cpu", "cuda")
    }
    assert all(each.reason.endswith(".") for each in servings if each.kernel == serving.PLAIN)
    assert f"{servings[0]}".startswith("stream_attn on cpu: ")


def test_require_names_what_is_wrong_with_the_request(library: Path) -> None:
    with pytest.raises(ValueError, match=r"operator must be one of stream_attn, conv_step.*, but is 'conv'"):
        speechkit_kernels.require("conv", "cpu")
    with pytest.raises(RuntimeError, match=r"conv_step has no compiled kernel on meta: .* use a device"):
        speechkit_kernels.require("conv_step", torch.device("meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speechkit_kernels.require("conv_step", "cpu")
