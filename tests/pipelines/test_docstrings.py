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
        'Computes the "exact" solution, x, of the well-determined, i.e., full rank, linear matrix equation ax = b, '
        "see numpy.linalg.inv. Coefficient matrix. Ordinate or dependent variable values. Solution to the system. "
        "The solutions are computed using LAPACK routine:"
    )


def test_google_style_keeps_descriptions():
    query, passage = split_docstring(GOOGLE)
    assert query == "Fit the model."
    assert passage == (
        "Longer prose that says what is fitted, how long it takes and why one would do such a thing at all: "
        "the inputs of the model. how many steps to take. The fitted model, see the manual."
    )


@pytest.mark.parametrize(
    "text",
    ["One line only.", "Query here.\n\nToo short a passage.", "Word\n\n" + "long enough " * 20, ">>> f()\n1\n"],
)
def test_docstrings_without_a_pair_are_passed_over(text):
    assert split_docstring(text) is None


def test_literal_blocks_end_where_their_indent_ends():
    assert clean_docstring("Use it so::\n\n    code()\n\n    more()\n\nand then text") == "Use it so:\n\nand then text"


def test_packages_are_read_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "fakepkg"
    (package / "tests").mkdir(parents=True)
    body = '"""Read me first please.\n\n' + "This passage has more than fifteen words " * 4 + '"""\nraise SystemExit\n'
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
    found = [item.module for split in ("train", "test") for item in read_docstrings("fakepkg", split)]
    assert sorted(found) == ["fakepkg", "fakepkg.alpha", "fakepkg.beta"]


def test_the_split_is_by_module_and_about_a_tenth():
    modules = [f"package.module{number}" for number in range(2000)]
    assert 150 < sum(map(held_out, modules)) < 250
    train, test = ({item.module for item in read_docstrings("numpy", split)} for split in ("train", "test"))
    assert train and test and not train & test


def test_at_least_six_sources_and_six_thousand_pairs_are_reachable():
    counts = {}
    for package in ("numpy", "scipy", "pandas", "sklearn", "pyarrow", "stdlib"):
        counts[package] = sum(1 for _ in read_docstrings(package, "train"))
    assert all(counts.values()) and sum(counts.values()) > 6000, counts


def test_absent_packages_are_named():
    with pytest.raises(StrataError, match="no_such_package: no such Python package"):
        package_version("no_such_package")
