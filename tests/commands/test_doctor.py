"""`jaxmoo doctor` names what is there and what is missing, with the extra that brings it."""

from importlib import metadata

from jaxmoo.commands import doctor


def test_it_names_what_a_part_lacks_and_how_to_install_it(monkeypatch, capsys):
    wanted = [
        "jax>=0.4",
        'no-such-package>=1.0; extra == "train"',
        'numpy>=999; extra == "eval"',
        'jaxmoo[train]; extra == "eval"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "_installed", lambda: True)
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "jaxmoo (the library: aggregators, resolve_conflicts, the engine): complete" in said
    assert 'no-such-package is not installed\n  pip install "jaxmoo[train]"' in said
    assert "is older than 999" in said and 'pip install "jaxmoo[eval]"' in said
    assert f"jax {metadata.version('jax')}" in said
    assert "devices:" in said and "cpu" in said


def test_a_library_that_lacks_a_package_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(metadata, "requires", lambda name: ["no-such-package"])
    monkeypatch.setattr(doctor, "_installed", lambda: True)
    assert doctor.main([]) == 1
    assert "no-such-package is not installed" in capsys.readouterr().out
