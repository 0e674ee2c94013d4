"""The house's own rules: imports point down, files and functions stay small, README's commands exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedmoe.reference.layers import SharedBottom

ROOT = Path(__file__).parent.parent
# Room -> floor. A module may import from floors below its own, and from its own room.
FLOORS = {
    "fusedmoe.encoding": 0,
    "fusedmoe.activation": 0,
    "fusedmoe.dtype": 0,
    "fusedmoe.tracing": 0,
    "fusedmoe.validation": 0,
    "fusedmoe.casting": 1,
    "fusedmoe.storage": 0,
    "fusedmoe._C": 0,
    "fusedmoe.parts": 1,
    "fusedmoe.graph": 2,
    "fusedmoe.resolve": 3,
    "fusedmoe.table": 4,
    "fusedmoe.route": 5,
    "fusedmoe.backends": 1,
    "fusedmoe.codec": 6,
    "fusedmoe.drafts": 6,
    "fusedmoe.checks": 6,
    "fusedmoe.inputs": 7,
    "fusedmoe.level_arguments": 6,
    "fusedmoe.reference": 6,
    "fusedmoe.families": 7,
    "fusedmoe.outputs": 7,
    "fusedmoe.testing": 8,
    "fusedmoe.cpu": 8,
    "fusedmoe.reference.autograd": 8,
    "fusedmoe.packed": 8,
    # The planner that both GPU backends share, Triton's kernels, and the operator over them.
    "fusedmoe.kernels": 8,
    "fusedmoe.kernels.triton": 9,
    "fusedmoe.kernels.operator": 10,
    "fusedmoe.kernels.registered": 11,
    "fusedmoe.op": 12,
    "fusedmoe.functional": 13,
    "fusedmoe.nn": 13,
    "fusedmoe.adapters": 14,
    "fusedmoe.swap": 15,
    "fusedmoe.freezing": 16,
    # The package itself gathers the public names of the floors below; only what stands above may
    # import it.
    "fusedmoe": 17,
    "fusedmoe.doctor": 18,
    "fusedmoe.demo": 18,
    "fusedmoe.speed": 19,
    "fusedmoe.__main__": 20,
}
LONGEST_FILE, LONGEST_FUNCTION, MOST_ARGUMENTS = 400, 60, 8
LONGEST_LINE = 120
# A launch hands these kernels of Triton's pointers and numbers one by one.
LAUNCHED_BY_TRITON = {"forward", "backward_rows", "gradients", "add_chunks", "rowwise_forward", "rowwise_backward"}
# Triton's functions take no record, so what CUDA's take in one stands here by itself: nine arguments.
WIDE_IN_TRITON = {"product", "linear_forward", "without_hidden"}
# PyTorch calls them with what the schema of an operator lists.
OPERATORS_IN_CPP = {"network_triton_backward", "network_cuda_backward"}
# Module -> modules above it that it names in text: who launches is looked up by name.
NAMED_ABOVE = {"fusedmoe.kernels.launchers": {"fusedmoe.kernels.triton.launch"}}

# Folder -> package: as setup.py puts them together.
PACKAGES = {
    "fusedmoe": "fusedmoe",
    "kernels": "fusedmoe.kernels",
    "kernels/triton": "fusedmoe.kernels.triton",
    "bench/speed": "fusedmoe.speed",
    "examples/census": "fusedmoe.demo",
}
FOLDERS = ("fusedmoe", "kernels", "bench", "examples", "docs", "tests", ".ci")
PYTHON = [*sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")), ROOT / "setup.py"]
CPP = sorted(
    path
    for folder in ("csrc", "tests")
    for ending in ("*.h", "*.cpp", "*.cu")
    for path in (ROOT / folder).rglob(ending)
)
SOURCES = [*PYTHON, *CPP]


def name_of(path: Path) -> str | None:
    """The dotted name of a module of the package, or None for any other file."""
    for folder, package in PACKAGES.items():
        if path.is_relative_to(ROOT / folder):
            parts = (package, *path.relative_to(ROOT / folder).with_suffix("").parts)
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None


def room_of(module: str) -> str:
    """The longest entry of FLOORS that the module lies in.

    The package's own entry stands for `fusedmoe/__init__.py` alone.
    """
    parts = module.split(".")
    for size in range(len(parts), 1, -1):
        if ".".join(parts[:size]) in FLOORS:
            return ".".join(parts[:size])
    if module == "fusedmoe":
        return module
    raise KeyError(f"{module}: expected a room of FLOORS, got none")


def imports_of(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports, wherever in it, or names in a text of their
    own, as `importlib.import_module` takes it.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found |= {node.value} & modules
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fusedmoe"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fusedmoe":
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & modules) or {node.module}
    return found


def upward(importer: str, imported: set[str]) -> list[str]:
    """The imports that do not point down."""
    room = room_of(importer)
    others = {room_of(module) for module in imported} - {room}
    return [f"{importer} imports {other}" for other in sorted(others) if FLOORS[other] >= FLOORS[room]]


MODULES = {name: path for path in PYTHON if (name := name_of(path))}


def test_imports_point_down():
    known = {*MODULES, "fusedmoe._C"}
    faults = [
        fault
        for name, path in MODULES.items()
        for fault in upward(name, imports_of(ast.parse(path.read_text()), known) - NAMED_ABOVE.get(name, set()))
    ]
    assert faults == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import fusedmoe.swap", "fusedmoe.op imports fusedmoe.swap"),
        ("from fusedmoe import nn", "fusedmoe.op imports fusedmoe.nn"),
        ("def f():\n    from fusedmoe.nn.wiring import Wiring", "fusedmoe.op imports fusedmoe.nn"),
        ("from fusedmoe import fuse", "fusedmoe.op imports fusedmoe"),
        ('importlib.import_module("fusedmoe.swap")', "fusedmoe.op imports fusedmoe.swap"),
    ],
)
def test_an_upward_import_is_noticed(text, fault):
    assert upward("fusedmoe.op", imports_of(ast.parse(text), set(MODULES))) == [fault]


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.suffix != ".py"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_lines_of_cpp_are_short(path):
    # Those of Python are ruff's.
    assert [line for line in path.read_text().splitlines() if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def arguments_of(function: ast.FunctionDef) -> int:
    """How many arguments a caller may give, `self` and `cls` not counted."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def most_of(function: ast.FunctionDef) -> int:
    """How many arguments a function may have."""
    if not any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list):
        return MOST_ARGUMENTS
    return sys.maxsize if function.name in LAUNCHED_BY_TRITON else MOST_ARGUMENTS + (function.name in WIDE_IN_TRITON)


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    long = [
        f"{f.name}: {f.end_lineno - f.lineno + 1} lines"
        for f in functions_of(path)
        if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION
    ]
    wide = [f"{f.name}: {arguments_of(f)} arguments" for f in functions_of(path) if arguments_of(f) > most_of(f)]
    assert long + wide == []


