import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from bfm.errors import UserError
from bfm.yaml import load_yaml, parse_yaml, validate

_BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(8)
)


def test_scalars_follow_yaml_1_2():
    text = "a: 1e17\nb: no\nc: 2017-01-01\nd: 010\ne: 1:30\nf: true\ng: [1, 2.5, ~]\nh: {i: &x 1, j: *x}\n"
    values = parse_yaml(text, file="f")
    assert values == {
        "a": 1e17, "b": "no", "c": "2017-01-01", "d": 10, "e": "1:30", "f": True, "g": [1, 2.5, None],
        "h": {"i": 1, "j": 1},
    }  # fmt: skip
    assert isinstance(values["a"], float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "f.yaml:2: duplicate key 'a'"),
        ("a: {b: 1, b: 2}", "f.yaml:1: duplicate key 'b'"),
        ("", "is empty"),
        ("- 1", "not a mapping"),
        ("a: [", "f.yaml:1"),
        ("a:\n\t- b", "f.yaml:2"),
        ("a: &x [*x]", "contains itself"),
        ("[" * 5000, "too deeply"),
        ("a: \x00", "unacceptable character"),
        ("1: 2", "key '1' is not text"),
        ("? [1]\n: 2", "a key must be text"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        (_BOMB, "aliases expand"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path, text, expected):
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_huge_and_absent_files(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(UserError, match="not UTF-8"):
        load_yaml(path)
    path.write_bytes(b"a: " + b"x" * (1 << 20))
    with pytest.raises(UserError, match="larger than"):
        load_yaml(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path / "absent.yaml")


@given(st.text(max_size=200))
def test_any_text_is_a_dict_or_a_user_error(text):
    try:
        values = parse_yaml(text, file="f")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(values, dict)


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    width: int = 1


class _Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    inner: _Inner = _Inner()
    many: dict[str, _Inner] = {}


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"name": "a", "iner": {}}, "iner", "did you mean 'inner'?"),
        ({"name": "a", "inner": {"widht": 1}}, "inner.widht", "did you mean 'width'?"),
        ({"name": "a", "many": {"x": {"wdth": 1}}}, "many.x.wdth", "did you mean 'width'?"),
        ({}, "name", "is missing"),
        ({"name": 3}, "name", "valid string"),
        ({"name": "a", "inner": {"width": "4"}}, "inner.width", "valid integer"),
    ],
)
def test_models_name_key_and_fix(values, key, expected):
    with pytest.raises(UserError) as caught:
        validate(_Outer, values, file="f.yaml")
    assert caught.value.key == key
    assert expected in str(caught.value)
