"""Registries: who owns them, what they refuse, and how families of pydantic models find their member."""

import sys
from typing import ClassVar

import pytest
from pydantic import BaseModel, ValidationError

from speculators.utils import ClassRegistryMixin, PydanticClassRegistryMixin, ReloadableBaseModel


def test_unrelated_bases_never_share_a_registry():
    class One(ClassRegistryMixin): ...

    class Two(ClassRegistryMixin): ...

    @One.register("a")
    class A(One): ...

    @Two.register()
    class B: ...  # needs not derive from the base

    assert One.registry == {"a": A}
    assert Two.registry == {"B": B}
    assert ClassRegistryMixin.registry is None
    assert A.registry is One.registry


def test_a_subclass_that_registers_gets_a_registry_of_its_own():
    class Base(ClassRegistryMixin): ...

    Base.register_decorator(int, "int")

    class Sub(Base): ...

    Sub.register_decorator(str)
    assert Base.registry == {"int": int}
    assert Sub.registry == {"str": str}


def test_registration_refuses_what_is_no_name_no_class_or_taken():
    class Base(ClassRegistryMixin): ...

    with pytest.raises(ValueError, match="name must be a string or None"):
        Base.register(3)
    with pytest.raises(ValueError, match="must be used as a class decorator"):
        Base.register_decorator(int, 3)
    with pytest.raises(TypeError, match="must be used as a class decorator"):
        Base.register_decorator("not a class")
    with pytest.raises(ValueError, match="must be called after registering classes"):
        Base.registered_classes()
    assert Base.register_decorator(int) is int
    with pytest.raises(ValueError, match="already registered"):
        Base.register("int")(float)
    assert Base.registered_classes() == (int,)


