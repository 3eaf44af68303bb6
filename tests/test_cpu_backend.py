"""What the compiled kernels do beside the loss, which the tests of the loss cover: they run wherever "auto" does."""

import copy
import ctypes
import hashlib
import importlib.util
import io
import platform
import re
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdft_kernels import fused_linear_divergence, linear_token_stats
from sdft_kernels.backends import torch as torch_backend
from sdft_kernels.backends.cpu import backend as cpu_backend
from sdft_kernels.backends.cpu import library, pages
from sdft_kernels.backends.records import Field
from sdft_kernels.backends.select import select
from sdft_kernels.divergences import CROSS_ENTROPY
from tests.cases import DIVERGENCES, assert_as_exact_as_products, assert_close, fused, random_case, reference

CPU = torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles of a small vocabulary."""
    monkeypatch.setattr(cpu_backend, "TILE_BYTES", 1)


def test_they_are_built_here_and_taken_for_float32_logits() -> None:
    assert library.find() is not None
    assert select("auto", CPU, torch.float32) is cpu_backend
    assert select("auto", CPU, torch.float64) is torch_backend
    assert select("torch", CPU, torch.float32) is torch_backend


#: What passed between Python and the library at each INTERFACE, as `interface` sums it up.
INTERFACES = {1: "e35cbe8ee1c141af", 2: "e35cbe8ee1c141af", 3: "54e09be5acc12ae1", 4: "03047a3518b457ff"}


def interface() -> str:
    """The structs, enumerations and signatures of kernels.c, and what Python takes them for."""
    source = Path(cpu_backend.__file__).with_name("kernels.c").read_text("utf-8")
    code = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    declared = re.findall(
        r"^(?:struct|enum) \w+ \{.*?\};|^(?:void|long|int) \w+\([^)]*\)", code, re.DOTALL | re.MULTILINE
    )
    structs = [library.Options, library.Model, library.Labels, library.Carry]
    found = library.find()
    assert found is not None
    names = re.findall(r"^(?:void|long|int) (\w+)\(", code, re.MULTILINE)
    taken = [(struct.__name__, [(n, t.__name__) for n, t in struct._fields_]) for struct in structs]
    taken += [(name, [t.__name__ for t in getattr(found, name).argtypes or ()]) for name in names]
    return hashlib.sha256(" ".join(f"{declared} {taken}".split()).encode()).hexdigest()[:16]


def test_what_passes_between_python_and_the_library_changes_with_its_number() -> None:
    """If this fails, raise INTERFACE in kernels.c and in cpu_backend.py, and name the new sum here."""
    assert INTERFACES[library.INTERFACE] == interface()


def test_places_and_codes_have_the_same_names_in_c_and_in_python() -> None:
    source = Path(cpu_backend.__file__).with_name("kernels.c").read_text("utf-8")
    for name, places, last in (("field", Field, "FIELDS"), ("constant", library.Constant, "CONSTANTS")):
        declared = re.search(rf"enum {name} \{{(.*?)\}}", source, re.DOTALL)
        assert declared is not None
        assert [each.strip() for each in declared[1].split(",")] == [*places.__members__, last]
    declared = re.search(r"enum divergence \{(.*?)\}", source)
    assert declared is not None
    codes = {each.strip().lower(): code for code, each in enumerate(declared[1].split(","))}
    assert library.divergence_codes() == codes and set(codes) == {*DIVERGENCES, CROSS_ENTROPY}


FOREIGN = "int fold(void) { return 0; }"
OLDER = "int interface_version(void) { return 0; }"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "it is empty"),
        ("text", "it is no library"),
        ("cut off", r"it has \d+ bytes of \d+"),
        ("foreign", "it has no interface_version"),
        ("of another release", "it is of interface 0"),
    ],
)
def test_a_library_that_does_not_do_is_named_once_and_not_used(
    kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = importlib.util.find_spec("sdft_kernels.backends.cpu._kernels")
    assert own is not None and own.origin is not None
    path, whole = tmp_path / "_cpu_kernels.so", Path(own.origin).read_bytes()
    if kind in ("foreign", "of another release"):
        if shutil.which("gcc") is None:
            pytest.skip("needs gcc")
        (tmp_path / "other.c").write_text(FOREIGN if kind == "foreign" else OLDER)
        subprocess.run(["gcc", "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", str(path)], check=True)
    else:
        path.write_bytes({"empty": b"", "text": b"no library " * 9, "cut off": whole[: len(whole) // 2]}[kind])
    spec = SimpleNamespace(origin=str(path))
    monkeypatch.setattr("sdft_kernels.backends.cpu.library.importlib.util.find_spec", lambda name: spec)
    library.find.cache_clear()
    try:
        with pytest.warns(UserWarning, match=f"the compiled CPU kernels in {path} are not used.*{reason}"):
            assert library.find() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert select("auto", CPU, torch.float32) is torch_backend
    finally:
        monkeypatch.undo()
        library.find.cache_clear()


def test_that_they_were_not_built_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdft_kernels.backends.cpu.library.importlib.util.find_spec", lambda name: None)
    library.find.cache_clear()
    try:
        with pytest.warns(UserWarning, match="the compiled CPU kernels were not built") as warned:
            linear_token_stats(torch.randn(3, 8), torch.randn(50, 8))
        assert warned[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fused(random_case(3))
        with pytest.raises(ValueError, match="backend is 'compiled', and the kernels were not built"):
            fused(random_case(3), backend="compiled")
    finally:
        monkeypatch.undo()
        library.find.cache_clear()


def test_they_can_be_asked_for_by_name() -> None:
    case = random_case(37)
    for found, expected in zip(fused(case, backend="compiled").output, fused(case).output, strict=True):
        assert found is None or torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"backend is 'compiled', .* operands are torch.float64 on cpu"):
        fused(random_case(3, dtype=torch.float64), backend="compiled")


def test_where_they_are_not_built_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find", lambda: None)
    assert select("auto", CPU, torch.float32) is torch_backend
    case = random_case()
    assert_close(fused(case), reference(case), 2e-6, 2e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (3, 65), (17, 129), (64, 1003), (130, 333)])
def test_any_number_of_tokens_and_entries(divergence: str, tokens: int, vocab: int) -> None:
    """Of which blocks, tiles and threads take what there is."""
    case = random_case(tokens, vocab=vocab, divergence=divergence, bias=True, labels=torch.arange(tokens) % vocab)
    if vocab == 1:
        assert fused(case).output.token_loss.abs().max() == 0
    else:
        assert_close(fused(case), reference(case), 2e-6, 2e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 3, 7])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "skew_reverse_kl"])
def test_any_number_of_threads(threads: int, divergence: str) -> None:
    case = random_case(40, vocab=65, divergence=divergence, student_softcap=5.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(fused(case), reference(case), 2e-6, 2e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "jsd"])
def test_largest_logits_that_come_late_and_far_above(divergence: str) -> None:
    """What was summed before a new largest logit is moved, down to nothing; the peak's own terms keep their digits.

    Not all of them for the jsd, whose score is nearly the same wherever p is far above q.
    """
    steps = torch.arange(-480, 481).unsqueeze(1) / 8  # whose products with the hidden states are exact
    case = random_case(6, 1, 1, divergence=divergence)
    case.student_weight, case.teacher_weight = steps, steps.flip(0)
    case.student_hidden = torch.tensor([[1.0], [-1.0], [0.125], [-0.125], [0.0], [2.0]])
    case.teacher_hidden = torch.tensor([[-1.0], [-1.0], [0.125], [0.125], [1.0], [-2.0]])
    assert_close(fused(case), reference(case), 2e-6, 2e-6)


def test_what_is_not_a_number_stays_one_and_among_its_tokens() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(300, 8)
    hidden[2] = torch.nan
    for divergence in DIVERGENCES:
        loss = fused_linear_divergence(hidden, weight, torch.randn(5, 8), weight, divergence=divergence).token_loss
        assert loss.isnan().tolist() == [False, False, True, False, False]
    assert linear_token_stats(hidden, weight).entropy.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("layout", ["bfloat16", "columns", "part of a row"])
def test_heads_that_the_kernels_cannot_read_as_they_are(divergence: str, layout: str) -> None:
    """Laid out a tile at a time; rows that lie further apart than they are long are read where they are."""
    dtype = torch.bfloat16 if layout == "bfloat16" else torch.float32
    case = random_case(vocab=333, dtype=dtype, divergence=divergence, bias=True)
    if layout == "columns":
        case.student_weight = case.student_weight.T.contiguous().T
    if layout == "part of a row":
        case.student_weight = torch.cat((case.student_weight, case.student_weight), 1)[:, :48]
    assert_close(fused(case), reference(case), 2e-6, 2e-6 if dtype == torch.float32 else 5e-3)


#: What row operations are compiled for with each set of the products.
ROW_TARGETS = {"default": "arch=x86-64", "avx2": "avx2,fma", "avx512": "avx512f"}


@pytest.mark.parametrize("name", ROW_TARGETS)
@pytest.mark.parametrize("size", [1, 7, 40, 200])
def test_each_set_of_instructions(
    name: str, size: int, kernels_of: Callable[[str], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden sizes that fill no panel, some, and more than a sum takes at once; tokens of every number of rows."""
    kernels = kernels_of(name)
    monkeypatch.setattr(library, "find", lambda: kernels)
    labels = torch.arange(75)
    for divergence in DIVERGENCES:
        case = random_case(
            75, size, size + 3, 333, bias=True, labels=labels, divergence=divergence, student_softcap=9.0
        )
        assert_close(fused(case), reference(case), 2e-6, 2e-6)
    shared = random_case(75, size, vocab=333, shared_head=True, labels=labels)
    assert_as_exact_as_products(fused(shared, max_chunk_bytes=8 * 333 * 32), shared)
    stats = linear_token_stats(shared.student_hidden, shared.student_weight, labels)
    torch.testing.assert_close(stats.logprob, fused(shared).output.student_logprob)


