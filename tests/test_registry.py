import sys

import pytest

from bench.engine.registry import Registry, did_you_mean, load_folders, load_plugins


def two() -> Registry:
    registry = Registry("attack")

    @registry("badnets")
    class BadNets:
        pass

    @registry("wanet")
    class WaNet:
        pass

    return registry


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder on the path, whose modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_class_gets_its_name_and_is_found_by_it():
    registry = two()
    assert registry["badnets"].__name__ == "BadNets"
    assert registry["wanet"].name == "wanet"
    assert list(registry) == ["badnets", "wanet"]


def test_the_decorator_returns_the_class_itself():
    registry = Registry("attack")

    class Sig:
        pass

    assert registry("sig")(Sig) is Sig


def test_a_taken_name_is_refused_with_its_owner():
    registry = two()
    with pytest.raises(ValueError, match=f"attack 'badnets' is taken by {__name__}; choose another name"):

        @registry("badnets")
        class Another:
            pass

    assert registry["badnets"].__name__ == "BadNets"


def test_a_class_of_the_same_name_in_another_module_is_another_class():
    registry = two()
    stranger = type("BadNets", (), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="is taken"):
        registry("badnets")(stranger)


def test_a_module_may_be_loaded_again():
    registry = Registry("attack")
    for _ in range(2):

        @registry("sig")
        class Sig:
            pass

    assert registry["sig"] is Sig


def test_an_unknown_name_is_answered_with_the_nearest_and_with_all():
    with pytest.raises(LookupError) as caught:
        two()["wanett"]
    assert caught.value.args[0] == "no attack is named 'wanett'. Did you mean 'wanet'? Known: badnets, wanet."


def test_where_nothing_is_near_nothing_is_suggested():
    with pytest.raises(LookupError) as caught:
        two()["zzz"]
    assert caught.value.args[0] == "no attack is named 'zzz'. Known: badnets, wanet."


def test_known_names_are_sorted():
    assert did_you_mean("q", ["wanet", "badnets", "sig"]) == " Known: badnets, sig, wanet."


def test_asking_for_an_unknown_name_adds_nothing():
    registry = two()
    with pytest.raises(LookupError):
        registry["wanett"]
    assert "wanett" not in registry
    assert registry.get("wanett") is None


def test_every_module_of_a_folder_is_loaded_once(folder):
    package = folder / "my_methods"
    package.mkdir()
    (package / "__init__.py").write_text("loaded = []\n")
    for name in ("one", "two"):
        (package / f"{name}.py").write_text(f"import my_methods\nmy_methods.loaded.append({name!r})\n")
    for _ in range(2):
        load_folders("my_methods")
    assert sorted(sys.modules["my_methods"].loaded) == ["one", "two"]


def test_a_named_plugin_is_imported(folder):
    (folder / "my_attack.py").write_text(
        "from attacks.base import Attack, attack\n@attack('of_a_plugin')\nclass Mine(Attack):\n    paper = 'none'\n"
    )
    from attacks.base import attack

    try:
        load_plugins(["my_attack"])
        assert attack["of_a_plugin"].__module__ == "my_attack"
    finally:
        attack.pop("of_a_plugin", None)


@pytest.mark.parametrize(
    "name", ["no_such_plugin", "no_such_plugin.attack", "json.no_such_plugin", "no_such_plugin.py"]
)
def test_a_plugin_that_is_not_there_is_a_mistake_with_advice(folder, name):
    with pytest.raises(LookupError, match=f"no module is named '{name}'.*PYTHONPATH"):
        load_plugins([name])


def test_a_plugin_that_lacks_a_package_shows_which(folder):
    (folder / "needs_more.py").write_text("import no_such_package\n")
    with pytest.raises(LookupError, match=r"needs_more\.py, line 1: .*no_such_package"):
        load_plugins(["needs_more"])


BROKEN = {
    "syntax": ("x = 1\ndef f(:\n", 2),
    "indentation": ("def f():\nreturn 1\n", 2),
    "import": ("import os\n\nfrom os import no_such_name\n", 3),
    "package": ("import sys\nimport no_such_package.part\n", 2),
    "name": ("\n\nundefined\n", 3),
    "library": ("import json\njson.loads('{')\n", 2),
    "exit": ("import sys\nsys.exit('no script')\n", 2),
    "taken": (
        "from attacks.base import Attack, attack\n@attack('badnets')\nclass Mine(Attack):\n    paper = 'none'\n",
        2,
    ),
    "encoding": (b"x = 1\ny = '\xff'\n", None),
    "zeros": (b"x = 1\n\x00\n", None),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("way", ["named", "beside ours", "entry point", "imported by another"])
def test_a_module_that_cannot_be_imported_is_one_line_with_its_file_and_line(folder, kind, way):
    text, line = BROKEN[kind]
    module = {"beside ours": "my_methods.broken_plugin"}.get(way, "broken_plugin")
    file = folder / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    if way == "beside ours":
        (folder / "my_methods" / "__init__.py").touch()
    if way == "imported by another":
        (folder / "innocent.py").write_text("import broken_plugin\n")
    if way == "entry point":
        (folder / "broken-1.0.dist-info").mkdir()
        (folder / "broken-1.0.dist-info" / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
        (folder / "broken-1.0.dist-info" / "entry_points.txt").write_text(f"[backdoor_bench]\nmine = {module}\n")
    from attacks import badnets  # noqa: F401 - takes its name

    names = {"named": [module], "imported by another": ["innocent"], "beside ours": ["my_methods"]}.get(way, [])
    with pytest.raises(LookupError) as caught:
        load_folders(*names) if way == "beside ours" else load_plugins(names)
    message = str(caught.value)
    assert "\n" not in message
    assert module.rpartition(".")[2] in message or "innocent" in message
    if line is not None:
        assert f"{file}, line {line}: " in message


def test_installed_packages_are_found_by_their_entry_point(folder):
    (folder / "installed_attack.py").write_text("seen = True\n")
    (folder / "installed_attack-1.0.dist-info").mkdir()
    (folder / "installed_attack-1.0.dist-info" / "METADATA").write_text("Name: installed_attack\nVersion: 1.0\n")
    (folder / "installed_attack-1.0.dist-info" / "entry_points.txt").write_text(
        "[backdoor_bench]\nmine = installed_attack\n"
    )
    load_plugins([])
    assert sys.modules["installed_attack"].seen
