"""What the authors of manifests, scores and links must not achieve, held by whole runs; see SECURITY.md."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from repository import REPOSITORY
from s3_server import KEYS, s3_client, s3_options, s3_server

import batchverify
from batchverify.cli.app import main
from batchverify.errors import BatchverifyError, UsageError

SAMPLES = REPOSITORY / "sample_manifests"
FACES = SAMPLES / "faces"
A, B, C = (str(FACES / name) for name in ("ada_1.jpg", "ada_2.jpg", "chen_2.jpg"))


def record_of(scores: Path) -> dict[str, Any]:
    """The run record in the footer of an output."""
    record: dict[str, Any] = json.loads(pq.read_metadata(scores).metadata[b"batchverify"])
    return record


class Spy(ThreadingHTTPServer):
    """A server of somebody else. asked: the first line and the headers of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Answer)
        self.asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        server: "Spy"

        def do_GET(self) -> None:
            self.server.asked.append(f"{self.requestline}\n{self.headers}")
            self.send_error(403)

        do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815  http.server's names

        def log_message(self, *_: object) -> None:
            """pytest's output is no place for an access log."""


@pytest.fixture
def spy(monkeypatch):
    for name, value in {
        **KEYS,
        "AWS_SESSION_TOKEN": "session-hidden",
        "AZURE_STORAGE_KEY": "aGlkZGVu",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = Spy()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def server_cells(spy: Spy) -> list[str]:
    """Cells that would lead to the spy, with the keys of whoever runs the manifest."""
    here = f"127.0.0.1:{spy.server_port}"
    return [
        f"s3://bucket/a.jpg?endpoint_override={here}&scheme=http&region=us-east-1",
        f"gs://bucket/a.jpg?endpoint_override={here}&scheme=http",
        f"abfs://box/a.jpg?account=a&endpoint_override={here}&enable_tls=false",
        f"abfs://box@{here.replace(':', '.')}/a.jpg",
        f"http://{here}/a.jpg",
    ]


def test_a_manifest_reaches_no_server_that_it_names(spy, cache):
    cells = server_cells(spy)
    table = pa.table({"image_a": [A, *cells], "image_b": [B] * (len(cells) + 1)})
    rows = batchverify.score(table, cache=cache, quiet=True).to_arrow()
    assert rows["status"].to_pylist() == ["ok"] + ["forbidden"] * len(cells)
    assert rows["error_a"].to_pylist()[1:] == ["forbidden"] * len(cells)
    assert spy.asked == []


def test_the_same_uri_on_the_command_line_does_reach_it(spy):
    uri = server_cells(spy)[0].replace("a.jpg", "pairs.csv")
    assert CliRunner().invoke(main, ["check", uri]).exit_code == 2
    asked = len(spy.asked)
    assert asked
    result = CliRunner().invoke(main, ["predict", "-i1", A, "-i2", server_cells(spy)[0], "--no-cache"])
    assert (result.exit_code, "forbidden" in result.stderr) == (3, True)
    assert len(spy.asked) > asked


def test_scores_reach_no_server_that_their_record_names(spy, cache, tmp_path):
    table = pa.table({"image_a": [A, "a.jpg"], "image_b": [B, "b.jpg"], "label": [0, 1]})
    batchverify.score(table, tmp_path / "s.parquet", cache=cache, quiet=True)
    scores = pq.read_table(tmp_path / "s.parquet")
    record = record_of(tmp_path / "s.parquet")
    uri = server_cells(spy)[0].replace("a.jpg", "")
    for name in ("image_root", "cache"):
        changed = {**record, name: uri, "manifest": [uri + "x.csv"]}
        metadata = {b"batchverify": json.dumps(changed).encode()}
        pq.write_table(scores.replace_schema_metadata(metadata), tmp_path / "evil.parquet")
        batchverify.evaluate(tmp_path / "evil.parquet", tmp_path / name, draws=0)
    assert spy.asked == []


@pytest.mark.parametrize("value", [5, [], {}, "x", {"mode": 1}, [{"a": []}], -1, 1e400, True])
def test_a_record_of_other_types_is_no_traceback(cache, tmp_path, value):
    table = pa.table({"image_a": [A], "image_b": [B], "label": [0]})
    batchverify.score(table, tmp_path / "s.parquet", cache=cache, quiet=True)
    scores = pq.read_table(tmp_path / "s.parquet")
    record = record_of(tmp_path / "s.parquet")
    said: list[str] = []
    for name in record:
        text = json.dumps({**record, name: value}).encode()
        pq.write_table(scores.replace_schema_metadata({b"batchverify": text}), tmp_path / "evil.parquet")
        try:
            batchverify.evaluate(tmp_path / "evil.parquet", draws=0)
            batchverify.score(table, tmp_path / "evil.parquet", cache=cache, quiet=True)
        except BatchverifyError as exc:
            said.append(str(exc))
    assert said and not any("\n" in message for message in said)


@pytest.fixture
def fenced(tmp_path) -> Path:
    """A folder of images; one of them is a link that leads out."""
    root = tmp_path / "root"
    root.mkdir()
    for path in (A, B):
        shutil.copy(path, root)
    (root / "link.jpg").symlink_to(C)
    (root / "inside.jpg").symlink_to("ada_1.jpg")
    (tmp_path / "pairs.csv").write_text(
        "image_a,image_b\nada_1.jpg,ada_2.jpg\nlink.jpg,ada_2.jpg\ninside.jpg,ada_2.jpg\n"
    )
    return root


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_link_out_of_the_image_root_is_read_on_request_alone(fenced, tmp_path, cache, engine):
    options = {"image_root": fenced, "cache": cache, "quiet": True, "engine": engine, "num_cpus": 1}
    out = tmp_path / "o.parquet"
    summary = batchverify.score(tmp_path / "pairs.csv", out, **options)
    assert pq.read_table(out)["status"].to_pylist() == ["ok", "forbidden", "ok"]
    assert summary.failures == {"forbidden": 1}
    if engine == "ray":
        return
    with pytest.raises(UsageError, match=r"another job .follow_symlinks: None there, True here"):
        batchverify.score(tmp_path / "pairs.csv", out, follow_symlinks=True, **options)
    followed = batchverify.score(tmp_path / "pairs.csv", out, follow_symlinks=True, overwrite=True, **options)
    assert (followed.failed, pq.read_table(out)["status"].to_pylist()) == (0, ["ok"] * 3)


def test_check_says_which_links_lead_out(fenced, tmp_path):
    arguments = ["check", str(tmp_path / "pairs.csv"), "--image-root", str(fenced)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "link.jpg: a symbolic link leads out of the image root" in result.output
    assert "1 forbidden" in result.output
    assert CliRunner().invoke(main, [*arguments, "--follow-symlinks"]).exit_code == 0


def test_a_report_shows_no_image_that_a_link_leads_to(fenced, tmp_path, cache):
    options = {"image_root": fenced, "cache": cache, "quiet": True, "follow_symlinks": True}
    batchverify.score(tmp_path / "pairs.csv", tmp_path / "s.parquet", **options)
    images = []
    for follow in (False, True):
        out = tmp_path / str(follow)
        batchverify.evaluate(tmp_path / "s.parquet", out, draws=0, image_root=str(fenced), follow_symlinks=follow)
        images.append((out / "report.html").read_text().count("data:image/jpeg;base64,"))
    assert images[0] < images[1]


HIDDEN = "hidden-in-a-cell"


def test_secrets_are_in_no_message_record_or_report(tmp_path):
    secrets = {"AWS_SESSION_TOKEN": "hidden-session", "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=hidden-signature"}
    with s3_server() as address:
        client = s3_client(address)
        client.create_bucket(Bucket="team")
        for path in (A, B):
            client.upload_file(path, "team", Path(path).name)
        cells = [f"https://me:{HIDDEN}@host/a.jpg", f"s3://team/a.jpg?X-Amz-Signature={HIDDEN}"]
        rows = "".join(f'"{cell}",ada_2.jpg,1\n' for cell in cells)
        text = f"image_a,image_b,label\nada_1.jpg,ada_2.jpg,0\n{rows}"
        client.put_object(Bucket="team", Key="pairs.csv", Body=text.encode())
        options = s3_options(address)
        commands = [
            [
                "score",
                f"s3://team/pairs.csv{options}",
                "-o",
                "s.parquet",
                "--cache",
                f"s3://team/c{options}",
                "-v",
            ],
            ["check", f"s3://team/pairs.csv{options}"],
            ["evaluate", "s.parquet", "-o", "report", "-v", "--draws", "0"],
            ["score", f"s3://absent/pairs.csv{options}", "-o", "t.parquet", "-v"],
            ["score", f"https://me:{HIDDEN}@host/pairs.csv", "-o", "t.parquet", "-v"],
            ["score", f"s3://me:{HIDDEN}@team/pairs.csv", "-o", "t.parquet", "-v"],
            ["score", f"s3://team/pairs.csv?secret_key={HIDDEN}", "-o", "t.parquet", "-v"],
            ["predict", "-i1", A, "-i2", f"https://me:{HIDDEN}@host/a.jpg?sig={HIDDEN}", "--no-cache"],
        ]
        said = [run(command, tmp_path, secrets) for command in commands]
    assert [code for code, _ in said] == [0, 1, 0, 2, 2, 2, 2, 3], said
    footer = json.dumps(record_of(tmp_path / "s.parquet"))
    written = [path.read_text() for path in sorted((tmp_path / "report").iterdir())]
    assert len(written) == 2
    for text in (*(text for _, text in said), footer, *written):
        for secret in (HIDDEN, *KEYS.values(), *secrets.values(), "hidden-signature"):
            assert secret not in text, text[:2000]


def run(arguments: list[str], folder: Path, secrets: dict[str, str]) -> tuple[int, str]:
    """The exit code of a command, and everything that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "batchverify.cli", *arguments],
        cwd=folder,
        env={**os.environ, **secrets, "BATCHVERIFY_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr
