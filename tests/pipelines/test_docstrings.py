import importlib
import platform
import sys
import types

import pytest

from clusterlib.errors import StrataError
from pipelines.docstrings import (
    clean_docstring,
    held_out,
    module_files,
    package_version,
    read_docstrings,
    split_docstring,
)

NUMPYDOC = """
    solve(a, b)

    Solve a linear matrix equation, or system of
    linear scalar equations.

    Computes the "exact" solution, `x`, of the well-determined, i.e., full
    rank, linear matrix equation ``ax = b``, see :func:`numpy.linalg.inv` [1]_.

    Parameters
    ----------
    a : (..., M, M) array_like
        Coefficient matrix.
    b : {(M,), (..., M, K)}, array_like
        Ordinate or *dependent* variable values.

    Returns
    -------
    x : array
        Solution to the system.

    See Also
    --------
    scipy.linalg.solve : Similar function in SciPy.

    Notes
    -----
    The solutions are computed using LAPACK routine:

    .. math:: x = y

    Examples
    --------
    >>> np.linalg.solve(a, b)
    array([-1.,  1.])

    References
    ----------
    .. [1] G. Strang, Linear Algebra.
"""

GOOGLE = """Fit the model.

Longer prose that says what is fitted, how long it takes and why one
would do such a thing at all::

    model.fit(x)

Args:
    x (Tensor): the inputs of the model.
    steps: how many steps to take.

Returns:
    The fitted **model**, see `the manual <https://example.org>`_.
"""


def test_numpydoc_loses_signature_code_doctest_and_markup():
    query, passage = split_docstring(NUMPYDOC)
    assert query == "Solve a linear matrix equation, or system of linear scalar equations."
    assert passage == (
        'Computes the "exact" solution, x, of the well-determined, i.e., full rank, linear matrix '
        "equation ax = b, see numpy.linalg.inv. Coefficient matrix. Ordinate or dependent variable "
        "values. Solution "
        "to the system. The solutions are computed using LAPACK routine:"
    )


def test_google_style_keeps_descriptions():
    query, passage = split_docstring(GOOGLE)
    assert query == "Fit the model."
    assert passage == (
        "Longer prose that says what is fitted, how long it takes and why one would do such a "
        "thing at all: the inputs of the model. how many steps to take. The fitted model, see the "
        "manual."
    )


@pytest.mark.parametrize(
    "text",
    [
        "One line only.",
        "Query here.\n\nToo short a passage.",
        "Word\n\n" + "long enough " * 20,
        ">>> f()\n1\n",
    ],
)
def test_docstrings_without_a_pair_are_passed_over(text):
    assert split_docstring(text) is None


def test_literal_blocks_end_where_their_indent_ends():
    assert (
        clean_docstring("Use it so::\n\n    code()\n\n    more()\n\nand then text")
        == "Use it so:\n\nand then text"
    )


def test_packages_are_read_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "fakepkg"
    (package / "tests").mkdir(parents=True)
    body = (
        '"""Read me first please.\n\n'
        + "This passage has more than fifteen words " * 4
        + '"""\nraise SystemExit\n'
    )
    for name in ("__init__.py", "alpha.py", "beta.py", "tests/gamma.py"):
        (package / name).write_text(body)
    (package / "broken.py").write_text("def (:\n")
    (tmp_path / "fakepkg-1.2.dist-info").mkdir()
    (tmp_path / "fakepkg-1.2.dist-info" / "METADATA").write_text("Name: fakepkg\nVersion: 1.2\n")
    (tmp_path / "fakepkg-1.2.dist-info" / "RECORD").write_text("fakepkg/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_version("fakepkg") == "fakepkg 1.2"
    assert [module for module, _ in module_files("fakepkg")] == [
        "fakepkg",
        "fakepkg.alpha",
        "fakepkg.beta",
        "fakepkg.broken",
    ]
    found = [
        item.module for split in ("train", "test") for item in read_docstrings("fakepkg", split)
    ]
    assert sorted(found) == ["fakepkg", "fakepkg.alpha", "fakepkg.beta"]


BODY = '"""Read me first please.\n\n' + "This passage has more than fifteen words " * 4 + '"""\n'


def install(folder, name, version, *files):
    """A distribution of Python files in a folder of its own."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(BODY)


def test_a_module_that_is_one_file_is_that_file(tmp_path, monkeypatch):
    install(tmp_path, "single-file", "3", "onefile.py")
    install(tmp_path, "neighbor", "1", "neighbor/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert module_files("onefile") == [("onefile", tmp_path / "onefile.py")]
    assert package_version("onefile") == "single-file 3"
    importlib.import_module("six")  # which then says of itself that it is a package
    assert [(module, path.name) for module, path in module_files("six")] == [("six", "six.py")]


def test_a_namespace_package_is_what_is_installed_of_it(tmp_path, monkeypatch):
    install(tmp_path / "a", "space-one", "1", "space/one/__init__.py", "space/one/deep.py")
    install(tmp_path / "b", "space-two", "2", "space/two.py", "elsewhere/other.py")
    for folder in "ab":
        monkeypatch.syspath_prepend(tmp_path / folder)
    assert package_version("space") == "space-one 1, space-two 2"
    assert sorted(module for module, _ in module_files("space")) == [
        "space.one",
        "space.one.deep",
        "space.two",
    ]
    assert [module for module, _ in module_files("space.one")] == ["space.one", "space.one.deep"]
    assert module_files("space.two") == [("space.two", tmp_path / "b" / "space" / "two.py")]
    assert "space" not in sys.modules


def test_modules_of_the_standard_library_have_its_version():
    assert (
        package_version("json")
        == package_version("stdlib")
        == f"python {platform.python_version()}"
    )
    assert "json.decoder" in [module for module, _ in module_files("json")]
    assert [module for module, _ in module_files("xml.dom.minidom")] == ["xml.dom.minidom"]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("sys", "sys: it is built in or compiled"),
        ("_cffi_backend", "_cffi_backend: it is built in or compiled"),
        ("numpy.nope", "numpy.nope: numpy is installed and has no Python source of this name"),
        ("numpy..linalg", "no such Python package"),
        ("numpy./etc", "no such Python package"),
        ("", "no such Python package"),
        ("handmade", "no such Python package"),
        ("uninstalled", "uninstalled: no installed distribution holds it"),
    ],
)
def test_what_has_no_docstrings_to_read_is_told(package, message, tmp_path, monkeypatch):
    (tmp_path / "uninstalled.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "handmade", types.ModuleType("handmade"))  # as __main__ may be
    for function in (package_version, module_files):
        with pytest.raises(StrataError, match=message):
            function(package)


def test_a_docstring_that_is_no_unicode_text_is_passed_over():
    assert (
        split_docstring(
            "Read me first.\n\n" + "This passage has more than fifteen words \ud800" * 4
        )
        is None
    )


def test_the_split_is_by_module_and_about_a_tenth():
    modules = [f"package.module{number}" for number in range(2000)]
    assert 150 < sum(map(held_out, modules)) < 250
    train, test = (
        {item.module for item in read_docstrings("numpy", split)} for split in ("train", "test")
    )
    assert train and test and not train & test


def test_at_least_six_sources_and_six_thousand_pairs_are_reachable():
    counts = {}
    for package in ("numpy", "scipy", "pandas", "sklearn", "pyarrow", "stdlib"):
        counts[package] = sum(1 for _ in read_docstrings(package, "train"))
    assert all(counts.values()) and sum(counts.values()) > 6000, counts


def test_absent_packages_are_named():
    with pytest.raises(StrataError, match="no_such_package: no such Python package"):
        package_version("no_such_package")