@pytest.fixture(scope="module")
def kernels_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The kernels as a processor with these instructions takes them."""
    folder = tmp_path_factory.mktemp("kernels")

    def build(name: str) -> ctypes.CDLL:
        compiler, cpu = shutil.which("gcc"), Path("/proc/cpuinfo")
        if compiler is None or platform.machine() != "x86_64" or not cpu.exists():
            pytest.skip("needs gcc on Linux on an x86-64 processor")
        if not {"avx2": {"avx2", "fma"}, "avx512": {"avx512f"}}.get(name, set()) <= set(cpu.read_text().split()):
            pytest.skip(f"this processor has no {name}")
        built = folder / f"{name}.so"
        if not built.exists():
            source = Path(cpu_backend.__file__).with_name("kernels.c")
            options = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
            kind = (f"-DPRODUCTS=products_{name}", f"-DROW_TARGET={ROW_TARGETS[name]}")
            command = [compiler, *options, *kind, str(source), "-o", str(built)]
            subprocess.run(command, check=True)
        return library.load(str(built))

    return build


@pytest.fixture
def nothing_kept() -> None:
    pages._spare.clear()


@pytest.mark.usefixtures("nothing_kept")
def test_large_memory_is_kept_for_the_next_call() -> None:
    """By what holds it last, for what is about as large; meanwhile nobody else has it."""
    rows = pages.LEAST // 4000 + 2
    first, other = (pages.kept((rows, 1000), torch.float32) for _ in range(2))
    memory, view = first.data_ptr(), first[1:]
    assert other.data_ptr() != memory
    del first
    assert not pages._spare
    del view
    larger = pages.kept((rows + 5000, 1000), torch.float32)  # more pages than there are
    assert larger.data_ptr() != memory
    again = pages.kept((rows - 1, 1000), torch.float32)
    assert again.data_ptr() == memory and again.shape == (rows - 1, 1000)
    again.fill_(1)
    many = [again, other, larger]
    del again, other, larger, many
    assert len(pages._spare) == pages.KEPT


def test_large_gradients_are_tensors_like_any_other() -> None:
    """Whose storage is emptied and filled again, as sharding does."""
    case = random_case(16, 64, 64, pages.LEAST // 256 + 1, shared_head=True)
    gradient = fused(case).gradients["student_weight"]
    assert gradient is not None
    expected, storage = gradient.clone(), gradient.untyped_storage()
    storage.resize_(0)
    storage.resize_(expected.nbytes)
    gradient.copy_(expected)
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    for same in (torch.load(file), copy.deepcopy(gradient), gradient.share_memory_()):
        torch.testing.assert_close(same, expected, rtol=0, atol=0)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says which pages memory is in")
def test_large_gradients_are_in_huge_pages() -> None:
    gradient = pages.huge((pages.LEAST,), torch.uint8)
    address = gradient.data_ptr() + pages.LEAST // 2
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        first, past = (int(end, 16) for end in mapping.split(maxsplit=1)[0].split("-"))
        if first <= address < past:
            assert re.search(r"^VmFlags:.* hg\b", mapping, flags=re.MULTILINE), mapping


def test_calls_at_once_do_not_share_a_workspace() -> None:
    cases = [random_case(200, vocab=4003, seed=seed) for seed in range(4)]
    alone = [fused(case) for case in cases]
    together = [alone[0]] * len(cases)

    def work(number: int) -> None:
        for _ in range(5):
            together[number] = fused(cases[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, other in zip(together, alone, strict=True):
        assert_close(mine, other, 1e-6, 1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_defaults_of_dtype_and_device_are_not_those_of_the_kernels(divergence: str) -> None:
    """Their arrays are float32 and float64 on the CPU, whatever new tensors are elsewhere in a program."""
    labels = torch.arange(37)
    case = random_case(divergence=divergence, labels=labels)
    expected = reference(case)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            actual = fused(case)
            stats = linear_token_stats(case.student_hidden, case.student_weight, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(actual, expected, 2e-6, 2e-6)
    torch.testing.assert_close(stats.logprob, actual.output.student_logprob)