def test_every_exemption_is_used():
    jitted = {f.name: arguments_of(f) for path in PYTHON for f in functions_of(path) if most_of(f) != MOST_ARGUMENTS}
    assert jitted.keys() == LAUNCHED_BY_TRITON | WIDE_IN_TRITON
    assert {jitted[name] for name in WIDE_IN_TRITON} == {MOST_ARGUMENTS + 1}
    found = {name for path in CPP for name, count in signatures_of(path.read_text()) if count > MOST_ARGUMENTS}
    assert found == OPERATORS_IN_CPP
    for name, above in NAMED_ABOVE.items():
        assert above <= imports_of(ast.parse(MODULES[name].read_text()), set(MODULES))


def bare(text: str) -> str:
    """C++ without comments, texts and characters: what stands in them is no syntax."""
    text = re.sub(r"//.*", "", text)
    return re.sub(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', "0", text)


def signatures_of(text: str) -> list[tuple[str, int]]:
    """Every function that is defined in C++, and how many arguments it takes."""
    text, found = bare(text), []
    for head in re.finditer(r"(?<![:,][ \n])\b(?!(?:if|for|while|switch|catch)\b)(\w+)\(", text):
        depth, angle, count, place = 1, 0, 1, head.end()
        while depth:
            letter = text[place]
            depth += (letter in "([{") - (letter in ")]}")
            angle += (letter == "<") - (letter == ">" and text[place - 1] != "-")
            count += letter == "," and depth == 1 and angle <= 0
            place += 1
        if re.match(r"\s*(?:const\b|noexcept\b|override\b|\s)*(?::[^;{]*)?{", text[place:]):
            found.append((head[1], count if text[head.end() : place - 1].strip() else 0))
    return found


def bodies_of(text: str) -> list[tuple[int, int]]:
    """First and last line of every outermost block of C++ that is no namespace, class, struct, enum
    or extern "C".
    """
    text = bare(text)
    containers, depth, start, head, found = [], 0, 0, "", []
    for number, line in enumerate(text.splitlines(), 1):
        for letter in line:
            if letter == "{" and depth == 0 and re.search(r"\b(namespace|class|struct|enum|extern)\b[^()]*$", head):
                containers.append(number)
            elif letter == "{":
                start, depth = start if depth else number, depth + 1
            elif letter == "}" and depth == 0:
                containers.pop()
            elif letter == "}":
                depth -= 1
                found += [(start, number)] if depth == 0 else []
            head = "" if letter in "{};" else head + letter
        head += "\n"
    if containers or depth:
        raise ValueError(f"expected a }} for every {{, got {len(containers) + depth} more of the latter")
    return found


@pytest.mark.parametrize("path", CPP, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_of_cpp_are_short(path):
    assert [
        f"lines {first} to {last}" for first, last in bodies_of(path.read_text()) if last - first + 1 > LONGEST_FUNCTION
    ] == []


@pytest.mark.parametrize("path", CPP, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_of_cpp_have_few_arguments(path):
    signatures = signatures_of(path.read_text())
    assert [
        f"{name}: {count} arguments"
        for name, count in signatures
        if count > MOST_ARGUMENTS and name not in OPERATORS_IN_CPP
    ] == []


def test_arguments_of_cpp_are_counted():
    text = (
        "inline int f(int a, std::map<int, int> b, void (*c)(int, int) = g(1, 2)) const {\n  if (a, b) {\n  }\n}\n"
        "S(int a, int b) : a_(a, 1) {}\nvoid h() {\n  k(1, 2);\n}\n"
    )
    assert signatures_of(text) == [("f", 3), ("S", 2), ("h", 0)]


def test_bodies_of_cpp_are_found():
    text = (
        "namespace a "
        '{\nstruct S {\n  int x = 0;\n  int f() {\n    return "{"[0]; // {\n  }\n};\n'
        "void g(struct S s) {\n  if (s.x) {\n  }\n}\n}\n"
    )
    assert bodies_of(text) == [(4, 6), (8, 11)]
    with pytest.raises(ValueError, match="1 more of the latter"):
        bodies_of("void f() {")


def test_contributing_names_every_place_of_an_activation():
    """The one with the most telling name stands for all of them."""
    places = {str(path.relative_to(ROOT)) for path in SOURCES if "gelu_tanh" in path.read_text()}
    places = {place for place in places if not Path(place).name.startswith("test_")}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert {place for place in places if f"`{place}`" not in text} == set()


def test_contributing_names_every_place_of_a_family():
    """The one with the longest name stands for all of them."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.rst")]
    code = [path for path in SOURCES if not path.is_relative_to(ROOT / "tests")]
    name = re.compile("customized.?sharing", re.IGNORECASE)
    places = {str(path.relative_to(ROOT)) for path in [*code, *pages] if name.search(path.read_text())}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    # A layer's own file is that of its relatives, or a new one.
    places -= {"fusedmoe/reference/layers/sharing.py"}
    assert {place for place in places if f"`{place}`" not in text} == set()


def test_no_numbered_or_vague_names():
    vague = re.compile(r"(^|_)(utils?|common|helpers?|misc|new|old|v\d+|fast)$")
    assert [str(path.relative_to(ROOT)) for path in SOURCES if vague.search(path.stem)] == []


def test_kernels_are_not_importable_by_their_bare_name():
    result = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert "imported as fusedmoe.kernels" in result.stderr
    bare = [path for path in PYTHON for node in ast.walk(ast.parse(path.read_text())) if is_bare_kernels(node)]
    assert bare == []


def test_the_library_imports_neither_the_benchmark_nor_the_demonstration():
    program = (
        "import sys, fusedmoe; print([name for name in sys.modules if name.startswith(('fusedmoe.speed', "
        "'fusedmoe.demo'))])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_every_package_has_its_folder():
    """What setup.py maps, and nothing else, is what the floors number."""
    text = (ROOT / "setup.py").read_text()
    mapped = dict(re.findall(r'"(fusedmoe\.[\w.]+)": "([\w/]+)"', text))
    assert {"fusedmoe": "fusedmoe"} | mapped == {package: folder for folder, package in PACKAGES.items()}


def is_bare_kernels(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "kernels" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "kernels"


def test_readme_names_commands_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text()
        assert (
            set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^ *make ([a-z]+)", text, flags=re.MULTILINE))
            <= targets
        )
        for path in re.findall(r"`((?:fusedmoe|csrc|kernels|bench|examples|tests)/[\w./-]*)`", text):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names = {"model": SharedBottom(4, [3], 2)}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4 and bool(names["report"])
    # The comments beside them say so.
    assert names["out"].shape == (32, 3, 1) and [w.shape for w in names["weights"]] == [(32, 4, 7), (32, 3, 7)]


def test_the_guides_example_runs():
    """Without its adapter the layer is declined, and with it fused."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guide.md").read_text(), flags=re.DOTALL)
    program = f"{block}\nprint(report.fused[0].family, len(report.declined))"
    lines = block.splitlines()
    without = "\n".join(line for line in lines if not line.startswith("fusedmoe.register_adapter"))
    for text, said in ((program, "textbook 0\n"), (f"{without}\nprint(bool(report))", "False\n")):
        result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
        assert result.stdout == said, result.stderr


def test_nothing_names_the_place_where_it_was_written():
    pages = [path for ending in ("*.md", "*.toml", "*.txt", "Makefile") for path in ROOT.glob(ending)]
    place = re.compile("/" + r"work/|/" + r"tmp/|\.\./" + "shared")
    assert [str(path.relative_to(ROOT)) for path in [*SOURCES, *pages] if place.search(path.read_text())] == []
