"""Why the kernels for GPUs cannot serve a call: one error with the reason and what would, and
`auto` takes that; as on machines that have a device."""

import importlib
import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fusedmoe import backends
from fusedmoe.backends import choose

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
TRITON = next(row for row in backends.BACKENDS if row.name == "triton")


class Driver:
    """Triton's, as it stands where none is found."""

    @property
    def active(self):
        raise RuntimeError("0 active drivers ([]). There should only be one.")


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU and with a Triton that works, until a test takes some of it away."""
    active = SimpleNamespace(get_device_interface=lambda: torch.cuda)
    monkeypatch.setitem(
        sys.modules, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=active)))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "INTERPRETED", False)
    monkeypatch.setitem(vars(TRITON), "devices", ("cuda",))
    forget()
    yield monkeypatch
    forget()


def forget() -> None:
    backends._looked_for_triton.cache_clear()
    backends._looked_for_cuda.cache_clear()
    backends._too_old.cache_clear()


def no_package(_):
    raise importlib.metadata.PackageNotFoundError("triton")


LACKS = {
    "the package": (
        lambda patch: patch.setattr(importlib.metadata, "version", no_package),
        "expected the package triton, got none; `pip install triton` brings it, for Linux",
    ),
    "a later version": (
        lambda patch: patch.setattr(importlib.metadata, "version", lambda _: "3.1.0"),
        "expected triton 3.6 or later, got 3.1.0",
    ),
    "a driver": (
        lambda patch: patch.setitem(sys.modules, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=Driver()))),
        "expected a Triton that finds the GPU's driver and a C compiler, got RuntimeError: 0 active drivers "
        "([]). There should only be one.",
    ),
    "a library that loads": (
        lambda patch: patch.setitem(sys.modules, "triton", None),
        "expected a Triton that finds the GPU's driver and a C compiler, got ",
    ),
    "a later architecture": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)),
        "expected a GPU of sm_80 or later, got sm_75",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LACKS)
def test_a_tensor_on_cuda_without(name, dtype, machine):
    take, reason = LACKS[name]
    take(machine)
    with pytest.raises(RuntimeError) as caught:
        choose("triton", CUDA, dtype)
    assert str(caught.value).startswith(f"backend triton: {reason}") and str(caught.value).endswith(
        '; backend="auto" would take reference'
    )
    with pytest.warns(UserWarning) as said:
        assert choose("auto", CUDA, dtype) == "reference"
    text = str(said[0].message)
    assert text.startswith("backend auto: the reference runs, much slower than triton or cuda (triton: ")
    assert reason in text and "; cuda: expected the extension fusedmoe._cuda, got none" in text


def test_a_machine_that_has_everything(machine):
    assert choose("triton", CUDA, torch.bfloat16) == choose("auto", CUDA, torch.bfloat16) == "triton"


def test_an_architecture_of_amds_is_not_asked_for_its_capability(machine):
    machine.setattr(torch.version, "hip", "6.0")
    machine.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("expected no question"))
    assert choose("auto", CUDA, torch.float32) == "triton"


def test_a_tensor_on_the_cpu(machine):
    with pytest.raises(
        RuntimeError, match=r'backend triton: expected a tensor on cuda, got one on cpu; backend="auto" would take cpu'
    ):
        choose("triton", CPU, torch.float32)
    assert choose("auto", CPU, torch.float32) == "cpu"


def test_a_dtype_that_the_kernels_lack(machine):
    message = (
        r'backend triton: expected float32 or bfloat16 or float16, got float64; backend="auto" would take reference'
    )
    with pytest.raises(RuntimeError, match=message):
        choose("triton", CUDA, torch.float64)


def test_nothing_is_offered_where_nothing_can(machine):
    with pytest.raises(RuntimeError, match=r"got int64$"):
        choose("triton", CUDA, torch.int64)


def test_importing_the_library_does_not_import_triton():
    """Nor look for a driver: processes that fork later have not touched the device."""
    script = (
        "import sys, torch; torch.cuda.is_available = lambda: True; import fusedmoe; print('triton' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stdout + result.stderr


def extension(missing: str = "") -> SimpleNamespace:
    return SimpleNamespace(missing=lambda: missing)


@pytest.fixture
def built(machine):
    """A machine that has the CUDA kernels too, and no Triton."""
    machine.setitem(sys.modules, "fusedmoe._cuda", extension())
    machine.setattr(importlib.metadata, "version", no_package)
    return machine


def broken(name: str):
    raise ImportError("libc.so.7: cannot open shared object file")


CUDA_LACKS = {
    "the extension": (
        lambda patch: patch.setitem(sys.modules, "fusedmoe._cuda", None),
        "expected the extension fusedmoe._cuda, got none; `FUSEDMOE_BUILD=cuda pip install "
        "--no-build-isolation .` builds it, with nvcc",
    ),
    "a library that loads": (
        lambda patch: patch.setattr(importlib, "import_module", broken),
        "the extension fusedmoe._cuda cannot be loaded (libc.so.7: cannot open shared object file); build it "
        "again with FUSEDMOE_BUILD=cuda",
    ),
    "a driver": (
        lambda patch: patch.setitem(
            sys.modules, "fusedmoe._cuda", extension("cudaErrorInsufficientDriver (CUDA driver version is ...)")
        ),
        "expected a GPU and its driver, got cudaErrorInsufficientDriver (CUDA driver version is ...)",
    ),
    "a device of NVIDIA's": (
        lambda patch: patch.setattr(torch.version, "hip", "6.0"),
        "expected a GPU of NVIDIA's, got a build of torch for AMD's",
    ),
    "a torch that finds it": (
        lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False),
        f"expected a build of torch that finds the GPU, got {torch.__version__}",
    ),
    "a later architecture": (
        lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)),
        "expected a GPU of sm_80 or later, got sm_75",
    ),
}


@pytest.mark.parametrize("name", CUDA_LACKS)
def test_a_tensor_on_cuda_without_what_the_cuda_kernels_need(name, built):
    take, reason = CUDA_LACKS[name]
    take(built)
    with pytest.raises(RuntimeError) as caught:
        choose("cuda", CUDA, torch.bfloat16)
    assert str(caught.value) == f'backend cuda: {reason}; backend="auto" would take reference'
    with pytest.warns(UserWarning) as said:
        assert choose("auto", CUDA, torch.bfloat16) == "reference"
    assert f"; cuda: {reason})" in str(said[0].message)


def test_auto_is_silent_where_nothing_that_is_missing_would_serve_the_call(machine):
    """No GPU backend computes float64: to install one would not help."""
    machine.setattr(importlib.metadata, "version", no_package)
    assert choose("auto", CUDA, torch.float64) == "reference"


def test_auto_takes_triton_then_cuda_then_the_reference(machine):
    machine.setitem(sys.modules, "fusedmoe._cuda", extension())
    assert choose("auto", CUDA, torch.float32) == "triton" and choose("cuda", CUDA, torch.float32) == "cuda"
    machine.setattr(importlib.metadata, "version", no_package)
    forget()
    assert choose("auto", CUDA, torch.float32) == "cuda"
    assert choose("auto", CUDA, torch.float64) == "reference"


def test_the_cuda_kernels_refuse_the_cpu(built):
    """Only tests register an emulated device, in a process of their own."""
    with pytest.raises(
        RuntimeError, match=r'backend cuda: expected a tensor on cuda, got one on cpu; backend="auto" would take cpu'
    ):
        choose("cuda", CPU, torch.float32)


def test_auto_says_that_the_extension_is_not_there():
    program = (
        "import sys, warnings; sys.modules['fusedmoe._C'] = None; import torch; from fusedmoe.backends import choose\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    print(choose('auto', torch.device('cpu'), torch.float32), *(one.message for one in said))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(
        "reference backend auto: the reference runs, much slower than cpu (cpu: the C++ extension fusedmoe._C cannot"
    )