def test_discovery_imports_a_module_when_its_name_is_asked_for(tmp_path, monkeypatch):
    package = tmp_path / "found_algorithms"
    for name in ("first", "second"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text(f"import registering\nregistering.Base.register('{name}')(int)\n")
    (package / "__init__.py").write_text("")
    (tmp_path / "registering.py").write_text(
        "from speculators.utils import ClassRegistryMixin\n"
        "class Base(ClassRegistryMixin):\n"
        "    auto_package = 'found_algorithms'\n    registry_auto_discovery = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import registering

    base = registering.Base
    assert base.available_names() == ["first", "second"]
    assert "found_algorithms.first" not in sys.modules
    assert base.find("first") is int
    assert list(base.registry) == ["first"]
    assert base.find("third") is None
    (package / "third").mkdir()
    (package / "third" / "__init__.py").write_text("raise RuntimeError('broken')")
    with pytest.raises(RuntimeError, match="broken"):
        base.auto_populate_registry()
    (package / "third" / "__init__.py").write_text("")
    assert base.auto_populate_registry() is True
    assert base.auto_populate_registry() is False
    assert base.registry_populated
    assert sorted(base.registry) == ["first", "second"]


def test_an_installed_entry_point_is_a_provider(tmp_path, monkeypatch):
    info = tmp_path / "pointing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: pointing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[test.group]\npointed = pointed_module\n")
    (tmp_path / "pointed_module.py").write_text("import pointing_base\npointing_base.Base.register('pointed')(int)\n")
    (tmp_path / "pointing_base.py").write_text(
        "from speculators.utils import ClassRegistryMixin\n"
        "class Base(ClassRegistryMixin):\n"
        "    auto_package = ()\n    entry_point_group = 'test.group'\n    registry_auto_discovery = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import pointing_base

    assert pointing_base.Base.available_names() == ["pointed"]
    assert pointing_base.Base.find("pointed") is int


def test_discovery_without_a_place_to_look_is_an_error():
    class Base(ClassRegistryMixin):
        registry_auto_discovery = True

    with pytest.raises(ValueError, match="auto_package"):
        Base.auto_populate_registry()


def test_reload_schema_is_one_rebuild(monkeypatch):
    calls = []
    monkeypatch.setattr(ReloadableBaseModel, "model_rebuild", lambda **kwargs: calls.append(kwargs))
    ReloadableBaseModel.reload_schema()
    assert calls == [{"force": True}]


def animals():
    class Animal(PydanticClassRegistryMixin):
        schema_discriminator: ClassVar[str] = "kind"
        kind: str

        @classmethod
        def __pydantic_schema_base_type__(cls):
            return cls if cls.__name__ == "Animal" else Animal

    class Cage(ReloadableBaseModel):
        one: Animal
        many: list[Animal] = []
        named: dict[str, Animal] = {}

    return Animal, Cage


def test_validating_the_root_gives_the_member_its_tag_names_wherever_it_stands():
    Animal, Cage = animals()

    @Animal.register("cat")
    class Cat(Animal):
        kind: str = "cat"
        lives: int = 9

    cat = Animal.model_validate({"kind": "cat", "lives": 3})
    assert type(cat) is Cat and cat.lives == 3
    cage = Cage.model_validate({"one": {"kind": "cat"}, "many": [{"kind": "cat"}], "named": {"x": cat}})
    assert type(cage.many[0]) is Cat
    expected = {
        "one": {"kind": "cat", "lives": 9},
        "many": [{"kind": "cat", "lives": 9}],
        "named": {"x": {"kind": "cat", "lives": 3}},
    }
    assert cage.model_dump() == expected
    assert Cage.model_validate_json(cage.model_dump_json()) == cage


def test_a_class_registered_after_the_schemas_were_built_is_known_at_once_and_after_a_reload():
    Animal, Cage = animals()
    Animal.register("cat")(type("Cat", (Animal,), {"__module__": __name__}))
    Cage.model_validate({"one": {"kind": "cat"}})

    @Animal.register("dog")
    class Dog(Animal):
        kind: str = "dog"

    assert type(Cage.model_validate({"one": {"kind": "dog"}}).one) is Dog
    Animal.reload_schema()
    Cage.reload_schema()
    assert type(Cage.model_validate({"one": {"kind": "dog"}}).one) is Dog


def test_the_root_called_as_a_constructor_stays_the_root_and_carries_the_members_fields():
    Animal, _ = animals()

    @Animal.register("cat")
    class Cat(Animal):
        kind: str = "cat"
        lives: int = 9

    root = Animal(kind="cat")
    assert type(root) is Animal and root.lives == 9
    assert root.model_dump() == {"kind": "cat", "lives": 9}
    with pytest.raises(ValidationError) as error:
        Animal()
    assert error.value.errors()[0]["type"] == "union_tag_not_found" and "kind" in str(error.value)


def test_an_unknown_tag_lists_the_known_ones():
    Animal, _ = animals()
    Animal.register("cat")(type("Cat", (Animal,), {"__module__": __name__}))
    with pytest.raises(ValidationError) as error:
        Animal.model_validate({"kind": "cow"})
    assert error.value.errors()[0]["type"] == "union_tag_invalid"
    assert "'cow'" in str(error.value) and "'cat'" in str(error.value)


def test_an_empty_registry_accepts_anything_unless_the_base_says_otherwise():
    _, Cage = animals()
    assert Cage(one={"whatever": 1}).one == {"whatever": 1}


def test_only_pydantic_models_can_be_members():
    Animal, _ = animals()
    with pytest.raises(TypeError, match="not a subclass of Pydantic BaseModel"):
        Animal.register("x")(int)
    with pytest.raises(TypeError, match="must be used as a class decorator"):
        Animal.register_decorator("text")

    class Bee(BaseModel):
        kind: str = "bee"

    with pytest.raises(ValueError, match="must be used as a class decorator with a name"):
        Animal.register_decorator(Bee, 3)
    with pytest.raises(ValueError, match="name must be a string or None"):
        Animal.register(3)


def test_a_member_may_be_any_pydantic_model():
    Animal, _ = animals()

    @Animal.register("stone")
    class Stone(BaseModel):
        kind: str = "stone"

    assert type(Animal.model_validate({"kind": "stone"})) is Stone


def test_a_family_needs_a_root():
    class Rootless(PydanticClassRegistryMixin):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Rootless()


def test_every_name_utils_lists_exists():
    import speculators.utils

    assert all(getattr(speculators.utils, name) for name in speculators.utils.__all__)
