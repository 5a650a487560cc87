from __future__ import annotations

import os
import pickle
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from spark_nn.errors import StoreError
from spark_nn.store import RunDir, public_url, store_url


def session(**conf):
    values = {name.replace("_", "."): value for name, value in conf.items()}
    return SimpleNamespace(conf=SimpleNamespace(get=lambda name, default=None: values.get(name, default)))


def test_the_param_comes_before_the_conf_and_the_conf_before_the_default(tmp_path, monkeypatch):
    spark = session(spark_nn_storeUrl="s3://bucket/dir", spark_master="local[2]")
    assert store_url(spark, "hdfs://host/dir") == "hdfs://host/dir"
    assert store_url(spark, None) == "s3://bucket/dir"
    assert store_url(spark, str(tmp_path / "a b")) == f"file://{tmp_path}/a b"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    own = Path(store_url(session(spark_master="local-cluster[2,1,1024]"), None).removeprefix("file://"))
    assert own.parent == tmp_path
    assert stat.S_IMODE(own.stat().st_mode) == 0o700


@pytest.mark.parametrize("url", ["file:/tmp/x", "hdfs:/a/b", "s3a:bucket"])
def test_a_url_without_slashes_is_not_taken_for_a_path(url):
    with pytest.raises(StoreError, match="write it as scheme://"):
        store_url(session(), url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://me:secret@host/a@b/c", "ftp://host/a@b/c"),
        ("simplecache::https://token@host/a?key=secret", "simplecache::https://host/a"),
        ("s3://bucket/a?x=/secret::ftp://me:secret@host", "s3://bucket/a::ftp://host"),
        ("abfss://container@account.dfs.core.windows.net/a", "abfss://container@account.dfs.core.windows.net/a"),
        ("wasb://me:secret@host/a", "wasb://host/a"),
        ("file:///a?b/c@d", "file:///a?b/c@d"),
        ("a?b@c", "a?b@c"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url, shown):
    assert public_url(url) == shown


def test_a_cluster_needs_a_store_that_all_hosts_share():
    with pytest.raises(StoreError, match="no store: on master 'yarn'.*Set the param storeUrl or the Spark conf"):
        store_url(session(spark_master="yarn"), None)


def test_a_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(StoreError, match="belongs to another user"):
        store_url(session(spark_master="local[1]"), None)


@pytest.mark.parametrize("name", ["plain", "with blank", "with%percent", "with=equals"])
def test_files_appear_whole_and_the_directory_goes_with_the_block(tmp_path, name):
    with RunDir.open(f"file://{tmp_path}/{name}") as run:
        assert Path(run.root).parent == tmp_path / name
        assert run.read("missing") is None
        assert run.readJson("missing") is None
        run.writeJson("a.json", {"x": [1, None]})
        run.write("a.json", b"[2]")
        assert run.readJson("a.json") == [2]
        same = pickle.loads(pickle.dumps(run))
        assert same.read("a.json") == b"[2]"
        run.mkdir("deep/er")
        local = tmp_path / "local"
        local.write_bytes(b"bytes")
        run.put(local, "deep/er/file")
        run.get("deep/er/file", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b"bytes"
        assert sorted(path.name for path in Path(run.root).rglob("*") if path.is_file()) == [
            "a.json",
            "alive",
            "file",
        ]
    assert not Path(run.root).exists()


def test_the_directory_goes_after_an_error_too(tmp_path):
    with pytest.raises(KeyError), RunDir.open(tmp_path.as_uri()) as run:
        run.write("file", b"")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_any_filesystem_of_fsspec_will_do():
    with RunDir.open("memory://store") as run:
        run.write("a", b"1")
        assert run.read("a") == b"1"
    assert run.read("a") is None


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(StoreError, match=r"the store 'file://.*/file/x' cannot be written: NotADirectoryError"),
        RunDir.open((tmp_path / "file" / "x").as_uri()),
    ):
        pass
    with pytest.raises(StoreError, match="storeUrl='nosuch://x.*nosuch"), RunDir.open("nosuch://x"):
        pass
