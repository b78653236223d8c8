"""TensorFlow Datasets: a prepared data set (tests/data/make_tfds_fixture.py), read without TensorFlow."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from dataset_checks import SCANS, TARGETS, assert_stored, says

from bdjax.datasets import load

PREPARED = Path(__file__).parent / "data" / "tfds"


@pytest.fixture
def prepared(tmp_path):
    """A copy of the prepared set, and a function that edits one of its JSON files."""
    shutil.copytree(PREPARED, tmp_path, dirs_exist_ok=True)
    version = tmp_path / "tiny_digits" / "default" / "1.0.0"

    def edit(file, change):
        content = json.loads((version / file).read_text())
        change(content)
        (version / file).write_text(json.dumps(content))

    return version, edit


def tiny(folder) -> str:
    return f"tfds:tiny_digits@{folder}"


@pytest.mark.parametrize("name", ["tiny_digits", "tiny_digits/default:1.0.0"])
def test_tfds_reads_a_prepared_set_without_tensorflow(name):
    data = load(f"tfds:{name}@{PREPARED}")
    assert_stored(data)
    assert data.name == name and data.shape == (8, 8, 1)
    assert data.classes == tuple(f"digit {c}" for c in range(10))
    np.testing.assert_array_equal(data.x_train[..., 0], SCANS[:20] * 15)
    np.testing.assert_array_equal(data.x_test[..., 0], SCANS[20:30] * 15)
    np.testing.assert_array_equal(data.y_train, TARGETS[:20])
    np.testing.assert_array_equal(data.y_test, TARGETS[20:30])
    assert "tensorflow" not in sys.modules


def test_tfds_default_folder_is_an_environment_variable(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(PREPARED))
    assert len(load("tfds:tiny_digits").x_train) == 20


def test_tfds_uses_validation_where_there_is_no_test_split(prepared, tmp_path):
    version, edit = prepared
    edit("dataset_info.json", lambda info: info["splits"][1].update(name="validation"))
    stem = "tiny_digits-{}.array_record-00000-of-00001"
    (version / stem.format("test")).rename(version / stem.format("validation"))
    assert len(load(tiny(tmp_path)).x_test) == 10
    edit("dataset_info.json", lambda info: info["splits"].pop())
    assert "tiny_digits has the splits train; `train` and test or validation are needed" in says(tiny(tmp_path))


def test_tfds_unprepared_states_the_commands(tmp_path):
    message = says(f"tfds:cifar10@{tmp_path}")
    assert f"tfds:cifar10 is not prepared in {tmp_path}" in message
    assert 'pip install "bdjax[tfds]"' in message
    command = f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()"
    assert f'python -c "import tensorflow_datasets as tfds; {command}"' in message


def test_tfds_unknown_name_suggests_the_nearest(tmp_path):
    message = says(f"tfds:mnst@{tmp_path}")
    assert "tfds:mnst" in message and "Did you mean 'mnist'?" in message
    message = says(f"tfds:tiny_digit@{PREPARED}")
    assert "Did you mean 'tiny_digits'?" in message and str(PREPARED) in message
    assert "tfds:not a name" in says(f"tfds:not a name@{tmp_path}")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record.python.array_record_module"])
def test_tfds_missing_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = says(tiny(PREPARED))
    assert package in message and 'pip install "bdjax[tfds]"' in message


def test_tfds_with_a_failed_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", ModuleType("tensorflow_datasets"))
    message = says(tiny(PREPARED))
    assert "lacks a package" in message and 'pip install "bdjax[tfds]"' in message


def test_tfds_without_labels(prepared, tmp_path):
    def drop(features):
        del features["featuresDict"]["features"]["label"]

    prepared[1]("features.json", drop)
    assert "tiny_digits has no feature label; it has image" in says(tiny(tmp_path))


def test_tfds_other_file_format(prepared, tmp_path):
    prepared[1]("dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    message = says(tiny(tmp_path))
    assert "as tfrecord" in message and "data_dir='FOLDER', file_format='array_record'" in message


@pytest.mark.parametrize("size", [None, 1000, 70000])
def test_tfds_damaged_file(prepared, tmp_path, size):
    file = prepared[0] / "tiny_digits-test.array_record-00000-of-00001"
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    message = says(tiny(tmp_path))
    assert "the split test in" in message and "is damaged" in message and str(tmp_path) in message
